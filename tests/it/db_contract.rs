//! What every method of `Db` must keep, the same text for SQLite and for Postgres; then that the two have one schema
//! and that several processes may bring it up to date at once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use secrecy::{ExposeSecret, SecretString};
use sqlx::{AssertSqlSafe, PgPool, SqlitePool};
use tempfile::TempDir;
use uuid::Uuid;
use wharfinger::clock::Clock;
use wharfinger::db::{
    Committed, Created, Db, FinalizeCandidate, ListEntry, ListSource, NewArtifact, NewCacheEntry, NewestArtifact,
    Reservation, Reserved, Sealing, Settings, Verification, WantedKeys, WritableBlob,
};
use wharfinger::error::{Error, Result};
use wharfinger::model::{
    ArtifactId, BlobId, BlobKind, BlobState, Block, CacheEntryId, ObjectKey, Principal, RunKey, Sha256,
};

use crate::common::process::Environment;
use crate::common::{TestServer, postgres_database};

/// The time at which everything begins.
const NOW: i64 = 1_700_000_000_000;
/// How long the artifacts of these tests live.
const LIFE: i64 = 1_000;

/// A fresh database of one kind, with its schema.
struct Place {
    db: Db,
    /// A connection of the test's own, for what the product never asks.
    raw: Raw,
    _directory: TempDir,
}

pub enum Raw {
    Postgres(PgPool),
    Sqlite(SqlitePool),
}

impl Place {
    async fn sqlite() -> Self {
        Self::migrated(String::new()).await
    }

    async fn postgres() -> Self {
        Self::migrated(postgres_database().await).await
    }

    async fn migrated(url: String) -> Self {
        let place = Self::empty(url).await;
        place.db.migrate().await.unwrap();
        place
    }

    async fn empty(url: String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let db = connect(&url, &directory).await;
        let raw = Raw::connect(&url, directory.path()).await;
        Self {
            db,
            raw,
            _directory: directory,
        }
    }
}

async fn connect(url: &str, directory: &TempDir) -> Db {
    let settings = Settings {
        url: SecretString::from(url),
        max_connections: 20,
    };
    Db::connect(&settings, directory.path(), None, true).await.unwrap()
}

impl Raw {
    /// To Postgres, or to the SQLite of a directory if the URL is empty.
    pub async fn connect(url: &str, directory: &Path) -> Self {
        if url.is_empty() {
            let file = directory.join("wharfinger.db");
            let url = format!("sqlite://{}", file.display());
            Self::Sqlite(SqlitePool::connect(&url).await.unwrap())
        } else {
            Self::Postgres(PgPool::connect(url).await.unwrap())
        }
    }

    /// To the database of a server.
    pub async fn of(server: &TestServer) -> Self {
        Self::connect(server.config.database.url.expose_secret(), &server.config.data_dir).await
    }

    pub async fn execute(&self, sql: &str) {
        match self {
            Raw::Postgres(pool) => drop(sqlx::query(AssertSqlSafe(sql)).execute(pool).await.unwrap()),
            Raw::Sqlite(pool) => drop(sqlx::query(AssertSqlSafe(sql)).execute(pool).await.unwrap()),
        }
    }

    pub async fn number(&self, sql: &str) -> i64 {
        match self {
            Raw::Postgres(pool) => sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(pool).await.unwrap(),
            Raw::Sqlite(pool) => sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(pool).await.unwrap(),
        }
    }

    /// Bytes or a UUID as SQL writes it here.
    pub fn literal(&self, bytes: &[u8]) -> String {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Raw::Postgres(_) if bytes.len() == 16 => format!("CAST('{hex}' AS UUID)"),
            Raw::Postgres(_) => format!("decode('{hex}', 'hex')"),
            Raw::Sqlite(_) => format!("X'{hex}'"),
        }
    }

    /// A block's row put in behind the product's back, as by a request that lost a race.
    async fn insert_block(&self, blob: BlobId, block_id: &str, block: &Block) {
        self.execute(&format!(
            "INSERT INTO blocks (blob_id, block_id, object_key, object_offset, size_bytes, crc64)
             VALUES ({}, '{block_id}', '{}', 0, {}, 0)",
            self.literal(blob.0.as_bytes()),
            block.object_key,
            block.size_bytes
        ))
        .await;
    }
}

/// Each of these tests runs on both databases.
macro_rules! on_both {
    ($($test:ident,)*) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test(super::Place::sqlite().await).await;
            })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test(super::Place::postgres().await).await;
            })*
        }
    };
}

on_both! {
    properties_are_set_once,
    leases_exclude_each_other,
    the_database_answers_until_it_is_closed,
    creating_takes_free_names,
    creating_over_a_pending_name_supersedes_it,
    creating_over_an_expired_name_frees_it,
    a_job_has_its_limit,
    a_run_has_its_limit_of_pending_ones,
    of_many_creates_the_newest_wins,
    staging_a_block_again_makes_garbage,
    no_list_reads_more_blocks_than_a_blob_may_have,
    many_blocks_become_content_in_their_order,
    closed_blobs_take_no_blocks,
    of_many_resends_one_stays,
    a_list_orders_blocks,
    a_list_names_where_it_looks,
    a_list_of_blocks_that_changed_is_refused,
    another_list_replaces_the_first,
    a_list_may_be_long,
    a_list_after_the_end,
    resends_never_tear_a_list,
    a_whole_blob_replaces_everything,
    finalizing_seals_what_was_looked_at,
    windows_of_content,
    lists_and_attempts,
    runs_never_meet,
    deleting_ends_an_artifact,
    everything_expires_at_its_millisecond,
    verification_is_claimed_and_passes,
    verification_fails_once,
    one_claim_at_a_time,
    the_cleaner_expires_and_abandons,
    the_cleaner_empties_and_drops,
    the_cleaner_sweeps_sealed_blobs,
    a_late_block_does_not_stop_the_cleaner,
    garbage_is_forgotten_when_it_is_gone,
    the_scrub_reads_what_was_unread_for_longest,
    large_ids_fit,
    a_cache_key_is_taken_until_it_is_free,
    of_many_reservations_one_wins,
    a_cache_entry_is_found_once_it_is_final,
    what_changed_is_not_evicted,
    caches_are_counted,
    a_newer_schema_is_refused,
}

// What the tests are made of.

fn principal(repository: &str, run: &str, job: &str, attempt: i32) -> Principal {
    Principal {
        run: RunKey {
            issuer: "wharfinger".to_owned(),
            repository: repository.to_owned(),
            run_backend_id: run.to_owned(),
        },
        repository_name: Some("Octo/Demo".to_owned()),
        run_id: Some(1),
        run_attempt: attempt,
        job_backend_id: job.to_owned(),
        cache_scopes: Vec::new(),
        issued_at_ms: None,
        expires_at_ms: NOW + 1_000_000,
    }
}

/// Job `build` in an attempt of run `1` of `octo/demo`.
fn attempt(attempt: i32) -> Principal {
    principal("name:octo/demo", "1", "build", attempt)
}

fn new<'a>(principal: &'a Principal, name: &'a str, now_ms: i64) -> NewArtifact<'a> {
    NewArtifact {
        principal,
        name,
        version: 4,
        mime_type: Some("application/zip"),
        created_at_ms: now_ms,
        expires_at_ms: now_ms + LIFE,
        max_per_job: None,
        max_pending_per_run: None,
    }
}

/// A block that nobody has. Its checksum does not fit into a signed number.
fn block(blob: BlobId, size_bytes: u64) -> Block {
    Block {
        object_key: ObjectKey::fresh(blob),
        object_offset: 0,
        size_bytes,
        crc64: u64::MAX - size_bytes,
    }
}

fn latest(ids: &[&str]) -> Vec<ListEntry> {
    let entry = |id: &&str| ListEntry {
        block_id: (*id).to_owned(),
        from: ListSource::Latest,
    };
    ids.iter().map(entry).collect()
}

const HASH: Sha256 = Sha256([0xfe; 32]);

/// What requests do, in few words.
impl Place {
    async fn begin(&self, principal: &Principal, name: &str, now_ms: i64) -> BlobId {
        match self.db.create_artifact(&new(principal, name, now_ms)).await.unwrap() {
            Created::Upload(blob) => blob,
            refused => panic!("{refused:?}"),
        }
    }

    /// An upload of `a`.
    async fn open_blob(&self) -> BlobId {
        self.begin(&attempt(1), "a", NOW).await
    }

    async fn stage(&self, blob: BlobId, id: &str, size_bytes: u64) -> Block {
        let block = block(blob, size_bytes);
        assert!(self.db.stage_block(blob, id, &block, NOW).await.unwrap());
        block
    }

    async fn commit(&self, blob: BlobId, list: &[ListEntry]) -> Result<Committed> {
        let durable = self.db.listed_blocks(blob, list).await?;
        self.db.commit_block_list(blob, list, &durable, Some("zip"), NOW).await
    }

    async fn candidate(&self, principal: &Principal, name: &str) -> FinalizeCandidate {
        self.db.finalize_candidate(principal, name, NOW).await.unwrap().unwrap()
    }

    async fn seal(&self, principal: &Principal, name: &str, sealing: Sealing, now_ms: i64) -> ArtifactId {
        let candidate = self
            .db
            .finalize_candidate(principal, name, now_ms)
            .await
            .unwrap()
            .unwrap();
        assert!(self.db.finalize_artifact(&candidate, sealing, now_ms).await.unwrap());
        candidate.id
    }

    /// A finalized artifact of one object.
    async fn upload(&self, principal: &Principal, name: &str, now_ms: i64) -> (ArtifactId, BlobId, Block) {
        let blob = self.begin(principal, name, now_ms).await;
        let block = block(blob, 10);
        self.db
            .commit_whole(blob, Some(&block), Some("zip"), now_ms)
            .await
            .unwrap();
        let id = self.seal(principal, name, Sealing::Verified(HASH), now_ms).await;
        (id, blob, block)
    }

