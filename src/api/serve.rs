//! The accept loop: connections, their limits, and the end of both.
//!
//! `app` runs one for each listener. HTTP/1.1 only: every client speaks it. `axum::serve` is not used because it
//! installs no timer, which leaves hyper's time limits without effect.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::http::HeaderValue;
use axum::http::header::CONNECTION;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use ipnet::IpNet;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::{Client, networks};
use super::patience::Patience;
use super::socket::{Busy, Socket};
use super::tls::Tls;

/// The `[server]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How long connections are still accepted after the order to stop, for load balancers to notice.
    #[serde(with = "crate::duration")]
    pub drain_delay: Duration,
    /// How long requests under way then get to end.
    #[serde(with = "crate::duration")]
    pub drain_timeout: Duration,
    /// A connection without a request for this long is closed.
    #[serde(with = "crate::duration")]
    pub idle_timeout: Duration,
    /// How long the first byte of a connection may take, and then each head from its first byte on.
    #[serde(with = "crate::duration")]
    pub head_timeout: Duration,
    /// A body of which nothing moves for this long is cut.
    #[serde(with = "crate::duration")]
    pub body_idle_timeout: Duration,
    /// A body that is slower than this, measured over `body_idle_timeout`, is cut; 0: never.
    pub min_bytes_per_second: u32,
    pub max_connections: usize,
    /// Whose word on their clients' addresses is taken for the log.
    #[serde(deserialize_with = "networks")]
    pub trusted_proxies: Vec<IpNet>,
}

impl Settings {
    /// What every body begins with.
    pub fn patience(&self) -> Patience {
        Patience::new(self.body_idle_timeout, self.min_bytes_per_second)
    }
}

/// hyper's read buffer: what a connection may hold of a body at once.
const MAX_BUFFER_BYTES: usize = 128 * 1024;
/// A request's head. Clients of the first cache protocol send ten keys of 512 characters, percent-encoded.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// How long a connection that is new when the server stops may wait for its first request: its client is about to send
/// one, and hyper would close it at once.
const FIRST_REQUEST: Duration = Duration::from_secs(1);
/// After an error of accept (too few file descriptors) the loop waits before it tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// File descriptors for what is not a connection or the file behind it: the database, syncs, the process itself.
const OTHER_DESCRIPTORS: u64 = 256;

/// Lets the process have as many file descriptors as the system allows it, and says how many connections they are
/// enough for: an upload needs one for its connection and one for its file.
pub fn connections_by_descriptors() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let descriptors = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    let connections = descriptors.map_or(u64::MAX, |descriptors| {
        descriptors.saturating_sub(OTHER_DESCRIPTORS) / 2
    });
    usize::try_from(connections).unwrap_or(usize::MAX).max(1)
}

/// Serves, over TLS if there is any, until `stop` is cancelled, then lets requests under way end and closes the listener.
/// Requests that last longer than `drain_timeout` after that are cut.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    settings: &Settings,
    tls: Option<Arc<Tls>>,
    stop: CancellationToken,
) {
    let connections = TaskTracker::new();
    let places = Arc::new(Semaphore::new(settings.max_connections));
    let cut = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let (stream, peer, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let client = Served {
            peer,
            router: router.clone(),
            settings: settings.clone(),
            places: Arc::clone(&places),
            stop: stop.clone(),
        };
        let (cut, tls) = (cut.clone(), tls.clone());
        let connection = async move {
            match tls {
                None => client.connection(stream).await,
                Some(tls) => match tokio::time::timeout(client.settings.head_timeout, tls.accept(stream)).await {
                    Ok(Ok(stream)) => client.connection(stream).await,
                    Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                    Err(_) => tracing::debug!("a TLS handshake did not come to its end"),
                },
            }
        };
        connections.spawn(async move {
            tokio::select! {
                () = cut.cancelled() => {}
                () = connection => {}
            }
            drop(place);
        });
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(settings.drain_timeout, connections.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            connections = connections.len(),
            "cutting requests that did not end in time"
        );
        cut.cancel();
        connections.wait().await;
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, IpAddr, tokio::sync::OwnedSemaphorePermit)> {
    // Beyond the limit connections wait in the kernel's queue.
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .map_err(std::io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, peer.ip(), place))
}

/// What a connection is served with.
struct Served {
    peer: IpAddr,
    router: Router,
    settings: Settings,
    places: Arc<Semaphore>,
    stop: CancellationToken,
}

impl Served {
    async fn connection<S: AsyncRead + AsyncWrite + Unpin>(self, stream: S) {
        let Self {
            peer,
            router,
            settings,
            places,
            stop,
        } = self;
        let busy = Busy::default();
        let asked = Arc::new(Notify::new());
        let stopped = {
            let asked = Arc::clone(&asked);
            async move {
                stop.cancelled().await;
                // Over at once if anything was ever asked here.
                let _ = tokio::time::timeout(FIRST_REQUEST, asked.notified()).await;
            }
        };
        let socket = Socket::new(stream, Arc::clone(&busy), settings.head_timeout, settings.patience());
        let router = TowerToHyperService::new(router);
        let trusted_proxies = settings.trusted_proxies;
        let service = service_fn(move |mut request: Request<Incoming>| {
            let client = Client::of(peer, request.headers(), &trusted_proxies);
            request.extensions_mut().insert(client);
            busy.fetch_add(1, Ordering::Relaxed);
            asked.notify_one();
            let (reply, busy, places) = (router.call(request), Arc::clone(&busy), Arc::clone(&places));
            async move {
                let mut reply = reply.await?.map(|body| Reply { body, busy });
                // Others wait for a place: this one must not rest on it.
                if places.available_permits() == 0 {
                    reply
                        .headers_mut()
                        .insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(reply)
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(settings.idle_timeout)
            .max_buf_size(MAX_BUFFER_BYTES)
            .max_header_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(socket), service);
        let mut connection = std::pin::pin!(connection);
        let outcome = tokio::select! {
            outcome = connection.as_mut() => outcome,
            () = stopped => {
                // Ends after the request under way, or at once on an idle connection.
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "a connection ended");
        }
    }
}

/// A reply's body, with whose end the connection waits for the next head.
struct Reply {
    body: Body,
    busy: Busy,
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

impl HttpBody for Reply {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
