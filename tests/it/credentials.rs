//! Signing keys that rotate, runs that are closed and API tokens, across replicas and by the commands.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tempfile::TempDir;
use wharfinger::app::App;
use wharfinger::clock::Clock;
use wharfinger::model::{BlobKind, Principal};
use wharfinger::papers::{MintRequest, Permission};
use wharfinger::service::credentials::RunToClose;

use super::common::process::{Environment, Process, http_client};
use super::common::s3::S3Server;
use super::common::{Backend, blob_of, config};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// Two replicas over one Postgres and one bucket, with one time for both.
struct Replicas {
    apps: [App; 2],
    clock: Arc<AtomicI64>,
    http: reqwest::Client,
    _s3: S3Server,
    _directory: TempDir,
}

impl Replicas {
    async fn start() -> Self {
        let (directory, s3) = (tempfile::tempdir().unwrap(), S3Server::start());
        let config = config(Backend::PostgresS3, &directory, Some(&s3)).await;
        let clock = Arc::new(AtomicI64::new(Clock::System.now_ms()));
        let start = || App::start(&config, Clock::Fixed(Arc::clone(&clock)), None);
        let apps = [start().await.unwrap(), start().await.unwrap()];
        Self {
            apps,
            clock,
            http: http_client(),
            _s3: s3,
            _directory: directory,
        }
    }

    fn now_ms(&self) -> i64 {
        self.clock.load(Ordering::Relaxed)
    }

    /// Time passes, and each replica has looked at the database since.
    async fn advance(&self, span: Duration) {
        self.clock
            .fetch_add(i64::try_from(span.as_millis()).unwrap(), Ordering::Relaxed);
        self.refresh().await;
    }

    async fn refresh(&self) {
        for app in &self.apps {
            app.services.refresh_papers().await.unwrap();
        }
    }

    fn mint(&self, replica: usize, run: &str, job: &str) -> String {
        let request = MintRequest {
            repository: "octo/demo".to_owned(),
            repository_id: None,
            run_id: run.to_owned(),
            job_id: job.to_owned(),
            attempt: 1,
            git_ref: "refs/heads/main".to_owned(),
            default_ref: "refs/heads/main".to_owned(),
            event: None,
            ttl: HOUR,
        };
        self.apps[replica]
            .services
            .papers
            .mint(&request, self.now_ms())
            .unwrap()
    }

    fn verify(&self, replica: usize, token: &str) -> wharfinger::error::Result<Arc<Principal>> {
        self.apps[replica].services.papers.verify_token(token, self.now_ms())
    }

    /// Whether both replicas take it.
    fn is_good(&self, token: &str) -> bool {
        let [one, other] = [0, 1].map(|replica| self.verify(replica, token).is_ok());
        assert_eq!(one, other, "the replicas disagree");
        one
    }

