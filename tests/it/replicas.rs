//! Two replicas with nothing in common but database, bucket and secret, behind a proxy that sends each request to the
//! other one than the last: a block lands here, its list there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Method, Response, header};
use tempfile::TempDir;
use tokio::net::TcpListener;

use crate::common::client::{Runner, Status, run_client};
use crate::common::postgres_database;
use crate::common::process::{Environment, Process, http_client, secret_file};
use crate::common::s3::S3Server;

/// Everything that the artifact client asks for.
const KINDS: [&str; 8] = [
    "CreateArtifact",
    "DeleteArtifact",
    "FinalizeArtifact",
    "GetSignedArtifactURL",
    "ListArtifacts",
    "block",
    "blocklist",
    "download",
];

/// Passes requests on, to each replica in turn.
struct Proxy {
    replicas: [String; 2],
    http: reqwest::Client,
    /// How many requests of each kind each replica got; together they say whose turn it is.
    seen: Mutex<BTreeMap<String, [u64; 2]>>,
}

impl Proxy {
    /// Counts a request and chooses the replica for it.
    fn turn(&self, kind: String) -> usize {
        let mut seen = self.seen.lock().unwrap();
        let replica = usize::try_from(seen.values().flatten().sum::<u64>() % 2).unwrap();
        seen.entry(kind).or_default()[replica] += 1;
        replica
    }

    /// What some replica has not got yet.
    fn missing(&self) -> Vec<&'static str> {
        let seen = self.seen.lock().unwrap();
        let by_both = |kind: &&str| seen.get(*kind).is_some_and(|counts| !counts.contains(&0));
        KINDS.into_iter().filter(|kind| !by_both(kind)).collect()
    }
}

fn kind(request: &Request) -> String {
    let query = request.uri().query().unwrap_or_default();
    let comp = query.split('&').find_map(|pair| pair.strip_prefix("comp="));
    let last = request.uri().path().rsplit('/').next().unwrap_or_default();
    match (request.method(), comp) {
        (&Method::PUT, Some(comp)) => comp.to_owned(),
        (&Method::POST, _) => last.to_owned(),
        (&Method::GET, _) => "download".to_owned(),
        (method, _) => method.to_string(),
    }
}

async fn pass_on(State(proxy): State<Arc<Proxy>>, request: Request) -> Response<Body> {
    let replica = &proxy.replicas[proxy.turn(kind(&request))];
    let (head, body) = request.into_parts();
    let mut headers = head.headers;
    // Of this connection only.
    for name in [header::HOST, header::CONNECTION, header::TRANSFER_ENCODING] {
        headers.remove(name);
    }
    let mut passed = proxy
        .http
        .request(head.method.clone(), format!("{replica}{}", head.uri))
        .headers(headers);
    if head.method != Method::GET && head.method != Method::HEAD {
        passed = passed.body(reqwest::Body::wrap_stream(body.into_data_stream()));
    }
    let reply = match passed.send().await {
        Ok(reply) => reply,
        Err(error) => {
            let mut failed = Response::new(Body::from(error.to_string()));
            *failed.status_mut() = axum::http::StatusCode::BAD_GATEWAY;
            return failed;
        }
    };
    let (status, mut headers) = (reply.status(), reply.headers().clone());
    headers.remove(header::CONNECTION);
    headers.remove(header::TRANSFER_ENCODING);
    let mut answer = Response::new(Body::from_stream(reply.bytes_stream()));
    *answer.status_mut() = status;
    *answer.headers_mut() = headers;
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_may_land_on_another_replica() {
    let (s3, database) = (S3Server::start(), postgres_database().await);
    let directories: [TempDir; 2] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let replicas = directories.each_ref().map(|directory| {
        let secret_file = secret_file(directory.path());
        let mut environment = Environment::production(&directory.path().join("data"), &database, &s3, &secret_file);
        environment.set("WHARFINGER_PUBLIC_URL", &url);
        Process::start(&environment)
    });
    let proxy = Arc::new(Proxy {
        replicas: replicas
            .each_ref()
            .map(|replica| format!("http://{}", replica.environment.0["WHARFINGER_LISTEN"])),
        http: http_client(),
        seen: Mutex::default(),
    });
    let router = Router::new().fallback(pass_on).with_state(Arc::clone(&proxy));
    tokio::spawn(async move { axum::serve(listener, router).await });

    let run = async |token: String, cases: &'static str| {
        let runner = Runner {
            url: url.clone(),
            token,
            variables: vec![("WHARFINGER_TEST_BIG_BYTES", (48 << 20).to_string())],
        };
        tokio::task::spawn_blocking(move || run_client(&runner, "artifact-6.2.1", cases))
            .await
            .unwrap()
    };
    let outcomes = run(
        replicas[0].token("octo/demo", "1", "build"),
        "small,tree,tar300,overwrite,twenty",
    )
    .await;
    assert_eq!(outcomes.len(), 5);
    assert!(
        outcomes.iter().all(|outcome| outcome.status == Status::Ok),
        "{outcomes:#?}"
    );

    // A case with an even number of requests meets the same replica each time. One request more shifts the turn.
    for round in 0..6 {
        if proxy.missing().is_empty() {
            break;
        }
        assert_eq!(proxy.http.get(&url).send().await.unwrap().status(), 404);
        let token = replicas[1].token("octo/demo", &format!("again-{round}"), "build");
        for outcome in run(token, "small,overwrite").await {
            assert_eq!(outcome.status, Status::Ok, "{outcome:#?}");
        }
    }
    assert_eq!(proxy.missing(), [""; 0], "{:#?}", proxy.seen.lock().unwrap());
    for replica in replicas {
        assert_eq!(replica.terminate(), Some(0));
    }
}
