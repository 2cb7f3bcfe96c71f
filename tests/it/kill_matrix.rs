//! The kill matrix: a server dies at each failpoint of the sources while a real client works with it, and the client's
//! work is done by the next one. Whatever the client was told is then there, whatever it was not told is absent or
//! whole, and after the cleaner there is nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode, header};
use bytes::Bytes;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::{Connection, Executor, PgConnection};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use uuid::Uuid;

use crate::common::client::{Outcome, Runner, Status, run_client};
use crate::common::process::{Environment, PATIENCE, Process, RemoteJob, http_client, secret_file};
use crate::common::s3::S3Server;
use crate::common::{Backend, block_link, block_list, postgres_database};

/// Who makes the server reach its failpoint.
#[derive(Clone, Copy, Debug)]
enum Drive {
    /// A client with one of its cases.
    Client(&'static str, &'static str),
    /// As above, with everything hashed in the background.
    Verified(&'static str, &'static str),
    /// Requests that save a cache entry by one version of the protocol.
    Cache(u8),
    /// A request to finalize with a hash that is not the content's, which no client sends.
    WrongHash,
    /// `wharfinger clean`, which is then the one to die. A server lives beside it.
    Clean,
    /// Nobody: the very first start reaches it by itself.
    FirstStart,
}

const UPLOAD: Drive = Drive::Client("artifact-6.2.1", "small");
const LARGE_UPLOAD: Drive = Drive::Client("artifact-6.2.1", "tar300");
const DELETE: Drive = Drive::Client("artifact-6.2.1", "delete");
/// A file of two chunks, which do not pack.
const FILES: Drive = Drive::Client("artifact-1.1.3", "big");
const SDK_BLOCKS: Drive = Drive::Client("storage-blob", "blocks");
const SDK_PUT_BLOB: Drive = Drive::Client("storage-blob", "putblob");
const VERIFIED: Drive = Drive::Verified("artifact-6.2.1", "small");

macro_rules! matrix {
    ($($point:ident: $drive:expr,)*) => {
        const POINTS: &[&str] = &[$(stringify!($point)),*];

        mod sqlite_disk {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $point() {
                dies_at(Backend::SqliteDisk, stringify!($point), $drive).await;
            })*
        }

        mod postgres_s3 {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $point() {
                dies_at(Backend::PostgresS3, stringify!($point), $drive).await;
            })*
        }
    };
}

matrix! {
    intent_committed: UPLOAD,
    block_first_byte: LARGE_UPLOAD,
    block_half: LARGE_UPLOAD,
    block_stored: LARGE_UPLOAD,
    block_row_committed: LARGE_UPLOAD,
    block_resent_before_commit: SDK_BLOCKS,
    list_parsed: UPLOAD,
    list_durable: UPLOAD,
    list_before_commit: UPLOAD,
    list_after_commit: UPLOAD,
    put_blob_stored: SDK_PUT_BLOB,
    put_blob_durable: SDK_PUT_BLOB,
    put_blob_before_commit: SDK_PUT_BLOB,
    put_blob_before_reply: SDK_PUT_BLOB,
    finalize_before_hash: UPLOAD,
    finalize_before_commit: UPLOAD,
    finalize_after_commit: UPLOAD,
    container_before_commit: FILES,
    container_committed: FILES,
    chunk_stored: FILES,
    chunk_before_commit: FILES,
    chunk_committed: FILES,
    publish_zip_made: FILES,
    publish_before_commit: FILES,
    publish_after_commit: FILES,
    verify_claimed: VERIFIED,
    verify_before_pass: VERIFIED,
    verify_before_reject: Drive::WrongHash,
    delete_before_commit: DELETE,
    delete_tombstoned: DELETE,
    cache_reserve_before_commit: Drive::Cache(2),
    cache_reserved: Drive::Cache(2),
    cache_chunks_listed: Drive::Cache(1),
    cache_finalize_before_commit: Drive::Cache(2),
    cache_finalized: Drive::Cache(1),
    clean_evict_before_commit: Drive::Clean,
    clean_evicted: Drive::Clean,
    clean_expired: Drive::Clean,
    clean_tombstoned: Drive::Clean,
    clean_garbage_deleted: Drive::Clean,
    clean_before_swept: Drive::Clean,
    clean_object_deleted: Drive::Clean,
    clean_half_of_blocks_deleted: Drive::Clean,
    clean_before_emptied: Drive::Clean,
    clean_before_drop: Drive::Clean,
    migration_mid: Drive::FirstStart,
}

