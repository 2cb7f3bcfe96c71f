//! How cost grows: what a request and an idle cleaner ask of the database costs with many artifacts what it costs with
//! few. What the databases do for it is counted, not timed; times are for people, in the long run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use secrecy::SecretString;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use wharfinger::db::{
    ChunkSums, Created, Db, Encoding, Lane, Lent, ListEntry, ListSource, NewArtifact, NewCacheEntry, NewChunk,
    Reservation, Reserved, Sealing, Settings, Staged, WantedKeys,
};
use wharfinger::model::{BlobId, Block, ObjectKey, Principal, RunKey, Sha256};

use crate::db_contract::Raw;

/// By this time all that the tests fill in has happened, and nothing of it is due.
const NOW: i64 = 1_700_000_000_000;
/// By this time it was not there yet.
const BEFORE: i64 = NOW - 10_000;
const PER_RUN: i64 = 10;
const PER_REPOSITORY: i64 = 1_000;

// Filling.

/// What a filled-in row is the rest of.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Shown,
    Unswept,
    Unverified,
    Open,
    Dead,
    Emptied,
}

impl Fate {
    /// The blob's `state`, `verification` and `cleaned_at_ms`, and its artifact's `state`, if it has one.
    fn columns(self) -> (&'static str, &'static str, &'static str, Option<&'static str>) {
        match self {
            Self::Shown => ("sealed", "verified", "t", Some("finalized")),
            Self::Unswept => ("sealed", "verified", "NULL", Some("finalized")),
            Self::Unverified => ("sealed", "pending", "t", Some("finalized")),
            Self::Open => ("staging", "none", "NULL", Some("pending")),
            Self::Dead => ("deleting", "verified", "NULL", None),
            Self::Emptied => ("deleting", "verified", "t", None),
        }
    }
}

/// Number `i` of the filled-in blobs. Their ids are in the order of time, as the product's.
fn blob(i: i64) -> BlobId {
    BlobId(
        format!("{:08x}-{:04x}-7000-8000-000000000000", i >> 16, i & 0xffff)
            .parse()
            .expect("a UUID"),
    )
}

/// The same in SQL, as text and as the column has it.
fn blob_in_sql(raw: &Raw) -> (&'static str, &'static str) {
    match raw {
        Raw::Postgres(_) => (
            "lpad(to_hex(i >> 16), 8, '0') || '-' || lpad(to_hex(i & 65535), 4, '0') || '-7000-8000-000000000000'",
            "CAST(hex AS UUID)",
        ),
        Raw::Sqlite(_) => (
            "printf('%08x-%04x-7000-8000-000000000000', i >> 16, i & 65535)",
            "unhex(hex, '-')",
        ),
    }
}

fn key(i: i64) -> ObjectKey {
    ObjectKey::parse(&format!("blobs/{0}/{0}", blob(i))).expect("a key")
}

/// A job that may see number `i`.
fn reader(i: i64) -> Principal {
    Principal {
        run: RunKey {
            issuer: "wharfinger".to_owned(),
            repository: format!("octo/{}", i / PER_REPOSITORY),
            run_backend_id: format!("run-{}", i / PER_RUN),
        },
        repository_name: None,
        run_id: None,
        run_attempt: 1,
        job_backend_id: "build".to_owned(),
        cache_scopes: Vec::new(),
        issued_at_ms: None,
        expires_at_ms: i64::MAX,
    }
}

fn name(i: i64) -> String {
    format!("artifact-{i}")
}

