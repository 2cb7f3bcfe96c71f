//! The issuer table: whose tokens count, by which keys, and on which terms.
//!
//! Built by `Papers::new` from the configuration, asked by `tokens` for the one issuer that a token names.
//! Reads secret files when it is built and never again; never verifies anything itself.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey};
use secrecy::ExposeSecret;
use serde::{Deserialize, Deserializer, de};

use super::key_sets::KeySet;
use super::keys::KeyRing;
use super::{secret, tokens};

/// Name and `iss` of the tokens that this server mints itself.
pub const MINTED_ISSUER: &str = "wharfinger";

/// No minted token lives longer.
pub const MINTED_MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// `iss` of the tokens of GitHub.com, and where the keys are that sign them.
const GITHUB_ISS: &str = "https://token.actions.githubusercontent.com";
const GITHUB_JWKS_URL: &str = "https://token.actions.githubusercontent.com/.well-known/jwks";

/// How an issuer signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IssuerKind {
    /// HMAC-SHA256 with a secret that this server knows too: Gitea, Forgejo, act-style runners.
    Hs256,
    /// A private key of its own, whose public half it publishes: GitHub Enterprise Server, Forgejo, any OIDC issuer.
    Jwks,
    /// As `jwks`, by GitHub.com, which signs for everybody in the world: an allow-list must say who counts.
    GithubRuntime,
}

/// One `[[issuers]]` entry of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IssuerSettings {
    /// Stands in the tenant key of everything its runs store: lower-case letters, digits, `_`, `-`, `.`.
    pub name: String,
    pub kind: IssuerKind,
    /// The exact `iss` of its tokens.
    pub iss: Option<String>,
    /// Whether tokens without an `iss` are this issuer's.
    #[serde(default)]
    pub default: bool,
    /// The HMAC key, byte for byte, without one newline at its end.
    pub secret_file: Option<PathBuf>,
    /// A second key that verifies, so that the issuer can change its own without a gap.
    pub previous_secret_file: Option<PathBuf>,
    /// Where the JWK set is that verifies its tokens.
    pub jwks_url: Option<String>,
    /// The same set as a file, where the issuer can't be reached.
    pub jwks_file: Option<PathBuf>,
    /// The only `repository_owner_id` and `repository_id` that its tokens may have.
    pub allowed_owner_ids: Option<Vec<i64>>,
    pub allowed_repository_ids: Option<Vec<i64>>,
    /// The exact `aud` that its tokens must have.
    pub audience: Option<String>,
    /// `owner/name` for tokens that name no repository.
    pub repository: Option<String>,
    /// Longer-lived tokens are refused, such as `24h`.
    #[serde(default = "default_max_lifetime", deserialize_with = "duration")]
    pub max_lifetime: Duration,
    /// Whether a cache scope that may be written may be read too: Gitea's `ac` says only "write".
    #[serde(default)]
    pub write_implies_read: bool,
}

