//! The whole product against a model of it in a few maps: random histories of a few jobs over few names, with requests
//! that are cut, crashes and a clock that jumps, on which the two must agree at every step.
//!
//! A history that fails shrinks and is printed. `WHARFINGER_TEST_LONG` runs many more of them, and longer ones.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{TryStreamExt, stream};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestRunner};
use sha2::Digest;
use tempfile::TempDir;
use wharfinger::app;
use wharfinger::clock::Clock;
use wharfinger::config::Config;
use wharfinger::db::{ListEntry, ListSource};
use wharfinger::error::{Error, Result};
use wharfinger::model::{ArtifactId, BlobId, Principal, RunKey, Sha256};
use wharfinger::service::Services;
use wharfinger::service::artifacts::Request;
use wharfinger::service::fsck::{Kind, Options};
use wharfinger::service::uploads::{Checksums, Upload};

use crate::common::s3::S3Server;
use crate::common::{Backend, blob_of, config, polled};

const SECOND: i64 = 1_000;
const DEFAULT_RETENTION: i64 = 500 * SECOND;
const MAX_RETENTION: i64 = 2_000 * SECOND;
const ABANDONED_AFTER: i64 = 1_000 * SECOND;
const DELETE_GRACE: i64 = 60 * SECOND;
const SWEEP_AFTER: i64 = 300 * SECOND;
const MAX_PER_JOB: usize = 2;
/// Larger content is hashed behind Finalize's back.
const INLINE_MAX_BYTES: usize = 40;

/// Two jobs of one run, the second attempt of the first, and the same ids in another repository.
const JOBS: [Job; 4] = [
    Job("octo/demo", "build", 1),
    Job("octo/demo", "test", 1),
    Job("octo/demo", "build", 2),
    Job("octo/other", "build", 1),
];
const NAMES: [&str; 3] = ["x", "y", "z"];
const BLOCK_IDS: [&str; 3] = ["AAA=", "BBB=", "CCC="];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Job(&'static str, &'static str, i32);

/// So many bytes of one value.
#[derive(Clone, Copy, Debug)]
struct Fill(u8, u8);

/// One of the newest upload links: 0 is the newest.
type Back = usize;

#[derive(Clone, Copy, Debug)]
enum Hash {
    Unsaid,
    Right,
    Wrong,
}

#[derive(Clone, Debug)]
enum Op {
    Create {
        job: usize,
        name: usize,
        lives_s: Option<i64>,
    },
    Stage(Back, usize, Fill),
    /// A block whose body breaks off.
    StageHalf(Back, usize),
    /// A list of everything staged.
    ListStaged(Back),
    List(Back, Vec<(usize, ListSource)>),
    PutBlob(Back, Fill),
    Finalize {
        job: usize,
        name: usize,
        right_size: bool,
        hash: Hash,
    },
    Delete {
        job: usize,
        name: usize,
    },
    Find {
        job: usize,
        name: usize,
    },
    /// The whole content, or a part that begins and ends somewhere.
    Download(Back, Option<(u8, u8)>),
    Verify,
    Clean,
    Advance(i64),
    Crash,
}

/// An operation, and after how many waits its first try is dropped. A client then tries again.
#[derive(Clone, Debug)]
struct Step {
    op: Op,
    cut: Option<usize>,
}

