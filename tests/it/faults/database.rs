//! A Postgres that crashes, hangs up over COMMIT, takes back what it began, is too slow or too full, and has another
//! time than we.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;
use wharfinger::app::App;
use wharfinger::clock::Clock;
use wharfinger::service::cleaner::Report;

use super::client::{Client, Reply};
use super::mount::Mount;
use super::{PATIENCE, check_all, content, skipped};
use crate::common::postgres::Postgres;
use crate::common::{Backend, TestServer, block_link, block_list, polled};

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

/// Where the connection is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// Postgres never sees the COMMIT.
    Before,
    /// It has answered the COMMIT, and the answer is lost.
    After,
    /// As [`Cut::Before`], and nobody is told that the connection is gone.
    Silently,
}

/// Between server and Postgres. Once armed, it cuts the connection over the next COMMIT.
struct Proxy {
    port: u16,
    armed: Arc<Mutex<Option<Cut>>>,
    _listening: AbortOnDropHandle<()>,
}

impl Proxy {
    async fn before(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let armed = Arc::new(Mutex::new(None));
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

    /// Does something during which the connection is cut.
    async fn cut<T>(&self, cut: Cut, act: impl Future<Output = T>) -> T {
        *self.armed.lock().unwrap() = Some(cut);
        let done = act.await;
        assert_eq!(*self.armed.lock().unwrap(), None, "nothing was committed");
        done
    }
}

async fn pass_on(mut client: TcpStream, mut server: TcpStream, armed: Arc<Mutex<Option<Cut>>>) -> std::io::Result<()> {
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
                if sent.windows(7).any(|window| window == b"COMMIT\0") {
                    let cut = armed.lock().unwrap().take();
                    match cut {
                        Some(Cut::Before) => return Ok(()),
                        Some(Cut::After) => striking = true,
                        Some(Cut::Silently) => std::future::pending().await,
                        None => {}
                    }
                }
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

/// Every request that commits is cut off from its answer: it finds out by itself and says what is true.
async fn a_lost_commit(cut: Cut) {
    let postgres = Postgres::start();
    let proxy = Proxy::before(postgres.port()).await;
    let server = serve(&format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port)).await;
    let client = Client::of(&server);
    client.upload("before", &content(0, 10_000), 3_000).await.unwrap();
    let bytes = content(1, 400_000);
    // A body is not kept to be written again: what did not get through must be sent again.
    let expected = |reply: &Reply| match cut {
        Cut::After => reply.status == 201,
        Cut::Before | Cut::Silently => reply.is_busy(),
    };

    let link = proxy.cut(cut, client.create("name")).await.unwrap();
    let block = block_link(&link, "00000000");
    assert_eq!(client.put(&block, bytes.clone()).await.status, 201);
    // The same block again replaces the first in a transaction.
    let reply = proxy.cut(cut, client.put(&block, bytes.clone())).await;
    assert!(expected(&reply), "{reply}");
    assert_eq!(client.put(&block, bytes.clone()).await.status, 201);

    // A list that takes a block away again: its content is the beginning of what was there before.
    let list = format!("{link}&comp=blocklist");
    let second = client.put(&block_link(&link, "00000001"), content(2, 1_000)).await;
    assert_eq!(second.status, 201, "{second}");
    let both = block_list(&["00000000", "00000001"]);
    for ids in [both, block_list(&["00000000"])] {
        let reply = proxy.cut(cut, client.put(&list, ids.clone())).await;
        assert!(expected(&reply), "{reply}");
        let again = client.put(&list, ids).await;
        assert_eq!(again.status, 201, "{again}");
    }

    let id = proxy.cut(cut, client.finalize("name", &bytes)).await.unwrap();
    assert_eq!(client.list().await["name"], id);
    assert_eq!(
        client.finalize("name", &bytes).await.unwrap(),
        id,
        "the id that was given first"
    );
    client.check_ledger().await;

    let link = client.create("whole").await.unwrap();
    let reply = proxy.cut(cut, client.put(&link, bytes.clone())).await;
    assert!(expected(&reply), "{reply}");
    assert_eq!(client.put(&link, bytes.clone()).await.status, 201);
    client.finalize("whole", &bytes).await.unwrap();

    let deleted = proxy.cut(cut, client.delete("name")).await;
    assert_eq!(deleted.status, 200, "{deleted}");
    assert_eq!(deleted.json()["artifact_id"].as_str().unwrap(), id);
    // There is nothing left that could say so once more.
    let again = client.delete("name").await;
    assert_eq!((again.status, again.code.as_str()), (404, "not_found"));
    check_all(&server, client).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_is_lost_is_looked_up() {
    a_lost_commit(Cut::After).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_lost_is_made_up_for() {
    a_lost_commit(Cut::Before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_stops_even_if_the_database_never_answers() {
    let postgres = Postgres::start();
    let proxy = Proxy::before(postgres.port()).await;
    let server = TestServer::start_with(Backend::PostgresS3, |config| {
        config.database.url = SecretString::from(format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port));
        config.server.drain_timeout = Duration::ZERO;
    })
    .await;
    let client = Client::of(&server);
    let stop = async {
        super::until("the COMMIT is on its way", || proxy.armed.lock().unwrap().is_none()).await;
        server.stop().await;
    };
    let stopped = tokio::time::timeout(PATIENCE, stop);
    let (created, stopped) = tokio::join!(proxy.cut(Cut::Silently, client.create("name")), stopped);
    assert_eq!(created.unwrap_err().status, 0, "nothing was promised");
    assert!(stopped.is_ok(), "it waits for the database");
}

/// Lets transactions on artifacts and blobs be taken back so many times, by their first statement or by their COMMIT.
struct Taker(PgConnection);

impl Taker {
    async fn at(server: &TestServer) -> Self {
        let url = server.config.database.url.expose_secret();
        let mut connection = PgConnection::connect(url).await.unwrap();
        connection
            .execute(
                "CREATE SEQUENCE attempts; CREATE TABLE taken_back (times BIGINT, code TEXT);
                 INSERT INTO taken_back VALUES (0, '40001');
                 CREATE FUNCTION take_back() RETURNS trigger LANGUAGE plpgsql AS $$
                 BEGIN
                     -- The verifier asks every now and then.
                     IF current_query() NOT LIKE 'UPDATE blobs SET verify_lease%'
                         AND nextval('attempts') <= (SELECT times FROM taken_back) THEN
                         RAISE EXCEPTION 'taken back' USING ERRCODE = (SELECT code FROM taken_back);
                     END IF;
                     RETURN NULL;
                 END $$",
            )
            .await
            .unwrap();
        Self(connection)
    }

    async fn watch(&mut self, when: &str) {
        for table in ["artifacts", "blobs"] {
            let watch = match when {
                "COMMIT" => format!(
                    "CREATE CONSTRAINT TRIGGER taker AFTER INSERT OR UPDATE OR DELETE ON {table}
                     DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION take_back()"
                ),
                _ => format!(
                    "CREATE TRIGGER taker BEFORE INSERT OR UPDATE OR DELETE ON {table}
                     FOR EACH STATEMENT EXECUTE FUNCTION take_back()"
                ),
            };
            let forget = format!("DROP TRIGGER IF EXISTS taker ON {table}");
            self.0.execute(AssertSqlSafe(forget)).await.unwrap();
            self.0.execute(AssertSqlSafe(watch)).await.unwrap();
        }
    }

    /// From now on. Returns how many transactions began before.
    async fn take_back(&mut self, times: i64, code: &str) -> i64 {
        sqlx::query("UPDATE taken_back SET times = $1, code = $2")
            .bind(times)
            .bind(code)
            .execute(&mut self.0)
            .await
            .unwrap();
        let begun: i64 = sqlx::query_scalar("SELECT last_value FROM attempts")
            .fetch_one(&mut self.0)
            .await
            .unwrap();
        self.0.execute("ALTER SEQUENCE attempts RESTART").await.unwrap();
        begun
    }

    /// A request that is taken back again and again is put off, and one that is taken back twice is done.
    async fn try_on(&mut self, what: &str, code: &str, request: impl AsyncFn() -> Reply) {
        self.take_back(i64::MAX, code).await;
        let refused = request().await;
        assert!(refused.is_busy(), "{what}: {refused}");
        assert_eq!(self.take_back(2, code).await, 3, "{what}: attempts");
        let done = request().await;
        assert!(done.is_success(), "{what}: {done}");
        self.take_back(0, code).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_postgres_takes_back_is_tried_three_times() {
    let server = TestServer::start(Backend::PostgresS3).await;
    let client = Client::of(&server);
    client.upload("before", &content(0, 10_000), 3_000).await.unwrap();
    let bytes = content(1, 10_000);
    let mut taker = Taker::at(&server).await;
    for (when, code) in [("statement", "40001"), ("statement", "40P01"), ("COMMIT", "40001")] {
        taker.watch(when).await;
        let name = format!("{when} {code}");
        let create = json!({ "name": name, "version": 4 });
        taker
            .try_on(&format!("{name}: Create"), code, async || {
                client.call("CreateArtifact", create.clone()).await
            })
            .await;
        let link = client.create(&name).await.unwrap();
        let block = block_link(&link, "00000000");
        assert!(client.put(&block, bytes.clone()).await.is_success());
        taker
            .try_on(&format!("{name}: Put Block again"), code, async || {
                client.put(&block, bytes.clone()).await
            })
            .await;
        let list = format!("{link}&comp=blocklist");
        taker
            .try_on(&format!("{name}: Put Block List"), code, async || {
                client.put(&list, block_list(&["00000000"])).await
            })
            .await;
        taker
            .try_on(&format!("{name}: Put Blob"), code, async || {
                client.put(&link, bytes.clone()).await
            })
            .await;
        let finalize = json!({ "name": name, "size": bytes.len().to_string() });
        taker
            .try_on(&format!("{name}: Finalize"), code, async || {
                client.call("FinalizeArtifact", finalize.clone()).await
            })
            .await;
        taker
            .try_on(&format!("{name}: Delete"), code, async || client.delete(&name).await)
            .await;
    }
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

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_takes_too_long_is_put_off() {
    let server = TestServer::start(Backend::PostgresS3).await;
    let client = Client::of(&server);
    client.upload("before", &content(0, 10_000), 3_000).await.unwrap();
    let url = server.config.database.url.expose_secret();
    let mut owner = PgConnection::connect(url).await.unwrap();
    owner
        .execute(
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql
                 AS $$ BEGIN PERFORM pg_sleep(60); RETURN NULL; END $$;
             CREATE TRIGGER dawdle BEFORE INSERT OR UPDATE OR DELETE ON artifacts
                 FOR EACH STATEMENT EXECUTE FUNCTION dawdle()",
        )
        .await
        .unwrap();
    let begun = Instant::now();
    let (create, delete) = tokio::join!(client.create("slow"), client.delete("before"));
    let took = begun.elapsed();
    for refused in [create.unwrap_err(), delete] {
        assert!(refused.is_busy(), "{refused}");
    }
    assert!((9..15).contains(&took.as_secs()), "{took:?}");
    owner.execute("DROP TRIGGER dawdle ON artifacts").await.unwrap();
    client.upload("slow", &content(1, 10_000), 3_000).await.unwrap();
    check_all(&server, client).await;
    server.stop().await;
}

/// What the server says of itself, once it says this.
async fn until_ready(server: &TestServer, ready: bool) -> String {
    let begun = Instant::now();
    loop {
        let reply = server.http.get(format!("http://{}/readyz", server.app.internal));
        let reply = reply.send().await.unwrap();
        let status = reply.status();
        let text = reply.text().await.unwrap();
        if status == if ready { 200 } else { 503 } {
            return text;
        }
        assert!(begun.elapsed() < PATIENCE, "{status} {text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_without_a_connection_to_spare_puts_requests_off() {
    let postgres = Postgres::start();
    let mut owner = PgConnection::connect(&postgres.url()).await.unwrap();
    owner.execute("ALTER SYSTEM SET max_connections = 12").await.unwrap();
    postgres.stop_at_once();
    postgres.start_again();
    let server = serve(&postgres.url()).await;
    let client = Client::of(&server);
    client.upload("before", &content(0, 10_000), 3_000).await.unwrap();
    let link = client.create("staged").await.unwrap();

    let mut others = vec![PgConnection::connect(&postgres.url()).await.unwrap()];
    loop {
        while let Ok(other) = PgConnection::connect(&postgres.url()).await {
            others.push(other);
        }
        let ended: i64 = sqlx::query_scalar(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'wharfinger'",
        )
        .fetch_one(&mut others[0])
        .await
        .unwrap();
        if ended == 0 {
            break;
        }
    }
    let not_ready = until_ready(&server, false).await;
    assert!(not_ready.contains("database: "), "{not_ready}");
    let refusals = join_all((0..8).map(async |i| match i % 4 {
        0 => client.call("ListArtifacts", json!({})).await,
        1 => client.create("waiting").await.unwrap_err(),
        2 => client.download("before").await,
        _ => client.put(&link, content(2, 1000)).await,
    }));
    for refused in refusals.await {
        assert!(refused.is_busy(), "{refused}");
    }

    drop(others);
    until_ready(&server, true).await;
    client.upload("after", &content(1, 10_000), 3_000).await.unwrap();
    check_all(&server, client).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_whose_disk_is_full_puts_writes_off() {
    let postgres = Postgres::start();
    let disk = match Mount::small(&postgres.path("disk")) {
        Ok(disk) => disk,
        Err(reason) => return skipped("a_postgres_whose_disk_is_full_puts_writes_off", &reason),
    };
    postgres.give(&disk.path);
    let mut owner = PgConnection::connect(&postgres.url()).await.unwrap();
    for statement in [
        format!("CREATE TABLESPACE small LOCATION '{}'", disk.path.display()),
        "CREATE DATABASE small TABLESPACE small".to_owned(),
    ] {
        owner.execute(AssertSqlSafe(statement)).await.unwrap();
    }
    let url = postgres
        .url()
        .replace("/postgres", "/small")
        .replace("//small", "//postgres");
    let server = serve(&url).await;
    let client = Client::of(&server);
    client.upload("before", &content(0, 10_000), 3_000).await.unwrap();

    let mut owner = PgConnection::connect(&url).await.unwrap();
    owner.execute("CREATE TABLE filler (page TEXT)").await.unwrap();
    // By halves, to the last page.
    for rows in [4096, 512, 64, 8, 1] {
        let fill = format!("INSERT INTO filler SELECT repeat('x', 2000) FROM generate_series(1, {rows})");
        while owner.execute(AssertSqlSafe(fill.as_str())).await.is_ok() {}
    }
    let mut done = 0;
    let refused = loop {
        // Pages that were begun take some rows more.
        match client.create(&format!("more-{done}")).await {
            Ok(_) => done += 1,
            Err(refused) => break refused,
        }
        assert!(done < 1_000, "the disk is never full");
    };
    assert!(refused.is_busy(), "{refused}");
    println!("{done} artifacts were begun on a full disk");
    // Reading goes on.
    client.check_ledger().await;

    owner.execute("DROP TABLE filler").await.unwrap();
    client.upload("after", &content(1, 10_000), 3_000).await.unwrap();
    check_all(&server, client).await;
    server.stop().await;
}

/// A second replica, on a machine whose clock is off.
struct Skewed {
    app: App,
    off_by_ms: Arc<AtomicI64>,
}

impl Skewed {
    async fn beside(server: &TestServer) -> Self {
        let off_by_ms = Arc::new(AtomicI64::new(0));
        let clock = Clock::Off(Arc::clone(&off_by_ms));
        let app = App::start(&server.config, clock, None).await.unwrap();
        Self { app, off_by_ms }
    }

    fn set_off_by(&self, minutes: i64) {
        self.off_by_ms.store(minutes * 60_000, Ordering::Relaxed);
    }

    async fn readiness(&self) -> (u16, String) {
        let reply = reqwest::get(format!("http://{}/readyz", self.app.internal))
            .await
            .unwrap();
        (reply.status().as_u16(), reply.text().await.unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_clock_is_off_is_not_ready_and_deletes_nothing() {
    const DUE: i64 = 40;
    let server = TestServer::start_with(Backend::PostgresS3, |config| {
        config.cleaner.batch = 1;
        config.cleaner.delete_grace = Duration::ZERO;
    })
    .await;
    let client = Client::of(&server);
    let replica = Skewed::beside(&server).await;
    // What a clock that is ahead would take for due: an upload, and an artifact that ends in five minutes.
    client.upload("kept", &content(0, 10_000), 3_000).await.unwrap();
    let link = client.create("begun").await.unwrap();
    client.put(&block_link(&link, "00000000"), content(1, 1_000)).await;
    let mut owner = PgConnection::connect(server.config.database.url.expose_secret())
        .await
        .unwrap();
    client.upload("soon", &content(2, 10_000), 3_000).await.unwrap();
    let end = async |owner: &mut PgConnection, name: &str, in_ms: i64| {
        sqlx::query("UPDATE artifacts SET expires_at_ms = $1 WHERE name LIKE $2")
            .bind(Clock::System.now_ms() + in_ms)
            .bind(name)
            .execute(owner)
            .await
            .unwrap();
    };
    end(&mut owner, "soon", 300_000).await;
    // Each look stages another block: one that is staged again would leave garbage.
    let mut looks = 0;
    let mut stays = async || {
        client.check_ledger().await;
        looks += 1;
        let block = block_link(&link, &format!("{looks:08}"));
        let reply = client.put(&block, content(1, 1_000)).await;
        assert!(reply.is_success(), "the upload that was begun: {reply}");
    };

    for minutes in [10, -25 * 60, 2] {
        replica.set_off_by(minutes);
        let (status, text) = replica.readiness().await;
        assert_eq!(status, 503, "{minutes} min: {text}");
        let way = if minutes > 0 { "ahead of" } else { "behind" };
        // To the second: it was set a moment ago.
        let expected = [0, 1].map(|late| format!("the clock is {} s {way} the database's", minutes.abs() * 60 - late));
        assert!(expected.iter().any(|said| text.contains(said)), "{minutes} min: {text}");
        assert_eq!(replica.app.services.clean().await.unwrap(), None, "{minutes} min");
        stays().await;
        replica.set_off_by(0);
        assert_eq!(replica.readiness().await.0, 200, "after {minutes} min");
        let report = replica.app.services.clean().await.unwrap();
        assert_eq!(report, Some(Report::default()), "after {minutes} min");
    }

    // And a clock that jumps in the middle of a pass, wherever that is.
    for i in 0..DUE {
        let name = format!("due-{i}");
        client.upload(&name, &content(3, 1_000), 1_000).await.unwrap();
        client.forget(&name).await;
    }
    end(&mut owner, "due-%", -1).await;
    let mut expired = 0;
    for waits in 0..60 {
        replica.set_off_by(0);
        let mut pass = std::pin::pin!(replica.app.services.clean());
        let report = match polled(&mut pass, waits).await {
            Some(report) => report,
            None => {
                replica.set_off_by(if waits % 2 == 0 { 25 * 60 } else { -25 * 60 });
                pass.await
            }
        };
        expired += report.unwrap().map_or(0, |report| report.expired_artifacts);
    }
    println!("{expired} of {DUE} expired in passes that were cut short");
    replica.set_off_by(0);
    let rest = replica.app.services.clean().await.unwrap().unwrap().expired_artifacts;
    assert_eq!(expired + rest, DUE as u64);
    stays().await;
    replica.app.stop().await;
    server.stop().await;
}
