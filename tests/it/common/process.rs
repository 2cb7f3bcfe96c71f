//! Wharfinger as a process of its own: for what only a process can show, such as `kill -9`.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::s3::S3Server;
use super::{Backend, postgres_database};

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

    /// `backend`, with whatever lies in files below `directory`.
    pub async fn on(backend: Backend, directory: &Path, s3: Option<&S3Server>) -> Self {
        let data_dir = directory.join("data");
        match backend {
            Backend::SqliteDisk => Self::embedded(&data_dir),
            Backend::PostgresS3 => {
                let s3 = s3.expect("the backend has a store");
                Self::production(&data_dir, &postgres_database().await, s3, &secret_file(directory))
            }
        }
    }

    pub fn set(&mut self, name: &str, value: impl ToString) {
        self.0.insert(name.to_owned(), value.to_string());
    }

    /// With addresses to listen on, for servers that are to come back to where they were.
    pub fn listening(mut self) -> Self {
        for name in ["WHARFINGER_LISTEN", "WHARFINGER_INTERNAL_LISTEN"] {
            self.0
                .entry(name.to_owned())
                .or_insert_with(|| format!("127.0.0.1:{}", free_port()));
        }
        self
    }

    /// This one, with one variable more.
    #[cfg(feature = "failpoints")]
    pub fn with(&self, name: &str, value: impl ToString) -> Self {
        let mut environment = self.clone();
        environment.set(name, value);
        environment
    }

    /// The program with this environment, for any command.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wharfinger"));
        self.apply(&mut command);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Gives a command this environment and no other setting of ours.
    pub fn apply(&self, command: &mut Command) {
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("WHARFINGER_") {
                command.env_remove(name);
            }
        }
        command.envs(&self.0);
    }

    /// Runs the program to its end, whichever that is.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).to_its_end(PATIENCE)
    }

    /// What a command that must succeed prints.
    pub fn output(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Longer than any command or request lasts that ends at all.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A command that is waited for, but not for ever.
pub trait ToItsEnd {
    /// Runs it to its end and returns what it wrote.
    ///
    /// # Panics
    /// If it does not end within `patience`: it is killed, and what it wrote and was doing is told.
    fn to_its_end(&mut self, patience: Duration) -> Output;
}

impl ToItsEnd for Command {
    fn to_its_end(&mut self, patience: Duration) -> Output {
        let child = self
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        let (ended, end) = mpsc::channel();
        std::thread::spawn(move || ended.send(child.wait_with_output()));
        if let Ok(output) = end.recv_timeout(patience) {
            return output.unwrap();
        }
        let doing = doing(pid);
        Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
        // What it started may hold its pipes still.
        let output = end.recv_timeout(PATIENCE);
        panic!("{self:?} does not end: {doing:#?} {output:#?}");
    }
}

/// What each thread of a process waits for: its name and the place in the kernel.
fn doing(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let told = |thread: PathBuf, what: &str| fs::read_to_string(thread.join(what)).unwrap_or_default();
    threads
        .filter_map(Result::ok)
        .map(|thread| thread.path())
        .map(|thread| format!("{} in {}", told(thread.clone(), "comm").trim(), told(thread, "wchan")))
        .collect()
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
    /// Ends with the log.
    reader: Option<JoinHandle<()>>,
    pub url: String,
    pub internal_url: String,
    /// Every line of its log so far.
    pub log: Arc<Mutex<Vec<String>>>,
    pub environment: Environment,
}

impl Process {
    /// Starts a server and waits until it is ready. It listens where the environment says, else on free ports.
    pub fn start(environment: &Environment) -> Self {
        let environment = environment.clone().listening();
        let command = environment.command(&["serve", "--log-format", "json"]);
        Self::start_by(command, environment)
    }

    /// As [`Process::start`], by a command that ends in a server with this environment.
    pub fn start_by(mut command: Command, environment: Environment) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let sink = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            lines
                .map_while(Result::ok)
                .for_each(|line| sink.lock().unwrap().push(line))
        });
        let origin = |listen: &str| format!("http://{}", environment.0[listen]);
        let mut process = Self {
            child,
            reader: Some(reader),
            url: environment
                .0
                .get("WHARFINGER_PUBLIC_URL")
                .cloned()
                .unwrap_or_else(|| origin("WHARFINGER_LISTEN")),
            internal_url: origin("WHARFINGER_INTERNAL_LISTEN"),
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
        self.environment.run(&["health"]).status.success()
    }

    /// How it ended, if it did.
    #[cfg(feature = "failpoints")]
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A token as `wharfinger token mint` makes it.
    pub fn token(&self, repository: &str, run: &str, job: &str) -> String {
        self.token_of_ref(repository, run, job, "refs/heads/main")
    }

    /// As [`Process::token`], for a run that builds another ref than the default branch's.
    pub fn token_of_ref(&self, repository: &str, run: &str, job: &str, git_ref: &str) -> String {
        self.mint(repository, run, job, ["--ref", git_ref])
    }

    /// As [`Process::token`], for a later attempt of the run.
    pub fn token_of_attempt(&self, repository: &str, run: &str, job: &str, attempt: u32) -> String {
        self.mint(repository, run, job, ["--attempt", &attempt.to_string()])
    }

    /// An API token that may write to a repository.
    pub fn api_token(&self, repository: &str) -> String {
        let arguments = [
            "token",
            "create",
            "--name",
            "test",
            "--access",
            "write",
            "--repository",
            repository,
        ];
        self.environment.output(&arguments).trim().to_owned()
    }

    fn mint(&self, repository: &str, run: &str, job: &str, more: [&str; 2]) -> String {
        let ids = ["--repository", repository, "--run-id", run, "--job-id", job];
        let arguments = [&["token", "mint"][..], &ids, &more].concat();
        self.environment.output(&arguments).trim().to_owned()
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM. Returns once the process has ended, with its exit code.
    pub fn terminate(self) -> Option<i32> {
        self.ask_to_stop();
        self.wait()
    }

    /// SIGTERM, and no waiting.
    pub fn ask_to_stop(&self) {
        Command::new("kill").arg(self.pid().to_string()).status().unwrap();
    }

    /// SIGTERM. Returns once the process has ended, with every line of its log.
    pub fn log_to_its_end(mut self) -> Vec<String> {
        self.ask_to_stop();
        self.until_ended();
        let reader = self.reader.take().unwrap();
        reader.join().unwrap();
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// Returns once the process has ended, with its exit code.
    pub fn wait(mut self) -> Option<i32> {
        self.until_ended().code()
    }

    fn until_ended(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "the server does not end: {:#?} {:#?}",
                doing(self.pid()),
                self.log.lock().unwrap()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Job `build` of run `1` of `octo/demo`, as its client acts against this process.
    pub fn job(&self) -> RemoteJob {
        RemoteJob {
            http: http_client(),
            url: self.url.clone(),
            token: self.token("octo/demo", "1", "build"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client for requests that fail when they get no answer.
pub fn http_client() -> reqwest::Client {
    http_client_builder().build().unwrap()
}

/// As [`http_client`], to be made to measure.
pub fn http_client_builder() -> reqwest::ClientBuilder {
    reqwest::Client::builder().timeout(PATIENCE)
}

/// A job that lives on while its server dies and comes back.
#[derive(Clone, Debug)]
pub struct RemoteJob {
    pub http: reqwest::Client,
    pub url: String,
    pub token: String,
}

impl RemoteJob {
    /// Calls a method of the ArtifactService with the job's ids and `fields`.
    pub async fn call(&self, method: &str, mut fields: Value) -> (u16, Value) {
        fields["workflow_run_backend_id"] = json!("1");
        fields["workflow_job_run_backend_id"] = json!("build");
        let path = format!("/twirp/github.actions.results.api.v1.ArtifactService/{method}");
        let reply = self
            .http
            .post(format!("{}{path}", self.url))
            .header("content-type", "application/json")
            .bearer_auth(&self.token)
            .body(fields.to_string())
            .send()
            .await
            .unwrap();
        let status = reply.status().as_u16();
        (status, serde_json::from_slice(&reply.bytes().await.unwrap()).unwrap())
    }

    /// As [`RemoteJob::call`], for what must succeed.
    pub async fn done(&self, method: &str, fields: Value) -> Value {
        let (status, reply) = self.call(method, fields).await;
        assert_eq!(status, 200, "{method}: {reply}");
        reply
    }

    /// Creates an artifact and returns its upload link.
    pub async fn create(&self, name: &str) -> String {
        let reply = self.done("CreateArtifact", json!({ "name": name, "version": 4 })).await;
        reply["signed_upload_url"].as_str().unwrap().to_owned()
    }

    pub async fn finalize(&self, name: &str, size_bytes: usize) {
        let fields = json!({ "name": name, "size": size_bytes.to_string() });
        self.done("FinalizeArtifact", fields).await;
    }

    /// The same, with a connection for each request: one that is kept may be closed, by a server that stops, at the
    /// moment at which the next request is sent on it.
    pub fn keeping_no_connections(self) -> Self {
        let http = http_client_builder().pool_max_idle_per_host(0).build().unwrap();
        Self { http, ..self }
    }

    /// PUTs a body to a link, one way or another. Returns the status, if the server lived to answer.
    pub async fn put(&self, link: &str, size_bytes: usize, body: impl Into<reqwest::Body>) -> reqwest::Result<u16> {
        let put = self.http.put(link).header("x-ms-blob-type", "BlockBlob");
        let reply = put.header("content-length", size_bytes).body(body).send().await?;
        Ok(reply.status().as_u16())
    }

    /// A link to read an artifact.
    pub async fn link(&self, name: &str) -> String {
        let reply = self.done("GetSignedArtifactURL", json!({ "name": name })).await;
        reply["signed_url"].as_str().unwrap().to_owned()
    }

    /// The bytes of an artifact.
    pub async fn download(&self, name: &str) -> Vec<u8> {
        let reply = self.http.get(self.link(name).await).send().await.unwrap();
        assert_eq!(reply.status(), 200);
        reply.bytes().await.unwrap().to_vec()
    }

    /// The names in the run's list, in its order.
    pub async fn names(&self) -> Vec<String> {
        let reply = self.done("ListArtifacts", json!({})).await;
        let name = |artifact: &Value| artifact["name"].as_str().unwrap().to_owned();
        reply["artifacts"].as_array().unwrap().iter().map(name).collect()
    }
}

/// The Node that `tests/install.sh` put in place. Its compiler and garbage collector get no threads: when it exits it waits
/// for them, and once in a thousand times they wait for it (nodejs/node#54918).
pub fn node() -> Command {
    let mut command = Command::new(
        std::env::var_os("WHARFINGER_TEST_NODE")
            .expect("no Node: run `make test`, or `tests/with-postgres.sh cargo test --release`"),
    );
    command.arg("--single-threaded");
    command
}

#[test]
fn what_does_not_end_is_killed_and_told() {
    let asleep = std::panic::catch_unwind(|| Command::new("sleep").arg("1000").to_its_end(Duration::ZERO));
    let told = asleep.unwrap_err().downcast::<String>().unwrap();
    // Its one thread may still have the name of who started it.
    for part in ["\"sleep\" \"1000\" does not end", " in ", "unix_wait_status"] {
        assert!(told.contains(part), "{told}");
    }
}
