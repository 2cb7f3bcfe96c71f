//! No secret leaves the server: not in its log at any level, not in metrics or the shown configuration, not in what it
//! answers to those it refuses.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use wharfinger::clock::Clock;

use super::common::client::{Runner, Status, run_client};
use super::common::process::{Environment, Process, RemoteJob};
use super::common::raw::{Reply, converse, request};
use super::common::s3::S3Server;
use super::common::{Backend, issuer};

const DATABASE_PASSWORD: &str = "canary-of-the-database-7Yq2";

/// Secrets, each in the forms in which it could get out.
#[derive(Default)]
struct Canaries {
    forms: Vec<(String, String)>,
    /// Where one was found.
    found: Vec<String>,
}

impl Canaries {
    fn add(&mut self, name: &str, secret: &str) {
        assert!(secret.len() >= 8, "{name} is no secret: {secret}");
        let hex = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
        for (form, text) in [
            ("as it is", secret.to_owned()),
            ("in base64", STANDARD.encode(secret).trim_end_matches('=').to_owned()),
            ("in base64url", URL_SAFE_NO_PAD.encode(secret)),
            ("in hex", hex),
        ] {
            self.forms.push((format!("{name} {form}"), text));
        }
    }

    /// What proves a token good; the rest of it is no secret, and yet in no log.
    fn add_token(&mut self, name: &str, token: &str) {
        self.add(name, token);
        self.add(&format!("{name}'s signature"), token.rsplit('.').next().unwrap());
    }

    fn add_link(&mut self, name: &str, link: &str) {
        let (_, query) = link.split_once('?').unwrap();
        let signature = query.split('&').find_map(|pair| pair.strip_prefix("sig=")).unwrap();
        self.add(name, signature);
    }

    fn look(&mut self, place: &str, text: &str) {
        for (name, form) in &self.forms {
            if let Some(line) = text.lines().find(|line| line.contains(form)) {
                self.found.push(format!("{name} in {place}: {line}"));
            }
        }
    }
}

/// Requests that are refused, in every dialect. Returns the texts of the replies.
async fn refused(process: &Process, token: &str, api_token: &str, write: &str, read: &str) -> Vec<String> {
    let bearer = format!("Bearer {token}");
    let broken = format!("{bearer}x");
    let api = format!("Bearer {api_token}");
    let broken_api = format!("{api}x");
    let twirp = "/twirp/github.actions.results.api.v1.ArtifactService/ListArtifacts";
    let [write, read] = [write, read].map(|link| link.strip_prefix(process.url.as_str()).unwrap());
    let json = ("Content-Type", "application/json");
    let run = json!({ "workflow_run_backend_id": "2", "workflow_job_run_backend_id": "build" }).to_string();
    let mut replies = Vec::new();
    for (status, method, target, headers, body) in [
        (401, "POST", twirp, vec![json, ("Authorization", broken.as_str())], "{}"),
        (401, "POST", twirp, vec![json, ("Authorization", token)], "{}"),
        (403, "POST", twirp, vec![json, ("Authorization", &bearer)], &run),
        (400, "POST", twirp, vec![json, ("Authorization", &bearer)], "{"),
        (
            415,
            "POST",
            twirp,
            vec![json, ("Authorization", &bearer), ("Content-Encoding", "gzip")],
            "{}",
        ),
        (403, "POST", twirp, vec![json, ("Authorization", &api)], "{}"),
        (
            401,
            "POST",
            "/api/v1/run/close",
            vec![json, ("Authorization", &broken_api)],
            "{}",
        ),
        (
            400,
            "POST",
            "/api/v1/run/close",
            vec![json, ("Authorization", &api)],
            "{",
        ),
        (404, "POST", "/twirp/x", vec![("Authorization", &bearer)], "{}"),
        (404, "GET", "/nothing", vec![("Authorization", &bearer)], ""),
        (
            401,
            "GET",
            "/_apis/artifactcache/cache?keys=a&version=b",
            vec![("Authorization", &broken)],
            "",
        ),
        (
            400,
            "GET",
            "/_apis/artifactcache/cache?keys=a",
            vec![("Authorization", &bearer)],
            "",
        ),
        (
            400,
            "POST",
            "/_apis/artifactcache/caches",
            vec![("Authorization", &bearer)],
            "{",
        ),
        (
            403,
            "GET",
            "/_apis/pipelines/workflows/2/artifacts",
            vec![("Authorization", &bearer)],
            "",
        ),
        (403, "PUT", read, vec![], "x"),
        (403, "GET", write, vec![], ""),
        (403, "GET", &format!("{read}x"), vec![], ""),
        (400, "PUT", &format!("{write}&comp=junk"), vec![], "x"),
        (400, "PUT", &format!("{write}&comp=block&blockid=!"), vec![], "x"),
        (400, "PUT", &format!("{write}&comp=blocklist"), vec![], "<"),
        (416, "GET", read, vec![("Range", "bytes=99-")], ""),
        (400, "GET", read, vec![("Authorization", &bearer), ("x y", "z")], ""),
        (
            431,
            "GET",
            read,
            vec![("Authorization", &bearer), ("x", &"x".repeat(70_000))],
            "",
        ),
    ] {
        let reply = Reply::parse(&converse(&process.url, &request(method, target, &headers, body.as_bytes())).await);
        assert_eq!(reply.status, status, "{method} {target}: {}", reply.text());
        replies.push(reply.text());
    }
    replies
}

