//! Artifacts across runs in the shape of GitHub's REST API (version 2022-11-28), below `/api/v3` as on GHES: for `gh`,
//! octokit, and `@actions/artifact` with a token (`findBy`). And what GitHub has no shape for, below `/api/v1`.
//!
//! Called through the URL map in `api/mod.rs`; the rules are in `service/repositories.rs`. Callers are API tokens; what
//! one does not see is answered as what does not exist.

use std::collections::HashMap;

use axum::Json;
use axum::extract::{FromRequestParts, Path, Query};
use axum::http::header::{LINK, LOCATION};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Context;
use super::reply::GithubError;
use crate::clock;
use crate::db::{Filter, Page, RepositoryArtifact, RepositoryRun, RunJob, Usage, View};
use crate::error::Error;
use crate::model::{ApiToken, ArtifactId};
use crate::papers::{is_repository, repository_key};
use crate::service::Services;

const DEFAULT_PER_PAGE: i64 = 30;
const MAX_PER_PAGE: i64 = 100;

type Reply = Result<Response, GithubError>;

/// Whose request it is, and of which repository.
pub struct Caller {
    services: Services,
    view: View,
    /// `<public_url>/api/v3/repos/<owner>/<repo>`.
    url: String,
    /// `owner/name` as the request has it.
    full_name: String,
    /// Whether the token is for it by this name: then it may be told that there is nothing.
    is_named: bool,
    /// What else the path says, by the names in the URL map.
    path: HashMap<String, String>,
    uri: Uri,
}

impl FromRequestParts<Context> for Caller {
    type Rejection = GithubError;

    async fn from_request_parts(parts: &mut Parts, context: &Context) -> Result<Self, GithubError> {
        let path = Path::<HashMap<String, String>>::from_request_parts(parts, context).await;
        let Path(path) = path.map_err(|_| not_found())?;
        let part = |name| path.get(name).map(String::as_str).unwrap_or_default();
        let full_name = format!("{}/{}", part("owner"), part("repo"));
        let token = parts.extensions.get::<ApiToken>().ok_or_else(not_found)?;
        if !is_repository(&full_name) {
            return Err(not_found().into());
        }
        let public_url = context.services.papers.public_url();
        Ok(Self {
            view: View::new(token, &full_name),
            is_named: token.repositories.include(&repository_key(&full_name)),
            url: format!("{public_url}/api/v3/repos/{full_name}"),
            full_name,
            path,
            uri: parts.uri.clone(),
            services: context.services.clone(),
        })
    }
}

impl Caller {
    /// An id in the path. What is none does not exist.
    fn id(&self, name: &str) -> Result<i64, Error> {
        let id = self.path.get(name).and_then(|text| text.parse().ok());
        id.filter(|id| *id > 0).ok_or_else(not_found)
    }

    fn run_filter(&self) -> Result<Filter<'static>, Error> {
        Ok(Filter {
            run_id: Some(self.id("run_id")?),
            ..Filter::default()
        })
    }

    fn artifact(&self, artifact: &RepositoryArtifact) -> Value {
        let url = format!("{}/actions/artifacts/{}", self.url, artifact.id);
        json!({
            "id": artifact.id.0,
            "node_id": "",
            "name": artifact.name,
            "size_in_bytes": artifact.size_bytes,
            "url": url,
            "archive_download_url": format!("{url}/zip"),
            "expired": false,
            "digest": artifact.sha256.map(|sha256| sha256.to_string()),
            "created_at": time(artifact.created_at_ms),
            "updated_at": time(artifact.finalized_at_ms),
            "expires_at": time(artifact.expires_at_ms),
            "workflow_run": artifact.run_id.map(|id| json!({ "id": id, "run_attempt": artifact.run_attempt })),
        })
    }

    fn run(&self, run: &RepositoryRun) -> Value {
        let url = format!("{}/actions/runs/{}", self.url, run.id);
        json!({
            "id": run.id,
            "run_attempt": run.attempt,
            "created_at": time(run.created_at_ms),
            "updated_at": time(run.updated_at_ms),
            "url": url,
            "jobs_url": format!("{url}/jobs"),
            "artifacts_url": format!("{url}/artifacts"),
            "repository": { "full_name": self.full_name },
        })
    }
}

