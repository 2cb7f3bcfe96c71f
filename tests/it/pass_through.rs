//! What is left to another server: goes there byte for byte, as it comes, and nothing else does.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use wharfinger::api::pass_through::Settings;

use super::cache_api::{CacheJob, VERSION};
use super::common::client::{Runner, succeed};
use super::common::process::{Environment, Process};
use super::common::raw::{exchange, request};
use super::common::{Backend, TestServer};

const UNKNOWN: &str = "/twirp/github.actions.results.api.v1.WorkflowStepUpdateService/WorkflowStepsUpdate";
const SOON: Duration = Duration::from_secs(20);

/// Another server, which notes what it is asked.
#[derive(Clone, Default)]
struct Other {
    asked: Arc<Mutex<Vec<(String, HeaderMap)>>>,
}

impl Other {
    async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    fn asked(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked.iter().map(|(line, _)| line.clone()).collect()
    }
}

/// Sends each piece of the body back as it comes, with a mark.
async fn answer(State(other): State<Other>, request: Request) -> Response {
    let line = format!("{} {}", request.method(), request.uri());
    let headers = request.headers().clone();
    other.asked.lock().unwrap().push((line, headers));
    let pieces = request.into_body().into_data_stream().map(|piece| {
        let piece = piece.unwrap();
        Ok::<_, std::io::Error>([b"<", &piece[..], b">"].concat())
    });
    let mut response = Body::from_stream(pieces).into_response();
    *response.status_mut() = StatusCode::IM_A_TEAPOT;
    response.headers_mut().insert("x-other", "yes".parse().unwrap());
    response.headers_mut().insert("connection", "x-hop".parse().unwrap());
    response
        .headers_mut()
        .insert("x-hop", "of one connection".parse().unwrap());
    response
}

