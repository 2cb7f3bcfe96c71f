//! Every route has a guard and a limit on bodies, and they are those that the URL map declares.

use std::time::Duration;

use secrecy::ExposeSecret as _;
use serde_json::json;
use wharfinger::api::{self, BodyLimit, Caller, Context, UrlMap};
use wharfinger::model::Repositories;
use wharfinger::service::credentials::NewApiToken;

use super::common::raw::{Reply, exchange, request};
use super::common::{Backend, TestServer};

/// What anybody may call. Whoever adds to this list makes something public.
const PUBLIC: [&str; 3] = ["/twirp/", "/twirp/{*method}", "/api/v1/version"];

async fn send(server: &TestServer, method: &str, path: &str, headers: &[(&str, &str)]) -> Reply {
    let reply = exchange(&server.url, &request(method, path, headers, b"{}")).await;
    assert_protected(path, &reply);
    reply
}

/// No reply may become something else in a browser, and none to a link may stay anywhere.
fn assert_protected(path: &str, reply: &Reply) {
    assert_eq!(reply.header("x-content-type-options"), Some("nosniff"), "{path}");
    if path.starts_with("/blob/") {
        assert_eq!(reply.header("cache-control"), Some("private, no-store"), "{path}");
        assert_eq!(reply.header("referrer-policy"), Some("no-referrer"), "{path}");
    }
}

fn url_map(server: &TestServer) -> UrlMap {
    api::public(Context {
        services: server.app.services.clone(),
        upstream: None,
        patience: server.config.server.patience(),
    })
}

#[tokio::test]
async fn every_route_is_guarded_as_declared() {
    let server = TestServer::start(Backend::SqliteDisk).await;
    let map = url_map(&server);
    let blob = uuid::Uuid::now_v7();
    let mut public = Vec::new();
    for (pattern, caller, _) in map.routes() {
        let path = pattern
            .replace("{kind}", "art")
            .replace("{id}", &blob.to_string())
            .replace("{run_id}", "1");
        match caller {
            Caller::RuntimeToken => {
                let json = ("content-type", "application/json");
                for headers in [
                    vec![json],
                    vec![json, ("authorization", "Bearer garbage")],
                    vec![json, ("authorization", "Bearer a.b.c")],
                    vec![json, ("authorization", "Basic b2N0bzpjYXQ=")],
                ] {
                    let reply = send(&server, "POST", &path, &headers).await;
                    assert_eq!(reply.status, 401, "{path} {headers:?}");
                    // In the words of the path's clients.
                    let (field, word) = if path.starts_with("/_apis/") {
                        ("typeKey", "UnauthorizedException")
                    } else if path.starts_with("/api/") {
                        ("message", "Bad credentials")
                    } else {
                        ("code", "unauthenticated")
                    };
                    assert_eq!(reply.json()[field], json!(word), "{path}");
                }
            }
            Caller::SignedLink => {
                for method in ["GET", "HEAD", "PUT", "POST", "DELETE", "PATCH"] {
                    for query in ["", "?sv=1&sp=w&se=9999999999&sk=1&sig=garbage"] {
                        let reply = send(&server, method, &format!("{path}{query}"), &[]).await;
                        assert_eq!(reply.status, 403, "{method} {path}{query}");
                        assert_eq!(reply.header("x-ms-error-code"), Some("AuthenticationFailed"));
                    }
                }
            }
            // `authorization` has every caller on these.
            Caller::ApiToken(_) => {
                let reply = send(&server, "POST", &path, &[]).await;
                assert_eq!(
                    (reply.status, reply.json()),
                    (401, json!({ "message": "Bad credentials" })),
                    "{path}"
                );
            }
            Caller::Upstream => panic!("nothing is passed on"),
            Caller::Anyone => public.push(pattern.as_str()),
        }
    }
    assert_eq!(public, PUBLIC);
    assert!(map.routes().len() > PUBLIC.len());
    server.stop().await;
}

