//! `opendal`'s cache client, which sccache uses too, against whole servers: the cache's version 2 in protobuf, and
//! version 1.
//!
//! It finds the server by its process's environment, as in a job. So each test starts a server and runs itself once more,
//! in a process that has a job's environment: there it is the client.

use std::process::Command;

use opendal::services::Ghac;
use opendal::{ErrorKind, Operator};

use super::common::process::{PATIENCE, ToItsEnd};
use super::common::{Backend, TestServer};

/// Set in the process that is the job.
const IN_A_JOB: &str = "WHARFINGER_TEST_IN_A_JOB";
const MIB: usize = 1024 * 1024;

async fn run(test: &str, backend: Backend, service_v2: &str) {
    if std::env::var_os(IN_A_JOB).is_some() {
        return use_the_cache().await;
    }
    let server = TestServer::start(backend).await;
    let mut job = Command::new(std::env::current_exe().unwrap());
    job.args(["--exact", &format!("ghac::{test}")])
        .env(IN_A_JOB, "1")
        .env("ACTIONS_CACHE_SERVICE_V2", service_v2)
        .env("ACTIONS_CACHE_URL", format!("{}/", server.url))
        .env("ACTIONS_RESULTS_URL", format!("{}/", server.url))
        .env("ACTIONS_RUNTIME_TOKEN", server.token("octo/demo", "1", "build"))
        .env("GITHUB_SERVER_URL", "https://github.com");
    let output = tokio::task::spawn_blocking(move || job.to_its_end(PATIENCE))
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    server.stop().await;
}

async fn use_the_cache() {
    opendal::install_default();
    let cache = Operator::new(Ghac::default()).unwrap();
    let kind = |error: opendal::Error| error.kind();

    for nothing in ["nothing", "nothing/at all"] {
        assert_eq!(
            cache.stat(nothing).await.map_err(kind).unwrap_err(),
            ErrorKind::NotFound
        );
        assert_eq!(
            cache.read(nothing).await.map_err(kind).unwrap_err(),
            ErrorKind::NotFound
        );
    }

    let large: Vec<u8> = (0..5 * MIB + 1).map(|at| (at % 251) as u8).collect();
    for (path, content) in [
        ("greeting.txt", &b"Ahoy!"[..]),
        ("a folder/50%_+ \u{6e2f}", b"odd characters"),
        ("large", &large),
    ] {
        let mut writer = cache.writer_with(path).chunk(MIB).await.unwrap();
        writer.write(content.to_vec()).await.unwrap();
        writer.close().await.unwrap();
        let size = content.len() as u64;
        assert_eq!(cache.stat(path).await.unwrap().content_length(), size, "{path}");
        assert!(cache.read(path).await.unwrap().to_vec() == content, "{path}");
        for range in [0..1, 1..size, size / 2..size / 2 + 2] {
            let expected = &content[range.start as usize..range.end as usize];
            let read = cache.read_with(path).range(range.clone()).await.unwrap();
            assert!(read.to_vec() == expected, "{path} {range:?}");
        }
    }

    let second = cache.write("greeting.txt", "Hello!").await;
    assert_eq!(second.map_err(kind).unwrap_err(), ErrorKind::AlreadyExists);
    assert_eq!(cache.read("greeting.txt").await.unwrap().to_vec(), b"Ahoy!");
}

#[tokio::test(flavor = "multi_thread")]
async fn v2_on_sqlite_and_disk() {
    run("v2_on_sqlite_and_disk", Backend::SqliteDisk, "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v2_on_postgres_and_s3() {
    run("v2_on_postgres_and_s3", Backend::PostgresS3, "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_on_sqlite_and_disk() {
    run("v1_on_sqlite_and_disk", Backend::SqliteDisk, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_on_postgres_and_s3() {
    run("v1_on_postgres_and_s3", Backend::PostgresS3, "").await;
}