/// Puts in numbers `from..=to`, of one byte each, all as of the time `at_ms`.
async fn fill(raw: &Raw, from: i64, to: i64, at_ms: i64, fate: Fate) {
    let (state, verification, cleaned, artifact) = fate.columns();
    let (hex, id) = blob_in_sql(raw);
    let numbers = format!(
        "WITH RECURSIVE numbers(i) AS (
             SELECT CAST({from} AS BIGINT) UNION ALL SELECT i + 1 FROM numbers WHERE i < {to}),
         n AS (SELECT i, {hex} AS hex, CAST({at_ms} AS BIGINT) AS t FROM numbers)"
    );
    let hash = raw.literal(&[7; 32]);
    let mut texts = vec![format!(
        "{numbers} INSERT INTO blobs (id, kind, state, revision, size_bytes, content_type, sha256, verification,
             verify_lease_until_ms, created_at_ms, changed_at_ms, cleaned_at_ms, scrubbed_at_ms)
         SELECT {id}, 'artifact', '{state}', 1, 1, 'application/zip', {hash}, '{verification}', t + 1, t, t,
             {cleaned}, t FROM n"
    )];
    if !matches!(fate, Fate::Emptied) {
        let start = if matches!(fate, Fate::Open) { "NULL" } else { "0" };
        texts.push(format!(
            "{numbers} INSERT INTO blocks (blob_id, block_id, object_key, size_bytes, crc64, start_offset)
             SELECT {id}, 'AAAA', 'blobs/' || hex || '/' || hex, 1, 0, {start} FROM n"
        ));
    }
    if let Some(state) = artifact {
        texts.push(format!(
            "{numbers} INSERT INTO artifacts (issuer, repository, run_backend_id, name, run_attempt, job_backend_id,
                 version, mime_type, state, blob_id, created_at_ms, finalized_at_ms, expires_at_ms)
             SELECT 'wharfinger', 'octo/' || (i / {PER_REPOSITORY}), 'run-' || (i / {PER_RUN}), 'artifact-' || i, 1,
                 'build', 7, 'application/zip', '{state}', {id}, t, t, t + 1000000000000 FROM n"
        ));
    }
    for text in texts {
        raw.execute(&text).await;
    }
    match raw {
        // What autovacuum does in time.
        Raw::Postgres(_) => raw.execute("VACUUM ANALYZE").await,
        Raw::Sqlite(_) => raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").await,
    }
}

/// Puts in finalized cache entries `from..=to` of one byte each, of a thousand repositories' `scope`, or all of the
/// first repository's.
async fn fill_caches(raw: &Raw, from: i64, to: i64, at_ms: i64, scope: &str, spread: bool) {
    let (hex, id) = blob_in_sql(raw);
    let repository = if spread { "(i % 1000)" } else { "0" };
    let numbers = format!(
        "WITH RECURSIVE numbers(i) AS (
             SELECT CAST({from} AS BIGINT) UNION ALL SELECT i + 1 FROM numbers WHERE i < {to}),
         n AS (SELECT i, {hex} AS hex, CAST({at_ms} AS BIGINT) AS t, 'octo/' || {repository} AS repository FROM numbers)"
    );
    for text in [
        format!(
            "{numbers} INSERT INTO blobs (id, kind, state, revision, size_bytes, verification, verify_lease_until_ms,
                 created_at_ms, changed_at_ms, cleaned_at_ms, scrubbed_at_ms)
             SELECT {id}, 'cache', 'sealed', 1, 1, 'none', 0, t, t, t, t FROM n"
        ),
        format!(
            "{numbers} INSERT INTO cache_repositories (issuer, repository, size_bytes)
             SELECT DISTINCT 'wharfinger', repository, 0 FROM n WHERE TRUE ON CONFLICT DO NOTHING"
        ),
        format!(
            "{numbers} INSERT INTO cache_entries (repository_id, scope, version, key, state, blob_id, size_bytes,
                 run_backend_id, job_backend_id, created_at_ms, finalized_at_ms, last_used_at_ms)
             SELECT r.id, '{scope}', '1', 'key-' || i, 'finalized', {id}, 1, '1', 'build', t, t, t
             FROM n JOIN cache_repositories r ON r.issuer = 'wharfinger' AND r.repository = n.repository"
        ),
    ] {
        raw.execute(&text).await;
    }
    match raw {
        Raw::Postgres(_) => raw.execute("VACUUM ANALYZE").await,
        Raw::Sqlite(_) => raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").await,
    }
}

/// The job that fills a container.
fn filler() -> Principal {
    let mut job = reader(15);
    job.run.run_backend_id = "run-of-files".to_owned();
    job
}

fn new_container<'a>(job: &'a Principal, name: &'a str) -> NewArtifact<'a> {
    NewArtifact {
        principal: job,
        name,
        version: 3,
        mime_type: None,
        created_at_ms: NOW,
        expires_at_ms: NOW + 1_000,
        max_per_job: Some(1_000),
        max_pending_per_run: Some(1_000),
    }
}

