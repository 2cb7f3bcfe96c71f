//! Signed links in the dialect of Azure's block blobs: Put Block, Put Block List, Put Blob, Get and Head.
//!
//! Routed by `api/mod.rs` behind a verified link whose permission fits the method; artifacts and caches alike.
//! Source: Azure's Blob service REST API as `@azure/storage-blob` 12.17 to 12.32 and azblob for Go speak it. Never
//! parses names: the link has the id.

use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
    IF_MATCH, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE,
};
use axum::http::request::Parts;
use axum::http::response::Builder;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::Stream;

use super::reply::AzureError;
use super::{Context, block_list, body, range};
use crate::db::ReadableBlob;
use crate::error::Error;
use crate::model::BlobId;
use crate::papers::{Link, Param};
use crate::service::uploads::{Checksums, Upload};

type Reply = Result<Response, AzureError>;

/// The version that we say we speak: that of the newest recorded client's feature set.
const API_VERSION: &str = "2025-11-05";
/// Azure's bound on a block id, before base64.
const MAX_BLOCK_ID_BYTES: usize = 64;
const MAX_CONTENT_TYPE_BYTES: usize = 255;
/// How often the bytes of a block list are in memory at once, as text and as what it says.
const LIST_FORMS: u64 = 4;

pub async fn handle(State(context): State<Context>, Extension(link): Extension<Link>, request: Request) -> Reply {
    check_headers(request.headers())?;
    let comp = match &link.comp {
        Param::Absent => None,
        Param::Value(comp) => Some(comp.as_str()),
        Param::Unreadable(why) => return Err(invalid_parameter(format!("comp is {why}"))),
    };
    match (request.method(), comp) {
        (&Method::PUT, Some("block")) => put_block(&context, &link, request).await,
        (&Method::PUT, Some("blocklist")) => put_block_list(&context, &link, request).await,
        (&Method::PUT, None) => put_blob(&context, &link, request).await,
        (_, None) => {
            // A body can't be shared between threads, and none is needed here.
            let (head, _) = request.into_parts();
            get(&context, &link, &head).await
        }
        _ => Err(invalid_parameter("comp must be block or blocklist, for PUT".to_owned())),
    }
}

fn invalid_parameter(message: String) -> AzureError {
    AzureError::bad_request("InvalidQueryParameterValue", message)
}

fn invalid_header(message: impl Into<String>) -> AzureError {
    AzureError::bad_request("InvalidHeaderValue", message)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    // A value that is not text is as good as none, and fails where one is needed.
    headers.get(name).map(|value| value.to_str().unwrap_or_default())
}

fn check_headers(headers: &HeaderMap) -> Result<(), AzureError> {
    if let Some(version) = text(headers, "x-ms-version") {
        let date = version.len() == 10
            && version.bytes().enumerate().all(|(i, byte)| {
                if i == 4 || i == 7 {
                    byte == b'-'
                } else {
                    byte.is_ascii_digit()
                }
            });
        if !date {
            return Err(invalid_header("x-ms-version must be a date"));
        }
    }
    // The server would fetch whatever address stands there.
    if headers.keys().any(|name| name.as_str().starts_with("x-ms-copy-source")) {
        return Err(AzureError::bad_request(
            "UnsupportedHeader",
            "copying from a URL is not supported",
        ));
    }
    Ok(())
}

/// A block id as it is kept: base64 in its one canonical form.
pub fn canonical_block_id(text: &str) -> Result<String, AzureError> {
    let bytes = STANDARD
        .decode(text)
        .map_err(|_| invalid_parameter("blockid must be base64".to_owned()))?;
    if bytes.is_empty() {
        return Err(invalid_parameter("blockid is empty".to_owned()));
    }
    if bytes.len() > MAX_BLOCK_ID_BYTES {
        let message = format!("blockid must have at most {MAX_BLOCK_ID_BYTES} bytes");
        return Err(AzureError::bad_request("OutOfRangeInput", message));
    }
    Ok(STANDARD.encode(bytes))
}

async fn put_block(context: &Context, link: &Link, request: Request) -> Reply {
    let id = match &link.block_id {
        Param::Value(id) => canonical_block_id(id)?,
        Param::Absent => return Err(invalid_parameter("blockid is missing".to_owned())),
        Param::Unreadable(why) => return Err(invalid_parameter(format!("blockid is {why}"))),
    };
    let upload = upload(context, request)?;
    if upload.size_bytes == 0 {
        return Err(invalid_header("a block must not be empty"));
    }
    context.services.stage_block(link.blob, &id, upload).await?;
    Ok(created(link.blob, None))
}

