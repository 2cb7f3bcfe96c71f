//! Around every request: an id, one log line, metrics, and an answer even if the handler panics.
//!
//! Layered over each route of the public URL map by `api/mod.rs`. Never logs a query or a header that carries a secret.

use std::borrow::Cow;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, USER_AGENT};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures_util::FutureExt;
use http_body::{Frame, SizeHint};
use metrics::{Counter, Gauge, Histogram, SharedString};
use tracing::Instrument as _;
use uuid::Uuid;

use super::client::Client;
use super::{body, reply};
use crate::error::Error;

/// How much of a client's name goes into the log.
const MAX_USER_AGENT_CHARS: usize = 128;

/// A route as the metrics know it.
pub struct Route {
    /// Its pattern: a path would make a new time series of every link.
    name: SharedString,
    /// From its first request on.
    metrics: OnceLock<Metrics>,
}

/// One route's metrics, at hand: to look them up by name and labels costs more than to count.
struct Metrics {
    in_flight: Gauge,
    durations: Histogram,
    received_bytes: Counter,
    sent_bytes: Counter,
    /// By status.
    requests: RwLock<HashMap<u16, Counter>>,
}

impl Route {
    pub fn new(name: impl Into<Arc<str>>) -> Arc<Self> {
        Arc::new(Self {
            name: name.into().into(),
            metrics: OnceLock::new(),
        })
    }

    fn metrics(&self) -> &Metrics {
        let route = || self.name.clone();
        self.metrics.get_or_init(|| Metrics {
            in_flight: metrics::gauge!("wharfinger_http_requests_in_flight", "route" => route()),
            durations: metrics::histogram!("wharfinger_http_request_duration_seconds", "route" => route()),
            received_bytes: metrics::counter!("wharfinger_http_received_bytes_total", "route" => route()),
            sent_bytes: metrics::counter!("wharfinger_http_sent_bytes_total", "route" => route()),
            requests: RwLock::default(),
        })
    }

    /// The counter of requests that ended with this status.
    fn requests(&self, status: u16) -> Counter {
        let requests = &self.metrics().requests;
        if let Some(counter) = requests.read().unwrap_or_else(PoisonError::into_inner).get(&status) {
            return counter.clone();
        }
        let (route, label) = (self.name.clone(), status.to_string());
        let counter = metrics::counter!("wharfinger_http_requests_total", "route" => route, "status" => label);
        let mut requests = requests.write().unwrap_or_else(PoisonError::into_inner);
        requests.insert(status, counter.clone());
        counter
    }
}

pub async fn observe(State(route): State<Arc<Route>>, request: Request, next: Next) -> Response {
    let mut exchange = Exchange::begin(route, &request);
    let received = Arc::clone(&exchange.received);
    let request = request.map(|body| {
        Body::new(Counted {
            body,
            counted: received,
            exchange: None,
        })
    });
    let path = exchange.path.clone();
    let id = exchange.id;
    // So that what is logged on the way, such as an internal error, leads back to the client's request id.
    let span = tracing::error_span!("request", request_id = %id);
    let mut response = AssertUnwindSafe(body::refuse_ambiguous_length(request, next).instrument(span))
        .catch_unwind()
        .await
        .unwrap_or_else(|_| reply::at(&path, Error::Internal(format!("a handler panicked at {path}"))));
    exchange.status = response.status().as_u16();
    exchange.expected = match (&exchange.method, response.status()) {
        (&Method::HEAD, _) | (_, StatusCode::NO_CONTENT) => Some(0),
        _ => response
            .headers()
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok()),
    };
    reply::protect(&path, response.headers_mut());
    if let Ok(id) = HeaderValue::try_from(id.hyphenated().to_string()) {
        response.headers_mut().insert("x-ms-request-id", id);
    }
    // The exchange ends, and is logged, when the reply's last byte is gone or the reply is dropped.
    let sent = Arc::clone(&exchange.sent);
    response.map(|body| {
        Body::new(Counted {
            body,
            counted: sent,
            exchange: Some(exchange),
        })
    })
}

/// What the log line and the metrics say of one request and its reply.
struct Exchange {
    id: Uuid,
    method: Method,
    route: Arc<Route>,
    path: String,
    user_agent: String,
    client: Option<Client>,
    begun: Instant,
    status: u16,
    received: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    /// How long the reply is to be, where that is said; hyper does not ask for more than that.
    expected: Option<u64>,
    ended: bool,
}

impl Exchange {
    fn begin(route: Arc<Route>, request: &Request) -> Self {
        let user_agent = request
            .headers()
            .get(USER_AGENT)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        if request.method() == Method::PUT {
            metrics::gauge!("wharfinger_uploads_in_flight").increment(1);
        }
        route.metrics().in_flight.increment(1);
        Self {
            id: Uuid::new_v4(),
            method: request.method().clone(),
            route,
            path: request.uri().path().to_owned(),
            user_agent: user_agent.chars().take(MAX_USER_AGENT_CHARS).collect(),
            client: request.extensions().get().copied(),
            begun: Instant::now(),
            // What stays if the client goes away before there is an answer (nginx's custom).
            status: 499,
            received: Arc::default(),
            sent: Arc::default(),
            expected: None,
            ended: false,
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let (received, sent) = (self.received.load(Ordering::Relaxed), self.sent.load(Ordering::Relaxed));
        let duration = self.begun.elapsed();
        if self.method == Method::PUT {
            metrics::gauge!("wharfinger_uploads_in_flight").decrement(1);
        }
        let metrics = self.route.metrics();
        metrics.in_flight.decrement(1);
        self.route.requests(self.status).increment(1);
        metrics.durations.record(duration);
        metrics.received_bytes.increment(received);
        metrics.sent_bytes.increment(sent);
        tracing::info!(
            request_id = %self.id,
            method = %self.method,
            path = %escaped(&self.path),
            client = self.client.map(|Client(address)| tracing::field::display(address)),
            status = self.status,
            duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            received_bytes = received,
            sent_bytes = sent,
            complete = self.ended || self.expected == Some(sent),
            user_agent = %escaped(&self.user_agent),
            "request"
        );
    }
}

/// As [`str::escape_default`] has it. That goes character by character, and hardly any text has one that it changes.
fn escaped(text: &str) -> Cow<'_, str> {
    let stays = |byte: u8| matches!(byte, b' '..=b'~') && !b"'\"\\".contains(&byte);
    if text.bytes().all(stays) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(text.escape_default().to_string())
    }
}

/// A body that counts its bytes; a reply's also carries the exchange to its end.
struct Counted {
    body: Body,
    counted: Arc<AtomicU64>,
    exchange: Option<Exchange>,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let poll = Pin::new(&mut self.body).poll_frame(cx);
        match &poll {
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
                self.counted.fetch_add(bytes, Ordering::Relaxed);
            }
            Poll::Ready(Some(Err(error))) if self.exchange.is_some() => {
                tracing::warn!(%error, "a reply was cut");
            }
            _ => {}
        }
        let ended = matches!(poll, Poll::Ready(None)) || self.body.is_end_stream();
        if ended && let Some(exchange) = &mut self.exchange {
            exchange.ended = true;
        }
        poll
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
