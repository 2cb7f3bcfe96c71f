//! A Postgres that crashes, hangs up between COMMIT and its reply, or has no room for one request more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use secrecy::SecretString;
use serde_json::json;
use sqlx::{Connection, Executor, PgConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use super::client::Client;
use super::{check_all, content};
use crate::common::postgres::Postgres;
use crate::common::{Backend, TestServer, block_link, block_list};

async fn serve(database: &str) -> TestServer {
    TestServer::start_with(Backend::PostgresS3, |config| {
        config.database.url = SecretString::from(database.to_owned());
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_may_crash_under_load() {
    let postgres = Arc::new(Postgres::start());
    let server = serve(&postgres.url()).await;
    let client = Client::of(&server);
    client.upload("before", &content(0, 10_000), 3_000).await.unwrap();

    let (over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let load = join_all((0..50u64).map(async |worker| {
        let mut put_off = 0;
        let mut round = 0;
        while !over.load(Ordering::Relaxed) {
            let bytes = content(worker, 5_000 + round);
            put_off += client.upload_patiently(&format!("load-{worker}-{round}"), &bytes).await;
            done.fetch_add(1, Ordering::Relaxed);
            round += 1;
        }
        put_off
    }));
    let crashes = async {
        let mut slowest = Duration::ZERO;
        for _ in 0..5 {
            progress(&done, 50).await;
            aside(&postgres, Postgres::stop_at_once).await;
            let refused = client.call("ListArtifacts", json!({})).await;
            assert!(refused.is_busy(), "{refused}");
            aside(&postgres, Postgres::start_again).await;
            let back = Instant::now();
            progress(&done, 1).await;
            slowest = slowest.max(back.elapsed());
        }
        over.store(true, Ordering::Relaxed);
        slowest
    };
    let (put_off, slowest) = tokio::join!(load, crashes);
    let put_off: usize = put_off.into_iter().sum();
    println!(
        "{} uploads, {put_off} requests put off, {slowest:?} to the first upload",
        done.load(Ordering::Relaxed)
    );
    assert!(put_off > 0, "no client felt the crashes");
    assert!(slowest < Duration::from_secs(30), "{slowest:?} until the first upload");
    check_all(&server, client).await;
    server.stop().await;
}

/// While the load goes on.
async fn aside(postgres: &Arc<Postgres>, act: fn(&Postgres)) {
    let postgres = Arc::clone(postgres);
    tokio::task::spawn_blocking(move || act(&postgres)).await.unwrap();
}

/// Waits for so many more uploads.
async fn progress(done: &AtomicUsize, more: usize) {
    let goal = done.load(Ordering::Relaxed) + more;
    super::until("uploads go on", || done.load(Ordering::Relaxed) >= goal).await;
}

/// Between server and Postgres. Once armed, it lets the next COMMIT through, waits until Postgres has answered it, and
/// hangs up on both instead of passing the answer on.
struct Proxy {
    port: u16,
    armed: Arc<AtomicBool>,
    _listening: AbortOnDropHandle<()>,
}

impl Proxy {
    async fn before(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let armed = Arc::new(AtomicBool::new(false));
        let listening = tokio::spawn({
            let armed = Arc::clone(&armed);
            async move {
                loop {
                    let (socket, _) = listener.accept().await.unwrap();
                    let upstream = TcpStream::connect(("127.0.0.1", upstream)).await.unwrap();
                    tokio::spawn(pass_on(socket, upstream, Arc::clone(&armed)));
                }
            }
        });
        Self {
            port,
            armed,
            _listening: AbortOnDropHandle::new(listening),
        }
    }

    fn arm(&self) {
        self.armed.store(true, Ordering::Relaxed);
    }

    fn has_struck(&self) -> bool {
        !self.armed.load(Ordering::Relaxed)
    }
}

async fn pass_on(mut client: TcpStream, mut server: TcpStream, armed: Arc<AtomicBool>) -> std::io::Result<()> {
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut striking = false;
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let sent = &from_client[..read?];
                if sent.is_empty() {
                    return Ok(());
                }
                // A COMMIT is a message of its own.
                striking = sent.windows(7).any(|window| window == b"COMMIT\0") && armed.swap(false, Ordering::Relaxed);
                server.write_all(sent).await?;
            }
            read = server.read(&mut from_server) => {
                let answer = &from_server[..read?];
                if answer.is_empty() || striking {
                    return Ok(());
                }
                client.write_all(answer).await?;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_is_lost_counts_once() {
    let postgres = Postgres::start();
    let proxy = Proxy::before(postgres.port()).await;
    let server = serve(&format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port)).await;
    let client = Client::of(&server);
    client.upload("before", &content(0, 10_000), 3_000).await.unwrap();
    let bytes = content(1, 400_000);

    proxy.arm();
    let lost = client.create("twice").await.unwrap_err();
    assert!(proxy.has_struck() && lost.is_busy(), "{lost}");
    let link = client.create("twice").await.unwrap();

    assert_eq!(
        client.put(&block_link(&link, "00000000"), bytes.clone()).await.status,
        201
    );
    // The same block again replaces the first in a transaction.
    proxy.arm();
    let lost = client.put(&block_link(&link, "00000000"), bytes.clone()).await;
    assert!(proxy.has_struck() && lost.is_busy(), "{lost}");
    assert_eq!(
        client.put(&block_link(&link, "00000000"), bytes.clone()).await.status,
        201
    );

    let list = format!("{link}&comp=blocklist");
    proxy.arm();
    let lost = client.put(&list, block_list(&["00000000"])).await;
    assert!(proxy.has_struck() && lost.is_busy(), "{lost}");
    let again = client.put(&list, block_list(&["00000000"])).await;
    assert_eq!(again.status, 201, "{again}");

    proxy.arm();
    let lost = client.finalize("twice", &bytes).await.unwrap_err();
    assert!(proxy.has_struck() && lost.is_busy(), "{lost}");
    let listed = client.list().await["twice"].clone();
    assert_eq!(
        client.finalize("twice", &bytes).await.unwrap(),
        listed,
        "the id that was given first"
    );
    client.check_ledger().await;

    let link = client.create("whole").await.unwrap();
    proxy.arm();
    let lost = client.put(&link, bytes.clone()).await;
    assert!(proxy.has_struck() && lost.is_busy(), "{lost}");
    assert_eq!(client.put(&link, bytes.clone()).await.status, 201);
    client.finalize("whole", &bytes).await.unwrap();

    proxy.arm();
    let lost = client.delete("twice").await;
    assert!(proxy.has_struck() && lost.is_busy(), "{lost}");
    // It is deleted already, and there is nothing left that could say so.
    let again = client.delete("twice").await;
    assert_eq!((again.status, again.code.as_str()), (404, "not_found"));
    client.forget("twice").await;
    check_all(&server, client).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_wait_too_long_for_the_database_are_put_off() {
    let postgres = Postgres::start();
    let server = TestServer::start_with(Backend::PostgresS3, |config| {
        config.database.url = SecretString::from(postgres.url());
        config.database.max_connections = 4;
    })
    .await;
    let client = Client::of(&server);
    client.upload("before", &content(0, 10_000), 3_000).await.unwrap();

    let link = client.create("staged").await.unwrap();
    let mut holder = PgConnection::connect(&postgres.url()).await.unwrap();
    holder.execute("BEGIN; LOCK TABLE artifacts, blobs").await.unwrap();
    // Four wait for the lock, the others for a connection.
    let slowest = join_all((0..24).map(async |i| {
        let begun = Instant::now();
        let reply = match i % 4 {
            0 => client.call("ListArtifacts", json!({})).await,
            1 => client.create(&format!("waiting-{i}")).await.unwrap_err(),
            2 => client.delete("before").await,
            _ => client.put(&link, content(2, 1000)).await,
        };
        assert!(reply.is_busy(), "{reply}");
        begun.elapsed()
    }))
    .await
    .into_iter()
    .max()
    .unwrap();
    println!("the slowest of 24 refusals took {slowest:?}");
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");

    holder.execute("ROLLBACK").await.unwrap();
    client.upload("after", &content(1, 10_000), 3_000).await.unwrap();
    check_all(&server, client).await;
    server.stop().await;
}