    async fn twirp(&self, replica: usize, token: &str, method: &str, fields: Value) -> Value {
        let [run, job] = ["1", "build"];
        let mut fields = fields;
        fields["workflow_run_backend_id"] = json!(run);
        fields["workflow_job_run_backend_id"] = json!(job);
        let address = self.apps[replica].public;
        let url = format!("http://{address}/twirp/github.actions.results.api.v1.ArtifactService/{method}");
        let call = self
            .http
            .post(url)
            .header("content-type", "application/json")
            .bearer_auth(token);
        let reply = call.body(fields.to_string()).send().await.unwrap();
        let (status, body) = (reply.status(), reply.text().await.unwrap());
        assert_eq!(status, StatusCode::OK, "{method}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// The same link at another replica.
    fn at(&self, replica: usize, link: &str) -> String {
        let (_, path) = link.split_once("/blob/").unwrap();
        format!("http://{}/blob/{path}", self.apps[replica].public)
    }

    /// Whole lives of artifacts, each request at the other replica than the one before, while `act` is done.
    async fn under_load(&self, phase: &str, act: impl Future<Output = ()>) {
        const LIVES: usize = 12;
        let lives = (0..LIVES).map(|i| async move {
            let name = format!("{phase} {i}");
            let token = self.mint(i % 2, "1", "build");
            let created = self
                .twirp(i % 2, &token, "CreateArtifact", json!({ "name": name, "version": 4 }))
                .await;
            let link = self.at((i + 1) % 2, created["signed_upload_url"].as_str().unwrap());
            let put = self
                .http
                .put(link)
                .header("x-ms-blob-type", "BlockBlob")
                .body(name.clone());
            assert_eq!(put.send().await.unwrap().status(), StatusCode::CREATED);
            let finalize = json!({ "name": name, "size": name.len().to_string() });
            self.twirp(i % 2, &token, "FinalizeArtifact", finalize).await;
            let signed = self
                .twirp((i + 1) % 2, &token, "GetSignedArtifactURL", json!({ "name": name }))
                .await;
            let link = self.at(i % 2, signed["signed_url"].as_str().unwrap());
            let reply = self.http.get(&link).send().await.unwrap();
            assert_eq!((reply.status(), reply.text().await.unwrap()), (StatusCode::OK, name));
        });
        tokio::join!(join_all(lives), act);
    }

    async fn stop(self) {
        for app in self.apps {
            app.stop().await;
        }
    }
}

fn key_of_link(link: &str) -> &str {
    link.split('&').find_map(|pair| pair.strip_prefix("sk=")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_rotate_under_load_and_nobody_notices() {
    let replicas = Replicas::start().await;
    let services = &replicas.apps[0].services;
    let mut old = Vec::new();
    for round in 1..=3 {
        let token = replicas.mint(0, "1", "build");
        let created = replicas.twirp(
            0,
            &token,
            "CreateArtifact",
            json!({ "name": format!("old {round}"), "version": 4 }),
        );
        let link = created.await["signed_upload_url"].as_str().unwrap().to_owned();
        assert_eq!(key_of_link(&link), round.to_string());
        old.push((token, link.clone()));

        // Published: the other replica may not know it yet, and it signs nowhere.
        let phase = format!("published {round}");
        replicas
            .under_load(&phase, async {
                let key = services.rotate_keys(2 * MINUTE).await.unwrap();
                assert_eq!(key.id, (round + 1).to_string());
            })
            .await;
        // It begins to sign, first at one replica.
        let phase = format!("signs {round}");
        replicas
            .under_load(&phase, async {
                replicas.refresh().await;
                replicas.clock.fetch_add(2 * 60_000, Ordering::Relaxed);
                services.refresh_papers().await.unwrap();
            })
            .await;
        replicas.refresh().await;
        let phase = format!("old ones too {round}");
        replicas.under_load(&phase, async {}).await;
        // What was signed before is good, at both.
        for (token, link) in &old {
            assert!(replicas.is_good(token));
            let sign = |permission| {
                services.papers.sign_link(
                    BlobKind::Artifact,
                    permission,
                    blob_of(link),
                    replicas.now_ms() / 1000 + 60,
                )
            };
            assert_eq!(key_of_link(&sign(Permission::Read)), (round + 1).to_string());
            for replica in [0, 1] {
                let put = replicas
                    .http
                    .put(replicas.at(replica, link))
                    .header("x-ms-blob-type", "BlockBlob");
                assert_eq!(put.body("late").send().await.unwrap().status(), StatusCode::CREATED);
            }
        }
        assert!(
            services.retire_key(&round.to_string(), false).await.is_err(),
            "it is in use"
        );
    }
    // Nothing of the first key can be in use a day later: it goes without being asked twice.
    replicas.advance(25 * HOUR).await;
    let fresh = replicas.mint(1, "1", "build");
    services.retire_key("1", false).await.unwrap();
    assert!(services.retire_key("1", false).await.is_err(), "once");
    assert!(services.retire_key("4", true).await.is_err(), "it signs");
    replicas.refresh().await;
    assert!(replicas.is_good(&fresh));
    replicas.under_load("retired", async {}).await;
    let sign = |replica: usize| {
        let until_s = replicas.now_ms() / 1000 + 60;
        let papers = &replicas.apps[replica].services.papers;
        papers.sign_link(BlobKind::Artifact, Permission::Read, blob_of(&old[0].1), until_s)
    };
    let (link, token) = (sign(1), replicas.mint(1, "1", "build"));
    // After a leak: at once, and what it signed with it.
    services.rotate_keys(Duration::ZERO).await.unwrap();
    services.retire_key("4", true).await.unwrap();
    replicas.refresh().await;
    assert!(!replicas.is_good(&token));
    for replica in [0, 1] {
        let reply = replicas.http.get(replicas.at(replica, &link)).send().await.unwrap();
        assert_eq!(reply.status(), StatusCode::FORBIDDEN);
        assert_eq!(reply.headers()["x-ms-error-code"], "AuthenticationFailed");
    }
    replicas.under_load("after the leak", async {}).await;
    replicas.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_run_is_closed_on_every_replica() {
    let replicas = Replicas::start().await;
    let [build, test, other] =
        [("1", "build"), ("1", "test"), ("2", "build")].map(|(run, job)| replicas.mint(0, run, job));
    for token in [&build, &test, &other] {
        assert!(replicas.is_good(token));
    }
    // One job, by itself.
    let services = &replicas.apps[1].services;
    services.close_job(&replicas.verify(1, &build).unwrap()).await.unwrap();
    assert!(replicas.verify(1, &build).is_err(), "here at once");
    replicas.refresh().await;
    assert!(!replicas.is_good(&build));
    assert!(replicas.is_good(&test) && replicas.is_good(&other));
    // The whole run.
    let close = |repository: &str, run: &str, issuer: Option<&str>| RunToClose {
        issuer: issuer.map(str::to_owned),
        repository: repository.to_owned(),
        run: run.to_owned(),
    };
    for (repository, run, issuer) in [
        ("octo/demo", "3", None),
        ("octo/other", "1", None),
        ("5", "1", None),
        ("octo/demo", "1", Some("gitea")),
    ] {
        services.close_run(close(repository, run, issuer)).await.unwrap();
        replicas.refresh().await;
        assert!(replicas.is_good(&test), "{repository} {run} {issuer:?}");
    }
    services
        .close_run(close("Octo/Demo", "1", Some("wharfinger")))
        .await
        .unwrap();
    replicas.refresh().await;
    assert!(!replicas.is_good(&test) && replicas.is_good(&other));
    // Its next attempt is another matter.
    replicas.advance(MINUTE).await;
    assert!(
        !replicas.is_good(&replicas.mint(0, "1", "build")),
        "clocks may differ by so much"
    );
    replicas.advance(Duration::from_secs(1)).await;
    let again = replicas.mint(0, "1", "build");
    assert!(replicas.is_good(&again) && !replicas.is_good(&test));
    // Forgotten when every token of then has ended by itself.
    replicas.advance(25 * HOUR).await;
    services.clean().await.unwrap();
    assert_eq!(services.db.closed_runs(0).await.unwrap(), []);
    replicas.stop().await;
}

#[tokio::test]
async fn the_commands_work_beside_a_server() {
    let directory = tempfile::tempdir().unwrap();
    let server = Process::start(&Environment::embedded(&directory.path().join("data")));
    let environment = &server.environment;
    let http = http_client();
    let list = async |token: &str| {
        let method = "github.actions.results.api.v1.ArtifactService/ListArtifacts";
        let call = http
            .post(format!("{}/twirp/{method}", server.url))
            .header("content-type", "application/json")
            .bearer_auth(token)
            .body(json!({ "workflow_run_backend_id": "7", "workflow_job_run_backend_id": "build" }).to_string());
        call.send().await.unwrap().status().as_u16()
    };
    // The server looks at the database now and then.
    let becomes = async |token: &str, status: u16| {
        let limit = tokio::time::Instant::now() + Duration::from_secs(30);
        while list(token).await != status {
            assert!(tokio::time::Instant::now() < limit, "it does not become {status}");
            tokio::task::yield_now().await;
        }
    };

    let job = server.token("octo/demo", "7", "build");
    assert_eq!(list(&job).await, 200);
    environment.output(&["run", "close", "--repository", "octo/demo", "--run-id", "7"]);
    becomes(&job, 401).await;

    // A key that signs at once: the server may hear of it only after the first token that it signed.
    assert_eq!(environment.output(&["keys", "rotate", "--after", "0s"]).trim(), "2");
    let keys = environment.output(&["keys", "list"]);
    let states: Vec<Vec<&str>> = keys
        .lines()
        .map(|line| line.split_whitespace().take(2).collect())
        .collect();
    assert_eq!(states, [["ID", "STATE"], ["1", "verifies"], ["2", "signs"]]);
    let by_second = {
        let method = ["--repository", "octo/demo", "--run-id", "8", "--job-id", "build"];
        environment.output(&[&["token", "mint"][..], &method].concat())
    };
    becomes(by_second.trim(), 403).await;
    let refused = environment.run(&["keys", "retire", "1"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("--at-once"), "{said}");
    environment.output(&["keys", "retire", "1", "--at-once"]);
    assert!(environment.output(&["keys", "list"]).contains("retired"));

    // API tokens.
    let made = [
        "token",
        "create",
        "--name",
        "release",
        "--repository",
        "Octo/Demo",
        "--access",
        "admin",
    ];
    let api = environment.output(&made).trim().to_owned();
    let listed = environment.output(&["token", "list"]);
    let row: Vec<&str> = listed.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[1..5], ["release", "admin", "octo/demo", "good"]);
    assert!(!listed.contains(&api), "it is shown once");
    let mint = async |repository: &str| {
        let body = json!({
            "repository": repository, "run_id": "9", "job_id": "build", "ref": "refs/heads/main",
            "default_ref": "refs/heads/main",
        });
        let call = http
            .post(format!("{}/api/v1/runtime-token", server.url))
            .bearer_auth(&api);
        let reply = call.body(body.to_string()).send().await.unwrap();
        let status = reply.status().as_u16();
        (
            status,
            serde_json::from_slice::<Value>(&reply.bytes().await.unwrap()).unwrap(),
        )
    };
    let (status, minted) = mint("octo/demo").await;
    assert_eq!(status, 201, "{minted}");
    assert_eq!(list(minted["token"].as_str().unwrap()).await, 403, "a run of its own");
    assert_eq!(mint("octo/other").await.0, 404);
    assert_eq!(mint("../x").await.0, 422);
    let used = environment.output(&["token", "list"]);
    assert_ne!(
        used.lines().nth(1).unwrap().split_whitespace().last(),
        Some("-"),
        "{used}"
    );
    environment.output(&["token", "revoke", row[0]]);
    assert_eq!(mint("octo/demo").await, (401, json!({ "message": "Bad credentials" })));
    assert!(environment.output(&["token", "list"]).contains("revoked"));
    for (wrong, why) in [
        (vec!["token", "revoke", "nobody"], "no token nobody"),
        (
            vec!["token", "create", "--name", "x", "--repository", "demo"],
            "owner/name",
        ),
        (
            vec!["token", "create", "--name", "", "--all-repositories"],
            "name is 1 to",
        ),
        (vec!["keys", "retire", "9"], "no key 9"),
        (vec!["run", "close", "--repository", "x", "--run-id", "1"], "owner/name"),
    ] {
        let output = environment.run(&wrong);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why), "{wrong:?}: {said}");
    }
    assert_eq!(server.terminate(), Some(0));
}
