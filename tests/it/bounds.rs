//! What one client may take of the server: time limits on heads, bodies and replies, the memory for bytes on their way,
//! and places for connections.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wharfinger::config::Config;

use crate::common::{Backend, Job, TestServer, block_link, block_list, raw};

const MIB: usize = 1024 * 1024;
/// Short, because the tests wait for it to pass; long enough for a busy machine to be faster.
pub const SHORT: Duration = Duration::from_millis(300);
/// How long a server may take to do what it must.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub async fn connect(server: &TestServer) -> TcpStream {
    TcpStream::connect(server.url.strip_prefix("http://").unwrap())
        .await
        .unwrap()
}

/// What comes until the server closes.
pub async fn rest(socket: &mut TcpStream) -> Vec<u8> {
    let mut received = Vec::new();
    let reading = socket.read_to_end(&mut received);
    // An error is an end as well: the server may reset what it has not read.
    let _ = tokio::time::timeout(PATIENCE, reading)
        .await
        .expect("the server closes");
    received
}

/// A Put Blob that says it has so many bytes and sends none of them.
fn put_blob_head(link: &str, size_bytes: usize) -> Vec<u8> {
    let target = &link[link.find("/blob/").unwrap()..];
    let length = size_bytes.to_string();
    let headers = [("x-ms-blob-type", "BlockBlob"), ("content-length", length.as_str())];
    raw::request("PUT", target, &headers, b"")
}

