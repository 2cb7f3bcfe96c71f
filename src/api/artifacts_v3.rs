//! Version 3 of the artifact protocol, as `@actions/artifact` 0.x and 1.x speak it: containers of files.
//!
//! Routed by `api/mod.rs` behind a runtime token. The run of a path is compared with the token's before anything is
//! looked up. Bodies of files are kept as they come, packed or not, and are never unpacked. Source: recordings of
//! `@actions/artifact` 1.1.3 and of the actions upload-artifact v2 and v3 and download-artifact v2 and v3.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::{FromRequest, Path, RawQuery, Request, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_SECURITY_POLICY, CONTENT_TYPE,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{Stream, stream};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::content_range::ContentRange;
use super::item_path::{self, ItemPath};
use super::reply::ApisError;
use super::twirp::{self, format_timestamp};
use super::{Context, body, content_range};
use crate::db::{Container, Encoding, File};
use crate::error::Error;
use crate::model::{ArtifactId, Principal};
use crate::service::Services;
use crate::service::files::Chunk;
use crate::service::uploads::{Checksums, Upload};

type Reply = Result<Response, ApisError>;

/// The one type of artifact that clients know.
const TYPE: &str = "actions_storage";
/// A million of them fit into the 63 bits of a sum.
const MAX_FILE_BYTES: u64 = 1 << 43;
/// What stands for itself in a query. Source: RFC 3986 §2.3.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A JSON body. What is wrong with one is said in this protocol's dialect.
pub struct Json<T>(T);

impl<T: DeserializeOwned> FromRequest<Context> for Json<T> {
    type Rejection = ApisError;

    async fn from_request(request: Request, context: &Context) -> Result<Self, ApisError> {
        twirp::read_json(request, context).await.map(Self)
    }
}

fn json_reply(status: StatusCode, body: &Value) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

/// The numeric run id of a path must be the token's own: its claim, or else its backend id where that is a number.
fn check_run(principal: &Principal, run_id: &str) -> Result<(), Error> {
    let own = principal.run_id.and_then(|id| u64::try_from(id).ok());
    let own = own.or_else(|| content_range::number(&principal.run.run_backend_id));
    if own.is_some() && own == content_range::number(run_id) {
        Ok(())
    } else {
        Err(Error::Forbidden("the token is for another workflow run".to_owned()))
    }
}

/// What is no number is as good as a container that is not there.
fn container_id(text: &str) -> ArtifactId {
    let id = content_range::number(text).and_then(|id| i64::try_from(id).ok());
    ArtifactId(id.unwrap_or_default())
}

fn container_url(services: &Services, id: ArtifactId) -> String {
    format!("{}/_apis/resources/Containers/{id}", services.papers.public_url())
}

/// What is said of an artifact alike when it is created, finalized and listed. `size`: -1 before it is finalized.
fn described(services: &Services, id: ArtifactId, name: &str, size: i64) -> Value {
    let url = container_url(services, id);
    json!({
        "containerId": id.0,
        "size": size,
        "signedContent": null,
        "fileContainerResourceUrl": url,
        "type": TYPE,
        "name": name,
        "url": url,
    })
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CreateRequest {
    #[serde(default)]
    r#type: Option<String>,
    #[serde(default)]
    name: String,
    #[serde(default, deserialize_with = "twirp::int64")]
    retention_days: Option<i64>,
}

pub async fn create(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Path(run_id): Path<String>,
    Json(request): Json<CreateRequest>,
) -> Reply {
    check_run(&principal, &run_id)?;
    if request.r#type.is_some_and(|r#type| r#type != TYPE) {
        return Err(Error::Invalid(format!("Type must be {TYPE}")).into());
    }
    let id = context
        .services
        .open_container(&principal, &request.name, request.retention_days)
        .await
        .map_err(|error| match error {
            // The client tells its users of a full quota when it gets a 403.
            Error::QuotaExceeded(text) => Error::Forbidden(text),
            error => error,
        })?;
    Ok(json_reply(
        StatusCode::CREATED,
        &described(&context.services, id, &request.name, -1),
    ))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FinalizeRequest {
    #[serde(default, deserialize_with = "twirp::int64")]
    size: Option<i64>,
}

pub async fn finalize(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Path(run_id): Path<String>,
    RawQuery(query): RawQuery,
    Json(request): Json<FinalizeRequest>,
) -> Reply {
    check_run(&principal, &run_id)?;
    let name = item_path::form_value(&query.unwrap_or_default(), "artifactName")?
        .ok_or_else(|| Error::Invalid("artifactName is missing".to_owned()))?;
    let size = request
        .size
        .and_then(|size| u64::try_from(size).ok())
        .ok_or_else(|| Error::Invalid("Size must be a number that is not negative".to_owned()))?;
    let published = context.services.publish_files(&principal, &name, size).await?;
    let size = published.files_bytes.cast_signed();
    Ok(json_reply(
        StatusCode::OK,
        &described(&context.services, published.id, &name, size),
    ))
}

pub async fn list(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Path(run_id): Path<String>,
) -> Reply {
    check_run(&principal, &run_id)?;
    let services = &context.services;
    let artifacts = services.list_artifacts(&principal, None, None).await?;
    let value: Vec<Value> = artifacts
        .iter()
        .filter_map(|artifact| {
            let size = artifact.files_bytes?.cast_signed();
            Some(described(services, artifact.id, &artifact.name, size))
        })
        .collect();
    Ok(twirp::large_answer(services, &json!({ "count": value.len(), "value": value })).await?)
}

/// The path that a request names, if it names one.
fn path_of(query: Option<&str>) -> Result<Option<ItemPath>, Error> {
    item_path::form_value(query.unwrap_or_default(), "itemPath")?
        .map(|path| item_path::parse(&path))
        .transpose()
}

/// The path of a file, which it must name.
fn file_of(query: Option<&str>) -> Result<ItemPath, Error> {
    path_of(query)?
        .filter(|path| !path.below.is_empty())
        .ok_or_else(|| Error::Invalid("itemPath must name a file below the artifact's name".to_owned()))
}

/// A header that may be there once, as text.
fn header<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Error> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().map(|value| value.to_str());
    match (value.transpose(), values.next()) {
        (Ok(value), None) => Ok(value),
        _ => Err(Error::Invalid(format!("{name} must be there once, as text"))),
    }
}

