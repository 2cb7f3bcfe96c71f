//! Runtime tokens: the checks between a `Bearer` text and a `Principal`.
//!
//! Called by `Papers::verify_token`. Does no I/O: `kid` and `iss` only choose among the keys of the issuer table, and
//! no header may bring a key along. Claims are typed here, because JWT libraries took a wrongly typed `exp` for an
//! absent one (CVE-2026-25537); the library computes signatures only.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, crypto};
use serde::de::{self, DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::issuers::{Issuer, Issuers, MINTED_ISSUER, VerifyingKey};
use super::key_sets::KeySet;
use crate::error::{Error, Result};
use crate::model::{CacheScope, Principal, RunKey};

/// Room for an `ac` of full size, escaped and in base64.
const MAX_TOKEN_BYTES: usize = 32 * 1024;
const MAX_HEADER_BYTES: usize = 8 * 1024;
const MAX_AC_BYTES: usize = 8 * 1024;
const MAX_CACHE_SCOPES: usize = 16;
/// How far the clocks of issuer and server may differ.
pub(super) const LEEWAY_MS: i64 = 60_000;
/// The last second of the year 9999: dates that can be turned into milliseconds and added to.
const MAX_DATE_S: i64 = 253_402_300_799;

/// Headers that bring a key along or change what the signature covers (RFC 7515, RFC 7797, RFC 7516).
const FORBIDDEN_HEADERS: [&str; 7] = ["crit", "jku", "jwk", "x5u", "x5c", "b64", "zip"];

/// Whether `text` is `owner/name` in the alphabet of the forges.
pub fn is_repository(text: &str) -> bool {
    let is_part = |part: &str| is_word(part, 100) && part != "." && part != "..";
    text.split_once('/')
        .is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

/// What rows of a repository are kept under of which only the name is known.
pub fn repository_key(name: &str) -> String {
    format!("name:{}", name.to_ascii_lowercase())
}

/// Whether `text` can be one of the two ids in `Actions.Results:<run>:<job>`.
pub fn is_backend_id(text: &str) -> bool {
    is_word(text, 128)
}

fn is_word(text: &str, max_len: usize) -> bool {
    let is_word_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    (1..=max_len).contains(&text.len()) && text.bytes().all(is_word_byte)
}

fn refuse<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::Unauthorized(reason.into()))
}

/// Events that only those cause who may write to the repository, or that nobody causes at all. Their jobs write the
/// caches of branches. Source: GitHub's changelog of 2026-06-26 on read-only cache tokens.
const TRUSTED_EVENTS: [&str; 7] = [
    "push",
    "schedule",
    "workflow_dispatch",
    "repository_dispatch",
    "delete",
    "registry_package",
    "page_build",
];

/// Whether a job of any other event may write a scope: one of its own, which no job of a branch reads.
fn is_its_own(event: &str, scope: &str) -> bool {
    scope.starts_with(match event {
        "release" => "refs/tags/",
        "merge_group" => "refs/heads/gh-readonly-queue/",
        // Also that of a pull request from a fork.
        _ => "refs/pull/",
    })
}