/// Puts files `from..=to` of one chunk into a container.
async fn fill_files(raw: &Raw, container: BlobId, from: i64, to: i64) {
    let id = raw.literal(container.0.as_bytes());
    let file = match raw {
        Raw::Postgres(_) => "CAST(lpad(to_hex(i), 32, '0') AS UUID)",
        Raw::Sqlite(_) => "unhex(printf('%032x', i))",
    };
    let tail = raw.literal(&[0; 8]);
    let numbers =
        format!("WITH RECURSIVE n(i) AS (SELECT CAST({from} AS BIGINT) UNION ALL SELECT i + 1 FROM n WHERE i < {to})");
    for text in [
        format!(
            "{numbers} INSERT INTO files (id, container_id, path, uploader, encoding, length_bytes, total_bytes,
                 received_bytes, chunk_count, revision, completed_at_ms)
             SELECT {file}, {id}, 'file-' || i, '', 'identity', 1, 1, 1, 1, 0, {NOW} FROM n"
        ),
        format!(
            "{numbers} INSERT INTO chunks (file_id, file_offset, block_id, crc32, tail, core_crc64)
             SELECT {file}, 0, 'chunk-' || i, 0, {tail}, 0 FROM n"
        ),
        format!(
            "{numbers} INSERT INTO blocks (blob_id, block_id, object_key, size_bytes, crc64)
             SELECT {id}, 'chunk-' || i, '{}', 1, 0 FROM n",
            key(300_000)
        ),
    ] {
        raw.execute(&text).await;
    }
    match raw {
        Raw::Postgres(_) => raw.execute("VACUUM ANALYZE").await,
        Raw::Sqlite(_) => raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").await,
    }
}

/// Counts all repositories' caches.
const COUNT_CACHES: &str = "UPDATE cache_repositories SET size_bytes = (
    SELECT CAST(coalesce(sum(e.size_bytes), 0) AS BIGINT) FROM cache_entries e WHERE e.repository_id = cache_repositories.id)";

// Counting.

/// Counts what a database does for a [`Db`].
enum Meter {
    /// Steps of the virtual machine, at least each of its loops.
    Sqlite(Arc<AtomicU64>),
    /// Rows and entries of indexes that are read. The first is the one connection of the `Db`.
    Postgres(PgPool, PgPool),
}

impl Meter {
    async fn new(db: &Db, raw: &Raw) -> Self {
        match (db, raw) {
            (Db::Sqlite(sqlite), _) => {
                let steps = Arc::new(AtomicU64::new(0));
                // What is given back last is lent first: one of each kind is all that one caller gets.
                for lane in [Lane::Reading, Lane::Durable, Lane::Staging] {
                    count_steps(&sqlite.lend(lane).await.unwrap(), &steps);
                }
                Self::Sqlite(steps)
            }
            (Db::Postgres(pool), Raw::Postgres(raw)) => Self::Postgres(pool.clone(), raw.clone()),
            (Db::Postgres(_), Raw::Sqlite(_)) => panic!("two databases"),
        }
    }

    async fn read(&self) -> u64 {
        match self {
            Self::Sqlite(steps) => steps.load(Ordering::Relaxed),
            Self::Postgres(session, raw) => {
                // Or they would tell what they did only a second later, and the filling would count as asking.
                for session in [session, raw] {
                    sqlx::query("SELECT pg_stat_force_next_flush()")
                        .execute(session)
                        .await
                        .unwrap();
                }
                let read: i64 = sqlx::query_scalar(
                    "SELECT CAST((SELECT sum(seq_tup_read) FROM pg_stat_user_tables)
                         + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes) AS BIGINT)",
                )
                .fetch_one(raw)
                .await
                .unwrap();
                read.cast_unsigned()
            }
        }
    }

    async fn cost<T>(&self, asking: impl Future<Output = T>) -> (u64, T) {
        let before = self.read().await;
        let answer = asking.await;
        (self.read().await - before, answer)
    }
}

fn count_steps(lent: &Lent, steps: &Arc<AtomicU64>) {
    let steps = Arc::clone(steps);
    let count = move || {
        steps.fetch_add(1, Ordering::Relaxed);
        // Go on.
        false
    };
    lent.connection().unwrap().progress_handler(1, Some(count)).unwrap();
}