    /// Reserves a key of version `1` in a scope. Reservations are dead after [`LIFE`].
    async fn reserve(&self, principal: &Principal, scope: &str, key: &str, now_ms: i64) -> Reserved {
        let new = NewCacheEntry {
            principal,
            scope,
            key,
            version: "1",
            now_ms,
            dead_since_ms: now_ms - LIFE,
        };
        self.db.reserve_cache_entry(&new).await.unwrap()
    }

    /// A finalized entry of one object.
    async fn save(&self, scope: &str, key: &str, size_bytes: u64, now_ms: i64) -> (CacheEntryId, BlobId) {
        let principal = attempt(1);
        let Reserved::Upload(id, blob) = self.reserve(&principal, scope, key, now_ms).await else {
            panic!("{key} is taken");
        };
        let block = block(blob, size_bytes);
        self.db.commit_whole(blob, Some(&block), None, now_ms).await.unwrap();
        let candidate = self.db.cache_candidate(&principal, scope, Reservation::Id(id)).await;
        let candidate = candidate.unwrap().unwrap();
        assert!(self.db.finalize_cache_entry(&candidate, now_ms).await.unwrap());
        (id, blob)
    }

    /// The key that a reader of `scope` finds between two.
    async fn find(&self, scope: &str, low: &str, high: &str) -> Option<String> {
        let wanted = [WantedKeys { scope, low, high }];
        let found = self.db.find_cache_entry(&attempt(1).run, &wanted, "1").await.unwrap();
        found.map(|found| found.key)
    }

    async fn cached_bytes(&self) -> i64 {
        assert_eq!(self.db.miscounted_caches().await.unwrap(), []);
        assert_eq!(self.db.torn_blobs().await.unwrap(), []);
        self.raw
            .number("SELECT CAST(coalesce(sum(size_bytes), 0) AS BIGINT) FROM cache_repositories")
            .await
    }

    async fn content(&self, blob: BlobId) -> Vec<(u64, Block)> {
        self.db.content_blocks(blob, 0, i64::MAX.cast_unsigned()).await.unwrap()
    }

    async fn garbage(&self) -> BTreeSet<ObjectKey> {
        self.db.garbage(i64::MAX, 100_000).await.unwrap().into_iter().collect()
    }

    async fn objects(&self, blob: BlobId) -> BTreeSet<ObjectKey> {
        self.db.objects_of(blob).await.unwrap().into_iter().collect()
    }

    async fn names(&self, principal: &Principal, now_ms: i64) -> Vec<String> {
        let listed = self.db.list_artifacts(principal, None, None, now_ms).await.unwrap();
        listed.into_iter().map(|artifact| artifact.name).collect()
    }

    async fn counts(&self) -> BTreeMap<String, i64> {
        self.db.blob_counts().await.unwrap().into_iter().collect()
    }
}

fn keys<'a>(blocks: impl IntoIterator<Item = &'a Block>) -> BTreeSet<ObjectKey> {
    blocks.into_iter().map(|block| block.object_key.clone()).collect()
}

/// The blocks one after another, as content.
fn laid_out(blocks: &[&Block]) -> Vec<(u64, Block)> {
    let mut start = 0;
    let place = |block: &&Block| {
        start += block.size_bytes;
        (start - block.size_bytes, (*block).clone())
    };
    blocks.iter().map(place).collect()
}

// Properties, leases, health.

async fn properties_are_set_once(place: Place) {
    assert_eq!(place.db.property("store_id").await.unwrap(), None);
    let setting = (0..8).map(|replica| {
        let db = place.db.clone();
        tokio::spawn(async move { db.set_property_once("store_id", &replica.to_string()).await.unwrap() })
    });
    let mut values = BTreeSet::new();
    for value in setting.collect::<Vec<_>>() {
        values.insert(value.await.unwrap());
    }
    assert_eq!(values.len(), 1, "replicas disagree: {values:?}");
    let value = values.pop_first();
    assert_eq!(place.db.property("store_id").await.unwrap(), value);
    assert_eq!(
        place.db.set_property_once("store_id", "too late").await.unwrap(),
        value.unwrap()
    );
    assert_eq!(place.db.set_property_once("other", "ö").await.unwrap(), "ö");
}

async fn leases_exclude_each_other(place: Place) {
    let taking = (0..8).map(|_| {
        let db = place.db.clone();
        let holder = Uuid::new_v4();
        tokio::spawn(async move { (db.take_lease("cleaner", holder, NOW, NOW + 10).await.unwrap(), holder) })
    });
    let mut holders = Vec::new();
    for attempt in taking.collect::<Vec<_>>() {
        if let (true, holder) = attempt.await.unwrap() {
            holders.push(holder);
        }
    }
    let [first] = holders[..] else {
        panic!("{} holders", holders.len())
    };
    let (db, second) = (&place.db, Uuid::new_v4());
    // Another name is another lease.
    assert!(db.take_lease("other", second, NOW, NOW + 10).await.unwrap());
    assert!(!db.take_lease("cleaner", second, NOW + 9, NOW + 99).await.unwrap());
    // Renewed by its holder, it lasts longer.
    assert!(db.take_lease("cleaner", first, NOW + 9, NOW + 20).await.unwrap());
    assert!(!db.take_lease("cleaner", second, NOW + 19, NOW + 99).await.unwrap());
    // What another holder gives back stays.
    db.release_lease("cleaner", second).await.unwrap();
    assert!(!db.take_lease("cleaner", second, NOW + 19, NOW + 99).await.unwrap());
    // At its end it is anybody's, and its old holder is anybody.
    assert!(db.take_lease("cleaner", second, NOW + 20, NOW + 99).await.unwrap());
    assert!(!db.take_lease("cleaner", first, NOW + 20, NOW + 99).await.unwrap());
    db.release_lease("cleaner", second).await.unwrap();
    assert!(db.take_lease("cleaner", first, NOW + 20, NOW + 99).await.unwrap());
}

async fn the_database_answers_until_it_is_closed(place: Place) {
    place.db.ping().await.unwrap();
    assert!(
        place.db.clock_skew_ms(&Clock::System).await.unwrap().abs() < 10_000,
        "one machine has one clock"
    );
    place.db.close().await;
    assert!(matches!(place.db.ping().await, Err(Error::Busy(_))));
}

// Creating.

async fn creating_takes_free_names(place: Place) {
    let job = attempt(1);
    let (a, b) = (place.begin(&job, "a", NOW).await, place.begin(&job, "b", NOW).await);
    assert_ne!(a, b);
    for blob in [a, b] {
        assert_eq!(
            place.db.writable_blob(blob).await.unwrap(),
            Some(WritableBlob::Open(BlobKind::Artifact))
        );
    }
    assert_eq!(place.db.writable_blob(BlobId::fresh()).await.unwrap(), None);
    let candidate = place.candidate(&job, "a").await;
    assert_eq!((candidate.blob, candidate.finalized), (a, false));
    assert_eq!(
        (candidate.blob_state, candidate.size_bytes, candidate.revision),
        (Some(BlobState::Staging), 0, 0)
    );
    assert_eq!(candidate.job_backend_id, "build");
    assert!(place.db.finalize_candidate(&job, "c", NOW).await.unwrap().is_none());
    // Finalized, the name is taken, by whomever; in another attempt it is free.
    place.upload(&job, "done", NOW).await;
    let other_job = principal("name:octo/demo", "1", "test", 1);
    for job in [&job, &other_job] {
        assert_eq!(
            place.db.create_artifact(&new(job, "done", NOW)).await.unwrap(),
            Created::Exists
        );
    }
    place.begin(&attempt(2), "done", NOW).await;
    assert_eq!(place.names(&job, NOW).await, ["done"]);
    // A refusal leaves nothing behind.
    assert_eq!(
        place.counts().await,
        BTreeMap::from([("sealed".to_owned(), 1), ("staging".to_owned(), 3)])
    );
}

async fn creating_over_a_pending_name_supersedes_it(place: Place) {
    let first = place.open_blob().await;
    place.stage(first, "x", 5).await;
    let other_job = principal("name:octo/demo", "1", "test", 1);
    let second = place.begin(&other_job, "a", NOW + 1).await;
    assert_eq!(
        place.db.writable_blob(first).await.unwrap(),
        Some(WritableBlob::Superseded)
    );
    let candidate = place.candidate(&other_job, "a").await;
    assert_eq!((candidate.blob, candidate.job_backend_id.as_str()), (second, "test"));
    // Committed but not finalized is still pending.
    place.db.commit_whole(second, None, None, NOW).await.unwrap();
    let third = place.begin(&attempt(1), "a", NOW + 2).await;
    assert_eq!(
        place.db.writable_blob(second).await.unwrap(),
        Some(WritableBlob::Superseded)
    );
    assert_eq!(place.candidate(&attempt(1), "a").await.blob, third);
    // What was looked at before is no longer there to finalize.
    assert!(
        !place
            .db
            .finalize_artifact(&candidate, Sealing::Verified(HASH), NOW)
            .await
            .unwrap()
    );
}

async fn creating_over_an_expired_name_frees_it(place: Place) {
    let job = attempt(1);
    let (id, old, _) = place.upload(&job, "a", NOW).await;
    let late = |now_ms| NewArtifact {
        created_at_ms: now_ms,
        ..new(&job, "a", now_ms)
    };
    assert_eq!(
        place.db.create_artifact(&late(NOW + LIFE - 1)).await.unwrap(),
        Created::Exists
    );
    let Created::Upload(fresh) = place.db.create_artifact(&late(NOW + LIFE)).await.unwrap() else {
        panic!("the name is free")
    };
    // Gone, and not superseded: its bytes were final.
    assert_eq!(place.db.writable_blob(old).await.unwrap(), None);
    assert_eq!(
        place.db.writable_blob(fresh).await.unwrap(),
        Some(WritableBlob::Open(BlobKind::Artifact))
    );
    assert_eq!(place.names(&job, NOW + LIFE).await, [""; 0]);
    // Other content has another id.
    place.db.commit_whole(fresh, None, None, NOW + LIFE).await.unwrap();
    let again = place.seal(&job, "a", Sealing::Verified(HASH), NOW + LIFE).await;
    assert!(again > id);
    assert_eq!(place.db.blobs_to_empty(NOW + LIFE, 10).await.unwrap(), [old]);
}

