//! What lies in `deploy/` speaks of what there is: settings, metrics, probes. Its YAML is read by `make test`, too.

use std::path::Path;

use serde_json::Value;
use wharfinger::config::{Config, Overrides};

/// Where every metric is described.
const TELEMETRY: &str = include_str!("../../src/app/telemetry.rs");
const DASHBOARD: &str = include_str!("../../deploy/grafana/wharfinger.json");
const DEPLOYMENT: &str = include_str!("../../deploy/kubernetes/deployment.yaml");
const SERVICE: &str = include_str!("../../deploy/systemd/wharfinger.service");
const COMPOSE: &str = include_str!("../../docker-compose.yml");

fn load(file: Option<&str>, environment: &[(String, String)]) -> Config {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let flags = Overrides {
        file: file.map(|file| root.join(file)),
        values: vec![("database.url", "postgres://localhost/wharfinger".to_owned())],
    };
    Config::load(&flags, environment.iter().cloned()).unwrap().config
}

#[test]
fn the_configuration_for_kubernetes_is_one() {
    let config = load(Some("deploy/kubernetes/wharfinger.toml"), &[]);
    assert_eq!(config.public_origin(), "https://artifacts.example.com");
    assert_eq!((config.listen.port(), config.internal_listen.port()), (8080, 9090));
    for used in [
        "/healthz",
        "/readyz",
        "enableServiceLinks: false",
        "containerPort: 8080",
        "containerPort: 9090",
    ] {
        assert!(DEPLOYMENT.contains(used), "{used}");
    }
    let stops_in = config.server.drain_delay + config.server.drain_timeout;
    let grace = DEPLOYMENT.split("terminationGracePeriodSeconds: ").nth(1).unwrap();
    let grace: u64 = grace.split_whitespace().next().unwrap().parse().unwrap();
    assert!(grace > stops_in.as_secs(), "killed before it has stopped");
}

#[test]
fn variables_are_settings() {
    let words = [DEPLOYMENT, SERVICE, COMPOSE].join("\n");
    let is_part = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    let mut seen = 0;
    for word in words
        .split(|c: char| !is_part(c))
        .filter(|word| word.starts_with("WHARFINGER_") && word.len() > 11)
    {
        let name = word.trim_end_matches("_FILE").trim_start_matches("WHARFINGER_");
        // The file's own, and what a service link would bring.
        if ["CONFIG", "PORT"].contains(&name) {
            continue;
        }
        let key = name.to_ascii_lowercase().replace("__", ".");
        let default: toml::Table = toml::from_str(include_str!("../../config/default.toml")).unwrap();
        let known = match key.split_once('.') {
            Some((section, key)) => default[section].as_table().unwrap().contains_key(key),
            None => default.contains_key(&key) || default.contains_key(&format!("{key}_file")),
        };
        assert!(known, "{word} is no setting");
        seen += 1;
    }
    assert!(seen >= 8, "{seen}");
}

#[test]
fn the_dashboard_shows_metrics_that_there_are() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut seen = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            let names = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            for name in names.filter(|name| name.starts_with("wharfinger_")) {
                let name = name.trim_end_matches("_bucket");
                assert!(TELEMETRY.contains(&format!("\"{name}\"")), "{name} is no metric");
                seen += 1;
            }
        }
    }
    assert!(seen >= 15, "{seen}");
}
