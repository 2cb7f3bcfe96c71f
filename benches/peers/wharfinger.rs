//! Wharfinger: SQLite and disk, or Postgres and SeaweedFS.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use super::postgres::Postgres;
use super::seaweedfs::{self, Seaweedfs};
use super::twirp::ArtifactServer;
use super::{RUNS, Server as _, answers, local};
use crate::process::{Process, free_ports};

const JOB: &str = "build";

pub fn embedded(directory: &Path, durability: &str) -> Result<ArtifactServer> {
    start(
        directory,
        &[("WHARFINGER_STORAGE__DURABILITY", durability.to_owned())],
        None,
    )
}

/// As `embedded` without syncing, with a certificate of its own.
pub fn over_tls(directory: &Path) -> Result<ArtifactServer> {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
    let (cert_file, key_file) = (directory.join("cert.pem"), directory.join("key.pem"));
    fs::write(&cert_file, made.cert.pem())?;
    write_secret(&key_file, &made.signing_key.serialize_pem())?;
    let settings = [
        ("WHARFINGER_STORAGE__DURABILITY", "process".to_owned()),
        ("WHARFINGER_TLS__CERT_FILE", cert_file.display().to_string()),
        ("WHARFINGER_TLS__KEY_FILE", key_file.display().to_string()),
    ];
    let mut server = start(directory, &settings, None)?;
    server.origin = server.origin.with_certificate(made.cert.der().clone())?;
    Ok(server)
}

/// As `embedded` without syncing, with a cleaner that looks for work every second.
pub fn eager_to_clean(directory: &Path) -> Result<ArtifactServer> {
    let settings = [
        ("WHARFINGER_STORAGE__DURABILITY", "process".to_owned()),
        ("WHARFINGER_CLEANER__INTERVAL", "1s".to_owned()),
    ];
    start(directory, &settings, None)
}

pub fn on_postgres_and_s3(directory: &Path) -> Result<ArtifactServer> {
    let postgres = Postgres::start(directory)?;
    let store = Seaweedfs::start(directory)?;
    let secret = directory.join("root.secret");
    write_secret(&secret, "for-measuring-only-8Zr2LkT0aWnD4yEoJ7hB1uGf\n")?;
    let settings = [
        ("WHARFINGER_DATABASE__URL", postgres.url()),
        ("WHARFINGER_SECRET_FILE", secret.display().to_string()),
        (
            "WHARFINGER_STORAGE__URL",
            format!("s3://{}/wharfinger", seaweedfs::BUCKET),
        ),
        ("WHARFINGER_STORAGE__ENDPOINT", store.origin().to_string()),
        ("WHARFINGER_STORAGE__ACCESS_KEY_ID", seaweedfs::KEY_ID.to_owned()),
        ("WHARFINGER_STORAGE__SECRET_ACCESS_KEY", seaweedfs::KEY.to_owned()),
    ];
    start(directory, &settings, Some((postgres, store)))
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o600))?)
}

fn start(
    directory: &Path,
    settings: &[(&str, String)],
    beside: Option<(Postgres, Seaweedfs)>,
) -> Result<ArtifactServer> {
    let first = free_ports(2);
    let (address, internal) = (local(first), local(first + 1));
    let command = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wharfinger"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("WHARFINGER_") {
                command.env_remove(name);
            }
        }
        command
            .env("WHARFINGER_DATA_DIR", directory.join("data"))
            .env("WHARFINGER_LISTEN", address.to_string())
            .env("WHARFINGER_INTERNAL_LISTEN", internal.to_string())
            .env("WHARFINGER_SERVER__DRAIN_DELAY", "0s")
            .envs(settings.iter().map(|(name, value)| (name, value)))
            .args(arguments);
        command
    };
    let log = directory.join("wharfinger.log");
    let mut process = Process::start(&mut command(&["serve"]), &log, "TERM")?;
    process.ready(&log, || answers(internal, "/readyz"))?;
    let mint = |run| {
        let flags = [
            "token",
            "mint",
            "--repository",
            "octo/demo",
            "--run-id",
            run,
            "--job-id",
            JOB,
        ];
        let output = command(&flags).output()?;
        ensure!(
            output.status.success(),
            "token mint: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok((run, String::from_utf8(output.stdout)?.trim().to_owned()))
    };
    let tokens = RUNS.into_iter().map(mint).collect::<Result<_>>()?;
    Ok(ArtifactServer {
        process,
        origin: address.into(),
        job: JOB,
        tokens,
        internal: Some(internal),
        beside,
    })
}