#[test]
fn every_failpoint_of_the_sources_is_in_the_matrix() {
    let mut named = BTreeSet::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut |file| {
        let source = fs::read_to_string(file).unwrap();
        let calls = source.split("failpoint::reach(\"").skip(1);
        named.extend(calls.map(|call| call.split('"').next().unwrap().to_owned()));
    });
    assert_eq!(named, POINTS.iter().map(|point| (*point).to_owned()).collect());
}

/// Not at a failpoint but inside a migration: another transaction keeps it waiting at its last table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_in_the_middle_of_a_migration() {
    let wharf = Wharf::new(Backend::PostgresS3).await;
    let url = &wharf.environment.0["WHARFINGER_DATABASE__URL"];
    let mut holder = PgConnection::connect(url).await.unwrap();
    holder.execute("BEGIN; CREATE TABLE artifacts ()").await.unwrap();
    let environment = wharf.environment.clone().listening();
    let mut first = environment.command(&["serve"]);
    let mut first = first.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut looker = PgConnection::connect(url).await.unwrap();
    until("the migration waits", async || {
        sqlx::query_scalar(
            "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()
                 AND application_name = 'wharfinger' AND wait_event_type = 'Lock' AND query LIKE '%CREATE TABLE blobs%'",
        )
        .fetch_one(&mut looker)
        .await
        .unwrap()
    })
    .await;
    first.kill().unwrap();
    first.wait().unwrap();
    holder.execute("ROLLBACK").await.unwrap();
    let server = wharf.start(None);
    let job = server.job();
    let ledger = seed(&job).await;
    wharf.assert_settles(&server, &job, &ledger).await;
    assert_eq!(server.terminate(), Some(0));
}

async fn dies_at(backend: Backend, point: &'static str, drive: Drive) {
    let mut wharf = Wharf::new(backend).await;
    if matches!(drive, Drive::FirstStart) {
        // Once between any two steps, each time further on; the next start goes on from there.
        for steps in 0..migrations() {
            let environment = wharf.environment.clone().listening();
            let armed = environment.with("FAILPOINTS", format!("{point}={steps}*off->return"));
            let output = armed.run(&["serve", "--log-format", "json"]);
            assert_died_at(point, output.status, &String::from_utf8(output.stderr).unwrap());
        }
    }
    let server = wharf.start(None);
    let job = server.job();
    let mut ledger = seed(&job).await;
    wharf.litter();
    let server = match drive {
        Drive::FirstStart => server,
        Drive::Clean => {
            until("its time is up", async || {
                !job.names().await.contains(&"expires".to_owned())
            })
            .await;
            let output = wharf
                .cleaning()
                .with("FAILPOINTS", armed(point))
                .run(&["clean", "--log-format", "json"]);
            assert_died_at(point, output.status, &String::from_utf8(output.stderr).unwrap());
            server
        }
        Drive::WrongHash => {
            wharf.verify_in_background();
            server.kill();
            let first = wharf.start(Some(point));
            let finalizing = tokio::spawn({
                let job = job.clone();
                async move { finalize_wrongly(&job).await }
            });
            wharf.bury(first, point).await;
            let second = wharf.start(None);
            finalizing.await.unwrap();
            until("what has the wrong hash is taken out", async || {
                !job.names().await.contains(&"wrong".to_owned())
            })
            .await;
            second
        }
        Drive::Cache(version) => {
            server.kill();
            let first = wharf.start(Some(point));
            let content = noise(9, CACHED_BYTES);
            let saving = tokio::spawn({
                let (job, content) = (job.clone(), content.clone());
                async move { save_cache(&job, version, "saved", &content).await }
            });
            wharf.bury(first, point).await;
            let second = wharf.start(None);
            if saving.await.unwrap() {
                ledger.cached.insert("saved", self::content(&content));
            } else {
                // It was not told that it has the key, and nobody gets it before its time is up.
                assert_eq!(point, "cache_reserved");
            }
            second
        }
        Drive::Client(client, case) | Drive::Verified(client, case) => {
            if matches!(drive, Drive::Verified(..)) {
                wharf.verify_in_background();
            }
            server.kill();
            let first = wharf.start(Some(point));
            let working = tokio::task::spawn_blocking({
                let runner = wharf.runner(&job);
                move || run_client(&runner, client, case)
            });
            wharf.bury(first, point).await;
            let second = wharf.start(None);
            let outcomes = working.await.unwrap();
            if point == "delete_tombstoned" {
                // It asked again, and heard a clear word about what it wanted gone. Its work begins anew.
                assert_fails_clearly(&outcomes);
                let runner = wharf.runner(&job);
                let again = tokio::task::spawn_blocking(move || run_client(&runner, client, case));
                assert_succeeds(&again.await.unwrap());
            } else {
                // By its own means: it tries again what was not answered.
                assert_succeeds(&outcomes);
            }
            assert!(ledger.read(&wharf.ledger_file()) > 0, "the client was told nothing");
            second
        }
    };
    wharf.assert_settles(&server, &job, &ledger).await;
    assert_eq!(server.terminate(), Some(0));
}

