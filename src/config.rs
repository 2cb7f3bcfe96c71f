//! The configuration: `config/default.toml`, then a file, the environment and flags, each over the one before.
//!
//! Called by `main` and `cli`, handed to `app`; nothing below `app` sees it, each floor gets only its own section.
//! Reads files and the environment it is given; never opens a database or a store, never writes anything.

mod layers;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::{fs, mem};

use secrecy::ExposeSecret as _;
use serde::{Deserialize, Deserializer, de::Error as _};
use tracing_subscriber::filter::{EnvFilter, LevelFilter};

use crate::api::{pass_through, serve, tls};
use crate::papers::{IssuerSettings, parse_public_url};
use crate::service::{artifacts, caches, cleaner, memory, scrub, uploads, verification};
use crate::{db, storage};
use layers::Merged;

pub use layers::redact_url;

/// A configuration that can't be used: one sentence that names the key and where it was set, and says what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// Dotted keys and their values.
    pub values: Vec<(&'static str, String)>,
}

/// The outcome of [`Config::load`].
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    /// What to tell people although the server can start.
    pub warnings: Vec<String>,
    /// The whole configuration as TOML, secrets hidden, empty settings replaced by what they stand for.
    pub effective_toml: String,
}

/// Validated settings. `config/default.toml` says what each one means.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    #[serde(deserialize_with = "address")]
    pub listen: SocketAddr,
    #[serde(deserialize_with = "address")]
    pub internal_listen: SocketAddr,
    /// An origin without a slash at its end. `None`: see [`Config::public_origin`].
    #[serde(deserialize_with = "origin")]
    pub public_url: Option<String>,
    pub data_dir: PathBuf,
    /// `None`: see [`Config::root_secret_file`].
    #[serde(deserialize_with = "optional")]
    pub secret_file: Option<PathBuf>,
    #[serde(deserialize_with = "optional")]
    pub ca_file: Option<PathBuf>,
    pub log: LogSettings,
    pub database: db::Settings,
    pub storage: storage::Settings,
    pub server: serve::Settings,
    pub tls: tls::Settings,
    pub pass_through: pass_through::Settings,
    pub uploads: uploads::Settings,
    pub artifacts: artifacts::Settings,
    pub cache: caches::Settings,
    pub verification: verification::Settings,
    pub cleaner: cleaner::Settings,
    pub scrub: scrub::Settings,
    pub memory: memory::Settings,
    #[serde(default)]
    pub issuers: Vec<IssuerSettings>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct LogSettings {
    /// A filter of `tracing_subscriber`.
    pub level: String,
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Pretty on a terminal, else JSON.
    Auto,
    Pretty,
    Json,
}

/// Where the root secret lies, and who puts it there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootSecretFile {
    /// The operator's: it must be there.
    Given(PathBuf),
    /// The embedded default's own: made when it is missing.
    Embedded(PathBuf),
}

impl RootSecretFile {
    pub fn path(&self) -> &Path {
        match self {
            Self::Given(path) | Self::Embedded(path) => path,
        }
    }
}

impl Config {
    /// Puts the layers together and checks the outcome. `environment` holds names and values; those that are not ours
    /// are ignored.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn load(
        flags: &Overrides,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Loaded, ConfigError> {
        let mut merged = Merged::read(flags, environment)?;
        let config: Self = merged.deserialize()?;
        config
            .check()
            .map_err(|complaint| merged.blame(complaint.key, &complaint.text))?;
        Ok(Loaded {
            warnings: mem::take(&mut merged.warnings),
            effective_toml: config.effective_toml(&merged)?,
            config,
        })
    }

    /// What links begin with: `public_url`, or the scheme and `listen`. No slash at the end.
    pub fn public_origin(&self) -> String {
        let scheme = if self.tls.is_on() { "https" } else { "http" };
        self.public_url
            .clone()
            .unwrap_or_else(|| format!("{scheme}://{}", self.listen))
    }

    /// Whether a client can use links that begin with [`Config::public_origin`]: "all addresses" is none.
    pub fn links_lead_somewhere(&self) -> bool {
        self.public_url.is_some() || !self.listen.ip().is_unspecified()
    }

