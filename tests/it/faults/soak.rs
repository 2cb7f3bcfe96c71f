//! A long mixed load on two replicas over Postgres and S3, while faults of every kind come and go: at the end all that
//! was promised is there, nothing is wrong, and the replicas have not grown.
//!
//! `WHARFINGER_SOAK_SECONDS` says how long, `WHARFINGER_TEST_SEED` repeats the choices of an earlier run.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use hyper::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::content;
use super::s3::{Fault, Proxy};
use crate::common::postgres::Postgres;
use crate::common::process::{Environment, Process, secret_file};
use crate::common::s3::S3Server;
use crate::common::{block_link, block_list};

const WORKERS: u64 = 4;
/// Longer than any request is answered only when something has gone wrong.
const PATIENCE: Duration = Duration::from_secs(180);
/// When a client takes a request for lost, as it does when its server stands still.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// An upload that takes longer may be taken for abandoned.
const UPLOAD_LIMIT: Duration = Duration::from_secs(100);
/// The largest number of artifacts that a job keeps.
const KEPT: usize = 20;

/// Short ages, and content on both sides of what is verified at once.
const SETTINGS: [(&str, &str); 9] = [
    ("WHARFINGER_CLEANER__INTERVAL", "2s"),
    ("WHARFINGER_CLEANER__DELETE_GRACE", "5s"),
    ("WHARFINGER_CLEANER__SWEEP_AFTER", "45s"),
    ("WHARFINGER_CLEANER__LEASE", "5s"),
    ("WHARFINGER_UPLOADS__LINK_TTL", "120s"),
    ("WHARFINGER_UPLOADS__ABANDONED_AFTER", "120s"),
    ("WHARFINGER_VERIFICATION__INLINE_MAX_BYTES", "200000"),
    ("WHARFINGER_VERIFICATION__LEASE", "5s"),
    ("WHARFINGER_LOG__LEVEL", "warn"),
];

/// Xorshift: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % bound
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// A definite answer.
struct Answer {
    status: u16,
    body: Vec<u8>,
    /// Whether it was not the first, so that an earlier try may have been carried out.
    again: bool,
    /// Whether an earlier try was not answered at all, so that it may be carried out yet.
    unsure: bool,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let start = String::from_utf8_lossy(&self.body[..self.body.len().min(300)]);
        write!(
            f,
            "{} again: {} unsure: {} {start}",
            self.status, self.again, self.unsure
        )
    }
}

/// What was promised of an artifact: id, size and hash.
type Promise = (String, usize, [u8; 32]);

/// The client of one job, in a run of its own, which asks either replica.
struct Worker {
    http: reqwest::Client,
    urls: Arc<[String; 2]>,
    token: String,
    run: String,
    random: Random,
    made: usize,
    ledger: BTreeMap<String, Promise>,
    tally: Arc<Tally>,
}

/// What the load amounted to.
#[derive(Debug, Default)]
struct Tally {
    uploads: AtomicUsize,
    deletes: AtomicUsize,
    begun_again: AtomicUsize,
    put_off: AtomicUsize,
    unanswered: AtomicUsize,
}