/// The cost of everything that is asked often. No two with one `number`.
async fn costs(db: &Db, meter: &Meter, number: i64, long_blob: BlobId) -> BTreeMap<&'static str, u64> {
    let mut costs = BTreeMap::new();
    macro_rules! cost {
        ($method:ident ( $($argument:expr),* ) $as:literal) => {{
            let (cost, answer) = meter.cost(db.$method($($argument),*)).await;
            costs.insert($as, cost);
            answer.unwrap()
        }};
        ($method:ident ( $($argument:expr),* )) => { cost!($method($($argument),*) (stringify!($method))) };
        ($method:ident ( $($argument:expr),* ) ($as:expr)) => {{
            let (cost, answer) = meter.cost(db.$method($($argument),*)).await;
            costs.insert($as, cost);
            answer.unwrap()
        }};
    }
    // An upload.
    let mut job = reader(15);
    job.run.run_backend_id = "run-of-the-test".to_owned();
    job.run_attempt = i32::try_from(number).unwrap();
    let new = NewArtifact {
        principal: &job,
        name: "new",
        version: 7,
        mime_type: None,
        created_at_ms: BEFORE,
        expires_at_ms: NOW + 1,
        max_per_job: Some(1),
        max_pending_per_run: Some(1_000),
    };
    let Created::Upload(uploaded) = cost!(create_artifact(&new)) else {
        panic!("it is new");
    };
    let fresh = || Block {
        object_key: ObjectKey::fresh(uploaded),
        object_offset: 0,
        size_bytes: 1,
        crc64: 0,
    };
    let list = [ListEntry {
        block_id: "AAAA".to_owned(),
        from: ListSource::Latest,
    }];
    assert!(cost!(stage_block(uploaded, "AAAA", &fresh(), BEFORE)));
    assert!(cost!(stage_block(uploaded, "AAAA", &fresh(), BEFORE) "stage_block again"));
    cost!(writable_blob(uploaded));
    cost!(staged_bytes(uploaded));
    let blocks = cost!(listed_blocks(uploaded, &list));
    cost!(commit_block_list(uploaded, &list, &blocks, None, BEFORE));
    cost!(commit_whole(uploaded, Some(&fresh()), None, BEFORE));
    let candidate = cost!(finalize_candidate(&job, "new", BEFORE)).unwrap();
    assert!(cost!(finalize_artifact(
        &candidate,
        Sealing::Pending(Some(Sha256([7; 32]))),
        BEFORE
    )));
    assert_eq!(cost!(claim_verification(BEFORE, BEFORE)).unwrap().blob, uploaded);
    assert!(cost!(extend_verification(uploaded, BEFORE)));
    cost!(pass_verification(uploaded, &Sha256([7; 32])));
    // A download.
    let job_of_run = reader(15);
    assert_eq!(
        cost!(list_artifacts(&job_of_run, Some("artifact-15"), None, NOW) "list a name").len(),
        1
    );
    assert_eq!(
        cost!(list_artifacts(&job_of_run, None, None, NOW) "list a run").len(),
        10
    );
    let listed = cost!(list_artifacts(&job, None, Some(candidate.id), NOW) "list an id");
    assert_eq!(listed.len(), 1);
    assert!(cost!(newest_artifact(&job_of_run, "artifact-15", NOW)).is_some());
    assert!(cost!(readable_blob(blob(15), NOW)).is_some());
    assert_eq!(cost!(content_blocks(long_blob, 999_999, 1_000_000)).len(), 1);
    let newest = db.newest_artifact(&job, "new", BEFORE).await.unwrap().unwrap();
    assert!(cost!(delete_artifact(&newest, BEFORE)));
    // Files of a container that has many.
    let job = filler();
    let name = format!("files-{number}");
    cost!(open_container(&new_container(&job, &name)));
    let Created::Upload(id) = cost!(open_container(&new_container(&job, "files")) "open_container again") else {
        panic!("it may be joined");
    };
    let container = cost!(container(&job, id, NOW)).unwrap().blob;
    let sums = ChunkSums {
        crc32: 0,
        tail: Vec::new(),
        core_crc64: 0,
        header_bytes: None,
    };
    let block = Block {
        object_key: ObjectKey::fresh(container),
        object_offset: 0,
        size_bytes: 1,
        crc64: 0,
    };
    let new = NewChunk {
        container,
        path: &name,
        job_backend_id: "build",
        encoding: Encoding::Identity,
        length_bytes: 1,
        total_bytes: 1,
        file_offset: 0,
        block: Some(&block),
        sums: &sums,
        max_files: 1_000_000,
        max_chunks: 1,
        now_ms: NOW,
    };
    assert_eq!(cost!(stage_chunk(&new)), Staged::Done);
    let newer = Block {
        object_key: ObjectKey::fresh(container),
        ..block
    };
    let again = NewChunk {
        block: Some(&newer),
        ..new
    };
    assert_eq!(
        cost!(stage_chunk(&again) "stage_chunk of a file that is there"),
        Staged::Done
    );
    assert!(cost!(file(container, &name)).is_some());
    assert_eq!(cost!(chunks(container, &name, &name)).len(), 1);
    assert_eq!(cost!(files(container, "file-15", 1)).len(), 1);
    let publication = cost!(publication(&job, "files", NOW)).unwrap();
    assert!(!cost!(is_outdated(&publication)));
    let (zip, given_up) = (BlobId::fresh(), BlobId::fresh());
    cost!(begin_zip(zip, NOW));
    cost!(add_content(zip, &[(0, newer.clone())]));
    assert!(cost!(publish(&publication, zip, 1, 1, NOW)));
    db.pass_verification(zip, &Sha256([7; 32])).await.unwrap();
    db.begin_zip(given_up, NOW).await.unwrap();
    cost!(discard_zip(given_up, NOW));
    // A cache.
    let main = "refs/heads/main";
    let new_key = format!("new-{number}");
    let new = NewCacheEntry {
        principal: &job_of_run,
        scope: main,
        key: &new_key,
        version: "1",
        now_ms: NOW,
        dead_since_ms: BEFORE,
    };
    let Reserved::Upload(_, cached) = cost!(reserve_cache_entry(&new)) else {
        panic!("it is new");
    };
    assert_eq!(
        cost!(reserve_cache_entry(&new) "reserve_cache_entry again"),
        Reserved::Exists
    );
    db.commit_whole(cached, None, None, NOW).await.unwrap();
    let key = Reservation::Key {
        key: &new_key,
        version: "1",
    };
    let candidate = cost!(cache_candidate(&job_of_run, main, key)).unwrap();
    assert!(cost!(cache_candidate(&job_of_run, main, Reservation::Id(candidate.id)) "cache_candidate by id").is_some());
    assert!(cost!(finalize_cache_entry(&candidate, NOW)));
    let wanted = |low: &'static str, high: &'static str| {
        ["refs/heads/feature", main].map(|scope| WantedKeys { scope, low, high })
    };
    let run = &job_of_run.run;
    let exact = wanted("key-1000000", "key-1000000");
    let found = cost!(find_cache_entry(run, &exact, "1") "find_cache_entry");
    assert_eq!(found.as_ref().map(|found| found.key.as_str()), Some("key-1000000"));
    let by_prefix = wanted("key-100", "key-100\u{10ffff}");
    assert!(cost!(find_cache_entry(run, &by_prefix, "1") "find_cache_entry by prefix").is_some());
    assert!(cost!(find_cache_entry(run, &wanted("l", "l\u{10ffff}"), "1") "find_cache_entry of none").is_none());
    // So that it is not the least used of all.
    cost!(touch_cache_entry(found.unwrap().id, NOW + number));
    assert!(cost!(readable_blob(cached, NOW) "readable_blob of a cache").is_some());
    assert!(cost!(dead_reservations(BEFORE, 500)).is_empty());
    assert!(cost!(idle_cache_entries(BEFORE, 500)).is_empty());
    assert!(cost!(large_caches(1_000_000_000, 500)).is_empty());
    let largest = db.large_caches(0, 1).await.unwrap()[0];
    let unused = cost!(least_used_cache_entries(largest, 1));
    assert_eq!(cost!(evict_cache_entries(&unused, "evicted", NOW)), 1);
    // The cleaner, with one tombstone and garbage to take away.
    assert_eq!(cost!(expire_artifacts(NOW, 500)), 0);
    assert_eq!(cost!(abandon_uploads(BEFORE, NOW, 500)), 0);
    assert_eq!(cost!(blobs_to_sweep(BEFORE, 500)), []);
    assert_eq!(cost!(containers_to_sweep(BEFORE, 500)), []);
    cost!(mark_container_swept(container, NOW));
    assert_eq!(cost!(blobs_to_empty(NOW - 1, 500)), [uploaded]);
    let objects = cost!(objects_of(uploaded));
    assert!(!cost!(is_object_in_use(&objects[0])));
    cost!(mark_emptied(uploaded, BEFORE));
    assert_eq!(cost!(blobs_to_drop(BEFORE, 500)), [uploaded]);
    cost!(drop_blobs(&[uploaded]));
    cost!(garbage(NOW, 500));
    cost!(take_lease("lease", uploaded.0, number, number));
    cost!(claim_verification(NOW, NOW) "claim_verification of none");
    cost!(pending_verifications());
    // The scrub.
    assert!(cost!(blob_to_scrub(NOW - 1)).is_none());
    cost!(mark_scrubbed(blob(15), NOW));
    costs
}

