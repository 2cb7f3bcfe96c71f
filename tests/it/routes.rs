//! Every route has a guard, and it is the one that the URL map declares.

use serde_json::json;
use wharfinger::api::{self, Caller, Context};

use super::common::raw::{Reply, exchange, request};
use super::common::{Backend, TestServer};

/// What anybody may call. Whoever adds to this list makes something public.
const PUBLIC: [&str; 2] = ["/twirp/{*method}", "/twirp/"];

async fn send(server: &TestServer, method: &str, path: &str, headers: &[(&str, &str)]) -> Reply {
    exchange(&server.url, &request(method, path, headers, b"{}")).await
}

#[tokio::test]
async fn every_route_is_guarded_as_declared() {
    let server = TestServer::start(Backend::SqliteDisk).await;
    let map = api::public(Context {
        services: server.app.services.clone(),
        patience: server.config.server.patience(),
    });
    let blob = uuid::Uuid::now_v7();
    let mut public = Vec::new();
    for (pattern, caller) in map.routes() {
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
            Caller::Anyone => public.push(*pattern),
        }
    }
    assert_eq!(public, PUBLIC);
    assert!(map.routes().len() > PUBLIC.len());
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
