//! A forge beside Wharfinger: an `hs256` issuer in the configuration, and the tokens it signs.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use wharfinger::config::Config;
use wharfinger::papers::{IssuerKind, IssuerSettings};

pub const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

/// What the issuer of that name signs with.
pub fn secret(name: &str) -> String {
    format!("{name}'s own secret: 3q2+7wkY1xT5mZ0rVb8sQe")
}

/// Adds an issuer `name` with the `iss` `https://<name>.example` to a configuration.
pub fn add(config: &mut Config, name: &str, audience: Option<&str>) {
    let secret_file = config.data_dir.with_file_name(format!("{name}.secret"));
    std::fs::write(&secret_file, secret(name)).unwrap();
    std::fs::set_permissions(&secret_file, PermissionsExt::from_mode(0o600)).unwrap();
    config.issuers.push(IssuerSettings {
        name: name.to_owned(),
        kind: IssuerKind::Hs256,
        iss: Some(format!("https://{name}.example")),
        default: false,
        secret_file,
        previous_secret_file: None,
        audience: audience.map(str::to_owned),
        repository: None,
        max_lifetime: std::time::Duration::from_secs(24 * 3600),
        write_implies_read: false,
    });
}

/// A configuration file below `directory` with an issuer `name`, as [`add`] makes it.
pub fn config_file(directory: &Path, name: &str) -> PathBuf {
    let (secret_file, config) = (directory.join(format!("{name}.secret")), directory.join("issuers.toml"));
    std::fs::write(&secret_file, secret(name)).unwrap();
    std::fs::set_permissions(&secret_file, PermissionsExt::from_mode(0o600)).unwrap();
    let lines = [
        "[[issuers]]".to_owned(),
        format!("name = \"{name}\""),
        "kind = \"hs256\"".to_owned(),
        format!("iss = \"https://{name}.example\""),
        format!("secret_file = \"{}\"", secret_file.display()),
    ];
    std::fs::write(&config, lines.join("\n")).unwrap();
    config
}

/// Good claims of the issuer `name` for a job.
pub fn claims(name: &str, repository: &str, run: &str, job: &str, now_ms: i64) -> Value {
    json!({
        "iss": format!("https://{name}.example"),
        "scp": format!("Actions.Results:{run}:{job}"),
        "repository": repository,
        "exp": now_ms / 1000 + 3600,
    })
}

/// A token with this header and these claims, whatever they are.
pub fn sign(secret: &[u8], header: &str, claims: &str) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let mac = Hmac::<sha2::Sha256>::new_from_slice(secret)
        .unwrap()
        .chain_update(&signed);
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}
