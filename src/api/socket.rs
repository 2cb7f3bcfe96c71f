//! A client's connection with the time limits that hyper has not: for a request's head, and for a reply that the
//! client does not take.
//!
//! Made by `serve.rs`, read and written by hyper. Knows no HTTP: `serve.rs` tells it when a request is under way.

use std::future::Future;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::patience::Patience;

/// How many requests are under way, each from the end of its head to the end of its reply. A client that does not wait
/// for the reply before its next request can have two.
pub type Busy = Arc<AtomicUsize>;

pub struct Socket<S> {
    stream: S,
    busy: Busy,
    head_timeout: Duration,
    /// Runs from a head's first byte, or from the connection's beginning, to the head's end.
    head: Option<Pin<Box<Sleep>>>,
    patience: Patience,
    stalled: Option<Stalled>,
    /// Taken by the stream and perhaps not by the client yet: TLS keeps some, and gives it away when it is flushed.
    unflushed: usize,
}

/// The client takes no more of a reply.
struct Stalled {
    since: Instant,
    end: Pin<Box<Sleep>>,
}

impl<S> Socket<S> {
    pub fn new(stream: S, busy: Busy, head_timeout: Duration, patience: Patience) -> Self {
        Self {
            stream,
            busy,
            head_timeout,
            head: Some(Box::pin(sleep(head_timeout))),
            patience,
            stalled: None,
            unflushed: 0,
        }
    }

    /// What a write came to, unless the client's time is up.
    fn written(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &outcome {
            self.unflushed = self.unflushed.saturating_add(*bytes);
        }
        self.passed(cx, outcome)
    }

    /// What a flush came to, unless the client's time is up.
    fn flushed(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<()>>) -> Poll<io::Result<()>> {
        let unflushed = self.unflushed;
        ready!(self.passed(cx, outcome.map_ok(|()| unflushed)))?;
        self.unflushed = 0;
        Poll::Ready(Ok(()))
    }

    /// How many bytes went on, unless the client's time is up.
    fn passed(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &outcome {
            Poll::Pending => {
                let left = self.patience.left();
                let stalled = self.stalled.get_or_insert_with(|| Stalled {
                    since: Instant::now(),
                    end: Box::pin(sleep(left)),
                });
                ready!(stalled.end.as_mut().poll(cx));
                Poll::Ready(Err(io::Error::new(ErrorKind::TimedOut, "the client takes no more")))
            }
            Poll::Ready(Ok(bytes)) => {
                if let Some(stalled) = self.stalled.take() {
                    self.patience.waited(stalled.since.elapsed(), *bytes);
                }
                outcome
            }
            Poll::Ready(Err(_)) => outcome,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if self.busy.load(Ordering::Relaxed) > 0 {
            self.head = None;
            return outcome;
        }
        if outcome.is_pending() {
            return match &mut self.head {
                Some(end) => {
                    ready!(end.as_mut().poll(cx));
                    Poll::Ready(Err(io::Error::new(
                        ErrorKind::TimedOut,
                        "the request's head did not come",
                    )))
                }
                None => Poll::Pending,
            };
        }
        if buffer.filled().len() > before && self.head.is_none() {
            self.head = Some(Box::pin(sleep(self.head_timeout)));
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.written(cx, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.written(cx, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(cx);
        self.flushed(cx, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.flushed(cx, outcome)
    }
}
