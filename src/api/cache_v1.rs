//! The first cache protocol, `_apis/artifactcache`, as `@actions/cache` speaks it up to 3.x and later ones on servers
//! that are not GitHub's; OpenDAL and Go's clients know it too.
//!
//! Routed by `api/mod.rs` behind a runtime token. An upload comes in chunks, in any order and several at once, without
//! `Content-Length`; the commit says how many bytes they must make. Bytes go out by signed links, as everywhere.

use std::ops::Range;
use std::sync::Arc;

use axum::Extension;
use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::reply::ApisError;
use super::twirp::format_timestamp;
use super::{Context, body, content_range};
use crate::error::Error;
use crate::model::{CacheEntryId, Principal};
use crate::service::uploads::{Checksums, Upload};

type Reply<T> = Result<T, ApisError>;

/// Keys of one look-up. Source: `@actions/cache`, `cache.ts`.
const MAX_KEYS: usize = 10;

#[derive(Debug, Deserialize)]
pub struct LookUp {
    /// Divided by commas; the first is the one that is wanted most.
    keys: String,
    version: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ArtifactCacheEntry {
    /// In a list nobody reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    archive_location: Option<String>,
    cache_key: String,
    scope: String,
    cache_version: String,
    creation_time: String,
}

pub async fn look_up(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    query: Result<Query<LookUp>, QueryRejection>,
) -> Reply<Response> {
    let Query(LookUp { keys, version }) = query.map_err(|error| Error::Malformed(error.body_text()))?;
    let keys: Vec<&str> = keys.split(',').collect();
    if keys.len() > MAX_KEYS {
        return Err(Error::Invalid(format!("a look-up may have at most {MAX_KEYS} keys")).into());
    }
    let (key, restore_keys) = keys.split_first().map_or(("", &[][..]), |(key, rest)| (*key, rest));
    let hit = context
        .services
        .look_up_cache(&principal, key, restore_keys, &version)
        .await?;
    Ok(match hit {
        Some(hit) => Json(ArtifactCacheEntry {
            archive_location: Some(hit.link),
            cache_key: hit.key,
            scope: hit.scope,
            cache_version: version,
            creation_time: format_timestamp(hit.created_at_ms),
        })
        .into_response(),
        None => StatusCode::NO_CONTENT.into_response(),
    })
}

#[derive(Debug, Deserialize)]
pub struct Listing {
    key: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactCacheList {
    total_count: usize,
    artifact_caches: Vec<ArtifactCacheEntry>,
}

/// What a client in debug mode asks after a miss, to show entries of other versions and scopes.
pub async fn list(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    query: Result<Query<Listing>, QueryRejection>,
) -> Reply<Json<ArtifactCacheList>> {
    let Query(Listing { key }) = query.map_err(|error| Error::Malformed(error.body_text()))?;
    let artifact_caches: Vec<_> = context
        .services
        .list_caches(&principal, &key)
        .await?
        .into_iter()
        .map(|entry| ArtifactCacheEntry {
            archive_location: None,
            cache_key: entry.key,
            scope: entry.scope,
            cache_version: entry.version,
            creation_time: format_timestamp(entry.created_at_ms),
        })
        .collect();
    Ok(Json(ArtifactCacheList {
        total_count: artifact_caches.len(),
        artifact_caches,
    }))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReserveCacheRequest {
    key: String,
    version: String,
    cache_size: Option<u64>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ReserveCacheResponse {
    cache_id: i64,
}

pub async fn reserve(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    request: Request,
) -> Reply<Response> {
    let request: ReserveCacheRequest = json(&context, request).await?;
    let (id, _) = context
        .services
        .reserve_cache(&principal, &request.key, &request.version, request.cache_size)
        .await?;
    Ok((StatusCode::CREATED, Json(ReserveCacheResponse { cache_id: id.0 })).into_response())
}

pub async fn upload_chunk(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    id: Result<Path<i64>, PathRejection>,
    request: Request,
) -> Reply<StatusCode> {
    let id = entry_id(id)?;
    let range = chunk_range(request.headers())?;
    let upload = Upload {
        size_bytes: range.end - range.start,
        body: body::chunks(request.into_body(), context.patience),
        checksums: Checksums::default(),
    };
    context
        .services
        .stage_cache_chunk(&principal, id, range.start, upload)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Deserialize)]
struct CommitCacheRequest {
    size: u64,
}

pub async fn commit(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    id: Result<Path<i64>, PathRejection>,
    request: Request,
) -> Reply<StatusCode> {
    let id = entry_id(id)?;
    let CommitCacheRequest { size } = json(&context, request).await?;
    context.services.commit_cache_chunks(&principal, id, size).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn entry_id(path: Result<Path<i64>, PathRejection>) -> Result<CacheEntryId, Error> {
    match path {
        Ok(Path(id)) if id > 0 => Ok(CacheEntryId(id)),
        _ => Err(Error::Invalid("a cache id is a positive number".to_owned())),
    }
}

/// What the chunk is of, which is also how long its body must be.
fn chunk_range(headers: &HeaderMap) -> Result<Range<u64>, Error> {
    let range = headers
        .get(CONTENT_RANGE)
        .and_then(|value| content_range::parse(value.to_str().ok()?))
        .map(|range| range.bytes)
        .filter(|bytes| !bytes.is_empty())
        .ok_or_else(|| Error::Invalid("Content-Range must be bytes <first>-<last>/*".to_owned()))?;
    let length = headers.get(CONTENT_LENGTH);
    if length.is_some_and(|length| length.as_bytes() != (range.end - range.start).to_string().as_bytes()) {
        return Err(Error::Invalid(
            "Content-Length is not that of the Content-Range".to_owned(),
        ));
    }
    Ok(range)
}

/// A small JSON body, whatever its declared type.
async fn json<T: DeserializeOwned>(context: &Context, request: Request) -> Result<T, Error> {
    let bytes = body::whole(context, request).await?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Malformed(format!("the body is not what is asked: {error}")))
}