    /// Whether anything lies in the data directory.
    pub fn uses_data_dir(&self) -> bool {
        self.database.is_embedded() || self.storage.url.is_empty()
    }

    /// Where the root secret lies.
    pub fn root_secret_file(&self) -> RootSecretFile {
        match &self.secret_file {
            Some(path) => RootSecretFile::Given(path.clone()),
            None => RootSecretFile::Embedded(self.data_dir.join("root.secret")),
        }
    }

    fn check(&self) -> Result<(), Complaint> {
        self.check_addresses()?;
        self.check_places()?;
        self.check_limits()?;
        check_filter(&self.log.level).map_err(|text| Complaint { key: "log.level", text })
    }

    fn check_addresses(&self) -> Result<(), Complaint> {
        require(self.links_lead_somewhere(), "public_url", || {
            format!(
                "links can't carry the address {}: set public_url to the origin that clients reach the server by",
                self.listen
            )
        })?;
        require(
            self.listen != self.internal_listen || self.listen.port() == 0,
            "internal_listen",
            || "is the same as listen: choose another port".to_owned(),
        )
    }

    fn check_places(&self) -> Result<(), Complaint> {
        let database = self.database.url.expose_secret();
        require(is_postgres_or_empty(database), "database.url", || {
            "write postgres://user:password@host:5432/name, or leave it empty for SQLite".to_owned()
        })?;
        require(
            self.database.is_embedded() || self.secret_file.is_some(),
            "secret_file",
            || {
                "with Postgres every replica needs the same root secret: put 32 random bytes or more into a file \
             (openssl rand -hex 32) and name it here"
                    .to_owned()
            },
        )?;
        require(is_store_or_empty(&self.storage.url), "storage.url", || {
            "write s3://bucket or s3://bucket/prefix and nothing else, or leave it empty for the disk".to_owned()
        })?;
        require(
            self.storage.endpoint.is_empty() || is_endpoint(&self.storage.endpoint),
            "storage.endpoint",
            || "write http:// or https:// and a host, without credentials: those have keys of their own".to_owned(),
        )?;
        require(
            self.storage.access_key_id.is_empty() == self.storage.secret_access_key.expose_secret().is_empty(),
            "storage.access_key_id",
            || "set storage.access_key_id and storage.secret_access_key both, or neither".to_owned(),
        )?;
        require(
            self.tls.cert_file.as_os_str().is_empty() == self.tls.key_file.as_os_str().is_empty(),
            "tls.cert_file",
            || "set tls.cert_file and tls.key_file both, or neither".to_owned(),
        )?;
        require(!self.data_dir.as_os_str().is_empty(), "data_dir", || {
            "name a directory".to_owned()
        })?;
        if let Some(path) = &self.ca_file {
            fs::read(path).map_err(|error| Complaint {
                key: "ca_file",
                text: format!("can't read {}: {error}", path.display()),
            })?;
        }
        Ok(())
    }

