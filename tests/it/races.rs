//! Requests that meet: two replicas over one database and one store, and clocks that strike in the middle of something.
//!
//! Requests start at one barrier, each round with other small delays. `WHARFINGER_TEST_LONG` runs many more rounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use futures_util::{FutureExt, StreamExt, TryStreamExt, stream};
use serde_json::json;
use sha2::Digest;
use sqlx::{AssertSqlSafe, SqlitePool};
use tempfile::TempDir;
use tokio::sync::Barrier;
use uuid::Uuid;
use wharfinger::app;
use wharfinger::clock::Clock;
use wharfinger::config::Config;
use wharfinger::db::{Db, ListEntry, ListSource, WritableBlob};
use wharfinger::error::{Error, Result};
use wharfinger::model::{ArtifactId, BlobId, BlobKind, Principal, RunKey, Sha256};
use wharfinger::service::Services;
use wharfinger::service::artifacts::Request;
use wharfinger::service::cleaner::Report;
use wharfinger::service::fsck::{Options, Problem};
use wharfinger::service::uploads::{Checksums, Upload};

use crate::common::client::{Runner, Status, run_client};
use crate::common::s3::S3Server;
use crate::common::{Backend, TestServer, blob_of, block_link, block_list, config, polled};

const MINUTE: Duration = Duration::from_secs(60);
const GRACE: Duration = MINUTE;
const SWEEP_AFTER: Duration = Duration::from_secs(600);
const LEASE: Duration = Duration::from_secs(30);
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

fn rounds(short: usize, long: usize) -> usize {
    if std::env::var_os("WHARFINGER_TEST_LONG").is_some() {
        long
    } else {
        short
    }
}

/// Two replicas, each with connections of its own, and one clock.
struct Replicas {
    services: [Services; 2],
    clock: Arc<AtomicI64>,
    _s3: Option<S3Server>,
    _directory: TempDir,
}

impl Replicas {
    async fn start(backend: Backend) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let s3 = (backend == Backend::PostgresS3).then(S3Server::start);
        let mut config = config(backend, &directory, s3.as_ref()).await;
        config.cleaner.delete_grace = GRACE;
        config.cleaner.sweep_after = SWEEP_AFTER;
        config.cleaner.lease = LEASE;
        config.cleaner.batch = 3;
        config.uploads.abandoned_after = ABANDONED_AFTER;
        let clock = Arc::new(AtomicI64::new(Clock::System.now_ms()));
        let open = async |config: &Config| app::open(config, Clock::Fixed(Arc::clone(&clock))).await.unwrap();
        Self {
            services: [open(&config).await, open(&config).await],
            clock,
            _s3: s3,
            _directory: directory,
        }
    }

    fn advance(&self, span: Duration) {
        self.clock
            .fetch_add(i64::try_from(span.as_millis()).unwrap(), Ordering::Relaxed);
    }

    /// A job's client at one of the replicas.
    fn client(&self, replica: usize, job: &str) -> Client {
        Client {
            services: self.services[replica].clone(),
            principal: Principal {
                run: RunKey {
                    issuer: "wharfinger".to_owned(),
                    repository: "name:octo/demo".to_owned(),
                    run_backend_id: "1".to_owned(),
                },
                repository_name: Some("octo/demo".to_owned()),
                run_id: Some(1),
                run_attempt: 1,
                job_backend_id: job.to_owned(),
                cache_scopes: Vec::new(),
                issued_at_ms: None,
                expires_at_ms: i64::MAX,
            },
        }
    }

    /// One job's client at each replica.
    fn clients(&self) -> [Client; 2] {
        [self.client(0, "build"), self.client(1, "build")]
    }

    /// Lets the cleaner do all that is due from now on, twice for what only becomes due by cleaning.
    async fn clean_all(&self) {
        for _ in 0..2 {
            self.advance(SWEEP_AFTER);
            assert!(self.services[0].clean().await.unwrap().is_some(), "nobody else cleans");
        }
    }

    async fn objects(&self) -> usize {
        self.services[0].store.list_all().count().await
    }

    /// Checks everything deeply, then stops.
    async fn finish(self) {
        let mut problems = Vec::new();
        let look = Options {
            deep: true,
            repair: false,
        };
        let tell = &mut |problem: &Problem| problems.push(problem.clone());
        self.services[1].fsck(look, tell).await.unwrap();
        assert!(problems.is_empty(), "{problems:#?}");
        for services in self.services {
            services.db.close().await;
        }
    }
}

