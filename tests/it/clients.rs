//! The real clients, unmodified, against the built server: every client × case on every backend, as one table.
//!
//! The table goes to `target/clients-table.txt`, which `make test` prints. A cell that is missing fails the test, as one
//! that failed does; what a client cannot do says so and why.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Mutex;

use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;
use wharfinger::clock::Clock;

use crate::common::client::{Outcome, Runner, Status, run_client};
use crate::common::process::{Environment, Process};
use crate::common::s3::S3Server;
use crate::common::{Backend, postgres_database};

const CLIENTS: [&str; 7] = [
    "artifact-2.0.1",
    "artifact-2.1.11",
    "artifact-2.3.2",
    "artifact-4.0.0",
    "artifact-5.0.3",
    "artifact-6.2.1",
    "storage-blob",
];
const CASES: [&str; 15] = [
    "small",
    "tree",
    "empty",
    "tar300",
    "delete",
    "overwrite",
    "conflict",
    "twenty",
    "killed",
    "isolation",
    "attempts",
    "across",
    "raw",
    "blocks",
    "putblob",
];
const FILE_CLIENTS: [&str; 1] = ["artifact-1.1.3"];
const FILE_CASES: [&str; 7] = ["small", "tree", "empty", "big", "packed", "merge", "every"];
const CACHE_CLIENTS: [&str; 9] = [
    "cache-3.3.0-v1",
    "cache-4.0.0-v1",
    "cache-4.0.0-v2",
    "cache-4.1.0-v1",
    "cache-4.1.0-v2",
    "cache-5.0.5-v1",
    "cache-5.0.5-v2",
    "cache-6.3.0-v1",
    "cache-6.3.0-v2",
];
const CACHE_CASES: [&str; 8] = [
    "exact", "prefix", "miss", "conflict", "200mb", "eight", "scopes", "denied",
];
/// Clients at work at once on one server: as many as the machines that this runs on have cores.
const AT_ONCE: usize = 2;
/// The bits of a cache scope's `Permission`.
const READ: u8 = 1;
const WRITE: u8 = 2;
const ISSUER_SECRET: &str = "a secret of the second issuer, for this test only";

#[tokio::test(flavor = "multi_thread")]
async fn every_client_does_every_case_on_every_backend() {
    let mut cells = BTreeMap::new();
    for backend in Backend::ALL {
        for outcome in run_all(backend).await {
            cells.insert(
                (outcome.client.clone(), outcome.case.clone(), format!("{backend:?}")),
                outcome,
            );
        }
    }
    let (table, bad) = table(&cells);
    std::fs::write(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("target/clients-table.txt"),
        &table,
    )
    .unwrap();
    assert!(bad.is_empty(), "{table}\nmissing or failed: {bad:#?}");
}

async fn run_all(backend: Backend) -> Vec<Outcome> {
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("data");
    let issuer_secret = directory.path().join("issuer.secret");
    let root_secret = directory.path().join("root.secret");
    for (file, secret) in [
        (&issuer_secret, ISSUER_SECRET),
        (&root_secret, "the root secret of the clients' test, no other"),
    ] {
        std::fs::write(file, secret).unwrap();
        std::fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    let s3 = (backend == Backend::PostgresS3).then(S3Server::start);
    let mut environment = match &s3 {
        None => Environment::embedded(&data_dir),
        Some(s3) => Environment::production(&data_dir, &postgres_database().await, s3, &root_secret),
    };
    let config = directory.path().join("wharfinger.toml");
    let issuer = format!(
        "[[issuers]]\nname = \"forge\"\nkind = \"hs256\"\niss = \"forge\"\nsecret_file = {:?}\n",
        issuer_secret.display().to_string()
    );
    std::fs::write(&config, issuer).unwrap();
    environment.set("WHARFINGER_CONFIG", config.display());
    let server = Process::start(&environment);

    let variables = vec![
        ("WHARFINGER_TEST_OTHER_TOKENS", other_identities(&server)),
        ("WHARFINGER_TEST_CACHE_TOKENS", cache_tokens(&server)),
        ("WHARFINGER_TEST_API_TOKEN", server.api_token("octo/demo")),
        ("GITHUB_API_URL", format!("{}/api/v3", server.url)),
    ];
    let queue = Mutex::new([&CACHE_CLIENTS[..], &CLIENTS, &FILE_CLIENTS].concat());
    let outcomes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                // Taken from the end: the one with the most work first.
                while let Some(client) = { queue.lock().unwrap().pop() } {
                    let mut variables = variables.clone();
                    variables.push(("WHARFINGER_TEST_ATTEMPT_TOKENS", attempt_tokens(&server, client)));
                    let runner = Runner {
                        url: server.url.clone(),
                        token: server.token("octo/demo", "1", "build"),
                        variables,
                    };
                    outcomes.lock().unwrap().extend(run_client(&runner, client, "all"));
                }
            });
        }
    });
    outcomes.into_inner().unwrap()
}

