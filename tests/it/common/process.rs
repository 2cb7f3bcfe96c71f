//! Wharfinger as a process of its own: for what only a process can show, such as `kill -9`.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::s3::S3Server;

/// How a server is configured: environment variables over the defaults, as an operator would.
#[derive(Clone, Debug, Default)]
pub struct Environment(pub HashMap<String, String>);

impl Environment {
    /// SQLite and disk below `data_dir`.
    pub fn embedded(data_dir: &Path) -> Self {
        let mut environment = Self::default();
        environment.set("WHARFINGER_DATA_DIR", data_dir.display());
        environment.set("WHARFINGER_SERVER__DRAIN_DELAY", "0s");
        environment
    }

    /// A Postgres database and a bucket; `secret_file` has the root secret.
    pub fn production(data_dir: &Path, database: &str, s3: &S3Server, secret_file: &Path) -> Self {
        let mut environment = Self::embedded(data_dir);
        environment.set("WHARFINGER_DATABASE__URL", database);
        environment.set("WHARFINGER_STORAGE__URL", format!("s3://{}/test", s3.bucket));
        environment.set("WHARFINGER_STORAGE__ENDPOINT", &s3.endpoint);
        environment.set("WHARFINGER_STORAGE__ACCESS_KEY_ID", s3.access_key_id);
        environment.set("WHARFINGER_STORAGE__SECRET_ACCESS_KEY", s3.secret_access_key);
        environment.set("WHARFINGER_SECRET_FILE", secret_file.display());
        environment
    }

    pub fn set(&mut self, name: &str, value: impl ToString) {
        self.0.insert(name.to_owned(), value.to_string());
    }

    /// The program with this environment, for any command.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wharfinger"));
        command.args(arguments).envs(&self.0).stdin(Stdio::null());
        command
    }

    /// What a command that must succeed prints.
    pub fn output(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The same root secret for every replica, in a file of its own below `directory`.
pub fn secret_file(directory: &Path) -> PathBuf {
    let path = directory.join("root.secret");
    std::fs::write(&path, "test-only-5vXcQm8Zr2LkT0aWnD4yEoJ7hB1uGf\n").unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    path
}

/// A port of 127.0.0.1 that is free now, below those from which outgoing connections are made.
pub fn free_port() -> u16 {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes of one test run differ in their pid, so they begin at different ports.
    let base = 10_000 + u16::try_from(std::process::id() % 10_000).unwrap();
    loop {
        let port = base + NEXT.fetch_add(1, Ordering::Relaxed) % 10_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A running server process. Dropping it kills it.
pub struct Process {
    child: Child,
    pub url: String,
    pub internal_url: String,
    /// Every line of its log so far.
    pub log: Arc<Mutex<Vec<String>>>,
    pub environment: Environment,
}

impl Process {
    /// Starts a server and waits until it is ready.
    pub fn start(environment: &Environment) -> Self {
        let mut environment = environment.clone();
        let (public, internal) = (free_port(), free_port());
        environment.set("WHARFINGER_LISTEN", format!("127.0.0.1:{public}"));
        environment.set("WHARFINGER_INTERNAL_LISTEN", format!("127.0.0.1:{internal}"));
        let mut child = environment
            .command(&["serve", "--log-format", "json"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let sink = Arc::clone(&log);
        std::thread::spawn(move || {
            lines
                .map_while(Result::ok)
                .for_each(|line| sink.lock().unwrap().push(line))
        });
        let mut process = Self {
            child,
            url: environment
                .0
                .get("WHARFINGER_PUBLIC_URL")
                .cloned()
                .unwrap_or_else(|| format!("http://127.0.0.1:{public}")),
            internal_url: format!("http://127.0.0.1:{internal}"),
            log,
            environment,
        };
        let begun = Instant::now();
        while !process.is_ready() {
            if let Some(status) = process.child.try_wait().unwrap() {
                panic!("the server ended with {status}: {:#?}", process.log.lock().unwrap());
            }
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "not ready: {:#?}",
                process.log.lock().unwrap()
            );
            std::thread::yield_now();
        }
        process
    }

    fn is_ready(&self) -> bool {
        self.environment
            .command(&["health"])
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap()
            .success()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A token as `wharfinger token mint` makes it.
    pub fn token(&self, repository: &str, run: &str, job: &str) -> String {
        let arguments = [
            "token",
            "mint",
            "--repository",
            repository,
            "--run-id",
            run,
            "--job-id",
            job,
        ];
        self.environment.output(&arguments).trim().to_owned()
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM. Returns once the process has ended, with its exit code.
    pub fn terminate(mut self) -> Option<i32> {
        Command::new("kill").arg(self.pid().to_string()).status().unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The Node that `tests/install.sh` put in place.
pub fn node() -> PathBuf {
    std::env::var_os("WHARFINGER_TEST_NODE")
        .expect("no Node: run `make test`, or `tests/with-postgres.sh cargo test --release`")
        .into()
}