/// What one job asks of one replica. Requests own what they need, so that they can run anywhere.
#[derive(Clone)]
struct Client {
    services: Services,
    principal: Principal,
}

impl Client {
    fn create(&self, name: &str) -> BoxFuture<'static, Result<BlobId>> {
        let (client, name) = (self.clone(), name.to_owned());
        async move {
            let request = Request {
                name: &name,
                version: 4,
                mime_type: None,
                expires_at_ms: None,
            };
            let link = client.services.create_artifact(&client.principal, &request).await?;
            Ok(blob_of(&link))
        }
        .boxed()
    }

    fn stage(&self, blob: BlobId, id: &str, bytes: &[u8]) -> BoxFuture<'static, Result<()>> {
        let (services, id, upload) = (self.services.clone(), id.to_owned(), upload(bytes));
        async move { services.stage_block(blob, &id, upload).await }.boxed()
    }

    fn list(&self, blob: BlobId, ids: &[&str]) -> BoxFuture<'static, Result<()>> {
        let services = self.services.clone();
        let list: Vec<_> = ids
            .iter()
            .map(|id| ListEntry {
                block_id: (*id).to_owned(),
                from: ListSource::Latest,
            })
            .collect();
        async move { services.commit_block_list(blob, &list, None).await }.boxed()
    }

    fn put(&self, blob: BlobId, bytes: &[u8]) -> BoxFuture<'static, Result<()>> {
        let (services, upload) = (self.services.clone(), upload(bytes));
        async move { services.put_blob(blob, upload, None).await }.boxed()
    }

    fn finalize(&self, name: &str, size: usize, hash: Option<Sha256>) -> BoxFuture<'static, Result<ArtifactId>> {
        let (client, name) = (self.clone(), name.to_owned());
        async move {
            client
                .services
                .finalize_artifact(&client.principal, &name, size as u64, hash)
                .await
        }
        .boxed()
    }

    /// Create, put and finalize.
    fn upload(&self, name: &str, bytes: &[u8]) -> BoxFuture<'static, Result<ArtifactId>> {
        let (client, name, bytes) = (self.clone(), name.to_owned(), bytes.to_vec());
        async move {
            let blob = client.create(&name).await?;
            client.put(blob, &bytes).await?;
            client.finalize(&name, bytes.len(), Some(sha256(&bytes))).await
        }
        .boxed()
    }

    fn delete(&self, name: &str) -> BoxFuture<'static, Result<ArtifactId>> {
        let (client, name) = (self.clone(), name.to_owned());
        async move { client.services.delete_artifact(&client.principal, &name).await }.boxed()
    }

    fn clean(&self) -> BoxFuture<'static, Result<Option<Report>>> {
        let services = self.services.clone();
        async move { services.clean().await }.boxed()
    }

    /// The ids that a name's list has, at most one.
    async fn listed(&self, name: &str) -> Option<ArtifactId> {
        let rows = self.services.list_artifacts(&self.principal, Some(name), None).await;
        let rows = rows.unwrap();
        assert!(rows.len() <= 1, "{rows:?}");
        rows.first().map(|row| row.id)
    }

    /// The bytes of an artifact, compared with the hash that the list shows.
    async fn download(&self, name: &str) -> Vec<u8> {
        let link = self.services.artifact_link(&self.principal, name).await.unwrap();
        let blob = self.services.readable_blob(blob_of(&link)).await.unwrap();
        let bytes = self.services.read_blob(&blob, 0..blob.size_bytes).await.unwrap();
        let chunks: Vec<Bytes> = bytes.try_collect().await.unwrap();
        let bytes = chunks.concat();
        assert_eq!(blob.sha256, Some(sha256(&bytes)));
        bytes
    }
}

