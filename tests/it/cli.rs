//! The commands by what they print, the ways in which a start is refused, and what never gets into a log.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use sqlx::PgPool;
use tempfile::TempDir;

use crate::common::process::{
    Environment, PATIENCE, Process, RemoteJob, ToItsEnd, free_port, http_client, secret_file,
};
use crate::common::s3::S3Server;
use crate::common::{block_link, block_list, postgres_database};

/// A data directory that no server has seen, and its environment.
fn embedded() -> (TempDir, Environment) {
    let directory = tempfile::tempdir().unwrap();
    let environment = Environment::embedded(&directory.path().join("data"));
    (directory, environment)
}

/// What a token says.
fn claims(token: &str) -> Value {
    let payload = token.split('.').nth(1).unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).unwrap()).unwrap()
}

const JOB: [&str; 6] = ["--repository", "octo/demo", "--run-id", "7", "--job-id", "build"];

// What commands print.

#[test]
fn env_is_for_eval() {
    let (_directory, mut environment) = embedded();
    environment.set("WHARFINGER_PUBLIC_URL", "https://artifacts.example.com/");
    // A server was here and made the root secret.
    introduce(&environment);
    let mut shell = Command::new("sh");
    environment.apply(&mut shell);
    let output = shell
        .env_remove("GITHUB_WORKSPACE")
        .args([
            "-euc",
            "cd /; eval \"$(\"$0\" env \"$@\")\"; sh -c 'printf \"%s\\n\" \"$ACTIONS_RESULTS_URL\" \"$ACTIONS_RUNTIME_URL\" \
             \"$GITHUB_SERVER_URL\" \"$GITHUB_REPOSITORY\" \"$GITHUB_RUN_ID\" \"$GITHUB_RUN_ATTEMPT\" \"$GITHUB_JOB\" \
             \"$GITHUB_WORKSPACE\" \"$ACTIONS_RUNTIME_TOKEN\"'",
        ])
        .arg(env!("CARGO_BIN_EXE_wharfinger"))
        .args(JOB)
        .args(["--attempt", "3"])
        .to_its_end(PATIENCE);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let (token, variables) = said
        .lines()
        .collect::<Vec<_>>()
        .split_last()
        .map(|(t, v)| (t.to_string(), v.to_vec()))
        .unwrap();
    assert_eq!(
        variables,
        [
            "https://artifacts.example.com/",
            "https://artifacts.example.com/",
            "https://github.com",
            "octo/demo",
            "7",
            "3",
            "build",
            "/"
        ]
    );
    assert_eq!(claims(&token)["scp"], "Actions.Results:7:build");
}

#[tokio::test]
async fn a_minted_token_is_accepted_by_the_server_beside() {
    let (_directory, environment) = embedded();
    let server = Process::start(&environment);
    let mint = |more: &[&str]| environment.output(&[&["token", "mint"], &JOB[..], more].concat());
    let said = mint(&[]);
    let token = said.strip_suffix('\n').unwrap();
    assert!(!token.contains(char::is_whitespace), "just the token: {said:?}");
    let said = claims(token);
    assert_eq!(
        (&said["iss"], &said["scp"]),
        (&json!("wharfinger"), &json!("Actions.Results:7:build"))
    );
    let lifetime = said["exp"].as_i64().unwrap() - said["iat"].as_i64().unwrap_or(said["nbf"].as_i64().unwrap());
    assert!(
        (6 * 3600..6 * 3600 + 600).contains(&lifetime),
        "6 h, and not {lifetime} s"
    );

    let list = async |token: &str, run: &str| {
        let reply = http_client()
            .post(format!(
                "{}/twirp/github.actions.results.api.v1.ArtifactService/ListArtifacts",
                server.url
            ))
            .header("content-type", "application/json")
            .bearer_auth(token)
            .body(json!({ "workflow_run_backend_id": run, "workflow_job_run_backend_id": "build" }).to_string())
            .send()
            .await
            .unwrap();
        reply.status().as_u16()
    };
    assert_eq!(list(token, "7").await, 200);
    assert_eq!(list(token, "8").await, 403);
    assert_eq!(list(&format!("{token}x"), "7").await, 401);

    let full = mint(&[
        "--repository-id",
        "42",
        "--attempt",
        "2",
        "--ref",
        "refs/heads/x",
        "--default-ref",
        "refs/heads/main",
        "--ttl",
        "10m",
    ]);
    let said = claims(&full);
    let text = |claim: &str| {
        said[claim]
            .as_str()
            .map_or_else(|| said[claim].to_string(), str::to_owned)
    };
    assert_eq!(
        (text("repository"), text("repository_id"), text("run_attempt")),
        ("octo/demo".to_owned(), "42".to_owned(), "2".to_owned())
    );
    let scopes: Value = serde_json::from_str(said["ac"].as_str().unwrap()).unwrap();
    assert_eq!(
        scopes,
        json!([{ "Scope": "refs/heads/x", "Permission": 3 }, { "Scope": "refs/heads/main", "Permission": 1 }])
    );
    assert_eq!(list(full.trim(), "7").await, 200);
}