fn job(job: &RunJob, run_id: i64) -> Value {
    json!({
        "id": job.backend_id,
        "run_id": run_id,
        "run_attempt": job.attempt,
        "name": job.backend_id,
        "created_at": time(job.created_at_ms),
        "completed_at": time(job.updated_at_ms),
    })
}

/// As GitHub writes times.
fn time(at_ms: i64) -> String {
    humantime::format_rfc3339_seconds(clock::writable(at_ms)).to_string()
}

fn not_found() -> Error {
    Error::NotFound("no such thing".to_owned())
}

/// What a list is asked by.
#[derive(Default, Deserialize)]
struct Asked {
    per_page: Option<String>,
    page: Option<String>,
    name: Option<String>,
    sort: Option<String>,
}

impl Asked {
    fn read(uri: &Uri) -> Result<Self, Error> {
        let Ok(Query(asked)) = Query::<Self>::try_from_uri(uri) else {
            return Err(Error::Malformed("the query can't be read".to_owned()));
        };
        if asked.name.as_deref().is_some_and(|name| name.contains('\0')) {
            return Err(Error::Malformed("a name with a NUL in it".to_owned()));
        }
        // Newest first is all there is.
        if asked.sort.as_deref().is_some_and(|sort| sort != "created_at") {
            return Err(Error::Invalid("sort: only created_at".to_owned()));
        }
        Ok(asked)
    }

    /// As GitHub, it takes the nearest that it can.
    fn paging(&self) -> Result<Paging, Error> {
        let number = |text: &Option<String>, default| match text {
            None => Ok(default),
            Some(text) => text
                .parse::<i64>()
                .map_err(|_| Error::Invalid("page and per_page are numbers".to_owned())),
        };
        Ok(Paging {
            per_page: number(&self.per_page, DEFAULT_PER_PAGE)?.clamp(1, MAX_PER_PAGE),
            page: number(&self.page, 1)?.clamp(1, i64::MAX / MAX_PER_PAGE),
        })
    }
}

/// Rows per page, and which page, counted from 1.
#[derive(Clone, Copy)]
struct Paging {
    per_page: i64,
    page: i64,
}

impl Paging {
    fn rows(self) -> Page {
        Page {
            limit: self.per_page,
            offset: (self.page - 1) * self.per_page,
        }
    }

    /// The way to other pages, for `Link` (RFC 8288). `None` if there are none.
    fn links(self, public_url: &str, uri: &Uri, total: u64) -> Option<HeaderValue> {
        let Self { per_page, page } = self;
        let last = i64::try_from(total).unwrap_or(i64::MAX).saturating_sub(1) / per_page + 1;
        let others = uri.query().unwrap_or_default().split('&').filter(|pair| {
            let name = pair.split('=').next().unwrap_or_default();
            !["", "page", "per_page"].contains(&name)
        });
        let others: String = others.map(|pair| format!("{pair}&")).collect();
        let path = uri.path();
        let links: Vec<String> = [("prev", page - 1), ("next", page + 1), ("first", 1), ("last", last)]
            .into_iter()
            .filter(|(_, to)| *to != page && (1..=last).contains(to))
            .map(|(rel, to)| format!("<{public_url}{path}?{others}per_page={per_page}&page={to}>; rel=\"{rel}\""))
            .collect();
        HeaderValue::try_from(links.join(", "))
            .ok()
            .filter(|links| !links.is_empty())
    }
}

impl Caller {
    /// A page of a list. An empty one of a repository that the token does not name is none.
    fn listed(&self, paging: Paging, total: u64, body: Value) -> Reply {
        if total == 0 && !self.is_named {
            return Err(not_found().into());
        }
        let mut response = Json(body).into_response();
        if let Some(links) = paging.links(self.services.papers.public_url(), &self.uri, total) {
            response.headers_mut().insert(LINK, links);
        }
        Ok(response)
    }

    async fn list_artifacts(&self, run_id: Option<i64>) -> Reply {
        let asked = Asked::read(&self.uri)?;
        let paging = asked.paging()?;
        let filter = Filter {
            run_id,
            name: asked.name.as_deref(),
            ..Filter::default()
        };
        let found = self
            .services
            .repository_artifacts(&self.view, filter, paging.rows())
            .await?;
        let artifacts: Vec<Value> = found.rows.iter().map(|artifact| self.artifact(artifact)).collect();
        let body = json!({ "total_count": found.total, "artifacts": artifacts });
        self.listed(paging, found.total, body)
    }

