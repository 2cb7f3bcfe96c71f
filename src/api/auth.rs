//! Who is calling: the guards in front of the routes, one for each kind of caller.
//!
//! `api/mod.rs` puts one before every route by its declaration. They verify papers and hand on what was proven;
//! they read no database.

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Context;
use super::reply::{self, AzureError};
use crate::error::{Error, Result};
use crate::papers::{Link, Permission};

/// Lets a request with a good runtime token through, with its `Principal`.
pub async fn runtime_token(State(context): State<Context>, mut request: Request, next: Next) -> Response {
    let services = &context.services;
    let principal = match bearer(request.headers()) {
        Ok(token) => services.papers.authenticate(token, services.clock.now_ms()).await,
        Err(error) => Err(error),
    };
    match principal {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            next.run(request).await
        }
        Err(error) => reply::at(request.uri().path(), error),
    }
}

/// The token of the one `Authorization: Bearer` header. Two headers are nobody's.
fn bearer(headers: &HeaderMap) -> Result<&str> {
    let missing = |reason: &str| Error::Unauthorized(reason.to_owned());
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
    if scheme.eq_ignore_ascii_case("bearer") {
        Ok(token.trim())
    } else {
        Err(missing("not a bearer token"))
    }
}

/// Lets a request with a good link through, if the link allows the method, with the `Link`.
pub async fn signed_link(State(context): State<Context>, mut request: Request, next: Next) -> Response {
    match link(&context, &request) {
        Ok(link) => {
            request.extensions_mut().insert(link);
            next.run(request).await
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
