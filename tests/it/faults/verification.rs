//! A download of what nobody has compared with its hash yet: its end is held back until that is done, whoever dies
//! meanwhile.
//!
//! The claim of another replica keeps the verifier away, and a lock on the blob's row lets the download come as far as
//! its verdict and no further.

use serde_json::json;
use sha2::{Digest, Sha256};
use sqlx::{Connection, Executor, PgConnection};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::process::{Environment, Process, RemoteJob, secret_file};
use crate::common::s3::S3Server;
use crate::common::{blob_of, polled, postgres_database};

use super::content;

const SIZE: usize = 12 << 20;
const HELD_BACK: usize = 64 << 10;

struct Scene {
    server: Process,
    job: RemoteJob,
    database: String,
    blob: Uuid,
    environment: Environment,
    _s3: S3Server,
    _directory: TempDir,
}

impl Scene {
    /// An artifact that is to be compared with this hash.
    async fn set(bytes: &[u8], hash: &[u8]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let s3 = S3Server::inside();
        let database = postgres_database().await;
        let secret_file = secret_file(directory.path());
        let environment = Environment::production(&directory.path().join("data"), &database, &s3, &secret_file);
        let environment = environment.listening();
        let server = Process::start(&environment);
        let job = server.job();
        let link = job.create("large").await;
        assert_eq!(job.put(&link, bytes.len(), bytes.to_vec()).await.unwrap(), 201);
        job.finalize("large", bytes.len()).await;
        let blob = blob_of(&link).0;
        let mut behind = PgConnection::connect(&database).await.unwrap();
        let claimed = sqlx::query(
            "UPDATE blobs SET verification = 'pending', sha256 = $2, verify_lease_until_ms = $3 WHERE id = $1",
        );
        let claimed = claimed.bind(blob).bind(hash).bind(i64::MAX).execute(&mut behind).await;
        assert_eq!(claimed.unwrap().rows_affected(), 1);
        Self {
            server,
            job,
            database,
            blob,
            environment,
            _s3: s3,
            _directory: directory,
        }
    }

    /// Holds the row that the verdict is written to.
    async fn hold(&self) -> PgConnection {
        let mut holder = PgConnection::connect(&self.database).await.unwrap();
        holder.execute("BEGIN").await.unwrap();
        let locked = sqlx::query("SELECT id FROM blobs WHERE id = $1 FOR UPDATE").bind(self.blob);
        locked.fetch_one(&mut holder).await.unwrap();
        holder
    }

    /// Downloads until nothing more comes because the verdict waits for the row.
    async fn download_to_the_verdict(&self) -> (reqwest::Response, Vec<u8>) {
        let mut reply = self.job.http.get(self.job.link("large").await).send().await.unwrap();
        assert_eq!(
            (reply.status().as_u16(), reply.content_length()),
            (200, Some(SIZE as u64))
        );
        let mut received = Vec::new();
        while received.len() < SIZE - HELD_BACK {
            received.extend(reply.chunk().await.unwrap().unwrap());
        }
        assert_eq!(received.len(), SIZE - HELD_BACK);
        let mut behind = PgConnection::connect(&self.database).await.unwrap();
        let begun = std::time::Instant::now();
        loop {
            let waiting = "SELECT count(*) FROM pg_stat_activity
                WHERE wait_event_type = 'Lock' AND datname = current_database()";
            if sqlx::query_scalar::<_, i64>(waiting)
                .fetch_one(&mut behind)
                .await
                .unwrap()
                > 0
            {
                break;
            }
            assert!(begun.elapsed() < super::PATIENCE, "the verdict is never to be written");
        }
        let mut next = Box::pin(reply.chunk());
        assert!(
            polled(&mut next, 0).await.is_none(),
            "something was sent before the verdict"
        );
        drop(next);
        (reply, received)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_download_waits_for_the_verdict() {
    let bytes = content(1, SIZE);
    let scene = Scene::set(&bytes, &Sha256::digest(&bytes)).await;
    let mut holder = scene.hold().await;
    let (mut reply, mut received) = scene.download_to_the_verdict().await;
    holder.execute("COMMIT").await.unwrap();
    while let Some(chunk) = reply.chunk().await.unwrap() {
        received.extend(chunk);
    }
    assert!(received == bytes);
    assert_eq!(scene.server.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_whose_server_dies_before_the_verdict_is_not_whole() {
    let bytes = content(2, SIZE);
    let scene = Scene::set(&bytes, &Sha256::digest(&bytes)).await;
    let mut holder = scene.hold().await;
    let (mut reply, _) = scene.download_to_the_verdict().await;
    scene.server.kill();
    assert!(reply.chunk().await.is_err(), "half of a reply looks whole");
    holder.execute("COMMIT").await.unwrap();
    let server = Process::start(&scene.environment);
    assert!(scene.job.download("large").await == bytes);
    assert_eq!(server.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_with_the_wrong_hash_is_cut_at_the_verdict() {
    let bytes = content(3, SIZE);
    let scene = Scene::set(&bytes, &Sha256::digest(b"something else")).await;
    let link = scene.job.link("large").await;
    let mut holder = scene.hold().await;
    let (mut reply, _) = scene.download_to_the_verdict().await;
    holder.execute("COMMIT").await.unwrap();
    assert!(reply.chunk().await.is_err(), "its end came, although the hash is wrong");
    assert_eq!(scene.job.http.get(link).send().await.unwrap().status(), 404);
    let (status, reply) = scene.job.call("GetSignedArtifactURL", json!({ "name": "large" })).await;
    assert_eq!(status, 404, "{reply}");
    assert_eq!(scene.job.names().await, [""; 0]);
    assert_eq!(scene.server.terminate(), Some(0));
}