fn upload(bytes: &[u8]) -> Upload<impl futures_util::Stream<Item = Result<Bytes>> + Send + 'static> {
    Upload {
        size_bytes: bytes.len() as u64,
        body: stream::iter([Ok(Bytes::copy_from_slice(bytes))]),
        checksums: Checksums::default(),
    }
}

fn sha256(bytes: &[u8]) -> Sha256 {
    Sha256(sha2::Sha256::digest(bytes).into())
}

/// Runs requests on tasks of their own that start together, give or take a little that differs by round.
async fn at_once<T: Send + 'static>(round: usize, requests: Vec<BoxFuture<'static, T>>) -> Vec<T> {
    let barrier = Arc::new(Barrier::new(requests.len()));
    let tasks = requests.into_iter().enumerate().map(|(index, request)| {
        let barrier = Arc::clone(&barrier);
        tokio::spawn(async move {
            barrier.wait().await;
            for _ in 0..(round + 1) * (index + 3) * 7919 % 61 {
                tokio::task::yield_now().await;
            }
            request.await
        })
    });
    join_all(tasks)
        .await
        .into_iter()
        .map(std::result::Result::unwrap)
        .collect()
}

/// A connection that went back to the pool inside a transaction would swallow what others write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_leaves_no_transaction_open() {
    let replicas = Replicas::start(Backend::PostgresS3).await;
    let [a, b] = replicas.clients();
    let Db::Postgres(pool) = &b.services.db else {
        panic!("the backend has Postgres");
    };
    let open = "SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND state LIKE 'idle in transaction%'";
    for waits in 0..40 {
        let blob = a.create("mine").await.unwrap();
        a.stage(blob, "A", b"one").await.unwrap();
        for mut request in [
            a.create("other").map(drop).boxed(),
            a.list(blob, &["A"]).map(drop).boxed(),
            a.upload(&format!("n{waits}"), b"whole").map(drop).boxed(),
            a.delete(&format!("n{waits}")).map(drop).boxed(),
            a.clean().map(drop).boxed(),
        ] {
            // Dropped at the end of this round of the loop.
            polled(&mut request, waits).await;
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while sqlx::query_scalar::<_, i64>(open).fetch_one(pool).await.unwrap() > 0 {
            assert!(Instant::now() < deadline, "after {waits} waits");
            tokio::task::yield_now().await;
        }
    }
    for services in &replicas.services {
        services.db.close().await;
    }
}

