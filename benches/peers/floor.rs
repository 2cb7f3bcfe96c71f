//! The floors: this program again, as one of the bare servers of `floors`.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::twirp::ArtifactServer;
use super::{RUNS, local};
use crate::load::Client;
use crate::process::{Process, free_ports};

/// With `write`, bodies go to files in the directory.
pub fn start(directory: &Path, write: bool) -> Result<ArtifactServer> {
    let address = local(free_ports(1));
    let log = directory.join("floor.log");
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["floor", &address.to_string()]);
    if write {
        command.arg(directory);
    }
    let mut process = Process::start(&mut command, &log, "TERM")?;
    process.ready(&log, || Client::new(address).call("GET", "/", "", &[]).is_ok())?;
    Ok(ArtifactServer {
        process,
        origin: address.into(),
        job: "build",
        // It asks nobody; but clients look into their token.
        tokens: RUNS.map(|run| (run, TOKEN.to_owned())).into(),
        internal: None,
        beside: None,
    })
}

/// Not signed: `{"alg":"none"}`, `{"scp":"Actions.Results:1:build"}`.
const TOKEN: &str = "eyJhbGciOiJub25lIn0.eyJzY3AiOiJBY3Rpb25zLlJlc3VsdHM6MTpidWlsZCJ9.none";
