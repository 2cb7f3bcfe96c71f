//! Twirp `github.actions.results.api.v1.CacheService`, as `@actions/cache` 4.0 to 6.3, Go's clients and OpenDAL speak
//! it: in JSON or in protobuf.
//!
//! Routed by `api/mod.rs` behind a runtime token, which alone says whose cache is meant: the `metadata` that a request
//! may carry (field 1) is not read. Field numbers and names: `cache.proto`, as generated in the toolkit's
//! `packages/cache/src/generated/results/api/v1/cache.ts`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::Context;
use super::reply::TwirpError;
use super::twirp::{self, Encoded};
use crate::error::Error;
use crate::model::Principal;

type Reply<T> = Result<Encoded<T>, TwirpError>;

/// What the clients warn with, of an answer that is not `ok`; they know how it begins.
fn denial(error: Error) -> Result<String, TwirpError> {
    match error {
        Error::Forbidden(message) => Ok(message),
        error => Err(error.into()),
    }
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
pub struct CreateCacheEntryRequest {
    #[prost(string, tag = "2")]
    #[serde(default)]
    key: String,
    #[prost(string, tag = "3")]
    #[serde(default)]
    version: String,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct CreateCacheEntryResponse {
    #[prost(bool, tag = "1")]
    ok: bool,
    #[prost(string, tag = "2")]
    #[serde(skip_serializing_if = "String::is_empty")]
    signed_upload_url: String,
    #[prost(string, tag = "3")]
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

pub async fn create(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    request: Encoded<CreateCacheEntryRequest>,
) -> Reply<CreateCacheEntryResponse> {
    let CreateCacheEntryRequest { key, version } = &request.message;
    let created = context.services.create_cache_entry(&principal, key, version).await;
    Ok(request.answer(match created {
        Ok(signed_upload_url) => CreateCacheEntryResponse {
            ok: true,
            signed_upload_url,
            message: String::new(),
        },
        Err(error) => CreateCacheEntryResponse {
            ok: false,
            signed_upload_url: String::new(),
            message: denial(error)?,
        },
    }))
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
pub struct FinalizeCacheEntryUploadRequest {
    #[prost(string, tag = "2")]
    #[serde(default)]
    key: String,
    #[prost(int64, tag = "3")]
    #[serde(default, alias = "sizeBytes", deserialize_with = "twirp::int64_or_0")]
    size_bytes: i64,
    #[prost(string, tag = "4")]
    #[serde(default)]
    version: String,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct FinalizeCacheEntryUploadResponse {
    #[prost(bool, tag = "1")]
    ok: bool,
    /// In JSON a string: Go's client takes nothing else.
    #[prost(int64, tag = "2")]
    #[serde(serialize_with = "twirp::as_text", skip_serializing_if = "is_0")]
    entry_id: i64,
    #[prost(string, tag = "3")]
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

fn is_0(number: &i64) -> bool {
    *number == 0
}

pub async fn finalize(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    request: Encoded<FinalizeCacheEntryUploadRequest>,
) -> Reply<FinalizeCacheEntryUploadResponse> {
    let FinalizeCacheEntryUploadRequest {
        key,
        size_bytes,
        version,
    } = &request.message;
    let size_bytes =
        u64::try_from(*size_bytes).map_err(|_| Error::Invalid("size_bytes must not be negative".to_owned()))?;
    let finalized = context
        .services
        .finalize_cache_entry(&principal, key, version, size_bytes)
        .await;
    Ok(request.answer(match finalized {
        Ok(id) => FinalizeCacheEntryUploadResponse {
            ok: true,
            entry_id: id.0,
            message: String::new(),
        },
        Err(error) => FinalizeCacheEntryUploadResponse {
            ok: false,
            entry_id: 0,
            message: denial(error)?,
        },
    }))
}

#[derive(Clone, PartialEq, prost::Message, Deserialize)]
pub struct GetCacheEntryDownloadUrlRequest {
    #[prost(string, tag = "2")]
    #[serde(default)]
    key: String,
    #[prost(string, repeated, tag = "3")]
    #[serde(default, alias = "restoreKeys")]
    restore_keys: Vec<String>,
    #[prost(string, tag = "4")]
    #[serde(default)]
    version: String,
}

#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct GetCacheEntryDownloadUrlResponse {
    #[prost(bool, tag = "1")]
    ok: bool,
    #[prost(string, tag = "2")]
    #[serde(skip_serializing_if = "String::is_empty")]
    signed_download_url: String,
    #[prost(string, tag = "3")]
    #[serde(skip_serializing_if = "String::is_empty")]
    matched_key: String,
}

/// A miss is a good answer that is not `ok`: the clients warn of anything else.
pub async fn download_url(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    request: Encoded<GetCacheEntryDownloadUrlRequest>,
) -> Reply<GetCacheEntryDownloadUrlResponse> {
    let GetCacheEntryDownloadUrlRequest {
        key,
        restore_keys,
        version,
    } = &request.message;
    let restore_keys: Vec<_> = restore_keys.iter().map(String::as_str).collect();
    let hit = context
        .services
        .look_up_cache(&principal, key, &restore_keys, version)
        .await?;
    let reply = hit.map_or_else(GetCacheEntryDownloadUrlResponse::default, |hit| {
        GetCacheEntryDownloadUrlResponse {
            ok: true,
            signed_download_url: hit.link,
            matched_key: hit.key,
        }
    });
    Ok(request.answer(reply))
}
