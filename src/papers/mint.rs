//! Minting: runtime tokens for runs that no forge speaks for.
//!
//! Called by `Papers::mint`, that is by `wharfinger token mint`, `wharfinger env` and `POST /api/v1/runtime-token`. Reads
//! no clock and writes nothing down: whoever holds the root secret can mint.

use std::time::Duration;

use jsonwebtoken::{Algorithm, Header};
use serde::Serialize;
use uuid::Uuid;

use super::issuers::{MINTED_ISSUER, MINTED_MAX_LIFETIME};
use super::keys::KeyRing;
use super::tokens::{is_backend_id, is_repository};
use crate::error::{Error, Result};

/// Some clients refuse a token from the future without any leeway, so it begins a little in the past.
const BEGINS_BEFORE_S: i64 = 60;
const MAX_REF_BYTES: usize = 1024;
const READ: u8 = 1;
const READ_AND_WRITE: u8 = 3;

/// What a minted token says.
#[derive(Clone, Debug)]
pub struct MintRequest {
    /// `owner/name`.
    pub repository: String,
    /// Its number at the forge. With it the repository keeps its artifacts when it is renamed.
    pub repository_id: Option<i64>,
    /// Any text of letters, digits, `_`, `.` and `-`, up to 128; also the claim `run_id` if it is a number.
    pub run_id: String,
    /// As `run_id`.
    pub job_id: String,
    /// Counts from 1.
    pub attempt: i32,
    /// The ref that the run builds, such as `refs/heads/main`: its cache may be read and written.
    pub git_ref: String,
    /// The default branch's ref: its cache may be read.
    pub default_ref: String,
    /// What set the run off, such as `pull_request_target`. Decides whether it may write the caches of branches.
    pub event: Option<String>,
    /// How long the token lives, in whole seconds, up to [`MINTED_MAX_LIFETIME`].
    pub ttl: Duration,
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    scp: String,
    ac: String,
    repository: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    repository_id: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    run_id: Option<i64>,
    run_attempt: i32,
    #[serde(rename = "ref")]
    git_ref: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_name: Option<&'a str>,
    nbf: i64,
    iat: i64,
    exp: i64,
    jti: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct CacheScope<'a> {
    scope: &'a str,
    permission: u8,
}

pub(super) fn mint(ring: &KeyRing, request: &MintRequest, now_ms: i64) -> Result<String> {
    let ttl_s = check(request)?;
    let MintRequest {
        repository,
        run_id,
        job_id,
        git_ref,
        default_ref,
        ..
    } = request;
    let mut scopes = vec![CacheScope {
        scope: git_ref,
        permission: READ_AND_WRITE,
    }];
    if default_ref != git_ref {
        scopes.push(CacheScope {
            scope: default_ref,
            permission: READ,
        });
    }
    let internal = |error: &dyn std::error::Error| Error::Internal(format!("can't mint a token: {error}"));
    let iat = now_ms.div_euclid(1000);
    let claims = Claims {
        iss: MINTED_ISSUER,
        scp: format!("Actions.Results:{run_id}:{job_id}"),
        ac: serde_json::to_string(&scopes).map_err(|error| internal(&error))?,
        repository,
        repository_id: request.repository_id,
        run_id: run_id.parse().ok().filter(|id| *id > 0),
        run_attempt: request.attempt,
        git_ref,
        event_name: request.event.as_deref(),
        nbf: iat - BEGINS_BEFORE_S,
        iat,
        exp: iat + ttl_s,
        jti: Uuid::new_v4().to_string(),
    };
    let key = ring.active();
    let header = Header {
        kid: Some(key.id.clone()),
        ..Header::new(Algorithm::HS256)
    };
    jsonwebtoken::encode(&header, &claims, &key.mint).map_err(|error| internal(&error))
}

