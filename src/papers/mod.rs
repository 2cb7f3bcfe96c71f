//! Who may do what: runtime tokens, minting and signed links.
//!
//! Built by `app`, called by `api` (tokens, links, minting), `service` (links) and `cli` (minting).
//! Knows no HTTP framework, no SQL and no storage. What it keeps in memory (which keys there are, which runs are closed)
//! is handed in by `service/credentials.rs` and the same on every replica: what one signs, every other one with the same
//! root secret verifies. Never prints a secret, a token or a signature.

mod api_tokens;
mod closed_runs;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod issuers;
mod key_sets;
mod keys;
mod known_tokens;
mod links;
mod mint;
mod secret;
mod tokens;

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use futures_util::future::join_all;
use http::Uri;

use crate::clock::Clock;
use crate::error;
use crate::model::{BlobId, BlobKind, ClosedRun, Principal, SigningKey};

pub use api_tokens::ApiTokenText;
pub use issuers::{IssuerKind, IssuerSettings, MINTED_ISSUER, MINTED_MAX_LIFETIME};
pub use links::{Link, Param, Permission};
pub use mint::MintRequest;
pub use secret::RootSecret;
pub use tokens::{is_backend_id, is_repository, repository_key};

/// Everything that is needed to check papers and to write them.
#[derive(Debug)]
pub struct Papers {
    issuers: issuers::Issuers,
    root_secret: RootSecret,
    signing: RwLock<Arc<Signing>>,
    closed_runs: RwLock<closed_runs::ClosedRuns>,
    known_tokens: known_tokens::KnownTokens,
    public_url: String,
    untrusted_events_readonly: bool,
    /// Asks issuers for their key sets, if any has one at a URL.
    http: Option<reqwest::Client>,
}

/// The keys of this server itself.
#[derive(Debug)]
struct Signing {
    ring: keys::KeyRing,
    /// This server as an issuer.
    minted: issuers::Issuer,
}

impl Signing {
    fn new(ring: keys::KeyRing) -> Result<Self, String> {
        let minted = issuers::Issuer::minted(&ring)?;
        Ok(Self { ring, minted })
    }
}

impl Papers {
    /// Reads the issuers' secret files and derives the first signing key; [`Papers::use_keys`] brings others.
    ///
    /// # Errors
    /// One sentence for whoever configured it, saying what to change. It never quotes a secret.
    pub fn new(issuers: &[IssuerSettings], root_secret: &RootSecret, public_url: &str) -> Result<Self, String> {
        let ring = keys::KeyRing::new(root_secret, &[SigningKey::first()], 0)?;
        Ok(Self {
            issuers: issuers::Issuers::new(issuers)?,
            root_secret: root_secret.clone(),
            signing: RwLock::new(Arc::new(Signing::new(ring)?)),
            closed_runs: RwLock::default(),
            known_tokens: known_tokens::KnownTokens::default(),
            public_url: parse_public_url(public_url)?,
            untrusted_events_readonly: true,
            http: None,
        })
    }

    /// Lets key sets be fetched, which they are not without this. `ca_file`: a PEM bundle of further authorities that
    /// may vouch for an issuer's server.
    ///
    /// # Errors
    /// One sentence for whoever configured it.
    pub fn fetching_key_sets(self, ca_file: Option<&Path>) -> Result<Self, String> {
        let wanted = self.issuers.key_sets().any(|set| set.is_fetched());
        let http = wanted.then(|| key_sets::client(ca_file)).transpose()?;
        Ok(Self { http, ..self })
    }

    /// Whether jobs that outsiders can set off only read the caches of branches. They do unless this says otherwise.
    #[must_use]
    pub fn untrusted_events_readonly(self, readonly: bool) -> Self {
        Self {
            untrusted_events_readonly: readonly,
            ..self
        }
    }

    /// Signs and verifies from now on with these keys, as far as they are not retired.
    ///
    /// # Errors
    /// If none of them signs by now. The keys that were used stay in use then.
    pub fn use_keys(&self, keys: &[SigningKey], now_ms: i64) -> Result<(), String> {
        let ring = keys::KeyRing::new(&self.root_secret, keys, now_ms)?;
        if !self.signing().ring.is_like(&ring) {
            let signing = Arc::new(Signing::new(ring)?);
            *self.signing.write().unwrap_or_else(PoisonError::into_inner) = signing;
        }
        Ok(())
    }

