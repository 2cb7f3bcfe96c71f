//! The artifact server inside act. It lives as long as a workflow runs, so one runs that does nothing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::json;

use super::twirp::ArtifactServer;
use super::{RUNS, first_line, local, tool};
use crate::process::{Process, free_ports};

const WORKFLOW: &str = "on: push
jobs:
  hold:
    runs-on: ubuntu-latest
    steps:
      - run: touch \"$HOLDING\" && exec sleep 100000
";

pub fn version() -> Result<String> {
    first_line(Command::new(tool("act/bin/act")?).arg("--version"))
}

pub fn start(directory: &Path) -> Result<ArtifactServer> {
    let home = directory.join("act");
    fs::create_dir_all(home.join("act"))?;
    // Without it act asks which image it should use.
    fs::write(home.join("act/actrc"), "")?;
    fs::write(home.join("hold.yml"), WORKFLOW)?;
    let address = local(free_ports(1));
    let (log, holding) = (directory.join("act.log"), home.join("holding"));
    let mut command = Command::new(tool("act/bin/act")?);
    command.args([
        "push",
        "-W",
        "hold.yml",
        "-P",
        "ubuntu-latest=-self-hosted",
        "--pull=false",
    ]);
    command.args([
        "--action-offline-mode",
        "--no-cache-server",
        "--artifact-server-addr",
        "127.0.0.1",
    ]);
    command.args([
        "--artifact-server-port",
        &address.port().to_string(),
        "--artifact-server-path",
    ]);
    command
        .arg(home.join("store"))
        .arg("--env")
        .arg(format!("HOLDING={}", holding.display()));
    command
        .env("HOME", &home)
        .env("XDG_CONFIG_HOME", &home)
        .env("XDG_CACHE_HOME", &home)
        .current_dir(&home);
    let mut process = Process::start(&mut command, &log, "TERM")?;
    process.ready(&log, || holding.exists())?;
    let tokens = RUNS
        .into_iter()
        .map(|run| Ok((run, token(run)?)))
        .collect::<Result<_>>()?;
    Ok(ArtifactServer {
        process,
        origin: address.into(),
        job: "",
        tokens,
        internal: None,
        beside: None,
    })
}

/// As act makes it: with an empty key.
fn token(run: &str) -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let number: u32 = run.parse()?;
    let claims = json!({
        "nbf": now.as_secs() - 60,
        "exp": (now + Duration::from_secs(24 * 3600)).as_secs(),
        "scp": format!("Actions.Results:{run}:{run}"),
        "TaskID": number, "RunID": number, "JobID": number,
        "ac": r#"[{"Scope":"","Permission":2}]"#,
    });
    let encode = |text: String| URL_SAFE_NO_PAD.encode(text);
    let signed = format!(
        "{}.{}",
        encode(r#"{"alg":"HS256","typ":"JWT"}"#.to_owned()),
        encode(claims.to_string())
    );
    let mac = Hmac::<sha2::Sha256>::new_from_slice(&[])?.chain_update(&signed);
    Ok(format!(
        "{signed}.{}",
        URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())
    ))
}
