//! Clients that vanish, by a reset or in silence, at every stage of an upload and of a download: what they held is
//! given back, nothing of theirs is shown, and the others are served.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::client::Client;
use super::{content, until};
use crate::common::process::{Environment, Process, secret_file};
use crate::common::raw::request;
use crate::common::s3::S3Server;
use crate::common::{Backend, block_link, block_list, postgres_database};

const MIB: usize = 1 << 20;
/// Larger than what the sockets between server and a client that does not read can hold.
const LARGE: usize = 16 * MIB;
const BLOCK: usize = 1000;
/// How many connections the server has places for: those of all stages twice.
const PLACES: usize = 2 * STAGES;
const STAGES: usize = 8;
/// Stages at which the server has a request in hand.
const REQUESTS: usize = 6;

/// Where a client is when it vanishes.
struct Stage {
    /// What it has sent by then.
    sent: Vec<u8>,
    /// Whether it has begun to read a reply.
    reads: bool,
}

struct Wharf {
    process: Process,
    objects: PathBuf,
    _s3: Option<S3Server>,
    _directory: TempDir,
}

impl Wharf {
    async fn start(backend: Backend) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data_dir = directory.path().join("data");
        let s3 = (backend == Backend::PostgresS3).then(S3Server::inside);
        let (mut environment, objects) = match &s3 {
            None => (Environment::embedded(&data_dir), data_dir.join("objects")),
            Some(s3) => {
                let secret_file = secret_file(directory.path());
                let environment = Environment::production(&data_dir, &postgres_database().await, s3, &secret_file);
                (environment, s3.bucket_directory().unwrap().join("test"))
            }
        };
        environment.set("WHARFINGER_SERVER__IDLE_TIMEOUT", "2s");
        environment.set("WHARFINGER_SERVER__BODY_IDLE_TIMEOUT", "2s");
        environment.set("WHARFINGER_SERVER__MAX_CONNECTIONS", PLACES);
        Self {
            process: Process::start(&environment),
            objects,
            _s3: s3,
            _directory: directory,
        }
    }

    /// The sum of a gauge over all routes.
    async fn gauge(&self, name: &str) -> f64 {
        let metrics = reqwest::get(format!("{}/metrics", self.process.internal_url)).await;
        let metrics = metrics.unwrap().text().await.unwrap();
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    async fn until_in_flight(&self, requests: usize) {
        let begun = std::time::Instant::now();
        while self.gauge("wharfinger_http_requests_in_flight").await != requests as f64 {
            assert!(begun.elapsed() < super::PATIENCE, "{requests} requests are in flight");
        }
    }

    /// Connections of clients that the server holds.
    fn connections(&self) -> usize {
        const LISTEN: &str = "0A";
        let address = &self.process.environment.0["WHARFINGER_LISTEN"];
        let port: u16 = address.rsplit(':').next().unwrap().parse().unwrap();
        let table = fs::read_to_string("/proc/net/tcp").unwrap();
        let held = table.lines().skip(1).filter(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            // A socket without an inode is the kernel's alone.
            fields[1].ends_with(&format!(":{port:04X}")) && fields[3] != LISTEN && fields[9] != "0"
        });
        held.count()
    }

    /// Sizes of all files of the store except its marker.
    fn stored(&self) -> Vec<u64> {
        let mut sizes = Vec::new();
        walk(&self.objects.join("blobs"), &mut sizes);
        sizes.sort_unstable();
        sizes
    }

    /// Goes as far as `stage` on a connection of its own, and no further.
    async fn go(&self, stage: &Stage) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 << 10).unwrap();
        let address = self.process.environment.0["WHARFINGER_LISTEN"].parse().unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        stream.write_all(&stage.sent).await.unwrap();
        if stage.reads {
            let mut begun = [0; 4096];
            stream.read_exact(&mut begun).await.unwrap();
            assert!(
                begun.starts_with(b"HTTP/1.1 200 OK"),
                "{}",
                String::from_utf8_lossy(&begun)
            );
        }
        stream
    }

    async fn go_all(&self, stages: &[Stage]) -> Vec<TcpStream> {
        let mut streams = Vec::new();
        for stage in stages {
            streams.push(self.go(stage).await);
        }
        streams
    }
}

fn walk(directory: &Path, sizes: &mut Vec<u64>) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), sizes);
        } else {
            // One that is gone meanwhile is none.
            sizes.extend(entry.metadata().ok().map(|metadata| metadata.len()));
        }
    }
}

/// A request whose second half never comes.
fn half(method: &str, url: &str, headers: &[(&str, &str)], body: &[u8]) -> Stage {
    let path = url.splitn(4, '/').last().unwrap();
    let mut sent = request(method, &format!("/{path}"), headers, body);
    sent.truncate(sent.len() - body.len().div_ceil(2));
    Stage { sent, reads: false }
}

