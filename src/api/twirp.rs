//! The Twirp transport: one message in, one message out, in JSON, or in protobuf where a service has both.
//!
//! Called by the services' handlers. Reads what protobuf's JSON mapping allows and the real clients send: snake_case
//! or camelCase names, 64-bit numbers as strings or numbers, missing, null and unknown fields. Errors are always JSON.

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::reply::TwirpError;
use super::{Context, body};
use crate::clock;
use crate::error::Error;
use crate::service::Services;

/// JSON nested deeper than this is refused.
const MAX_DEPTH: usize = 64;

/// A request's message.
pub struct Message<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Context> for Message<T> {
    type Rejection = TwirpError;

    async fn from_request(request: Request, context: &Context) -> Result<Self, TwirpError> {
        read_json(request, context).await.map(Message)
    }
}

/// Reads a request's JSON. What is wrong with it can be said in another dialect as well.
pub async fn read_json<T: DeserializeOwned, E: From<TwirpError> + From<Error>>(
    request: Request,
    context: &Context,
) -> Result<T, E> {
    match encoding(request.headers())? {
        Encoding::Json => Ok(parse(&body::whole(context, request).await?)?),
        Encoding::Protobuf => Err(TwirpError::bad_route("the service speaks JSON only").into()),
    }
}

/// How a message travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Json,
    Protobuf,
}

impl Encoding {
    fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Protobuf => "application/protobuf",
        }
    }
}

/// A message of a service that has both encodings: the answer comes in that of the request.
pub struct Encoded<T> {
    encoding: Encoding,
    pub message: T,
}

impl<T> Encoded<T> {
    /// The answer to this request.
    pub fn answer<A>(&self, message: A) -> Encoded<A> {
        Encoded {
            encoding: self.encoding,
            message,
        }
    }
}

impl<T: DeserializeOwned + prost::Message + Default> FromRequest<Context> for Encoded<T> {
    type Rejection = TwirpError;

    async fn from_request(request: Request, context: &Context) -> Result<Self, TwirpError> {
        let encoding = encoding(request.headers())?;
        let bytes = body::whole(context, request).await?;
        let message = match encoding {
            Encoding::Json => parse(&bytes)?,
            Encoding::Protobuf => T::decode(bytes)
                .map_err(|error| TwirpError::malformed(format!("the body is not a message of this method: {error}")))?,
        };
        Ok(Self { encoding, message })
    }
}

impl<T: Serialize + prost::Message> IntoResponse for Encoded<T> {
    fn into_response(self) -> Response {
        match self.encoding {
            Encoding::Json => Answer(self.message).into_response(),
            encoding @ Encoding::Protobuf => (
                [(CONTENT_TYPE, encoding.content_type())],
                Body::from(self.message.encode_to_vec()),
            )
                .into_response(),
        }
    }
}

fn encoding(headers: &HeaderMap) -> Result<Encoding, TwirpError> {
    let content_type = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let mut parts = content_type.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default();
    let utf8 = parts.all(|part| part.is_empty() || part.to_ascii_lowercase().replace('"', "") == "charset=utf-8");
    [Encoding::Json, Encoding::Protobuf]
        .into_iter()
        .find(|encoding| utf8 && essence.eq_ignore_ascii_case(encoding.content_type()))
        .ok_or_else(|| TwirpError::bad_route(format!("unexpected Content-Type: {content_type:?}")))
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

/// As [`int64`]; missing is 0.
pub fn int64_or_0<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    Ok(int64(deserializer)?.unwrap_or_default())
}

/// Writes an int64 as a string, as protobuf's JSON mapping wants it. For `#[serde(serialize_with)]`.
pub fn as_text<S: Serializer>(number: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(number)
}

/// Reads an int32 likewise; missing is 0.
pub fn int32<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i32, D::Error> {
    let number = int64_or_0(deserializer)?;
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
    humantime::format_rfc3339_millis(clock::writable(ms)).to_string()
}

/// A good answer that may be large.
pub async fn large_answer<T: Serialize>(services: &Services, answer: &T) -> Result<Response, Error> {
    let body = serde_json::to_vec(answer).map_err(not_json)?;
    let body = Body::from(services.hold(body).await?);
    Ok(([(CONTENT_TYPE, Encoding::Json.content_type())], body).into_response())
}

fn not_json(error: serde_json::Error) -> Error {
    Error::Internal(format!("an answer is not JSON: {error}"))
}

/// A good answer.
pub struct Answer<T>(pub T);

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => ([(CONTENT_TYPE, Encoding::Json.content_type())], Body::from(body)).into_response(),
            Err(error) => TwirpError::from(not_json(error)).into_response(),
        }
    }
}
