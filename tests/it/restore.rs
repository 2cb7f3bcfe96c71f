//! A database and a store that are not of the same moment: one of them comes from a backup. What both know is there
//! byte for byte, what the store has lost is said to be lost, and what the database does not know goes in due time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::TryStreamExt;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tempfile::TempDir;
use wharfinger::config::Config;
use wharfinger::model::ObjectKey;
use wharfinger::service::fsck::{Kind, Options};

use crate::common::{Backend, Job, TestServer, block_link, block_list};
use crate::faults::skipped;

/// Artifacts that come and go between the two moments.
const COUNT: usize = 50;
const GRACE: Duration = Duration::from_secs(60);
const SWEEP_AFTER: Duration = Duration::from_secs(12 * 3600);
const MEND: Options = Options {
    deep: true,
    repair: true,
};
const LOOK: Options = Options {
    deep: true,
    repair: false,
};

async fn start(backend: Backend) -> TestServer {
    TestServer::start_with(backend, |config| {
        config.cleaner.delete_grace = GRACE;
        config.cleaner.sweep_after = SWEEP_AFTER;
    })
    .await
}

fn names(kind: &str) -> Vec<String> {
    (0..COUNT).map(|i| format!("{kind}-{i}")).collect()
}

/// What is in the artifact of that name, whichever its id.
fn bytes(name: &str) -> Vec<u8> {
    name.bytes().cycle().take(1000 + name.len() * 100).collect()
}

/// Every tenth artifact has two blocks.
async fn upload(job: &Job<'_>, name: &str) {
    let bytes = bytes(name);
    if !name.ends_with('0') {
        job.upload(name, &bytes).await;
        return;
    }
    let link = job.create(name).await;
    for (id, block) in ["AAAA", "BBBB"].into_iter().zip(bytes.chunks(bytes.len().div_ceil(2))) {
        assert_eq!(job.put(&block_link(&link, id), block.to_vec()).await.0, 201);
    }
    let list = block_list(&["AAAA", "BBBB"]);
    assert_eq!(job.put(&format!("{link}&comp=blocklist"), list).await.0, 201);
    assert_eq!(finalize(job, name, &bytes).await, 200);
}

async fn finalize(job: &Job<'_>, name: &str, bytes: &[u8]) -> u16 {
    let hash: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let fields = json!({ "name": name, "size": bytes.len().to_string(), "hash": format!("sha256:{hash}") });
    job.call("FinalizeArtifact", fields).await.0
}

async fn upload_all(job: &Job<'_>, names: &[String]) {
    for name in names {
        upload(job, name).await;
    }
}

async fn delete_all(job: &Job<'_>, names: &[String]) {
    for name in names {
        let (status, reply) = job.call("DeleteArtifact", json!({ "name": name })).await;
        assert_eq!(status, 200, "{reply}");
    }
}

/// Exactly these artifacts are listed, and they have their bytes.
async fn assert_whole(job: &Job<'_>, names: &[String]) {
    let listed: BTreeSet<_> = job.names().await.into_iter().collect();
    assert_eq!(listed, names.iter().cloned().collect());
    for name in names {
        assert!(job.download(name).await == bytes(name), "{name} has other bytes");
    }
}

async fn links(job: &Job<'_>, names: &[String]) -> Vec<String> {
    let mut links = Vec::new();
    for name in names {
        links.push(job.link(name).await);
    }
    links
}

async fn assert_gone(server: &TestServer, links: &[String]) {
    for link in links {
        assert_eq!(server.http.get(link).send().await.unwrap().status(), 410, "{link}");
    }
}

/// What fsck says: the kinds of problems, and whether each was repaired.
async fn check(server: &TestServer, options: Options) -> Vec<(Kind, bool)> {
    let mut told = Vec::new();
    let services = &server.app.services;
    services
        .fsck(options, &mut |problem| told.push((problem.kind, problem.repaired)))
        .await
        .unwrap();
    told
}

