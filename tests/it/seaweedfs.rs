//! Somebody else's S3 server looked at by somebody else's S3 client: only with `tests/with-seaweedfs.sh`.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use wharfinger::db::Db;

use crate::common::process::{PATIENCE, ToItsEnd};
use crate::common::s3::S3Server;
use crate::common::{Backend, TestServer, block_link, block_list};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Everything in the store, as rclone sees it.
fn seen(s3: &S3Server) -> BTreeSet<String> {
    let output = Command::new("rclone")
        .args(["lsf", "-R", "--files-only", &format!("outside:{}/test", s3.bucket)])
        .env("RCLONE_CONFIG", "/dev/null")
        .env("RCLONE_CONFIG_OUTSIDE_TYPE", "s3")
        .env("RCLONE_CONFIG_OUTSIDE_PROVIDER", "Other")
        .env("RCLONE_CONFIG_OUTSIDE_ENDPOINT", &s3.endpoint)
        .env("RCLONE_CONFIG_OUTSIDE_ACCESS_KEY_ID", s3.access_key_id)
        .env("RCLONE_CONFIG_OUTSIDE_SECRET_ACCESS_KEY", s3.secret_access_key)
        // Authorities for others: it would not start.
        .env_remove("AWS_CA_BUNDLE")
        .to_its_end(PATIENCE);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// Every object that a row names, and the store's marker.
async fn known(server: &TestServer) -> BTreeSet<String> {
    let Db::Postgres(pool) = &server.app.services.db else {
        panic!("the backend has Postgres");
    };
    let mut known: BTreeSet<String> =
        sqlx::query_scalar("SELECT object_key FROM blocks UNION SELECT object_key FROM garbage")
            .fetch_all(pool)
            .await
            .unwrap()
            .into_iter()
            .collect();
    known.insert("wharfinger-store".to_owned());
    known
}

#[tokio::test(flavor = "multi_thread")]
async fn rclone_sees_what_the_database_knows_and_nothing_else() {
    if S3Server::outside().is_none() {
        println!("NOT RUN: needs tests/with-seaweedfs.sh");
        return;
    }
    let server = TestServer::start(Backend::PostgresS3).await;
    let s3 = server.s3.as_ref().unwrap();
    let job = server.job();
    job.upload("kept", &[1; 12_000_000]).await;
    job.upload("deleted", b"deleted").await;
    job.call("DeleteArtifact", serde_json::json!({ "name": "deleted" }))
        .await;
    let link = job.create("pending").await;
    for bytes in [b"replaced", b"replaces"] {
        assert_eq!(job.put(&block_link(&link, "QQ=="), bytes.to_vec()).await.0, 201);
    }
    assert_eq!(job.put(&block_link(&link, "Qg=="), b"left out".to_vec()).await.0, 201);
    assert_eq!(
        job.put(&format!("{link}&comp=blocklist"), block_list(&["QQ=="]))
            .await
            .0,
        201
    );
    // The marker, two whole blobs, and three blocks.
    assert_eq!(seen(s3).len(), 6);
    assert_eq!(seen(s3), known(&server).await);

    for (days, left) in [(1, 2), (100, 1)] {
        server.advance(days * DAY);
        assert!(server.app.services.clean().await.unwrap().is_some());
        server.advance(DAY);
        assert!(server.app.services.clean().await.unwrap().is_some());
        assert_eq!(seen(s3), known(&server).await);
        assert_eq!(seen(s3).len(), left);
    }
    server.stop().await;
}