async fn a_job_has_its_limit(place: Place) {
    let two = async |principal: &Principal, name: &str| {
        let limited = NewArtifact {
            max_per_job: Some(2),
            ..new(principal, name, NOW)
        };
        matches!(place.db.create_artifact(&limited).await.unwrap(), Created::Upload(_))
    };
    let job = attempt(1);
    assert!(two(&job, "a").await && two(&job, "b").await);
    let over = NewArtifact {
        max_per_job: Some(2),
        ..new(&job, "c", NOW)
    };
    assert_eq!(place.db.create_artifact(&over).await.unwrap(), Created::TooMany);
    assert!(place.db.finalize_candidate(&job, "c", NOW).await.unwrap().is_none());
    // Again over one of its own is no further artifact; other jobs and attempts count for themselves.
    assert!(two(&job, "a").await);
    assert!(two(&principal("name:octo/demo", "1", "test", 1), "c").await);
    assert!(two(&attempt(2), "c").await);
    // A name that is finalized is not to be had, whatever the limit is by now.
    place.upload(&job, "b", NOW).await;
    let over = NewArtifact {
        max_per_job: Some(1),
        ..new(&job, "b", NOW)
    };
    assert_eq!(place.db.create_artifact(&over).await.unwrap(), Created::Exists);
}

async fn a_run_has_its_limit_of_pending_ones(place: Place) {
    fn limited<'a>(principal: &'a Principal, name: &'a str) -> NewArtifact<'a> {
        NewArtifact {
            max_pending_per_run: Some(2),
            ..new(principal, name, NOW)
        }
    }
    let (build, test) = (attempt(1), principal("name:octo/demo", "1", "test", 2));
    let created = async |principal, name| place.db.create_artifact(&limited(principal, name)).await.unwrap();
    let opened = async |principal, name| place.db.open_container(&limited(principal, name)).await.unwrap();
    assert!(matches!(created(&build, "a").await, Created::Upload(_)));
    assert!(matches!(opened(&test, "b").await, Created::Upload(_)));
    assert_eq!(created(&test, "c").await, Created::TooManyPending);
    assert_eq!(opened(&build, "c").await, Created::TooManyPending);
    // Again is no further one, and other runs count for themselves.
    assert!(matches!(created(&build, "a").await, Created::Upload(_)));
    assert!(matches!(opened(&test, "b").await, Created::Upload(_)));
    let other = principal("name:octo/demo", "2", "build", 1);
    assert!(matches!(created(&other, "a").await, Created::Upload(_)));
    // What is finalized makes room.
    place.upload(&build, "a", NOW).await;
    assert!(matches!(created(&build, "c").await, Created::Upload(_)));
}

async fn of_many_creates_the_newest_wins(place: Place) {
    const CREATES: usize = 20;
    let creating = (0..CREATES).map(|job| {
        let db = place.db.clone();
        tokio::spawn(async move {
            let job = principal("name:octo/demo", "1", &format!("job-{job}"), 1);
            db.create_artifact(&new(&job, "a", NOW)).await.unwrap()
        })
    });
    let mut open = Vec::new();
    for created in creating.collect::<Vec<_>>() {
        let Created::Upload(blob) = created.await.unwrap() else {
            panic!("a pending name refuses nobody")
        };
        match place.db.writable_blob(blob).await.unwrap() {
            Some(WritableBlob::Open(BlobKind::Artifact)) => open.push(blob),
            Some(WritableBlob::Superseded) => {}
            other => panic!("{other:?}"),
        }
    }
    // Looked at while others were still at it, some may have been superseded since.
    let newest = place.candidate(&attempt(1), "a").await.blob;
    assert!(open.contains(&newest));
    assert_eq!(
        place.counts().await,
        BTreeMap::from([
            ("deleting".to_owned(), i64::try_from(CREATES).unwrap() - 1),
            ("staging".to_owned(), 1)
        ])
    );
    assert_eq!(place.raw.number("SELECT count(*) FROM artifacts").await, 1);
    assert_eq!(
        place.db.writable_blob(newest).await.unwrap(),
        Some(WritableBlob::Open(BlobKind::Artifact))
    );
}

// Staging.

async fn staging_a_block_again_makes_garbage(place: Place) {
    let blob = place.open_blob().await;
    let first = place.stage(blob, "x", 5).await;
    let other = place.stage(blob, "X", 7).await;
    assert_eq!(place.db.staged_bytes(blob).await.unwrap(), 12);
    assert_eq!(place.garbage().await, BTreeSet::new());
    let second = place.stage(blob, "x", 6).await;
    assert_eq!(place.garbage().await, keys([&first]));
    assert_eq!(place.objects(blob).await, keys([&second, &other]));
    assert_eq!(place.db.staged_bytes(blob).await.unwrap(), 13);
    let found = place.db.listed_blocks(blob, &latest(&["x"])).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((&found[0].block, found[0].start_offset), (&second, None));
    assert_eq!(place.db.staged_bytes(BlobId::fresh()).await.unwrap(), 0);
}

async fn no_list_reads_more_blocks_than_a_blob_may_have(place: Place) {
    let blob = place.open_blob().await;
    let x = place.stage(blob, "x", 1).await;
    let id = place.raw.literal(blob.0.as_bytes());
    let add = async |from: u32, to: u32| {
        let text = format!(
            "WITH RECURSIVE numbers(i) AS (SELECT {from} UNION ALL SELECT i + 1 FROM numbers WHERE i < {to})
             INSERT INTO blocks (blob_id, block_id, object_key, size_bytes, crc64)
             SELECT {id}, 'block-' || i, '{}', 1, 0 FROM numbers",
            x.object_key
        );
        place.raw.execute(&text).await;
    };
    add(2, 150_000).await;
    assert_eq!(place.db.listed_blocks(blob, &latest(&["x"])).await.unwrap().len(), 1);
    add(150_001, 150_001).await;
    let refused = place.db.listed_blocks(blob, &latest(&["x"])).await;
    assert!(matches!(refused, Err(Error::TooLarge(_))), "{refused:?}");
}

/// A long list, for which SQLite's thread is left to others meanwhile.
async fn many_blocks_become_content_in_their_order(place: Place) {
    let blob = place.open_blob().await;
    let ids: Vec<String> = (0..1_200).map(|i| format!("{:04}", 1_199 - i)).collect();
    for id in &ids {
        place.stage(blob, id, 2).await;
    }
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let (db, list) = (place.db.clone(), latest(&ids));
    // On a thread that has other tasks.
    let committed = tokio::spawn(async move {
        let durable = db.listed_blocks(blob, &list).await?;
        db.commit_block_list(blob, &list, &durable, None, NOW).await
    });
    assert_eq!(committed.await.unwrap().unwrap(), Committed::Done);
    let content = place.db.content_blocks(blob, 0, 2_400).await.unwrap();
    assert!(content.iter().map(|(start, _)| *start).eq((0..1_200).map(|i| 2 * i)));
    let listed = place.db.listed_blocks(blob, &latest(&ids)).await.unwrap();
    assert!(
        content
            .iter()
            .map(|(_, block)| block)
            .eq(listed.iter().map(|row| &row.block))
    );
}

async fn closed_blobs_take_no_blocks(place: Place) {
    let (_, sealed, content) = place.upload(&attempt(1), "sealed", NOW).await;
    let superseded = place.open_blob().await;
    place.stage(superseded, "x", 5).await;
    place.open_blob().await;
    for blob in [sealed, superseded, BlobId::fresh()] {
        // Both a fresh id and one that is there.
        for id in ["x", ""] {
            assert!(!place.db.stage_block(blob, id, &block(blob, 1), NOW).await.unwrap());
        }
    }
    assert_eq!(place.objects(sealed).await, keys([&content]));
    assert_eq!(place.garbage().await, BTreeSet::new());
}

async fn of_many_resends_one_stays(place: Place) {
    let blob = place.open_blob().await;
    let sending = (0..16).map(|_| {
        let (db, block) = (place.db.clone(), block(blob, 5));
        tokio::spawn(async move {
            assert!(db.stage_block(blob, "x", &block, NOW).await.unwrap());
            block.object_key
        })
    });
    let mut sent = BTreeSet::new();
    for key in sending.collect::<Vec<_>>() {
        sent.insert(key.await.unwrap());
    }
    let (kept, garbage) = (place.objects(blob).await, place.garbage().await);
    assert_eq!((kept.len(), garbage.len()), (1, 15));
    assert_eq!(&kept | &garbage, sent);
    assert_eq!(place.raw.number("SELECT count(*) FROM blocks").await, 1);
}

// Block lists.

async fn a_list_orders_blocks(place: Place) {
    let blob = place.open_blob().await;
    let c = place.stage(blob, "c", 3).await;
    let a = place.stage(blob, "a", 1).await;
    let b = place.stage(blob, "b", 2).await;
    let left_out = place.stage(blob, "left out", 9).await;
    assert!(matches!(
        place.commit(blob, &latest(&["a", "nobody"])).await,
        Err(Error::UnknownBlock(_))
    ));
    assert!(matches!(
        place
            .db
            .commit_block_list(blob, &latest(&["nobody"]), &[], None, NOW)
            .await,
        Err(Error::UnknownBlock(_))
    ));
    assert_eq!(place.content(blob).await, []);
    assert_eq!(
        place.commit(blob, &latest(&["b", "a", "c", "a"])).await.unwrap(),
        Committed::Done
    );
    assert_eq!(place.content(blob).await, laid_out(&[&b, &a, &c, &a]));
    assert_eq!(place.objects(blob).await, keys([&a, &b, &c]));
    assert_eq!(place.garbage().await, keys([&left_out]));
    let candidate = place.candidate(&attempt(1), "a").await;
    assert_eq!(
        (candidate.blob_state, candidate.size_bytes, candidate.revision),
        (Some(BlobState::Committed), 7, 1)
    );
    // A block may be staged again once it has a place: it waits for the next list and disturbs nothing.
    let again = place.stage(blob, "a", 4).await;
    assert_eq!(place.content(blob).await, laid_out(&[&b, &a, &c, &a]));
    assert_eq!(place.garbage().await, keys([&left_out]));
    assert_eq!(place.commit(blob, &latest(&["a", "b"])).await.unwrap(), Committed::Done);
    assert_eq!(place.content(blob).await, laid_out(&[&again, &b]));
    assert_eq!(place.garbage().await, keys([&left_out, &a, &c]));
    // No blocks at all are an empty blob.
    assert_eq!(place.commit(blob, &[]).await.unwrap(), Committed::Done);
    assert_eq!(place.content(blob).await, []);
    assert_eq!(place.objects(blob).await, BTreeSet::new());
    assert_eq!(place.candidate(&attempt(1), "a").await.size_bytes, 0);
}

