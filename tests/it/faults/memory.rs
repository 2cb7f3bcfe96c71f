//! Hundreds of large uploads at once: they become slower, or are put off, and the server stays small.

use std::convert::Infallible;
use std::fs;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream;

use super::{is_long_run, until};
use crate::common::process::{Environment, Process, RemoteJob, secret_file};
use crate::common::s3::S3Server;
use crate::common::{Backend, postgres_database};

const UPLOADS: usize = 200;
const MIB: usize = 1 << 20;
const CAP_MIB: usize = 256;
const AFTER_MIB: usize = 64;
/// What every upload sends, again and again.
static PIECE: [u8; 64 << 10] = [0x5a; 64 << 10];
/// What the server is told about memory, and to leave out what only takes time here.
const SETTINGS: [(&str, &str); 2] = [
    ("WHARFINGER_STORAGE__DURABILITY", "process"),
    ("WHARFINGER_MEMORY__UPLOAD_BYTES", "134217728"),
];

/// Sends a whole blob, again as long as it is put off. Returns how often it was.
async fn put(job: &RemoteJob, link: &str, size_bytes: usize) -> usize {
    let mut put_off = 0;
    loop {
        let pieces = std::iter::repeat_n(
            Ok::<_, Infallible>(Bytes::from_static(&PIECE)),
            size_bytes / PIECE.len(),
        );
        let body = reqwest::Body::wrap_stream(stream::iter(pieces));
        match job.put(link, size_bytes, body).await {
            Ok(201) => return put_off,
            Ok(503) => put_off += 1,
            // Refused before it had sent everything, it may find the connection closed.
            Err(error) if error.is_request() => put_off += 1,
            other => panic!("{other:?}"),
        }
    }
}

/// What the kernel says of a process' memory under this name, in MiB.
fn mib(pid: u32, name: &str) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    value.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() / 1024
}

/// The most that a process has had, in MiB.
fn peak_mib(pid: u32) -> usize {
    mib(pid, "VmHWM:")
}

async fn uploads_fit_in_memory(backend: Backend, size_bytes: usize) {
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("data");
    let s3 = (backend == Backend::PostgresS3).then(S3Server::inside);
    let mut environment = match &s3 {
        None => Environment::embedded(&data_dir),
        Some(s3) => {
            let secret_file = secret_file(directory.path());
            Environment::production(&data_dir, &postgres_database().await, s3, &secret_file)
        }
    };
    for (name, value) in SETTINGS {
        environment.set(name, value);
    }
    let server = Process::start(&environment);
    // Without a time limit: all of it may be more than the disk takes in some minutes.
    let job = RemoteJob {
        http: reqwest::Client::new(),
        ..server.job()
    };
    let mut links = Vec::new();
    for i in 0..UPLOADS {
        links.push(job.create(&format!("large-{i}")).await);
    }
    let idle = peak_mib(server.pid());
    let put_off: usize = join_all(links.iter().map(|link| put(&job, link, size_bytes)))
        .await
        .into_iter()
        .sum();
    let peak = peak_mib(server.pid());
    println!(
        "{backend:?}: {UPLOADS} x {} MiB, {put_off} put off, {idle} MiB before, at most {peak} MiB",
        size_bytes / MIB
    );
    assert!(peak < CAP_MIB, "{backend:?}: {peak} MiB");
    job.finalize("large-0", size_bytes).await;
    let after = || mib(server.pid(), "RssAnon:");
    println!("{backend:?}: {} MiB right after it", after());
    until("memory comes back after a burst", || after() < AFTER_MIB).await;
    assert_eq!(server.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_uploads_fit_in_memory_on_disk() {
    uploads_fit_in_memory(Backend::SqliteDisk, 8 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_uploads_fit_in_memory_on_s3() {
    uploads_fit_in_memory(Backend::PostgresS3, 8 * MIB).await;
}

mod long {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn many_large_uploads_fit_in_memory() {
        if is_long_run("many_large_uploads_fit_in_memory") {
            uploads_fit_in_memory(Backend::SqliteDisk, 128 * MIB).await;
        }
    }
}
