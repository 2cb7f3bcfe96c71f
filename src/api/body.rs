//! A request's body: how large it may be on a route, and the two ways to read it, whole or as it comes.
//!
//! `api/mod.rs` declares the limit beside each route, whose guard goes on to [`limit`]; handlers read by [`whole`],
//! [`whole_in_forms`] and [`chunks`] alone. Never unpacks a body.

use std::pin::pin;
use std::time::Instant;

use axum::body::{Body, HttpBody as _};
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::{CONNECTION, CONTENT_ENCODING, TRANSFER_ENCODING};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::time::timeout;

use super::patience::Patience;
use super::{Context, reply};
use crate::error::{Error, Result};
use crate::service::memory;

/// How large the body of a route's requests may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLimit {
    /// Nobody reads it.
    None,
    /// It is read whole, up to so many bytes.
    Bytes(usize),
    /// It is read as it comes: the settings bound its size, the budget its memory. What the route reads whole all the
    /// same, such as a list of blocks, has up to so many bytes.
    Streamed { whole: usize },
    /// It is read as it comes and may be packed, which the handler looks at.
    StreamedPacked,
}

/// What is passed over where nobody reads it: hyper takes no more than a buffer before it closes the connection.
const MAX_IGNORED_BYTES: usize = 64 * 1024;

impl BodyLimit {
    /// Up to how many bytes are read whole.
    fn whole(self) -> usize {
        match self {
            Self::Bytes(bytes) | Self::Streamed { whole: bytes } => bytes,
            Self::None | Self::StreamedPacked => 0,
        }
    }
}

/// Refuses a request whose end a proxy in front may see elsewhere than hyper does, so that nothing behind it is taken for
/// a request of its own. What has `Content-Length` as well is hyper's to close after. Source: RFC 9112 §6.1 and §6.3.
pub async fn refuse_ambiguous_length(request: Request, next: Next) -> Response {
    let mut codings = request.headers().get_all(TRANSFER_ENCODING).iter();
    let clear = match (codings.next(), codings.next()) {
        (None, _) => true,
        (Some(coding), None) => coding.as_bytes().eq_ignore_ascii_case(b"chunked"),
        (Some(_), Some(_)) => false,
    };
    if clear {
        return next.run(request).await;
    }
    let error = Error::Malformed("Transfer-Encoding may be chunked, once, and nothing else".to_owned());
    let mut reply = reply::at(request.uri().path(), error);
    reply
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    reply
}

/// Refuses a body that is packed or said to be too large, before a byte of it is read.
pub async fn limit(State(limit): State<BodyLimit>, mut request: Request, next: Next) -> Response {
    if let Err(error) = check(limit, &request) {
        return reply::at(request.uri().path(), error);
    }
    request.extensions_mut().insert(limit);
    next.run(request).await
}

fn check(limit: BodyLimit, request: &Request) -> Result<()> {
    match limit {
        BodyLimit::None => check_length(request, MAX_IGNORED_BYTES)?,
        BodyLimit::Bytes(bytes) => check_length(request, bytes)?,
        BodyLimit::Streamed { .. } => {}
        BodyLimit::StreamedPacked => return Ok(()),
    }
    check_encoding(request)
}

fn check_length(request: &Request, max_bytes: usize) -> Result<()> {
    if request.body().size_hint().lower() > max_bytes as u64 {
        Err(too_large(max_bytes))
    } else {
        Ok(())
    }
}

/// What was packed would have to be unpacked, and a little can become a lot. Azure keeps the header of a blob for its
/// readers; no recorded client sends one, and to drop it in silence would leave readers with what they can't read.
fn check_encoding(request: &Request) -> Result<()> {
    let packed = |value: &HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"identity");
    if !request.body().is_end_stream() && request.headers().get_all(CONTENT_ENCODING).iter().any(packed) {
        return Err(Error::Encoded("compressed request bodies are not accepted".to_owned()));
    }
    Ok(())
}

/// Whether a body may be read whole by what is said of its length.
fn check_whole(request: &Request) -> Result<usize> {
    let limit = request.extensions().get().copied().unwrap_or(BodyLimit::None);
    check_length(request, limit.whole()).map(|()| limit.whole())
}

/// The bytes of a body, which are at most as many as its route allows.
pub async fn whole(context: &Context, request: Request) -> Result<Bytes> {
    whole_in_forms(context, request, 1).await
}

/// As [`whole`], of a body that is held in so many forms at once until it is dropped. It takes its share of the memory as
/// it comes: who only says that much will come holds nothing.
pub async fn whole_in_forms(context: &Context, request: Request, forms: u64) -> Result<Bytes> {
    let max_bytes = check_whole(&request)?;
    let mut chunks = pin!(chunks(request.into_body(), context.patience));
    let (mut bytes, mut share, mut counted) = (Vec::new(), None, memory::SMALL_BYTES);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        if bytes.len() + chunk.len() > max_bytes {
            return Err(too_large(max_bytes));
        }
        bytes.extend_from_slice(&chunk);
        while bytes.len() > counted {
            let more = forms * memory::SMALL_BYTES as u64;
            context.services.grow_upload(&mut share, more).await?;
            counted += memory::SMALL_BYTES;
        }
    }
    Ok(match share {
        Some(share) => memory::with_share(bytes, share),
        None => bytes.into(),
    })
}

/// A body's bytes as they come; an error item if they stop coming or come too slowly.
pub fn chunks(body: Body, patience: Patience) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
    let frames = body.into_data_stream().map_err(|error| broken(&error));
    futures_util::stream::unfold((Box::pin(frames), patience), |(mut frames, mut patience)| async move {
        let begun = Instant::now();
        let item = match timeout(patience.left(), frames.next()).await {
            Ok(item) => item?,
            Err(_) => Err(stalled()),
        };
        patience.waited(begun.elapsed(), item.as_ref().map_or(0, Bytes::len));
        Some((item, (frames, patience)))
    })
}

fn too_large(max_bytes: usize) -> Error {
    Error::TooLarge(format!("the body may have at most {max_bytes} bytes"))
}

/// Not a 408: the clients give up for good on it, and try again on a 503.
fn stalled() -> Error {
    Error::Busy("the body stopped coming, send it again".to_owned())
}

fn broken(error: &axum::Error) -> Error {
    Error::Invalid(format!("the body broke off: {error}"))
}