/// The checks stand in the order in which they are made. `minted` is this server itself as an issuer.
/// `untrusted_read_only`: what an outsider's event sets off does not write where trusted jobs read, whatever `ac` says.
/// A token that does not name its event is its issuer's to judge.
pub(super) fn verify(
    issuers: &Issuers,
    minted: &Issuer,
    token: &str,
    untrusted_read_only: bool,
    now_ms: i64,
) -> Result<Verified> {
    let parts = Parts::read(token)?;
    let named = Named::by(issuers, Some(minted), parts.header, parts.claims)?;
    let issuer = named.issuer;
    let keys = issuer.keys(now_ms);
    verify_signature(&keys, &named, parts.signed, parts.signature)?;

    let claims = Claims::read(named.claims)?;
    let dates = claims.dates;
    let expires_at_ms = check_dates(dates, issuer.max_lifetime_ms, now_ms)?;
    if issuer.audience.is_some() && claims.audience != issuer.audience {
        return refuse("the token is for another audience");
    }
    let (run_backend_id, job_backend_id) = backend_ids(&claims.scp)?;
    let mut cache_scopes = claims
        .ac
        .as_deref()
        .map_or(Ok(Vec::new()), |ac| cache_scopes(ac, issuer.write_implies_read))?;
    let untrusted = claims
        .event_name
        .filter(|event| !TRUSTED_EVENTS.contains(&event.as_str()));
    if let Some(event) = untrusted.filter(|_| untrusted_read_only) {
        for scope in &mut cache_scopes {
            scope.write &= is_its_own(&event, &scope.scope);
        }
    }

    let allowed =
        |ids: &Option<Vec<i64>>, id: Option<i64>| ids.as_ref().is_none_or(|ids| id.is_some_and(|id| ids.contains(&id)));
    if !allowed(&issuer.allowed_owner_ids, claims.repository_owner_id) {
        return refuse("the token's owner is not in its issuer's allowed_owner_ids");
    }
    if !allowed(&issuer.allowed_repository_ids, claims.repository_id) {
        return refuse("the token's repository is not in its issuer's allowed_repository_ids");
    }

    let repository_name = claims.repository.or_else(|| issuer.repository.clone());
    let repository = match (claims.repository_id, &repository_name) {
        (Some(id), _) => format!("id:{id}"),
        (None, Some(name)) => repository_key(name),
        (None, None) => String::new(),
    };
    let principal = Principal {
        run: RunKey {
            issuer: issuer.name.clone(),
            repository,
            run_backend_id,
        },
        repository_name,
        run_id: claims.run_id,
        run_attempt: claims.run_attempt,
        job_backend_id,
        cache_scopes,
        // Both dates were found to be dates.
        issued_at_ms: dates.iat_s.or(dates.nbf_s).map(|seconds| seconds * 1000),
        expires_at_ms,
    };
    Ok(Verified {
        iss: named.iss,
        keys,
        dates,
        principal: Arc::new(principal),
    })
}

/// A token that passed every check. Only two of them can end otherwise when it comes again: time goes on, and an issuer
/// changes its keys. Everything else follows from the token's text and the configuration.
#[derive(Debug)]
pub(super) struct Verified {
    iss: Option<String>,
    /// All that its issuer had.
    keys: Arc<[VerifyingKey]>,
    dates: Dates,
    pub principal: Arc<Principal>,
}

impl Verified {
    /// Whether it passes those two once more.
    pub fn still_counts(&self, issuers: &Issuers, minted: &Issuer, now_ms: i64) -> bool {
        issuer_of(issuers, Some(minted), self.iss.as_deref()).is_some_and(|issuer| {
            Arc::ptr_eq(&self.keys, &issuer.keys(now_ms))
                && check_dates(self.dates, issuer.max_lifetime_ms, now_ms).is_ok()
        })
    }
}

/// The key set that a refused token names and that has no such key (yet).
pub(super) fn key_set_to_refresh<'a>(issuers: &'a Issuers, token: &str, now_ms: i64) -> Option<&'a Arc<KeySet>> {
    let parts = Parts::read(token).ok()?;
    let named = Named::by(issuers, None, parts.header, parts.claims).ok()?;
    let set = named.issuer.key_set()?;
    set.lacks(named.kid.as_deref(), now_ms).then_some(set)
}

/// A token taken apart and not believed yet.
struct Parts<'a> {
    header: Object,
    claims: Object,
    signed: &'a str,
    signature: &'a str,
}

impl<'a> Parts<'a> {
    fn read(token: &'a str) -> Result<Self> {
        if token.len() > MAX_TOKEN_BYTES {
            return refuse("the token is too long");
        }
        let segments: Vec<&str> = token.splitn(4, '.').collect();
        let [header, claims, signature] = segments[..] else {
            return refuse("the token has not three segments");
        };
        if header.len() > MAX_HEADER_BYTES {
            return refuse("the token's header is too long");
        }
        if URL_SAFE_NO_PAD.decode(signature).is_err() {
            return refuse("the token's signature is not base64url");
        }
        Ok(Self {
            signed: &token[..header.len() + 1 + claims.len()],
            header: Object::decode(header)?,
            claims: Object::decode(claims)?,
            signature,
        })
    }
}

/// The issuer that an `iss` names.
fn issuer_of<'a>(issuers: &'a Issuers, minted: Option<&'a Issuer>, iss: Option<&str>) -> Option<&'a Issuer> {
    match iss {
        Some(MINTED_ISSUER) => minted,
        iss => issuers.find(iss),
    }
}

/// Whose key a token claims to be signed with. Not believed yet.
struct Named<'a> {
    iss: Option<String>,
    issuer: &'a Issuer,
    algorithm: Algorithm,
    kid: Option<String>,
    /// Without the `iss`.
    claims: Object,
}

