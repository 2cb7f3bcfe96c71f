//! `kill -9` at every step of an upload, and orderly stops: what was acknowledged is there, the client's retry
//! succeeds, and after the cleaner the store holds what living artifacts need and nothing else.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::json;
use sha2::{Digest, Sha256};
use sqlx::{PgPool, SqlitePool};
use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::common::process::{Environment, Process, RemoteJob, http_client, secret_file};
use crate::common::s3::S3Server;
use crate::common::{Backend, block_link, block_list, postgres_database};

/// Where a server lies that dies and comes back.
struct Wharf {
    environment: Environment,
    objects: PathBuf,
    _directory: TempDir,
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
        Self {
            environment: environment.listening(),
            objects,
            _directory: directory,
            s3,
        }
    }

    fn start(&self) -> Process {
        Process::start(&self.environment)
    }

    /// Everything goes that may, at once.
    fn clean(&self) {
        let mut environment = self.environment.clone();
        for (name, value) in [
            ("WHARFINGER_CLEANER__DELETE_GRACE", "0s"),
            ("WHARFINGER_CLEANER__SWEEP_AFTER", "1ms"),
            ("WHARFINGER_UPLOADS__LINK_TTL", "1ms"),
            ("WHARFINGER_UPLOADS__ABANDONED_AFTER", "1ms"),
        ] {
            environment.set(name, value);
        }
        // What became due while the first was at it is the second's.
        for _ in 0..2 {
            environment.output(&["clean", "--log-level", "warn"]);
        }
    }

    /// The sizes of the objects in the store, and every other thing that lies there.
    fn store(&self) -> (Vec<u64>, Vec<PathBuf>) {
        let (mut sizes, mut others) = (Vec::new(), Vec::new());
        walk(&self.objects, &mut |path| {
            if path.is_dir() {
                // The disk store keeps one directory for all blobs.
                if path != self.objects.join("blobs") && fs::read_dir(path).unwrap().next().is_none() {
                    others.push(path.to_owned());
                }
            } else if path.starts_with(self.objects.join("blobs")) {
                sizes.push(fs::metadata(path).unwrap().len());
            } else if path != self.objects.join("wharfinger-store") {
                others.push(path.to_owned());
            }
        });
        sizes.sort_unstable();
        (sizes, others)
    }

    /// After the cleaner there are objects of these sizes, and nothing else.
    fn assert_cleans_to(&self, sizes: &[usize]) {
        self.clean();
        let (mut left, others) = self.store();
        // The stand-in for S3 leaves empty directories behind.
        let others: Vec<_> = others
            .into_iter()
            .filter(|path| self.s3.is_none() || path.is_file())
            .collect();
        left.sort_unstable();
        let mut sizes: Vec<_> = sizes.iter().map(|size| *size as u64).collect();
        sizes.sort_unstable();
        assert_eq!(left, sizes, "objects are left over, or were lost");
        assert!(others.is_empty(), "left over: {others:?}");
    }

    /// Ends everything that lives, and then nothing is left at all.
    async fn assert_empties(&self, process: Process) {
        let job = process.job();
        for name in job.names().await {
            job.done("DeleteArtifact", json!({ "name": name })).await;
        }
        assert_eq!(process.terminate(), Some(0));
        self.assert_cleans_to(&[]);
        assert_eq!(self.numbers("SELECT count(*) FROM blobs").await, [0]);
        assert_eq!(self.numbers("SELECT count(*) FROM garbage").await, [0]);
    }

    /// Asks the database behind the server's back.
    async fn numbers(&self, sql: &'static str) -> Vec<i64> {
        match self.environment.0.get("WHARFINGER_DATABASE__URL") {
            Some(url) => {
                let pool = PgPool::connect(url).await.unwrap();
                sqlx::query_scalar(sql).fetch_all(&pool).await.unwrap()
            }
            None => {
                let file = Path::new(&self.environment.0["WHARFINGER_DATA_DIR"]).join("wharfinger.db");
                let pool = SqlitePool::connect(&format!("sqlite://{}", file.display()))
                    .await
                    .unwrap();
                let numbers = sqlx::query_scalar(sql).fetch_all(&pool).await.unwrap();
                // The next server finds the file as the dead one left it, but not in use.
                pool.close().await;
                numbers
            }
        }
    }
}