/// Tokens for the same run id of another repository, and of another issuer's repository of the same name.
fn other_identities(server: &Process) -> String {
    format!(
        "{},{}",
        server.token("octo/other", "1", "build"),
        forge_token(READ | WRITE)
    )
}

/// Jobs of two attempts of a run of the client's own: by what `client.mjs` calls them.
fn attempt_tokens(server: &Process, client: &str) -> String {
    let of = |job: &str, attempt| server.token_of_attempt("octo/demo", &format!("attempts-{client}"), job, attempt);
    json!({
        "build1": of("build", 1),
        "test1": of("test", 1),
        "build2": of("build", 2),
        "use2": of("use", 2),
    })
    .to_string()
}

/// Jobs of one repository that build different refs, and their likes elsewhere: by what `cache.mjs` calls them.
fn cache_tokens(server: &Process) -> String {
    let of_ref = |git_ref: &str| server.token_of_ref("octo/demo", "2", "build", git_ref);
    json!({
        "main": of_ref("refs/heads/main"),
        "feature": of_ref("refs/heads/feature"),
        "sibling": of_ref("refs/heads/feature-2"),
        "pull": of_ref("refs/pull/7/merge"),
        "otherPull": of_ref("refs/pull/8/merge"),
        "otherRepository": server.token("octo/other", "2", "build"),
        "otherIssuer": forge_token(READ | WRITE),
        "readOnly": forge_token(READ),
        "writeOnly": forge_token(WRITE),
    })
    .to_string()
}

/// A token of the other issuer for run 1 of `octo/demo`, whose job may do with the main branch's cache what
/// `permission` says.
fn forge_token(permission: u8) -> String {
    let now_s = Clock::System.now_ms() / 1000;
    let scopes = json!([{ "Scope": "refs/heads/main", "Permission": permission }]);
    let claims = json!({
        "iss": "forge",
        "scp": "Actions.Results:1:build",
        "ac": scopes.to_string(),
        "repository": "octo/demo",
        "iat": now_s,
        "exp": now_s + 3600,
    });
    let key = EncodingKey::from_secret(ISSUER_SECRET.as_bytes());
    jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap()
}

/// The table, and what is wrong in it.
fn table(cells: &BTreeMap<(String, String, String), Outcome>) -> (String, Vec<String>) {
    let (mut table, mut bad) = (String::new(), Vec::new());
    writeln!(
        table,
        "{:<16} {:<10} {:<12} {:<12}",
        "client", "case", "SQLite+disk", "Postgres+S3"
    )
    .unwrap();
    let rows = [
        (&FILE_CLIENTS[..], &FILE_CASES[..]),
        (&CLIENTS, &CASES),
        (&CACHE_CLIENTS, &CACHE_CASES),
    ];
    for (clients, cases) in rows {
        for (client, case) in clients
            .iter()
            .flat_map(|client| cases.iter().map(move |case| (*client, *case)))
        {
            write!(table, "{client:<16} {case:<10}").unwrap();
            let mut why = None;
            for backend in Backend::ALL {
                let cell = cells.get(&(client.to_owned(), case.to_owned(), format!("{backend:?}")));
                let shown = match cell {
                    Some(Outcome {
                        status: Status::Ok, ms, ..
                    }) => format!("ok {ms} ms"),
                    Some(Outcome {
                        status: Status::Na,
                        detail,
                        ..
                    }) => {
                        why = Some(detail);
                        "n/a".to_owned()
                    }
                    Some(Outcome {
                        status: Status::Fail,
                        detail,
                        ..
                    }) => {
                        bad.push(format!("{client} {case} {backend:?}: {detail}"));
                        "FAIL".to_owned()
                    }
                    None => {
                        bad.push(format!("{client} {case} {backend:?}: no outcome"));
                        "MISSING".to_owned()
                    }
                };
                write!(table, " {shown:<12}").unwrap();
            }
            writeln!(table, " {}", why.map_or("", |why| why.as_str())).unwrap();
        }
    }
    (table, bad)
}