/// A checksum in base64.
fn checksum<const N: usize>(headers: &HeaderMap, name: &str) -> Result<Option<[u8; N]>, Error> {
    let Some(text) = header(headers, name)? else {
        return Ok(None);
    };
    let bytes = STANDARD.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
    bytes
        .map(Some)
        .ok_or_else(|| Error::Invalid(format!("{name} must be {N} bytes in base64")))
}

pub async fn put(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Path(id): Path<String>,
    request: Request,
) -> Reply {
    let id = container_id(&id);
    let path = file_of(request.uri().query())?;
    let headers = request.headers();
    let Some(ContentRange {
        bytes,
        total_bytes: Some(total_bytes),
    }) = header(headers, CONTENT_RANGE.as_str())?.and_then(content_range::parse)
    else {
        return Err(Error::Invalid("Content-Range must be `bytes <first>-<last>/<total>`".to_owned()).into());
    };
    let size_bytes = header(headers, CONTENT_LENGTH.as_str())?.and_then(content_range::number);
    if size_bytes != Some(bytes.end - bytes.start) {
        return Err(Error::Invalid("Content-Length must be there and fit to Content-Range".to_owned()).into());
    }
    let length = header(headers, "x-tfs-filelength")?
        .map(|length| {
            content_range::number(length)
                .ok_or_else(|| Error::Invalid("x-tfs-filelength must be a number of bytes".to_owned()))
        })
        .transpose()?;
    let encoding = match header(headers, CONTENT_ENCODING.as_str())? {
        None => Encoding::Identity,
        Some("gzip") => Encoding::Gzip,
        Some(_) => {
            let message = "Content-Encoding may be gzip only";
            return Err(Error::Encoded(message.to_owned()).into());
        }
    };
    let length_bytes = match (encoding, length) {
        (Encoding::Gzip, Some(length)) if total_bytes > 0 => length,
        (Encoding::Gzip, _) => {
            return Err(
                Error::Invalid("what is packed has bytes, and x-tfs-filelength says of how many".to_owned()).into(),
            );
        }
        (Encoding::Identity, length) if length.is_none_or(|length| length == total_bytes) => total_bytes,
        (Encoding::Identity, _) => {
            return Err(Error::Invalid("x-tfs-filelength and Content-Range disagree".to_owned()).into());
        }
    };
    if length_bytes.max(total_bytes) > MAX_FILE_BYTES {
        return Err(Error::TooLarge(format!("a file may have at most {MAX_FILE_BYTES} bytes")).into());
    }
    let checksums = Checksums {
        md5: checksum(headers, "x-actions-results-md5")?,
        crc64: checksum(headers, "x-actions-results-crc64")?.map(u64::from_le_bytes),
    };
    let chunk = Chunk {
        artifact: &path.artifact,
        path: &path.below,
        encoding,
        length_bytes,
        total_bytes,
        file_offset: bytes.start,
    };
    let upload = Upload {
        size_bytes: bytes.end - bytes.start,
        body: body::chunks(request.into_body(), context.patience),
        checksums,
    };
    context.services.put_chunk(&principal, id, &chunk, upload).await?;
    Ok(json_reply(
        StatusCode::CREATED,
        &json!({
            "containerId": id.0,
            "itemType": "file",
            "status": "created",
            "fileLength": length_bytes,
            "path": format!("{}/{}", path.artifact, path.below),
        }),
    ))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Item<'a> {
    container_id: i64,
    scope_identifier: &'a str,
    path: String,
    item_type: &'a str,
    status: &'a str,
    file_length: u64,
    file_encoding: u8,
    file_type: u8,
    date_created: String,
    date_last_modified: String,
    created_by: &'a str,
    last_modified_by: &'a str,
    item_location: &'a str,
    content_location: &'a str,
    content_id: &'a str,
}