/// A path that a route's caller may ask for, and the header that it asks with.
async fn good(server: &TestServer, pattern: &str, caller: Caller) -> (String, String) {
    // A job for each route: one of them ends its job.
    let job = server.job_of("octo/demo", "1", &uuid::Uuid::now_v7().to_string());
    let path = match caller {
        Caller::SignedLink => {
            let link = job.create("limits").await;
            format!("{}&comp=blocklist", link.strip_prefix(&server.url).unwrap())
        }
        _ => pattern.replace("{id}", "1").replace("{run_id}", "1"),
    };
    let token = match caller {
        Caller::ApiToken(access) => {
            let new = NewApiToken {
                name: "test".to_owned(),
                issuer: None,
                repositories: Repositories::All,
                access,
                lives_for: Duration::from_secs(3600),
            };
            let (_, text) = server.app.services.create_api_token(new).await.unwrap();
            text.expose_secret().to_owned()
        }
        _ => job.token,
    };
    (path, format!("Bearer {token}"))
}

#[tokio::test]
async fn every_route_refuses_a_body_that_is_too_large_or_packed() {
    let server = TestServer::start(Backend::SqliteDisk).await;
    for (pattern, caller, limit) in url_map(&server).routes() {
        let (path, bearer) = good(&server, pattern, *caller).await;
        let method = if *caller == Caller::SignedLink { "PUT" } else { "POST" };
        let headers = [("content-type", "application/json"), ("authorization", bearer.as_str())];
        let send = async |more: (&str, &str), body: &[u8]| {
            let headers = [&headers[..], &[more]].concat();
            let reply = exchange(&server.url, &request(method, &path, &headers, body)).await;
            assert_protected(&path, &reply);
            reply
        };
        // Where the clients know 400 only, it is that.
        let too_large = if path.starts_with("/_apis/") { 400 } else { 413 };
        let (most, whole) = match *limit {
            BodyLimit::None => (64 * 1024, None),
            BodyLimit::Bytes(bytes) => (bytes, Some(bytes)),
            BodyLimit::Streamed { whole } => (whole, Some(whole)),
            BodyLimit::StreamedPacked => continue,
        };
        // By what is said of it alone: no byte of it comes.
        let reply = send(("content-length", &(most + 1).to_string()), b"").await;
        assert_eq!(reply.status, too_large, "{path}: {reply:?}");
        assert!(reply.text().contains(&most.to_string()), "{path}: {reply:?}");
        // And where nothing is said of it, as soon as it is. Azure's clients must say it.
        if let Some(whole) = whole.filter(|_| *caller != Caller::SignedLink) {
            let body = [
                format!("{:x}\r\n", whole + 1).as_bytes(),
                &vec![b' '; whole + 1],
                b"\r\n0\r\n\r\n",
            ]
            .concat();
            let reply = send(("transfer-encoding", "chunked"), &body).await;
            // What is not implemented reads nothing.
            assert!(reply.status == too_large || reply.status == 501, "{path}: {reply:?}");
        }
        let reply = send(("content-encoding", "gzip"), b"{}").await;
        assert_eq!(reply.status, 415, "{path}: {reply:?}");
        let reply = send(("content-encoding", "identity"), b"{}").await;
        assert_ne!(reply.status, 415, "{path}: {reply:?}");
    }
    server.stop().await;
}

/// Operators' pages and whatever scanners look for are not on the public listener.
#[tokio::test]
async fn nothing_else_is_there() {
    let server = TestServer::start(Backend::SqliteDisk).await;
    for path in [
        "/",
        "/healthz",
        "/readyz",
        "/metrics",
        "/debug/pprof",
        "/.env",
        "/.git/config",
        "/blob",
        "/blob/art",
    ] {
        let reply = send(&server, "GET", path, &[]).await;
        assert_eq!(reply.status, 404, "{path}");
        assert_eq!(reply.json(), json!({ "message": "Not Found" }), "{path}");
    }
    for path in [
        "/twirp/x",
        "/twirp/github.actions.results.api.v1.ArtifactService/Nope",
        "/twirp/a/b/c",
    ] {
        for method in ["GET", "POST", "PUT", "DELETE"] {
            let reply = send(&server, method, path, &[]).await;
            assert_eq!(
                (reply.status, &reply.json()["code"]),
                (404, &json!("bad_route")),
                "{method} {path}"
            );
        }
    }
    server.stop().await;
}
