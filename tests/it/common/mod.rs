//! What several tests share: whole servers, in this process or as processes of their own, and stand-ins for S3.

pub mod client;
pub mod issuer;
pub mod postgres;
pub mod process;
pub mod raw;
pub mod s3;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use secrecy::SecretString;
use serde_json::{Value, json};
use tempfile::TempDir;
use wharfinger::app::App;
use wharfinger::clock::Clock;
use wharfinger::config::{Config, Overrides};
use wharfinger::model::BlobId;
use wharfinger::papers::MintRequest;

use self::s3::S3Server;

/// A pair of database and store. Every whole-server test runs on both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    SqliteDisk,
    PostgresS3,
}

impl Backend {
    pub const ALL: [Self; 2] = [Self::SqliteDisk, Self::PostgresS3];
}

/// A fresh, empty Postgres database on the cluster that `tests/with-postgres.sh` started.
///
/// # Panics
/// If there is none: a test that was not run must not pass.
pub async fn postgres_database() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let cluster = std::env::var("WHARFINGER_TEST_POSTGRES_URL")
        .expect("no Postgres: run `make test`, or `tests/with-postgres.sh cargo test --release`");
    let name = format!("t{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let admin = sqlx::PgPool::connect(&format!("{cluster}/postgres")).await.unwrap();
    sqlx::query(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}")))
        .execute(&admin)
        .await
        .unwrap();
    admin.close().await;
    format!("{cluster}/{name}")
}

/// A configuration for `backend` below `directory`, with ports that the system chooses.
pub async fn config(backend: Backend, directory: &TempDir, s3: Option<&S3Server>) -> Config {
    let flags = Overrides {
        file: None,
        values: vec![
            ("listen", "127.0.0.1:0".to_owned()),
            ("internal_listen", "127.0.0.1:0".to_owned()),
            ("data_dir", directory.path().join("data").display().to_string()),
        ],
    };
    let mut config = Config::load(&flags, []).unwrap().config;
    config.server.drain_delay = Duration::ZERO;
    config.server.drain_timeout = Duration::from_secs(5);
    // Tests call the cleaner themselves.
    config.cleaner.interval = Duration::from_secs(24 * 3600);
    if backend == Backend::PostgresS3 {
        let s3 = s3.expect("the backend has a store");
        let secret_file = directory.path().join("root.secret");
        if !secret_file.exists() {
            std::fs::write(&secret_file, "m7Qx2vTz-9cLrW4pK-e1HbYu6N-for-tests-only").unwrap();
            let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            std::fs::set_permissions(&secret_file, private).unwrap();
        }
        config.secret_file = Some(secret_file);
        config.database.url = SecretString::from(postgres_database().await);
        config.storage.url = format!("s3://{}/test", s3.bucket);
        config.storage.endpoint = s3.endpoint.clone();
        config.storage.access_key_id = s3.access_key_id.to_owned();
        config.storage.secret_access_key = SecretString::from(s3.secret_access_key);
    }
    config
}

/// A server in this process whose clock stands still until a test moves it.
pub struct TestServer {
    pub app: App,
    pub config: Config,
    /// The public origin, without a slash at its end.
    pub url: String,
    pub clock: Arc<AtomicI64>,
    pub http: reqwest::Client,
    pub s3: Option<S3Server>,
    /// Removes the directory at the end.
    _directory: TempDir,
}

impl TestServer {
    pub async fn start(backend: Backend) -> Self {
        Self::start_with(backend, |_| {}).await
    }

    /// With a configuration that `edit` changed.
    pub async fn start_with(backend: Backend, edit: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let s3 = (backend == Backend::PostgresS3).then(S3Server::start);
        let mut config = config(backend, &directory, s3.as_ref()).await;
        edit(&mut config);
        // The machine's time, so that it agrees with the database's.
        let clock = Arc::new(AtomicI64::new(Clock::System.now_ms()));
        let app = App::start(&config, Clock::Fixed(Arc::clone(&clock)), None)
            .await
            .unwrap();
        let url = app.services.papers.public_url().to_owned();
        Self {
            app,
            config,
            url,
            clock,
            http: process::http_client(),
            s3,
            _directory: directory,
        }
    }

    /// Stops, lets something be done to what lies still, and starts again, on another port.
    pub async fn restarted(self, between: impl AsyncFnOnce(&mut Config)) -> Self {
        let Self {
            app, mut config, clock, ..
        } = self;
        app.stop().await;
        between(&mut config).await;
        let app = App::start(&config, Clock::Fixed(Arc::clone(&clock)), None)
            .await
            .unwrap();
        let url = app.services.papers.public_url().to_owned();
        Self {
            app,
            config,
            url,
            clock,
            ..self
        }
    }

    /// Moves the clock.
    pub fn advance(&self, span: Duration) {
        self.clock
            .fetch_add(i64::try_from(span.as_millis()).unwrap(), Ordering::Relaxed);
    }

    /// A good token for job `job` of run `run` of a repository, good for 6 h.
    pub fn token(&self, repository: &str, run: &str, job: &str) -> String {
        self.token_of_ref(repository, run, job, "refs/heads/main")
    }

    /// As [`TestServer::token`], for a run that builds another ref than the default branch's.
    pub fn token_of_ref(&self, repository: &str, run: &str, job: &str, git_ref: &str) -> String {
        let request = MintRequest {
            repository: repository.to_owned(),
            repository_id: None,
            run_id: run.to_owned(),
            job_id: job.to_owned(),
            attempt: 1,
            git_ref: git_ref.to_owned(),
            default_ref: "refs/heads/main".to_owned(),
            event: None,
            ttl: Duration::from_secs(6 * 3600),
        };
        let now_ms = self.clock.load(Ordering::Relaxed);
        self.app.services.papers.mint(&request, now_ms).unwrap()
    }