/// How many there are for each database, and one for the table that remembers them.
fn migrations() -> usize {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations/postgres");
    fs::read_dir(directory).unwrap().count() + 1
}

fn assert_succeeds(outcomes: &[Outcome]) {
    assert_eq!(outcomes.len(), 1);
    assert_eq!(outcomes[0].status, Status::Ok, "{outcomes:#?}");
}

fn assert_fails_clearly(outcomes: &[Outcome]) {
    assert_eq!(outcomes.len(), 1);
    assert_eq!(outcomes[0].status, Status::Fail, "{outcomes:#?}");
    assert!(outcomes[0].detail.contains("(404) Not Found"), "{outcomes:#?}");
}

/// Finalizes with a wrong hash, asking again as long as nobody answers.
async fn finalize_wrongly(job: &RemoteJob) {
    let link = job.create("wrong").await;
    assert_eq!(job.put(&link, 5, "bytes").await.unwrap(), 201);
    let fields = json!({ "name": "wrong", "size": "5", "hash": format!("sha256:{}", sha256(b"others")) });
    let answered = async {
        loop {
            match job.call("FinalizeArtifact", fields.clone()).await {
                (503, _) => {}
                // Accepted, or found out already.
                (200 | 404, _) => return,
                answer => panic!("{answer:?}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, answered).await.unwrap();
}

/// What a client was told, by artifact id. What it asked to have deleted and was not told of is in neither.
#[derive(Debug, Default)]
struct Ledger {
    there: BTreeMap<i64, Content>,
    gone: BTreeSet<i64>,
    /// Cache entries, by key.
    cached: BTreeMap<&'static str, Content>,
}

/// Size and SHA-256.
type Content = (u64, String);

fn content(bytes: &[u8]) -> Content {
    (bytes.len() as u64, sha256(bytes))
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Ledger {
    /// Adds what a client noted; returns how many lines it had.
    fn read(&mut self, file: &Path) -> usize {
        let text = fs::read_to_string(file).unwrap_or_default();
        for line in text.lines() {
            let entry: Value = serde_json::from_str(line).unwrap();
            if let Some(id) = entry["uploaded"].as_i64() {
                let content = (
                    entry["size"].as_u64().unwrap(),
                    entry["sha256"].as_str().unwrap().to_owned(),
                );
                self.there.insert(id, content);
            } else if let Some(id) = entry["deleting"].as_i64() {
                self.there.remove(&id);
            } else {
                self.gone.insert(entry["deleted"].as_i64().unwrap());
            }
        }
        text.lines().count()
    }

    /// Compares it with what the server has, of which all must be whole. Returns the bytes of that.
    async fn compare(&self, job: &RemoteJob) -> u64 {
        let listed = job.done("ListArtifacts", json!({})).await;
        let text = |artifact: &Value, field: &str| artifact[field].as_str().unwrap().to_owned();
        let mut found = BTreeMap::<i64, Content>::new();
        for artifact in listed["artifacts"].as_array().unwrap() {
            let bytes = job.download(&text(artifact, "name")).await;
            let (size, sha256) = content(&bytes);
            assert_eq!(
                (text(artifact, "size"), text(artifact, "digest")),
                (size.to_string(), format!("sha256:{sha256}")),
                "not whole: {artifact}"
            );
            found.insert(text(artifact, "database_id").parse().unwrap(), (size, sha256));
        }
        for (id, content) in &self.there {
            assert_eq!(found.get(id), Some(content), "artifact {id} was acknowledged");
        }
        for id in &self.gone {
            assert!(!found.contains_key(id), "artifact {id} was deleted");
        }
        for (key, expected) in &self.cached {
            let fields = json!({ "key": key, "version": "1" });
            let (_, found) = insist(job, "GetCacheEntryDownloadURL", &fields).await;
            let link = found["signed_download_url"].as_str().expect("it was acknowledged");
            let bytes = job.http.get(link).send().await.unwrap().bytes().await.unwrap();
            assert_eq!(&content(&bytes), expected, "{key}");
        }
        let sizes = found.values().chain(self.cached.values());
        sizes.map(|(size, _)| size).sum()
    }
}

/// Fills a server with some of everything: artifacts that must stay, and work for the cleaner.
async fn seed(job: &RemoteJob) -> Ledger {
    let mut ledger = Ledger::default();
    for (seed, name) in (1..).zip(["kept", "kept, too"]) {
        let (id, content) = upload(job, name, &blocks(seed, 3), None).await;
        ledger.there.insert(id, content);
    }
    let (doomed, _) = upload(job, "doomed", &blocks(3, 4), None).await;
    job.done("DeleteArtifact", json!({ "name": "doomed" })).await;
    ledger.gone.insert(doomed);
    let soon = SystemTime::now() + Duration::from_secs(2);
    let (expires, _) = upload(job, "expires", &blocks(4, 2), Some(soon)).await;
    ledger.gone.insert(expires);
    let link = job.create("given up").await;
    stage(job, &link, "AAAA", &noise(5, 1000)).await;
    stage(job, &link, "BBBB", &noise(6, 1000)).await;
    // The first has to make room for others.
    for (version, key, size) in [(2, "too large", 5_000), (1, "kept", 1_000)] {
        let bytes = noise(size, usize::try_from(size).unwrap());
        assert!(save_cache(job, version, key, &bytes).await);
        if key == "kept" {
            ledger.cached.insert(key, content(&bytes));
        }
    }
    let given_up = json!({ "key": "given up", "version": "1" });
    let (_, reserved) = insist(job, "CreateCacheEntry", &given_up).await;
    stage(
        job,
        reserved["signed_upload_url"].as_str().unwrap(),
        "AAAA",
        &noise(7, 1000),
    )
    .await;
    ledger
}

/// What a cache entry of a drive has, of the [`CACHE_BYTES`] that a cleaning leaves of all.
const CACHED_BYTES: usize = 2_000;
const CACHE_BYTES: u64 = 4_000;

/// Saves a cache entry by a version of the protocol, asking again as long as nobody answers. `false` if the key is taken.
async fn save_cache(job: &RemoteJob, version: u8, key: &str, bytes: &[u8]) -> bool {
    let key_and_version = json!({ "key": key, "version": "1" });
    if version == 1 {
        let caches = "/_apis/artifactcache/caches";
        let body = key_and_version.to_string().into_bytes();
        let (_, reserved) = persist(job, reqwest::Method::POST, caches, None, &body).await;
        let Some(id) = reserved["cacheId"].as_i64() else {
            return false;
        };
        let path = format!("{caches}/{id}");
        let half = bytes.len() / 2;
        for (start, part) in [(half, &bytes[half..]), (0, &bytes[..half])] {
            let range = format!("bytes {start}-{}/*", start + part.len() - 1);
            let (status, reply) = persist(job, reqwest::Method::PATCH, &path, Some(&range), part).await;
            assert_eq!(status, 204, "{reply}");
        }
        let size = json!({ "size": bytes.len() }).to_string().into_bytes();
        let (status, reply) = persist(job, reqwest::Method::POST, &path, None, &size).await;
        assert_eq!(status, 204, "{reply}");
    } else {
        let (_, reserved) = insist(job, "CreateCacheEntry", &key_and_version).await;
        let Some(link) = reserved["signed_upload_url"].as_str() else {
            return false;
        };
        assert_eq!(job.put(link, bytes.len(), bytes.to_vec()).await.unwrap(), 201);
        let mut fields = key_and_version;
        fields["size_bytes"] = json!(bytes.len().to_string());
        let (status, reply) = insist(job, "FinalizeCacheEntryUpload", &fields).await;
        assert_eq!(status, 200, "{reply}");
    }
    true
}

/// Calls a method of the CacheService until it is answered.
async fn insist(job: &RemoteJob, method: &str, fields: &Value) -> (u16, Value) {
    let path = format!("/twirp/github.actions.results.api.v1.CacheService/{method}");
    persist(job, reqwest::Method::POST, &path, None, fields.to_string().as_bytes()).await
}

/// Sends a request until it is answered.
async fn persist(
    job: &RemoteJob,
    method: reqwest::Method,
    path: &str,
    content_range: Option<&str>,
    body: &[u8],
) -> (u16, Value) {
    let answered = async {
        loop {
            let mut request = job
                .http
                .request(method.clone(), format!("{}{path}", job.url))
                .bearer_auth(&job.token)
                .header("content-type", "application/json")
                .body(body.to_vec());
            if let Some(range) = content_range {
                request = request.header("content-range", range);
            }
            let reply = request.send().await.unwrap();
            let status = reply.status().as_u16();
            if status != 503 {
                let body = reply.bytes().await.unwrap();
                return (status, serde_json::from_slice(&body).unwrap_or_default());
            }
        }
    };
    tokio::time::timeout(PATIENCE, answered).await.unwrap()
}

/// Uploads blocks in the order opposite to the list's, the first of them twice. Returns the id.
async fn upload(job: &RemoteJob, name: &str, blocks: &[Vec<u8>], expires: Option<SystemTime>) -> (i64, Content) {
    const IDS: [&str; 4] = ["AAAA", "BBBB", "CCCC", "DDDD"];
    let mut fields = json!({ "name": name, "version": 4 });
    if let Some(expires) = expires {
        fields["expires_at"] = json!(humantime::format_rfc3339_millis(expires).to_string());
    }
    let link = job.done("CreateArtifact", fields).await["signed_upload_url"]
        .as_str()
        .unwrap()
        .to_owned();
    stage(job, &link, IDS[0], b"sent again in a moment").await;
    for (id, bytes) in IDS.iter().zip(blocks).rev() {
        stage(job, &link, id, bytes).await;
    }
    let list = block_list(&IDS[..blocks.len()]);
    let put = job.put(&format!("{link}&comp=blocklist"), list.len(), list).await;
    assert_eq!(put.unwrap(), 201);
    let content = content(&blocks.concat());
    let fields = json!({ "name": name, "size": content.0.to_string(), "hash": format!("sha256:{}", content.1) });
    let reply = job.done("FinalizeArtifact", fields).await;
    (reply["artifact_id"].as_str().unwrap().parse().unwrap(), content)
}

async fn stage(job: &RemoteJob, link: &str, id: &str, bytes: &[u8]) {
    let put = job.put(&block_link(link, id), bytes.len(), bytes.to_vec()).await;
    assert_eq!(put.unwrap(), 201);
}

/// Blocks of different sizes.
fn blocks(seed: u64, count: u64) -> Vec<Vec<u8>> {
    (0..count)
        .map(|n| noise(seed * 100 + n, 10_000 + usize::try_from(seed * 100 + n).unwrap()))
        .collect()
}

/// Xorshift: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }
}

fn noise(seed: u64, size_bytes: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let words = std::iter::repeat_with(|| random.next().to_le_bytes());
    words.flatten().take(size_bytes).collect()
}

/// What stands in front of the replicas: passes each request to the one that lives, lets requests wait while there is
/// none, and answers 503 when the replica dies over one.
struct Balancer {
    url: String,
    replica: watch::Sender<Option<String>>,
}

type Replicas = (watch::Receiver<Option<String>>, reqwest::Client);

impl Balancer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (replica, replicas) = watch::channel(None);
        let router = Router::new().fallback(balance).with_state((replicas, http_client()));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, replica }
    }
}

async fn balance(State(replicas): State<Replicas>, request: Request) -> Response<Body> {
    match pass_on(replicas, request).await {
        Ok((status, headers, body)) => {
            let mut answer = Response::new(Body::from(body));
            *answer.status_mut() = status;
            *answer.headers_mut() = headers;
            answer
        }
        Err(error) => {
            let message = json!({ "code": "unavailable", "msg": error.to_string() });
            let mut answer = Response::new(Body::from(message.to_string()));
            *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            answer
        }
    }
}

type Answer = (StatusCode, axum::http::HeaderMap, Bytes);

async fn pass_on(
    (mut replica, http): Replicas,
    request: Request,
) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await?;
    let origin = replica.wait_for(Option::is_some).await?.clone().unwrap_or_default();
    let mut headers = head.headers;
    // Of this connection only.
    for name in [header::HOST, header::CONNECTION, header::TRANSFER_ENCODING] {
        headers.remove(name);
    }
    let passed = http
        .request(head.method, format!("{origin}{}", head.uri))
        .headers(headers);
    let reply = passed.body(body).send().await?;
    let (status, mut headers) = (reply.status(), reply.headers().clone());
    headers.remove(header::CONNECTION);
    headers.remove(header::TRANSFER_ENCODING);
    Ok((status, headers, reply.bytes().await?))
}