/// What became dearer than at first, by more than what dead rows that nobody vacuumed yet add. Thousands were added.
fn grown(few: &BTreeMap<&'static str, u64>, many: &BTreeMap<&'static str, u64>) -> Vec<String> {
    few.iter()
        .filter(|&(asked, &few)| many[asked] > few + few / 4 + 50)
        .map(|(asked, few)| format!("{asked}: {few} -> {}", many[asked]))
        .collect()
}

async fn nothing_costs_more_with_more_rows(url: String) {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings {
        url: SecretString::from(url.as_str()),
        // So that the meter asks the one that did it.
        max_connections: 1,
    };
    let db = Db::connect(&settings, directory.path(), None, true).await.unwrap();
    db.migrate().await.unwrap();
    let raw = if url.is_empty() {
        Raw::connect(&url, directory.path()).await
    } else {
        // One connection, which the meter can ask; and nobody else who reads rows.
        let raw = Raw::Postgres(PgPoolOptions::new().max_connections(1).connect(&url).await.unwrap());
        for table in [
            "artifacts",
            "blobs",
            "blocks",
            "cache_entries",
            "cache_repositories",
            "chunks",
            "containers",
            "files",
            "garbage",
        ] {
            raw.execute(&format!("ALTER TABLE {table} SET (autovacuum_enabled = false)"))
                .await;
        }
        raw
    };
    let meter = Meter::new(&db, &raw).await;
    // A blob of a thousand blocks, to read the last of.
    let long_blob = blob(100_000);
    fill(&raw, 100_000, 100_000, NOW, Fate::Shown).await;
    let id = raw.literal(long_blob.0.as_bytes());
    for block in 1..1000 {
        raw.execute(&format!(
            "INSERT INTO blocks (blob_id, block_id, object_key, size_bytes, crc64, start_offset)
             VALUES ({id}, '{block}', '{}', 1000, 0, {})",
            key(100_000),
            block * 1000
        ))
        .await;
    }
    // Emptied long ago, but not long enough to be dropped.
    let under_way = [
        (Fate::Unswept, 200_000, NOW),
        (Fate::Unverified, 210_000, NOW),
        (Fate::Open, 220_000, NOW),
        (Fate::Dead, 230_000, NOW),
        (Fate::Emptied, 240_000, NOW - 5_000),
    ];
    for (fate, from, at_ms) in under_way {
        fill(&raw, from, from + 99, at_ms, fate).await;
    }
    fill(&raw, 1, 2_000, NOW, Fate::Shown).await;
    fill_caches(&raw, 1_000_000, 1_001_999, NOW, "refs/heads/main", true).await;
    raw.execute(COUNT_CACHES).await;
    let Created::Upload(files) = db.open_container(&new_container(&filler(), "files")).await.unwrap() else {
        panic!("it is new");
    };
    let container = db.container(&filler(), files, NOW).await.unwrap().unwrap().blob;
    fill_files(&raw, container, 1, 2_000).await;
    // The first time, statements are prepared.
    costs(&db, &meter, 1, long_blob).await;
    let mut few = costs(&db, &meter, 2, long_blob).await;
    assert!(
        few["content_blocks"] < 100,
        "blocks before the window are read: {few:?}"
    );

    fill(&raw, 2_001, 20_000, NOW, Fate::Shown).await;
    fill_caches(&raw, 2_000_000, 2_005_000, NOW, "refs/heads/other", false).await;
    fill_caches(&raw, 3_000_001, 3_000_999, NOW, "refs/heads/feature", true).await;
    raw.execute(COUNT_CACHES).await;
    fill_files(&raw, container, 2_001, 20_000).await;
    costs(&db, &meter, 3, long_blob).await;
    let many = costs(&db, &meter, 4, long_blob).await;
    assert_eq!(grown(&few, &many), [""; 0], "with more that is finalized: {few:?}");

    for (fate, from, at_ms) in under_way {
        fill(&raw, from + 100, from + 2_099, at_ms, fate).await;
    }
    costs(&db, &meter, 5, long_blob).await;
    let mut more = costs(&db, &meter, 6, long_blob).await;
    for uncounted in [
        // It counts them.
        "pending_verifications",
        // Postgres may look through all chunks of the container for those of a file that is replaced: it takes the two
        // indexes that begin with the container for equally good. See "How cost grows" in docs/performance.md.
        "stage_chunk of a file that is there",
    ] {
        more.remove(uncounted);
        few.remove(uncounted);
    }
    assert_eq!(grown(&few, &more), [""; 0], "with more that is under way: {few:?}");

    // A step of the cleaner's, before Postgres' statistics know how much is due.
    let mut steps = Vec::new();
    for due in [500, 10_000] {
        raw.execute(&format!(
            "UPDATE artifacts SET expires_at_ms = {BEFORE} WHERE id <= {due}"
        ))
        .await;
        let (cost, expired) = meter.cost(db.expire_artifacts(NOW, 50)).await;
        assert_eq!(expired.unwrap(), 50);
        steps.push(cost);
    }
    assert!(
        steps[1] < 5 * steps[0],
        "with twenty times as much that is due: {steps:?}"
    );
    drop(meter);
    db.close().await;
}

