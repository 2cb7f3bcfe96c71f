//! `Error` in the dialect of whoever asked: Twirp JSON, Azure XML, the JSON below `/_apis`, or GitHub JSON.
//!
//! Handlers return one of the four types and thereby name their dialect. Internal errors are logged here, once,
//! and hidden from the client.

use axum::http::header::{
    CACHE_CONTROL, CONTENT_RANGE, CONTENT_TYPE, REFERRER_POLICY, RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::error::Error;

/// How long a client is asked to wait before it tries again, in seconds.
const RETRY_AFTER_S: &str = "2";
/// No more of a message goes out: it may quote what the client sent, and slow clients keep replies in memory.
const MAX_MESSAGE_BYTES: usize = 1024;
const INTERNAL: &str = "an internal error occurred; the server's log has more";

/// A failure as `{"code", "msg"}`. Source: the Twirp wire protocol, version 7.
///
/// The JavaScript clients parse every body as JSON and retry what they can't parse, so nothing else ever goes out.
#[derive(Debug)]
pub struct TwirpError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl TwirpError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
        }
    }

    /// What Twirp answers for a path, method or content type that it does not serve.
    pub fn bad_route(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "bad_route", message)
    }

    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", message)
    }
}

impl From<Error> for TwirpError {
    fn from(error: Error) -> Self {
        let (status, code) = match &error {
            Error::NotFound(_) | Error::Gone(_) => (StatusCode::NOT_FOUND, "not_found"),
            Error::AlreadyExists(_) => (StatusCode::CONFLICT, "already_exists"),
            Error::Conflict(_) => (StatusCode::CONFLICT, "aborted"),
            Error::Malformed(_) => (StatusCode::BAD_REQUEST, "malformed"),
            Error::Invalid(_) | Error::UnknownBlock(_) | Error::ChecksumMismatch(_) => {
                (StatusCode::BAD_REQUEST, "invalid_argument")
            }
            Error::RangeNotSatisfiable { .. } => (StatusCode::BAD_REQUEST, "out_of_range"),
            Error::FailedPrecondition(_) => (StatusCode::PRECONDITION_FAILED, "failed_precondition"),
            Error::Unsupported(_) => (StatusCode::NOT_IMPLEMENTED, "unimplemented"),
            Error::Unauthorized(_) => (StatusCode::UNAUTHORIZED, "unauthenticated"),
            Error::Forbidden(_) => (StatusCode::FORBIDDEN, "permission_denied"),
            // Twirp has no code for these two. HTTP's statuses say it, and no client tries them again.
            Error::TooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, "malformed"),
            Error::Encoded(_) => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "malformed"),
            // Twirp's 429 would make the clients try again; a full quota is final.
            Error::QuotaExceeded(_) => (StatusCode::FORBIDDEN, "resource_exhausted"),
            Error::Busy(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Error::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        Self::new(status, code, text_for_client(error))
    }
}

impl IntoResponse for TwirpError {
    fn into_response(self) -> Response {
        let body = json!({ "code": self.code, "msg": short(&self.message) }).to_string();
        let mut response = (self.status, [(CONTENT_TYPE, "application/json")], body).into_response();
        hint(&mut response);
        response
    }
}

/// A failure as `<Error><Code/><Message/></Error>` and `x-ms-error-code`.
/// Source: "Status and error codes" of Azure's Blob service REST API.
#[derive(Debug)]
pub struct AzureError {
    status: StatusCode,
    code: &'static str,
    message: String,
    /// For 416: what `Content-Range` says.
    size_bytes: Option<u64>,
}

impl AzureError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            size_bytes: None,
        }
    }

    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }
}

