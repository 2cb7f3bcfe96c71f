//! An object store that refuses, stalls, lies and hangs up.
//!
//! The faults are made by a proxy before a good store. It passes `Host` on unchanged, which the signatures cover.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::client::Client;
use super::{check_all, content, until};
use crate::common::{Backend, TestServer, block_link};

#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// Answers so without reading the request.
    Status(u16),
    /// Takes the request, does nothing and reports the error behind a 200.
    ErrorIn200,
    NoReply,
    /// Hangs up after half of the body, the request's or the reply's.
    HalfThenCut,
    /// Does what was asked, and hangs up instead of saying so.
    LostReply,
    /// Stores or sends the first half as if it were all.
    Truncated,
    /// Stores or sends one bit the other way round.
    Flipped,
    /// Takes or sends nothing after half of the body until the faults are cleared.
    Stall,
    /// Bytes per second.
    Slow(u32),
}

impl Fault {
    /// What becomes of a body: its bytes, or an error where the connection breaks.
    fn spoil(self, body: Bytes, mut cleared: watch::Receiver<()>) -> impl Stream<Item = io::Result<Bytes>> + Send {
        let half = body.len() / 2;
        let (first, rest) = (body.slice(..half), body.slice(half..));
        let pieces: Vec<io::Result<Bytes>> = match self {
            Self::HalfThenCut => vec![Ok(first), Err(io::ErrorKind::ConnectionReset.into())],
            Self::Truncated => vec![Ok(first)],
            Self::Flipped => {
                let mut rest = rest.to_vec();
                rest[0] ^= 1;
                vec![Ok(first), Ok(rest.into())]
            }
            Self::Slow(rate) => (0..body.len())
                .step_by(rate as usize)
                .map(|from| Ok(body.slice(from..body.len().min(from + rate as usize))))
                .collect(),
            _ => vec![Ok(first), Ok(rest)],
        };
        // Only a clearing that is still to come counts.
        cleared.mark_unchanged();
        stream::iter(pieces.into_iter().enumerate()).then(move |(i, piece)| {
            let mut cleared = cleared.clone();
            let first = i == 0;
            async move {
                match self {
                    Self::Slow(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                    // An error means that the proxy is gone.
                    Self::Stall if !first => drop(cleared.changed().await),
                    // The first half must be on its way before the connection breaks.
                    Self::HalfThenCut if !first => tokio::task::yield_now().await,
                    _ => {}
                }
                piece
            }
        })
    }
}

/// Which requests for objects the fault befalls.
struct Rule {
    fault: Fault,
    /// All methods if `None`.
    method: Option<Method>,
    /// Only each so manieth.
    one_in: usize,
    /// At most so many.
    left: usize,
    seen: usize,
    hits: usize,
}

pub(super) struct Proxy {
    pub(super) endpoint: String,
    rule: Arc<Mutex<Option<Rule>>>,
    cleared: watch::Sender<()>,
    passing: Passing,
    listening: Option<AbortOnDropHandle<()>>,
}

impl Proxy {
    pub(super) fn before(upstream: &str) -> Self {
        let listener = bind("127.0.0.1:0");
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (cleared, watched) = watch::channel(());
        let rule = Arc::new(Mutex::new(None));
        let passing = Passing {
            upstream: upstream.to_owned(),
            http: reqwest::Client::new(),
            rule: Arc::clone(&rule),
            cleared: watched,
        };
        Self {
            endpoint,
            rule,
            cleared,
            listening: Some(passing.clone().listen(listener)),
            passing,
        }
    }

    /// From now on nobody listens, and connections that are open end.
    async fn go_away(&mut self) {
        let listening = self.listening.take().unwrap();
        listening.abort();
        let _ = listening.await;
    }

    fn come_back(&mut self) {
        let listener = bind(self.endpoint.strip_prefix("http://").unwrap());
        self.listening = Some(self.passing.clone().listen(listener));
    }

    pub(super) fn befall(&self, method: Option<Method>, fault: Fault, one_in: usize, left: usize) {
        *self.rule.lock().unwrap() = Some(Rule {
            fault,
            method,
            one_in,
            left,
            seen: 0,
            hits: 0,
        });
    }

    fn every(&self, method: Method, fault: Fault) {
        self.befall(Some(method), fault, 1, usize::MAX);
    }

    fn next(&self, method: Method, fault: Fault) {
        self.befall(Some(method), fault, 1, 1);
    }

    fn hits(&self) -> usize {
        self.rule.lock().unwrap().as_ref().map_or(0, |rule| rule.hits)
    }