/// Room for one stream only.
pub fn one_stream(config: &mut Config) {
    config.memory.upload_bytes = 64 * 1024;
    config.memory.download_bytes = 64 * 1024;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_must_come_in_time() {
    let server = TestServer::start_with(Backend::SqliteDisk, |config| config.server.head_timeout = SHORT).await;
    let mut silent = connect(&server).await;
    assert_eq!(rest(&mut silent).await, b"");
    let mut half = connect(&server).await;
    half.write_all(b"GET / HTTP/1.1\r\nHost: ").await.unwrap();
    assert_eq!(rest(&mut half).await, b"");
    // A byte now and then does not help.
    let begun = Instant::now();
    let mut slow = connect(&server).await;
    while slow.write_all(b"G").await.is_ok() {
        assert!(begun.elapsed() < PATIENCE, "a head without an end");
        tokio::time::sleep(SHORT / 10).await;
    }
    // Between requests the connection may rest longer than that.
    let mut kept = connect(&server).await;
    for _ in 0..2 {
        kept.write_all(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .await
            .unwrap();
        let mut reply = [0; 12];
        kept.read_exact(&mut reply).await.unwrap();
        assert_eq!(&reply, b"HTTP/1.1 404");
        let mut more = [0; 4096];
        let _ = kept.read(&mut more).await.unwrap();
        tokio::time::sleep(SHORT * 2).await;
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed() {
    let server = TestServer::start_with(Backend::SqliteDisk, |config| config.server.idle_timeout = SHORT).await;
    let mut kept = connect(&server).await;
    kept.write_all(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    assert!(rest(&mut kept).await.starts_with(b"HTTP/1.1 404"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_upload_loses_its_place_to_the_next() {
    for backend in Backend::ALL {
        let server = TestServer::start_with(backend, |config| {
            one_stream(config);
            config.server.body_idle_timeout = SHORT;
            config.server.min_bytes_per_second = 1024 * 1024;
        })
        .await;
        let job = server.job();
        let link = job.create("slow").await;
        let mut slow = connect(&server).await;
        slow.write_all(&put_blob_head(&link, MIB)).await.unwrap();
        let (mut reader, mut writer) = slow.split();
        let trickle = async {
            while writer.write_all(b"x").await.is_ok() {
                tokio::time::sleep(SHORT / 20).await;
            }
        };
        let reply = async {
            let mut reply = Vec::new();
            let _ = reader.read_to_end(&mut reply).await;
            String::from_utf8(reply).unwrap()
        };
        let next = async { job.upload("next", &[7; MIB]).await };
        let (reply, _) = tokio::time::timeout(PATIENCE, async {
            tokio::select! {
                both = async { tokio::join!(reply, next) } => both,
                () = async { trickle.await; std::future::pending().await } => unreachable!(),
            }
        })
        .await
        .expect("the slow one is cut and the other one served");
        assert!(reply.starts_with("HTTP/1.1 503"), "{backend:?}: {reply}");
        assert!(reply.contains("ServerBusy"), "{backend:?}: {reply}");
        assert_eq!(job.download("next").await, [7; MIB]);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_takes_nothing_loses_its_place_to_the_next() {
    for backend in Backend::ALL {
        let server = TestServer::start_with(backend, |config| {
            one_stream(config);
            config.server.body_idle_timeout = SHORT;
        })
        .await;
        let job = server.job();
        // More than the sockets between can hold.
        let bytes = vec![3; 32 * MIB];
        job.upload("large", &bytes).await;
        let link = job.link("large").await;
        let mut deaf = connect(&server).await;
        let target = &link[link.find("/blob/").unwrap()..];
        deaf.write_all(&raw::request("GET", target, &[], b"")).await.unwrap();
        let mut first = [0; 12];
        deaf.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
        let other = tokio::time::timeout(PATIENCE, job.download("large")).await;
        assert!(other.expect("the deaf one is cut") == bytes, "{backend:?}");
        assert!(
            rest(&mut deaf).await.len() < bytes.len(),
            "{backend:?}: cut, not served"
        );
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_memory_a_request_waits_and_is_then_put_off() {
    for backend in Backend::ALL {
        let server = TestServer::start_with(backend, |config| {
            one_stream(config);
            config.memory.wait = SHORT;
        })
        .await;
        let job = server.job();
        let link = job.create("first").await;
        let mut first = connect(&server).await;
        first.write_all(&put_blob_head(&link, MIB)).await.unwrap();
        first.write_all(&vec![1; MIB / 2]).await.unwrap();
        // When the first one has its share is not to be seen from here; until then the second finds room.
        let second = job.create("second").await;
        let refused = tokio::time::timeout(PATIENCE, async {
            loop {
                let reply = server
                    .http
                    .put(block_link(&second, "AAAA"))
                    .body(vec![2; MIB])
                    .send()
                    .await
                    .unwrap();
                if reply.status() != 201 {
                    break reply;
                }
            }
        })
        .await
        .expect("a refusal");
        assert_eq!(refused.status(), 503, "{backend:?}");
        assert_eq!(refused.headers()["x-ms-error-code"], "ServerBusy");
        assert!(refused.headers().contains_key("retry-after"));
        // What takes no bytes is served all the while.
        assert_eq!(job.call("ListArtifacts", json!({})).await.0, 200);
        first.write_all(&vec![1; MIB / 2]).await.unwrap();
        assert!(rest(&mut first).await.starts_with(b"HTTP/1.1 201"), "{backend:?}");
        assert_eq!(job.put(&second, vec![2; MIB]).await.0, 201, "{backend:?}: room again");
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_only_says_that_much_will_come_takes_no_memory() {
    for backend in Backend::ALL {
        let server = TestServer::start_with(backend, one_stream).await;
        let job = server.job();
        let link = job.create("announced").await;
        let target = format!("{}&comp=blocklist", &link[link.find("/blob/").unwrap()..]);
        let mut idle = Vec::new();
        for _ in 0..3 {
            let mut socket = connect(&server).await;
            let head = raw::request("PUT", &target, &[("content-length", "8388608")], b"");
            socket.write_all(&head).await.unwrap();
            socket.write_all(b"<BlockList>").await.unwrap();
            idle.push(socket);
        }
        let other = tokio::time::timeout(PATIENCE / 2, job.upload("other", b"bytes")).await;
        assert!(other.is_ok(), "{backend:?}: an upload waits for what never comes");
        drop(idle);
        // And a list that takes more than all there is goes alone.
        let long: String = (0..6000)
            .map(|i| format!("<Latest>{}</Latest>", base64_id(i)))
            .collect();
        let long = format!("<?xml version=\"1.0\"?><BlockList>{long}</BlockList>");
        let commit = server.http.put(format!("{link}&comp=blocklist")).body(long).send();
        let reply = tokio::time::timeout(PATIENCE / 2, commit)
            .await
            .expect("an answer")
            .unwrap();
        assert_eq!(reply.headers()["x-ms-error-code"], "InvalidBlockList");
        server.stop().await;
    }
}

/// Clients before 2.2 open as many requests as an artifact has blocks, up to 300.
#[tokio::test(flavor = "multi_thread")]
async fn many_blocks_at_once_queue() {
    for backend in Backend::ALL {
        let server = TestServer::start_with(backend, |config| {
            one_stream(config);
            config.server.max_connections = 100;
        })
        .await;
        let job = server.job();
        let link = job.create("many").await;
        let ids: Vec<String> = (0..300).map(base64_id).collect();
        let sent = join_all(ids.iter().map(|id| put_block(&job, &link, id))).await;
        assert_eq!(sent, [201; 300], "{backend:?}");
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let list = format!("{link}&comp=blocklist");
        assert_eq!(job.put(&list, block_list(&ids)).await.0, 201);
        let size = (300 * 64 * 1024).to_string();
        let finalized = job
            .call("FinalizeArtifact", json!({ "name": "many", "size": size }))
            .await;
        assert_eq!(finalized.0, 200, "{finalized:?}");
        server.stop().await;
    }
}

fn base64_id(i: usize) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(format!("{i:06}"))
}

async fn put_block(job: &Job<'_>, link: &str, id: &str) -> u16 {
    job.put(&block_link(link, id), vec![5; 64 * 1024]).await.0
}