    fn check_limits(&self) -> Result<(), Complaint> {
        for (key, duration) in [
            ("server.head_timeout", self.server.head_timeout),
            ("server.idle_timeout", self.server.idle_timeout),
            ("server.body_idle_timeout", self.server.body_idle_timeout),
            ("uploads.link_ttl", self.uploads.link_ttl),
            ("uploads.download_link_ttl", self.uploads.download_link_ttl),
            ("uploads.abandoned_after", self.uploads.abandoned_after),
            ("artifacts.default_retention", self.artifacts.default_retention),
            ("artifacts.max_retention", self.artifacts.max_retention),
            ("cache.idle_after", self.cache.idle_after),
            ("cache.reservation_ttl", self.cache.reservation_ttl),
            ("verification.lease", self.verification.lease),
            ("cleaner.interval", self.cleaner.interval),
            ("cleaner.sweep_after", self.cleaner.sweep_after),
            ("cleaner.lease", self.cleaner.lease),
            ("scrub.cycle", self.scrub.cycle),
        ] {
            require(!duration.is_zero(), key, || "must be longer than 0s".to_owned())?;
        }
        for (key, is_zero) in [
            ("database.max_connections", self.database.max_connections == 0),
            ("server.max_connections", self.server.max_connections == 0),
            ("uploads.max_block_bytes", self.uploads.max_block_bytes == 0),
            ("uploads.max_put_blob_bytes", self.uploads.max_put_blob_bytes == 0),
            ("artifacts.max_files", self.artifacts.max_files == 0),
            ("memory.upload_bytes", self.memory.upload_bytes == 0),
            ("memory.download_bytes", self.memory.download_bytes == 0),
        ] {
            require(!is_zero, key, || "must be at least 1".to_owned())?;
        }
        require(
            (1..=cleaner::MAX_BATCH).contains(&self.cleaner.batch),
            "cleaner.batch",
            || format!("must be at least 1 and at most {}", cleaner::MAX_BATCH),
        )?;
        require(
            self.artifacts.default_retention <= self.artifacts.max_retention,
            "artifacts.default_retention",
            || "must not be longer than artifacts.max_retention".to_owned(),
        )?;
        require(
            self.uploads.abandoned_after >= self.uploads.link_ttl,
            "uploads.abandoned_after",
            || "must not be shorter than uploads.link_ttl: while its link works, an upload is not abandoned".to_owned(),
        )
    }

    fn effective_toml(&self, merged: &Merged) -> Result<String, ConfigError> {
        let mut table = merged.shown()?;
        table.insert("public_url".to_owned(), self.public_origin().into());
        let secret_file = self.root_secret_file();
        table.insert(
            "secret_file".to_owned(),
            secret_file.path().to_string_lossy().as_ref().into(),
        );
        toml::to_string(&table).map_err(|error| ConfigError(error.to_string()))
    }
}

/// What is wrong with the value of a key.
struct Complaint {
    key: &'static str,
    text: String,
}

fn require(holds: bool, key: &'static str, text: impl FnOnce() -> String) -> Result<(), Complaint> {
    if holds {
        Ok(())
    } else {
        Err(Complaint { key, text: text() })
    }
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| {
        D::Error::custom(format!(
            "{text:?} is not an address: write an IP address and a port, such as 127.0.0.1:8080"
        ))
    })
}

/// An empty text stands for "not set".
fn optional<'de, D: Deserializer<'de>, T: From<String>>(deserializer: D) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok((!text.is_empty()).then(|| text.into()))
}

/// An empty text stands for "not set".
fn origin<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text: Option<String> = optional(deserializer)?;
    text.map(|text| parse_public_url(&text).map_err(D::Error::custom))
        .transpose()
}

/// An absolute http(s) URL, maybe with a path.
fn is_endpoint(url: &str) -> bool {
    let Some((scheme, rest)) = url.split_once("://") else {
        return false;
    };
    let host = rest.split('/').next().unwrap_or_default();
    !url.contains(['?', '#']) && parse_public_url(&format!("{scheme}://{host}")).is_ok()
}

fn is_postgres_or_empty(url: &str) -> bool {
    url.is_empty() || url.starts_with("postgres://") || url.starts_with("postgresql://")
}

fn is_store_or_empty(url: &str) -> bool {
    let bucket = url
        .strip_prefix("s3://")
        .map(|rest| rest.split('/').next().unwrap_or_default());
    url.is_empty()
        || url == "memory://"
        || bucket.is_some_and(|bucket| !bucket.is_empty() && !url.contains(['?', '#', '@']))
}

/// A word alone would be taken for the name of a module and silence everything else, so it has to be a level.
fn check_filter(filter: &str) -> Result<(), String> {
    let parses = EnvFilter::try_new(filter).is_ok();
    let understood = |directive: &str| match directive.trim() {
        "" => false,
        word => word.contains(['=', '[']) || word.parse::<LevelFilter>().is_ok(),
    };
    if parses && filter.split(',').all(understood) {
        return Ok(());
    }
    Err(format!(
        "{filter:?} is not a filter: write error, warn, info, debug or trace, or \"info,wharfinger::storage=debug\""
    ))
}

#[cfg(test)]
mod tests;