    /// A job to act as: run `1` of `octo/demo`, job `build`.
    pub fn job(&self) -> Job<'_> {
        self.job_of("octo/demo", "1", "build")
    }

    pub fn job_of(&self, repository: &str, run: &str, job: &str) -> Job<'_> {
        Job {
            server: self,
            token: self.token(repository, run, job),
            run: run.to_owned(),
            job: job.to_owned(),
        }
    }

    pub async fn stop(self) {
        self.app.stop().await;
    }
}

/// One job as the artifact client acts for it, by hand-made requests.
pub struct Job<'a> {
    pub server: &'a TestServer,
    pub token: String,
    pub run: String,
    pub job: String,
}

impl Job<'_> {
    /// Calls a method of the ArtifactService with the job's ids and `fields`.
    pub async fn call(&self, method: &str, mut fields: Value) -> (u16, Value) {
        fields["workflow_run_backend_id"] = json!(self.run);
        fields["workflow_job_run_backend_id"] = json!(self.job);
        let url = format!(
            "{}/twirp/github.actions.results.api.v1.ArtifactService/{method}",
            self.server.url
        );
        let reply = self
            .server
            .http
            .post(url)
            .header("content-type", "application/json")
            .bearer_auth(&self.token)
            .body(fields.to_string())
            .send()
            .await
            .unwrap();
        let status = reply.status().as_u16();
        (
            status,
            serde_json::from_slice(&reply.bytes().await.unwrap()).expect("a Twirp reply is always JSON"),
        )
    }

    /// Creates an artifact and returns its upload link.
    pub async fn create(&self, name: &str) -> String {
        let (status, reply) = self.call("CreateArtifact", json!({ "name": name, "version": 4 })).await;
        assert_eq!(status, 200, "{reply}");
        reply["signed_upload_url"].as_str().unwrap().to_owned()
    }

    /// Uploads `bytes` as one blob and finalizes it. Returns the artifact's id.
    pub async fn upload(&self, name: &str, bytes: &[u8]) -> String {
        let link = self.create(name).await;
        assert_eq!(self.put(&link, bytes.to_vec()).await.0, 201);
        let (status, reply) = self
            .call(
                "FinalizeArtifact",
                json!({ "name": name, "size": bytes.len().to_string() }),
            )
            .await;
        assert_eq!(status, 200, "{reply}");
        reply["artifact_id"].as_str().unwrap().to_owned()
    }

    /// PUTs a body to a link. Returns the status and the error code, if there is one.
    pub async fn put(&self, link: &str, body: Vec<u8>) -> (u16, Option<String>) {
        let reply = self
            .server
            .http
            .put(link)
            .header("x-ms-blob-type", "BlockBlob")
            // Said even of an empty body, as the clients do.
            .header("content-length", body.len())
            .body(body)
            .send()
            .await
            .unwrap();
        let code = reply
            .headers()
            .get("x-ms-error-code")
            .map(|code| code.to_str().unwrap().to_owned());
        (reply.status().as_u16(), code)
    }

    /// A link to read an artifact.
    pub async fn link(&self, name: &str) -> String {
        let (status, reply) = self.call("GetSignedArtifactURL", json!({ "name": name })).await;
        assert_eq!(status, 200, "{reply}");
        reply["signed_url"].as_str().unwrap().to_owned()
    }

    /// The bytes of an artifact.
    pub async fn download(&self, name: &str) -> Vec<u8> {
        let reply = self.server.http.get(self.link(name).await).send().await.unwrap();
        assert_eq!(reply.status(), 200);
        reply.bytes().await.unwrap().to_vec()
    }

    /// The names in the run's list, in its order.
    pub async fn names(&self) -> Vec<String> {
        let (status, reply) = self.call("ListArtifacts", json!({})).await;
        assert_eq!(status, 200, "{reply}");
        reply["artifacts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|artifact| artifact["name"].as_str().unwrap().to_owned())
            .collect()
    }
}

/// Polls a request until it has had to wait so many times. `None`: it waits still, and may be dropped there, as that of
/// a client that goes away, or kept for later.
pub async fn polled<F: Future + Unpin>(request: &mut F, mut waits: usize) -> Option<F::Output> {
    std::future::poll_fn(|context| match Pin::new(&mut *request).poll(context) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending if waits == 0 => Poll::Ready(None),
        Poll::Pending => {
            waits -= 1;
            Poll::Pending
        }
    })
    .await
}

/// The blob that a link is to.
pub fn blob_of(link: &str) -> BlobId {
    let path = link.split('?').next().unwrap();
    BlobId(path.rsplit('/').next().unwrap().parse().unwrap())
}

/// A link for one block: what the Azure SDK makes of an upload link.
pub fn block_link(link: &str, id: &str) -> String {
    format!(
        "{link}&comp=block&blockid={}",
        id.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")
    )
}

/// The body of a Put Block List.
pub fn block_list(ids: &[&str]) -> Vec<u8> {
    let entries: String = ids.iter().map(|id| format!("<Latest>{id}</Latest>")).collect();
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\" standalone=\"yes\"?><BlockList>{entries}</BlockList>")
        .into_bytes()
}