#[test]
fn check_config_hides_secrets() {
    let (directory, mut environment) = embedded();
    let secret = secret_file(directory.path());
    environment.set("WHARFINGER_SECRET_FILE", secret.display());
    environment.set("WHARFINGER_DATABASE__URL", "postgres://w:canary@db.example.com:5432/w");
    environment.set("WHARFINGER_STORAGE__URL", "s3://bucket/prefix");
    environment.set("WHARFINGER_STORAGE__ACCESS_KEY_ID", "id");
    let file = directory.path().join("s3.secret");
    fs::write(&file, "canary\n").unwrap();
    environment.set("WHARFINGER_STORAGE__SECRET_ACCESS_KEY_FILE", file.display());
    environment.set("WHARFINGER_STORAGE__SESSION_TOKEN", "canary");
    let output = environment.run(&["check-config", "--listen", "127.0.0.1:8123"]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let shown: toml::Table = said.parse().unwrap();
    assert_eq!(shown["listen"].as_str(), Some("127.0.0.1:8123"));
    assert_eq!(shown["public_url"].as_str(), Some("http://127.0.0.1:8123"));
    assert_eq!(shown["storage"]["url"].as_str(), Some("s3://bucket/prefix"));
    assert_eq!(shown["storage"]["secret_access_key"].as_str(), Some("***"));
    assert_eq!(
        shown["database"]["url"].as_str(),
        Some("postgres://w:***@db.example.com:5432/w")
    );
    let root_secret = fs::read_to_string(secret).unwrap();
    for secret in ["canary", root_secret.trim()] {
        assert!(
            !said.contains(secret) && !String::from_utf8_lossy(&output.stderr).contains(secret),
            "{said}"
        );
    }
    // Nothing was made or asked.
    assert!(!directory.path().join("data").exists());
}

#[test]
fn unknown_variables_warn() {
    let (_directory, mut environment) = embedded();
    environment.set("WHARFINGER_PORT_8080_TCP", "tcp://10.0.0.1:8080");
    let output = environment.run(&["check-config"]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    let line: Value = serde_json::from_str(said.trim()).unwrap();
    assert_eq!(line["level"], "WARN");
    assert_eq!(
        line["message"],
        "the environment variable WHARFINGER_PORT_8080_TCP is no setting and is ignored"
    );
}

#[test]
fn unknown_flags_refuse() {
    let (_directory, environment) = embedded();
    for arguments in [
        &["serve", "--colour", "red"][..],
        &["--port=1"],
        &["sink"],
        &["token", "mint", "--job", "x"],
    ] {
        let output = environment.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("Usage: wharfinger"),
            "{output:?}"
        );
    }
}

// What refuses to start.

/// The one sentence with which `serve` ends at once.
fn refusal(environment: &Environment) -> String {
    let environment = environment.clone().listening();
    let mut child = environment
        .command(&["serve", "--log-format", "json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("it started, or makes no end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!((status.code(), stdout.len()), (Some(1), 0), "{said}");
    let (log, sentences): (Vec<_>, Vec<_>) = said.lines().partition(|line| line.starts_with('{'));
    for line in log {
        serde_json::from_str::<Value>(line).unwrap();
    }
    let [sentence] = sentences[..] else {
        panic!("one sentence, and not: {said}")
    };
    assert!(!said.contains("canary"), "{said}");
    sentence.strip_prefix("wharfinger: ").unwrap().to_owned()
}

#[track_caller]
fn assert_says(sentence: &str, parts: &[&str]) {
    for part in parts {
        assert!(sentence.contains(part), "{part:?} is not in {sentence:?}");
    }
}

/// Runs once and stops, so that everything knows each other.
fn introduce(environment: &Environment) {
    assert_eq!(Process::start(environment).terminate(), Some(0));
}

#[test]
fn an_unknown_key_refuses() {
    let (directory, mut environment) = embedded();
    let file = directory.path().join("wharfinger.toml");
    fs::write(&file, "[storage]\nbuckte = \"canary\"\n").unwrap();
    environment.set("WHARFINGER_CONFIG", file.display());
    assert_says(
        &refusal(&environment),
        &["unknown key storage.buckte", "wharfinger.toml", "correct or remove"],
    );
}

#[test]
fn a_public_url_that_is_no_origin_refuses() {
    for url in [
        "artifacts.example.com",
        "https://example.com/artifacts",
        "ftp://example.com",
        "https://u:canary@example.com",
    ] {
        let (_directory, mut environment) = embedded();
        environment.set("WHARFINGER_PUBLIC_URL", url);
        assert_says(
            &refusal(&environment),
            &[
                "public_url (WHARFINGER_PUBLIC_URL)",
                "must be an origin such as https://artifacts.example.com",
            ],
        );
    }
}

fn write_secret(directory: &Path, name: &str, secret: &str) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, secret).unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    path
}

#[test]
fn a_short_or_missing_secret_refuses() {
    let (directory, mut environment) = embedded();
    let short = write_secret(directory.path(), "short", "canary-canary-canary-canary-31c\n");
    environment.set("WHARFINGER_SECRET_FILE", short.display());
    assert_says(
        &refusal(&environment),
        &["short", "is shorter than 32 bytes", "openssl rand -hex 32"],
    );
    environment.set("WHARFINGER_SECRET_FILE", "/no/such/file");
    assert_says(&refusal(&environment), &["can't read the secret file /no/such/file"]);
}

#[test]
fn another_root_secret_refuses() {
    let (directory, mut environment) = embedded();
    introduce(&environment);
    let other = write_secret(directory.path(), "other", "other-9fK2mQx7Lw0ZbT5vRc8YhJ3nD6pUe1");
    environment.set("WHARFINGER_SECRET_FILE", other.display());
    assert_says(
        &refusal(&environment),
        &[
            "the root secret is not the one that this database was set up with",
            "restore that secret file",
        ],
    );
}

#[test]
fn an_unreachable_database_refuses() {
    let (directory, mut environment) = embedded();
    let port = free_port();
    environment.set(
        "WHARFINGER_DATABASE__URL",
        format!("postgres://w:canary@127.0.0.1:{port}/w"),
    );
    assert_says(&refusal(&environment), &["secret_file", "openssl rand -hex 32"]);
    environment.set("WHARFINGER_SECRET_FILE", secret_file(directory.path()).display());
    assert_says(
        &refusal(&environment),
        &[
            &format!("cannot connect to the database at 127.0.0.1:{port}"),
            "correct database.url",
        ],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_schema_refuses() {
    let (directory, mut environment) = embedded();
    let database = postgres_database().await;
    environment.set("WHARFINGER_DATABASE__URL", &database);
    environment.set("WHARFINGER_SECRET_FILE", secret_file(directory.path()).display());
    introduce(&environment);
    let pool = PgPool::connect(&database).await.unwrap();
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'of a later release', TRUE, '', 0)",
    )
    .execute(&pool)
    .await
    .unwrap();
    assert_says(
        &refusal(&environment),
        &["schema version 9999", "run the newer release"],
    );
}

/// The embedded database over a bucket.
fn over_bucket(environment: &mut Environment, s3: &S3Server, bucket: &str) {
    environment.set("WHARFINGER_STORAGE__URL", format!("s3://{bucket}"));
    environment.set("WHARFINGER_STORAGE__ENDPOINT", &s3.endpoint);
    environment.set("WHARFINGER_STORAGE__ACCESS_KEY_ID", s3.access_key_id);
    environment.set("WHARFINGER_STORAGE__SECRET_ACCESS_KEY", s3.secret_access_key);
}

#[test]
fn the_wrong_store_refuses() {
    let s3 = S3Server::start();
    let ((_one, mut environment), (_two, mut other)) = (embedded(), embedded());
    over_bucket(&mut environment, &s3, "nobodys");
    assert_says(
        &refusal(&environment),
        &[
            "the bucket `nobodys` does not exist",
            "create it, or correct storage.url",
        ],
    );

    over_bucket(&mut environment, &s3, &format!("{}/one", s3.bucket));
    introduce(&environment);
    introduce(&environment);
    over_bucket(&mut environment, &s3, &format!("{}/two", s3.bucket));
    assert_says(
        &refusal(&environment),
        &[
            "the store is not the one that this database was set up with",
            "correct storage.url",
        ],
    );
    over_bucket(&mut other, &s3, &format!("{}/one", s3.bucket));
    assert_says(
        &refusal(&other),
        &["the store belongs to another database", "use an empty bucket or prefix"],
    );

    let port = free_port();
    environment.set("WHARFINGER_STORAGE__ENDPOINT", format!("http://127.0.0.1:{port}"));
    assert_says(&refusal(&environment), &["can't be reached", "check storage.endpoint"]);
}

#[test]
fn an_unmounted_volume_refuses() {
    let (directory, environment) = embedded();
    introduce(&environment);
    let objects = directory.path().join("data/objects");
    fs::rename(&objects, directory.path().join("elsewhere")).unwrap();
    assert_says(
        &refusal(&environment),
        &["the store is not the one", "mount the volume that is missing"],
    );
}

// What never gets into a log.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_gets_into_the_log() {
    let (embedded_directory, embedded) = embedded();
    let directory = tempfile::tempdir().unwrap();
    let (s3, secret) = (S3Server::start(), secret_file(directory.path()));
    let production = Environment::production(&directory.path().join("data"), &postgres_database().await, &s3, &secret);
    for (mut environment, secret) in [
        (embedded, embedded_directory.path().join("data/root.secret")),
        (production, secret),
    ] {
        environment.set("WHARFINGER_LOG__LEVEL", "trace");
        let server = Process::start(&environment);
        let job = server.job();
        let mut secrets = vec![
            fs::read_to_string(secret).unwrap().trim().to_owned(),
            s3.secret_access_key.to_owned(),
            job.token.rsplit('.').next().unwrap().to_owned(),
        ];
        secrets.extend(transfer(&job).await.iter().map(|link| signature(link)));
        let log = std::sync::Arc::clone(&server.log);
        assert_eq!(server.terminate(), Some(0));
        // The last lines may still be on their way to us.
        let begun = Instant::now();
        while !log.lock().unwrap().iter().any(|line| line.contains("\"stopped\"")) {
            assert!(begun.elapsed() < Duration::from_secs(10), "the end is missing");
            tokio::task::yield_now().await;
        }
        let log = log.lock().unwrap();
        let lines: Vec<Value> = log
            .iter()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
            .collect();
        let requests = lines
            .iter()
            .filter(|line| line["message"] == "request" && line["status"].is_u64());
        assert!(requests.count() >= 8, "every request has its line");
        assert!(
            lines
                .iter()
                .any(|line| line["level"] == "TRACE" || line["level"] == "DEBUG"),
            "it is talkative"
        );
        for line in log.iter() {
            for secret in &secrets {
                assert!(!line.contains(secret.as_str()), "{secret} is in {line}");
            }
            assert!(!line.contains("sig=") && !line.contains("Bearer "), "{line}");
        }
    }
}

