//! Key sets: the public keys of issuers that sign with private ones, as JWK sets (RFC 7517) at a URL or in a file.
//!
//! Made by the issuer table, asked for keys by `tokens`, refreshed by `Papers`. Asks the configured URL only, at most once
//! a minute whatever tokens come; never follows a redirect, takes no symmetric key, and no key serves two algorithms.

use std::fs::File;
use std::io::Read as _;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http::StatusCode;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind};
use reqwest::{Client, Url};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::Mutex;

use super::issuers::VerifyingKey;
use crate::authorities;

/// How often a set is refreshed in the background.
pub(super) const EVERY_MS: i64 = 5 * 60_000;
/// And how often at most when tokens name keys that are not in it.
pub(super) const ON_DEMAND_EVERY_MS: i64 = 60_000;
/// How often the background looks whether one is due.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How long fetched keys count without being fetched again.
const GOOD_FOR_MS: i64 = 24 * 60 * 60_000;
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// GitHub's own set has a few KiB.
const MAX_BYTES: usize = 1024 * 1024;
/// Modulus sizes in bits; the library verifies with none larger.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// The public keys of one issuer.
#[derive(Debug)]
pub(super) struct KeySet {
    issuer: String,
    source: Source,
    loaded: RwLock<Option<Loaded>>,
    /// Held while the source is asked, so that one asks for all.
    attempt: Mutex<Attempt>,
}

#[derive(Clone, Debug)]
enum Source {
    Url(Url),
    File(PathBuf),
}

#[derive(Debug)]
struct Loaded {
    text: Vec<u8>,
    keys: Arc<[VerifyingKey]>,
    at_ms: i64,
}

/// The last time that the source was asked.
#[derive(Debug, Default)]
struct Attempt {
    at_ms: Option<i64>,
    failure: Option<String>,
}

impl KeySet {
    /// A set that is fetched later: its issuer may be away while this server starts.
    pub fn at_url(issuer: &str, url: &str) -> Result<Self, String> {
        Ok(Self::new(issuer, Source::Url(parse_url(url)?), None))
    }

    pub fn in_file(issuer: &str, path: &Path) -> Result<Self, String> {
        let text = read(path)?;
        let keys = parse(issuer, &text).map_err(|why| format!("can't use the jwks_file {}: {why}", path.display()))?;
        let loaded = Loaded { text, keys, at_ms: 0 };
        Ok(Self::new(issuer, Source::File(path.to_owned()), Some(loaded)))
    }

    fn new(issuer: &str, source: Source, loaded: Option<Loaded>) -> Self {
        Self {
            issuer: issuer.to_owned(),
            source,
            loaded: RwLock::new(loaded),
            attempt: Mutex::default(),
        }
    }

    pub fn is_fetched(&self) -> bool {
        matches!(self.source, Source::Url(_))
    }

    /// The keys that count now: none, if the issuer could not be asked for too long.
    pub fn keys(&self, now_ms: i64) -> Arc<[VerifyingKey]> {
        match &*self.loaded.read().unwrap_or_else(PoisonError::into_inner) {
            Some(loaded) if !self.is_fetched() || now_ms - loaded.at_ms < GOOD_FOR_MS => Arc::clone(&loaded.keys),
            _ => Arc::default(),
        }
    }

    /// Whether asking the issuer may bring the key that a token names. Files are read in the background only.
    pub fn lacks(&self, kid: Option<&str>, now_ms: i64) -> bool {
        self.is_fetched() && !self.keys(now_ms).iter().any(|key| key.id.as_deref() == kid)
    }

    /// Fetches or reads the set, if that was not tried in the last `every_ms`, or waits for the fetch under way.
    pub async fn refresh(self: &Arc<Self>, http: Option<&Client>, every_ms: i64, now_ms: i64) {
        let (set, http) = (Arc::clone(self), http.cloned());
        // In a task of its own: a caller that goes away would take the fetch along, and it would count as tried.
        let refreshing = tokio::spawn(async move {
            let mut attempt = set.attempt.lock().await;
            // Who waited may come with a time from before the attempt.
            if attempt.at_ms.is_some_and(|at_ms| (now_ms - at_ms).abs() < every_ms) {
                return;
            }
            attempt.at_ms = Some(now_ms);
            let outcome = set.load(http.as_ref(), now_ms).await;
            set.tell(&mut attempt, outcome.err());
        });
        // It fails only with the whole runtime.
        refreshing.await.ok();
    }

    async fn load(&self, http: Option<&Client>, now_ms: i64) -> Result<(), String> {
        let text = match (self.source.clone(), http) {
            (Source::Url(url), Some(http)) => fetch(http, url).await?,
            (Source::Url(_), None) => return Ok(()),
            (Source::File(path), _) => tokio::task::spawn_blocking(move || read(&path))
                .await
                .map_err(|error| error.to_string())??,
        };
        let mut loaded = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        match &mut *loaded {
            // The usual case. What was said of keys that can't be used is not said again.
            Some(loaded) if loaded.text == text => loaded.at_ms = now_ms,
            _ => {
                let keys = parse(&self.issuer, &text)?;
                tracing::info!(
                    issuer = self.issuer,
                    keys = keys.len(),
                    "the issuer has new public keys"
                );
                *loaded = Some(Loaded {
                    text,
                    keys,
                    at_ms: now_ms,
                });
            }
        }
        Ok(())
    }

