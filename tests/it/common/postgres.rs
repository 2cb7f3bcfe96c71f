//! A Postgres of a test's own, to stop and start at will. The one of `tests/with-postgres.sh` is everybody's.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::process::free_port;

/// Who Postgres runs as where the tests run as root, which it refuses. `tests/with-postgres.sh` makes the user.
const USER: &str = "wharfinger-test";

/// Stops, and takes its directory away, when dropped.
pub struct Postgres {
    directory: TempDir,
    port: u16,
}

impl Postgres {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let postgres = Self {
            directory,
            port: free_port(),
        };
        postgres.give(postgres.directory.path());
        let data = postgres.data();
        postgres.run(
            "initdb",
            &[
                "-U",
                "postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",
                "-D",
                &data,
            ],
        );
        postgres.start_again();
        postgres
    }

    /// The database `postgres` of this cluster.
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns once it takes connections.
    pub fn start_again(&self) {
        let options = format!(
            "-p {} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''",
            self.port
        );
        let log = self.path("server.log");
        self.run(
            "pg_ctl",
            &[
                "-D",
                &self.data(),
                "-w",
                "-l",
                log.to_str().unwrap(),
                "-o",
                &options,
                "start",
            ],
        );
    }

    /// As a crash would: without ending transactions or telling the clients.
    pub fn stop_at_once(&self) {
        self.run("pg_ctl", &["-D", &self.data(), "-m", "immediate", "stop"]);
    }

    /// A place of this name beside the data, which goes with them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes a directory belong to whom Postgres runs as.
    pub fn give(&self, directory: &Path) {
        if is_root() {
            let status = Command::new("chown").arg(USER).arg(directory).status().unwrap();
            assert!(status.success(), "chown");
        }
    }

    fn data(&self) -> String {
        self.path("data").display().to_string()
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let path = programs().join(program);
        let mut command = if is_root() {
            let mut command = Command::new("/usr/sbin/runuser");
            command.args(["-u", USER, "--"]).arg(path);
            command
        } else {
            Command::new(path)
        };
        // Not a pipe: the server would keep it open.
        let status = command
            .args(arguments)
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        let log = fs::read_to_string(self.path("server.log")).unwrap_or_default();
        assert!(status.success(), "{program} {arguments:?}: {status}\n{log}");
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if Path::new(&self.data()).join("postmaster.pid").exists() {
            self.stop_at_once();
        }
    }
}

/// What `tests/install.sh` put in place.
fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(".tools/postgres-bin")
        .canonicalize()
        .expect("no Postgres: run tests/install.sh")
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}
