//! Everything that knows HTTP. This page is the whole URL map.
//!
//! `app` serves what [`public`] and [`internal`] return. Every route is declared with who may call it and how large a
//! body it takes, and that declaration is what guards it; handlers call `service/` and never the database or the store;
//! only `ops.rs` asks both how they are.

mod artifacts_v3;
mod artifacts_v4;
mod auth;
mod blobs;
mod block_list;
mod body;
mod cache_v1;
mod cache_v2;
mod client;
mod content_range;
mod credentials;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod item_path;
mod observe;
mod ops;
pub mod pass_through;
pub mod patience;
mod range;
mod reply;
mod rest;
pub mod serve;
mod socket;
pub mod tls;
mod twirp;

use axum::Router;
use axum::handler::Handler as _;
use axum::http::{StatusCode, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, any, delete, get, patch, post};

pub use self::body::BodyLimit;
use self::observe::Route;
pub use self::ops::Operations;
use self::pass_through::Upstream;
use self::patience::Patience;
use self::reply::{GithubError, TwirpError};
use crate::model::Access;
use crate::service::Services;

/// Who may call a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A job, by its runtime token: the handler is given its `Principal`.
    RuntimeToken,
    /// People and automation, by an API token: the handler is given the `ApiToken`. Any reads; methods other than GET
    /// and HEAD take one with this access. Which repositories it sees is for the handler to ask.
    ApiToken(Access),
    /// Whoever holds a signed link: the handler is given the `Link`, whose permission fits the method.
    SignedLink,
    /// Whoever the server lets that the request is passed on to: it has papers, and that server looks at them.
    Upstream,
    /// Anybody: the answer is the same for everybody and says nothing of what is stored.
    Anyone,
}

/// What handlers share.
#[derive(Clone, Debug)]
pub struct Context {
    pub services: Services,
    /// What is left to another server.
    pub upstream: Option<Upstream>,
    /// How long a request's body may keep us waiting.
    pub patience: Patience,
}

/// Routes, each with who may call it and how large a body it takes.
pub struct UrlMap {
    context: Context,
    router: Router<Context>,
    routes: Vec<(String, Caller, BodyLimit)>,
}

/// A Twirp message, and whatever else is JSON and small.
const MESSAGE: BodyLimit = BodyLimit::Bytes(1024 * 1024);
/// The first cache protocol's JSON.
const CACHE_MESSAGE: usize = 64 * 1024;
/// A few ids.
const REQUEST: usize = 16 * 1024;
/// 50 000 blocks in XML.
const BLOCK_LIST: usize = 8 * 1024 * 1024;

/// The public listener's URL map.
pub fn public(context: Context) -> UrlMap {
    use BodyLimit::{Bytes, None, Streamed, StreamedPacked};
    use Caller::{Anyone, ApiToken, RuntimeToken, SignedLink};
    UrlMap {
        context,
        router: Router::new(),
        routes: Vec::new(),
    }
    // Artifacts of version 4 and later.
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.ArtifactService/CreateArtifact",
        MESSAGE,
        call(post(artifacts_v4::create)),
    )
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.ArtifactService/FinalizeArtifact",
        MESSAGE,
        call(post(artifacts_v4::finalize)),
    )
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.ArtifactService/ListArtifacts",
        MESSAGE,
        call(post(artifacts_v4::list)),
    )
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.ArtifactService/GetSignedArtifactURL",
        MESSAGE,
        call(post(artifacts_v4::signed_url)),
    )
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.ArtifactService/DeleteArtifact",
        MESSAGE,
        call(post(artifacts_v4::delete)),
    )
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.ArtifactService/MigrateArtifact",
        MESSAGE,
        call(post(artifacts_v4::migrate)),
    )
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.ArtifactService/FinalizeMigratedArtifact",
        MESSAGE,
        call(post(artifacts_v4::migrate)),
    )
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.CacheService/CreateCacheEntry",
        MESSAGE,
        call(post(cache_v2::create)),
    )
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.CacheService/FinalizeCacheEntryUpload",
        MESSAGE,
        call(post(cache_v2::finalize)),
    )
    .route(
        RuntimeToken,
        "/twirp/github.actions.results.api.v1.CacheService/GetCacheEntryDownloadURL",
        MESSAGE,
        call(post(cache_v2::download_url)),
    )
    // Artifacts of version 3 and before. Clients build the first path from ACTIONS_RUNTIME_URL, and get the others.
    .route(
        RuntimeToken,
        "/_apis/pipelines/workflows/{run_id}/artifacts",
        MESSAGE,
        get(artifacts_v3::list)
            .post(artifacts_v3::create)
            .patch(artifacts_v3::finalize),
    )
    .route(
        RuntimeToken,
        "/_apis/resources/Containers/{id}",
        StreamedPacked,
        get(artifacts_v3::items).put(artifacts_v3::put),
    )
    .route(
        RuntimeToken,
        "/_apis/resources/Containers/{id}/file",
        None,
        get(artifacts_v3::file),
    )
    .route(Anyone, "/twirp/", None, any(bad_route))
    .unknown()
    // The first cache protocol.
    .route(RuntimeToken, "/_apis/artifactcache/cache", None, get(cache_v1::look_up))
    .route(
        RuntimeToken,
        "/_apis/artifactcache/caches",
        Bytes(CACHE_MESSAGE),
        get(cache_v1::list).post(cache_v1::reserve).fallback(not_found),
    )
    .route(
        RuntimeToken,
        "/_apis/artifactcache/caches/{id}",
        Streamed { whole: CACHE_MESSAGE },
        patch(cache_v1::upload_chunk).post(cache_v1::commit).fallback(not_found),
    )
    // Wharfinger's own.
    .route(Anyone, "/api/v1/version", None, get(ops::version).fallback(not_found))
    .route(
        RuntimeToken,
        "/api/v1/job/close",
        None,
        post(credentials::close_job).fallback(not_found),
    )
    .route(
        ApiToken(Access::Write),
        "/api/v1/run/close",
        Bytes(REQUEST),
        post(credentials::close_run).fallback(not_found),
    )
    .route(
        ApiToken(Access::Admin),
        "/api/v1/runtime-token",
        Bytes(REQUEST),
        post(credentials::mint).fallback(not_found),
    )
    .route(
        ApiToken(Access::Write),
        "/api/v1/repos/{owner}/{repo}/artifacts",
        None,
        delete(rest::delete_artifacts).fallback(not_found),
    )
    .route(
        ApiToken(Access::Write),
        "/api/v1/repos/{owner}/{repo}/usage",
        None,
        get(rest::usage).fallback(not_found),
    )
    // GitHub's REST API, as far as artifacts go.
    .route(
        ApiToken(Access::Write),
        "/api/v3/repos/{owner}/{repo}/actions/artifacts",
        None,
        get(rest::artifacts).fallback(not_found),
    )
    .route(
        ApiToken(Access::Write),
        "/api/v3/repos/{owner}/{repo}/actions/artifacts/{id}",
        None,
        get(rest::artifact).delete(rest::delete_artifact).fallback(not_found),
    )
    .route(
        ApiToken(Access::Write),
        "/api/v3/repos/{owner}/{repo}/actions/artifacts/{id}/zip",
        None,
        get(rest::zip).fallback(not_found),
    )
    .route(
        ApiToken(Access::Write),
        "/api/v3/repos/{owner}/{repo}/actions/runs",
        None,
        get(rest::runs).fallback(not_found),
    )
    .route(
        ApiToken(Access::Write),
        "/api/v3/repos/{owner}/{repo}/actions/runs/{run_id}",
        None,
        get(rest::run).delete(rest::delete_run).fallback(not_found),
    )
    .route(
        ApiToken(Access::Write),
        "/api/v3/repos/{owner}/{repo}/actions/runs/{run_id}/artifacts",
        None,
        get(rest::run_artifacts).fallback(not_found),
    )
    .route(
        ApiToken(Access::Write),
        "/api/v3/repos/{owner}/{repo}/actions/runs/{run_id}/jobs",
        None,
        get(rest::jobs).fallback(not_found),
    )
    // Bytes, by signed links only.
    .route(
        SignedLink,
        "/blob/{kind}/{id}",
        Streamed { whole: BLOCK_LIST },
        any(blobs::handle),
    )
}

