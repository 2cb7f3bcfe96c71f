//! Requests for another server: services that Wharfinger does not have, or that it was told to leave to that one.
//!
//! Called through the URL map in `api/mod.rs`, which declares what is passed on. Bytes stream both ways; nothing is read
//! whole, understood or changed but what belongs to one connection alone. Goes to the one configured origin and nowhere
//! else; redirects are for the client to follow.

use std::io;
use std::path::Path;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONNECTION, HOST};
use axum::http::{HeaderMap, HeaderName};
use axum::response::Response;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use serde::Deserialize;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::patience::Patience;
use super::{Context, body, reply};
use crate::authorities;
use crate::error::{Error, Result};
use crate::papers::parse_public_url;

/// The `[pass_through]` section of the configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The origin of the other server. Empty: nothing is passed on.
    pub upstream: String,
    /// What unknown paths begin with that are passed on, such as `/twirp/`.
    pub unknown_paths: Vec<String>,
    /// Artifacts are the other server's.
    pub artifacts: bool,
    /// The cache is the other server's.
    pub cache: bool,
}

/// What the paths of artifacts and of the cache begin with, whichever the version.
const ARTIFACTS: [&str; 3] = [
    "/twirp/github.actions.results.api.v1.ArtifactService/",
    "/_apis/pipelines/",
    "/_apis/resources/",
];
const CACHE: [&str; 2] = [
    "/twirp/github.actions.results.api.v1.CacheService/",
    "/_apis/artifactcache/",
];
/// Unknown paths below these are nobody else's.
const OWN: [&str; 3] = ["/", "/blob/", "/api/"];

/// Of one connection only (RFC 9110 §7.6.1).
const HOP_BY_HOP: [&str; 7] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "transfer-encoding",
    "upgrade",
];

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the other server may be silent once it has a request. The clients give up after as long.
const REPLY_TIMEOUT: Duration = Duration::from_secs(180);

/// Where requests are passed on to, and which.
#[derive(Clone, Debug)]
pub struct Upstream {
    settings: Settings,
    origin: String,
    http: reqwest::Client,
}

impl Upstream {
    /// `None` if nothing is passed on.
    ///
    /// # Errors
    /// One sentence that names the setting and says what to do.
    pub fn new(settings: &Settings, ca_file: Option<&Path>) -> std::result::Result<Option<Self>, String> {
        if settings.upstream.is_empty() {
            return if settings.artifacts || settings.cache {
                Err("pass_through.artifacts and pass_through.cache need a pass_through.upstream".to_owned())
            } else {
                Ok(None)
            };
        }
        let origin = parse_public_url(&settings.upstream).map_err(|error| format!("pass_through.upstream: {error}"))?;
        for path in &settings.unknown_paths {
            if !path.starts_with('/')
                || !path.ends_with('/')
                || path.contains(['{', '}'])
                || OWN.contains(&path.as_str())
            {
                return Err(format!(
                    "pass_through.unknown_paths: {path:?} must begin and end with a slash and be none of {OWN:?}"
                ));
            }
        }
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .tls_certs_merge(authorities::read(ca_file)?)
            .build()
            .map_err(|error| format!("can't set up HTTPS for pass_through.upstream: {error}"))?;
        Ok(Some(Self {
            settings: settings.clone(),
            origin,
            http,
        }))
    }

    /// Whether a route of ours is left to the other server.
    pub fn takes(&self, route: &str) -> bool {
        let is_of = |prefixes: &[&str]| prefixes.iter().any(|prefix| route.starts_with(prefix));
        self.settings.artifacts && is_of(&ARTIFACTS) || self.settings.cache && is_of(&CACHE)
    }

    /// What unknown paths begin with that go there.
    pub fn unknown_paths(&self) -> &[String] {
        &self.settings.unknown_paths
    }

    async fn forward(&self, request: Request, patience: Patience) -> Result<Response> {
        // Whose it is is for the other server to say; what has no papers at all is nobody's.
        if !request.headers().contains_key(AUTHORIZATION) {
            return Err(Error::Unauthorized("no Authorization header".to_owned()));
        }
        let (head, body) = request.into_parts();
        let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
        // A client of HTTP takes dots and backslashes for steps: nothing may lead out of the paths that are passed on.
        let url = reqwest::Url::parse(&format!("{}{target}", self.origin)).ok();
        let url = url
            .filter(|url| url.path() == head.uri.path())
            .ok_or_else(|| Error::Malformed("the path is not in its plain form".to_owned()))?;
        let mut headers = head.headers;
        strip(&mut headers);
        headers.remove(HOST);
        // The sender goes with the body, when the other server has all of it.
        let (sending, sent) = oneshot::channel::<()>();
        let body = body::chunks(body, patience).inspect(move |_| {
            let _ = &sending;
        });
        let passed = self
            .http
            .request(head.method, url)
            .headers(headers)
            .body(reqwest::Body::wrap_stream(body));
        let unavailable = |error: reqwest::Error| {
            // Without its URL, whose query may be secret.
            tracing::warn!(error = %error.without_url(), upstream = self.origin, "a request could not be passed on");
            silent()
        };
        let reply = tokio::select! {
            reply = passed.send() => reply.map_err(unavailable)?,
            () = async { let _ = sent.await; sleep(REPLY_TIMEOUT).await } => return Err(silent()),
        };
        let mut response = Response::new(Body::empty());
        *response.status_mut() = reply.status();
        *response.headers_mut() = reply.headers().clone();
        strip(response.headers_mut());
        *response.body_mut() = Body::from_stream(in_time(reply.bytes_stream()));
        Ok(response)
    }
}

fn silent() -> Error {
    Error::Busy("the server behind this one does not answer, try again".to_owned())
}

/// A reply's bytes, which must keep coming.
fn in_time(
    bytes: impl Stream<Item = reqwest::Result<Bytes>> + Send + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Box::pin(bytes), |mut bytes| async {
        let next = timeout(REPLY_TIMEOUT, bytes.next()).await;
        let item = match next {
            Ok(item) => item?.map_err(io::Error::other),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        Some((item, bytes))
    })
}

fn strip(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in listed {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Passes a request on.
pub async fn forward(State(context): State<Context>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let Some(upstream) = &context.upstream else {
        return reply::at(&path, Error::NotFound("nothing is passed on".to_owned()));
    };
    match upstream.forward(request, context.patience).await {
        Ok(response) => response,
        Err(error) => reply::at(&path, error),
    }
}
