//! Wharfinger's own endpoints around papers: a job or a run is closed, a runtime token is minted.
//!
//! Called through the URL map in `api/mod.rs`; the rules are in `service/credentials.rs`. What an API token does not see
//! is answered as what does not exist.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::reply::GithubError;
use super::{Context, body};
use crate::error::{self, Error};
use crate::model::{ApiToken, Principal};
use crate::papers::{MINTED_ISSUER, MintRequest};
use crate::service::credentials::{RunToClose, key_of};

/// `POST /api/v1/job/close`: the caller's own runtime token ends, and every other one of its job.
/// For what runs last in a job, such as the post step of an action.
pub async fn close_job(
    State(context): State<Context>,
    Extension(principal): Extension<Arc<Principal>>,
) -> Result<StatusCode, GithubError> {
    context.services.close_job(&principal).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CloseRun {
    /// `owner/name`, or the repository's number.
    repository: String,
    /// The run's number, or the id in its tokens.
    run_id: String,
}

/// `POST /api/v1/run/close`: the runtime tokens that a run was given until now end.
pub async fn close_run(
    State(context): State<Context>,
    Extension(token): Extension<ApiToken>,
    request: Request,
) -> Result<StatusCode, GithubError> {
    let CloseRun { repository, run_id } = read(&context, request).await?;
    check_sees(&token, &repository)?;
    let run = RunToClose {
        issuer: token.issuer,
        repository,
        run: run_id,
    };
    context.services.close_run(run).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mint {
    repository: String,
    repository_id: Option<i64>,
    run_id: String,
    job_id: String,
    #[serde(default = "first_attempt")]
    run_attempt: i32,
    #[serde(rename = "ref")]
    git_ref: String,
    default_ref: String,
    event: Option<String>,
    /// How long the token lives.
    #[serde(default = "six_hours")]
    ttl_seconds: u64,
}

fn first_attempt() -> i32 {
    1
}

fn six_hours() -> u64 {
    6 * 3600
}

#[derive(Serialize)]
pub struct Minted {
    token: String,
}

/// `POST /api/v1/runtime-token`: a runtime token for one job, as `wharfinger token mint` makes it.
pub async fn mint(
    State(context): State<Context>,
    Extension(token): Extension<ApiToken>,
    request: Request,
) -> Result<(StatusCode, Json<Minted>), GithubError> {
    let asked: Mint = read(&context, request).await?;
    // Of name and number neither may be another repository's.
    check_sees(&token, &asked.repository)?;
    if let Some(id) = asked.repository_id {
        check_sees(&token, &id.to_string())?;
    }
    if token.issuer.as_deref().is_some_and(|issuer| issuer != MINTED_ISSUER) {
        return Err(unseen().into());
    }
    let services = &context.services;
    let minted = services.papers.mint(
        &MintRequest {
            repository: asked.repository.clone(),
            repository_id: asked.repository_id,
            run_id: asked.run_id.clone(),
            job_id: asked.job_id.clone(),
            attempt: asked.run_attempt,
            git_ref: asked.git_ref,
            default_ref: asked.default_ref,
            event: asked.event,
            ttl: Duration::from_secs(asked.ttl_seconds),
        },
        services.clock.now_ms(),
    )?;
    tracing::info!(
        api_token = token.id,
        repository = asked.repository,
        run_id = asked.run_id,
        job_id = asked.job_id,
        "minted a runtime token"
    );
    Ok((StatusCode::CREATED, Json(Minted { token: minted })))
}

async fn read<T: DeserializeOwned>(context: &Context, request: Request) -> error::Result<T> {
    let bytes = body::whole(context, request).await?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Malformed(format!("the body can't be read: {error}")))
}

fn check_sees(token: &ApiToken, repository: &str) -> error::Result<()> {
    if token.repositories.include(&key_of(repository)?) {
        Ok(())
    } else {
        Err(unseen())
    }
}

fn unseen() -> Error {
    Error::NotFound("a repository that the API token is not for".to_owned())
}