/// Returns the life in seconds.
fn check(request: &MintRequest) -> Result<i64> {
    let invalid = |why: String| Err(Error::Invalid(why));
    if !is_repository(&request.repository) {
        return invalid("the repository must be owner/name".into());
    }
    if request.repository_id.is_some_and(|id| id < 1) {
        return invalid("the repository id must be a positive number".into());
    }
    for (what, id) in [("run", &request.run_id), ("job", &request.job_id)] {
        if !is_backend_id(id) {
            return invalid(format!(
                "the {what} id must be 1 to 128 letters, digits, `_`, `.` or `-`"
            ));
        }
    }
    if request.attempt < 1 {
        return invalid("attempts count from 1".into());
    }
    for (what, git_ref) in [("ref", &request.git_ref), ("default ref", &request.default_ref)] {
        let name = git_ref.strip_prefix("refs/").unwrap_or_default();
        if name.is_empty() || git_ref.len() > MAX_REF_BYTES || name.contains(|c: char| c.is_control() || c == ' ') {
            return invalid(format!("the {what} must be a full one such as refs/heads/main"));
        }
    }
    let is_event = |event: &str| !event.is_empty() && event.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    if !request.event.as_deref().is_none_or(is_event) {
        return invalid("the event must be one of GitHub's names, such as pull_request_target".into());
    }
    if request.ttl < Duration::from_secs(1) || request.ttl > MINTED_MAX_LIFETIME {
        let max = humantime::format_duration(MINTED_MAX_LIFETIME);
        return invalid(format!("a token lives at least a second and at most {max}"));
    }
    i64::try_from(request.ttl.as_secs()).or_else(|error| invalid(error.to_string()))
}

