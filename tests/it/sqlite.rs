//! What only SQLite's connections do: wait for other processes without holding up this one, and keep the log short.

use std::path::Path;

use secrecy::SecretString;
use sqlx::{Connection, Executor, SqliteConnection};
use wharfinger::db::{Db, Lane, Settings};
use wharfinger::error::Error;
use wharfinger::model::{BlobId, Block, ObjectKey};

const NOW: i64 = 1_700_000_000_000;

async fn database(directory: &Path) -> Db {
    let settings = Settings {
        url: SecretString::from(""),
        max_connections: 1,
    };
    let db = Db::connect(&settings, directory, None, true).await.unwrap();
    db.migrate().await.unwrap();
    db
}

async fn other_process(directory: &Path) -> SqliteConnection {
    let file = directory.join("wharfinger.db");
    SqliteConnection::connect(&format!("sqlite://{}", file.display()))
        .await
        .unwrap()
}

// On one thread: if the writer slept on it, nobody would ever end what it waits for.
#[tokio::test]
async fn a_writer_that_waits_for_another_process_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let mut other = other_process(directory.path()).await;
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    other
        .execute("INSERT INTO properties (name, value) VALUES ('first', 'theirs')")
        .await
        .unwrap();
    let writer = tokio::spawn({
        let db = db.clone();
        async move { db.set_property_once("first", "ours").await }
    });
    tokio::task::yield_now().await;
    assert_eq!(db.property("first").await.unwrap(), None);
    assert!(!writer.is_finished());
    other.execute("COMMIT").await.unwrap();
    assert_eq!(writer.await.unwrap().unwrap(), "theirs");
}

#[tokio::test]
async fn what_was_not_committed_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let Db::Sqlite(sqlite) = &db else {
        panic!("not SQLite");
    };
    for lane in [Lane::Durable, Lane::Staging] {
        let lent = sqlite.lend(lane).await.unwrap();
        let write = "INSERT INTO properties (name, value) VALUES ('half', 'done')";
        assert_eq!(lent.connection().unwrap().execute(write, []).unwrap(), 1);
        drop(lent);
        assert_eq!(db.property("half").await.unwrap(), None, "{lane:?}");
        assert_eq!(db.set_property_once("whole", "done").await.unwrap(), "done", "{lane:?}");
    }
    db.close().await;
    assert!(matches!(db.property("whole").await, Err(Error::Busy(_))));
}

#[tokio::test]
async fn the_log_is_copied_and_begins_anew() {
    const BLOCKS: usize = 100_000;
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let mut other = other_process(directory.path()).await;
    let blob = BlobId::fresh();
    db.begin_zip(blob, NOW).await.unwrap();
    let mut longest = 0;
    for number in 0..BLOCKS {
        let block = Block {
            object_key: ObjectKey::fresh(blob),
            object_offset: 0,
            size_bytes: 1,
            crc64: 0,
        };
        assert!(db.stage_block(blob, &number.to_string(), &block, NOW).await.unwrap());
        let (_, pages, _): (i64, i64, i64) = sqlx::query_as("PRAGMA wal_checkpoint(NOOP)")
            .fetch_one(&mut other)
            .await
            .unwrap();
        if pages < longest {
            return;
        }
        longest = pages;
    }
    panic!("the log has {longest} pages and never began anew");
}
