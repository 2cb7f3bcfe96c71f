//! What only SQLite's connections do: wait for other processes without holding up this one, share a COMMIT, and keep the
//! log short.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::join_all;
use futures_util::poll;
use secrecy::SecretString;
use sqlx::{Connection, Executor, SqliteConnection};
use uuid::Uuid;
use wharfinger::db::{Created, Db, Lane, Lent, NewArtifact, Settings, Sqlite};
use wharfinger::error::Error;
use wharfinger::model::{BlobId, Block, ObjectKey, Principal, RunKey};

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
async fn who_goes_away_while_it_waits_for_another_process_leaves_no_transaction() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let mut other = other_process(directory.path()).await;
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    {
        let mut waits = pin!(sqlite(&db).lend(Lane::Durable));
        assert!(poll!(&mut waits).is_pending());
    }
    other.execute("COMMIT").await.unwrap();
    for lane in [Lane::Staging, Lane::Durable] {
        write(&db, lane).await;
    }
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

// Writers that wait for each other. On one thread, so that all of them wait before the first goes on.

const WRITERS: usize = 20;

fn sqlite(db: &Db) -> &Sqlite {
    match db {
        Db::Sqlite(sqlite) => sqlite,
        Db::Postgres(_) => panic!("not SQLite"),
    }
}

/// Counts the writer's COMMITs; each fails as long as `fails`.
fn count_commits(lent: &Lent, fails: bool) -> Arc<AtomicU64> {
    let commits = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&commits);
    let hook = move || {
        count.fetch_add(1, Ordering::Relaxed);
        fails
    };
    lent.connection().unwrap().commit_hook(Some(hook)).unwrap();
    commits
}

fn insert(lent: &Lent, name: &str) {
    let write = "INSERT INTO properties (name, value) VALUES (?1, 'there')";
    assert_eq!(lent.connection().unwrap().execute(write, [name]).unwrap(), 1);
}

async fn write(db: &Db, lane: Lane) {
    match lane {
        Lane::Staging => drop(db.take_lease("lease", Uuid::new_v4(), NOW, NOW).await.unwrap()),
        Lane::Durable => drop(db.set_property_once("property", "there").await.unwrap()),
        Lane::Reading => panic!("writes nothing"),
    }
}

#[tokio::test]
async fn writers_that_wait_share_a_commit() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let first = sqlite(&db).lend(Lane::Durable).await.unwrap();
    let commits = count_commits(&first, false);
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| {
            let db = db.clone();
            tokio::spawn(async move {
                let name = format!("property-{number}");
                if number % 3 == 1 {
                    // What is dropped is rolled back, and only that.
                    let lent = sqlite(&db).lend(Lane::Durable).await.unwrap();
                    insert(&lent, &name);
                } else {
                    db.set_property_once(&name, "there").await.unwrap();
                    assert_eq!(db.property(&name).await.unwrap().as_deref(), Some("there"));
                }
            })
        })
        .collect();
    tokio::task::yield_now().await;
    drop(first);
    for writer in join_all(writers).await {
        writer.unwrap();
    }
    assert_eq!(commits.load(Ordering::Relaxed), 1);
    for number in 0..WRITERS {
        let there = db.property(&format!("property-{number}")).await.unwrap();
        assert_eq!(there.is_some(), number % 3 != 1, "{number}");
    }
}

#[tokio::test]
async fn a_shared_commit_that_fails_is_nobodys() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let first = sqlite(&db).lend(Lane::Durable).await.unwrap();
    count_commits(&first, true);
    let names: Vec<_> = (0..WRITERS).map(|number| number.to_string()).collect();
    let writers = join_all(names.iter().map(|name| db.set_property_once(name, "there")));
    let outcomes = tokio::join!(writers, async { drop(first) }).0;
    assert!(outcomes.iter().all(Result::is_err));
    for name in &names {
        assert_eq!(db.property(name).await.unwrap(), None);
    }
    count_commits(&sqlite(&db).lend(Lane::Durable).await.unwrap(), false);
    assert_eq!(db.set_property_once("next", "there").await.unwrap(), "there");
}

