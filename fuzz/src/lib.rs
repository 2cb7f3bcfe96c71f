//! What several targets need: papers with fixed keys.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use wharfinger::papers::{IssuerKind, IssuerSettings, Papers, RootSecret};

pub const NOW_MS: i64 = 1_800_000_000_000;
pub const ORIGIN: &str = "http://localhost:8080";
/// What one issuer, `https://forge.example`, signs with.
pub const ISSUER_SECRET: &str = "fuzzing only: 8vQ2mZ-x7Kc1RwT5yLb0";

/// The public key that the other one, `https://public.example`, has: RFC 8037, appendix A.2.
pub const PUBLIC_KEY: &str = r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;

/// The same keys in every process, so that a finding can be replayed.
pub fn papers() -> Papers {
    let directory = std::env::temp_dir().join(format!("wharfinger-fuzz-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let secret = |name: &str, secret: &str| {
        let path = directory.join(name);
        fs::write(&path, secret).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        path
    };
    let forge = IssuerSettings {
        name: "forge".to_owned(),
        kind: IssuerKind::Hs256,
        iss: Some("https://forge.example".to_owned()),
        default: true,
        secret_file: Some(secret("forge", ISSUER_SECRET)),
        previous_secret_file: None,
        jwks_url: None,
        jwks_file: None,
        allowed_owner_ids: None,
        allowed_repository_ids: None,
        audience: None,
        repository: None,
        max_lifetime: Duration::from_secs(24 * 3600),
        write_implies_read: false,
    };
    let public = IssuerSettings {
        name: "public".to_owned(),
        kind: IssuerKind::Jwks,
        iss: Some("https://public.example".to_owned()),
        default: false,
        secret_file: None,
        jwks_file: Some(secret("public", &format!(r#"{{"keys":[{PUBLIC_KEY}]}}"#))),
        ..forge.clone()
    };
    let root = RootSecret::load(&secret("root", "fuzzing only: uJ4eHs9-pD3nXq6VgYa8")).unwrap();
    let papers = Papers::new(&[forge, public], &root, ORIGIN).unwrap();
    fs::remove_dir_all(&directory).unwrap();
    papers
}
