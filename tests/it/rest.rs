//! Artifacts across runs, by API token, in GitHub's shape: by hand-made requests on both backends. With the real clients
//! it is the case `across` of `clients`; who may is in `authorization`.

use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use wharfinger::model::{Access, Repositories};
use wharfinger::papers::MintRequest;
use wharfinger::service::credentials::NewApiToken;

use super::cache_api::CacheJob;
use super::common::process::{Environment, Process, http_client_builder};
use super::common::{Backend, Job, TestServer};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

struct Answer {
    status: u16,
    link: Option<String>,
    location: Option<String>,
    body: Value,
}

/// Somebody with an API token.
struct Person<'a> {
    server: &'a TestServer,
    http: reqwest::Client,
    token: String,
}

impl<'a> Person<'a> {
    async fn new(server: &'a TestServer, repositories: &[&str], issuer: Option<&str>) -> Self {
        let new = NewApiToken {
            name: "somebody".to_owned(),
            issuer: issuer.map(str::to_owned),
            repositories: match repositories {
                [] => Repositories::All,
                listed => Repositories::Some(listed.iter().map(|one| (*one).to_owned()).collect()),
            },
            access: Access::Write,
            lives_for: 1000 * DAY,
        };
        let (_, text) = server.app.services.create_api_token(new).await.unwrap();
        let redirects = reqwest::redirect::Policy::none();
        Self {
            server,
            http: http_client_builder().redirect(redirects).build().unwrap(),
            token: text.expose_secret().to_owned(),
        }
    }

    async fn send(&self, method: &str, url: &str) -> Answer {
        let request = self.http.request(method.parse().unwrap(), url);
        // As octokit says it.
        let request = request.header("authorization", format!("token {}", self.token));
        let reply = request.send().await.unwrap();
        let header = |name| {
            reply
                .headers()
                .get(name)
                .map(|value| value.to_str().unwrap().to_owned())
        };
        let (status, link, location) = (reply.status().as_u16(), header("link"), header("location"));
        let body = reply.bytes().await.unwrap();
        Answer {
            status,
            link,
            location,
            body: serde_json::from_slice(&body).unwrap_or_default(),
        }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send("GET", &format!("{}/api/v3/repos/{path}", self.server.url))
            .await
    }

    async fn delete(&self, path: &str) -> u16 {
        self.send("DELETE", &format!("{}/api/v3/repos/{path}", self.server.url))
            .await
            .status
    }

    /// The names that a list shows, in its order.
    async fn names(&self, path: &str) -> Vec<String> {
        let answer = self.get(path).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        let artifacts = answer.body["artifacts"].as_array().unwrap();
        assert_eq!(answer.body["total_count"], artifacts.len(), "{path}");
        artifacts
            .iter()
            .map(|one| one["name"].as_str().unwrap().to_owned())
            .collect()
    }
}

fn job<'a>(server: &'a TestServer, repository: &str, id: Option<i64>, run: &str, attempt: i32) -> Job<'a> {
    let request = MintRequest {
        repository: repository.to_owned(),
        repository_id: id,
        run_id: run.to_owned(),
        job_id: "build".to_owned(),
        attempt,
        git_ref: "refs/heads/main".to_owned(),
        default_ref: "refs/heads/main".to_owned(),
        event: None,
        ttl: 6 * HOUR,
    };
    let services = &server.app.services;
    Job {
        server,
        token: services.papers.mint(&request, services.clock.now_ms()).unwrap(),
        run: run.to_owned(),
        job: "build".to_owned(),
    }
}