fn count(counter: &AtomicUsize) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Worker {
    /// Sends a request, to whichever replica, until it is answered.
    async fn ask(&mut self, request: impl Fn(&reqwest::Client, &str) -> reqwest::RequestBuilder) -> Answer {
        let begun = Instant::now();
        let (mut again, mut unsure) = (false, false);
        loop {
            let url = &self.urls[self.random.below(2)];
            let answer = async {
                let reply = request(&self.http, url).send().await?;
                let status = reply.status().as_u16();
                reqwest::Result::Ok((status, reply.bytes().await?.to_vec()))
            };
            match answer.await {
                Ok((503, _)) => count(&self.tally.put_off),
                Ok((status, body)) => {
                    let answer = Answer {
                        status,
                        body,
                        again,
                        unsure,
                    };
                    assert!(status < 500, "{answer:?}");
                    return answer;
                }
                Err(_) => {
                    unsure = true;
                    count(&self.tally.unanswered);
                }
            }
            again = true;
            assert!(begun.elapsed() < PATIENCE, "nobody answers");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn call(&mut self, method: &str, mut fields: Value) -> Answer {
        fields["workflow_run_backend_id"] = json!(self.run);
        fields["workflow_job_run_backend_id"] = json!("build");
        let (token, body) = (self.token.clone(), fields.to_string());
        let path = format!("twirp/github.actions.results.api.v1.ArtifactService/{method}");
        self.ask(|http, url| {
            let request = http.post(format!("{url}/{path}")).bearer_auth(&token);
            request.header("content-type", "application/json").body(body.clone())
        })
        .await
    }

    async fn put(&mut self, link: &str, body: &[u8]) -> Answer {
        self.ask(|http, url| {
            let request = http.put(at(url, link)).header("x-ms-blob-type", "BlockBlob");
            request.header("content-length", body.len()).body(body.to_vec())
        })
        .await
    }

    /// Uploads blocks and finalizes them. `None` if the upload was given up.
    async fn try_upload(&mut self, name: &str, blocks: &[Vec<u8>], expires: Option<SystemTime>) -> Option<Answer> {
        let begun = Instant::now();
        let mut fields = json!({ "name": name, "version": 4 });
        if let Some(expires) = expires {
            fields["expires_at"] = json!(humantime::format_rfc3339_millis(expires).to_string());
        }
        let created = self.call("CreateArtifact", fields).await;
        if expires.is_some_and(|expires| expires <= SystemTime::now()) {
            // It took too long to be worth it.
            return None;
        }
        assert_eq!(created.status, 200, "{created:?}");
        let link = created.json()["signed_upload_url"].as_str().unwrap().to_owned();
        // A Create that was taken for lost may come after this one and win, and an old upload counts as abandoned.
        let given_up = |answer: &Answer| {
            let superseded = answer.status == 409 && created.unsure;
            let abandoned = matches!(answer.status, 403 | 404) && begun.elapsed() > UPLOAD_LIMIT;
            superseded || abandoned
        };
        let whole = blocks.concat();
        let mut puts: Vec<(String, Vec<u8>)> = Vec::new();
        if blocks.len() == 1 {
            puts.push((link.clone(), whole.clone()));
        } else {
            let ids: Vec<_> = (0..blocks.len()).map(|n| format!("{n:04}")).collect();
            for (id, block) in ids.iter().zip(blocks) {
                puts.push((block_link(&link, id), block.clone()));
            }
            self.random.shuffle(&mut puts);
            let mut with_resends = Vec::new();
            for put in puts {
                if self.random.below(10) == 0 {
                    with_resends.push((put.0.clone(), content(1, put.1.len())));
                }
                with_resends.push(put);
            }
            puts = with_resends;
            let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
            puts.push((format!("{link}&comp=blocklist"), block_list(&ids)));
        }
        let mut unsure_links = Vec::new();
        for (link, body) in puts {
            if unsure_links.contains(&link) {
                // Its first bytes may come late, and would be the last.
                return None;
            }
            let answer = self.put(&link, &body).await;
            if given_up(&answer) {
                return None;
            }
            assert_eq!(answer.status, 201, "{name}: {answer:?}");
            if answer.unsure {
                unsure_links.push(link);
            }
        }
        if self.random.below(16) == 0 {
            // Nobody finalizes it.
            return None;
        }
        let hash = hex(&Sha256::digest(&whole));
        let fields = json!({ "name": name, "size": whole.len().to_string(), "hash": format!("sha256:{hash}") });
        let finalized = self.call("FinalizeArtifact", fields).await;
        let too_late = expires.is_some_and(|expires| expires <= SystemTime::now());
        if finalized.status != 200 && (created.unsure || too_late || begun.elapsed() > UPLOAD_LIMIT) {
            return None;
        }
        assert_eq!(finalized.status, 200, "{name}: {finalized:?}");
        Some(finalized)
    }

    async fn round(&mut self) {
        self.made += 1;
        let name = format!("artifact-{}", self.made);
        let blocks: Vec<_> = (0..1 + self.random.below(5))
            .map(|_| {
                let size = 1 + self.random.below(150_000);
                content(self.random.0, size)
            })
            .collect();
        let expires = (self.random.below(8) == 0).then(|| SystemTime::now() + Duration::from_secs(2));
        let Some(finalized) = self.try_upload(&name, &blocks, expires).await else {
            return count(&self.tally.begun_again);
        };
        count(&self.tally.uploads);
        if let Some(expires) = expires {
            self.until_gone(&name, expires).await;
            return;
        }
        let bytes = blocks.concat();
        let id = finalized.json()["artifact_id"].as_str().unwrap().to_owned();
        self.ledger
            .insert(name.clone(), (id, bytes.len(), Sha256::digest(&bytes).into()));
        self.check_list().await;

        let link = self.check(&name).await;
        let start = self.random.below(bytes.len());
        let end = start + 1 + self.random.below(bytes.len() - start);
        let range = format!("bytes={start}-{}", end - 1);
        let part = self
            .ask(|http, url| http.get(at(url, &link)).header("range", &range))
            .await;
        assert_eq!(part.status, 206, "{part:?}");
        assert!(part.body == bytes[start..end], "{name} {range}: other bytes");

        if self.ledger.len() > KEPT || self.random.below(2) == 0 {
            let victim = self.ledger.keys().nth(self.random.below(self.ledger.len()));
            let victim = victim.unwrap().clone();
            self.ledger.remove(&victim);
            let deleted = self.call("DeleteArtifact", json!({ "name": victim })).await;
            let twice = deleted.status == 404 && deleted.again;
            assert!(deleted.status == 200 || twice, "{victim}: {deleted:?}");
            count(&self.tally.deletes);
            self.check_list().await;
        }
    }

    async fn until_gone(&mut self, name: &str, expires: SystemTime) {
        loop {
            let asked = SystemTime::now();
            let reply = self.call("GetSignedArtifactURL", json!({ "name": name })).await;
            if reply.status == 404 {
                assert!(SystemTime::now() >= expires, "{name} went before its time");
                return;
            }
            assert!(asked < expires, "{name} is there after its time: {reply:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The list shows what was promised and nothing else.
    async fn check_list(&mut self) {
        let reply = self.call("ListArtifacts", json!({})).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let reply = reply.json();
        let listed: BTreeMap<&str, &str> = reply["artifacts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|artifact| {
                (
                    artifact["name"].as_str().unwrap(),
                    artifact["database_id"].as_str().unwrap(),
                )
            })
            .collect();
        let promised: BTreeMap<&str, &str> = self
            .ledger
            .iter()
            .map(|(name, (id, ..))| (name.as_str(), id.as_str()))
            .collect();
        assert_eq!(listed, promised);
    }

    /// An artifact has its bytes. Returns a link to it.
    async fn check(&mut self, name: &str) -> String {
        let reply = self.call("GetSignedArtifactURL", json!({ "name": name })).await;
        assert_eq!(reply.status, 200, "{name}: {reply:?}");
        let link = reply.json()["signed_url"].as_str().unwrap().to_owned();
        let reply = self.ask(|http, url| http.get(at(url, &link))).await;
        assert_eq!(reply.status, 200, "{name}: {reply:?}");
        let (_, size, hash) = &self.ledger[name];
        let same = reply.body.len() == *size && Sha256::digest(&reply.body)[..] == hash[..];
        assert!(same, "{name} has other bytes");
        link
    }

    async fn work(&mut self, over: &AtomicBool) {
        while !over.load(Ordering::Relaxed) {
            self.round().await;
        }
    }
}

/// A link, at one replica or the other.
fn at(url: &str, link: &str) -> String {
    let path = link.splitn(4, '/').last().unwrap();
    format!("{url}/{path}")
}

/// Two replicas, what they stand on, and what befalls all of it.
struct Harbour {
    /// Where the stand-in for S3 has a directory for each blob.
    blobs: PathBuf,
    postgres: Arc<Postgres>,
    proxy: Proxy,
    environments: [Environment; 2],
    /// The first is never killed, so that it can be seen to grow.
    replicas: [Option<Process>; 2],
    random: Random,
    struck: BTreeMap<&'static str, usize>,
    panics: Vec<String>,
}

impl Harbour {
    async fn strike(&mut self) {
        let pause = Duration::from_millis(500 + self.random.below(3000) as u64);
        let kind = match self.random.below(8) {
            0..=3 => {
                let faults = [
                    Fault::Status(500),
                    Fault::Status(503),
                    Fault::NoReply,
                    Fault::HalfThenCut,
                    Fault::LostReply,
                    Fault::Stall,
                    Fault::Slow(100_000),
                ];
                let methods = [None, Some(Method::PUT), Some(Method::GET), Some(Method::DELETE)];
                let method = methods[self.random.below(methods.len())].clone();
                let fault = faults[self.random.below(faults.len())];
                self.proxy.befall(method, fault, 1 + self.random.below(3), usize::MAX);
                tokio::time::sleep(pause).await;
                self.proxy.clear();
                "S3"
            }
            4 => {
                let postgres = Arc::clone(&self.postgres);
                let restart = move || {
                    postgres.stop_at_once();
                    postgres.start_again();
                };
                tokio::task::spawn_blocking(restart).await.unwrap();
                "Postgres"
            }
            5 => {
                let replica = self.replicas[1].take().unwrap();
                self.note_panics(&replica);
                replica.kill();
                let environment = self.environments[1].clone();
                let started = tokio::task::spawn_blocking(move || Process::start(&environment));
                self.replicas[1] = Some(started.await.unwrap());
                "kill"
            }
            6 => {
                let pid = self.replicas[self.random.below(2)].as_ref().unwrap().pid();
                signal(pid, "-STOP");
                // Now and then past the leases.
                tokio::time::sleep(pause * 2).await;
                signal(pid, "-CONT");
                "stop"
            }
            _ => "none",
        };
        *self.struck.entry(kind).or_default() += 1;
        // A bucket has no directories. Those that the stand-in leaves behind make its lists slow.
        for directory in fs::read_dir(&self.blobs).into_iter().flatten() {
            // Only the empty ones can be removed.
            let _ = fs::remove_dir(directory.unwrap().path());
        }
        tokio::time::sleep(pause / 2).await;
    }

    fn note_panics(&mut self, replica: &Process) {
        let log = replica.log.lock().unwrap();
        self.panics
            .extend(log.iter().filter(|line| line.contains("panicked")).cloned());
    }

    /// Memory in MiB, and open files, of the replica that lives all along.
    fn size(&self) -> (usize, usize) {
        let pid = self.replicas[0].as_ref().unwrap().pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let resident: usize = resident.trim().strip_suffix(" kB").unwrap().parse().unwrap();
        (
            resident / 1024,
            fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
        )
    }
}

fn signal(pid: u32, name: &str) {
    assert!(
        Command::new("kill")
            .args([name, &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
}

mod long {
    use std::io::Write;

    use super::super::is_long_run;
    use super::*;

    /// Past libtest, which keeps what a passing test prints to itself.
    fn say(what: &str) {
        let _ = writeln!(std::io::stderr(), "{what}");
    }

    fn number(variable: &str) -> Option<u64> {
        let value = std::env::var(variable).ok()?;
        Some(value.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn soak() {
        if !is_long_run("soak") {
            return;
        }
        let span = Duration::from_secs(number("WHARFINGER_SOAK_SECONDS").unwrap_or(600));
        let seed = number("WHARFINGER_TEST_SEED").unwrap_or_else(|| std::process::id().into());
        say(&format!("soak for {span:?}: WHARFINGER_TEST_SEED={seed}"));

        let directory = tempfile::tempdir().unwrap();
        let (postgres, s3) = (Arc::new(Postgres::start()), S3Server::inside());
        let proxy = Proxy::before(&s3.endpoint);
        let secret_file = secret_file(directory.path());
        let environments = [0, 1].map(|i| {
            let data_dir = directory.path().join(format!("data-{i}"));
            let mut environment = Environment::production(&data_dir, &postgres.url(), &s3, &secret_file);
            environment.set("WHARFINGER_STORAGE__ENDPOINT", &proxy.endpoint);
            for (name, value) in SETTINGS {
                environment.set(name, value);
            }
            environment.listening()
        });
        let starting = environments.clone();
        let replicas = tokio::task::spawn_blocking(move || starting.each_ref().map(Process::start))
            .await
            .unwrap();
        let urls = Arc::new([replicas[0].url.clone(), replicas[1].url.clone()]);
        let tally = Arc::new(Tally::default());
        let workers = (0..WORKERS).map(|i| Worker {
            http: reqwest::Client::builder().timeout(REQUEST_TIMEOUT).build().unwrap(),
            urls: Arc::clone(&urls),
            token: replicas[0].token("octo/demo", &(i + 1).to_string(), "build"),
            run: (i + 1).to_string(),
            random: Random::new(seed.wrapping_add(i + 1)),
            made: 0,
            ledger: BTreeMap::new(),
            tally: Arc::clone(&tally),
        });
        let mut workers: Vec<_> = workers.collect();
        let mut harbour = Harbour {
            blobs: s3.bucket_directory().unwrap().join("test/blobs"),
            postgres: Arc::clone(&postgres),
            proxy,
            environments,
            replicas: replicas.map(Some),
            random: Random::new(seed),
            struck: BTreeMap::new(),
            panics: Vec::new(),
        };

        // The first quarter is for warming up.
        let mut sizes = Vec::new();
        for span in [span / 4, span - span / 4] {
            let (over, begun) = (Arc::new(AtomicBool::new(false)), Instant::now());
            let load = workers.drain(..).map(|mut worker| {
                let over = Arc::clone(&over);
                tokio::spawn(async move {
                    worker.work(&over).await;
                    worker
                })
            });
            let load = join_all(load.collect::<Vec<_>>());
            let faults = async {
                while begun.elapsed() < span {
                    harbour.strike().await;
                }
                over.store(true, Ordering::Relaxed);
            };
            let (done, ()) = tokio::join!(load, faults);
            workers.extend(done.into_iter().map(|worker| worker.unwrap()));
            sizes.push(harbour.size());
        }

        let internal = harbour.replicas[0].as_ref().unwrap().internal_url.clone();
        let begun = Instant::now();
        loop {
            let metrics = reqwest::get(format!("{internal}/metrics"))
                .await
                .unwrap()
                .text()
                .await
                .unwrap();
            if metrics.contains("\nwharfinger_verification_pending 0") {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "content is never verified");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let mut kept = 0;
        for worker in &mut workers {
            worker.check_list().await;
            for name in worker.ledger.keys().cloned().collect::<Vec<_>>() {
                worker.check(&name).await;
            }
            kept += worker.ledger.len();
        }
        // Once nothing disturbs it, the cleaner catches up.
        let fsck = |arguments: &[&str]| {
            let output = harbour.environments[0].run(arguments);
            let said = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8(said).unwrap())
        };
        let begun = Instant::now();
        loop {
            let (clean, told) = fsck(&["fsck", "--json"]);
            let mut problems = told.lines().filter(|line| line.contains("\"problem\":"));
            let overdue = problems.all(|line| line.contains("overdue"));
            assert!(clean || (overdue && begun.elapsed() < PATIENCE), "{told}");
            if clean {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let caught_up = begun.elapsed();
        let (clean, told) = fsck(&["fsck", "--deep", "--json"]);
        assert!(clean, "{told}");
        let metrics = reqwest::get(format!("{internal}/metrics"))
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        let cleaner: Vec<_> = metrics
            .lines()
            .filter(|line| line.starts_with("wharfinger_cleaner_"))
            .collect();
        let [(rss, fds), (rss_at_end, fds_at_end)] = sizes[..] else {
            unreachable!("two spans")
        };
        say(&format!(
            "{tally:?}, {kept} kept; faults: {:?}; {rss} MiB and {fds} files, at the end {rss_at_end} and {fds_at_end}; \
             the cleaner caught up in {caught_up:?}: {cleaner:?}",
            harbour.struck
        ));
        for replica in harbour.replicas.each_mut().map(|replica| replica.take().unwrap()) {
            harbour.note_panics(&replica);
            assert_eq!(replica.terminate(), Some(0));
        }
        assert!(harbour.panics.is_empty(), "{:#?}", harbour.panics);
        assert!(rss_at_end <= rss + rss / 2 + 32, "{rss} MiB have become {rss_at_end}");
        assert!(fds_at_end <= fds + 32, "{fds} files have become {fds_at_end}");
    }
}