/// The real clients, which know more ways to ask than this file.
fn clients(process: &Process, token: &str) {
    let runner = Runner {
        url: process.url.clone(),
        token: token.to_owned(),
        variables: Vec::new(),
    };
    for (client, case) in [
        ("artifact-6.2.1", "small"),
        ("artifact-1.1.3", "small"),
        ("cache-6.3.0-v2", "exact"),
        ("cache-3.3.0-v1", "exact"),
    ] {
        for outcome in run_client(&runner, client, case) {
            assert_eq!(outcome.status, Status::Ok, "{outcome:?}");
        }
    }
}

/// What a server with this environment says while it works, refuses, and shows itself.
async fn search(mut environment: Environment, directory: &Path, root_secret: &Path, canaries: &mut Canaries) {
    environment.set("WHARFINGER_LOG__LEVEL", "trace");
    let environment = environment.listening();
    let stdout = directory.join("stdout");
    let mut command = environment.command(&["serve", "--log-format", "json"]);
    command.stdout(Stdio::from(File::create(&stdout).unwrap()));
    let process = Process::start_by(command, environment.clone());

    canaries.add("the root secret", fs::read_to_string(root_secret).unwrap().trim());
    let job = process.job();
    canaries.add_token("a token", &job.token);
    let write = job.create("canary").await;
    canaries.add_link("a link to write", &write);
    assert_eq!(job.put(&write, 5, "bytes").await.unwrap(), 201);
    job.finalize("canary", 5).await;
    let read = job.link("canary").await;
    canaries.add_link("a link to read", &read);
    assert_eq!(job.download("canary").await, b"bytes");
    let claims = issuer::claims("forge", "octo/demo", "1", "build", Clock::System.now_ms());
    let other = RemoteJob {
        token: issuer::sign(issuer::secret("forge").as_bytes(), issuer::HEADER, &claims.to_string()),
        ..job.clone()
    };
    canaries.add_token("the issuer's token", &other.token);
    assert_eq!(other.names().await, [""; 0]);
    let create = [
        "token",
        "create",
        "--name",
        "canary",
        "--all-repositories",
        "--access",
        "admin",
    ];
    let api_token = environment.output(&create).trim().to_owned();
    canaries.add("an API token", &api_token);
    let open = job.create("open").await;
    canaries.add_link("another link to write", &open);
    for text in refused(&process, &job.token, &api_token, &open, &read).await {
        canaries.look("a refusal", &text);
    }
    clients(&process, &job.token);

    for page in ["metrics", "readyz", "healthz"] {
        let text = reqwest::get(format!("{}/{page}", process.internal_url)).await.unwrap();
        canaries.look(page, &text.text().await.unwrap());
    }
    canaries.look("check-config", &environment.output(&["check-config"]));
    let log = process.log_to_its_end();
    assert!(
        log.iter()
            .any(|line| line.contains("\"TRACE\"") || line.contains("\"DEBUG\"")),
        "the log is not at its most talkative"
    );
    for line in &log {
        let entry: Value = serde_json::from_str(line).unwrap();
        canaries.look(&format!("the log of {}", entry["target"]), line);
    }
    canaries.look("standard output", &fs::read_to_string(stdout).unwrap());
}

async fn no_secret_gets_out(backend: Backend) {
    let directory = tempfile::tempdir().unwrap();
    let s3 = (backend == Backend::PostgresS3).then(S3Server::inside);
    let mut environment = Environment::on(backend, directory.path(), s3.as_ref()).await;
    let mut canaries = Canaries::default();
    let root_secret = match &s3 {
        Some(s3) => {
            // The tests' Postgres takes any password.
            let url = environment.0["WHARFINGER_DATABASE__URL"]
                .replace("postgres@", &format!("postgres:{DATABASE_PASSWORD}@"));
            assert!(url.contains(DATABASE_PASSWORD));
            environment.set("WHARFINGER_DATABASE__URL", url);
            canaries.add("the database's password", DATABASE_PASSWORD);
            canaries.add("the store's key", s3.secret_access_key);
            directory.path().join("root.secret")
        }
        None => directory.path().join("data/root.secret"),
    };
    environment.set(
        "WHARFINGER_CONFIG",
        issuer::config_file(directory.path(), "forge").display(),
    );
    canaries.add("the issuer's secret", &issuer::secret("forge"));
    if s3.is_some() {
        // And what is said of a database that is not there.
        let mut nowhere = environment.clone();
        nowhere.set("WHARFINGER_LOG__LEVEL", "trace");
        nowhere.set(
            "WHARFINGER_DATABASE__URL",
            format!("postgres://postgres:{DATABASE_PASSWORD}@127.0.0.1:1/nothing"),
        );
        let output = nowhere.run(&["migrate"]);
        assert!(!output.status.success());
        canaries.look("a failure to start", &String::from_utf8_lossy(&output.stderr));
    }
    search(environment, directory.path(), &root_secret, &mut canaries).await;
    assert_eq!(canaries.found, [""; 0], "{backend:?}");
}

#[test]
fn what_gets_out_is_found() {
    for text in [
        "a secret canary",
        "YSBzZWNyZXQgY2FuYXJ5",
        "61207365637265742063616e617279",
    ] {
        let mut canaries = Canaries::default();
        canaries.add("it", "a secret canary");
        canaries.look("a text", &format!("first\nthen {text}!"));
        assert!(!canaries.found.is_empty(), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_gets_out_of_sqlite_and_disk() {
    no_secret_gets_out(Backend::SqliteDisk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_gets_out_of_postgres_and_s3() {
    no_secret_gets_out(Backend::PostgresS3).await;
}