async fn across_runs(backend: Backend) {
    let server = TestServer::start(backend).await;
    let (first, second) = (
        job(&server, "Octo/Demo", None, "30433642", 1),
        job(&server, "octo/demo", None, "30433643", 1),
    );
    let id = first.upload("image", b"image bytes").await;
    first.upload("log", b"log").await;
    first.create("pending").await;
    server.advance(Duration::from_secs(5));
    second.upload("image", b"newer").await;
    job(&server, "octo/demo", None, "30433643", 2)
        .upload("image", b"newest")
        .await;
    job(&server, "octo/other", None, "30433642", 1)
        .upload("other", b"o")
        .await;
    job(&server, "octo/numbered", Some(5), "1", 1)
        .upload("numbered", b"n")
        .await;
    let cache = CacheJob {
        server: &server,
        token: first.token.clone(),
    };
    cache.save("deps", b"12345").await;

    let octo = Person::new(&server, &["octo/demo"], None).await;
    // Of all runs and attempts, the newest first.
    assert_eq!(
        octo.names("octo/demo/actions/artifacts").await,
        ["image", "image", "log", "image"]
    );
    assert_eq!(octo.names("OCTO/demo/actions/artifacts?name=image").await, ["image"; 3]);
    assert_eq!(octo.names("octo/demo/actions/artifacts?name=IMAGE").await, [""; 0]);
    let run = "octo/demo/actions/runs/30433642";
    assert_eq!(octo.names(&format!("{run}/artifacts")).await, ["log", "image"]);
    assert_eq!(
        octo.names(&format!("{run}/artifacts?name=log&per_page=1")).await,
        ["log"]
    );
    assert_eq!(octo.names("octo/demo/actions/runs/1/artifacts").await, [""; 0]);

    let one = octo.get(&format!("octo/demo/actions/artifacts/{id}")).await;
    let url = format!("{}/api/v3/repos/octo/demo/actions/artifacts/{id}", server.url);
    assert_eq!(one.status, 200);
    let mut body = one.body;
    for time in ["created_at", "updated_at", "expires_at"] {
        let text = body.as_object_mut().unwrap().remove(time).unwrap();
        humantime::parse_rfc3339(text.as_str().unwrap()).unwrap();
    }
    assert_eq!(
        body,
        json!({
            "id": id.parse::<i64>().unwrap(),
            "node_id": "",
            "name": "image",
            "size_in_bytes": 11,
            "url": url,
            "archive_download_url": format!("{url}/zip"),
            "expired": false,
            "digest": wharfinger::model::Sha256(sha256(b"image bytes")).to_string(),
            "workflow_run": { "id": 30_433_642, "run_attempt": 1 },
        })
    );

    // Sent on to the bytes, for a minute.
    let sent_on = octo.get(&format!("octo/demo/actions/artifacts/{id}/zip")).await;
    assert_eq!(sent_on.status, 302);
    let link = sent_on.location.unwrap();
    let status = async || octo.http.get(&link).send().await.unwrap().status().as_u16();
    let reply = octo.http.get(&link).send().await.unwrap();
    assert_eq!(reply.bytes().await.unwrap().as_ref(), b"image bytes");
    server.advance(Duration::from_secs(59));
    assert_eq!(status().await, 200);
    server.advance(Duration::from_secs(1));
    assert_eq!(status().await, 403);

    // Runs and jobs, as far as tokens told.
    let runs = octo.get("octo/demo/actions/runs").await.body;
    let ids: Vec<_> = runs["workflow_runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run["id"].clone())
        .collect();
    assert_eq!(
        (&runs["total_count"], ids),
        (&json!(2), vec![json!(30_433_643), json!(30_433_642)])
    );
    assert_eq!(octo.get("octo/demo/actions/runs/30433643").await.body["run_attempt"], 2);
    let jobs = octo.get("octo/demo/actions/runs/30433643/jobs").await.body;
    assert_eq!(jobs["total_count"], 2);
    assert_eq!(jobs["jobs"][1]["run_attempt"], 2);
    let usage = octo
        .send("GET", &format!("{}/api/v1/repos/octo/demo/usage", server.url))
        .await
        .body;
    assert_eq!(
        usage,
        json!({
            "full_name": "octo/demo", "artifacts_count": 4, "artifacts_size_in_bytes": 11 + 3 + 5 + 6,
            "caches_count": 1, "caches_size_in_bytes": 5,
        })
    );

    // What is kept under a number is not opened by a name.
    let by_name = Person::new(&server, &["octo/numbered"], None).await;
    assert_eq!(by_name.names("octo/numbered/actions/artifacts").await, [""; 0]);
    let by_number = Person::new(&server, &["id:5"], None).await;
    assert_eq!(by_number.names("octo/numbered/actions/artifacts").await, ["numbered"]);
    assert_eq!(by_number.get("octo/demo/actions/artifacts").await.status, 404);
    let everybody = Person::new(&server, &[], None).await;
    assert_eq!(everybody.names("octo/numbered/actions/artifacts").await, ["numbered"]);
    assert_eq!(everybody.names("octo/other/actions/artifacts").await, ["other"]);
    let of_gitea = Person::new(&server, &[], Some("gitea")).await;
    assert_eq!(of_gitea.names("octo/other/actions/artifacts").await, [""; 0]);

    // Deleted is deleted, for jobs too.
    assert_eq!(octo.delete(&format!("octo/demo/actions/artifacts/{id}")).await, 204);
    assert_eq!(octo.delete(&format!("octo/demo/actions/artifacts/{id}")).await, 404);
    assert_eq!(first.names().await, ["log"]);
    assert_eq!(octo.delete("octo/demo/actions/runs/30433643").await, 204);
    assert_eq!(octo.names("octo/demo/actions/artifacts").await, ["log"]);
    assert_eq!(second.names().await, [""; 0]);
    let all = format!("{}/api/v1/repos/octo/demo/artifacts", server.url);
    assert_eq!(octo.send("DELETE", &all).await.status, 204);
    assert_eq!(octo.send("DELETE", &all).await.status, 404);
    assert_eq!(everybody.names("octo/other/actions/artifacts").await, ["other"]);
    server.advance(server.config.artifacts.default_retention);
    assert_eq!(
        everybody.names("octo/other/actions/artifacts").await,
        [""; 0],
        "expired"
    );
    server.stop().await;
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn across_runs_on_sqlite_and_disk() {
    across_runs(Backend::SqliteDisk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn across_runs_on_postgres_and_s3() {
    across_runs(Backend::PostgresS3).await;
}

/// Every artifact once, however many pages there are, and every page knows its neighbours.
#[tokio::test(flavor = "multi_thread")]
async fn pages_are_complete() {
    const ARTIFACTS: usize = 1_050;
    let server = TestServer::start_with(Backend::SqliteDisk, |config| {
        config.storage.durability = wharfinger::storage::Durability::Process;
    })
    .await;
    let job = job(&server, "octo/demo", None, "7", 1);
    let uploads = (0..ARTIFACTS).map(|number| {
        let job = &job;
        async move { job.upload(&format!("artifact-{number}"), b"x").await }
    });
    let mut expected: Vec<i64> = stream::iter(uploads)
        .buffer_unordered(8)
        .map(|id| id.parse::<i64>().unwrap())
        .collect()
        .await;
    expected.sort_unstable_by(|a, b| b.cmp(a));

    let octo = Person::new(&server, &["octo/demo"], None).await;
    for list in ["actions/artifacts", "actions/runs/7/artifacts"] {
        for (query, pages) in [("?per_page=100", 11), ("", 35), ("?per_page=1000", 11)] {
            let mut next = Some(format!("{}/api/v3/repos/octo/demo/{list}{query}", server.url));
            let (mut ids, mut seen) = (Vec::new(), 0);
            while let Some(url) = next {
                let answer = octo.send("GET", &url).await;
                assert_eq!(answer.body["total_count"], ARTIFACTS);
                let artifacts = answer.body["artifacts"].as_array().unwrap();
                ids.extend(artifacts.iter().map(|one| one["id"].as_i64().unwrap()));
                seen += 1;
                let link = answer.link.unwrap();
                let relation = |name: &str| {
                    let of = format!("rel=\"{name}\"");
                    let part = link.split(", ").find(|part| part.ends_with(&of))?;
                    Some(part[1..part.find('>').unwrap()].to_owned())
                };
                assert_eq!(relation("prev").is_some(), seen > 1, "{link}");
                assert_eq!(relation("last").is_some(), seen < pages, "{link}");
                next = relation("next");
            }
            assert_eq!(seen, pages, "{list}{query}");
            assert_eq!(ids, expected, "{list}{query}");
        }
    }
    let behind = octo.get("octo/demo/actions/artifacts?page=99").await;
    assert_eq!(behind.body, json!({ "total_count": ARTIFACTS, "artifacts": [] }));
    let narrow = octo
        .get("octo/demo/actions/artifacts?name=artifact-7&per_page=100")
        .await;
    assert_eq!((&narrow.body["total_count"], narrow.link), (&json!(1), None));
    server.stop().await;
}

#[tokio::test]
async fn the_commands_say_what_is_taken_and_delete_it() {
    let directory = tempfile::tempdir().unwrap();
    let server = Process::start(&Environment::embedded(&directory.path().join("data")));
    let job = server.job();
    for name in ["image", "log", "report"] {
        let link = job.create(name).await;
        assert_eq!(job.put(&link, 5, "12345").await.unwrap(), 201);
        job.finalize(name, 5).await;
    }
    let usage = server.environment.output(&["usage"]);
    let row: Vec<&str> = usage.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, ["octo/demo", "octo/demo", "wharfinger", "3", "15", "0", "0"]);
    let delete = |more: &[&str]| {
        let arguments = [&["artifact", "delete", "--repository", "octo/demo"], more].concat();
        server.environment.output(&arguments).trim().to_owned()
    };
    assert_eq!(delete(&["--run-id", "1", "--name", "log"]), "1 deleted");
    assert_eq!(delete(&["--run-id", "1", "--issuer", "gitea"]), "0 deleted");
    assert_eq!(delete(&["--run-id", "2"]), "0 deleted");
    assert_eq!(delete(&["--run-id", "1"]), "2 deleted");
    assert_eq!(delete(&["--all-runs"]), "0 deleted");
    assert_eq!(server.environment.output(&["usage"]).lines().count(), 1);
    let unsure = ["artifact", "delete", "--repository", "octo/demo"];
    assert!(!server.environment.run(&unsure).status.success(), "of which runs?");
    assert_eq!(server.terminate(), Some(0));
}