fn walk(directory: &Path, visit: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        visit(&path);
        if path.is_dir() {
            walk(&path, visit);
        }
    }
}

/// Bytes of which no two positions are alike soon.
fn noise(seed: u64, size_bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(size_bytes).collect()
}

/// A body that sends `bytes`, says so, and sends the rest when it is told to, if ever.
fn halting(bytes: Vec<u8>, rest: Vec<u8>) -> (reqwest::Body, oneshot::Receiver<()>, oneshot::Sender<()>) {
    let (arrived, has_arrived) = oneshot::channel();
    let (go_on, goes_on) = oneshot::channel::<()>();
    // In small pieces: when the last is asked for, the server has taken all but what the sockets hold.
    let pieces: Vec<_> = bytes.chunks(64 << 10).map(Bytes::copy_from_slice).collect();
    let end = stream::once(async move {
        let _ = arrived.send(());
        match goes_on.await {
            Ok(()) => Ok(Bytes::from(rest)),
            Err(_) => std::future::pending().await,
        }
    });
    let body = stream::iter(pieces).map(Ok::<_, std::io::Error>).chain(end);
    (reqwest::Body::wrap_stream(body), has_arrived, go_on)
}

/// Asks until the answer is yes.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "still not so: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn stage(job: &RemoteJob, link: &str, id: &str, bytes: &[u8]) {
    let status = job
        .put(&block_link(link, id), bytes.len(), bytes.to_vec())
        .await
        .unwrap();
    assert_eq!(status, 201);
}

async fn commit(job: &RemoteJob, link: &str, ids: &[&str]) {
    let list = block_list(ids);
    let status = job
        .put(&format!("{link}&comp=blocklist"), list.len(), list)
        .await
        .unwrap();
    assert_eq!(status, 201);
}

macro_rules! on_both {
    ($($test:ident,)*) => {
        mod sqlite_disk {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test(super::Wharf::new(super::Backend::SqliteDisk).await).await;
            })*
        }
        mod postgres_s3 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test(super::Wharf::new(super::Backend::PostgresS3).await).await;
            })*
        }
    };
}

on_both! {
    killed_during_a_block,
    killed_between_block_and_list,
    killed_during_the_list,
    killed_between_list_and_finalize,
    killed_during_verification,
    stopped_in_order,
}

async fn killed_during_a_block(wharf: Wharf) {
    let (first, second) = (noise(1, 1 << 20), noise(2, 8 << 20));
    let server = wharf.start();
    let job = server.job();
    let link = job.create("a").await;
    stage(&job, &link, "AAAA", &first).await;
    let (body, half, _go_on) = halting(second[..4 << 20].to_vec(), Vec::new());
    let sending = {
        let (job, link, size) = (job.clone(), block_link(&link, "BBBB"), second.len());
        tokio::spawn(async move { job.put(&link, size, body).await })
    };
    half.await.unwrap();
    server.kill();
    assert!(sending.await.unwrap().is_err(), "nobody was there to answer");

    let server = wharf.start();
    // What was not acknowledged does not exist.
    let list = block_list(&["AAAA", "BBBB"]);
    let early = job
        .put(&format!("{link}&comp=blocklist"), list.len(), list)
        .await
        .unwrap();
    assert_eq!(early, 400);
    stage(&job, &link, "BBBB", &second).await;
    commit(&job, &link, &["AAAA", "BBBB"]).await;
    job.finalize("a", first.len() + second.len()).await;
    assert!(job.download("a").await == [first.clone(), second.clone()].concat());
    wharf.assert_cleans_to(&[first.len(), second.len()]);
    assert!(job.download("a").await == [first, second].concat());
    wharf.assert_empties(server).await;
}