fn ops() -> impl Strategy<Value = Op> {
    let (job, name) = (|| 0..JOBS.len(), || 0..NAMES.len());
    let back = || prop_oneof![4 => Just(0), 1 => 1..5_usize];
    let id = || 0..BLOCK_IDS.len();
    let fill = || (any::<u8>(), prop_oneof![4 => 1..10_u8, 1 => 45..200_u8]).prop_map(|(byte, len)| Fill(byte, len));
    let source = prop_oneof![
        4 => Just(ListSource::Latest),
        1 => Just(ListSource::Committed),
        1 => Just(ListSource::Uncommitted),
    ];
    let lives_s = prop_oneof![
        5 => Just(None),
        1 => Just(Some(-1)),
        1 => Just(Some(0)),
        2 => Just(Some(10)),
        1 => Just(Some(100)),
        1 => Just(Some(5_000)),
    ];
    let hash = prop_oneof![2 => Just(Hash::Unsaid), 3 => Just(Hash::Right), 1 => Just(Hash::Wrong)];
    let jumps = prop_oneof![
        Just(1),
        Just(10 * SECOND),
        Just(DELETE_GRACE),
        Just(SWEEP_AFTER),
        Just(DEFAULT_RETENTION),
        Just(ABANDONED_AFTER),
    ];
    let part = proptest::option::weighted(0.3, any::<(u8, u8)>());
    prop_oneof![
        8 => (job(), name(), lives_s).prop_map(|(job, name, lives_s)| Op::Create { job, name, lives_s }),
        8 => (back(), id(), fill()).prop_map(|(back, id, fill)| Op::Stage(back, id, fill)),
        1 => (back(), id()).prop_map(|(back, id)| Op::StageHalf(back, id)),
        5 => back().prop_map(Op::ListStaged),
        4 => (back(), vec((id(), source), 0..4)).prop_map(|(back, list)| Op::List(back, list)),
        3 => (back(), prop_oneof![fill(), Just(Fill(0, 0))]).prop_map(|(back, fill)| Op::PutBlob(back, fill)),
        10 => (job(), name(), prop::bool::weighted(0.9), hash)
            .prop_map(|(job, name, right_size, hash)| Op::Finalize { job, name, right_size, hash }),
        3 => (job(), name()).prop_map(|(job, name)| Op::Delete { job, name }),
        1 => (job(), name()).prop_map(|(job, name)| Op::Find { job, name }),
        4 => (back(), part).prop_map(|(back, part)| Op::Download(back, part)),
        2 => Just(Op::Verify),
        4 => Just(Op::Clean),
        4 => jumps.prop_map(Op::Advance),
        1 => Just(Op::Crash),
    ]
}

fn histories(longest: usize) -> impl Strategy<Value = Vec<Step>> {
    let cut = proptest::option::weighted(0.2, 0..30_usize);
    vec((ops(), cut).prop_map(|(op, cut)| Step { op, cut }), 1..longest)
}

/// What went wrong, by the name of the error's variant.
type Refused = &'static str;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Sealed,
    Superseded { since_ms: i64 },
    Gone,
}