async fn clean(server: &TestServer) {
    server.app.services.clean().await.unwrap().expect("nobody else cleans");
}

async fn objects(server: &TestServer) -> BTreeSet<ObjectKey> {
    let listed: Vec<_> = server.app.services.store.list_all().try_collect().await.unwrap();
    listed.into_iter().map(|object| object.key).collect()
}

/// A copy of the database of a server that is stopped.
enum Backup {
    Files(TempDir),
    Database(SecretString),
}

impl Backup {
    async fn of(config: &Config) -> Self {
        if config.database.is_embedded() {
            let directory = tempfile::tempdir().unwrap();
            copy_database(&config.data_dir, directory.path());
            return Self::Files(directory);
        }
        let url = config.database.url.expose_secret();
        let (cluster, name) = url.rsplit_once('/').unwrap();
        let mut admin = PgConnection::connect(&format!("{cluster}/postgres")).await.unwrap();
        let copy = format!("CREATE DATABASE {name}_backup TEMPLATE {name}");
        admin.execute(AssertSqlSafe(copy)).await.unwrap();
        Self::Database(format!("{url}_backup").into())
    }

    fn restore(self, config: &mut Config) {
        match self {
            Self::Files(directory) => copy_database(directory.path(), &config.data_dir),
            Self::Database(url) => config.database.url = url,
        }
    }
}

