//! Bare servers that do the least that is possible, on the same HTTP library as Wharfinger: what no server can beat.
//!
//! The benchmark starts its own program again as one of them. They answer the artifact client's calls without looking
//! at them; `discard` forgets every body, `write` puts it into a file at its place, frame by frame.

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{post, put};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use serde::Deserialize;

/// The block size of the clients, by which a block's number becomes its place.
pub const BLOCK_BYTES: u64 = 8 * 1024 * 1024;

#[derive(Clone)]
struct Floor {
    address: SocketAddr,
    /// Absent where bodies are discarded.
    directory: Option<Arc<PathBuf>>,
}

#[derive(Deserialize)]
struct BlockParams {
    blockid: Option<String>,
}

/// Serves until it is killed.
pub fn serve(address: SocketAddr, directory: Option<&Path>) -> Result<()> {
    let floor = Floor {
        address,
        directory: directory.map(|directory| Arc::new(directory.to_owned())),
    };
    let router = Router::new()
        .route("/twirp/{service}/{method}", post(answer))
        .route("/a/b/{blob}", put(take))
        .with_state(floor);
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(async { Ok(axum::serve(tokio::net::TcpListener::bind(address).await?, router).await?) })
}

/// One answer for every method: clients ignore the fields that they did not expect.
async fn answer(State(floor): State<Floor>, UrlPath((_, method)): UrlPath<(String, String)>, body: Body) -> Response {
    if axum::body::to_bytes(body, 1024 * 1024).await.is_err() {
        return StatusCode::BAD_REQUEST.into_response();
    }
    let json = match method.as_str() {
        "CreateArtifact" | "GetSignedArtifactURL" => {
            let link = format!("http://{}/a/b/{}?sig=none", floor.address, uuid::Uuid::new_v4());
            format!(r#"{{"ok":true,"signed_upload_url":"{link}","signed_url":"{link}"}}"#)
        }
        "ListArtifacts" => r#"{"artifacts":[{"workflow_run_backend_id":"1","workflow_job_run_backend_id":"build","database_id":"1","name":"artifact","size":"1","created_at":"2026-01-01T00:00:00Z"}]}"#.to_owned(),
        _ => r#"{"ok":true,"artifact_id":"1"}"#.to_owned(),
    };
    ([(CONTENT_TYPE, "application/json")], json).into_response()
}

async fn take(
    State(floor): State<Floor>,
    UrlPath(blob): UrlPath<String>,
    Query(params): Query<BlockParams>,
    body: Body,
) -> StatusCode {
    let offset = params
        .blockid
        .as_deref()
        .and_then(block_number)
        .map(|number| number * BLOCK_BYTES);
    let target = floor.directory.map(|directory| directory.join(blob)).zip(offset);
    match swallow(target, body).await {
        Ok(()) => StatusCode::CREATED,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// This benchmark's block ids are the blocks' numbers.
fn block_number(id: &str) -> Option<u64> {
    String::from_utf8(STANDARD.decode(id).ok()?).ok()?.parse().ok()
}

async fn swallow(target: Option<(PathBuf, u64)>, body: Body) -> Result<()> {
    let mut place = match target {
        Some((path, offset)) => Some((
            File::options().create(true).truncate(false).write(true).open(path)?,
            offset,
        )),
        None => None,
    };
    let mut frames = body.into_data_stream();
    while let Some(frame) = frames.next().await {
        let frame = frame.context("the body broke off")?;
        if let Some((file, offset)) = &mut place {
            // On the async thread on purpose: handing it to another one costs more than the copy into the page cache.
            file.write_all_at(&frame, *offset)?;
            *offset += frame.len() as u64;
        }
    }
    Ok(())
}
