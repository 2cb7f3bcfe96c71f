//! Artifacts: create, finalize, list, hand out links, delete, and how long they live.
//!
//! Called by `api/artifacts_v4.rs`, and for the list by `api/artifacts_v3.rs`, with a principal whose run was already
//! compared with the request's.

use std::time::Duration;

use serde::Deserialize;

use super::{Services, millis};
use crate::db::{Created, ListedArtifact, NewArtifact, NewestArtifact, Sealing};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::model::{ArtifactId, BlobId, BlobKind, BlobState, Principal, Sha256};
use crate::papers::Permission;

/// The `[artifacts]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    #[serde(with = "crate::duration")]
    pub default_retention: Duration,
    #[serde(with = "crate::duration")]
    pub max_retention: Duration,
    /// Artifacts that one job may have; 0 for no limit.
    pub max_per_job: u32,
    /// Artifacts of one run that may be created and not finalized; 0 for no limit.
    pub max_pending_per_run: u32,
    /// Bytes that one artifact may have; 0 for no limit.
    pub max_size_bytes: u64,
    /// Files that one artifact may have which is uploaded file by file.
    pub max_files: u32,
}

/// What a client wants to create, as it came.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub name: &'a str,
    pub version: i32,
    pub mime_type: Option<&'a str>,
    pub expires_at_ms: Option<i64>,
}

/// A name longer than this, in bytes of UTF-8, is refused.
const MAX_NAME_BYTES: usize = 255;
const MAX_MIME_TYPE_BYTES: usize = 255;
/// How often Finalize looks again when the content changes under it.
const FINALIZE_TRIES: usize = 8;

/// A slow store must not keep Finalize from answering: clients give up after 180 s.
const FINALIZE_PATIENCE: Duration = Duration::from_secs(45);

/// Checks an artifact's name. The one rule for every protocol.
///
/// # Errors
/// [`Error::Invalid`] unless it is 1–255 bytes, not `.` or `..`, and free of characters that file systems,
/// terminals or the clients themselves refuse (`@actions/artifact`: `path-and-artifact-name-validation.ts`).
pub fn check_name(name: &str) -> Result<()> {
    let invalid = |reason: String| Err(Error::Invalid(format!("the artifact name is not valid: {reason}")));
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return invalid(format!("it must have 1 to {MAX_NAME_BYTES} bytes"));
    }
    if name == "." || name == ".." {
        return invalid("it must not be . or ..".to_owned());
    }
    let refused = |c: char| {
        matches!(c, '"' | ':' | '<' | '>' | '|' | '*' | '?' | '\\' | '/')
            || c.is_control()
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    match name.chars().find(|c| refused(*c)) {
        Some(c) => invalid(format!("it must not contain {}", c.escape_default())),
        None => Ok(()),
    }
}

fn check_mime_type(mime_type: &str) -> Result<()> {
    if mime_type.len() <= MAX_MIME_TYPE_BYTES && mime_type.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        Ok(())
    } else {
        Err(Error::Invalid(format!(
            "mime_type must be printable ASCII of at most {MAX_MIME_TYPE_BYTES} bytes"
        )))
    }
}

/// A limit on a count, where 0 says that there is none.
pub(super) fn limit(setting: u32) -> Option<i64> {
    (setting > 0).then_some(i64::from(setting))
}

// The clients tell their users of a quota when they read these first two words.
pub(super) fn too_many(settings: &Settings) -> Error {
    Error::QuotaExceeded(format!(
        "insufficient usage: a job may have at most {} artifacts",
        settings.max_per_job
    ))
}

pub(super) fn too_many_pending(settings: &Settings) -> Error {
    Error::QuotaExceeded(format!(
        "insufficient usage: a workflow run may have at most {} artifacts that are not finalized",
        settings.max_pending_per_run
    ))
}

/// A name that none can have is not looked for: Postgres takes no NUL.
pub(super) fn check_known(name: &str) -> Result<()> {
    check_name(name).map_err(|_| no_such_artifact(name))
}

pub(super) fn no_such_artifact(name: &str) -> Error {
    Error::NotFound(format!("there is no artifact named {name} in this workflow run"))
}

impl Services {
    /// Begins an upload and returns its link.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::AlreadyExists`] once the name is finalized in this run and attempt,
    /// [`Error::QuotaExceeded`].
    pub async fn create_artifact(&self, principal: &Principal, request: &Request<'_>) -> Result<String> {
        check_name(request.name)?;
        request.mime_type.map_or(Ok(()), check_mime_type)?;
        let now_ms = self.clock.now_ms();
        let settings = &self.settings.artifacts;
        let expires_at_ms = match request.expires_at_ms {
            Some(asked) if asked <= now_ms => return Err(Error::Invalid("expires_at is in the past".to_owned())),
            Some(asked) => asked.min(now_ms + millis(settings.max_retention)),
            None => now_ms + millis(settings.default_retention),
        };
        let new = NewArtifact {
            principal,
            name: request.name,
            version: request.version,
            mime_type: request.mime_type,
            created_at_ms: now_ms,
            expires_at_ms,
            max_per_job: limit(settings.max_per_job),
            max_pending_per_run: limit(settings.max_pending_per_run),
        };
        match self.db.create_artifact(&new).await? {
            Created::Upload(blob) => {
                failpoint::reach("intent_committed");
                let link_ends_ms = principal
                    .expires_at_ms
                    .min(now_ms + millis(self.settings.uploads.link_ttl));
                Ok(self
                    .papers
                    .sign_link(BlobKind::Artifact, Permission::Write, blob, link_ends_ms / 1000))
            }
            // GitHub's words, which users search for.
            Created::Exists => Err(Error::AlreadyExists(
                "an artifact with this name already exists on the workflow run".to_owned(),
            )),
            Created::TooMany => Err(too_many(settings)),
            Created::TooManyPending => Err(too_many_pending(settings)),
        }
    }