mod sqlite {
    #[tokio::test]
    async fn nothing_costs_more_with_more_rows() {
        super::nothing_costs_more_with_more_rows(String::new()).await;
    }
}

mod postgres {
    #[tokio::test]
    async fn nothing_costs_more_with_more_rows() {
        super::nothing_costs_more_with_more_rows(crate::common::postgres_database().await).await;
    }
}

/// What `make bench` does not do on Postgres, and figures for people: how long it takes with a thousand artifacts and
/// with a million, and while ten thousand of those expire.
mod long {
    use std::io::Write;
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    use bytes::Bytes;
    use futures_util::{StreamExt, stream};
    use secrecy::ExposeSecret;
    use wharfinger::service::Services;
    use wharfinger::service::artifacts::Request;

    use super::*;
    use crate::common::{Backend, TestServer};
    use crate::faults::is_long_run;

    const FEW: i64 = 1_000;
    const MANY: i64 = 1_000_000;
    const EXPIRED: i64 = 10_000;
    /// Of each kind of call; taken in turns, so that what else the machine does meets both sizes.
    const ROUNDS: i64 = 40;
    const CALLS_A_ROUND: i64 = 50;
    const FOREGROUND: usize = 2;

    /// Past libtest, which keeps what a passing test prints to itself.
    fn say(what: &str) {
        let _ = writeln!(std::io::stderr(), "{what}");
    }