#[cfg(test)]
pub(super) mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use serde_json::{Value, json};

    use super::super::Papers;
    use super::super::secret::tests::root;
    use super::*;
    use crate::model::SigningKey;

    pub const NOW_MS: i64 = 1_800_000_000_500;

    fn papers() -> Papers {
        Papers::new(&[], &root(), "http://localhost").unwrap()
    }

    pub fn request() -> MintRequest {
        MintRequest {
            repository: "Octo/Demo".into(),
            repository_id: None,
            run_id: "1".into(),
            job_id: "build".into(),
            attempt: 1,
            git_ref: "refs/heads/main".into(),
            default_ref: "refs/heads/main".into(),
            event: None,
            ttl: Duration::from_secs(6 * 3600),
        }
    }

    /// As `jwt-decode` does it in the clients: the middle segment, no signature.
    fn decode(token: &str) -> Value {
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn clients_read_it() {
        let request = MintRequest {
            repository_id: Some(5),
            attempt: 3,
            ..request()
        };
        let token = papers().mint(&request, NOW_MS).unwrap();
        assert_eq!(
            URL_SAFE_NO_PAD.decode(token.split('.').next().unwrap()).unwrap(),
            br#"{"typ":"JWT","alg":"HS256","kid":"1"}"#
        );
        let mut claims = decode(&token);
        let jti = claims.as_object_mut().unwrap().remove("jti").unwrap();
        assert!(Uuid::parse_str(jti.as_str().unwrap()).is_ok());
        let expected = json!({
            "iss": "wharfinger",
            "scp": "Actions.Results:1:build",
            "ac": r#"[{"Scope":"refs/heads/main","Permission":3}]"#,
            "repository": "Octo/Demo",
            "repository_id": 5,
            "run_id": 1,
            "run_attempt": 3,
            "ref": "refs/heads/main",
            "nbf": 1_799_999_940,
            "iat": 1_800_000_000,
            "exp": 1_800_021_600,
        });
        assert_eq!(claims, expected);
    }

    #[test]
    fn this_server_accepts_it() {
        let mint = |request: &MintRequest| {
            let token = papers().mint(request, NOW_MS).unwrap();
            papers().verify_token(&token, NOW_MS).unwrap()
        };
        let principal = mint(&request());
        assert_eq!(principal.run.issuer, "wharfinger");
        assert_eq!(principal.run.repository, "name:octo/demo");
        assert_eq!(
            (principal.run.run_backend_id.as_str(), principal.run_id),
            ("1", Some(1))
        );
        assert_eq!((principal.job_backend_id.as_str(), principal.run_attempt), ("build", 1));
        assert_eq!(principal.expires_at_ms, 1_800_021_600_000);

        let principal = mint(&MintRequest {
            repository_id: Some(5),
            run_id: "0ce7-aa".into(),
            ..request()
        });
        assert_eq!((principal.run.repository.as_str(), principal.run_id), ("id:5", None));
        assert_eq!(
            mint(&MintRequest {
                run_id: "0".into(),
                ..request()
            })
            .run_id,
            None
        );
        mint(&MintRequest {
            ttl: MINTED_MAX_LIFETIME,
            ..request()
        });
        let ref_of = |byte: &str| format!("refs/heads/{}", byte.repeat(1000));
        mint(&MintRequest {
            git_ref: ref_of("\""),
            default_ref: ref_of("\\"),
            ..request()
        });
    }

    #[test]
    fn a_retired_key_ends_tokens_that_came_before() {
        let papers = papers();
        let token = papers.mint(&request(), NOW_MS).unwrap();
        let second = SigningKey {
            id: "2".into(),
            ..SigningKey::first()
        };
        assert!(papers.verify_token(&token, NOW_MS).is_ok());
        papers.use_keys(&[SigningKey::first(), second.clone()], NOW_MS).unwrap();
        assert!(papers.verify_token(&token, NOW_MS).is_ok());
        papers.use_keys(&[second], NOW_MS).unwrap();
        assert!(matches!(
            papers.verify_token(&token, NOW_MS),
            Err(Error::Unauthorized(_))
        ));
    }

    #[test]
    fn another_servers_is_refused() {
        let path = tempfile::tempdir().unwrap();
        let other = super::super::RootSecret::load_or_create(&path.path().join("root")).unwrap();
        let other = Papers::new(&[], &other, "http://localhost").unwrap();
        let token = other.mint(&request(), NOW_MS).unwrap();
        assert!(other.verify_token(&token, NOW_MS).is_ok());
        assert!(matches!(
            papers().verify_token(&token, NOW_MS),
            Err(Error::Unauthorized(_))
        ));
    }

    #[test]
    fn the_refs_give_the_cache_scopes() {
        let scopes = |git_ref: &str| -> Vec<_> {
            let request = MintRequest {
                git_ref: git_ref.into(),
                ..request()
            };
            let token = papers().mint(&request, NOW_MS).unwrap();
            let scopes = papers().verify_token(&token, NOW_MS).unwrap().cache_scopes.clone();
            scopes
                .into_iter()
                .map(|scope| (scope.scope, scope.read, scope.write))
                .collect()
        };
        let main = |write| ("refs/heads/main".to_owned(), true, write);
        assert_eq!(scopes("refs/heads/main"), [main(true)]);
        for own in ["refs/heads/topic", "refs/pull/7/merge", "refs/tags/v1"] {
            assert_eq!(scopes(own), [(own.to_owned(), true, true), main(false)]);
        }
    }

    #[test]
    fn an_outsiders_event_gives_no_writing_to_a_branch() {
        let scopes = |event: &str| {
            let request = MintRequest {
                event: Some(event.into()),
                ..request()
            };
            let token = papers().mint(&request, NOW_MS).unwrap();
            papers().verify_token(&token, NOW_MS).unwrap().cache_scopes.clone()
        };
        assert!(scopes("push")[0].write);
        assert!(!scopes("issue_comment")[0].write);
    }

    #[test]
    fn nonsense_is_explained() {
        for (request, why) in [
            (
                MintRequest {
                    repository: "demo".into(),
                    ..request()
                },
                "owner/name",
            ),
            (
                MintRequest {
                    repository_id: Some(0),
                    ..request()
                },
                "repository id",
            ),
            (
                MintRequest {
                    run_id: String::new(),
                    ..request()
                },
                "run id",
            ),
            (
                MintRequest {
                    run_id: "1:2".into(),
                    ..request()
                },
                "run id",
            ),
            (
                MintRequest {
                    job_id: "a b".into(),
                    ..request()
                },
                "job id",
            ),
            (
                MintRequest {
                    job_id: "x".repeat(129),
                    ..request()
                },
                "job id",
            ),
            (
                MintRequest {
                    attempt: 0,
                    ..request()
                },
                "attempts",
            ),
            (
                MintRequest {
                    git_ref: "main".into(),
                    ..request()
                },
                "the ref must",
            ),
            (
                MintRequest {
                    git_ref: "refs/".into(),
                    ..request()
                },
                "the ref must",
            ),
            (
                MintRequest {
                    git_ref: "refs/heads/a\nb".into(),
                    ..request()
                },
                "the ref must",
            ),
            (
                MintRequest {
                    default_ref: "refs/x".repeat(200),
                    ..request()
                },
                "default ref",
            ),
            (
                MintRequest {
                    event: Some("Push".into()),
                    ..request()
                },
                "the event must",
            ),
            (
                MintRequest {
                    ttl: Duration::from_millis(999),
                    ..request()
                },
                "a token lives",
            ),
            (
                MintRequest {
                    ttl: MINTED_MAX_LIFETIME + Duration::from_secs(1),
                    ..request()
                },
                "at most 1day",
            ),
        ] {
            match papers().mint(&request, NOW_MS) {
                Err(Error::Invalid(text)) => assert!(text.contains(why), "{text}"),
                other => panic!("{why}: {other:?}"),
            }
        }
    }
}
