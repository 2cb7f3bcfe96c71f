//! Twirp `github.actions.results.api.v1.ArtifactService`, as `@actions/artifact` 2.0.1 to 6.2.1 speak it.
//!
//! Routed by `api/mod.rs` behind a runtime token. The run in a request is only compared with the token's, before
//! anything else in the request is looked at, so that the answer says nothing about other runs.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};

use super::Context;
use super::reply::TwirpError;
use super::twirp::{self, Answer, Message, format_timestamp};
use crate::error::Error;
use crate::model::{ArtifactId, Principal, Sha256};
use crate::service::artifacts::Request;

type Reply<T> = Result<Answer<T>, TwirpError>;

/// The two ids that every request carries.
#[derive(Debug, Default, Deserialize)]
pub struct BackendIds {
    #[serde(default, alias = "workflowRunBackendId")]
    workflow_run_backend_id: String,
    #[serde(default, alias = "workflowJobRunBackendId")]
    workflow_job_run_backend_id: String,
}

impl BackendIds {
    fn check_run(&self, principal: &Principal) -> Result<(), Error> {
        if self.workflow_run_backend_id == principal.run.run_backend_id {
            Ok(())
        } else {
            Err(Error::Forbidden("the token is for another workflow run".to_owned()))
        }
    }

    fn check_run_and_job(&self, principal: &Principal) -> Result<(), Error> {
        self.check_run(principal)?;
        if self.workflow_job_run_backend_id == principal.job_backend_id {
            Ok(())
        } else {
            Err(Error::Forbidden("the token is for another job".to_owned()))
        }
    }
}

#[derive(Debug, Deserialize)]
pub struct CreateArtifactRequest {
    #[serde(flatten)]
    ids: BackendIds,
    #[serde(default)]
    name: String,
    #[serde(default, alias = "expiresAt", deserialize_with = "twirp::timestamp")]
    expires_at: Option<i64>,
    #[serde(default, deserialize_with = "twirp::int32")]
    version: i32,
    #[serde(default, alias = "mimeType")]
    mime_type: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct CreateArtifactResponse {
    ok: bool,
    signed_upload_url: String,
}

pub async fn create(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Message(request): Message<CreateArtifactRequest>,
) -> Reply<CreateArtifactResponse> {
    request.ids.check_run_and_job(&principal)?;
    let wanted = Request {
        name: &request.name,
        version: request.version,
        mime_type: request.mime_type.as_deref(),
        expires_at_ms: request.expires_at,
    };
    let signed_upload_url = context.services.create_artifact(&principal, &wanted).await?;
    Ok(Answer(CreateArtifactResponse {
        ok: true,
        signed_upload_url,
    }))
}

#[derive(Debug, Deserialize)]
pub struct FinalizeArtifactRequest {
    #[serde(flatten)]
    ids: BackendIds,
    #[serde(default)]
    name: String,
    #[serde(default, deserialize_with = "twirp::int64")]
    size: Option<i64>,
    #[serde(default)]
    hash: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct ArtifactIdResponse {
    ok: bool,
    artifact_id: String,
}

impl From<ArtifactId> for Answer<ArtifactIdResponse> {
    fn from(id: ArtifactId) -> Self {
        Self(ArtifactIdResponse {
            ok: true,
            artifact_id: id.to_string(),
        })
    }
}

pub async fn finalize(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Message(request): Message<FinalizeArtifactRequest>,
) -> Reply<ArtifactIdResponse> {
    request.ids.check_run_and_job(&principal)?;
    // Protobuf leaves out what is 0.
    let size = u64::try_from(request.size.unwrap_or_default())
        .map_err(|_| Error::Invalid("size must not be negative".to_owned()))?;
    let hash = request
        .hash
        .filter(|hash| !hash.is_empty())
        .map(|hash| {
            Sha256::parse(&hash).ok_or_else(|| Error::Invalid("hash must be sha256: and 64 hex digits".to_owned()))
        })
        .transpose()?;
    let id = context
        .services
        .finalize_artifact(&principal, &request.name, size, hash)
        .await?;
    Ok(id.into())
}

#[derive(Debug, Deserialize)]
pub struct ListArtifactsRequest {
    #[serde(flatten)]
    ids: BackendIds,
    #[serde(default, alias = "nameFilter")]
    name_filter: Option<String>,
    #[serde(default, alias = "idFilter", deserialize_with = "twirp::int64")]
    id_filter: Option<i64>,
}

#[derive(Debug, Serialize)]
pub struct ListArtifactsResponse {
    artifacts: Vec<ListedArtifact>,
}

#[derive(Debug, Serialize)]
struct ListedArtifact {
    workflow_run_backend_id: String,
    /// The uploader's; clients send it back when they ask for a link.
    workflow_job_run_backend_id: String,
    database_id: String,
    name: String,
    size: String,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
}

pub async fn list(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Message(request): Message<ListArtifactsRequest>,
) -> Result<Response, TwirpError> {
    request.ids.check_run(&principal)?;
    let id = request.id_filter.map(ArtifactId);
    let artifacts = context
        .services
        .list_artifacts(&principal, request.name_filter.as_deref(), id)
        .await?;
    let artifacts = artifacts
        .into_iter()
        .map(|artifact| ListedArtifact {
            workflow_run_backend_id: principal.run.run_backend_id.clone(),
            workflow_job_run_backend_id: artifact.job_backend_id,
            database_id: artifact.id.to_string(),
            name: artifact.name,
            size: artifact.size_bytes.to_string(),
            created_at: format_timestamp(artifact.created_at_ms),
            digest: artifact.sha256.map(|sha256| sha256.to_string()),
        })
        .collect();
    Ok(twirp::large_answer(&context.services, &ListArtifactsResponse { artifacts }).await?)
}

/// `GetSignedArtifactURL` and `DeleteArtifact` name an artifact alike.
#[derive(Debug, Deserialize)]
pub struct NamedArtifactRequest {
    #[serde(flatten)]
    ids: BackendIds,
    #[serde(default)]
    name: String,
}

#[derive(Debug, Serialize)]
pub struct SignedUrlResponse {
    signed_url: String,
}

pub async fn signed_url(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Message(request): Message<NamedArtifactRequest>,
) -> Reply<SignedUrlResponse> {
    request.ids.check_run(&principal)?;
    let signed_url = context.services.artifact_link(&principal, &request.name).await?;
    Ok(Answer(SignedUrlResponse { signed_url }))
}

pub async fn delete(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
    Message(request): Message<NamedArtifactRequest>,
) -> Reply<ArtifactIdResponse> {
    request.ids.check_run(&principal)?;
    let id = context.services.delete_artifact(&principal, &request.name).await?;
    Ok(id.into())
}

/// `MigrateArtifact` and `FinalizeMigratedArtifact` exist as stubs in clients 2.3.2 to 5.0.3; none calls them.
pub async fn migrate() -> TwirpError {
    Error::Unsupported("artifacts are not migrated here".to_owned()).into()
}