    fn signing(&self) -> Arc<Signing> {
        Arc::clone(&self.signing.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Refuses from now on the tokens of these runs, besides those of runs that were closed before.
    pub fn close_runs(&self, closed: impl IntoIterator<Item = ClosedRun>, now_ms: i64) {
        let mut runs = self.closed_runs.write().unwrap_or_else(PoisonError::into_inner);
        runs.add(closed);
        runs.forget(now_ms - self.closed_runs_count_for_ms());
    }

    /// When the last of the closed runs that are known was closed.
    pub fn closed_runs_known_until_ms(&self) -> i64 {
        let runs = self.closed_runs.read().unwrap_or_else(PoisonError::into_inner);
        runs.known_until_ms()
    }

    /// How long it matters that a run was closed: as long as a token may live, however far clocks may be apart.
    pub fn closed_runs_count_for_ms(&self) -> i64 {
        tokens::LEEWAY_MS * 2
            + self
                .issuers
                .max_lifetime_ms()
                .max(self.signing().minted.max_lifetime_ms)
    }

    /// The origin that clients reach this server by, without a slash at its end.
    pub fn public_url(&self) -> &str {
        &self.public_url
    }

    /// Checks a runtime token, the text behind `Bearer `, and says who is calling.
    ///
    /// # Errors
    /// [`Error::Unauthorized`](crate::error::Error::Unauthorized), whatever is wrong; its reason is for the log only.
    pub fn verify_token(&self, bearer: &str, now_ms: i64) -> error::Result<Arc<Principal>> {
        let minted = &self.signing().minted;
        let known = self.known_tokens.find(bearer);
        let verified = match known.filter(|known| known.still_counts(&self.issuers, minted, now_ms)) {
            Some(verified) => verified,
            None => {
                let read_only = self.untrusted_events_readonly;
                let verified = Arc::new(tokens::verify(&self.issuers, minted, bearer, read_only, now_ms)?);
                self.known_tokens.add(bearer, Arc::clone(&verified));
                verified
            }
        };
        let closed_runs = self.closed_runs.read().unwrap_or_else(PoisonError::into_inner);
        if closed_runs.include(&verified.principal) {
            return Err(error::Error::Unauthorized(
                "the token's run or job was closed".to_owned(),
            ));
        }
        Ok(Arc::clone(&verified.principal))
    }

    /// As [`Papers::verify_token`]; a token of a key that is not known yet makes its issuer be asked for new keys.
    ///
    /// # Errors
    /// The same.
    pub async fn authenticate(&self, bearer: &str, now_ms: i64) -> error::Result<Arc<Principal>> {
        let refused = match self.verify_token(bearer, now_ms) {
            Ok(principal) => return Ok(principal),
            Err(refused) => refused,
        };
        let set = tokens::key_set_to_refresh(&self.issuers, bearer, now_ms);
        let (Some(set), Some(http)) = (set, &self.http) else {
            return Err(refused);
        };
        set.refresh(Some(http), key_sets::ON_DEMAND_EVERY_MS, now_ms).await;
        self.verify_token(bearer, now_ms)
    }

    /// Fetches key sets, or reads them again, that nobody has looked at for a while.
    pub async fn refresh_key_sets(&self, now_ms: i64) {
        let refresh = |set| key_sets::KeySet::refresh(set, self.http.as_ref(), key_sets::EVERY_MS, now_ms);
        join_all(self.issuers.key_sets().map(refresh)).await;
    }

    /// Keeps key sets fresh, for ever.
    pub async fn refresh_key_sets_in_background(&self, clock: &Clock) {
        loop {
            self.refresh_key_sets(clock.now_ms()).await;
            tokio::time::sleep(key_sets::LOOK_EVERY).await;
        }
    }

    /// Writes a runtime token that [`Papers::verify_token`] accepts, of any replica with the same root secret.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::error::Error::Invalid) if the request asks for what no token may say.
    pub fn mint(&self, request: &MintRequest, now_ms: i64) -> error::Result<String> {
        mint::mint(&self.signing().ring, request, now_ms)
    }

    /// Writes a link to one blob for one purpose. `expires_at_s`: Unix seconds from which on it is refused.
    pub fn sign_link(&self, kind: BlobKind, permission: Permission, blob: BlobId, expires_at_s: i64) -> String {
        links::sign(
            &self.signing().ring,
            &self.public_url,
            kind,
            permission,
            blob,
            expires_at_s,
        )
    }

    /// Checks a link's signature and then its expiry. All three texts are taken as they stand in the request line,
    /// not percent-decoded: `/blob/<kind_segment>/<uuid_segment>?<query>`.
    ///
    /// # Errors
    /// [`Error::Forbidden`](crate::error::Error::Forbidden), whatever is wrong.
    pub fn verify_link(&self, kind_segment: &str, uuid_segment: &str, query: &str, now_ms: i64) -> error::Result<Link> {
        links::verify(&self.signing().ring, kind_segment, uuid_segment, query, now_ms)
    }
}

/// Checks that `text` is an absolute http(s) origin and strips the slash at its end.
///
/// # Errors
/// One sentence for whoever configured it.
pub fn parse_public_url(text: &str) -> Result<String, String> {
    let refuse = |why: &str| format!("the public URL must be an origin such as https://artifacts.example.com: {why}");
    // `Uri` drops a fragment without a word.
    if text.contains('#') {
        return Err(refuse("it has a fragment"));
    }
    let uri: Uri = text.parse().map_err(|_| refuse("it is not a URL"))?;
    let (Some(scheme @ ("http" | "https")), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(refuse("it does not begin with http:// or https://"));
    };
    if authority.as_str().contains('@') {
        return Err(refuse("it has a user name in it"));
    }
    if authority.host().is_empty() || (authority.as_str() != authority.host() && authority.port_u16().is_none()) {
        return Err(refuse("its host or port can't be read"));
    }
    if uri.path() != "/" || uri.query().is_some() {
        return Err(refuse("it has a path or a query"));
    }
    Ok(format!("{scheme}://{authority}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_public_url_is_an_origin() {
        for (text, origin) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("https://artifacts.example.com/", "https://artifacts.example.com"),
            ("http://[::1]:8080/", "http://[::1]:8080"),
            ("http://[::1]", "http://[::1]"),
        ] {
            assert_eq!(parse_public_url(text).as_deref(), Ok(origin));
        }
        for text in [
            "",
            "/",
            "artifacts.example.com",
            "artifacts.example.com:80",
            "ftp://artifacts.example.com",
            "https:artifacts.example.com",
            "https://",
            "https://:443",
            "https://host:",
            "https://host:99999",
            "https://host:port",
            "https://user@host",
            "https://user:pass@host",
            "https://host/path",
            "https://host//",
            "https://host/?",
            "https://host?query",
            "https://host/#",
            "https://host#fragment",
            "https://ho st",
            " https://host",
            "https://host\n",
            "https://host\\evil",
            "https://ho%20st",
            "https://höst",
        ] {
            let error = parse_public_url(text).expect_err(text);
            assert!(error.starts_with("the public URL must be an origin"), "{error}");
        }
    }
}