fn item(services: &Services, container: &Container, file: &File) -> serde_json::Result<Vec<u8>> {
    let path = format!("{}/{}", container.name, file.path);
    let location = format!(
        "{}/file?itemPath={}",
        container_url(services, container.artifact),
        utf8_percent_encode(&path, ENCODED)
    );
    let date = format_timestamp(file.completed_at_ms);
    serde_json::to_vec(&Item {
        container_id: container.artifact.0,
        scope_identifier: "",
        path,
        item_type: "file",
        status: "created",
        file_length: file.length_bytes,
        file_encoding: 1,
        file_type: 1,
        date_created: date.clone(),
        date_last_modified: date,
        created_by: "",
        last_modified_by: "",
        item_location: &location,
        content_location: &location,
        content_id: "",
    })
}

pub async fn items(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let path = path_of(query.as_deref())?;
    let services = context.services;
    let container = services.container(&principal, container_id(&id)).await?;
    let below = match path {
        Some(path) if path.artifact != container.name => {
            return Err(Error::NotFound(format!("there is no {} in {}", path.artifact, container.name)).into());
        }
        path => path.map(|path| path.below).unwrap_or_default(),
    };
    let files = services.files(&container, "").await?;
    let listing = Listing {
        services,
        container,
        below,
        files,
        count: 0,
    };
    let body = Body::from_stream(listing.into_stream());
    Ok((StatusCode::OK, [(CONTENT_TYPE, "application/json")], body).into_response())
}

/// The reply that lists a container's files, page by page.
struct Listing {
    services: Services,
    container: Container,
    /// Only this file, or those below it; all if it is empty.
    below: String,
    /// The page to send next.
    files: Vec<File>,
    count: u64,
}

impl Listing {
    fn into_stream(self) -> impl Stream<Item = Result<Bytes, Error>> + Send {
        stream::try_unfold(Some((self, true)), |state| async {
            let Some((mut listing, begins)) = state else {
                return Ok(None);
            };
            let mut text = Vec::new();
            if begins {
                text.extend_from_slice(b"{\"value\":[");
            }
            let Some(last) = listing.files.last().map(|file| file.path.clone()) else {
                text.extend_from_slice(format!("],\"count\":{}}}", listing.count).as_bytes());
                return Ok(Some((Bytes::from(text), None)));
            };
            for file in &listing.files {
                if !listing.shows(&file.path) {
                    continue;
                }
                if listing.count > 0 {
                    text.push(b',');
                }
                listing.count += 1;
                let item = item(&listing.services, &listing.container, file);
                let item = item.map_err(|error| Error::Internal(format!("an item is not JSON: {error}")))?;
                text.extend_from_slice(&item);
            }
            let page = listing.services.hold(text).await?;
            listing.files = listing.services.files(&listing.container, &last).await?;
            Ok(Some((page, Some((listing, false)))))
        })
    }

    fn shows(&self, path: &str) -> bool {
        let Some(rest) = path.strip_prefix(&self.below) else {
            return false;
        };
        self.below.is_empty() || rest.is_empty() || rest.starts_with('/')
    }
}

pub async fn file(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let path = file_of(query.as_deref())?;
    let services = &context.services;
    let container = services.container(&principal, container_id(&id)).await?;
    if path.artifact != container.name {
        return Err(Error::NotFound(format!("there is no {} in {}", path.artifact, container.name)).into());
    }
    let (file, bytes) = services.read_file(&container, &path.below).await?;
    let mut reply = Response::builder()
        .status(StatusCode::OK)
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(CONTENT_LENGTH, file.stored_bytes)
        .header(CACHE_CONTROL, "private, no-store")
        // Whatever a job uploaded must not run in a browser.
        .header(CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'");
    if file.encoding == Encoding::Gzip {
        reply = reply.header(CONTENT_ENCODING, "gzip");
    }
    let reply = reply.body(Body::from_stream(bytes));
    reply.map_err(|error| Error::Internal(format!("a header can't be sent: {error}")).into())
}