impl From<Error> for AzureError {
    fn from(error: Error) -> Self {
        let (status, code) = match &error {
            Error::NotFound(_) => (StatusCode::NOT_FOUND, "BlobNotFound"),
            Error::Gone(_) => (StatusCode::GONE, "BlobNotFound"),
            Error::AlreadyExists(_) | Error::Conflict(_) => (StatusCode::CONFLICT, "BlobImmutableDueToPolicy"),
            Error::Malformed(_) | Error::Invalid(_) => (StatusCode::BAD_REQUEST, "InvalidInput"),
            Error::UnknownBlock(_) => (StatusCode::BAD_REQUEST, "InvalidBlockList"),
            Error::ChecksumMismatch(_) => (StatusCode::BAD_REQUEST, "Md5Mismatch"),
            Error::RangeNotSatisfiable { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange"),
            Error::FailedPrecondition(_) => (StatusCode::PRECONDITION_FAILED, "ConditionNotMet"),
            Error::Unsupported(_) => (StatusCode::BAD_REQUEST, "UnsupportedHeader"),
            Error::Unauthorized(_) | Error::Forbidden(_) => (StatusCode::FORBIDDEN, "AuthenticationFailed"),
            Error::TooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, "RequestBodyTooLarge"),
            Error::Encoded(_) => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedHeader"),
            Error::QuotaExceeded(_) => (StatusCode::FORBIDDEN, "InsufficientAccountPermissions"),
            Error::Busy(_) => (StatusCode::SERVICE_UNAVAILABLE, "ServerBusy"),
            Error::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        };
        let size_bytes = match error {
            Error::RangeNotSatisfiable { size_bytes } => Some(size_bytes),
            _ => None,
        };
        Self {
            status,
            code,
            message: text_for_client(error),
            size_bytes,
        }
    }
}

impl IntoResponse for AzureError {
    fn into_response(self) -> Response {
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"utf-8\"?><Error><Code>{}</Code><Message>{}</Message></Error>",
            self.code,
            quick_xml::escape::escape(short(&self.message)),
        );
        let mut response = (
            self.status,
            [
                (CONTENT_TYPE.as_str(), "application/xml"),
                ("x-ms-error-code", self.code),
            ],
            body,
        )
            .into_response();
        if let Some(range) = self
            .size_bytes
            .and_then(|size| HeaderValue::try_from(format!("bytes */{size}")).ok())
        {
            response.headers_mut().insert(CONTENT_RANGE, range);
        }
        hint(&mut response);
        response
    }
}

/// A failure as `{"message"}`. Source: GitHub's REST API.
#[derive(Debug)]
pub struct GithubError {
    status: StatusCode,
    message: String,
}

impl GithubError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }
}