async fn killed_between_block_and_list(wharf: Wharf) {
    let blocks: Vec<_> = (0..3)
        .map(|n| noise(n, 300_000 + usize::try_from(n).unwrap()))
        .collect();
    let server = wharf.start();
    let job = server.job();
    let (link, given_up) = (job.create("a").await, job.create("given up").await);
    for (id, bytes) in ["AAAA", "BBBB", "CCCC"].into_iter().zip(&blocks) {
        stage(&job, &link, id, bytes).await;
        stage(&job, &given_up, id, bytes).await;
    }
    server.kill();
    let server = wharf.start();
    commit(&job, &link, &["CCCC", "AAAA", "BBBB"]).await;
    let content = [&blocks[2][..], &blocks[0], &blocks[1]].concat();
    job.finalize("a", content.len()).await;
    assert!(job.download("a").await == content);
    // The other upload's client never came back.
    wharf.assert_cleans_to(&[300_000, 300_001, 300_002]);
    assert!(job.download("a").await == content);
    wharf.assert_empties(server).await;
}

async fn killed_during_the_list(wharf: Wharf) {
    const BLOCKS: usize = 2_000;
    const SIZE: usize = 10;
    // How many questions the server still answers after it has the whole list; at last, until it has acknowledged it.
    const ROUNDS: [usize; 7] = [0, 8, 32, 128, 512, 1024, usize::MAX];
    let content: Vec<_> = (0..BLOCKS).map(|n| format!("{n:0SIZE$}")).collect();
    // As clients do it, base64 of equal length.
    let ids: Vec<_> = (0..BLOCKS).map(|n| format!("{n:08}")).collect();
    let rotated = |by: usize| -> Vec<&str> { (0..BLOCKS).map(|n| ids[(n + by) % BLOCKS].as_str()).collect() };

    let mut server = wharf.start();
    let job = server.job();
    let link = job.create("a").await;
    stream::iter(&ids)
        .zip(stream::iter(&content))
        .for_each_concurrent(16, async |(id, bytes)| stage(&job, &link, id, bytes.as_bytes()).await)
        .await;
    let (mut placed, mut outcomes) = (false, Vec::new());
    for (round, trips) in ROUNDS.into_iter().enumerate() {
        let list = block_list(&rotated(round));
        let size = list.len();
        let (body, arrived, go_on) = halting(list[..size - 1].to_vec(), list[size - 1..].to_vec());
        let sending = {
            let (job, link) = (job.clone(), format!("{link}&comp=blocklist"));
            tokio::spawn(async move { job.put(&link, size, body).await })
        };
        arrived.await.unwrap();
        go_on.send(()).unwrap();
        let mut answers = 0;
        while answers < trips && !sending.is_finished() {
            let health = job.http.get(format!("{}/healthz", server.internal_url));
            assert_eq!(health.send().await.unwrap().status(), 200);
            answers += 1;
        }
        server.kill();
        let acknowledged = sending.await.unwrap().is_ok_and(|status| status == 201);

        // Nothing of it or all of it; all of it, if the client heard so.
        let order = wharf
            .numbers("SELECT CAST(block_id AS BIGINT) FROM blocks WHERE start_offset IS NOT NULL ORDER BY start_offset")
            .await;
        let offsets = wharf
            .numbers("SELECT start_offset FROM blocks WHERE start_offset IS NOT NULL ORDER BY start_offset")
            .await;
        let sizes = wharf.numbers("SELECT size_bytes FROM blobs").await;
        outcomes.push((acknowledged, order.first().copied()));
        if order.is_empty() {
            assert!(!placed && !acknowledged, "a list was lost in round {round}");
            assert_eq!(sizes, [0]);
        } else {
            placed = true;
            let first = usize::try_from(order[0]).unwrap();
            assert!(
                first <= round && (!acknowledged || first == round),
                "{first} in round {round}"
            );
            let expected = rotated(first);
            assert!(
                order
                    .iter()
                    .zip(&expected)
                    .all(|(id, expected)| format!("{id:08}") == **expected)
            );
            assert_eq!((order.len(), offsets.len()), (BLOCKS, BLOCKS));
            assert!((0..).step_by(SIZE).zip(&offsets).all(|(offset, at)| offset == *at));
            assert_eq!(sizes, [i64::try_from(BLOCKS * SIZE).unwrap()]);
        }
        server = wharf.start();
    }
    assert!(
        outcomes[ROUNDS.len() - 1].0,
        "the last list was acknowledged: {outcomes:?}"
    );
    println!("acknowledged, and the list that is in place: {outcomes:?}");
    commit(&job, &link, &rotated(0)).await;
    job.finalize("a", BLOCKS * SIZE).await;
    assert!(job.download("a").await == content.concat().as_bytes());
    wharf.assert_cleans_to(&[SIZE; BLOCKS]);
    assert!(job.download("a").await == content.concat().as_bytes());
    wharf.assert_empties(server).await;
}