/// An upload in two blocks, a download, and some that fail. Returns every link.
async fn transfer(job: &RemoteJob) -> Vec<String> {
    let upload = job.create("a").await;
    for id in ["AAAA", "BBBB"] {
        assert_eq!(job.put(&block_link(&upload, id), 5, "bytes").await.unwrap(), 201);
    }
    let list = block_list(&["AAAA", "BBBB"]);
    let commit = format!("{upload}&comp=blocklist");
    assert_eq!(job.put(&commit, list.len(), list).await.unwrap(), 201);
    job.finalize("a", 10).await;
    let link = job.link("a").await;
    assert_eq!(job.download("a").await, b"bytesbytes");
    assert_eq!(job.put(&link, 5, "bytes").await.unwrap(), 403, "a link to read");
    assert_eq!(job.put(&block_link(&upload, "CCCC"), 5, "bytes").await.unwrap(), 409);
    let forged = RemoteJob {
        token: format!("{}x", job.token),
        ..job.clone()
    };
    assert_eq!(forged.call("ListArtifacts", json!({})).await.0, 401);
    vec![upload, link]
}

fn signature(link: &str) -> String {
    let query = link.split_once('?').unwrap().1;
    let signature = query.split('&').find_map(|pair| pair.strip_prefix("sig=")).unwrap();
    assert!(signature.len() > 20, "{link}");
    signature.to_owned()
}