async fn a_list_names_where_it_looks(place: Place) {
    let blob = place.open_blob().await;
    let entry = |from| {
        [ListEntry {
            block_id: "x".to_owned(),
            from,
        }]
    };
    let first = place.stage(blob, "x", 1).await;
    assert!(matches!(
        place.commit(blob, &entry(ListSource::Committed)).await,
        Err(Error::UnknownBlock(_))
    ));
    assert_eq!(
        place.commit(blob, &entry(ListSource::Uncommitted)).await.unwrap(),
        Committed::Done
    );
    assert!(matches!(
        place.commit(blob, &entry(ListSource::Uncommitted)).await,
        Err(Error::UnknownBlock(_))
    ));
    let second = place.stage(blob, "x", 2).await;
    assert_eq!(
        place.commit(blob, &entry(ListSource::Committed)).await.unwrap(),
        Committed::Done
    );
    assert_eq!(place.content(blob).await, laid_out(&[&first]));
    assert_eq!(place.garbage().await, keys([&second]));
    let third = place.stage(blob, "x", 3).await;
    let both = [entry(ListSource::Uncommitted), entry(ListSource::Committed)].concat();
    assert_eq!(place.commit(blob, &both).await.unwrap(), Committed::Done);
    assert_eq!(place.content(blob).await, laid_out(&[&third, &first]));
    assert_eq!(place.garbage().await, keys([&second]));
}

async fn a_list_of_blocks_that_changed_is_refused(place: Place) {
    let blob = place.open_blob().await;
    let list = latest(&["x", "y"]);
    place.stage(blob, "x", 1).await;
    let y = place.stage(blob, "y", 2).await;
    let durable = place.db.listed_blocks(blob, &list).await.unwrap();
    let x = place.stage(blob, "x", 1).await;
    assert_eq!(
        place
            .db
            .commit_block_list(blob, &list, &durable, None, NOW)
            .await
            .unwrap(),
        Committed::BlocksChanged
    );
    // Nothing of it happened.
    assert_eq!(place.content(blob).await, []);
    assert_eq!(place.candidate(&attempt(1), "a").await.revision, 0);
    assert_eq!(place.commit(blob, &list).await.unwrap(), Committed::Done);
    assert_eq!(place.content(blob).await, laid_out(&[&x, &y]));
}

async fn another_list_replaces_the_first(place: Place) {
    let blob = place.open_blob().await;
    let a = place.stage(blob, "a", 1).await;
    let b = place.stage(blob, "b", 2).await;
    place.commit(blob, &latest(&["a", "b"])).await.unwrap();
    // The same again changes nothing.
    place.commit(blob, &latest(&["a", "b"])).await.unwrap();
    assert_eq!(place.content(blob).await, laid_out(&[&a, &b]));
    assert_eq!(place.garbage().await, BTreeSet::new());
    let c = place.stage(blob, "c", 3).await;
    place.commit(blob, &latest(&["c", "b"])).await.unwrap();
    assert_eq!(place.content(blob).await, laid_out(&[&c, &b]));
    assert_eq!(place.garbage().await, keys([&a]));
    assert!(matches!(
        place.commit(blob, &latest(&["a"])).await,
        Err(Error::UnknownBlock(_))
    ));
    let candidate = place.candidate(&attempt(1), "a").await;
    assert_eq!((candidate.size_bytes, candidate.revision), (5, 3));
}

async fn a_list_may_be_long(place: Place) {
    const BLOCKS: usize = 12_000;
    let blob = place.open_blob().await;
    let ids: Vec<_> = (0..BLOCKS).map(|n| format!("{n:05}")).collect();
    // As one statement per block this would take most of the test's time.
    let literal = place.raw.literal(blob.0.as_bytes());
    let mut sizes = BTreeMap::new();
    for page in ids.chunks(1_000) {
        let rows: Vec<_> = page
            .iter()
            .enumerate()
            .map(|(n, id)| {
                let key = ObjectKey::fresh(blob);
                sizes.insert(id.clone(), n as u64 + 1);
                format!("({literal}, '{id}', '{key}', 0, {}, 0)", n + 1)
            })
            .collect();
        place
            .raw
            .execute(&format!(
                "INSERT INTO blocks (blob_id, block_id, object_key, object_offset, size_bytes, crc64) VALUES {}",
                rows.join(", ")
            ))
            .await;
    }
    // Every second one, backwards; the others are left out.
    let list: Vec<_> = ids.iter().rev().step_by(2).map(String::as_str).collect();
    for list in [ids.iter().rev().map(String::as_str).collect(), list] {
        assert_eq!(place.commit(blob, &latest(&list)).await.unwrap(), Committed::Done);
        let content = place.content(blob).await;
        assert_eq!(content.len(), list.len());
        let mut start = 0;
        for ((offset, block), id) in content.iter().zip(&list) {
            assert_eq!((*offset, block.size_bytes), (start, sizes[*id]));
            start += block.size_bytes;
        }
        assert_eq!(place.candidate(&attempt(1), "a").await.size_bytes, start);
    }
    assert_eq!(place.garbage().await.len(), BLOCKS / 2);
}

