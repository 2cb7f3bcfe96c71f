//! Who is calling: the guards in front of the routes, one for each kind of caller.
//!
//! `api/mod.rs` puts one before every route by its declaration. They verify papers and hand on what was proven, past the
//! limit of the route's body. Only what an API token may do is looked up; the papers of jobs are checked without the
//! database.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Context;
use super::body::{self, BodyLimit};
use super::reply::{self, AzureError, GithubError};
use crate::error::{Error, Result};
use crate::model::{Access, ApiToken, Principal};
use crate::papers::{ApiTokenText, Link, Permission};

/// Lets a request with a good runtime token through, with its `Principal`.
pub async fn runtime_token(
    State((context, limit)): State<(Context, BodyLimit)>,
    mut request: Request,
    next: Next,
) -> Response {
    match principal(&context, request.headers()).await {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            body::limit(State(limit), request, next).await
        }
        Err(error) => reply::at(request.uri().path(), error),
    }
}

async fn principal(context: &Context, headers: &HeaderMap) -> Result<Arc<Principal>> {
    let token = match authorization(headers)? {
        (scheme, token) if scheme.eq_ignore_ascii_case("bearer") => token,
        _ => return Err(missing("not a bearer token")),
    };
    if ApiTokenText::is_claimed_by(token) {
        return Err(Error::Forbidden("API tokens are not for jobs".to_owned()));
    }
    let services = &context.services;
    services.papers.authenticate(token, services.clock.now_ms()).await
}

/// Lets a request with a good API token through, with the [`ApiToken`]. To read takes any; everything else takes
/// one with `access`.
pub async fn api_token(
    State((context, access, limit)): State<(Context, Access, BodyLimit)>,
    mut request: Request,
    next: Next,
) -> Response {
    let reads = [Method::GET, Method::HEAD].contains(request.method());
    let needed = if reads { Access::Read } else { access };
    match known_token(&context, request.headers()).await {
        Ok(token) if token.access >= needed => {
            request.extensions_mut().insert(token);
            body::limit(State(limit), request, next).await
        }
        Ok(_) => {
            let needed = needed.as_str();
            let why = format!("the API token has not the access that this takes: {needed}");
            GithubError::from(Error::Forbidden(why)).into_response()
        }
        Err(error) => GithubError::from(error).into_response(),
    }
}

async fn known_token(context: &Context, headers: &HeaderMap) -> Result<ApiToken> {
    let services = &context.services;
    let (scheme, text) = authorization(headers)?;
    // GitHub's own tools say `token`.
    if !["bearer", "token"]
        .into_iter()
        .any(|known| scheme.eq_ignore_ascii_case(known))
    {
        return Err(missing("neither a bearer token nor a token"));
    }
    if ApiTokenText::is_claimed_by(text) {
        return services.verify_api_token(text).await;
    }
    services.papers.authenticate(text, services.clock.now_ms()).await?;
    Err(Error::Forbidden(
        "this takes an API token; a job's token does not do".to_owned(),
    ))
}

/// Scheme and text of the one `Authorization` header. Two headers are nobody's.
fn authorization(headers: &HeaderMap) -> Result<(&str, &str)> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next().ok_or_else(|| missing("no Authorization header"))?;
    if values.next().is_some() {
        return Err(missing("two Authorization headers"));
    }
    let (scheme, token) = value
        .to_str()
        .ok()
        .and_then(|value| value.split_once(' '))
        .ok_or_else(|| missing("no bearer token"))?;
    Ok((scheme, token.trim()))
}

fn missing(reason: &str) -> Error {
    Error::Unauthorized(reason.to_owned())
}

/// Lets a request with a good link through, if the link allows the method, with the `Link`.
pub async fn signed_link(
    State((context, limit)): State<(Context, BodyLimit)>,
    mut request: Request,
    next: Next,
) -> Response {
    match link(&context, &request) {
        Ok(link) => {
            request.extensions_mut().insert(link);
            body::limit(State(limit), request, next).await
        }
        Err(error) => error.into_response(),
    }
}

fn link(context: &Context, request: &Request) -> std::result::Result<Link, AzureError> {
    let services = &context.services;
    let mut segments = request.uri().path().trim_start_matches("/blob/").splitn(2, '/');
    let (kind, id) = (segments.next().unwrap_or_default(), segments.next().unwrap_or_default());
    let query = request.uri().query().unwrap_or_default();
    let link = services.papers.verify_link(kind, id, query, services.clock.now_ms())?;
    let needed = match *request.method() {
        Method::PUT => Permission::Write,
        Method::GET | Method::HEAD => Permission::Read,
        _ => {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            return Err(AzureError::new(
                status,
                "UnsupportedHttpVerb",
                "the resource takes PUT, GET and HEAD only",
            ));
        }
    };
    if link.permission == needed {
        Ok(link)
    } else {
        let message = "the link does not allow this method";
        Err(AzureError::new(
            StatusCode::FORBIDDEN,
            "AuthorizationPermissionMismatch",
            message,
        ))
    }
}