/// Every stage, for a job with an artifact "pending" to be uploaded, and one to be read.
fn stages(process: &Process, pending: &str, readable: &str) -> [Stage; STAGES] {
    let token = format!("Bearer {}", process.token("octo/demo", "1", "build"));
    let call = |method: &str, name: &str| {
        let url = format!("http://localhost/twirp/github.actions.results.api.v1.ArtifactService/{method}");
        let body = json!({
            "workflow_run_backend_id": "1", "workflow_job_run_backend_id": "build",
            "name": name, "version": 4, "size": BLOCK.to_string(),
        });
        let headers = [("authorization", &token[..]), ("content-type", "application/json")];
        half("POST", &url, &headers, body.to_string().as_bytes())
    };
    let blob = [("x-ms-blob-type", "BlockBlob")];
    let reading = half("GET", readable, &[], &[]);
    [
        Stage {
            sent: Vec::new(),
            reads: false,
        },
        Stage {
            sent: b"PUT /blob/artifact".to_vec(),
            reads: false,
        },
        half("PUT", &block_link(pending, "BBBB"), &[], &content(1, 2 * MIB)),
        half("PUT", &format!("{pending}&comp=blocklist"), &[], &block_list(&["AAAA"])),
        half("PUT", pending, &blob, &content(2, 2 * MIB)),
        call("CreateArtifact", "never"),
        call("FinalizeArtifact", "pending"),
        Stage { reads: true, ..reading },
    ]
}

async fn clients_vanish(backend: Backend) {
    let wharf = Wharf::start(backend).await;
    let client = Client::of_process(&wharf.process);
    client.upload("large", &content(0, LARGE), 8 * MIB).await.unwrap();
    let pending = client.create("pending").await.unwrap();
    let staged = client.put(&block_link(&pending, "AAAA"), content(3, BLOCK)).await;
    assert_eq!(staged.status, 201);
    let reply = client.call("GetSignedArtifactURL", json!({ "name": "large" })).await;
    let readable = reply.json()["signed_url"].as_str().unwrap().to_owned();
    let stages = stages(&wharf.process, &pending, &readable);
    let before = wharf.stored();

    // By a reset.
    let streams = wharf.go_all(&stages).await;
    wharf.until_in_flight(REQUESTS).await;
    for stream in streams {
        stream.set_zero_linger().unwrap();
    }
    wharf.until_in_flight(0).await;
    until("every connection has ended", || wharf.connections() == 0).await;

    // In silence: whoever comes meanwhile is served at once.
    let streams = wharf.go_all(&stages).await;
    wharf.until_in_flight(REQUESTS).await;
    client.upload("beside", &content(4, BLOCK), BLOCK).await.unwrap();
    client.check_ledger().await;
    assert_eq!(client.delete("beside").await.status, 200);
    wharf.until_in_flight(0).await;
    until("every connection has ended", || wharf.connections() == 0).await;
    drop(streams);

    // In silence, and on every place that there is: whoever comes is served when they are given up.
    let streams = [wharf.go_all(&stages).await, wharf.go_all(&stages).await];
    client.upload("after", &content(4, BLOCK), BLOCK).await.unwrap();
    assert_eq!(client.delete("after").await.status, 200);
    wharf.until_in_flight(0).await;
    until("every connection has ended", || wharf.connections() == 0).await;
    drop(streams);
    assert_eq!(wharf.gauge("wharfinger_uploads_in_flight").await, 0.0);

    // Nothing of it all is left, and nothing is shown.
    let environment = &mut wharf.process.environment.clone();
    environment.set("WHARFINGER_CLEANER__DELETE_GRACE", "0s");
    environment.output(&["clean"]);
    until("what had begun to come is removed", || wharf.stored() == before).await;
    client.check_ledger().await;
    let refused = client.finalize("pending", &content(3, BLOCK)).await.unwrap_err();
    assert_eq!(refused.code, "failed_precondition", "{refused}");
    let absent = client.finalize("never", &content(3, BLOCK)).await.unwrap_err();
    assert_eq!(absent.code, "not_found", "{absent}");

    // Who comes back goes on where he was.
    let list = client
        .put(&format!("{pending}&comp=blocklist"), block_list(&["AAAA"]))
        .await;
    assert_eq!(list.status, 201, "{list}");
    client.finalize("pending", &content(3, BLOCK)).await.unwrap();
    client.check_ledger().await;
    environment.output(&["fsck", "--deep"]);
    assert_eq!(wharf.process.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_vanish_on_sqlite_and_disk() {
    clients_vanish(Backend::SqliteDisk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_vanish_on_postgres_and_s3() {
    clients_vanish(Backend::PostgresS3).await;
}