    /// How long calls of each kind took.
    type Times = BTreeMap<&'static str, Vec<Duration>>;

    fn quantile_us(times: &[Duration], quantile: f64) -> u128 {
        let mut times = times.to_vec();
        times.sort();
        let rank = (times.len() as f64 * quantile) as usize;
        times
            .get(rank.min(times.len().saturating_sub(1)))
            .map_or(0, Duration::as_micros)
    }

    fn described(times: &Times) -> String {
        let kinds = times.iter().map(|(kind, times)| {
            let (p50, p99) = (quantile_us(times, 0.5), quantile_us(times, 0.99));
            format!("\n    {kind}: p50 {p50} us, p99 {p99} us, n {}", times.len())
        });
        kinds.collect()
    }

    async fn filled(backend: Backend, count: i64) -> (TestServer, Raw) {
        let server = TestServer::start_with(backend, |config| {
            if backend == Backend::PostgresS3 {
                // It is not the S3 of the tests that is measured.
                config.storage.url = "memory://".to_owned();
            }
        })
        .await;
        let data_dir = &server.config.data_dir;
        let raw = Raw::connect(server.config.database.url.expose_secret(), data_dir).await;
        let begun = Instant::now();
        let now_ms = server.clock.load(Ordering::Relaxed);
        fill(&raw, 1, count, now_ms, Fate::Shown).await;
        say(&format!(
            "  {count} filled in within {:.1} s",
            begun.elapsed().as_secs_f64()
        ));
        (server, raw)
    }

    /// Requests as jobs make them, for artifacts all over the database, and idle passes of the cleaner.
    async fn calls(services: &Services, count: i64, round: i64, times: &mut Times) {
        macro_rules! timed {
            ($kind:literal, $call:expr) => {{
                let begun = Instant::now();
                let answer = $call.await.unwrap();
                times.entry($kind).or_default().push(begun.elapsed());
                answer
            }};
        }
        for call in 0..CALLS_A_ROUND {
            let i = (round * CALLS_A_ROUND + call) * 7_919 % (count - PER_RUN) + PER_RUN;
            let job = reader(i);
            let listed = timed!("list a name", services.list_artifacts(&job, Some(&name(i)), None));
            assert_eq!(listed.len(), 1);
            timed!("list a run of ten", services.list_artifacts(&job, None, None));
            timed!("sign a link", services.artifact_link(&job, &name(i)));
            let new = format!("new-{round}-{call}");
            timed!("create", services.create_artifact(&job, &request(&new)));
        }
        assert!(timed!("a cleaner's pass", services.clean()).is_some());
    }