/// Creates two artifacts of a job that may have one, side by side.
async fn create_one_too_many(db: &Db, held: Lent) -> [Result<Created, Error>; 2] {
    let principal = Principal {
        run: RunKey {
            issuer: "wharfinger".to_owned(),
            repository: "octo/demo".to_owned(),
            run_backend_id: "1".to_owned(),
        },
        repository_name: None,
        run_id: None,
        run_attempt: 1,
        job_backend_id: "build".to_owned(),
        cache_scopes: Vec::new(),
        issued_at_ms: None,
        expires_at_ms: NOW + 1,
    };
    let new = |name| NewArtifact {
        principal: &principal,
        name,
        version: 4,
        mime_type: None,
        created_at_ms: NOW,
        expires_at_ms: NOW + 1,
        max_per_job: Some(1),
        max_pending_per_run: None,
    };
    let (first, second) = (new("first"), new("second"));
    let (first, second, ()) = tokio::join!(db.create_artifact(&first), db.create_artifact(&second), async {
        drop(held);
    });
    [first, second]
}

// What is refused because of what others wrote is refused only if that is kept.
#[tokio::test]
async fn nobody_is_refused_for_what_is_not_committed() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let held = sqlite(&db).lend(Lane::Durable).await.unwrap();
    count_commits(&held, true);
    let [first, second] = create_one_too_many(&db, held).await;
    assert!(matches!(first, Err(Error::Busy(_))), "{first:?}");
    assert!(matches!(second, Err(Error::Internal(_))), "{second:?}");
    let held = sqlite(&db).lend(Lane::Durable).await.unwrap();
    let commits = count_commits(&held, false);
    let [first, second] = create_one_too_many(&db, held).await;
    assert!(matches!(first, Ok(Created::Upload(_))), "{first:?}");
    assert!(matches!(second, Ok(Created::TooMany)), "{second:?}");
    assert_eq!(commits.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn closing_commits_what_is_left_to_it() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let held = sqlite(&db).lend(Lane::Durable).await.unwrap();
    let (_, (), late, ()) = tokio::join!(
        db.set_property_once("last", "there"),
        db.close(),
        db.set_property_once("late", "there"),
        async { drop(held) },
    );
    assert!(matches!(late, Err(Error::Busy(_))));
    let again = database(directory.path()).await;
    assert_eq!(again.property("last").await.unwrap().as_deref(), Some("there"));
}

// SQLite itself then rolls back what all of them did.
#[tokio::test]
async fn who_fills_the_database_takes_the_others_along() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let first = sqlite(&db).lend(Lane::Durable).await.unwrap();
    let connection = first.connection().unwrap();
    let pages: i64 = connection.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    let limit = format!("PRAGMA max_page_count = {}", pages + 2);
    connection.query_row(&limit, [], |_| Ok(())).unwrap();
    let huge = "x".repeat(1 << 20);
    let writers = join_all(
        [("before", "there"), ("huge", &huge), ("after", "there")].map(|(name, value)| {
            let db = db.clone();
            async move { db.set_property_once(name, value).await.is_ok() }
        }),
    );
    let done = tokio::join!(writers, async { drop(first) }).0;
    assert_eq!(done, [false, false, true]);
    assert_eq!(db.property("before").await.unwrap(), None);
    assert_eq!(db.property("after").await.unwrap().as_deref(), Some("there"));
}

// Otherwise the first would wait for a COMMIT that nobody is left to do.
#[tokio::test]
async fn a_writer_that_goes_away_before_its_turn_leaves_nobody_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    let lent = sqlite(&db).lend(Lane::Durable).await.unwrap();
    let first = tokio::spawn({
        let db = db.clone();
        async move { db.set_property_once("first", "there").await }
    });
    tokio::task::yield_now().await;
    {
        let mut second = pin!(sqlite(&db).lend(Lane::Durable));
        assert!(poll!(&mut second).is_pending());
        drop(lent);
        tokio::task::yield_now().await;
        assert_eq!(db.property("first").await.unwrap(), None);
        assert!(!first.is_finished());
    }
    assert_eq!(first.await.unwrap().unwrap(), "there");
}

#[tokio::test]
async fn what_is_to_survive_a_power_cut_joins_no_commit_that_is_not_synced() {
    let directory = tempfile::tempdir().unwrap();
    let db = database(directory.path()).await;
    for (lanes, commits_needed) in [
        ([Lane::Staging, Lane::Durable], 2),
        ([Lane::Durable, Lane::Staging], 1),
        ([Lane::Staging, Lane::Staging], 1),
    ] {
        let first = sqlite(&db).lend(Lane::Staging).await.unwrap();
        let commits = count_commits(&first, false);
        let writers = join_all(lanes.map(|lane| write(&db, lane)));
        tokio::join!(writers, async { drop(first) });
        assert_eq!(commits.load(Ordering::Relaxed), commits_needed, "{lanes:?}");
    }
}