impl<'a> Named<'a> {
    fn by(issuers: &'a Issuers, minted: Option<&'a Issuer>, mut header: Object, mut claims: Object) -> Result<Self> {
        let iss: Option<String> = claims.take("iss")?;
        let Some(issuer) = issuer_of(issuers, minted, iss.as_deref()) else {
            return refuse("no issuer is configured for the token's iss");
        };
        let alg: Option<String> = header.take("alg")?;
        let algorithm = alg.and_then(|alg| alg.parse().ok());
        let Some(algorithm) = algorithm.filter(|algorithm| issuer.algorithms().contains(algorithm)) else {
            return refuse("the token's alg is not its issuer's");
        };
        if let Some(name) = FORBIDDEN_HEADERS.into_iter().find(|name| header.0.contains_key(*name)) {
            return refuse(format!("the token has the header {name}"));
        }
        Ok(Self {
            iss,
            issuer,
            algorithm,
            kid: header.take("kid")?,
            claims,
        })
    }
}

fn verify_signature(keys: &[VerifyingKey], named: &Named, signed: &str, signature: &str) -> Result<()> {
    if keys.is_empty() {
        return refuse("the public keys of the token's issuer could not be fetched");
    }
    let mut keys = keys.iter().filter(|key| key.id == named.kid).peekable();
    if keys.peek().is_none() {
        return refuse("the token's kid is not one of its issuer's");
    }
    let mut keys = keys.filter(|key| key.algorithm == named.algorithm).peekable();
    if keys.peek().is_none() {
        return refuse("the token's alg is not its key's");
    }
    if !keys.any(|key| crypto::verify(signature, signed.as_bytes(), &key.key, key.algorithm).unwrap_or(false)) {
        return refuse("the token's signature is wrong");
    }
    Ok(())
}

/// The claims that count, in their only types. `null` is not "absent".
struct Claims {
    dates: Dates,
    audience: Option<String>,
    scp: String,
    ac: Option<String>,
    event_name: Option<String>,
    repository: Option<String>,
    repository_id: Option<i64>,
    repository_owner_id: Option<i64>,
    run_id: Option<i64>,
    run_attempt: i32,
}

#[derive(Clone, Copy, Debug)]
struct Dates {
    exp_s: i64,
    nbf_s: Option<i64>,
    iat_s: Option<i64>,
}

impl Claims {
    fn read(mut claims: Object) -> Result<Self> {
        let (Some(exp_s), Some(scp)) = (claims.take("exp")?, claims.take("scp")?) else {
            return refuse("the token has no exp or no scp");
        };
        let repository: Option<String> = claims.take("repository")?;
        if repository
            .as_deref()
            .is_some_and(|repository| !is_repository(repository))
        {
            return refuse("the claim repository is not owner/name");
        }
        let id = |claim: Option<Id>| claim.map(|Id(id)| id);
        let Ok(run_attempt) = id(claims.take("run_attempt")?).unwrap_or(1).try_into() else {
            return refuse("the claim run_attempt is too large");
        };
        Ok(Self {
            dates: Dates {
                exp_s,
                nbf_s: claims.take("nbf")?,
                iat_s: claims.take("iat")?,
            },
            audience: claims.take("aud")?.map(|Audience(audience)| audience),
            scp,
            ac: claims.take("ac")?,
            event_name: claims.take("event_name")?,
            repository,
            repository_id: id(claims.take("repository_id")?),
            repository_owner_id: id(claims.take("repository_owner_id")?),
            run_id: id(claims.take("run_id")?),
            run_attempt,
        })
    }
}

/// Returns `exp` in milliseconds, without leeway.
fn check_dates(dates: Dates, max_lifetime_ms: i64, now_ms: i64) -> Result<i64> {
    let millis = |name: &str, seconds: i64| match seconds {
        0..=MAX_DATE_S => Ok(seconds * 1000),
        _ => refuse(format!("the claim {name} is no date")),
    };
    let exp_ms = millis("exp", dates.exp_s)?;
    let nbf_ms = dates.nbf_s.map(|nbf| millis("nbf", nbf)).transpose()?;
    let iat_ms = dates.iat_s.map(|iat| millis("iat", iat)).transpose()?;
    if now_ms >= exp_ms + LEEWAY_MS {
        return refuse("the token has expired");
    }
    if nbf_ms.max(iat_ms).is_some_and(|begin_ms| now_ms < begin_ms - LEEWAY_MS) {
        return refuse("the token is not valid yet");
    }
    // Without an `iat` the token could be brand new, from a clock that is ahead of ours.
    if exp_ms - iat_ms.unwrap_or(now_ms + LEEWAY_MS) > max_lifetime_ms {
        return refuse("the token lives longer than its issuer's max_lifetime");
    }
    Ok(exp_ms)
}