    /// Ends the faults, also those that wait. Returns how many requests they befell.
    pub(super) fn clear(&self) -> usize {
        let rule = self.rule.lock().unwrap().take();
        self.cleared.send_replace(());
        rule.map_or(0, |rule| rule.hits)
    }
}

fn bind(address: &str) -> std::net::TcpListener {
    let listener = std::net::TcpListener::bind(address).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

/// What each connection of the proxy needs.
#[derive(Clone)]
struct Passing {
    upstream: String,
    http: reqwest::Client,
    rule: Arc<Mutex<Option<Rule>>>,
    cleared: watch::Receiver<()>,
}

impl Passing {
    fn listen(self, listener: std::net::TcpListener) -> AbortOnDropHandle<()> {
        AbortOnDropHandle::new(tokio::spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            let mut connections = JoinSet::new();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let passing = self.clone();
                let service = service_fn(move |request| passing.clone().handle(request));
                connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(socket), service));
            }
        }))
    }

    fn fault(&self, request: &Request<Incoming>) -> Option<Fault> {
        let mut rule = self.rule.lock().unwrap();
        let rule = rule.as_mut()?;
        let meant = rule.method.as_ref().is_none_or(|method| method == request.method());
        if !meant || !request.uri().path().contains("/blobs/") {
            return None;
        }
        rule.seen += 1;
        if rule.left == 0 || rule.seen % rule.one_in != 0 {
            return None;
        }
        rule.left -= 1;
        rule.hits += 1;
        Some(rule.fault)
    }

    /// An error ends the connection without a reply.
    async fn handle(self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        let fault = self.fault(&request);
        let error = |code: &str| Body::from(format!("<Error><Code>{code}</Code><Message>fault</Message></Error>"));
        let is_put = request.method() == Method::PUT;
        match fault {
            None => {
                let (head, body) = request.into_parts();
                let body = Body::new(body).into_data_stream().map_err(io::Error::other);
                self.pass_on(head, body).await
            }
            Some(Fault::Status(status)) => Ok(Response::builder().status(status).body(error("SlowDown")).unwrap()),
            Some(Fault::NoReply) => Err(io::ErrorKind::ConnectionReset.into()),
            Some(Fault::ErrorIn200) => {
                read(Body::new(request.into_body())).await?;
                Ok(Response::new(error("InternalError")))
            }
            Some(Fault::Slow(rate)) if is_put => {
                let (head, body) = request.into_parts();
                let body = Body::new(body).into_data_stream().map_err(io::Error::other);
                let slowly = body.and_then(move |frame| async move {
                    tokio::time::sleep(Duration::from_secs_f64(frame.len() as f64 / f64::from(rate))).await;
                    Ok(frame)
                });
                self.pass_on(head, slowly).await
            }
            Some(fault) if is_put => {
                let (mut head, body) = request.into_parts();
                let body = read(Body::new(body)).await?;
                if let Fault::Truncated = fault {
                    head.headers.insert("content-length", (body.len() / 2).into());
                }
                let reply = self.pass_on(head, fault.spoil(body, self.cleared.clone())).await?;
                match fault {
                    Fault::LostReply => Err(io::ErrorKind::ConnectionReset.into()),
                    _ => Ok(reply),
                }
            }
            Some(fault) => {
                let (head, body) = request.into_parts();
                let body = Body::new(body).into_data_stream().map_err(io::Error::other);
                let (mut head, body) = self.pass_on(head, body).await?.into_parts();
                let body = read(body).await?;
                match fault {
                    Fault::LostReply => return Err(io::ErrorKind::ConnectionReset.into()),
                    Fault::Truncated => {
                        head.headers.insert("content-length", (body.len() / 2).into());
                    }
                    _ => {}
                }
                let body = Body::from_stream(fault.spoil(body, self.cleared.clone()));
                Ok(Response::from_parts(head, body))
            }
        }
    }

    async fn pass_on(
        &self,
        mut head: hyper::http::request::Parts,
        body: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> io::Result<Response<Body>> {
        for name in ["connection", "transfer-encoding"] {
            head.headers.remove(name);
        }
        let has_body = head.headers.get("content-length").is_some_and(|length| length != "0");
        let mut passed = self
            .http
            .request(head.method, format!("{}{}", self.upstream, head.uri))
            .headers(head.headers);
        if has_body {
            passed = passed.body(reqwest::Body::wrap_stream(body));
        }
        let reply = passed.send().await.map_err(io::Error::other)?;
        let mut answer = Response::builder().status(reply.status());
        for (name, value) in reply.headers() {
            if name != "connection" && name != "transfer-encoding" {
                answer = answer.header(name, value);
            }
        }
        Ok(answer.body(Body::from_stream(reply.bytes_stream())).unwrap())
    }
}

async fn read(body: Body) -> io::Result<Bytes> {
    axum::body::to_bytes(body, usize::MAX).await.map_err(io::Error::other)
}

