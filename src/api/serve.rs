//! The accept loop: connections, their limits, and the end of both.
//!
//! `app` runs one for each listener. HTTP/1.1 only: every client speaks it. `axum::serve` is not used because it
//! installs no timer, which leaves hyper's time limits without effect.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

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
    /// A connection on which no whole request head comes for this long is closed.
    #[serde(with = "crate::duration")]
    pub idle_timeout: Duration,
    /// A request whose body brings nothing for this long is ended, and so is a reply of which the client takes nothing.
    #[serde(with = "crate::duration")]
    pub body_idle_timeout: Duration,
    pub max_connections: usize,
}

/// hyper's read buffer: what a connection may hold of a body at once.
const MAX_BUFFER_BYTES: usize = 128 * 1024;
/// After an error of accept (too few file descriptors) the loop waits before it tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop` is cancelled, then lets requests under way end and closes the listener.
/// Requests that last longer than `drain_timeout` after that are cut.
pub async fn serve(listener: TcpListener, router: Router, settings: &Settings, stop: CancellationToken) {
    let connections = TaskTracker::new();
    let places = Arc::new(Semaphore::new(settings.max_connections));
    let cut = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let (stream, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let connection = connection(stream, router.clone(), settings.clone(), stop.clone());
        let cut = cut.clone();
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
) -> std::io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    // Beyond the limit connections wait in the kernel's queue.
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .map_err(std::io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, place))
}

async fn connection(stream: TcpStream, router: Router, settings: Settings, stop: CancellationToken) {
    // hyper would wait for ever for a client that takes nothing.
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(settings.body_idle_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(settings.idle_timeout)
        .max_buf_size(MAX_BUFFER_BYTES)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = stop.cancelled() => {
            // Ends after the request under way, or at once on an idle connection.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection ended");
    }
}