async fn server(edit: impl FnOnce(&mut Settings)) -> (TestServer, Other) {
    let other = Other::default();
    let mut settings = Settings {
        upstream: other.start().await,
        unknown_paths: vec!["/twirp/".to_owned(), "/_apis/elsewhere/".to_owned()],
        ..Settings::default()
    };
    edit(&mut settings);
    let server = TestServer::start_with(Backend::SqliteDisk, |config| config.pass_through = settings).await;
    (server, other)
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_stream_both_ways() {
    let (server, other) = server(|_| {}).await;
    let (pieces, body) = mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
    let body = futures_util::stream::unfold(
        body,
        |mut body| async move { body.recv().await.map(|piece| (piece, body)) },
    );
    let sending = server
        .http
        .post(format!("{}{UNKNOWN}?a=%2F&b", server.url))
        .header("authorization", "Bearer another server's")
        .header("content-encoding", "gzip")
        .header("connection", "x-mine")
        .header("x-mine", "of this connection")
        .body(reqwest::Body::wrap_stream(body))
        .send();
    let sending = tokio::spawn(sending);
    pieces.send(Ok(b"one".to_vec())).await.unwrap();
    // The reply begins while the request has not ended, and each piece is there before the next is sent.
    let reply = tokio::time::timeout(SOON, sending)
        .await
        .expect("the request is buffered")
        .unwrap()
        .unwrap();
    assert_eq!(reply.status(), StatusCode::IM_A_TEAPOT);
    assert_eq!(reply.headers()["x-other"], "yes");
    assert!(!reply.headers().contains_key("x-hop"));
    let mut stream = reply.bytes_stream();
    for (expected, next) in [("<one>", Some("two")), ("<two>", Some("three")), ("<three>", None)] {
        let piece = tokio::time::timeout(SOON, stream.next())
            .await
            .expect("the reply is buffered");
        assert_eq!(piece.unwrap().unwrap(), expected);
        if let Some(next) = next {
            pieces.send(Ok(next.as_bytes().to_vec())).await.unwrap();
        }
    }
    drop(pieces);
    assert!(stream.next().await.is_none());
    let (line, headers) = other.asked.lock().unwrap()[0].clone();
    assert_eq!(line, format!("POST {UNKNOWN}?a=%2F&b"));
    assert_eq!(headers["authorization"], "Bearer another server's");
    assert_eq!(headers["content-encoding"], "gzip");
    assert!(!headers.contains_key("x-mine"));
    assert_ne!(headers["host"], server.url.strip_prefix("http://").unwrap());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_here_stays_here() {
    let (server, other) = server(|_| {}).await;
    let job = server.job();
    job.upload("a", b"a").await;
    assert_eq!(job.names().await, ["a"]);
    let bearer = format!("Bearer {}", job.token);
    let send = async |method: &str, path: &str, headers: &[(&str, &str)]| {
        exchange(&server.url, &request(method, path, headers, b"")).await.status
    };
    // Without papers, and below what is ours.
    assert_eq!(send("POST", UNKNOWN, &[]).await, 401);
    for path in [
        "/",
        "/metrics",
        "/api/v1/nothing",
        "/api/v3/nothing",
        "/blob/nothing",
        "/_apis/artifactcache/nothing",
    ] {
        assert_eq!(send("GET", path, &[("authorization", &bearer)]).await, 404, "{path}");
    }
    // Nor what leads out of the paths that are passed on.
    for path in [
        "/twirp/../admin",
        "/twirp/x/%2e%2e/%2E./admin",
        "/twirp/./x",
        "/twirp/..\\admin",
    ] {
        assert_eq!(send("POST", path, &[("authorization", &bearer)]).await, 400, "{path}");
    }
    assert_eq!(other.asked(), [""; 0]);
    let good = ["/_apis/elsewhere/x?y", "/_apis/elsewhere//a%2Fb%20c/%C3%BC/..d?e=../f"];
    for path in good {
        assert_eq!(send("GET", path, &[("authorization", &bearer)]).await, 418, "{path}");
    }
    assert_eq!(other.asked(), good.map(|path| format!("GET {path}")));
    server.stop().await;

    // By default nothing goes anywhere.
    let server = TestServer::start(Backend::SqliteDisk).await;
    let reply = exchange(
        &server.url,
        &request("POST", UNKNOWN, &[("authorization", &bearer)], b"{}"),
    )
    .await;
    assert_eq!((reply.status, &reply.json()["code"]), (404, &json!("bad_route")));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_or_the_cache_can_be_the_others() {
    for (artifacts, cache) in [(true, false), (false, true)] {
        let (server, other) = server(|settings| {
            settings.artifacts = artifacts;
            settings.cache = cache;
        })
        .await;
        let job = server.job();
        let bearer = format!("Bearer {}", job.token);
        let send = async |method: &str, path: &str| {
            let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
            exchange(&server.url, &request(method, path, &headers, b"{}"))
                .await
                .status
        };
        for (path, is_artifact) in [
            (
                "/twirp/github.actions.results.api.v1.ArtifactService/ListArtifacts",
                true,
            ),
            ("/_apis/pipelines/workflows/1/artifacts", true),
            ("/_apis/resources/Containers/1", true),
            (
                "/twirp/github.actions.results.api.v1.CacheService/GetCacheEntryDownloadURL",
                false,
            ),
            ("/_apis/artifactcache/caches", false),
        ] {
            let is_other = if is_artifact { artifacts } else { cache };
            assert_eq!(send("POST", path).await == 418, is_other, "{path}");
        }
        assert_eq!(other.asked().len(), if artifacts { 3 } else { 2 });
        if artifacts {
            CacheJob {
                server: &server,
                token: job.token.clone(),
            }
            .save("deps", b"here")
            .await;
        } else {
            job.upload("a", b"here").await;
        }
        server.stop().await;
    }
}

/// A server that is not there is answered for in the words of whoever asked, and nonsense does not start.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_is_told_of() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let away = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let (server, _) = server(|settings| settings.upstream = away).await;
    let reply = exchange(
        &server.url,
        &request("POST", UNKNOWN, &[("authorization", "Bearer x")], b"{}"),
    )
    .await;
    assert_eq!((reply.status, &reply.json()["code"]), (503, &json!("unavailable")));
    assert!(reply.header("retry-after").is_some());
    server.stop().await;

    let directory = tempfile::tempdir().unwrap();
    for (name, value, why) in [
        ("UPSTREAM", "other.example.com", "pass_through.upstream"),
        ("UPSTREAM", "https://other.example.com/path", "a path"),
        ("CACHE", "true", "need a pass_through.upstream"),
    ] {
        let mut environment = Environment::embedded(&directory.path().join("data")).listening();
        environment.set(&format!("WHARFINGER_PASS_THROUGH__{name}"), value);
        let output = environment.run(&["serve"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why), "{said}");
    }
}

/// A Wharfinger that has the artifacts before one that has the caches, with the real clients of both.
#[tokio::test(flavor = "multi_thread")]
async fn two_servers_share_the_work() {
    let directory = tempfile::tempdir().unwrap();
    let issuer_secret = directory.path().join("issuer.secret");
    std::fs::write(&issuer_secret, "what two servers know: 3q2+7wkY1xT5mZ0rVb8sQe").unwrap();
    std::fs::set_permissions(&issuer_secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let config = directory.path().join("wharfinger.toml");
    let issuer =
        format!("[[issuers]]\nname = \"forge\"\nkind = \"hs256\"\niss = \"forge\"\nsecret_file = {issuer_secret:?}\n");
    std::fs::write(&config, issuer).unwrap();
    let start = |name: &str, settings: &[(&str, &str)]| {
        let mut environment = Environment::embedded(&directory.path().join(name));
        environment.set("WHARFINGER_CONFIG", config.display());
        for (key, value) in settings {
            environment.set(key, value);
        }
        Process::start(&environment)
    };
    let behind = start("behind", &[]);
    let front = start(
        "front",
        &[
            ("WHARFINGER_PASS_THROUGH__UPSTREAM", &behind.url),
            ("WHARFINGER_PASS_THROUGH__CACHE", "true"),
        ],
    );
    let now_s = wharfinger::clock::Clock::System.now_ms() / 1000;
    let claims: Value = json!({
        "iss": "forge", "scp": "Actions.Results:1:build", "repository": "octo/demo", "run_id": 1,
        "ac": r#"[{"Scope":"refs/heads/main","Permission":3}]"#, "iat": now_s, "exp": now_s + 3600,
    });
    let secret = std::fs::read(&issuer_secret).unwrap();
    let token = super::common::issuer::sign(&secret, super::common::issuer::HEADER, &claims.to_string());
    for (client, cases) in [
        ("artifact-6.2.1", "small"),
        ("cache-6.3.0-v2", "exact"),
        ("cache-3.3.0-v1", "exact"),
    ] {
        let runner = Runner {
            url: front.url.clone(),
            token: token.clone(),
            variables: Vec::new(),
        };
        succeed(&runner, client, cases).await;
    }
    let count = |server: &Process| {
        let usage = server.environment.output(&["usage"]);
        let row: Vec<String> = usage
            .lines()
            .nth(1)
            .unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        (row[3] != "0", row[5] != "0")
    };
    assert_eq!((count(&front), count(&behind)), ((true, false), (false, true)));
    let url = format!("{}/_apis/artifactcache/cache?keys=none&version={VERSION}", front.url);
    assert_eq!(front.job().http.get(url).send().await.unwrap().status(), 401);
    for server in [front, behind] {
        assert_eq!(server.terminate(), Some(0));
    }
}