/// Replaces the SQLite files in one directory by those in another.
fn copy_database(from: &Path, to: &Path) {
    let files = |directory: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let is_database = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("wharfinger.db")
        };
        entries.filter(is_database).collect()
    };
    for file in files(to) {
        fs::remove_file(file).unwrap();
    }
    assert!(!files(from).is_empty());
    for file in files(from) {
        fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_older_than_its_store() {
    for backend in Backend::ALL {
        database_older(backend).await;
    }
}

async fn database_older(backend: Backend) {
    let server = start(backend).await;
    let (kept, doomed, new) = (names("kept"), names("doomed"), names("new"));
    let job = server.job();
    upload_all(&job, &kept).await;
    upload_all(&job, &doomed).await;
    let staged = job.create("staged").await;
    assert_eq!(job.put(&block_link(&staged, "AAAA"), b"before".to_vec()).await.0, 201);
    let first_url = server.url.clone();

    let mut backup = None;
    let server = server
        .restarted(async |config| backup = Some(Backup::of(config).await))
        .await;
    let job = server.job();
    let staged = staged.replace(&first_url, &server.url);
    assert_eq!(job.put(&block_link(&staged, "AAAA"), b"after".to_vec()).await.0, 201);
    delete_all(&job, &doomed).await;
    let known = objects(&server).await;
    upload_all(&job, &new).await;
    let unknown: BTreeSet<_> = objects(&server).await.difference(&known).cloned().collect();
    assert!(unknown.len() > COUNT);
    server.advance(GRACE);
    clean(&server).await;
    let second_url = server.url.clone();

    let server = server.restarted(async |config| backup.unwrap().restore(config)).await;
    let job = server.job();
    // The rows of what was deleted are back, its bytes are not.
    let lost = links(&job, &doomed).await;
    assert_gone(&server, &lost).await;
    clean(&server).await;
    let mut told = check(&server, MEND).await;
    assert_eq!(told, vec![(Kind::Lost, true); COUNT], "{backend:?}");
    assert_gone(&server, &lost).await;
    for name in &doomed {
        let (status, reply) = job.call("GetSignedArtifactURL", json!({ "name": name })).await;
        assert_eq!(status, 404, "{reply}");
    }
    assert_whole(&job, &kept).await;
    assert!(
        objects(&server).await.is_superset(&unknown),
        "what is young may be somebody's"
    );

    // The block that was sent again is refused, and taken when it comes a third time.
    let staged = staged.replace(&second_url, &server.url);
    let list = format!("{staged}&comp=blocklist");
    let listed = job.put(&list, block_list(&["AAAA"])).await;
    let refused = finalize(&job, "staged", b"before").await;
    assert!(refused != 200 && refused != 500, "{backend:?}: {listed:?}, {refused}");
    assert_eq!(job.put(&block_link(&staged, "AAAA"), b"again".to_vec()).await.0, 201);
    assert_eq!(job.put(&list, block_list(&["AAAA"])).await.0, 201);
    assert_eq!(finalize(&job, "staged", b"again").await, 200);
    assert_eq!(job.download("staged").await, b"again");
    delete_all(&job, &["staged".to_owned()]).await;
    // Names are free again, and their new objects are nobody else's.
    upload_all(&job, &doomed).await;
    upload_all(&job, &new[..1]).await;

    server.advance(SWEEP_AFTER);
    clean(&server).await;
    told = check(&server, MEND).await;
    assert_eq!(told, vec![(Kind::Orphan, true); unknown.len()], "{backend:?}");
    assert!(objects(&server).await.is_disjoint(&unknown));
    assert_eq!(check(&server, LOOK).await, [], "{backend:?}");
    assert_whole(&server.job(), &[kept, doomed, new[..1].to_vec()].concat()).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_older_than_its_database() {
    for backend in Backend::ALL {
        store_older(backend).await;
    }
}

async fn store_older(backend: Backend) {
    let server = start(backend).await;
    let directory = match &server.s3 {
        None => server.config.data_dir.join("objects"),
        Some(s3) => match s3.bucket_directory() {
            Some(directory) => directory,
            None => {
                skipped(
                    "a_store_older_than_its_database",
                    "a server outside has no files to copy",
                );
                return server.stop().await;
            }
        },
    };
    let (kept, forgotten, buried, new) = (names("kept"), names("forgotten"), names("buried"), names("new"));
    let job = server.job();
    for names in [&kept, &forgotten, &buried] {
        upload_all(&job, names).await;
    }
    let backup = tempfile::tempdir().unwrap();
    let server = server.restarted(async |_| copy_tree(&directory, backup.path())).await;
    let job = server.job();
    upload_all(&job, &new).await;
    delete_all(&job, &forgotten).await;
    for _ in 0..2 {
        server.advance(SWEEP_AFTER);
        clean(&server).await;
    }
    let needed = objects(&server).await;
    delete_all(&server.job(), &buried).await;
    server.advance(GRACE);
    clean(&server).await;

    let server = server
        .restarted(async |_| {
            fs::remove_dir_all(&directory).unwrap();
            copy_tree(backup.path(), &directory);
            // Where it must be private, it was.
            let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            fs::set_permissions(&directory, private).unwrap();
        })
        .await;
    let job = server.job();
    let lost = links(&job, &new).await;
    assert_gone(&server, &lost).await;
    clean(&server).await;
    let told = check(&server, MEND).await;
    let count = |kind| told.iter().filter(|problem| **problem == (kind, true)).count();
    // Tombstones still know theirs; those that are forgotten do not.
    assert_eq!(
        (count(Kind::Lost), count(Kind::Orphan)),
        (COUNT, COUNT * 11 / 10),
        "{backend:?}"
    );
    assert_eq!(told.len(), COUNT + COUNT * 11 / 10, "{backend:?}: {told:?}");
    assert_gone(&server, &lost).await;
    assert_whole(&job, &kept).await;
    upload_all(&job, &new).await;

    server.advance(SWEEP_AFTER);
    clean(&server).await;
    assert_eq!(check(&server, LOOK).await, [], "{backend:?}");
    assert_whole(&server.job(), &[kept, new].concat()).await;
    assert_eq!(
        objects(&server).await.len(),
        needed.len() - COUNT * 11 / 10,
        "{backend:?}"
    );
    server.stop().await;
}