/// Where servers die and others take their place.
struct Wharf {
    environment: Environment,
    balancer: Balancer,
    objects: PathBuf,
    directory: TempDir,
    s3: Option<S3Server>,
}

impl Wharf {
    async fn new(backend: Backend) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data_dir = directory.path().join("data");
        let s3 = (backend == Backend::PostgresS3).then(S3Server::inside);
        let (environment, objects) = match &s3 {
            None => (Environment::embedded(&data_dir), data_dir.join("objects")),
            Some(s3) => {
                let secret_file = secret_file(directory.path());
                let environment = Environment::production(&data_dir, &postgres_database().await, s3, &secret_file);
                (environment, s3.bucket_directory().unwrap().join("test"))
            }
        };
        let balancer = Balancer::start().await;
        Self {
            environment: environment.with("WHARFINGER_PUBLIC_URL", &balancer.url),
            balancer,
            objects,
            directory,
            s3,
        }
    }

    /// Starts a replica that will die at a point, or live, and sends it all requests.
    fn start(&self, point: Option<&str>) -> Process {
        self.balancer.replica.send_replace(None);
        let environment = match point {
            Some(point) => self.environment.with("FAILPOINTS", armed(point)),
            None => self.environment.clone(),
        };
        let process = Process::start(&environment);
        let origin = format!("http://{}", process.environment.0["WHARFINGER_LISTEN"]);
        self.balancer.replica.send_replace(Some(origin));
        process
    }

    /// Waits until a replica has died where it was to.
    async fn bury(&self, mut replica: Process, point: &str) {
        let mut status = None;
        until(&format!("it dies at {point}"), async || {
            status = replica.ended();
            status.is_some()
        })
        .await;
        self.balancer.replica.send_replace(None);
        let log = || replica.log.lock().unwrap().join("\n");
        // The last line may still be on its way.
        until("its last words", async || log().contains(point)).await;
        assert_died_at(point, status.unwrap(), &log());
    }

    fn verify_in_background(&mut self) {
        self.environment.set("WHARFINGER_VERIFICATION__INLINE_MAX_BYTES", 0);
        self.environment.set("WHARFINGER_VERIFICATION__LEASE", "1s");
    }

    fn ledger_file(&self) -> PathBuf {
        self.directory.path().join("ledger")
    }

    fn runner(&self, job: &RemoteJob) -> Runner {
        Runner {
            url: job.url.clone(),
            token: job.token.clone(),
            variables: vec![
                ("WHARFINGER_TEST_LEDGER", self.ledger_file().display().to_string()),
                // Two blocks.
                ("WHARFINGER_TEST_BIG_BYTES", (9 << 20).to_string()),
                ("WHARFINGER_TEST_CASE_TIMEOUT_MS", "90000".to_owned()),
            ],
        }
    }

    /// Leaves an object without a row beside those of every blob, as an earlier crash would.
    fn litter(&self) {
        let mut objects = Vec::new();
        walk(&self.objects.join("blobs"), &mut |file| objects.push(file.to_owned()));
        for object in objects {
            let name = object.file_name().unwrap().to_str().unwrap();
            let name = match name.split_once('.') {
                Some((blob, _)) => format!("{blob}.{}", Uuid::now_v7()),
                // In the stand-in for S3 the blob is the directory.
                None => Uuid::now_v7().to_string(),
            };
            fs::write(object.with_file_name(name), "left over").unwrap();
        }
    }

    /// With ages so short that everything is due at once.
    fn cleaning(&self) -> Environment {
        let mut environment = self.environment.clone();
        for (name, value) in [
            ("WHARFINGER_CLEANER__INTERVAL", "1ms"),
            ("WHARFINGER_CLEANER__DELETE_GRACE", "0s"),
            ("WHARFINGER_CLEANER__SWEEP_AFTER", "1ms"),
            ("WHARFINGER_CLEANER__LEASE", "1s"),
            ("WHARFINGER_UPLOADS__LINK_TTL", "1ms"),
            ("WHARFINGER_UPLOADS__ABANDONED_AFTER", "1ms"),
            ("WHARFINGER_CACHE__RESERVATION_TTL", "1ms"),
        ] {
            environment.set(name, value);
        }
        environment.set("WHARFINGER_CACHE__MAX_BYTES_PER_REPOSITORY", CACHE_BYTES);
        environment
    }

    /// Cleans until there is nothing left to do.
    async fn clean(&self) {
        until("nothing is left to clean", async || {
            let output = self.cleaning().run(&["clean", "--log-format", "json"]);
            let log = String::from_utf8(output.stderr).unwrap();
            if !output.status.success() {
                // A cleaner that died holds its lease for a while.
                assert!(log.contains("another process is cleaning"), "{log}");
                return false;
            }
            let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let report = lines.into_iter().find(|line| line["message"] == "cleaned").unwrap();
            [
                "expired_artifacts",
                "abandoned_uploads",
                "evicted_cache_entries",
                "deleted_objects",
                "dropped_blobs",
            ]
            .iter()
            .all(|count| report[count] == 0)
        })
        .await;
        if self.s3.is_some() {
            // A bucket has no directories. Those that the stand-in leaves behind make its lists slow.
            for directory in fs::read_dir(self.objects.join("blobs")).unwrap() {
                // Only the empty ones can be removed.
                let _ = fs::remove_dir(directory.unwrap().path());
            }
        }
    }

    /// What the ledger says is there and whole, nothing is wrong, and nothing else is left.
    async fn assert_settles(&self, server: &Process, job: &RemoteJob, ledger: &Ledger) {
        until("everything is verified", async || {
            let metrics = job.http.get(format!("{}/metrics", server.internal_url)).send().await;
            let metrics = metrics.unwrap().text().await.unwrap();
            metrics.contains("\nwharfinger_verification_pending 0")
        })
        .await;
        until("its time is up", async || {
            !job.names().await.contains(&"expires".to_owned())
        })
        .await;
        ledger.compare(job).await;
        self.clean().await;
        let fsck = self.cleaning().run(&["fsck", "--deep"]);
        assert!(fsck.status.success(), "{fsck:#?}");
        let needed = ledger.compare(job).await;
        let mut stored = 0;
        walk(&self.objects.join("blobs"), &mut |file| {
            stored += fs::metadata(file).unwrap().len();
        });
        assert_eq!(stored, needed, "bytes in the store");
    }
}