async fn put_block_list(context: &Context, link: &Link, request: Request) -> Reply {
    let content_type = content_type(request.headers())?;
    content_length(request.headers())?;
    let body = body::whole_in_forms(context, request, LIST_FORMS).await?;
    let list = block_list::parse(&body)?;
    context
        .services
        .commit_block_list(link.blob, &list, content_type.as_deref())
        .await?;
    Ok(created(link.blob, Some(context.services.clock.now_ms())))
}

async fn put_blob(context: &Context, link: &Link, request: Request) -> Reply {
    if text(request.headers(), "x-ms-blob-type").is_some_and(|kind| kind != "BlockBlob") {
        return Err(invalid_header("x-ms-blob-type must be BlockBlob"));
    }
    let content_type = content_type(request.headers())?;
    let upload = upload(context, request)?;
    context
        .services
        .put_blob(link.blob, upload, content_type.as_deref())
        .await?;
    Ok(created(link.blob, Some(context.services.clock.now_ms())))
}

/// The type that the blob's readers will be told.
fn content_type(headers: &HeaderMap) -> Result<Option<String>, AzureError> {
    match text(headers, "x-ms-blob-content-type") {
        Some(value) if value.is_empty() || value.len() > MAX_CONTENT_TYPE_BYTES => {
            Err(invalid_header("x-ms-blob-content-type is empty, too long or not ASCII"))
        }
        value => Ok(value.map(str::to_owned)),
    }
}

fn content_length(headers: &HeaderMap) -> Result<u64, AzureError> {
    text(headers, CONTENT_LENGTH.as_str())
        .and_then(|length| length.parse().ok())
        .ok_or_else(|| {
            AzureError::new(
                StatusCode::LENGTH_REQUIRED,
                "MissingContentLengthHeader",
                "Content-Length is required",
            )
        })
}

/// A request's body with its length and checksums.
fn upload(
    context: &Context,
    request: Request,
) -> Result<Upload<impl Stream<Item = Result<Bytes, Error>> + Send + 'static>, AzureError> {
    let headers = request.headers();
    let size_bytes = content_length(headers)?;
    let md5 = text(headers, "content-md5").map(|value| {
        let bytes = STANDARD
            .decode(value)
            .ok()
            .and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
        bytes.ok_or_else(|| AzureError::bad_request("InvalidMd5", "Content-MD5 must be 16 bytes in base64"))
    });
    let crc64 = text(headers, "x-ms-content-crc64").map(|value| {
        let bytes = STANDARD
            .decode(value)
            .ok()
            .and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
        bytes
            .map(u64::from_le_bytes)
            .ok_or_else(|| invalid_header("x-ms-content-crc64 must be 8 bytes in base64"))
    });
    if md5.is_some() && crc64.is_some() {
        return Err(invalid_header(
            "only one of Content-MD5 and x-ms-content-crc64 may be given",
        ));
    }
    let checksums = Checksums {
        md5: md5.transpose()?,
        crc64: crc64.transpose()?,
    };
    Ok(Upload {
        size_bytes,
        body: body::chunks(request.into_body(), context.patience),
        checksums,
    })
}

fn created(blob: BlobId, changed_at_ms: Option<i64>) -> Response {
    let mut reply = reply(StatusCode::CREATED);
    if let Some(changed_at_ms) = changed_at_ms {
        reply = reply
            .header(ETAG, etag(blob))
            .header(LAST_MODIFIED, http_date(changed_at_ms));
    }
    finish(reply, Body::empty())
}

/// What every reply of this endpoint carries.
fn reply(status: StatusCode) -> Builder {
    Response::builder().status(status).header("x-ms-version", API_VERSION)
}

fn finish(reply: Builder, body: Body) -> Response {
    reply.body(body).unwrap_or_else(|error| {
        AzureError::from(Error::Internal(format!("a header can't be sent: {error}"))).into_response()
    })
}

/// A readable blob never changes, so its id says it all.
fn etag(blob: BlobId) -> String {
    format!("\"{blob}\"")
}

fn http_date(ms: i64) -> String {
    let since = Duration::from_millis(u64::try_from(ms).unwrap_or_default());
    httpdate::fmt_http_date(std::time::UNIX_EPOCH + since)
}