#[derive(Debug)]
struct Blob {
    state: State,
    begun_ms: i64,
    staged: BTreeMap<&'static str, Vec<u8>>,
    /// What a list placed, in its order.
    content: Option<Vec<(&'static str, Vec<u8>)>>,
    /// What is known of its hash since it was sealed.
    hash: Option<Sha256>,
    verified: bool,
    /// What Finalize answered.
    id: Option<ArtifactId>,
}

#[derive(Clone, Copy, Debug)]
struct Artifact {
    job: usize,
    blob: usize,
    finalized: bool,
    created_ms: i64,
    expires_ms: i64,
}

/// A repository, an index of `NAMES` and an attempt.
type Key = (&'static str, usize, i32);

#[derive(Debug, Default)]
struct Model {
    now_ms: i64,
    artifacts: BTreeMap<Key, Artifact>,
    /// In the order of their links.
    blobs: Vec<Blob>,
}

impl Blob {
    fn bytes(&self) -> Vec<u8> {
        let blocks = self.content.iter().flatten();
        blocks.flat_map(|(_, bytes)| bytes.iter().copied()).collect()
    }

    /// Why it takes no bytes.
    fn check_open(&self) -> std::result::Result<(), Refused> {
        match self.state {
            State::Open => Ok(()),
            State::Sealed | State::Superseded { .. } => Err("Conflict"),
            State::Gone => Err("NotFound"),
        }
    }

    fn is_wrong(&self) -> bool {
        !self.verified && self.hash.is_some_and(|hash| hash != sha256(&self.bytes()))
    }
}

impl Model {
    fn key(job: usize, name: usize) -> Key {
        let Job(repository, _, attempt) = JOBS[job];
        (repository, name, attempt)
    }

    fn create(&mut self, job: usize, name: usize, asked_ms: Option<i64>) -> std::result::Result<(), Refused> {
        let now_ms = self.now_ms;
        let expires_ms = match asked_ms {
            Some(asked_ms) if asked_ms <= now_ms => return Err("Invalid"),
            Some(asked_ms) => asked_ms.min(now_ms + MAX_RETENTION),
            None => now_ms + DEFAULT_RETENTION,
        };
        let key = Self::key(job, name);
        let taken = |old: &Artifact| old.finalized && old.expires_ms > now_ms;
        if self.artifacts.get(&key).is_some_and(taken) {
            return Err("AlreadyExists");
        }
        let others = self
            .artifacts
            .iter()
            .filter(|(other, artifact)| **other != key && artifact.job == job);
        if others.count() >= MAX_PER_JOB {
            return Err("QuotaExceeded");
        }
        if let Some(old) = self.artifacts.get(&key) {
            self.blobs[old.blob].state = if old.finalized {
                State::Gone
            } else {
                State::Superseded { since_ms: now_ms }
            };
        }
        let artifact = Artifact {
            job,
            blob: self.blobs.len(),
            finalized: false,
            created_ms: now_ms,
            expires_ms,
        };
        self.artifacts.insert(key, artifact);
        self.blobs.push(Blob {
            state: State::Open,
            begun_ms: now_ms,
            staged: BTreeMap::new(),
            content: None,
            hash: None,
            verified: false,
            id: None,
        });
        Ok(())
    }

    fn stage(&mut self, blob: usize, id: &'static str, bytes: Vec<u8>) -> std::result::Result<(), Refused> {
        let blob = &mut self.blobs[blob];
        blob.check_open()?;
        blob.staged.insert(id, bytes);
        Ok(())
    }

    fn list(&mut self, blob: usize, list: &[(&'static str, ListSource)]) -> std::result::Result<(), Refused> {
        let blob = &mut self.blobs[blob];
        let placed = blob.content.iter().flatten();
        if blob.state == State::Sealed && placed.clone().map(|(id, _)| id).eq(list.iter().map(|(id, _)| id)) {
            return Ok(());
        }
        blob.check_open()?;
        // Of two placed blocks with one id, the later counts.
        let placed: HashMap<_, _> = placed.map(|(id, bytes)| (*id, bytes)).collect();
        let content = list
            .iter()
            .map(|(id, source)| {
                let (staged, placed) = (blob.staged.get(id), placed.get(id).copied());
                let found = match source {
                    ListSource::Committed => placed,
                    ListSource::Uncommitted => staged,
                    ListSource::Latest => staged.or(placed),
                };
                found.map(|bytes| (*id, bytes.clone())).ok_or("UnknownBlock")
            })
            .collect::<std::result::Result<Vec<_>, _>>()?;
        blob.content = Some(content);
        blob.staged.clear();
        Ok(())
    }

    fn put_blob(&mut self, blob: usize, bytes: Vec<u8>) -> std::result::Result<(), Refused> {
        let blob = &mut self.blobs[blob];
        blob.check_open()?;
        blob.staged.clear();
        blob.content = Some(if bytes.is_empty() { vec![] } else { vec![("", bytes)] });
        Ok(())
    }

    /// The blob whose id Finalize answers.
    fn finalize(
        &mut self,
        job: usize,
        name: usize,
        size: usize,
        said: Option<Sha256>,
    ) -> std::result::Result<usize, Refused> {
        let now_ms = self.now_ms;
        let artifact = self
            .artifacts
            .get_mut(&Self::key(job, name))
            .filter(|artifact| artifact.expires_ms > now_ms)
            .ok_or("NotFound")?;
        let blob = &mut self.blobs[artifact.blob];
        let bytes = blob.bytes();
        if artifact.finalized {
            let same_hash = said.is_none() || blob.hash.is_none() || said == blob.hash;
            let same = artifact.job == job && bytes.len() == size && same_hash;
            return if same { Ok(artifact.blob) } else { Err("Conflict") };
        }
        if artifact.job != job {
            return Err("Conflict");
        }
        if blob.content.is_none() {
            return Err("FailedPrecondition");
        }
        if bytes.len() != size {
            return Err("Invalid");
        }
        blob.verified = size <= INLINE_MAX_BYTES;
        blob.hash = said;
        if blob.verified {
            let actual = sha256(&bytes);
            if said.is_some_and(|said| said != actual) {
                return Err("Invalid");
            }
            blob.hash = Some(actual);
        }
        blob.state = State::Sealed;
        blob.staged.clear();
        artifact.finalized = true;
        Ok(artifact.blob)
    }

    /// What a job sees: of each name the artifact of the newest attempt up to its own, unless its job was run again.
    fn visible(&self, job: usize) -> BTreeMap<usize, Artifact> {
        let Job(repository, own_name, attempt) = JOBS[job];
        let (mut newest, mut last_attempts) = (BTreeMap::new(), BTreeMap::from([(own_name, attempt)]));
        for (key, artifact) in &self.artifacts {
            if key.0 == repository && key.2 <= attempt && artifact.finalized && artifact.expires_ms > self.now_ms {
                newest.insert(key.1, (key.2, *artifact));
                let last = last_attempts.entry(JOBS[artifact.job].1).or_insert(key.2);
                *last = key.2.max(*last);
            }
        }
        newest.retain(|_, (attempt, artifact)| *attempt == last_attempts[JOBS[artifact.job].1]);
        newest
            .into_iter()
            .map(|(name, (_, artifact))| (name, artifact))
            .collect()
    }

    fn delete(&mut self, job: usize, name: usize) -> std::result::Result<usize, Refused> {
        let blob = self.visible(job).get(&name).ok_or("NotFound")?.blob;
        self.bury(blob);
        Ok(blob)
    }

    fn bury(&mut self, blob: usize) {
        self.artifacts.retain(|_, artifact| artifact.blob != blob);
        self.blobs[blob].state = State::Gone;
    }

    fn download(&mut self, blob: usize, part: Option<Range<usize>>) -> std::result::Result<Vec<u8>, Refused> {
        let now_ms = self.now_ms;
        let shown = |artifact: &Artifact| artifact.finalized && artifact.expires_ms > now_ms;
        if !self
            .artifacts
            .values()
            .any(|artifact| artifact.blob == blob && shown(artifact))
        {
            return Err("NotFound");
        }
        let bytes = self.blobs[blob].bytes();
        let unverified = !self.blobs[blob].verified && self.blobs[blob].hash.is_some();
        if let Some(part) = part.filter(|part| *part != (0..bytes.len())) {
            let last = self.blobs[blob].content.iter().flatten().next_back();
            let last_start = bytes.len() - last.map_or(0, |(_, bytes)| bytes.len());
            return if unverified && part.end > last_start {
                Err("Busy")
            } else {
                Ok(bytes[part].to_vec())
            };
        }
        if self.blobs[blob].is_wrong() {
            self.bury(blob);
            return Err("Gone");
        }
        self.blobs[blob].verified |= unverified;
        Ok(bytes)
    }

    fn verify(&mut self) {
        for index in 0..self.blobs.len() {
            let blob = &mut self.blobs[index];
            if blob.state == State::Sealed && !blob.verified {
                if blob.is_wrong() {
                    self.bury(index);
                } else {
                    blob.hash = Some(sha256(&blob.bytes()));
                    blob.verified = true;
                }
            }
        }
    }

    fn clean(&mut self) {
        let now_ms = self.now_ms;
        let expired: Vec<_> = self
            .artifacts
            .values()
            .filter(|artifact| artifact.finalized && artifact.expires_ms <= now_ms)
            .map(|artifact| artifact.blob)
            .collect();
        expired.into_iter().for_each(|blob| self.bury(blob));
        for index in 0..self.blobs.len() {
            match self.blobs[index] {
                Blob {
                    state: State::Open,
                    begun_ms,
                    ..
                } if begun_ms <= now_ms - ABANDONED_AFTER => self.bury(index),
                Blob {
                    state: State::Superseded { since_ms },
                    ..
                } if since_ms <= now_ms - SWEEP_AFTER => self.blobs[index].state = State::Gone,
                _ => {}
            }
        }
    }
}

fn sha256(bytes: &[u8]) -> Sha256 {
    Sha256(sha2::Sha256::digest(bytes).into())
}

impl Fill {
    fn bytes(self) -> Vec<u8> {
        vec![self.0; self.1.into()]
    }
}

/// An answer as the model gives it.
fn told<T>(answer: Result<T>) -> std::result::Result<T, Refused> {
    answer.map_err(|error| match error {
        Error::NotFound(_) => "NotFound",
        Error::Gone(_) => "Gone",
        Error::AlreadyExists(_) => "AlreadyExists",
        Error::Conflict(_) => "Conflict",
        Error::Invalid(_) => "Invalid",
        Error::UnknownBlock(_) => "UnknownBlock",
        Error::FailedPrecondition(_) => "FailedPrecondition",
        Error::QuotaExceeded(_) => "QuotaExceeded",
        Error::Busy(text) if text.contains("still being verified") => "Busy",
        unexpected => panic!("no history may lead to {unexpected:?}"),
    })
}

/// The product beside its model.
struct World {
    services: Services,
    clock: Arc<AtomicI64>,
    model: Model,
    links: Vec<BlobId>,
    ids: BTreeSet<ArtifactId>,
    config: Config,
    _s3: Option<S3Server>,
    _directory: TempDir,
}

impl World {
    async fn new(backend: Backend) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let s3 = (backend == Backend::PostgresS3).then(S3Server::start);
        let mut config = config(backend, &directory, s3.as_ref()).await;
        let span = |ms: i64| Duration::from_millis(ms.unsigned_abs());
        config.artifacts.default_retention = span(DEFAULT_RETENTION);
        config.artifacts.max_retention = span(MAX_RETENTION);
        config.artifacts.max_per_job = u32::try_from(MAX_PER_JOB).unwrap();
        config.uploads.abandoned_after = span(ABANDONED_AFTER);
        config.cleaner.delete_grace = span(DELETE_GRACE);
        config.cleaner.sweep_after = span(SWEEP_AFTER);
        config.cleaner.batch = 2;
        config.verification.inline_max_bytes = INLINE_MAX_BYTES as u64;
        config.database.max_connections = 4;
        let clock = Arc::new(AtomicI64::new(Clock::System.now_ms()));
        Self {
            services: open(&config, &clock).await,
            model: Model {
                now_ms: clock.load(Ordering::Relaxed),
                ..Model::default()
            },
            clock,
            links: Vec::new(),
            ids: BTreeSet::new(),
            config,
            _s3: s3,
            _directory: directory,
        }
    }

    fn principal(&self, job: usize) -> Principal {
        let Job(repository, job, attempt) = JOBS[job];
        Principal {
            run: RunKey {
                issuer: "wharfinger".to_owned(),
                repository: format!("name:{repository}"),
                run_backend_id: "1".to_owned(),
            },
            repository_name: Some(repository.to_owned()),
            run_id: Some(1),
            run_attempt: attempt,
            job_backend_id: job.to_owned(),
            cache_scopes: Vec::new(),
            issued_at_ms: None,
            expires_at_ms: self.model.now_ms + 3_600 * SECOND,
        }
    }

    /// The index of a link; `None` before the first.
    fn link(&self, back: Back) -> Option<(usize, BlobId)> {
        let newest = self.links.len().checked_sub(1)?;
        let index = newest - back.min(newest);
        Some((index, self.links[index]))
    }

    fn advance(&mut self, ms: i64) {
        self.model.now_ms += ms;
        self.clock.store(self.model.now_ms, Ordering::Relaxed);
    }

    async fn step(&mut self, Step { op, cut }: &Step) {
        let cut = *cut;
        match op {
            Op::Create { job, name, lives_s } => self.create(*job, *name, *lives_s, cut).await,
            Op::Stage(back, id, fill) => {
                let Some((index, blob)) = self.link(*back) else { return };
                let id = BLOCK_IDS[*id];
                let actual = retried(cut, || self.services.stage_block(blob, id, upload(fill.bytes()))).await;
                assert_eq!(told(actual), self.model.stage(index, id, fill.bytes()));
            }
            Op::StageHalf(back, id) => {
                let Some((index, blob)) = self.link(*back) else { return };
                let broken: [Result<Bytes>; 2] = [
                    Ok(Bytes::from_static(b"half")),
                    Err(Error::Invalid("the body broke off".to_owned())),
                ];
                let half = Upload {
                    size_bytes: 8,
                    body: stream::iter(broken),
                    checksums: Checksums::default(),
                };
                let actual = self.services.stage_block(blob, BLOCK_IDS[*id], half).await;
                let expected = self.model.blobs[index].check_open().and(Err("Invalid"));
                assert_eq!(told(actual), expected);
            }
            Op::ListStaged(back) => {
                let Some((index, _)) = self.link(*back) else { return };
                let staged = self.model.blobs[index].staged.keys();
                let list: Vec<_> = staged.map(|id| (*id, ListSource::Latest)).collect();
                self.list(*back, list, cut).await;
            }
            Op::List(back, list) => {
                let list: Vec<_> = list.iter().map(|(id, source)| (BLOCK_IDS[*id], *source)).collect();
                self.list(*back, list, cut).await;
            }
            Op::PutBlob(back, fill) => {
                let Some((index, blob)) = self.link(*back) else { return };
                let put = || self.services.put_blob(blob, upload(fill.bytes()), None);
                let actual = retried(cut, put).await;
                assert_eq!(told(actual), self.model.put_blob(index, fill.bytes()));
            }
            Op::Finalize {
                job,
                name,
                right_size,
                hash,
            } => self.finalize(*job, *name, *right_size, *hash, cut).await,
            Op::Delete { job, name } => self.delete(*job, *name, cut).await,
            Op::Find { job, name } => {
                let actual = self.services.artifact_link(&self.principal(*job), NAMES[*name]).await;
                let expected = self.model.visible(*job).get(name).map(|shown| self.links[shown.blob]);
                assert_eq!(told(actual).map(|link| blob_of(&link)), expected.ok_or("NotFound"));
            }
            Op::Download(back, part) => {
                let Some((index, _)) = self.link(*back) else { return };
                let size = self.model.blobs[index].bytes().len();
                let part = part.filter(|_| size > 0).map(|(from, length)| {
                    let from = usize::from(from) % size;
                    from..from + 1 + usize::from(length) % (size - from)
                });
                let actual = self.download(index, part.clone()).await;
                assert_eq!(told(actual), self.model.download(index, part));
            }
            Op::Verify => self.verify().await,
            Op::Clean => self.clean().await,
            Op::Advance(ms) => self.advance(*ms),
            Op::Crash => self.services = open(&self.config, &self.clock).await,
        }
        self.compare_lists().await;
    }

    async fn create(&mut self, job: usize, name: usize, lives_s: Option<i64>, cut: Option<usize>) {
        let expires_at_ms = lives_s.map(|lives_s| self.model.now_ms + lives_s * SECOND);
        let principal = self.principal(job);
        let request = Request {
            name: NAMES[name],
            version: 4,
            mime_type: None,
            expires_at_ms,
        };
        let actual = told(retried(cut, || self.services.create_artifact(&principal, &request)).await);
        let expected = self.model.create(job, name, expires_at_ms);
        assert_eq!(actual.as_ref().map(drop), expected.as_ref().map(drop));
        self.links.extend(actual.map(|link| blob_of(&link)));
    }

    async fn list(&mut self, back: Back, list: Vec<(&'static str, ListSource)>, cut: Option<usize>) {
        let Some((index, blob)) = self.link(back) else { return };
        let entries: Vec<_> = list
            .iter()
            .map(|&(id, from)| ListEntry {
                block_id: id.to_owned(),
                from,
            })
            .collect();
        // Only a list of the latest blocks means the same when it is sent again.
        let cut = cut.filter(|_| list.iter().all(|(_, source)| *source == ListSource::Latest));
        let actual = retried(cut, || self.services.commit_block_list(blob, &entries, None)).await;
        assert_eq!(told(actual), self.model.list(index, &list));
    }

    async fn finalize(&mut self, job: usize, name: usize, right_size: bool, hash: Hash, cut: Option<usize>) {
        let artifact = self.model.artifacts.get(&Model::key(job, name)).copied();
        let bytes = artifact.map(|artifact| self.model.blobs[artifact.blob].bytes());
        let bytes = bytes.unwrap_or_default();
        let size = bytes.len() + usize::from(!right_size);
        let said = match hash {
            Hash::Unsaid => None,
            Hash::Right => Some(sha256(&bytes)),
            Hash::Wrong => Some(sha256(b"other bytes")),
        };
        let principal = self.principal(job);
        let finalize = || {
            self.services
                .finalize_artifact(&principal, NAMES[name], size as u64, said)
        };
        let actual = told(retried(cut, finalize).await);
        let expected = self.model.finalize(job, name, size, said);
        assert_eq!(actual.as_ref().map(drop), expected.as_ref().map(drop));
        if let (Ok(id), Ok(index)) = (actual, expected) {
            let known = self.model.blobs[index].id.get_or_insert(id);
            assert_eq!(*known, id, "the id of what was finalized");
            let shown = self.model.blobs.iter().filter(|blob| blob.id == Some(id)).count();
            assert_eq!(shown, 1, "an id means one content for ever");
            self.ids.insert(id);
        }
    }

    async fn delete(&mut self, job: usize, name: usize, cut: Option<usize>) {
        let principal = self.principal(job);
        let delete = || self.services.delete_artifact(&principal, NAMES[name]);
        // A second try of a later attempt would meet the artifact of an earlier one.
        let cut = cut.filter(|_| JOBS[job].2 == 1);
        if let Some(waits) = cut
            && let Some(done) = polled(&mut pin!(delete()), waits).await
        {
            assert_eq!(told(done).map(drop), self.model.delete(job, name).map(drop));
            return;
        }
        let actual = told(delete().await);
        let before = self.model.visible(job).get(&name).copied();
        let expected = self.model.delete(job, name);
        if cut.is_some() && actual == Err("NotFound") {
            // The try that was cut did it, or there was nothing to do.
            return;
        }
        let id = expected.map(|_| before.and_then(|artifact| self.model.blobs[artifact.blob].id).unwrap());
        assert_eq!(actual, id);
    }

    async fn download(&self, index: usize, part: Option<Range<usize>>) -> Result<Vec<u8>> {
        let blob = self.services.readable_blob(self.links[index]).await?;
        let range = part.map_or(0..blob.size_bytes, |part| part.start as u64..part.end as u64);
        let chunks: Vec<Bytes> = self.services.read_blob(&blob, range).await?.try_collect().await?;
        Ok(chunks.concat())
    }

    async fn verify(&mut self) {
        while self.services.verify_next().await.unwrap() {}
        self.model.verify();
    }

    async fn clean(&mut self) {
        assert!(self.services.clean().await.unwrap().is_some(), "nobody else cleans");
        self.model.clean();
    }

    async fn compare_lists(&self) {
        for job in 0..JOBS.len() {
            let listed = self.services.list_artifacts(&self.principal(job), None, None).await;
            let actual: Vec<_> = listed
                .unwrap()
                .into_iter()
                .map(|row| {
                    (
                        row.id,
                        row.name,
                        row.job_backend_id,
                        row.size_bytes,
                        row.created_at_ms,
                        row.sha256,
                    )
                })
                .collect();
            let mut expected: Vec<_> = self
                .model
                .visible(job)
                .into_iter()
                .map(|(name, shown)| {
                    let blob = &self.model.blobs[shown.blob];
                    (
                        blob.id.unwrap(),
                        NAMES[name].to_owned(),
                        JOBS[shown.job].1.to_owned(),
                        blob.bytes().len() as u64,
                        shown.created_ms,
                        blob.hash,
                    )
                })
                .collect();
            // The newest Create first. One that took a pending name over keeps the row, and so the id.
            expected.sort_by_key(|row| std::cmp::Reverse((row.4, row.0)));
            assert_eq!(actual, expected, "what job {job} sees");
        }
    }

    async fn fsck(&self, cleaned: bool) {
        let mut problems = Vec::new();
        let look = Options {
            deep: true,
            repair: false,
        };
        let tell = &mut |problem: &wharfinger::service::fsck::Problem| {
            // A history need not clean.
            if cleaned || problem.kind != Kind::Overdue {
                problems.push(problem.clone());
            }
        };
        self.services.fsck(look, tell).await.unwrap();
        assert!(problems.is_empty(), "{problems:#?}");
    }

    /// At the end everything is there that should be, and nothing is left after it was deleted.
    async fn settle(mut self) {
        self.verify().await;
        for index in 0..self.links.len() {
            let actual = self.download(index, None).await;
            assert_eq!(told(actual), self.model.download(index, None), "blob {index}");
        }
        self.fsck(false).await;
        for job in 0..JOBS.len() {
            for name in 0..NAMES.len() {
                while self.model.visible(job).contains_key(&name) {
                    self.delete(job, name, None).await;
                }
            }
        }
        for _ in 0..3 {
            self.advance(MAX_RETENTION + SWEEP_AFTER);
            self.clean().await;
            self.compare_lists().await;
            self.fsck(true).await;
        }
        let left: Vec<_> = self.services.store.list_all().try_collect().await.unwrap();
        assert_eq!(left, []);
        assert_eq!(self.services.db.blob_counts().await.unwrap(), []);
        self.services.db.close().await;
    }
}

async fn open(config: &Config, clock: &Arc<AtomicI64>) -> Services {
    app::open(config, Clock::Fixed(Arc::clone(clock))).await.unwrap()
}

fn upload(bytes: Vec<u8>) -> Upload<impl futures_util::Stream<Item = Result<Bytes>> + Send + 'static> {
    Upload {
        size_bytes: bytes.len() as u64,
        body: stream::iter([Ok(Bytes::from(bytes))]),
        checksums: Checksums::default(),
    }
}

/// A request whose client loses its first try, wherever that is by then, and sends it again.
async fn retried<T, F: Future<Output = Result<T>>>(cut: Option<usize>, request: impl Fn() -> F) -> Result<T> {
    if let Some(waits) = cut {
        // Done by then is as good: the client did not hear of it.
        let _ = polled(&mut pin!(request()), waits).await;
    }
    request().await
}

fn agree(backend: Backend, cases: u32, longest: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let cases = Cases {
        cases,
        failure_persistence: None,
        max_shrink_iters: 400,
        ..Cases::default()
    };
    let outcome = TestRunner::new(cases).run(&histories(longest), |history| {
        runtime.block_on(async {
            let mut world = World::new(backend).await;
            for step in &history {
                world.step(step).await;
            }
            world.settle().await;
        });
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

fn cases(short: u32, long: u32) -> (u32, usize) {
    if std::env::var_os("WHARFINGER_TEST_LONG").is_some() {
        (long, 120)
    } else {
        (short, 40)
    }
}

mod long {
    use super::{Backend, agree, cases};

    #[test]
    fn sqlite_and_disk_do_what_the_model_does() {
        let (cases, longest) = cases(60, 3_000);
        agree(Backend::SqliteDisk, cases, longest);
    }

    #[test]
    fn postgres_and_s3_do_what_the_model_does() {
        let (cases, longest) = cases(15, 300);
        agree(Backend::PostgresS3, cases, longest);
    }
}