fn armed(point: &str) -> String {
    format!("{point}=return")
}

fn assert_died_at(point: &str, status: ExitStatus, log: &str) {
    const SIGABRT: i32 = 6;
    assert_eq!(status.signal(), Some(SIGABRT), "{log}");
    let last_words = format!("\"point\":\"{point}\"");
    assert!(log.contains(&last_words), "{log}");
}

/// Every file below a directory.
fn walk(directory: &Path, visit: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, visit);
        } else {
            visit(&path);
        }
    }
}

/// Asks until the answer is yes.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    const PATIENCE: Duration = Duration::from_secs(60);
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < PATIENCE, "still not so: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Servers that die at any moment under load.
mod long {
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const KILLS: u64 = 150;
    /// After so many the load pauses and everything is compared.
    const KILLS_BETWEEN_LOOKS: u64 = 15;
    const WORKERS: u64 = 4;
    /// The longest that a server lives.
    const LIFE_MS: u64 = 400;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn killed_at_random_on_sqlite_and_disk() {
        killed_at_random(Backend::SqliteDisk).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn killed_at_random_on_postgres_and_s3() {
        killed_at_random(Backend::PostgresS3).await;
    }

    /// Past libtest, which keeps what a passing test prints to itself.
    fn say(what: &str) {
        let _ = writeln!(std::io::stderr(), "{what}");
    }

    async fn killed_at_random(backend: Backend) {
        if std::env::var_os("WHARFINGER_TEST_LONG").is_none() {
            say(&format!(
                "SKIPPED random kills on {backend:?}: set WHARFINGER_TEST_LONG=1"
            ));
            return;
        }
        let seed = match std::env::var("WHARFINGER_TEST_SEED") {
            Ok(seed) => seed.parse().expect("WHARFINGER_TEST_SEED is a number"),
            Err(_) => u64::from(std::process::id()),
        };
        say(&format!("random kills on {backend:?}: WHARFINGER_TEST_SEED={seed}"));
        let mut random = Random::new(seed);
        let wharf = Wharf::new(backend).await;
        let mut server = wharf.start(None);
        let job = server.job();
        let mut ledger = super::seed(&job).await;
        for look in 0..KILLS / KILLS_BETWEEN_LOOKS {
            let stop = Arc::new(AtomicBool::new(false));
            let workers: Vec<_> = (0..WORKERS)
                .map(|worker| {
                    let worker = Worker {
                        job: job.clone(),
                        random: Random::new(random.next()),
                        name: format!("{look} {worker}"),
                        stop: Arc::clone(&stop),
                        ledger: Ledger::default(),
                    };
                    tokio::spawn(worker.work())
                })
                .collect();
            for _ in 0..KILLS_BETWEEN_LOOKS {
                tokio::time::sleep(Duration::from_millis(random.below(LIFE_MS))).await;
                wharf.balancer.replica.send_replace(None);
                server.kill();
                server = wharf.start(None);
            }
            stop.store(true, Ordering::Relaxed);
            for worker in workers {
                let worked = worker.await.unwrap();
                ledger.there.extend(worked.there);
                ledger.gone.extend(worked.gone);
            }
            wharf.assert_settles(&server, &job, &ledger).await;
        }
        // The load got through, in both directions.
        let (there, gone) = (ledger.there.len(), ledger.gone.len());
        say(&format!(
            "{KILLS} kills on {backend:?}: {there} artifacts are there, {gone} were deleted"
        ));
        assert!(there as u64 > KILLS / 10 && gone as u64 > KILLS);
    }

    /// One job's client, which uploads and deletes and asks again whenever it is not answered.
    struct Worker {
        job: RemoteJob,
        random: Random,
        name: String,
        stop: Arc<AtomicBool>,
        ledger: Ledger,
    }

    impl Worker {
        async fn work(mut self) -> Ledger {
            let mut count = 0;
            while !self.stop.load(Ordering::Relaxed) {
                count += 1;
                let name = format!("{} {count}", self.name);
                let id = self.upload(&name).await;
                if self.random.below(16) > 0 {
                    self.delete(&name, id).await;
                }
            }
            self.ledger
        }

        async fn upload(&mut self, name: &str) -> i64 {
            let blocks: Vec<_> = (0..self.random.below(4) + 1)
                .map(|_| {
                    noise(
                        self.random.next(),
                        1 + usize::try_from(self.random.below(150_000)).unwrap(),
                    )
                })
                .collect();
            let content = content(&blocks.concat());
            let created = self
                .insist("CreateArtifact", json!({ "name": name, "version": 4 }))
                .await;
            let link = created["signed_upload_url"].as_str().unwrap();
            if blocks.len() == 1 {
                self.put(link, &blocks[0]).await;
            } else {
                let ids: Vec<_> = (0..blocks.len()).map(|n| format!("{n:04}")).collect();
                for (id, bytes) in ids.iter().zip(&blocks) {
                    self.put(&block_link(link, id), bytes).await;
                }
                let ids: Vec<_> = ids.iter().map(String::as_str).collect();
                self.put(&format!("{link}&comp=blocklist"), &block_list(&ids)).await;
            }
            let (size, sha256) = &content;
            let fields = json!({ "name": name, "size": size.to_string(), "hash": format!("sha256:{sha256}") });
            let finalized = self.insist("FinalizeArtifact", fields).await;
            let id = finalized["artifact_id"].as_str().unwrap().parse().unwrap();
            assert_eq!(self.ledger.there.insert(id, content), None, "an id given twice");
            id
        }

        async fn delete(&mut self, name: &str, id: i64) {
            self.ledger.there.remove(&id);
            let mut asked_before = false;
            loop {
                match self.job.call("DeleteArtifact", json!({ "name": name })).await {
                    (200, _) => break,
                    (404, _) if asked_before => break,
                    (503, _) => asked_before = true,
                    answer => panic!("{answer:?}"),
                }
            }
            self.ledger.gone.insert(id);
        }

        /// Calls until it is answered.
        async fn insist(&self, method: &str, fields: Value) -> Value {
            loop {
                match self.job.call(method, fields.clone()).await {
                    (200, reply) => return reply,
                    (503, _) => {}
                    (status, reply) => panic!("{method}: {status} {reply}"),
                }
            }
        }

        async fn put(&self, link: &str, bytes: &[u8]) {
            loop {
                match self.job.put(link, bytes.len(), bytes.to_vec()).await.unwrap() {
                    201 => return,
                    503 => {}
                    status => panic!("{status} for {link}"),
                }
            }
        }
    }
}