async fn get(context: &Context, link: &Link, head: &Parts) -> Reply {
    let services = &context.services;
    let blob = services.readable_blob(link.blob).await?;
    let headers = &head.headers;
    let etag = etag(blob.id);
    let names_it = |value: &str| {
        value
            .split(',')
            .map(str::trim)
            .any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
    };
    if text(headers, IF_MATCH.as_str()).is_some_and(|value| !names_it(value)) {
        return Err(Error::FailedPrecondition("the blob is not the one that If-Match names".to_owned()).into());
    }
    if text(headers, IF_NONE_MATCH.as_str()).is_some_and(names_it) {
        return Ok(finish(
            reply(StatusCode::NOT_MODIFIED).header(ETAG, etag),
            Body::empty(),
        ));
    }
    let stale = text(headers, IF_RANGE.as_str()).is_some_and(|value| value != etag);
    let asked = text(headers, "x-ms-range")
        .or_else(|| text(headers, RANGE.as_str()))
        .filter(|_| !stale);
    let part = asked
        .map(|asked| range::parse(asked, blob.size_bytes))
        .transpose()?
        .flatten();
    let window = part.clone().unwrap_or(0..blob.size_bytes);
    let mut reply = reply(if part.is_some() {
        StatusCode::PARTIAL_CONTENT
    } else {
        StatusCode::OK
    })
    .header(CONTENT_LENGTH, window.end - window.start)
    .header(CONTENT_TYPE, served_type(&blob))
    .header(
        CONTENT_DISPOSITION,
        disposition(&blob.name, is_zip(&served_type(&blob))),
    )
    .header(ETAG, etag)
    .header(LAST_MODIFIED, http_date(blob.sealed_at_ms))
    .header(ACCEPT_RANGES, "bytes")
    .header("x-ms-blob-type", "BlockBlob")
    // Whatever a job uploaded must not run in the browser of whoever opens the link.
    .header(CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'");
    if part.is_some() {
        let range = format!("bytes {}-{}/{}", window.start, window.end - 1, blob.size_bytes);
        reply = reply.header(CONTENT_RANGE, range);
    }
    if head.method == Method::HEAD {
        return Ok(finish(reply, Body::empty()));
    }
    let bytes = services.read_blob(&blob, window).await?;
    Ok(finish(reply, Body::from_stream(bytes)))
}

/// Clients 2.0 to 6.1 say `zip`, which the newest downloader would not unpack.
fn served_type(blob: &ReadableBlob) -> String {
    let stored = blob.content_type.as_deref().or(blob.mime_type.as_deref());
    match stored {
        Some("zip") => "application/zip".to_owned(),
        Some(stored) => stored.to_owned(),
        None => "application/octet-stream".to_owned(),
    }
}

fn is_zip(content_type: &str) -> bool {
    content_type == "application/zip"
}

/// Both forms of the file name: the newest client reads `filename*`, older ones `filename`.
fn disposition(name: &str, zip: bool) -> String {
    let name = if zip && !name.ends_with(".zip") {
        format!("{name}.zip")
    } else {
        name.to_owned()
    };
    let plain: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_graphic() && !matches!(c, '"' | '\\' | '%') || c == ' ' {
                c
            } else {
                '_'
            }
        })
        .collect();
    let encoded: String = name
        .bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect();
    format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}")
}

#[cfg(test)]
mod tests {
    use super::{canonical_block_id, disposition};

    #[test]
    fn both_file_names_are_safe_in_a_header() {
        assert_eq!(
            disposition("größe \"1\" 100%.html", false),
            "attachment; filename=\"gr__e _1_ 100_.html\"; filename*=UTF-8''gr%C3%B6%C3%9Fe%20%221%22%20100%25.html"
        );
        for name in ["a", "a.zip"] {
            assert_eq!(
                disposition(name, true),
                "attachment; filename=\"a.zip\"; filename*=UTF-8''a.zip"
            );
        }
    }

    #[test]
    fn a_block_id_is_opaque_but_bounded() {
        assert_eq!(canonical_block_id("Li4vLi4v").unwrap(), "Li4vLi4v");
        for id in ["", "!", "QQ", &"QUFB".repeat(22)] {
            assert!(canonical_block_id(id).is_err(), "{id}");
        }
    }
}