/// Finds the ids of run and job in `scp`, as the clients do: scopes divided by spaces, parts by colons.
fn backend_ids(scp: &str) -> Result<(String, String)> {
    let mut results = scp
        .split(' ')
        .filter(|scope| scope.split(':').next() == Some("Actions.Results"));
    let (Some(scope), None) = (results.next(), results.next()) else {
        return refuse("the claim scp has not exactly one Actions.Results");
    };
    let parts: Vec<&str> = scope.split(':').collect();
    match parts[..] {
        [_, run, job] if is_backend_id(run) && is_backend_id(job) => Ok((run.to_owned(), job.to_owned())),
        _ => refuse("the claim scp is not Actions.Results:<run>:<job>"),
    }
}

/// Parses `ac`: JSON in a string, `[{"Scope":"refs/heads/main","Permission":3}]`; bit 1 reads, bit 2 writes.
fn cache_scopes(ac: &str, write_implies_read: bool) -> Result<Vec<CacheScope>> {
    if ac.len() > MAX_AC_BYTES {
        return refuse("the claim ac is too long");
    }
    let Ok(entries) = serde_json::from_str::<Vec<Object>>(ac) else {
        return refuse("the claim ac is not a JSON array of objects");
    };
    if entries.len() > MAX_CACHE_SCOPES {
        return refuse("the claim ac has too many scopes");
    }
    let parse = |mut entry: Object| {
        let (Some(scope), Some(permission)) = (entry.take::<String>("Scope")?, entry.take("Permission")?) else {
            return refuse("a scope in ac lacks Scope or Permission");
        };
        if scope.contains(char::is_control) {
            return refuse("a scope in ac has a control character");
        }
        let (read, write) = match permission {
            0 => (false, false),
            1 => (true, false),
            2 => (write_implies_read, true),
            3 => (true, true),
            _ => return refuse("a scope in ac has an unknown Permission"),
        };
        Ok(CacheScope { scope, read, write })
    };
    entries.into_iter().map(parse).collect()
}

/// A JSON object that names nothing twice: two parsers would disagree about which one counts.
struct Object(Map<String, Value>);

impl Object {
    fn decode(segment: &str) -> Result<Self> {
        let json = URL_SAFE_NO_PAD.decode(segment).ok();
        match json.and_then(|json| serde_json::from_slice(&json).ok()) {
            Some(object) => Ok(object),
            None => refuse("a segment of the token is not a JSON object in base64url"),
        }
    }

    fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        match self.0.remove(name).map(serde_json::from_value).transpose() {
            Ok(value) => Ok(value),
            Err(_) => refuse(format!("{name} has the wrong type")),
        }
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct ObjectVisitor;

        impl<'de> Visitor<'de> for ObjectVisitor {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> std::result::Result<Object, A::Error> {
                let mut object = Map::new();
                while let Some((name, value)) = entries.next_entry::<String, Value>()? {
                    if object.insert(name, value).is_some() {
                        return Err(de::Error::custom("a name stands twice"));
                    }
                }
                Ok(Object(object))
            }
        }

        deserializer.deserialize_map(ObjectVisitor)
    }
}

/// A positive number, as JSON number or in decimal digits: GitHub's own tokens have both.
#[derive(Deserialize)]
#[serde(try_from = "NumberOrText")]
struct Id(i64);

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(i64),
    Text(String),
}

impl TryFrom<NumberOrText> for Id {
    type Error = &'static str;

    fn try_from(value: NumberOrText) -> std::result::Result<Self, Self::Error> {
        let id = match value {
            NumberOrText::Number(id) => Some(id),
            NumberOrText::Text(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().ok(),
            NumberOrText::Text(_) => None,
        };
        id.filter(|id| *id > 0).map(Self).ok_or("not a positive number")
    }
}

/// The one audience of a token. An array of one is the same: JWT libraries of Go write it by default.
/// An array of more is refused even where no audience is asked for, as such a token is good elsewhere too.
#[derive(Deserialize)]
#[serde(from = "StringOrArrayOfOne")]
struct Audience(String);

#[derive(Deserialize)]
#[serde(untagged)]
enum StringOrArrayOfOne {
    String(String),
    Array([String; 1]),
}

impl From<StringOrArrayOfOne> for Audience {
    fn from(audience: StringOrArrayOfOne) -> Self {
        match audience {
            StringOrArrayOfOne::String(audience) | StringOrArrayOfOne::Array([audience]) => Self(audience),
        }
    }
}

#[cfg(test)]
mod tests;