impl From<Error> for GithubError {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::NotFound(_) | Error::Gone(_) => StatusCode::NOT_FOUND,
            Error::AlreadyExists(_) | Error::Conflict(_) => StatusCode::CONFLICT,
            Error::Malformed(_) => StatusCode::BAD_REQUEST,
            // GitHub's "Validation Failed".
            Error::Invalid(_) | Error::UnknownBlock(_) | Error::ChecksumMismatch(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Error::FailedPrecondition(_) => StatusCode::PRECONDITION_FAILED,
            Error::RangeNotSatisfiable { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Error::Unsupported(_) => StatusCode::NOT_IMPLEMENTED,
            Error::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Error::Forbidden(_) | Error::QuotaExceeded(_) => StatusCode::FORBIDDEN,
            Error::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Error::Encoded(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Error::Busy(_) => StatusCode::SERVICE_UNAVAILABLE,
            Error::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        // One text for all that is not there, and for all that may not be seen.
        let message = match error {
            Error::NotFound(_) | Error::Gone(_) => "Not Found".to_owned(),
            Error::Unauthorized(_) => {
                text_for_client(error);
                "Bad credentials".to_owned()
            }
            error => text_for_client(error),
        };
        Self::new(status, message)
    }
}

impl IntoResponse for GithubError {
    fn into_response(self) -> Response {
        let body = json!({ "message": short(&self.message) }).to_string();
        let mut response = (self.status, [(CONTENT_TYPE, "application/json")], body).into_response();
        hint(&mut response);
        response
    }
}

/// A failure as `{"message", "typeKey"}`. Source: `@actions/cache` up to 3.x and Go's client read these two.
#[derive(Debug)]
pub struct ApisError {
    status: StatusCode,
    type_key: &'static str,
    message: String,
}

impl From<Error> for ApisError {
    fn from(error: Error) -> Self {
        let (status, type_key) = match &error {
            Error::NotFound(_) | Error::Gone(_) => (StatusCode::NOT_FOUND, "NotFoundException"),
            Error::AlreadyExists(_) => (StatusCode::CONFLICT, "ArtifactCacheItemAlreadyExistsException"),
            Error::Unauthorized(_) => (StatusCode::UNAUTHORIZED, "UnauthorizedException"),
            Error::Forbidden(_) => (StatusCode::FORBIDDEN, "AccessDeniedException"),
            Error::Unsupported(_) => (StatusCode::NOT_IMPLEMENTED, "NotSupportedException"),
            Error::Encoded(_) => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "InvalidRequestException"),
            Error::Busy(_) => (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailableException"),
            Error::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalServerException"),
            // Of these the clients know 400 only, and show its message.
            Error::Conflict(_)
            | Error::Malformed(_)
            | Error::Invalid(_)
            | Error::UnknownBlock(_)
            | Error::ChecksumMismatch(_)
            | Error::FailedPrecondition(_)
            | Error::RangeNotSatisfiable { .. }
            | Error::TooLarge(_)
            | Error::QuotaExceeded(_) => (StatusCode::BAD_REQUEST, "InvalidRequestException"),
        };
        Self {
            status,
            type_key,
            message: text_for_client(error),
        }
    }
}

/// What is wrong with a JSON body.
impl From<TwirpError> for ApisError {
    fn from(error: TwirpError) -> Self {
        Self {
            status: error.status,
            type_key: "InvalidRequestException",
            message: error.message,
        }
    }
}

impl IntoResponse for ApisError {
    fn into_response(self) -> Response {
        let body = json!({ "message": short(&self.message), "typeKey": self.type_key }).to_string();
        let mut response = (self.status, [(CONTENT_TYPE, "application/json")], body).into_response();
        hint(&mut response);
        response
    }
}

/// A failure outside the handlers, in the dialect of the path.
pub fn at(path: &str, error: Error) -> Response {
    if path.starts_with("/blob/") {
        AzureError::from(error).into_response()
    } else if path.starts_with("/_apis/") {
        ApisError::from(error).into_response()
    } else if path.starts_with("/api/") {
        GithubError::from(error).into_response()
    } else {
        TwirpError::from(error).into_response()
    }
}

/// Headers that every reply carries.
pub fn protect(path: &str, headers: &mut HeaderMap) {
    // Whatever a job uploaded, or a message that quotes it, is what it says to be and nothing else.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if path.starts_with("/blob/") {
        // Neither the bytes nor the link that is as good as they are may get into other hands.
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    }
}

fn short(message: &str) -> &str {
    &message[..message.floor_char_boundary(MAX_MESSAGE_BYTES)]
}

/// Logs what only the log may see and returns what the client may.
fn text_for_client(error: Error) -> String {
    match error {
        Error::Internal(cause) => {
            tracing::error!(%cause, "internal error");
            INTERNAL.to_owned()
        }
        Error::Unauthorized(reason) => {
            tracing::info!(%reason, "refused a token");
            "the request has no valid token".to_owned()
        }
        other => other.to_string(),
    }
}

/// Headers that go with a status in every dialect.
fn hint(response: &mut Response) {
    match response.status() {
        StatusCode::UNAUTHORIZED => {
            response
                .headers_mut()
                .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        StatusCode::SERVICE_UNAVAILABLE => {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_S));
        }
        _ => {}
    }
}
