//! The Twirp transport: one JSON object in, one JSON object out.
//!
//! Called by the services' handlers. Reads what protobuf's JSON mapping allows and the real clients send: snake_case
//! or camelCase names, 64-bit numbers as strings or numbers, missing, null and unknown fields.

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::Context;
use super::reply::TwirpError;

/// A request body larger than this is refused.
const MAX_BODY_BYTES: usize = 1024 * 1024;
/// JSON nested deeper than this is refused.
const MAX_DEPTH: usize = 64;

/// A request's message.
pub struct Message<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Context> for Message<T> {
    type Rejection = TwirpError;

    async fn from_request(request: Request, context: &Context) -> Result<Self, TwirpError> {
        check_headers(request.headers())?;
        let reading = to_bytes(request.into_body(), MAX_BODY_BYTES);
        let bytes = tokio::time::timeout(context.patience.left(), reading)
            .await
            .map_err(|_| {
                TwirpError::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "deadline_exceeded",
                    "the body did not come",
                )
            })?
            .map_err(|_| {
                TwirpError::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "malformed",
                    "the body is larger than 1 MiB or broken",
                )
            })?;
        parse(&bytes).map(Message)
    }
}

fn check_headers(headers: &HeaderMap) -> Result<(), TwirpError> {
    if headers.contains_key(CONTENT_ENCODING) {
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return Err(TwirpError::new(
            status,
            "malformed",
            "compressed request bodies are not accepted",
        ));
    }
    let content_type = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let mut parts = content_type.split(';').map(str::trim);
    let json = parts
        .next()
        .is_some_and(|essence| essence.eq_ignore_ascii_case("application/json"));
    let utf8 = parts.all(|part| part.is_empty() || part.to_ascii_lowercase().replace('"', "") == "charset=utf-8");
    if json && utf8 {
        Ok(())
    } else {
        Err(TwirpError::bad_route(format!(
            "unexpected Content-Type: {content_type:?}"
        )))
    }
}

/// Reads a body as JSON.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, TwirpError> {
    let malformed =
        |error: serde_json::Error| TwirpError::malformed(format!("the body is not a message of this method: {error}"));
    let value: Value = serde_json::from_slice(bytes).map_err(malformed)?;
    if depth(&value) > MAX_DEPTH {
        return Err(TwirpError::malformed("the body is nested too deeply"));
    }
    let Value::Object(mut fields) = value else {
        return Err(TwirpError::malformed("the body is not a JSON object"));
    };
    fields.retain(|_, value| !value.is_null());
    T::deserialize(Value::Object(fields)).map_err(malformed)
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or_default(),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or_default(),
        _ => 0,
    }
}

/// Reads an int64 from a number or a decimal string. For `#[serde(deserialize_with)]`.
pub fn int64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Number(number) => number.as_i64(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
    .map(Some)
    .ok_or_else(|| D::Error::custom("not a 64-bit integer"))
}

/// Reads an int32 likewise; missing is 0.
pub fn int32<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i32, D::Error> {
    let number = int64(deserializer)?.unwrap_or_default();
    i32::try_from(number).map_err(|_| D::Error::custom("not a 32-bit integer"))
}

/// Reads a timestamp as milliseconds since the epoch.
pub fn timestamp<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let invalid = || D::Error::custom("not an RFC 3339 timestamp in UTC");
    let time = humantime::parse_rfc3339(&text).map_err(|_| invalid())?;
    let since = time.duration_since(std::time::UNIX_EPOCH).map_err(|_| invalid())?;
    i64::try_from(since.as_millis()).map(Some).map_err(|_| invalid())
}

/// Milliseconds since the epoch as a timestamp with exactly three fraction digits and `Z`: of the others the
/// JavaScript clients refuse some.
pub fn format_timestamp(ms: i64) -> String {
    let since = std::time::Duration::from_millis(u64::try_from(ms).unwrap_or_default());
    humantime::format_rfc3339_millis(std::time::UNIX_EPOCH + since).to_string()
}

/// A good answer.
pub struct Answer<T>(pub T);

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => ([(CONTENT_TYPE, "application/json")], Body::from(body)).into_response(),
            Err(error) => TwirpError::from(crate::error::Error::Internal(format!("an answer is not JSON: {error}")))
                .into_response(),
        }
    }
}