async fn killed_between_list_and_finalize(wharf: Wharf) {
    let blocks = [noise(1, 500_000), noise(2, 400_000), noise(3, 300_000)];
    let server = wharf.start();
    let job = server.job();
    let (link, whole) = (job.create("a").await, job.create("whole").await);
    for (id, bytes) in ["AAAA", "BBBB", "CCCC"].into_iter().zip(&blocks) {
        stage(&job, &link, id, bytes).await;
    }
    commit(&job, &link, &["BBBB", "AAAA"]).await;
    assert_eq!(job.put(&whole, blocks[2].len(), blocks[2].clone()).await.unwrap(), 201);
    server.kill();
    let server = wharf.start();
    assert_eq!(job.names().await, [""; 0]);
    // A client that did not hear the answer sends the list again.
    commit(&job, &link, &["BBBB", "AAAA"]).await;
    job.finalize("a", 900_000).await;
    job.finalize("whole", 300_000).await;
    server.kill();
    let server = wharf.start();
    // Nor did it hear that it was finalized.
    job.finalize("a", 900_000).await;
    assert!(job.download("a").await == [&blocks[1][..], &blocks[0]].concat());
    assert!(job.download("whole").await == blocks[2]);
    wharf.assert_cleans_to(&[500_000, 400_000, 300_000]);
    assert!(job.download("a").await == [&blocks[1][..], &blocks[0]].concat());
    wharf.assert_empties(server).await;
}

async fn killed_during_verification(mut wharf: Wharf) {
    const PENDING: &str = "SELECT count(*) FROM blobs WHERE verification = 'pending'";
    wharf.environment.set("WHARFINGER_VERIFICATION__INLINE_MAX_BYTES", 0);
    wharf.environment.set("WHARFINGER_VERIFICATION__LEASE", "1s");
    // Large enough that hashing it takes far longer than the kill.
    let (large, small) = (noise(1, 192 << 20), noise(2, 100_000));
    let server = wharf.start();
    let job = server.job();
    let sha256 = |bytes: &[u8]| {
        let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha256:{hex}")
    };
    let finalizing = [
        ("large", large.len(), sha256(&large)),
        ("small", small.len(), sha256(&small)),
        ("wrong", small.len(), sha256(b"something else")),
    ];
    for (name, bytes) in [("large", &large), ("small", &small), ("wrong", &small)] {
        let link = job.create(name).await;
        assert_eq!(job.put(&link, bytes.len(), bytes.clone()).await.unwrap(), 201);
    }
    for (name, size, hash) in &finalizing {
        let fields = json!({ "name": name, "size": size.to_string(), "hash": hash });
        job.done("FinalizeArtifact", fields).await;
    }
    server.kill();
    assert_eq!(wharf.numbers(PENDING).await, [3], "the large one is still being hashed");

    let server = wharf.start();
    assert!(
        job.names().await.contains(&"large".to_owned()),
        "acknowledged, so it is there"
    );
    until("the next process verifies what the dead one was at", async || {
        let metrics = job
            .http
            .get(format!("{}/metrics", server.internal_url))
            .send()
            .await
            .unwrap();
        let metrics = metrics.text().await.unwrap();
        metrics.contains("\nwharfinger_verification_pending 0")
            && metrics.contains("\nwharfinger_verification_failed_total 1")
    })
    .await;
    assert_eq!(wharf.numbers(PENDING).await, [0]);
    assert_eq!(job.names().await, ["small", "large"]);
    assert!(job.download("large").await == large);
    assert!(job.download("small").await == small);
    let (status, _) = job.call("GetSignedArtifactURL", json!({ "name": "wrong" })).await;
    assert_eq!(status, 404);
    wharf.assert_cleans_to(&[large.len(), small.len()]);
    wharf.assert_empties(server).await;
}