mod long {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn an_artifact_finalized_by_two_replicas_has_one_id() {
        for backend in Backend::ALL {
            let replicas = Replicas::start(backend).await;
            let [a, b] = replicas.clients();
            for round in 0..rounds(25, 1000) {
                let name = format!("n{round}");
                let blob = a.create(&name).await.unwrap();
                a.put(blob, name.as_bytes()).await.unwrap();
                let finalize = |client: &Client| client.finalize(&name, name.len(), Some(sha256(name.as_bytes())));
                let ids = at_once(round, vec![finalize(&a), finalize(&b), finalize(&a), finalize(&b)]).await;
                let ids: Vec<_> = ids.into_iter().map(|id| id.unwrap()).collect();
                assert_eq!(ids, [ids[0]; 4], "{backend:?}");
                assert_eq!(a.listed(&name).await, Some(ids[0]));
            }
            assert_eq!(
                b.services.list_artifacts(&b.principal, None, None).await.unwrap().len(),
                rounds(25, 1000)
            );
            replicas.finish().await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_jobs_that_want_one_name_one_gets_it() {
        for backend in Backend::ALL {
            let replicas = Replicas::start(backend).await;
            let jobs = ["one", "two", "three", "four"];
            for round in 0..rounds(25, 1000) {
                let name = format!("n{round}");
                let requests = jobs
                    .iter()
                    .enumerate()
                    .map(|(index, job)| replicas.client(index % 2, job).upload(&name, job.as_bytes()));
                let outcomes = at_once(round, requests.collect()).await;
                let mut winners = Vec::new();
                for (job, outcome) in jobs.iter().zip(outcomes) {
                    match outcome {
                        Ok(id) => winners.push((*job, id)),
                        Err(Error::AlreadyExists(_) | Error::Conflict(_)) => {}
                        Err(error) => panic!("{backend:?}: {error:?}"),
                    }
                }
                let [(job, id)] = winners[..] else {
                    panic!("{backend:?}: {winners:?} have it");
                };
                let client = replicas.client(0, "other");
                assert_eq!(client.listed(&name).await, Some(id));
                assert_eq!(client.download(&name).await, job.as_bytes());
            }
            replicas.clean_all().await;
            assert_eq!(
                replicas.objects().await,
                rounds(25, 1000),
                "nothing is left of the others"
            );
            replicas.finish().await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn what_was_deleted_is_not_finalized_again() {
        for backend in Backend::ALL {
            let replicas = Replicas::start(backend).await;
            let [a, b] = replicas.clients();
            let mut kept = 0;
            for round in 0..rounds(25, 1000) {
                let name = format!("n{round}");
                let blob = a.create(&name).await.unwrap();
                a.put(blob, name.as_bytes()).await.unwrap();
                let cleaning = tokio::spawn(b.clean());
                let outcomes = at_once(
                    round,
                    vec![
                        a.finalize(&name, name.len(), None),
                        b.finalize(&name, name.len(), None),
                        a.delete(&name),
                        b.delete(&name),
                    ],
                )
                .await;
                cleaning.await.unwrap().unwrap();
                let ids: Vec<_> = outcomes
                    .into_iter()
                    .map(|outcome| match outcome {
                        Ok(id) => Some(id),
                        Err(Error::NotFound(_)) => None,
                        Err(error) => panic!("{backend:?}: {error:?}"),
                    })
                    .collect();
                let id = ids[0].or(ids[1]).expect("the first Finalize finds the upload");
                assert!(ids.iter().flatten().all(|other| *other == id), "{backend:?}: {ids:?}");
                match (ids[2], ids[3]) {
                    (None, None) => {
                        kept += 1;
                        assert_eq!(a.download(&name).await, name.as_bytes());
                    }
                    (Some(_), Some(_)) => panic!("{backend:?}: deleted twice"),
                    _ => assert_eq!(b.listed(&name).await, None, "{backend:?}: back from the dead"),
                }
            }
            replicas.clean_all().await;
            assert_eq!(replicas.objects().await, kept);
            replicas.finish().await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn an_upload_that_is_finalized_as_it_is_given_up_is_either() {
        for backend in Backend::ALL {
            let replicas = Replicas::start(backend).await;
            let [a, b] = replicas.clients();
            let mut kept = Vec::new();
            for round in 0..rounds(25, 1000) {
                let name = format!("n{round}");
                let blob = a.create(&name).await.unwrap();
                a.put(blob, name.as_bytes()).await.unwrap();
                replicas.advance(ABANDONED_AFTER);
                let cleaning = tokio::spawn(b.clean());
                let outcomes = at_once(
                    round,
                    vec![a.finalize(&name, name.len(), None), b.finalize(&name, name.len(), None)],
                )
                .await;
                cleaning.await.unwrap().unwrap();
                match outcomes.as_slice() {
                    [Ok(one), Ok(other)] if one == other => kept.push(name),
                    [Err(Error::NotFound(_)), Err(Error::NotFound(_))] => {
                        assert_eq!(a.listed(&name).await, None);
                    }
                    outcomes => panic!("{backend:?}: {outcomes:?}"),
                }
            }
            replicas.clean_all().await;
            assert_eq!(replicas.objects().await, kept.len());
            for name in kept {
                // The oldest may have expired in a long test.
                if a.listed(&name).await.is_some() {
                    assert_eq!(a.download(&name).await, name.as_bytes());
                }
            }
            replicas.finish().await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_block_sent_again_races_lists_and_finalize() {
        const LEN: usize = 2_000;
        let (old, new, other) = ([1; LEN], [2; LEN], [3; LEN]);
        let legal = [[old, other], [new, other], [other, old], [other, new]].map(|content| content.concat());
        for backend in Backend::ALL {
            let replicas = Replicas::start(backend).await;
            let [a, b] = replicas.clients();
            for round in 0..rounds(25, 1000) {
                let name = format!("n{round}");
                let blob = a.create(&name).await.unwrap();
                a.stage(blob, "A", &old).await.unwrap();
                b.stage(blob, "B", &other).await.unwrap();
                let cleaning = tokio::spawn(b.clean());
                let finalizing = {
                    let request = b.finalize(&name, 2 * LEN, None);
                    tokio::spawn(async move {
                        for _ in 0..round * 7919 % 301 {
                            tokio::task::yield_now().await;
                        }
                        request.await
                    })
                };
                let outcomes = at_once(
                    round,
                    vec![
                        a.stage(blob, "A", &new),
                        a.list(blob, &["A", "B"]),
                        b.list(blob, &["B", "A"]),
                    ],
                )
                .await;
                cleaning.await.unwrap().unwrap();
                for outcome in &outcomes {
                    assert!(
                        matches!(outcome, Ok(()) | Err(Error::Conflict(_) | Error::Busy(_))),
                        "{backend:?}: {outcome:?}"
                    );
                }
                assert!(outcomes[1].is_ok() || outcomes[2].is_ok(), "{backend:?}: {outcomes:?}");
                let again = b.finalize(&name, 2 * LEN, None);
                let id = match finalizing.await.unwrap() {
                    Ok(id) => id,
                    Err(Error::FailedPrecondition(_) | Error::Busy(_)) => again.await.unwrap(),
                    Err(error) => panic!("{backend:?}: {error:?}"),
                };
                assert_eq!(a.listed(&name).await, Some(id));
                let content = a.download(&name).await;
                assert!(legal.contains(&content), "{backend:?}: a torn list");
                // What was acknowledged with the whole content stays, whatever comes late.
                let late = a.stage(blob, "A", &old).await;
                assert!(matches!(late, Err(Error::Conflict(_))), "{late:?}");
                assert_eq!(b.download(&name).await, content);
            }
            replicas.clean_all().await;
            assert_eq!(replicas.objects().await, 2 * rounds(25, 1000));
            replicas.finish().await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_storm_of_retries_is_like_one_request() {
        for backend in Backend::ALL {
            let replicas = Replicas::start(backend).await;
            let [a, b] = replicas.clients();
            let turns = [&a, &b, &a, &b, &a];
            for round in 0..rounds(10, 200) {
                let name = format!("n{round}");
                let links = at_once(round, turns.iter().map(|client| client.create(&name)).collect()).await;
                let mut open = Vec::new();
                for link in links {
                    let blob = link.unwrap();
                    if a.services.db.writable_blob(blob).await.unwrap() == Some(WritableBlob::Open(BlobKind::Artifact))
                    {
                        open.push(blob);
                    }
                }
                let [blob] = open[..] else {
                    panic!("{backend:?}: {} links are good", open.len());
                };
                for (id, bytes) in [("A", b"first "), ("B", b"second")] {
                    let staged = at_once(
                        round,
                        turns.iter().map(|client| client.stage(blob, id, bytes)).collect(),
                    );
                    for outcome in staged.await {
                        outcome.unwrap();
                    }
                }
                let lists = turns.iter().map(|client| client.list(blob, &["A", "B"])).collect();
                for outcome in at_once(round, lists).await {
                    outcome.unwrap();
                }
                let hash = Some(sha256(b"first second"));
                let finalizing = turns.iter().map(|client| client.finalize(&name, 12, hash)).collect();
                let ids = at_once(round, finalizing).await;
                let ids: Vec<_> = ids.into_iter().map(|id| id.unwrap()).collect();
                assert_eq!(ids, [ids[0]; 5], "{backend:?}");
                // The last list, sent again after Finalize, is still the content.
                b.list(blob, &["A", "B"]).await.unwrap();
                assert_eq!(b.download(&name).await, b"first second");
                let deleted = at_once(round, turns.iter().map(|client| client.delete(&name)).collect()).await;
                let done = deleted.iter().filter(|outcome| outcome.is_ok()).count();
                assert_eq!(done, 1, "{backend:?}: {deleted:?}");
                for outcome in deleted {
                    assert!(matches!(outcome, Ok(_) | Err(Error::NotFound(_))), "{outcome:?}");
                }
            }
            replicas.clean_all().await;
            assert_eq!(replicas.objects().await, 0);
            replicas.finish().await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn any_number_of_blocks_comes_in_any_order() {
        for (backend, count) in Backend::ALL
            .into_iter()
            .flat_map(|backend| [3, 200, rounds(600, 5000)].map(|count| (backend, count)))
        {
            let replicas = Replicas::start(backend).await;
            // Two pools on one SQLite file poll for its lock, which takes a minute here and never happens outside of tests.
            let clients = match backend {
                Backend::SqliteDisk => [replicas.client(0, "build"), replicas.client(0, "build")],
                Backend::PostgresS3 => replicas.clients(),
            };
            let blob = clients[0].create("many").await.unwrap();
            let id = |index: usize| format!("{index:06}");
            let content =
                |index: usize| format!("block {index} of this blob, sent {};", 1 + usize::from(index % 10 == 2));
            let mut order: Vec<usize> = (0..count).collect();
            order.sort_by_key(|index| index.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 1_000_003);
            stream::iter(order)
                .for_each_concurrent(16, |index| {
                    let client = &clients[index % 2];
                    async move {
                        if index % 10 == 2 {
                            let wrong = format!("not what block {index} holds in the end");
                            client.stage(blob, &id(index), wrong.as_bytes()).await.unwrap();
                        }
                        client.stage(blob, &id(index), content(index).as_bytes()).await.unwrap();
                    }
                })
                .await;
            let ids: Vec<String> = (0..count).map(id).collect();
            let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
            clients[1].list(blob, &ids).await.unwrap();
            let expected = (0..count).map(content).collect::<String>();
            let hash = Some(sha256(expected.as_bytes()));
            clients[0].finalize("many", expected.len(), hash).await.unwrap();
            assert!(
                clients[1].download("many").await == expected.as_bytes(),
                "{backend:?} {count}"
            );
            replicas.clean_all().await;
            assert_eq!(replicas.objects().await, count);
            replicas.finish().await;
        }
    }

    /// The paused replica is a future that nobody polls: stopped between any two steps, with whatever it knew then.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_cleaner_that_sleeps_past_its_lease_deletes_nothing_that_lives() {
        // A pause inside a transaction stops all other writers of SQLite, and there is one process anyway.
        let replicas = Replicas::start(Backend::PostgresS3).await;
        let [a, b] = replicas.clients();
        let mut overtaken = 0;
        for round in 0..rounds(25, 400) {
            let name = |what: &str| format!("{what}{round}");
            b.upload(&name("kept"), b"kept").await.unwrap();
            b.upload(&name("dead"), b"dead").await.unwrap();
            b.delete(&name("dead")).await.unwrap();
            replicas.advance(SWEEP_AFTER);
            let blob = b.create(&name("open")).await.unwrap();
            for bytes in [b"one", b"two"] {
                b.stage(blob, "A", bytes).await.unwrap();
            }
            b.stage(blob, "B", b"end").await.unwrap();

            let mut paused = a.clean();
            let before = polled(&mut paused, round * 7 % 113).await;
            replicas.advance(LEASE);
            overtaken += usize::from(before.is_none());
            // A lock that the sleeper holds is not waited for without end.
            let other = b.clean().await;
            assert!(matches!(other, Ok(_) | Err(Error::Busy(_))), "{other:?}");
            b.list(blob, &["A", "B"]).await.unwrap();
            b.stage(blob, "A", b"new").await.unwrap();
            if before.is_none() {
                let woken = paused.await;
                assert!(matches!(woken, Ok(_) | Err(Error::Busy(_))), "{woken:?}");
            }
            b.list(blob, &["A", "B"]).await.unwrap();
            b.finalize(&name("open"), 6, None).await.unwrap();
            assert_eq!(b.download(&name("open")).await, b"newend");
            assert_eq!(b.download(&name("kept")).await, b"kept");
            assert_eq!(b.listed(&name("dead")).await, None);
        }
        assert!(overtaken > 0, "no cleaner was ever stopped in the middle");
        replicas.clean_all().await;
        assert_eq!(replicas.objects().await, 3 * rounds(25, 400));
        replicas.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_cleans_while_its_lease_lasts_and_two_after_it_do_no_harm() {
    for backend in Backend::ALL {
        let replicas = Replicas::start(backend).await;
        let [a, b] = replicas.clients();
        a.upload("kept", b"kept").await.unwrap();
        for index in 0..20 {
            a.upload(&format!("dead{index}"), b"dead").await.unwrap();
            a.delete(&format!("dead{index}")).await.unwrap();
        }
        replicas.advance(SWEEP_AFTER);

        let dead_replica = Uuid::new_v4();
        let now_ms = replicas.clock.load(Ordering::Relaxed);
        let until_ms = now_ms + i64::try_from(LEASE.as_millis()).unwrap();
        let db = &a.services.db;
        assert!(db.take_lease("cleaner", dead_replica, now_ms, until_ms).await.unwrap());
        for report in at_once(0, vec![a.clean(), b.clean()]).await {
            assert_eq!(report.unwrap(), None, "{backend:?}: the lease holds");
        }
        assert_eq!(replicas.objects().await, 21, "{backend:?}");

        replicas.advance(LEASE);
        let reports = at_once(0, vec![a.clean(), b.clean()]).await;
        let done: Vec<Report> = reports.into_iter().filter_map(|report| report.unwrap()).collect();
        assert!(!done.is_empty(), "{backend:?}: the lease has run out");
        let deleted: u64 = done.iter().map(|report| report.deleted_objects).sum();
        assert_eq!((deleted, replicas.objects().await), (20, 1), "{backend:?}");
        assert_eq!(b.download("kept").await, b"kept");
        replicas.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_that_ends_with_finalize_leaves_nothing_behind() {
    for backend in Backend::ALL {
        let replicas = Replicas::start(backend).await;
        let [a, _] = replicas.clients();
        let now_ms = replicas.clock.load(Ordering::Relaxed);
        for (name, left_ms) in [("before", 1), ("exactly", 0), ("after", -1)] {
            let request = Request {
                name,
                version: 4,
                mime_type: None,
                expires_at_ms: Some(now_ms + 1_000 + left_ms),
            };
            let link = a.services.create_artifact(&a.principal, &request).await.unwrap();
            a.put(blob_of(&link), b"late").await.unwrap();
        }
        replicas.advance(Duration::from_millis(1_000));
        for name in ["before", "exactly", "after"] {
            let finalized = a.finalize(name, 4, None).await;
            let shown = a.listed(name).await;
            if name == "before" {
                let id = finalized.unwrap();
                assert_eq!(shown, Some(id), "{backend:?}");
                assert_eq!(a.finalize(name, 4, None).await.unwrap(), id, "{backend:?}");
            } else {
                // What nobody would ever see is not called finalized.
                assert!(
                    matches!(finalized, Err(Error::NotFound(_))),
                    "{backend:?}: {name}: {finalized:?}"
                );
                assert_eq!(shown, None, "{backend:?}: {name}");
            }
        }
        assert_eq!(a.download("before").await, b"late");
        replicas.advance(Duration::from_millis(1));
        assert_eq!(a.listed("before").await, None);
        // Those that were not finalized are uploads like others.
        replicas.advance(ABANDONED_AFTER);
        a.clean().await.unwrap();
        replicas.clean_all().await;
        assert_eq!(replicas.objects().await, 0);
        replicas.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_download_ends_whole_within_the_grace_and_never_short_after_it() {
    const BLOCK: usize = 4 << 20;
    for backend in Backend::ALL {
        let server = TestServer::start_with(backend, |config| {
            config.artifacts.default_retention = 30 * MINUTE;
            config.cleaner.delete_grace = GRACE;
            config.cleaner.sweep_after = SWEEP_AFTER;
        })
        .await;
        let job = server.job();
        let link = job.create("long").await;
        let mut content = Vec::new();
        for (id, byte) in [
            ("QQ==", 1),
            ("Qg==", 2),
            ("Qw==", 3),
            ("RA==", 4),
            ("RQ==", 5),
            ("Rg==", 6),
        ] {
            let block = vec![byte; BLOCK];
            assert_eq!(job.put(&block_link(&link, id), block.clone()).await.0, 201);
            content.extend(block);
        }
        let list = block_list(&["QQ==", "Qg==", "Qw==", "RA==", "RQ==", "Rg=="]);
        assert_eq!(job.put(&format!("{link}&comp=blocklist"), list).await.0, 201);
        let size = content.len().to_string();
        let (status, reply) = job
            .call("FinalizeArtifact", json!({ "name": "long", "size": size }))
            .await;
        assert_eq!(status, 200, "{reply}");

        // Far more than fits into the sockets between: the server has not read the end when time is up.
        let link = job.link("long").await;
        let (mut in_time, mut too_late) = (
            server.http.get(&link).send().await.unwrap(),
            server.http.get(&link).send().await.unwrap(),
        );
        let mut begun = in_time.chunk().await.unwrap().unwrap().to_vec();
        let mut begun_late = too_late.chunk().await.unwrap().unwrap().to_vec();
        server.advance(30 * MINUTE);
        assert!(server.app.services.clean().await.unwrap().is_some());
        assert_eq!(server.http.get(&link).send().await.unwrap().status(), 404);
        while let Some(chunk) = in_time.chunk().await.unwrap() {
            begun.extend(chunk);
        }
        assert!(begun == content, "{backend:?}: within the grace all bytes come");

        server.advance(GRACE);
        assert!(server.app.services.clean().await.unwrap().is_some());
        assert_eq!(server.app.services.store.list_all().count().await, 0, "{backend:?}");
        let ended = loop {
            match too_late.chunk().await {
                Ok(Some(chunk)) => begun_late.extend(chunk),
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        assert!(content.starts_with(&begun_late), "{backend:?}: wrong bytes");
        assert!(
            !ended || begun_late.len() == content.len(),
            "{backend:?}: a short success"
        );
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ids_may_be_as_large_as_a_javascript_number() {
    for backend in Backend::ALL {
        for first in [(1_i64 << 31) + 1, (1 << 53) - 1000] {
            let server = TestServer::start(backend).await;
            match &server.app.services.db {
                Db::Postgres(pool) => {
                    let set = format!("SELECT setval(pg_get_serial_sequence('artifacts', 'id'), {first}, false)");
                    sqlx::query(AssertSqlSafe(set)).execute(pool).await.unwrap();
                }
                Db::Sqlite(_) => {
                    let file = server.config.data_dir.join("wharfinger.db");
                    let pool = SqlitePool::connect(&format!("sqlite://{}", file.display()))
                        .await
                        .unwrap();
                    let set = "INSERT INTO sqlite_sequence (name, seq) VALUES ('artifacts', $1 - 1)";
                    sqlx::query(set).bind(first).execute(&pool).await.unwrap();
                    pool.close().await;
                }
            }
            let job = server.job();
            assert_eq!(job.upload("first", b"by hand").await, first.to_string());
            let runner = Runner {
                url: server.url.clone(),
                token: job.token.clone(),
                variables: Vec::new(),
            };
            let outcomes = tokio::task::spawn_blocking(move || run_client(&runner, "artifact-6.2.1", "small"));
            for outcome in outcomes.await.unwrap() {
                assert_eq!(outcome.status, Status::Ok, "{backend:?} {first}: {outcome:#?}");
            }
            let last = job.upload("last", b"by hand").await.parse::<i64>().unwrap();
            assert!(
                last > first + 1,
                "the client's artifact has an id between {first} and {last}"
            );
            let id = json!({ "name_filter": "first", "id_filter": first.to_string() });
            let (status, reply) = job.call("ListArtifacts", id).await;
            assert_eq!(
                (status, reply["artifacts"].as_array().unwrap().len()),
                (200, 1),
                "{reply}"
            );
            server.stop().await;
        }
    }
}