/// The internal listener's URL map: for operators, on an address that the public does not reach.
pub fn internal(operations: Operations) -> Router {
    Router::new()
        .route("/healthz", get(ops::healthz))
        .route("/readyz", get(ops::readyz))
        .route("/metrics", get(ops::metrics))
        .with_state(operations)
}

impl UrlMap {
    /// Twirp methods that are not here, and whatever else another server is to be asked for.
    fn unknown(mut self) -> Self {
        let paths = self
            .context
            .upstream
            .as_ref()
            .map_or(&[][..], Upstream::unknown_paths)
            .to_vec();
        if !paths.iter().any(|path| path == "/twirp/") {
            self = self.route(
                Caller::Anyone,
                "/twirp/{*method}".to_owned(),
                BodyLimit::None,
                any(bad_route),
            );
        }
        for path in paths {
            let handler = any(pass_through::forward);
            self = self.route(
                Caller::Upstream,
                format!("{path}{{*rest}}"),
                BodyLimit::StreamedPacked,
                handler,
            );
        }
        self
    }

    fn route(
        mut self,
        caller: Caller,
        path: impl Into<String>,
        body: BodyLimit,
        handler: MethodRouter<Context>,
    ) -> Self {
        let (context, path) = (self.context.clone(), path.into());
        let is_left = context.upstream.as_ref().is_some_and(|upstream| upstream.takes(&path));
        let (caller, body, handler) = if is_left {
            (Caller::Upstream, BodyLimit::StreamedPacked, any(pass_through::forward))
        } else {
            (caller, body, handler)
        };
        // Each guard goes on to the limit itself, as a layer costs copies of all those below it.
        let guarded = match caller {
            Caller::RuntimeToken => handler.layer(from_fn_with_state((context, body), auth::runtime_token)),
            Caller::ApiToken(access) => handler.layer(from_fn_with_state((context, access, body), auth::api_token)),
            Caller::SignedLink => handler.layer(from_fn_with_state((context, body), auth::signed_link)),
            Caller::Upstream | Caller::Anyone => handler.layer(from_fn_with_state(body, body::limit)),
        };
        let observed = guarded.layer(from_fn_with_state(Route::new(path.as_str()), observe::observe));
        self.router = self.router.route(&path, observed);
        self.routes.push((path, caller, body));
        self
    }

    /// Every route with its declarations, for the tests that walk them.
    pub fn routes(&self) -> &[(String, Caller, BodyLimit)] {
        &self.routes
    }

    /// The service that answers requests.
    pub fn into_router(self) -> Router {
        let unknown = not_found.layer(from_fn_with_state(Route::new("none"), observe::observe));
        self.router.fallback(unknown).with_state(self.context)
    }
}

/// A Twirp method: any HTTP method but POST is a bad route.
fn call(handler: MethodRouter<Context>) -> MethodRouter<Context> {
    handler.fallback(bad_route)
}

async fn bad_route(uri: Uri) -> TwirpError {
    TwirpError::bad_route(format!("no such method: {}", uri.path()))
}

async fn not_found() -> GithubError {
    GithubError::new(StatusCode::NOT_FOUND, "Not Found")
}