async fn start() -> (TestServer, Proxy, Client) {
    let mut proxy = None;
    let server = TestServer::start_with(Backend::PostgresS3, |config| {
        let before = Proxy::before(&config.storage.endpoint);
        config.storage.endpoint = before.endpoint.clone();
        proxy = Some(before);
    })
    .await;
    let client = Client::of(&server);
    (server, proxy.unwrap(), client)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_that_fails_is_put_off_and_leaves_nothing_in_sight() {
    let (server, proxy, client) = start().await;
    client.upload("sound", &content(0, 700_000), 300_000).await.unwrap();
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(429),
        Fault::ErrorIn200,
        Fault::NoReply,
        Fault::HalfThenCut,
        Fault::LostReply,
    ];
    for (seed, fault) in (1..).zip(faults) {
        let name = format!("{fault:?}").replace(['(', ')'], "-");
        let bytes = content(seed, 400_000);
        let link = client.create(&name).await.unwrap();
        proxy.every(Method::PUT, fault);
        for link in [link.clone(), block_link(&link, "00000000")] {
            let reply = client.put(&link, bytes.clone()).await;
            assert!(reply.is_busy(), "{fault:?}: {reply}");
        }
        let refused = client.finalize(&name, &bytes).await.unwrap_err();
        assert_eq!(refused.code, "failed_precondition", "{fault:?}: {refused}");
        client.check_ledger().await;
        assert_eq!(proxy.clear(), 2, "{fault:?}");

        let reply = client.put(&link, bytes.clone()).await;
        assert_eq!(reply.status, 201, "{fault:?} is over: {reply}");
        client.finalize(&name, &bytes).await.unwrap();
    }
    check_all(&server, client).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_puts_requests_off_until_it_is_back() {
    let (server, mut proxy, client) = start().await;
    let bytes = content(0, 700_000);
    client.upload("before", &bytes, 300_000).await.unwrap();
    let link = client.create("during").await.unwrap();
    proxy.go_away().await;
    let reply = client.put(&link, bytes.clone()).await;
    assert!(reply.is_busy(), "{reply}");
    let reply = client.put(&block_link(&link, "00000000"), bytes.clone()).await;
    assert!(reply.is_busy(), "{reply}");
    let reply = client.download("before").await;
    assert!(reply.is_busy(), "{reply}");
    let ready = reqwest::get(format!("http://{}/readyz", server.app.internal))
        .await
        .unwrap();
    assert_eq!(ready.status(), 503);
    assert!(ready.text().await.unwrap().contains("store: "));
    proxy.come_back();
    assert_eq!(client.put(&link, bytes.clone()).await.status, 201);
    client.finalize("during", &bytes).await.unwrap();
    check_all(&server, client).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_says_done_and_keeps_other_bytes_is_found_out_before_finalize_answers() {
    let (server, proxy, client) = start().await;
    client.upload("sound", b"sound", 5).await.unwrap();
    let bytes = content(1, 400_000);
    for fault in [Fault::Truncated, Fault::Flipped] {
        proxy.next(Method::PUT, fault);
        let refused = client.upload("lie", &bytes, bytes.len()).await.unwrap_err();
        assert_eq!(proxy.clear(), 1, "{fault:?}");
        assert!(!refused.is_success(), "{fault:?}: {refused}");
        client.check_ledger().await;
    }
    client.upload("lie", &bytes, bytes.len()).await.unwrap();
    check_all(&server, client).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_that_comes_short_or_wrong_is_never_a_whole_reply() {
    let (server, proxy, client) = start().await;
    client.upload("one", &content(1, 400_000), 400_000).await.unwrap();
    client.upload("three", &content(2, 1_000_000), 400_000).await.unwrap();
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(404),
        Fault::ErrorIn200,
        Fault::NoReply,
        Fault::LostReply,
        Fault::Truncated,
        Fault::Flipped,
    ];
    for fault in faults {
        for name in ["one", "three"] {
            proxy.every(Method::GET, fault);
            let reply = client.download(name).await;
            assert!(!reply.is_success(), "{fault:?}: {reply}");
            assert!(proxy.clear() > 0, "{fault:?}");
        }
        client.check_ledger().await;
    }
    check_all(&server, client).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_that_fails_once_is_taken_up_where_it_broke() {
    let (server, proxy, client) = start().await;
    client.upload("one", &content(1, 3_000_000), 3_000_000).await.unwrap();
    client.upload("three", &content(2, 1_000_000), 400_000).await.unwrap();
    for fault in [
        Fault::Status(500),
        Fault::Status(503),
        Fault::NoReply,
        Fault::HalfThenCut,
    ] {
        for _ in ["one", "three"] {
            proxy.next(Method::GET, fault);
            client.check_ledger().await;
            assert_eq!(proxy.clear(), 1, "{fault:?}");
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_try_again_get_through_when_every_third_request_fails() {
    let (server, proxy, client) = start().await;
    for (round, fault) in [Fault::Status(503), Fault::NoReply, Fault::LostReply]
        .into_iter()
        .enumerate()
    {
        proxy.befall(None, fault, 3, usize::MAX);
        let uploads = (0..24u64).map(async |i| {
            let bytes = content(i, 100_000 + usize::try_from(i).unwrap());
            client.upload_patiently(&format!("load-{round}-{i}"), &bytes).await
        });
        let put_off: usize = futures_util::future::join_all(uploads).await.into_iter().sum();
        assert!(proxy.clear() >= 16, "{fault:?}");
        assert!(put_off > 0, "{fault:?}: no client felt anything");
    }
    check_all(&server, client).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_stands_still_holds_nobody_up_and_goes_on() {
    let (server, proxy, client) = start().await;
    let client = Arc::new(client);
    client
        .upload("stalled", &content(1, 4_000_000), 2_000_000)
        .await
        .unwrap();
    client.upload("other", &content(2, 400_000), 400_000).await.unwrap();

    proxy.next(Method::GET, Fault::Stall);
    let download = tokio::spawn({
        let client = Arc::clone(&client);
        async move { client.download("stalled").await }
    });
    until("the download stalls", || proxy.hits() == 1).await;
    for i in 0..20 {
        assert!(client.download("other").await.is_success());
        client
            .upload(&format!("beside-{i}"), &content(i, 100_000), 50_000)
            .await
            .unwrap();
    }
    assert!(!download.is_finished());
    proxy.clear();
    assert!(download.await.unwrap().body == content(1, 4_000_000));

    let link = client.create("slow").await.unwrap();
    proxy.next(Method::PUT, Fault::Stall);
    let upload = tokio::spawn({
        let client = Arc::clone(&client);
        async move { client.put(&link, content(3, 4_000_000)).await }
    });
    until("the upload stalls", || proxy.hits() == 1).await;
    for i in 0..20 {
        assert!(client.download("other").await.is_success());
        client
            .upload(&format!("further-{i}"), &content(i, 100_000), 50_000)
            .await
            .unwrap();
    }
    assert!(!upload.is_finished());
    proxy.clear();
    assert_eq!(upload.await.unwrap().status, 201);
    client.finalize("slow", &content(3, 4_000_000)).await.unwrap();
    check_all(&server, Arc::into_inner(client).unwrap()).await;
    server.stop().await;
}

mod long {
    use std::time::Instant;

    use super::super::is_long_run;
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    /// Beyond the 30 s that S3 clients give a whole request unless told otherwise.
    #[tokio::test(flavor = "multi_thread")]
    async fn transfers_may_last_longer_than_half_a_minute() {
        if !is_long_run("transfers_may_last_longer_than_half_a_minute") {
            return;
        }
        let (server, proxy, client) = start().await;
        // More than the sockets in between take at once.
        let bytes = content(1, 40_000_000);
        for method in [Method::PUT, Method::GET] {
            let begun = Instant::now();
            proxy.next(method.clone(), Fault::Slow(1_000_000));
            if method == Method::PUT {
                let link = client.create("slow").await.unwrap();
                let reply = client.put(&link, bytes.clone()).await;
                assert_eq!(reply.status, 201, "{reply}");
            } else {
                client.finalize("slow", &bytes).await.unwrap();
            }
            assert!(begun.elapsed() > LIMIT, "{method}: {:?}", begun.elapsed());
            assert_eq!(proxy.clear(), 1);
        }
        check_all(&server, client).await;
        server.stop().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_transfer_that_stands_still_for_half_a_minute_is_given_up_and_tried_again() {
        if !is_long_run("a_transfer_that_stands_still_for_half_a_minute_is_given_up_and_tried_again") {
            return;
        }
        let (server, proxy, client) = start().await;
        let bytes = content(1, 40_000_000);
        for method in [Method::PUT, Method::GET] {
            let begun = Instant::now();
            proxy.next(method.clone(), Fault::Stall);
            if method == Method::PUT {
                let link = client.create("stalled").await.unwrap();
                let reply = client.put(&link, bytes.clone()).await;
                assert!(reply.is_busy(), "{reply}");
                assert_eq!(client.put(&link, bytes.clone()).await.status, 201);
            } else {
                client.finalize("stalled", &bytes).await.unwrap();
            }
            let took = begun.elapsed();
            // Not much longer, on a machine that may be busy.
            assert!(took > LIMIT && took < LIMIT * 3, "{method}: {took:?}");
            assert_eq!(proxy.clear(), 1);
        }
        check_all(&server, client).await;
        server.stop().await;
    }
}