async fn a_list_after_the_end(place: Place) {
    let job = attempt(1);
    let blob = place.open_blob().await;
    let x = place.stage(blob, "x", 1).await;
    let y = place.stage(blob, "y", 2).await;
    place.commit(blob, &latest(&["y", "x"])).await.unwrap();
    place.seal(&job, "a", Sealing::Verified(HASH), NOW).await;
    let commit = async |list: &[&str]| place.db.commit_block_list(blob, &latest(list), &[], None, NOW).await;
    assert_eq!(commit(&["y", "x"]).await.unwrap(), Committed::AlreadySealed);
    for other in [&["x", "y"][..], &["y"], &["y", "x", "x"], &[]] {
        assert!(matches!(commit(other).await, Err(Error::Conflict(_))), "{other:?}");
    }
    assert!(matches!(
        place.db.commit_whole(blob, None, None, NOW).await,
        Err(Error::Conflict(_))
    ));
    assert_eq!(place.content(blob).await, laid_out(&[&y, &x]));

    let superseded = place.begin(&job, "b", NOW).await;
    place.begin(&job, "b", NOW).await;
    for gone in [superseded, BlobId::fresh()] {
        let refused = [
            place.db.commit_block_list(gone, &[], &[], None, NOW).await.map(drop),
            place.db.commit_whole(gone, Some(&block(gone, 1)), None, NOW).await,
        ];
        for refused in refused {
            match refused {
                Err(Error::Conflict(_)) if gone == superseded => {}
                Err(Error::NotFound(_)) if gone != superseded => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Lists race with the same blocks sent again, for many rounds: every manifest is whole, and no object is lost.
async fn resends_never_tear_a_list(place: Place) {
    const ROUNDS: usize = 40;
    const IDS: [&str; 4] = ["d", "b", "a", "c"];
    let blob = place.open_blob().await;
    // A block's size tells its id.
    let size = |id: &str| 1_000 * (1 + u64::from(id.as_bytes()[0] - b'a'));
    let mut sent = BTreeSet::new();
    for id in IDS {
        sent.insert(place.stage(blob, id, size(id)).await.object_key);
    }
    let list = latest(&IDS);
    let (mut turn, mut committed, mut changed) = (0, 0, 0);
    while committed < ROUNDS {
        // Three at the side of each list: with senders that never rest, a list would hardly ever win.
        let senders: Vec<_> = (0..3)
            .map(|_| {
                turn += 1;
                let id = IDS[turn % IDS.len()];
                let (db, block) = (place.db.clone(), block(blob, size(id)));
                sent.insert(block.object_key.clone());
                tokio::spawn(async move { assert!(db.stage_block(blob, id, &block, NOW).await.unwrap()) })
            })
            .collect();
        let outcome = place.commit(blob, &list).await;
        for sender in senders {
            sender.await.unwrap();
        }
        match outcome {
            Ok(Committed::Done) => committed += 1,
            Ok(Committed::BlocksChanged) => {
                changed += 1;
                assert!(
                    changed < 100 * ROUNDS,
                    "lists hardly ever win: {committed} of {changed}"
                );
                continue;
            }
            other => panic!("{other:?}"),
        }
        let content = place.content(blob).await;
        let sizes: Vec<_> = content.iter().map(|(_, block)| block.size_bytes).collect();
        assert_eq!(
            sizes,
            IDS.map(size),
            "round {committed}: each id once, in the list's order"
        );
        let blocks: Vec<_> = content.iter().map(|(_, block)| block).collect();
        assert_eq!(content, laid_out(&blocks), "round {committed}: one after another");
        let candidate = place.candidate(&attempt(1), "a").await;
        assert_eq!(candidate.size_bytes, sizes.iter().sum::<u64>());
        let placed = keys(blocks);
        assert!(
            place.garbage().await.is_disjoint(&placed),
            "round {committed}: content is not garbage"
        );
    }
    assert_eq!(
        &place.objects(blob).await | &place.garbage().await,
        sent,
        "an object was lost"
    );
}

async fn a_whole_blob_replaces_everything(place: Place) {
    let blob = place.open_blob().await;
    let a = place.stage(blob, "a", 1).await;
    let b = place.stage(blob, "b", 2).await;
    place.commit(blob, &latest(&["a", "a"])).await.unwrap();
    let staged = place.stage(blob, "a", 3).await;
    let whole = block(blob, 100);
    place
        .db
        .commit_whole(blob, Some(&whole), Some("text/plain"), NOW)
        .await
        .unwrap();
    assert_eq!(place.content(blob).await, laid_out(&[&whole]));
    assert_eq!(place.garbage().await, keys([&a, &b, &staged]));
    let second = block(blob, 50);
    place.db.commit_whole(blob, Some(&second), None, NOW).await.unwrap();
    assert_eq!(place.objects(blob).await, keys([&second]));
    // A list over it, and an empty one over that.
    let c = place.stage(blob, "c", 3).await;
    place.commit(blob, &latest(&["c"])).await.unwrap();
    assert_eq!(place.objects(blob).await, keys([&c]));
    place.db.commit_whole(blob, None, None, NOW).await.unwrap();
    assert_eq!(place.content(blob).await, []);
    let candidate = place.candidate(&attempt(1), "a").await;
    assert_eq!((candidate.size_bytes, candidate.revision), (0, 5));
    assert_eq!(place.garbage().await, keys([&a, &b, &staged, &whole, &second, &c]));
}

// Finalizing and reading.

async fn finalizing_seals_what_was_looked_at(place: Place) {
    let job = attempt(1);
    let blob = place.open_blob().await;
    // Nothing is committed.
    let early = place.candidate(&job, "a").await;
    assert!(
        !place
            .db
            .finalize_artifact(&early, Sealing::Verified(HASH), NOW)
            .await
            .unwrap()
    );
    let x = place.stage(blob, "x", 1).await;
    place.commit(blob, &latest(&["x"])).await.unwrap();
    let looked_at = place.candidate(&job, "a").await;
    // Other content came since, though of the same size.
    place.commit(blob, &latest(&["x"])).await.unwrap();
    assert!(
        !place
            .db
            .finalize_artifact(&looked_at, Sealing::Verified(HASH), NOW)
            .await
            .unwrap()
    );
    assert!(place.db.readable_blob(blob, NOW).await.unwrap().is_none());
    assert_eq!(place.names(&job, NOW).await, [""; 0]);
    // Blocks that came after the list are nobody's content.
    let late = place.stage(blob, "x", 2).await;
    let candidate = place.candidate(&job, "a").await;
    assert!(
        place
            .db
            .finalize_artifact(&candidate, Sealing::Verified(HASH), NOW + 1)
            .await
            .unwrap()
    );
    assert!(
        !place
            .db
            .finalize_artifact(&candidate, Sealing::Verified(HASH), NOW + 2)
            .await
            .unwrap()
    );
    assert_eq!(place.garbage().await, keys([&late]));
    assert_eq!(place.content(blob).await, laid_out(&[&x]));
    let sealed = place.candidate(&job, "a").await;
    assert_eq!(
        (sealed.id, sealed.finalized, sealed.sha256),
        (candidate.id, true, Some(HASH))
    );
    assert_eq!(sealed.blob_state, Some(BlobState::Sealed));
    let readable = place.db.readable_blob(blob, NOW).await.unwrap().unwrap();
    assert_eq!((readable.id, readable.name.as_str()), (blob, "a"));
    assert_eq!(readable.mime_type.as_deref(), Some("application/zip"));
    assert_eq!(readable.content_type.as_deref(), Some("zip"));
    assert_eq!(
        (readable.size_bytes, readable.lost, readable.sealed_at_ms),
        (1, false, NOW + 1)
    );
    assert_eq!((readable.sha256, readable.unverified), (Some(HASH), false));
    assert!(place.db.readable_blob(BlobId::fresh(), NOW).await.unwrap().is_none());
}

async fn windows_of_content(place: Place) {
    let blob = place.open_blob().await;
    let blocks = [
        place.stage(blob, "0", 10).await,
        place.stage(blob, "1", 10).await,
        place.stage(blob, "2", 10).await,
    ];
    place.commit(blob, &latest(&["0", "1", "2"])).await.unwrap();
    let whole = laid_out(&blocks.each_ref());
    for (from, to, expected) in [
        (0, 30, 0..3),
        (0, 1, 0..1),
        (9, 10, 0..1),
        (9, 11, 0..2),
        (10, 20, 1..2),
        (29, 99, 2..3),
        (30, 40, 0..0),
    ] {
        let overlap = place.db.content_blocks(blob, from, to).await.unwrap();
        assert_eq!(overlap, whole[expected], "{from}..{to}");
    }
    // Blocks without bytes lie where others begin.
    let blob = place.begin(&attempt(1), "b", NOW).await;
    for (id, size_bytes) in [("0", 0), ("1", 10), ("2", 0), ("3", 0), ("4", 10), ("5", 0)] {
        place.stage(blob, id, size_bytes).await;
    }
    place
        .commit(blob, &latest(&["0", "1", "2", "3", "4", "5"]))
        .await
        .unwrap();
    for (from, to, expected) in [
        (0, 10, vec![0]),
        (9, 10, vec![0]),
        (10, 20, vec![10]),
        (15, 20, vec![10]),
        (20, 30, vec![]),
    ] {
        let overlap = place.db.content_blocks(blob, from, to).await.unwrap();
        let full = overlap.iter().filter(|(_, block)| block.size_bytes > 0);
        assert_eq!(
            full.map(|(start, _)| *start).collect::<Vec<_>>(),
            expected,
            "{from}..{to}"
        );
    }
}

async fn lists_and_attempts(place: Place) {
    let of_test = |attempt| principal("name:octo/demo", "1", "test", attempt);
    let (first, second) = (attempt(1), attempt(2));
    let (a1, blob_a1, _) = place.upload(&first, "a", NOW).await;
    let (b1, ..) = place.upload(&of_test(1), "b", NOW).await;
    // Of a job that is run again.
    let (c1, ..) = place.upload(&first, "c", NOW + 1).await;
    place.begin(&first, "pending", NOW).await;
    let (a2, blob_a2, _) = place.upload(&second, "a", NOW - 1).await;
    assert!(a1 < b1 && b1 < c1 && c1 < a2, "ids grow");
    let list = async |job: &Principal, name: Option<&str>, id: Option<ArtifactId>, now_ms: i64| {
        let listed = place.db.list_artifacts(job, name, id, now_ms).await.unwrap();
        listed.into_iter().map(|artifact| artifact.id).collect::<Vec<_>>()
    };
    // Newest first, by creation; an attempt sees what came before it, and of one name the newest.
    assert_eq!(list(&second, None, None, NOW).await, [b1, a2]);
    assert_eq!(list(&second, Some("c"), None, NOW).await, []);
    assert_eq!(list(&second, None, Some(c1), NOW).await, []);
    assert_eq!(list(&first, None, None, NOW).await, [c1, b1, a1]);
    assert_eq!(list(&of_test(2), None, None, NOW).await, [a2], "it is run again itself");
    assert_eq!(list(&attempt(3), None, None, NOW).await, [b1]);
    assert_eq!(list(&second, Some("a"), None, NOW).await, [a2]);
    assert_eq!(list(&second, Some("A"), None, NOW).await, []);
    assert_eq!(list(&second, None, Some(b1), NOW).await, [b1]);
    assert_eq!(list(&second, None, Some(a1), NOW).await, [], "it is shadowed");
    assert_eq!(list(&second, Some("b"), Some(a2), NOW).await, []);
    let newest = async |job: &Principal, now_ms: i64| place.db.newest_artifact(job, "a", now_ms).await.unwrap();
    let of = |id, blob| Some(NewestArtifact { id, blob });
    assert_eq!(newest(&second, NOW).await, of(a2, blob_a2));
    assert_eq!(newest(&first, NOW).await, of(a1, blob_a1));
    // Whatever job asks; and what shadows another ends a moment earlier here.
    let other_job = principal("name:octo/demo", "1", "use", 2);
    assert_eq!(list(&other_job, None, None, NOW).await, [b1, a2]);
    assert_eq!(list(&other_job, None, None, NOW + LIFE - 1).await, [c1, b1, a1]);
    assert_eq!(newest(&other_job, NOW + LIFE - 1).await, of(a1, blob_a1));
    let listed = place.db.list_artifacts(&first, Some("a"), None, NOW).await.unwrap();
    assert_eq!(
        (listed[0].name.as_str(), listed[0].job_backend_id.as_str()),
        ("a", "build")
    );
    assert_eq!(
        (listed[0].size_bytes, listed[0].created_at_ms, listed[0].sha256),
        (10, NOW, Some(HASH))
    );
}

async fn runs_never_meet(place: Place) {
    let ours = attempt(1);
    let (id, blob, _) = place.upload(&ours, "a", NOW).await;
    let mut other_issuer = ours.clone();
    other_issuer.run.issuer = "gitea".to_owned();
    for other in [
        principal("id:octo/demo", "1", "build", 1),
        principal("name:octo/demo", "2", "build", 1),
        other_issuer,
    ] {
        assert_eq!(place.names(&other, NOW).await, [""; 0]);
        assert_eq!(place.db.list_artifacts(&other, None, Some(id), NOW).await.unwrap(), []);
        assert_eq!(place.db.newest_artifact(&other, "a", NOW).await.unwrap(), None);
        assert!(place.db.finalize_candidate(&other, "a", NOW).await.unwrap().is_none());
        // The name is free to them, and what they do with it is no business of ours.
        let (theirs, ..) = place.upload(&other, "a", NOW).await;
        assert_ne!(theirs, id);
    }
    assert_eq!(
        place.db.newest_artifact(&ours, "a", NOW).await.unwrap(),
        Some(NewestArtifact { id, blob })
    );
}

async fn deleting_ends_an_artifact(place: Place) {
    let job = attempt(1);
    let (id, blob, _) = place.upload(&job, "a", NOW).await;
    let artifact = NewestArtifact { id, blob };
    assert!(place.db.delete_artifact(&artifact, NOW).await.unwrap());
    assert!(!place.db.delete_artifact(&artifact, NOW).await.unwrap());
    assert!(place.db.readable_blob(blob, NOW).await.unwrap().is_none());
    assert_eq!(place.db.writable_blob(blob).await.unwrap(), None);
    assert_eq!(place.names(&job, NOW).await, [""; 0]);
    // The name is free, and the new artifact has an id of its own.
    let (again, blob, _) = place.upload(&job, "a", NOW).await;
    assert!(again > id);
    // What was looked at before does not touch it.
    assert!(!place.db.delete_artifact(&artifact, NOW).await.unwrap());
    assert!(place.db.readable_blob(blob, NOW).await.unwrap().is_some());
}

async fn everything_expires_at_its_millisecond(place: Place) {
    let job = attempt(1);
    let (id, blob, _) = place.upload(&job, "a", NOW).await;
    place.begin(&job, "pending", NOW).await;
    for (now_ms, lives) in [(NOW + LIFE - 1, true), (NOW + LIFE, false)] {
        let db = &place.db;
        assert_eq!(db.readable_blob(blob, now_ms).await.unwrap().is_some(), lives);
        assert_eq!(db.newest_artifact(&job, "a", now_ms).await.unwrap().is_some(), lives);
        assert_eq!(
            db.list_artifacts(&job, None, Some(id), now_ms).await.unwrap().len(),
            usize::from(lives)
        );
        for name in ["a", "pending"] {
            let candidate = db.finalize_candidate(&job, name, now_ms).await.unwrap();
            assert_eq!(candidate.is_some(), lives, "{name}");
        }
        assert_eq!(db.expire_artifacts(now_ms, 10).await.unwrap(), u64::from(!lives));
    }
}

// Verification.

async fn pending(place: &Place, name: &str, expected: Option<Sha256>) -> BlobId {
    let blob = place.begin(&attempt(1), name, NOW).await;
    place
        .db
        .commit_whole(blob, Some(&block(blob, 10)), None, NOW)
        .await
        .unwrap();
    place.seal(&attempt(1), name, Sealing::Pending(expected), NOW).await;
    blob
}

async fn verification_is_claimed_and_passes(place: Place) {
    let db = &place.db;
    assert_eq!(db.claim_verification(NOW, NOW + 10).await.unwrap(), None);
    let blob = pending(&place, "a", Some(HASH)).await;
    assert_eq!(db.pending_verifications().await.unwrap(), 1);
    let readable = db.readable_blob(blob, NOW).await.unwrap().unwrap();
    assert_eq!((readable.sha256, readable.unverified), (Some(HASH), true));
    let claim = Some(Verification {
        blob,
        size_bytes: 10,
        expected: Some(HASH),
    });
    assert_eq!(db.claim_verification(NOW, NOW + 10).await.unwrap(), claim);
    assert_eq!(db.claim_verification(NOW + 9, NOW + 99).await.unwrap(), None);
    // Its holder died: another takes over, and keeps the claim by and by.
    assert_eq!(db.claim_verification(NOW + 10, NOW + 20).await.unwrap(), claim);
    assert!(db.extend_verification(blob, NOW + 30).await.unwrap());
    assert_eq!(db.claim_verification(NOW + 29, NOW + 99).await.unwrap(), None);
    db.pass_verification(blob, &HASH).await.unwrap();
    assert_eq!(db.pending_verifications().await.unwrap(), 0);
    assert!(!db.extend_verification(blob, NOW + 99).await.unwrap());
    assert_eq!(db.claim_verification(NOW + 99, NOW + 199).await.unwrap(), None);
    assert!(!db.fail_verification(blob, NOW).await.unwrap(), "it has passed");
    let readable = db.readable_blob(blob, NOW).await.unwrap().unwrap();
    assert_eq!((readable.sha256, readable.unverified), (Some(HASH), false));
    // Where the client said nothing the hash is recorded.
    let silent = pending(&place, "b", None).await;
    assert_eq!(db.readable_blob(silent, NOW).await.unwrap().unwrap().sha256, None);
    assert_eq!(
        db.claim_verification(NOW, NOW + 10).await.unwrap().unwrap().expected,
        None
    );
    db.pass_verification(silent, &HASH).await.unwrap();
    assert_eq!(db.readable_blob(silent, NOW).await.unwrap().unwrap().sha256, Some(HASH));
}

async fn verification_fails_once(place: Place) {
    let db = &place.db;
    let blob = pending(&place, "a", Some(HASH)).await;
    assert!(db.fail_verification(blob, NOW).await.unwrap());
    assert!(!db.fail_verification(blob, NOW).await.unwrap());
    assert_eq!(db.pending_verifications().await.unwrap(), 0);
    assert!(db.readable_blob(blob, NOW).await.unwrap().is_none());
    assert_eq!(db.writable_blob(blob).await.unwrap(), None);
    assert_eq!(place.names(&attempt(1), NOW).await, [""; 0]);
    assert_eq!(db.blobs_to_empty(NOW, 10).await.unwrap(), [blob]);
    // The name is free again.
    place.upload(&attempt(1), "a", NOW).await;
    // A deleted artifact is nobody's to verify.
    let deleted = pending(&place, "b", Some(HASH)).await;
    let newest = db.newest_artifact(&attempt(1), "b", NOW).await.unwrap().unwrap();
    assert!(db.delete_artifact(&newest, NOW).await.unwrap());
    assert!(!db.fail_verification(deleted, NOW).await.unwrap());
    assert_eq!(
        db.claim_verification(NOW, NOW + 10).await.unwrap(),
        None,
        "it is deleted"
    );
    assert_eq!(db.pending_verifications().await.unwrap(), 0, "it is deleted");
}

async fn one_claim_at_a_time(place: Place) {
    let blobs = [pending(&place, "a", None).await, pending(&place, "b", None).await];
    let mut claimed = Vec::new();
    // Who loses a race for one of them looks again.
    while claimed.len() < blobs.len() {
        let claiming = (0..8).map(|_| {
            let db = place.db.clone();
            tokio::spawn(async move { db.claim_verification(NOW, NOW + 10).await.unwrap() })
        });
        let before = claimed.len();
        for claim in claiming.collect::<Vec<_>>() {
            claimed.extend(claim.await.unwrap().map(|claim| claim.blob));
        }
        assert!(claimed.len() > before, "nobody wins");
    }
    claimed.sort();
    assert_eq!(claimed, blobs);
}

// Cleaning.

async fn the_cleaner_expires_and_abandons(place: Place) {
    let (db, job) = (&place.db, attempt(1));
    for name in ["a", "b", "c"] {
        place.upload(&job, name, NOW).await;
    }
    let begun = place.begin(&job, "begun", NOW).await;
    let committed = place.begin(&job, "committed", NOW + 1).await;
    db.commit_whole(committed, None, None, NOW + 500).await.unwrap();
    assert_eq!(
        place.counts().await,
        BTreeMap::from([
            ("committed".to_owned(), 1),
            ("sealed".to_owned(), 3),
            ("staging".to_owned(), 1)
        ])
    );
    assert_eq!(db.expire_artifacts(NOW + LIFE - 1, 10).await.unwrap(), 0);
    assert_eq!(db.expire_artifacts(NOW + LIFE, 2).await.unwrap(), 2);
    assert_eq!(db.expire_artifacts(NOW + LIFE, 2).await.unwrap(), 1);
    assert_eq!(db.expire_artifacts(NOW + LIFE, 2).await.unwrap(), 0);
    // Counted from their beginning, whatever came since.
    assert_eq!(db.abandon_uploads(NOW - 1, NOW, 10).await.unwrap(), 0);
    assert_eq!(db.abandon_uploads(NOW, NOW, 10).await.unwrap(), 1);
    assert_eq!(db.writable_blob(begun).await.unwrap(), None);
    assert_eq!(
        db.writable_blob(committed).await.unwrap(),
        Some(WritableBlob::Open(BlobKind::Artifact))
    );
    assert_eq!(db.abandon_uploads(NOW + 1, NOW, 10).await.unwrap(), 1);
    assert_eq!(place.counts().await, BTreeMap::from([("deleting".to_owned(), 5)]));
    assert_eq!(place.raw.number("SELECT count(*) FROM artifacts").await, 0);
    assert!(db.finalize_candidate(&job, "begun", NOW).await.unwrap().is_none());
}

async fn the_cleaner_empties_and_drops(place: Place) {
    let db = &place.db;
    let (id, blob, object) = place.upload(&attempt(1), "a", NOW).await;
    let kept = place.upload(&attempt(1), "kept", NOW).await.1;
    assert!(db.is_object_in_use(&object.object_key).await.unwrap());
    assert!(!db.is_object_in_use(&ObjectKey::fresh(blob)).await.unwrap());
    // Of a living blob nothing is emptied, dropped or forgotten, whoever asks.
    db.mark_emptied(kept, NOW).await.unwrap();
    db.drop_blobs(&[kept]).await.unwrap();
    assert!(db.readable_blob(kept, NOW).await.unwrap().is_some());
    assert_eq!(place.content(kept).await.len(), 1, "a living blob was emptied");

    assert!(db.delete_artifact(&NewestArtifact { id, blob }, NOW + 5).await.unwrap());
    assert_eq!(db.blobs_to_empty(NOW + 4, 10).await.unwrap(), []);
    assert_eq!(
        db.blobs_to_drop(NOW + 99, 10).await.unwrap(),
        [],
        "it still has objects"
    );
    assert_eq!(db.blobs_to_empty(NOW + 5, 10).await.unwrap(), [blob]);
    assert_eq!(db.blobs_to_empty(NOW + 5, 0).await.unwrap(), []);
    assert!(!db.is_object_in_use(&object.object_key).await.unwrap());
    assert_eq!(db.objects_of(blob).await.unwrap(), [object.object_key]);
    for _ in 0..2 {
        db.mark_emptied(blob, NOW + 6).await.unwrap();
        assert_eq!(db.objects_of(blob).await.unwrap(), []);
        assert_eq!(db.blobs_to_empty(NOW + 99, 10).await.unwrap(), []);
    }
    assert_eq!(db.blobs_to_drop(NOW + 4, 10).await.unwrap(), []);
    assert_eq!(db.blobs_to_drop(NOW + 5, 10).await.unwrap(), [blob]);
    for _ in 0..2 {
        db.drop_blobs(&[kept, blob]).await.unwrap();
        assert_eq!(db.blobs_to_drop(NOW + 99, 10).await.unwrap(), []);
        assert_eq!(
            place.content(kept).await.len(),
            1,
            "a living blob was dropped with a dead one"
        );
    }
    assert_eq!(place.counts().await, BTreeMap::from([("sealed".to_owned(), 1)]));
}

async fn the_cleaner_sweeps_sealed_blobs(place: Place) {
    let db = &place.db;
    let (_, blob, object) = place.upload(&attempt(1), "a", NOW + 5).await;
    assert_eq!(db.blobs_to_sweep(NOW + 4, 10).await.unwrap(), []);
    assert_eq!(db.blobs_to_sweep(NOW + 5, 10).await.unwrap(), [blob]);
    let late = block(blob, 1);
    place.raw.insert_block(blob, "late", &late).await;
    for _ in 0..2 {
        db.mark_swept(blob, NOW + 6).await.unwrap();
        assert_eq!(db.blobs_to_sweep(NOW + 99, 10).await.unwrap(), []);
        assert_eq!(place.garbage().await, keys([&late]));
        assert_eq!(place.objects(blob).await, keys([&object]));
    }
    // Once dead it is to be emptied, although it was swept.
    let newest = db.newest_artifact(&attempt(1), "a", NOW + 6).await.unwrap().unwrap();
    assert!(db.delete_artifact(&newest, NOW + 7).await.unwrap());
    assert_eq!(db.blobs_to_empty(NOW + 7, 10).await.unwrap(), [blob]);
}

async fn a_late_block_does_not_stop_the_cleaner(place: Place) {
    let db = &place.db;
    let blob = place.open_blob().await;
    db.abandon_uploads(NOW, NOW, 10).await.unwrap();
    db.mark_emptied(blob, NOW).await.unwrap();
    // A request that saw the blob open wrote its row only now.
    place.raw.insert_block(blob, "late", &block(blob, 1)).await;
    db.drop_blobs(&[blob]).await.unwrap();
    assert_eq!(place.counts().await, BTreeMap::new());
    assert_eq!(place.raw.number("SELECT count(*) FROM blocks").await, 0);
}

async fn garbage_is_forgotten_when_it_is_gone(place: Place) {
    let (db, blob) = (&place.db, place.open_blob().await);
    let mut replaced = Vec::new();
    for age in 0..3 {
        let block = block(blob, 1);
        assert!(db.stage_block(blob, "x", &block, NOW + age).await.unwrap());
        replaced.push(block.object_key);
    }
    let last = replaced.pop().unwrap();
    assert_eq!(db.garbage(i64::MAX, 10).await.unwrap(), replaced, "oldest first");
    assert_eq!(db.garbage(i64::MAX, 1).await.unwrap(), replaced[..1]);
    for _ in 0..2 {
        db.drop_garbage(&replaced[0]).await.unwrap();
        assert_eq!(db.garbage(i64::MAX, 10).await.unwrap(), replaced[1..]);
    }
    // With the blob goes what it left.
    db.abandon_uploads(NOW, NOW, 10).await.unwrap();
    assert_eq!(db.objects_of(blob).await.unwrap(), [last]);
    db.mark_emptied(blob, NOW).await.unwrap();
    db.drop_blobs(&[blob]).await.unwrap();
    assert_eq!(db.garbage(i64::MAX, 10).await.unwrap(), []);
}

async fn the_scrub_reads_what_was_unread_for_longest(place: Place) {
    let db = &place.db;
    let job = attempt(1);
    let (_, first, _) = place.upload(&job, "first", NOW).await;
    let (_, second, _) = place.upload(&job, "second", NOW + 1).await;
    place.begin(&job, "open", NOW - 9).await;
    let due = async |read_before_ms| db.blob_to_scrub(read_before_ms).await.unwrap().map(|blob| blob.id);
    assert_eq!(due(NOW - 1).await, None, "Finalize has just looked at it");
    assert_eq!(due(NOW).await, Some(first));
    db.mark_scrubbed(first, NOW + 2).await.unwrap();
    assert_eq!(due(NOW).await, None);
    assert_eq!(due(NOW + 9).await, Some(second));
    db.mark_scrubbed(second, NOW + 3).await.unwrap();
    assert_eq!(due(NOW + 9).await, Some(first));
    // As earlier releases left it.
    let blob = place.raw.literal(second.0.as_bytes());
    place
        .raw
        .execute(&format!("UPDATE blobs SET scrubbed_at_ms = 0 WHERE id = {blob}"))
        .await;
    assert_eq!(due(NOW).await, Some(second));
}

const MAIN: &str = "refs/heads/main";

async fn a_cache_key_is_taken_until_it_is_free(place: Place) {
    let job = attempt(1);
    let Reserved::Upload(id, blob) = place.reserve(&job, MAIN, "k", NOW).await else {
        panic!("it is new");
    };
    assert_eq!(place.reserve(&job, MAIN, "k", NOW + LIFE - 1).await, Reserved::Exists);
    for (other, scope, key) in [
        (attempt(1), MAIN, "K"),
        (attempt(1), MAIN, "k "),
        (attempt(1), "refs/heads/mai", "k"),
        (principal("name:octo/other", "1", "build", 1), MAIN, "k"),
    ] {
        assert!(
            matches!(place.reserve(&other, scope, key, NOW).await, Reserved::Upload(..)),
            "{key}"
        );
    }
    // Dead: the next one takes it, and the first one's upload ends.
    let Reserved::Upload(next, _) = place.reserve(&job, MAIN, "k", NOW + LIFE).await else {
        panic!("it is free");
    };
    assert!(next > id);
    assert_eq!(
        place.db.writable_blob(blob).await.unwrap(),
        Some(WritableBlob::Superseded)
    );
    assert!(
        place
            .db
            .cache_candidate(&job, MAIN, Reservation::Id(id))
            .await
            .unwrap()
            .is_none()
    );
    // Final, and then lost.
    let (_, blob) = place.save(MAIN, "saved", 10, NOW).await;
    assert_eq!(
        place.reserve(&job, MAIN, "saved", NOW + 10 * LIFE).await,
        Reserved::Exists
    );
    assert_eq!(place.cached_bytes().await, 10);
    assert!(place.db.is_shown(blob).await.unwrap());
    assert!(place.db.mark_lost(blob).await.unwrap());
    assert!(!place.db.mark_lost(blob).await.unwrap() && !place.db.is_shown(blob).await.unwrap());
    assert_eq!(place.find(MAIN, "saved", "saved").await, None);
    assert!(place.db.readable_blob(blob, NOW).await.unwrap().unwrap().lost);
    assert_eq!(place.cached_bytes().await, 10);
    place.save(MAIN, "saved", 7, NOW).await;
    assert_eq!(place.cached_bytes().await, 7);
    assert!(place.db.readable_blob(blob, NOW).await.unwrap().is_none());
}

async fn of_many_reservations_one_wins(place: Place) {
    let reserving = (0..8).map(|job| {
        let (db, job) = (
            place.db.clone(),
            principal("name:octo/demo", "1", &format!("job-{job}"), 1),
        );
        tokio::spawn(async move {
            let new = NewCacheEntry {
                principal: &job,
                scope: MAIN,
                key: "k",
                version: "1",
                now_ms: NOW,
                dead_since_ms: NOW - LIFE,
            };
            db.reserve_cache_entry(&new).await.unwrap()
        })
    });
    let outcomes = futures_util::future::join_all(reserving).await;
    let won = outcomes
        .into_iter()
        .filter(|outcome| *outcome.as_ref().unwrap() != Reserved::Exists);
    assert_eq!(won.count(), 1);
    assert_eq!(place.counts().await, BTreeMap::from([("staging".to_owned(), 1)]));
}

async fn a_cache_entry_is_found_once_it_is_final(place: Place) {
    let job = attempt(1);
    let Reserved::Upload(id, blob) = place.reserve(&job, MAIN, "k", NOW).await else {
        panic!("it is new");
    };
    let key = Reservation::Key { key: "k", version: "1" };
    let strangers = [
        (principal("name:octo/demo", "2", "build", 1), MAIN),
        (principal("name:octo/other", "1", "build", 1), MAIN),
        (attempt(1), "refs/heads/other"),
    ];
    for (stranger, scope) in &strangers {
        for reservation in [key, Reservation::Id(id)] {
            assert!(
                place
                    .db
                    .cache_candidate(stranger, scope, reservation)
                    .await
                    .unwrap()
                    .is_none()
            );
        }
    }
    let early = place.db.cache_candidate(&job, MAIN, key).await.unwrap().unwrap();
    assert_eq!(
        (early.id, early.finalized, early.blob_state),
        (id, false, Some(BlobState::Staging))
    );
    assert!(!place.db.finalize_cache_entry(&early, NOW).await.unwrap());
    // A block that no list names is nobody's content.
    let listed = place.stage(blob, "listed", 5).await;
    let late = place.stage(blob, "late", 5).await;
    place.commit(blob, &latest(&["listed"])).await.unwrap();
    place.stage(blob, "later", 5).await;
    let candidate = place.db.cache_candidate(&job, MAIN, key).await.unwrap().unwrap();
    place.commit(blob, &latest(&["listed"])).await.unwrap();
    assert!(
        !place.db.finalize_cache_entry(&candidate, NOW).await.unwrap(),
        "another revision"
    );
    assert_eq!(place.find(MAIN, "k", "k").await, None);
    let candidate = place.db.cache_candidate(&job, MAIN, key).await.unwrap().unwrap();
    assert!(place.db.finalize_cache_entry(&candidate, NOW).await.unwrap());
    assert!(!place.db.finalize_cache_entry(&candidate, NOW).await.unwrap());
    assert_eq!(place.content(blob).await, laid_out(&[&listed]));
    assert!(place.garbage().await.contains(&late.object_key));
    assert_eq!(place.db.writable_blob(blob).await.unwrap(), Some(WritableBlob::Sealed));
    let readable = place.db.readable_blob(blob, NOW).await.unwrap().unwrap();
    assert_eq!(
        (readable.name.as_str(), readable.size_bytes, readable.unverified),
        ("k", 5, false)
    );
    assert_eq!(place.db.pending_verifications().await.unwrap(), 0);
    // The newest between two keys, both included.
    place.save(MAIN, "l", 1, NOW + 1).await;
    assert_eq!(place.find(MAIN, "k", "l").await.as_deref(), Some("l"));
    assert_eq!(place.find(MAIN, "k", "kz").await.as_deref(), Some("k"));
    assert_eq!(place.find(MAIN, "K", "Kz").await, None);
    assert_eq!(place.find("refs/heads/other", "a", "z").await, None);
    let sealed = place.db.sealed_blobs(BlobId(Uuid::nil()), 10).await.unwrap();
    assert_eq!(sealed.len(), 2);
    assert_eq!(place.cached_bytes().await, 6);
}

async fn what_changed_is_not_evicted(place: Place) {
    let (used, _) = place.save(MAIN, "used", 10, NOW).await;
    place.save(MAIN, "unused", 10, NOW + 1).await;
    let job = attempt(1);
    let Reserved::Upload(reserved, blob) = place.reserve(&job, MAIN, "reserved", NOW).await else {
        panic!("it is new");
    };
    assert!(place.db.idle_cache_entries(NOW - 1, 10).await.unwrap().is_empty());
    assert!(place.db.dead_reservations(NOW - 1, 10).await.unwrap().is_empty());
    let idle = place.db.idle_cache_entries(NOW + 1, 10).await.unwrap();
    let dead = place.db.dead_reservations(NOW, 10).await.unwrap();
    assert_eq!((idle.len(), dead.len()), (2, 1));
    // One is used and the other one finished while the cleaner thinks about it.
    place.db.touch_cache_entry(used, NOW + 5).await.unwrap();
    place.db.touch_cache_entry(used, NOW + 4).await.unwrap();
    place.db.commit_whole(blob, None, None, NOW).await.unwrap();
    let candidate = place.db.cache_candidate(&job, MAIN, Reservation::Id(reserved)).await;
    assert!(
        place
            .db
            .finalize_cache_entry(&candidate.unwrap().unwrap(), NOW)
            .await
            .unwrap()
    );
    assert_eq!(place.db.evict_cache_entries(&idle, "expired", NOW).await.unwrap(), 1);
    assert_eq!(place.db.evict_cache_entries(&dead, "abandoned", NOW).await.unwrap(), 0);
    assert_eq!(place.db.evict_cache_entries(&idle, "expired", NOW).await.unwrap(), 0);
    for (key, there) in [("used", true), ("unused", false), ("reserved", true)] {
        assert_eq!(place.find(MAIN, key, key).await.is_some(), there, "{key}");
    }
    assert_eq!(place.cached_bytes().await, 10);
    assert_eq!(place.db.blobs_to_empty(NOW, 10).await.unwrap().len(), 1);
}

async fn caches_are_counted(place: Place) {
    for (n, size_bytes) in (0..).zip([10, 20, 30, 40]) {
        place.save(MAIN, &n.to_string(), size_bytes, NOW + n).await;
    }
    assert_eq!(place.cached_bytes().await, 100);
    assert!(place.db.large_caches(100, 10).await.unwrap().is_empty());
    let large = place.db.large_caches(75, 10).await.unwrap();
    assert_eq!((large.len(), large[0].excess_bytes), (1, 25));
    // Enough, and no more than asked for at once.
    let unused = place.db.least_used_cache_entries(large[0], 10).await.unwrap();
    assert_eq!(unused.len(), 2);
    assert_eq!(
        place.db.least_used_cache_entries(large[0], 1).await.unwrap(),
        unused[..1]
    );
    assert_eq!(place.db.evict_cache_entries(&unused, "evicted", NOW).await.unwrap(), 2);
    assert_eq!(place.cached_bytes().await, 70);
    assert!(place.find(MAIN, "2", "2").await.is_some());
    // A wrong count is found and put right.
    place.raw.execute("UPDATE cache_repositories SET size_bytes = 1").await;
    let wrong = place.db.miscounted_caches().await.unwrap();
    assert_eq!((wrong[0].counted_bytes, wrong[0].actual_bytes), (1, 70));
    place.db.recount_cache(wrong[0].repository).await.unwrap();
    assert_eq!(place.cached_bytes().await, 70);
    place
        .raw
        .execute("UPDATE blobs SET state = 'committed' WHERE size_bytes = 30")
        .await;
    assert_eq!(place.db.torn_blobs().await.unwrap().len(), 1);
}

async fn large_ids_fit(place: Place) {
    const LARGEST: i64 = (1 << 53) - 1;
    let job = attempt(1);
    for (n, last) in [i64::from(i32::MAX) + 1, LARGEST - 10].into_iter().enumerate() {
        let sql = match (&place.raw, n) {
            (Raw::Postgres(_), _) => format!("ALTER TABLE artifacts ALTER COLUMN id RESTART WITH {}", last + 1),
            (Raw::Sqlite(_), 0) => format!("INSERT INTO sqlite_sequence (name, seq) VALUES ('artifacts', {last})"),
            (Raw::Sqlite(_), _) => format!("UPDATE sqlite_sequence SET seq = {last} WHERE name = 'artifacts'"),
        };
        place.raw.execute(&sql).await;
        let (id, blob, _) = place.upload(&job, &format!("a{n}"), NOW).await;
        assert!(id.0 > last && id.0 <= LARGEST, "{id}");
        assert_eq!(id.0 as f64 as i64, id.0, "JavaScript keeps it");
        let listed = place.db.list_artifacts(&job, None, Some(id), NOW).await.unwrap();
        assert_eq!(listed[0].id, id);
        assert!(
            place
                .db
                .delete_artifact(&NewestArtifact { id, blob }, NOW)
                .await
                .unwrap()
        );
    }
    // Sizes beyond 32 bits, too.
    let blob = place.begin(&job, "large", NOW).await;
    place.stage(blob, "x", 1 << 40).await;
    place.stage(blob, "y", 1 << 40).await;
    assert_eq!(place.db.staged_bytes(blob).await.unwrap(), 1 << 41);
    place.commit(blob, &latest(&["x", "y"])).await.unwrap();
    assert_eq!(place.candidate(&job, "large").await.size_bytes, 1 << 41);
    assert_eq!(place.content(blob).await[1].0, 1 << 40);
}

// The schema.

/// Every table with its columns in order, each with whether it may be null.
async fn schema(raw: &Raw) -> BTreeMap<String, Vec<(String, bool)>> {
    let rows: Vec<(String, String, bool)> = match raw {
        Raw::Postgres(pool) => sqlx::query_as(
            "SELECT table_name::text, column_name::text, is_nullable = 'YES' FROM information_schema.columns
             WHERE table_schema = 'public' AND table_name <> '_sqlx_migrations' ORDER BY table_name, ordinal_position",
        )
        .fetch_all(pool)
        .await
        .unwrap(),
        // The columns of a primary key are never null in a strict table, whether or not it says so.
        Raw::Sqlite(pool) => sqlx::query_as(
            "SELECT t.name, c.name, c.\"notnull\" = 0 AND c.pk = 0 FROM sqlite_master t, pragma_table_info(t.name) c
             WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND t.name <> '_sqlx_migrations'
             ORDER BY t.name, c.cid",
        )
        .fetch_all(pool)
        .await
        .unwrap(),
    };
    let mut tables = BTreeMap::<_, Vec<_>>::new();
    for (table, column, nullable) in rows {
        tables.entry(table).or_default().push((column, nullable));
    }
    tables
}

#[tokio::test]
async fn both_databases_have_one_schema() {
    let sqlite = schema(&Place::sqlite().await.raw).await;
    let postgres = schema(&Place::postgres().await.raw).await;
    assert!(
        ["artifacts", "blobs", "blocks", "garbage", "leases", "properties"]
            .iter()
            .all(|table| sqlite.contains_key(*table)),
        "{sqlite:?}"
    );
    assert_eq!(sqlite, postgres);
}

#[tokio::test]
async fn postgres_connections_let_go_and_promise_what_is_relied_on() {
    let url = postgres_database().await;
    let raw = PgPool::connect(&url).await.unwrap();
    let database = url.rsplit('/').next().unwrap();
    let expected = [
        ("statement_timeout", "10s"),
        ("lock_timeout", "3s"),
        ("idle_in_transaction_session_timeout", "15s"),
        ("synchronous_commit", "on"),
        ("default_transaction_isolation", "read committed"),
    ];
    // Whatever the database's owner prefers.
    for (name, other) in expected.map(|(name, _)| (name, if name.ends_with("timeout") { "'0'" } else { "off" })) {
        let other = if name.ends_with("isolation") {
            "serializable"
        } else {
            other
        };
        let prefer = format!("ALTER DATABASE {database} SET {name} = {other}");
        sqlx::query(AssertSqlSafe(prefer)).execute(&raw).await.unwrap();
    }
    let Db::Postgres(pool) = connect(&url, &tempfile::tempdir().unwrap()).await else {
        panic!("not Postgres");
    };
    for (name, value) in expected {
        let set: String = sqlx::query_scalar(AssertSqlSafe(format!("SHOW {name}")))
            .fetch_one(&pool)
            .await
            .unwrap();
        assert_eq!(set, value, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_may_migrate_at_once() {
    let url = postgres_database().await;
    let migrating: Vec<_> = (0..6)
        .map(|_| {
            let url = url.clone();
            tokio::spawn(async move { Place::migrated(url).await.db.property("any").await.unwrap() })
        })
        .collect();
    for replica in migrating {
        assert_eq!(replica.await.unwrap(), None);
    }
}

#[tokio::test]
async fn processes_on_one_directory_may_migrate_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let environment = Environment::embedded(directory.path());
    let running: Vec<_> = (0..4)
        .map(|_| environment.command(&["migrate"]).spawn().unwrap())
        .collect();
    for process in running {
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let db = connect("", &directory).await;
    assert_eq!(db.property("any").await.unwrap(), None);
}

async fn a_newer_schema_is_refused(place: Place) {
    place.db.migrate().await.unwrap();
    place
        .raw
        .execute(&format!(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             VALUES (9999, 'of a later release', TRUE, {}, 0)",
            place.raw.literal(&[0; 48])
        ))
        .await;
    assert_eq!(
        place.db.migrate().await.unwrap_err(),
        "the database has schema version 9999, which is newer than this program knows; run the newer release"
    );
}