fn default_max_lifetime() -> Duration {
    Duration::from_secs(24 * 60 * 60)
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    humantime::parse_duration(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

/// One issuer, ready to verify.
#[derive(Debug)]
pub(super) struct Issuer {
    pub name: String,
    iss: Option<String>,
    default: bool,
    keys: Keys,
    pub allowed_owner_ids: Option<Vec<i64>>,
    pub allowed_repository_ids: Option<Vec<i64>>,
    pub audience: Option<String>,
    pub repository: Option<String>,
    pub max_lifetime_ms: i64,
    pub write_implies_read: bool,
}

/// Where an issuer's keys come from.
#[derive(Debug)]
enum Keys {
    /// Secrets, which stay as they are.
    Secrets(Arc<[VerifyingKey]>),
    /// Public keys, which the issuer may change.
    Public(Arc<KeySet>),
}

/// A key of one issuer. A token's `kid` must equal the id; without a `kid`, keys without an id are tried. Its `alg` must
/// be the key's own.
#[derive(Debug)]
pub(super) struct VerifyingKey {
    pub id: Option<String>,
    pub algorithm: Algorithm,
    pub key: DecodingKey,
}

impl Issuer {
    /// What its tokens may say as `alg`, whatever keys it has just now.
    pub fn algorithms(&self) -> &'static [Algorithm] {
        match self.keys {
            Keys::Secrets(_) => &[Algorithm::HS256],
            Keys::Public(_) => &[Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA],
        }
    }

    /// The keys that count now.
    pub fn keys(&self, now_ms: i64) -> Arc<[VerifyingKey]> {
        match &self.keys {
            Keys::Secrets(keys) => Arc::clone(keys),
            Keys::Public(set) => set.keys(now_ms),
        }
    }

    pub fn key_set(&self) -> Option<&Arc<KeySet>> {
        match &self.keys {
            Keys::Secrets(_) => None,
            Keys::Public(set) => Some(set),
        }
    }

    /// This server itself, as far as `ring` goes.
    pub fn minted(ring: &KeyRing) -> Result<Self, String> {
        Ok(Self {
            name: MINTED_ISSUER.to_owned(),
            iss: Some(MINTED_ISSUER.to_owned()),
            default: false,
            keys: Keys::Secrets(
                ring.all()
                    .map(|key| VerifyingKey {
                        id: Some(key.id.clone()),
                        algorithm: Algorithm::HS256,
                        key: key.minted.clone(),
                    })
                    .collect(),
            ),
            allowed_owner_ids: None,
            allowed_repository_ids: None,
            audience: None,
            repository: None,
            max_lifetime_ms: lifetime_ms(MINTED_MAX_LIFETIME)?,
            write_implies_read: false,
        })
    }

    fn configured(settings: &IssuerSettings) -> Result<Self, String> {
        let IssuerSettings {
            name,
            kind,
            iss,
            default,
            allowed_owner_ids,
            allowed_repository_ids,
            audience,
            repository,
            ..
        } = settings;
        let github_iss = (*kind == IssuerKind::GithubRuntime).then(|| GITHUB_ISS.to_owned());
        let iss = iss.clone().or(github_iss);
        let is_name_byte = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.".contains(&byte);
        if name.is_empty() || name.len() > 64 || !name.bytes().all(is_name_byte) {
            return Err("its name must be 1 to 64 lower-case letters, digits, `_`, `-` or `.`".into());
        }
        if iss.is_none() && !default {
            return Err("no token would ever be its own: set `iss`, or `default = true`".into());
        }
        if [&iss, audience].into_iter().flatten().any(String::is_empty) {
            return Err("`iss` and `audience` must not be empty: leave them out".into());
        }
        if repository
            .as_deref()
            .is_some_and(|repository| !tokens::is_repository(repository))
        {
            return Err("its `repository` must be `owner/name`".into());
        }
        for ids in [allowed_owner_ids, allowed_repository_ids].into_iter().flatten() {
            if ids.is_empty() || ids.iter().any(|id| *id <= 0) {
                return Err(
                    "an allow-list must name ids, which are positive numbers: leave it out to allow all".into(),
                );
            }
        }
        if *kind == IssuerKind::GithubRuntime && allowed_owner_ids.is_none() && allowed_repository_ids.is_none() {
            return Err(
                "everybody on GitHub has tokens of it: set `allowed_owner_ids` or `allowed_repository_ids`".into(),
            );
        }
        Ok(Self {
            name: name.clone(),
            iss,
            default: *default,
            keys: Keys::configured(settings)?,
            allowed_owner_ids: allowed_owner_ids.clone(),
            allowed_repository_ids: allowed_repository_ids.clone(),
            audience: audience.clone(),
            repository: repository.clone(),
            max_lifetime_ms: lifetime_ms(settings.max_lifetime)?,
            write_implies_read: settings.write_implies_read,
        })
    }
}

impl Keys {
    fn configured(settings: &IssuerSettings) -> Result<Self, String> {
        let IssuerSettings {
            name,
            kind,
            secret_file,
            previous_secret_file,
            jwks_url,
            jwks_file,
            ..
        } = settings;
        if *kind == IssuerKind::Hs256 {
            if jwks_url.is_some() || jwks_file.is_some() {
                return Err("`jwks_url` and `jwks_file` are for issuers with public keys: leave them out".into());
            }
            let Some(secret_file) = secret_file else {
                return Err("set `secret_file` to the file of the secret that it signs with".into());
            };
            let secrets = [Some(secret_file), previous_secret_file.as_ref()];
            let keys = secrets.into_iter().flatten().map(|path| {
                Ok(VerifyingKey {
                    id: None,
                    algorithm: Algorithm::HS256,
                    key: DecodingKey::from_secret(secret::read(path)?.expose_secret()),
                })
            });
            return Ok(Self::Secrets(keys.collect::<Result<_, String>>()?));
        }
        if secret_file.is_some() || previous_secret_file.is_some() {
            return Err("it signs with a key that nobody else has: leave out `secret_file`".into());
        }
        let set = match (jwks_url, jwks_file) {
            (Some(url), None) => KeySet::at_url(name, url)?,
            (None, Some(path)) => KeySet::in_file(name, path)?,
            (None, None) if *kind == IssuerKind::GithubRuntime => KeySet::at_url(name, GITHUB_JWKS_URL)?,
            _ => return Err("set either `jwks_url` or `jwks_file`, where its public keys are".into()),
        };
        Ok(Self::Public(Arc::new(set)))
    }
}

/// No token's dates span more than a century anyway.
fn lifetime_ms(lifetime: Duration) -> Result<i64, String> {
    const CENTURY: Duration = Duration::from_secs(100 * 366 * 24 * 60 * 60);
    if lifetime.is_zero() || lifetime > CENTURY {
        return Err("its `max_lifetime` must be more than 0s and at most a century".into());
    }
    i64::try_from(lifetime.as_millis()).map_err(|error| error.to_string())
}

/// All configured issuers.
#[derive(Debug)]
pub(super) struct Issuers(Vec<Issuer>);

impl Issuers {
    pub fn new(settings: &[IssuerSettings]) -> Result<Self, String> {
        let mut table: Vec<Issuer> = Vec::new();
        for settings in settings {
            let explain = |why: String| format!("issuer `{}`: {why}", settings.name);
            let issuer = Issuer::configured(settings).map_err(explain)?;
            if issuer.name == MINTED_ISSUER || issuer.iss.as_deref() == Some(MINTED_ISSUER) {
                return Err(explain(format!(
                    "the name and the iss `{MINTED_ISSUER}` belong to this server's own tokens"
                )));
            }
            for other in &table {
                if issuer.name == other.name {
                    return Err(explain("another issuer has the same name".into()));
                }
                if issuer.iss.is_some() && issuer.iss == other.iss {
                    return Err(explain(format!("issuer `{}` has the same `iss`", other.name)));
                }
                if issuer.default && other.default {
                    return Err(explain(format!("issuer `{}` has `default = true` already", other.name)));
                }
            }
            table.push(issuer);
        }
        Ok(Self(table))
    }

    /// How long a token lives at the most, whosever it is.
    pub fn max_lifetime_ms(&self) -> i64 {
        self.0.iter().map(|issuer| issuer.max_lifetime_ms).max().unwrap_or(0)
    }

    /// The one issuer whose keys may verify a token with this `iss`.
    pub fn find(&self, iss: Option<&str>) -> Option<&Issuer> {
        self.0.iter().find(|issuer| match iss {
            Some(iss) => issuer.iss.as_deref() == Some(iss),
            None => issuer.default,
        })
    }

    pub fn key_sets(&self) -> impl Iterator<Item = &Arc<KeySet>> {
        self.0.iter().filter_map(Issuer::key_set)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use super::super::secret::tests::write;
    use super::*;

    /// What each issuer named in a test signs with.
    pub fn secret_of(name: &str) -> String {
        format!("{name}'s own secret: 3q2+7wkY1xT5mZ0rVb8sQe")
    }

    pub fn settings(directory: &Path, name: &str) -> IssuerSettings {
        IssuerSettings {
            name: name.to_owned(),
            kind: IssuerKind::Hs256,
            iss: Some(format!("https://{name}.example")),
            default: false,
            secret_file: Some(write(directory, &format!("{name}.secret"), secret_of(name).as_bytes())),
            previous_secret_file: None,
            jwks_url: None,
            jwks_file: None,
            allowed_owner_ids: None,
            allowed_repository_ids: None,
            audience: None,
            repository: None,
            max_lifetime: default_max_lifetime(),
            write_implies_read: false,
        }
    }

    #[test]
    fn issuers_are_found_by_exact_iss() {
        let directory = tempfile::tempdir().unwrap();
        let gitea = IssuerSettings {
            iss: None,
            default: true,
            ..settings(directory.path(), "gitea")
        };
        let issuers = Issuers::new(&[settings(directory.path(), "forge"), gitea]).unwrap();
        let name = |iss| issuers.find(iss).map(|issuer| issuer.name.as_str());
        assert_eq!(name(Some("https://forge.example")), Some("forge"));
        assert_eq!(name(None), Some("gitea"));
        for iss in [
            "",
            "https://forge.example/",
            "HTTPS://forge.example",
            "forge",
            "wharfinger",
            "gitea",
        ] {
            assert_eq!(name(Some(iss)), None, "{iss}");
        }
        assert!(Issuers::new(&[]).unwrap().find(None).is_none());
    }

    #[test]
    fn nonsense_refuses_to_start() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name| settings(directory.path(), name);
        let weak = write(directory.path(), "weak", b"BADBEEF0");
        let public = |kind| IssuerSettings {
            kind,
            secret_file: None,
            ..at("a")
        };
        let cases = [
            (vec![at("a"), at("a")], "same name"),
            (
                vec![
                    at("a"),
                    IssuerSettings {
                        iss: at("a").iss,
                        ..at("b")
                    },
                ],
                "same `iss`",
            ),
            (
                vec![
                    IssuerSettings {
                        default: true,
                        ..at("a")
                    },
                    IssuerSettings {
                        default: true,
                        ..at("b")
                    },
                ],
                "default = true` already",
            ),
            (vec![at("wharfinger")], "own tokens"),
            (
                vec![IssuerSettings {
                    iss: Some("wharfinger".into()),
                    ..at("a")
                }],
                "own tokens",
            ),
            (vec![IssuerSettings { iss: None, ..at("a") }], "set `iss`"),
            (
                vec![IssuerSettings {
                    iss: Some(String::new()),
                    ..at("a")
                }],
                "must not be empty",
            ),
            (
                vec![IssuerSettings {
                    audience: Some(String::new()),
                    ..at("a")
                }],
                "must not be empty",
            ),
            (
                vec![IssuerSettings {
                    name: "A".into(),
                    ..at("a")
                }],
                "lower-case",
            ),
            (
                vec![IssuerSettings {
                    name: String::new(),
                    ..at("a")
                }],
                "lower-case",
            ),
            (
                vec![IssuerSettings {
                    repository: Some("demo".into()),
                    ..at("a")
                }],
                "owner/name",
            ),
            (
                vec![IssuerSettings {
                    max_lifetime: Duration::ZERO,
                    ..at("a")
                }],
                "max_lifetime",
            ),
            (
                vec![IssuerSettings {
                    max_lifetime: Duration::MAX,
                    ..at("a")
                }],
                "max_lifetime",
            ),
            (
                vec![IssuerSettings {
                    secret_file: Some("/no/such/file".into()),
                    ..at("a")
                }],
                "can't read",
            ),
            (
                vec![IssuerSettings {
                    secret_file: Some(weak.clone()),
                    ..at("a")
                }],
                "shorter than 32 bytes",
            ),
            (
                vec![IssuerSettings {
                    previous_secret_file: Some(weak),
                    ..at("a")
                }],
                "shorter than 32 bytes",
            ),
            (
                vec![IssuerSettings {
                    secret_file: None,
                    ..at("a")
                }],
                "set `secret_file`",
            ),
            (
                vec![IssuerSettings {
                    jwks_file: Some("keys".into()),
                    ..at("a")
                }],
                "public keys: leave them out",
            ),
            (
                vec![IssuerSettings {
                    allowed_owner_ids: Some(vec![]),
                    ..at("a")
                }],
                "must name ids",
            ),
            (
                vec![IssuerSettings {
                    allowed_repository_ids: Some(vec![7, 0]),
                    ..at("a")
                }],
                "must name ids",
            ),
            (vec![public(IssuerKind::Jwks)], "set either"),
            (
                vec![IssuerSettings {
                    jwks_url: Some("https://forge.example/keys".into()),
                    jwks_file: Some("keys".into()),
                    ..public(IssuerKind::Jwks)
                }],
                "set either",
            ),
            (
                vec![IssuerSettings {
                    jwks_url: Some("http://forge.example/keys".into()),
                    ..public(IssuerKind::Jwks)
                }],
                "https://",
            ),
            (
                vec![IssuerSettings {
                    jwks_file: Some("/no/such/file".into()),
                    ..public(IssuerKind::Jwks)
                }],
                "can't read",
            ),
            (
                vec![IssuerSettings {
                    kind: IssuerKind::Jwks,
                    ..at("a")
                }],
                "leave out `secret_file`",
            ),
            (vec![public(IssuerKind::GithubRuntime)], "allowed_owner_ids"),
        ];
        for (settings, why) in cases {
            let error = Issuers::new(&settings).expect_err(why);
            assert!(error.starts_with("issuer `") && error.contains(why), "{error}");
        }
    }

    #[test]
    fn github_needs_only_an_allow_list() {
        let text = "name = 'github'\nkind = 'github_runtime'\nallowed_owner_ids = [583231]";
        let issuers = Issuers::new(&[toml::from_str(text).unwrap()]).unwrap();
        let issuer = issuers
            .find(Some("https://token.actions.githubusercontent.com"))
            .unwrap();
        assert_eq!(issuer.name, "github");
        assert!(issuer.key_set().unwrap().is_fetched());
    }

    #[test]
    fn settings_read_as_documented() {
        let text = "name = 'gitea'\nkind = 'hs256'\nsecret_file = '/s'\ndefault = true\nmax_lifetime = '4h 30m'";
        let settings: IssuerSettings = toml::from_str(text).unwrap();
        assert_eq!(settings.max_lifetime, Duration::from_secs(16_200));
        assert_eq!(
            (settings.iss, settings.default, settings.write_implies_read),
            (None, true, false)
        );
        for text in [
            "kind = 'rs256'",
            "surprise = 1",
            "max_lifetime = 'long'",
            "max_lifetime = 86400",
        ] {
            let text = format!("name = 'a'\nsecret_file = '/s'\n{text}");
            let text = if text.contains("kind") {
                text
            } else {
                format!("{text}\nkind = 'hs256'")
            };
            assert!(toml::from_str::<IssuerSettings>(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let directory = tempfile::tempdir().unwrap();
        let text = format!("{:?}", Issuers::new(&[settings(directory.path(), "forge")]).unwrap());
        assert!(!text.contains("3q2") && !text.contains("102, 111"), "{text}");
    }
}