    fn request(name: &str) -> Request<'_> {
        Request {
            name,
            version: 7,
            mime_type: None,
            expires_at_ms: None,
        }
    }

    async fn sizes_compared(backend: Backend) -> (TestServer, Raw) {
        say(&format!("{backend:?}:"));
        let (small, _small_raw) = filled(backend, FEW).await;
        let (large, large_raw) = filled(backend, MANY).await;
        let (mut few, mut many) = (Times::new(), Times::new());
        for round in 0..ROUNDS {
            if round == 1 {
                // Connections were opened and statements prepared.
                (few, many) = (Times::new(), Times::new());
            }
            calls(&small.app.services, FEW, round, &mut few).await;
            calls(&large.app.services, MANY, round, &mut many).await;
        }
        say(&format!(
            "  among {FEW}:{}\n  among {MANY}:{}",
            described(&few),
            described(&many)
        ));
        small.stop().await;
        (large, large_raw)
    }

    /// Calls until it is told to stop.
    async fn foreground(services: Services, worker: usize, label: usize, done: Arc<AtomicBool>) -> Times {
        let mut times = Times::new();
        for call in 0_i64.. {
            if done.load(Ordering::Relaxed) {
                break;
            }
            let i = (call + 31 * i64::try_from(worker).unwrap()) * 7_919 % (MANY / 2) + MANY / 2;
            let begun = Instant::now();
            assert_eq!(
                services
                    .list_artifacts(&reader(i), Some(&name(i)), None)
                    .await
                    .unwrap()
                    .len(),
                1
            );
            times.entry("list a name").or_default().push(begun.elapsed());
            let new = format!("busy-{label}-{worker}-{call}");
            let begun = Instant::now();
            services.create_artifact(&reader(i), &request(&new)).await.unwrap();
            times.entry("create").or_default().push(begun.elapsed());
        }
        times
    }

    /// Some work with calls beside it.
    async fn beside<T>(server: &TestServer, label: usize, what: &str, work: impl Future<Output = T>) -> T {
        let done = Arc::new(AtomicBool::new(false));
        let calling: Vec<_> = (0..FOREGROUND)
            .map(|worker| {
                tokio::spawn(foreground(
                    server.app.services.clone(),
                    worker,
                    label,
                    Arc::clone(&done),
                ))
            })
            .collect();
        let begun = Instant::now();
        let answer = work.await;
        let wall = begun.elapsed();
        done.store(true, Ordering::Relaxed);
        let mut times = Times::new();
        for worker in calling {
            for (kind, more) in worker.await.unwrap() {
                times.entry(kind).or_default().extend(more);
            }
        }
        say(&format!("  {what}: {:.2} s{}", wall.as_secs_f64(), described(&times)));
        answer
    }

    async fn growth(backend: Backend) {
        if !is_long_run("a million artifacts") {
            return;
        }
        let (server, raw) = sizes_compared(backend).await;
        let services = &server.app.services;
        // Those that expire have their objects.
        let put = |i: i64| async move {
            let byte = stream::iter([Ok(Bytes::from_static(b"x"))]);
            services.store.put(&key(i), 1, byte).await.unwrap();
        };
        stream::iter(1..=EXPIRED)
            .map(put)
            .buffer_unordered(8)
            .collect::<Vec<_>>()
            .await;
        // The span that is measured: nothing is waited for.
        let rest = tokio::time::sleep(Duration::from_secs(10));
        beside(&server, 0, "at rest", rest).await;
        let now_ms = server.clock.load(Ordering::Relaxed);
        raw.execute(&format!(
            "UPDATE artifacts SET expires_at_ms = {now_ms} WHERE id <= {EXPIRED}"
        ))
        .await;
        let expired = beside(&server, 1, "expired", services.clean()).await.unwrap().unwrap();
        server.advance(server.config.cleaner.delete_grace);
        let emptied = beside(&server, 2, "objects deleted", services.clean())
            .await
            .unwrap()
            .unwrap();
        server.advance(server.config.cleaner.sweep_after);
        let dropped = beside(&server, 3, "rows dropped", services.clean())
            .await
            .unwrap()
            .unwrap();
        let all = EXPIRED.cast_unsigned();
        assert_eq!(
            (
                expired.expired_artifacts,
                emptied.deleted_objects,
                dropped.dropped_blobs
            ),
            (all, all, all)
        );
        drop(raw);
        server.stop().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn sqlite_with_a_million() {
        growth(Backend::SqliteDisk).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn postgres_with_a_million() {
        growth(Backend::PostgresS3).await;
    }
}
