//! A private Postgres for Wharfinger, with Postgres' own settings: what it commits is synced.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use super::{first_line, tool};
use crate::process::{Process, free_ports};

/// Postgres refuses to run as root; `tests/with-postgres.sh` makes the same one.
const USER: &str = "wharfinger-test";

pub struct Postgres {
    process: Process,
    port: u16,
}

pub fn version() -> Result<String> {
    let said = first_line(Command::new(tool("postgres-bin/postgres")?).arg("--version"))?;
    Ok(said.replace("postgres (PostgreSQL)", "PostgreSQL"))
}

impl Postgres {
    pub fn start(directory: &Path) -> Result<Self> {
        let home = directory.join("postgres");
        fs::create_dir(&home)?;
        let root = fs::metadata("/proc/self")?.uid() == 0;
        if root {
            let _ = Command::new("useradd")
                .args(["--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER])
                .stderr(Stdio::null())
                .status()?;
            // It has to reach its own directory.
            ensure!(Command::new("chown").arg(USER).arg(&home).status()?.success(), "chown");
            ensure!(
                Command::new("chmod").arg("o+x").arg(directory).status()?.success(),
                "chmod"
            );
        }
        let command = |program: &str| -> Result<Command> {
            let path: PathBuf = tool(&format!("postgres-bin/{program}"))?.canonicalize()?;
            let mut command = if root {
                let mut command = Command::new("/usr/sbin/runuser");
                command.args(["-u", USER, "--"]).arg(path);
                command
            } else {
                Command::new(path)
            };
            command.current_dir(&home);
            Ok(command)
        };
        let data = home.join("data");
        let output = command("initdb")?
            .args([
                "-U",
                "postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",
                "-D",
            ])
            .arg(&data)
            .output()?;
        ensure!(
            output.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let port = free_ports(1);
        let log = directory.join("postgres.log");
        let mut server = command("postgres")?;
        server.arg("-D").arg(&data).args(["-p", &port.to_string()]);
        server.args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]);
        let mut process = Process::start(&mut server, &log, "INT")?;
        let check = || {
            command("pg_isready").and_then(|mut command| {
                let flags = ["-q", "-h", "127.0.0.1", "-p", &port.to_string()];
                Ok(command.args(flags).status()?.success())
            })
        };
        process.ready(&log, || check().unwrap_or_default())?;
        Ok(Self { process, port })
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}