    /// Ends an upload: checks its size and hash, makes its content final and shows it. The same again returns the
    /// same id.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::FailedPrecondition`] without content; [`Error::Invalid`] for a wrong size or
    /// hash, and then the upload stays open; [`Error::Conflict`] if it is finalized otherwise or another job's.
    pub async fn finalize_artifact(
        &self,
        principal: &Principal,
        name: &str,
        size_bytes: u64,
        expected: Option<Sha256>,
    ) -> Result<ArtifactId> {
        check_known(name)?;
        for _ in 0..FINALIZE_TRIES {
            let candidate = self
                .db
                .finalize_candidate(principal, name, self.clock.now_ms())
                .await?
                .ok_or_else(|| no_such_artifact(name))?;
            let same_job = candidate.job_backend_id == principal.job_backend_id;
            if candidate.finalized {
                let same_hash = expected.is_none() || candidate.sha256.is_none() || candidate.sha256 == expected;
                return if same_job && candidate.size_bytes == size_bytes && same_hash {
                    Ok(candidate.id)
                } else {
                    Err(Error::Conflict(
                        "the artifact is finalized with other content".to_owned(),
                    ))
                };
            }
            if !same_job {
                return Err(Error::Conflict("another job's newer upload has this name".to_owned()));
            }
            if candidate.blob_state != Some(BlobState::Committed) {
                return Err(Error::FailedPrecondition(
                    "no block list or blob was committed yet".to_owned(),
                ));
            }
            if candidate.size_bytes != size_bytes {
                return Err(Error::Invalid(format!(
                    "the upload has {} bytes and not {size_bytes}",
                    candidate.size_bytes
                )));
            }
            failpoint::reach("finalize_before_hash");
            let sealing = match self.hash_in_time(candidate.blob, size_bytes).await? {
                Some(actual) => {
                    if let Some(expected) = expected.filter(|expected| *expected != actual) {
                        metrics::counter!("wharfinger_verification_failed_total").increment(1);
                        return Err(Error::Invalid(format!("the upload has {actual} and not {expected}")));
                    }
                    Sealing::Verified(actual)
                }
                None => Sealing::Pending(expected),
            };
            if self
                .db
                .finalize_artifact(&candidate, sealing, self.clock.now_ms())
                .await?
            {
                failpoint::reach("finalize_after_commit");
                if matches!(sealing, Sealing::Pending(_)) {
                    self.wake_verifier();
                }
                return Ok(candidate.id);
            }
        }
        Err(Error::Busy("the upload keeps changing, finalize it again".to_owned()))
    }

    /// The hash of an upload, if it is small enough and read soon enough to answer Finalize with.
    async fn hash_in_time(&self, blob: BlobId, size_bytes: u64) -> Result<Option<Sha256>> {
        if size_bytes > self.settings.verification.inline_max_bytes {
            return Ok(None);
        }
        let hash = self.hash_blob(blob, size_bytes, None);
        tokio::time::timeout(FINALIZE_PATIENCE, hash).await.unwrap_or(Ok(None))
    }

    /// The run's finalized artifacts, newest first; all of them, or those of one name or id.
    pub async fn list_artifacts(
        &self,
        principal: &Principal,
        name: Option<&str>,
        id: Option<ArtifactId>,
    ) -> Result<Vec<ListedArtifact>> {
        if name.is_some_and(|name| check_name(name).is_err()) {
            return Ok(Vec::new());
        }
        self.db.list_artifacts(principal, name, id, self.clock.now_ms()).await
    }

    /// The artifact that the run's list would show under a name.
    async fn named_artifact(&self, principal: &Principal, name: &str, now_ms: i64) -> Result<NewestArtifact> {
        check_known(name)?;
        let artifact = self.db.newest_artifact(principal, name, now_ms).await?;
        artifact.ok_or_else(|| no_such_artifact(name))
    }

    /// A link to an artifact's bytes.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn artifact_link(&self, principal: &Principal, name: &str) -> Result<String> {
        let now_ms = self.clock.now_ms();
        let artifact = self.named_artifact(principal, name, now_ms).await?;
        let link_ends_ms = now_ms + millis(self.settings.uploads.download_link_ttl);
        Ok(self
            .papers
            .sign_link(BlobKind::Artifact, Permission::Read, artifact.blob, link_ends_ms / 1000))
    }

    /// Deletes an artifact; its links end at once.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn delete_artifact(&self, principal: &Principal, name: &str) -> Result<ArtifactId> {
        let now_ms = self.clock.now_ms();
        let artifact = self.named_artifact(principal, name, now_ms).await?;
        if self.db.delete_artifact(&artifact, now_ms).await? {
            failpoint::reach("delete_tombstoned");
            Ok(artifact.id)
        } else {
            Err(no_such_artifact(name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_that_people_use_are_accepted() {
        for name in [
            "a",
            "small art",
            "..%2f..%2fx",
            ".hidden",
            "ünïcode 🚢",
            "';DROP TABLE artifacts;--",
            "{{7+7}}",
            "=cmd()",
        ] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        assert!(check_name(&"x".repeat(255)).is_ok());
    }

    #[test]
    fn names_that_harm_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a\\b",
            "a:b",
            "a\0b",
            "a\u{85}b",
            "a\u{202e}b",
            "a\u{feff}",
            "<b>",
            "a\nb",
        ] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert!(check_name(&"x".repeat(256)).is_err());
    }
}