    /// Says in the log when failing begins, changes its reason and ends.
    fn tell(&self, attempt: &mut Attempt, failure: Option<String>) {
        if failure.is_some() {
            metrics::counter!("wharfinger_key_set_failures_total").increment(1);
        }
        match &failure {
            Some(why) if attempt.failure != failure => tracing::warn!(
                issuer = self.issuer,
                why,
                "the issuer's public keys could not be refreshed; those from before count on, if there are any"
            ),
            None if attempt.failure.is_some() => {
                tracing::info!(issuer = self.issuer, "the issuer's public keys are fresh again");
            }
            _ => {}
        }
        attempt.failure = failure;
    }
}

/// What asks issuers for their sets. Proxies come from the environment, as everywhere.
pub(super) fn client(ca_file: Option<&Path>) -> Result<Client, String> {
    Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(FETCH_TIMEOUT)
        // Minutes pass between two requests.
        .pool_max_idle_per_host(0)
        .tls_certs_merge(authorities::read(ca_file)?)
        .build()
        .map_err(|error| format!("can't set up HTTPS for the issuers' `jwks_url`: {error:?}"))
}

fn parse_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("its `jwks_url` is not a URL: {error}"))?;
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let is_loopback = host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
    if url.scheme() != "https" && !(url.scheme() == "http" && is_loopback) {
        return Err("its `jwks_url` must begin with https://, or with http:// and a loopback address".into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("its `jwks_url` must have no user name in it: public keys are for everybody".into());
    }
    Ok(url)
}

async fn fetch(http: &Client, url: Url) -> Result<Vec<u8>, String> {
    let explain = |error: reqwest::Error| format!("{:#}", anyhow::Error::new(error));
    let mut reply = http.get(url).send().await.map_err(explain)?;
    if reply.status() != StatusCode::OK {
        return Err(format!("the issuer answered {}", reply.status()));
    }
    let mut text = Vec::new();
    while let Some(chunk) = reply.chunk().await.map_err(explain)? {
        if text.len() + chunk.len() > MAX_BYTES {
            return Err("the set is larger than 1 MiB".into());
        }
        text.extend_from_slice(&chunk);
    }
    Ok(text)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let name = path.display();
    let unreadable = |error| format!("can't read the jwks_file {name}: {error}");
    let file = File::open(path).map_err(unreadable)?;
    if file.metadata().map_err(unreadable)?.mode() & 0o002 != 0 {
        return Err(format!(
            "everybody on this machine may write to the jwks_file {name}: chmod o-w {name}"
        ));
    }
    let mut text = Vec::new();
    file.take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut text)
        .map_err(unreadable)?;
    if text.len() > MAX_BYTES {
        return Err(format!("the jwks_file {name} is larger than 1 MiB"));
    }
    Ok(text)
}

/// The keys of a set that can be used, of which there must be one.
pub(super) fn parse(issuer: &str, text: &[u8]) -> Result<Arc<[VerifyingKey]>, String> {
    /// Each key is read by itself, so that one that can't be does not hide the others.
    #[derive(Deserialize)]
    struct JwkSet {
        keys: Vec<Value>,
    }

    let Ok(JwkSet { keys }) = serde_json::from_slice(text) else {
        return Err("it is not a JWK set, a JSON object with `keys`".into());
    };
    let (mut usable, mut left_out) = (Vec::new(), Vec::new());
    for key in keys {
        let kid = key["kid"].as_str().map(str::to_owned);
        match verifying_key(key) {
            Ok(key) => usable.push(key),
            Err(why) => left_out.push((kid, why)),
        }
    }
    if usable.is_empty() {
        let why = left_out.first().map_or("it is empty", |(_, why)| why);
        return Err(format!(
            "it has no key that can be used, RSA from 2048 bits, EC P-256 or Ed25519, for signatures ({why})"
        ));
    }
    for (kid, why) in left_out {
        tracing::warn!(issuer, kid, why, "a public key of the issuer is left out");
    }
    Ok(usable.into())
}

/// Type and curve alone say what a key verifies, so that no token can choose.
fn verifying_key(key: Value) -> Result<VerifyingKey, &'static str> {
    let jwk: Jwk = serde_json::from_value(key).map_err(|_| "it is not a JWK")?;
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => Algorithm::EdDSA,
        _ => return Err("it is not RSA, EC P-256 or Ed25519"),
    };
    if jwk.common.key_algorithm.is_some_and(|own| own != algorithm.into()) {
        return Err("its alg is not RS256, ES256 or EdDSA, as is its type's");
    }
    let (purpose, operations) = (&jwk.common.public_key_use, &jwk.common.key_operations);
    let for_signatures = purpose.as_ref().is_none_or(|own| *own == PublicKeyUse::Signature);
    let may_verify = operations
        .as_ref()
        .is_none_or(|own| own.contains(&KeyOperations::Verify));
    if !for_signatures || !may_verify {
        return Err("it is not for signatures");
    }
    let key = DecodingKey::from_jwk(&jwk).map_err(|_| "its numbers are not base64url")?;
    let has_its_size = match (key.kind(), algorithm) {
        (DecodingKeyKind::RsaModulusExponent { n, .. }, _) => RSA_BITS.contains(&bits(n)),
        // Two coordinates behind one byte that says so.
        (DecodingKeyKind::SecretOrDer(point), Algorithm::ES256) => point.len() == 65,
        (DecodingKeyKind::SecretOrDer(point), _) => point.len() == 32,
    };
    if !has_its_size {
        return Err("it is too short or too long");
    }
    Ok(VerifyingKey {
        id: jwk.common.key_id,
        algorithm,
        key,
    })
}

fn bits(number: &[u8]) -> usize {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let digits = &number[zeros..];
    digits
        .first()
        .map_or(0, |first| digits.len() * 8 - first.leading_zeros() as usize)
}

#[cfg(test)]
mod tests;