async fn stopped_in_order(mut wharf: Wharf) {
    wharf.environment.set("WHARFINGER_SERVER__DRAIN_DELAY", "1s");
    let (old, new) = (noise(1, 64 << 20), noise(2, 8 << 20));
    let server = wharf.start();
    let job = server.job();
    let link = job.create("old").await;
    assert_eq!(job.put(&link, old.len(), old.clone()).await.unwrap(), 201);
    job.finalize("old", old.len()).await;
    let link = job.create("new").await;
    let (body, half, go_on) = halting(new[..4 << 20].to_vec(), new[4 << 20..].to_vec());
    let uploading = {
        let (job, link, size) = (job.clone(), link.clone(), new.len());
        tokio::spawn(async move { job.put(&link, size, body).await })
    };
    half.await.unwrap();
    let mut downloading = job.http.get(job.link("old").await).send().await.unwrap();
    let mut downloaded = downloading.chunk().await.unwrap().unwrap().to_vec();

    server.ask_to_stop();
    let readyz = format!("{}/readyz", server.internal_url);
    until("not ready", async || {
        // Each time on a connection of its own.
        reqwest::get(&readyz).await.unwrap().status() == 503
    })
    .await;
    // Load balancers have not noticed yet: what comes now is served.
    let newcomer = RemoteJob {
        http: http_client(),
        ..job.clone()
    };
    assert_eq!(newcomer.names().await, ["old"]);
    let address = server.environment.0["WHARFINGER_LISTEN"].clone();
    until("connections are refused", async || {
        TcpStream::connect(&address).is_err()
    })
    .await;
    // What was under way ends well.
    go_on.send(()).unwrap();
    assert_eq!(uploading.await.unwrap().unwrap(), 201);
    while let Some(chunk) = downloading.chunk().await.unwrap() {
        downloaded.extend_from_slice(&chunk);
    }
    assert!(downloaded == old);
    assert_eq!(server.wait(), Some(0));

    let server = wharf.start();
    job.finalize("new", new.len()).await;
    assert!(job.download("new").await == new);
    wharf.assert_empties(server).await;
}

#[tokio::test]
async fn one_server_at_a_time_on_a_data_directory() {
    let wharf = Wharf::new(Backend::SqliteDisk).await;
    let server = wharf.start();
    let mut elsewhere = Environment::embedded(Path::new(&wharf.environment.0["WHARFINGER_DATA_DIR"]));
    elsewhere = elsewhere.listening();
    let output = elsewhere.run(&["serve"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("wharfinger: another server is running on "), "{said}");
    assert!(said.contains("set data_dir to another directory"), "{said}");
    // The first is none the worse for it, and the lock ends with its holder.
    assert_eq!(server.job().names().await, [""; 0]);
    server.kill();
    Process::start(&elsewhere);
}

#[tokio::test]
async fn a_socket_from_systemd_is_adopted() {
    let directory = tempfile::tempdir().unwrap();
    let environment = Environment::embedded(&directory.path().join("data")).listening();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", socket.local_addr().unwrap());
    // Handed over as standard input, and moved to where systemd puts the first.
    let mut command = Command::new("sh");
    environment.apply(&mut command);
    command
        .args([
            "-c",
            "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" serve",
        ])
        .arg(env!("CARGO_BIN_EXE_wharfinger"))
        .stdin(Stdio::from(OwnedFd::from(socket)));
    let server = Process::start_by(command, environment);
    assert!(TcpStream::connect(&server.environment.0["WHARFINGER_LISTEN"]).is_err());
    let job = RemoteJob {
        url: url.clone(),
        ..server.job()
    };
    // Links carry the address that was handed over.
    let link = job.create("a").await;
    assert!(link.starts_with(&url), "{link} and not {url}");
    assert_eq!(job.put(&link, 5, "bytes").await.unwrap(), 201);
    job.finalize("a", 5).await;
    assert_eq!(job.download("a").await, b"bytes");
    assert_eq!(server.terminate(), Some(0));
}