    async fn delete(&self, filter: Filter<'_>) -> Reply {
        match self.services.delete_repository_artifacts(&self.view, filter).await? {
            0 => Err(not_found().into()),
            _ => Ok(StatusCode::NO_CONTENT.into_response()),
        }
    }
}

/// `GET /repos/{owner}/{repo}/actions/artifacts`.
pub async fn artifacts(caller: Caller) -> Reply {
    caller.list_artifacts(None).await
}

/// `GET /repos/{owner}/{repo}/actions/runs/{run_id}/artifacts`.
pub async fn run_artifacts(caller: Caller) -> Reply {
    caller.list_artifacts(Some(caller.id("run_id")?)).await
}

/// `GET /repos/{owner}/{repo}/actions/artifacts/{id}`.
pub async fn artifact(caller: Caller) -> Reply {
    let id = ArtifactId(caller.id("id")?);
    let artifact = caller.services.repository_artifact(&caller.view, id).await?;
    Ok(Json(caller.artifact(&artifact)).into_response())
}

/// `GET /repos/{owner}/{repo}/actions/artifacts/{id}/zip`: sends on to the bytes, for a minute. The clients take a 302
/// and nothing else.
pub async fn zip(caller: Caller) -> Reply {
    let id = ArtifactId(caller.id("id")?);
    let link = caller.services.redirect_to_artifact(&caller.view, id).await?;
    Ok((StatusCode::FOUND, [(LOCATION, link)]).into_response())
}

/// `DELETE /repos/{owner}/{repo}/actions/artifacts/{id}`.
pub async fn delete_artifact(caller: Caller) -> Reply {
    let id = ArtifactId(caller.id("id")?);
    caller.services.delete_repository_artifact(&caller.view, id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `GET /repos/{owner}/{repo}/actions/runs`: those that have artifacts.
pub async fn runs(caller: Caller) -> Reply {
    let paging = Asked::read(&caller.uri)?.paging()?;
    let found = caller.services.repository_runs(&caller.view, paging.rows()).await?;
    let runs: Vec<Value> = found.rows.iter().map(|run| caller.run(run)).collect();
    let body = json!({ "total_count": found.total, "workflow_runs": runs });
    caller.listed(paging, found.total, body)
}

/// `GET /repos/{owner}/{repo}/actions/runs/{run_id}`.
pub async fn run(caller: Caller) -> Reply {
    let run = caller
        .services
        .repository_run(&caller.view, caller.run_filter()?)
        .await?;
    Ok(Json(caller.run(&run)).into_response())
}

/// `DELETE /repos/{owner}/{repo}/actions/runs/{run_id}`: with all of its artifacts.
pub async fn delete_run(caller: Caller) -> Reply {
    caller.delete(caller.run_filter()?).await
}

/// `GET /repos/{owner}/{repo}/actions/runs/{run_id}/jobs`: those that have artifacts. A job has the id that its tokens
/// have, which need be no number.
pub async fn jobs(caller: Caller) -> Reply {
    let run_id = caller.id("run_id")?;
    let jobs = caller.services.run_jobs(&caller.view, caller.run_filter()?).await?;
    if jobs.is_empty() {
        return Err(not_found().into());
    }
    let jobs: Vec<Value> = jobs.iter().map(|one| job(one, run_id)).collect();
    Ok(Json(json!({ "total_count": jobs.len(), "jobs": jobs })).into_response())
}

/// `GET /api/v1/repos/{owner}/{repo}/usage`: bytes and numbers of artifacts and cache entries.
pub async fn usage(caller: Caller) -> Reply {
    let usage = caller.services.repository_usage(&caller.view).await?;
    if usage.is_empty() {
        return Err(not_found().into());
    }
    let sum = |of: fn(&Usage) -> u64| usage.iter().map(of).sum::<u64>();
    let body = json!({
        "full_name": caller.full_name,
        "artifacts_count": sum(|usage| usage.artifacts),
        "artifacts_size_in_bytes": sum(|usage| usage.artifact_bytes),
        "caches_count": sum(|usage| usage.cache_entries),
        "caches_size_in_bytes": sum(|usage| usage.cache_bytes),
    });
    Ok(Json(body).into_response())
}

/// `DELETE /api/v1/repos/{owner}/{repo}/artifacts`: all of them.
pub async fn delete_artifacts(caller: Caller) -> Reply {
    caller.delete(Filter::default()).await
}
