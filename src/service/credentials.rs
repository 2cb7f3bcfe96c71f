//! What papers are checked against, and who changes it: signing keys, API tokens, closed runs.
//!
//! Called by `api/` and `cli/`; a task of `app` keeps the papers in this process's memory up to date. The database is
//! the only truth; another replica follows within [`REFRESH_EVERY`].

use std::time::Duration;

use secrecy::SecretString;

use super::{Services, millis};
use crate::error::{Error, Result};
use crate::model::{Access, ApiToken, ClosedRun, Principal, Repositories, SigningKey};
use crate::papers::{ApiTokenText, MINTED_MAX_LIFETIME, is_backend_id, is_repository, repository_key};

/// How long a replica may not know what another one was told.
pub const REFRESH_EVERY: Duration = Duration::from_secs(2);
/// How far the clocks of replicas may be apart.
const MAX_SKEW_MS: i64 = 60_000;
/// The use of an API token is noted at most so often.
const NOTE_USE_EVERY_MS: i64 = 5 * 60_000;
const MAX_NAME_BYTES: usize = 200;

/// What a new API token is to be.
#[derive(Clone, Debug)]
pub struct NewApiToken {
    /// What it is for, for people.
    pub name: String,
    /// `None`: the repositories of every issuer.
    pub issuer: Option<String>,
    pub repositories: Repositories,
    pub access: Access,
    pub lives_for: Duration,
}

/// A run, or one of its jobs, as whoever closes it names it.
#[derive(Clone, Debug)]
pub struct RunToClose {
    /// `None`: whoever's.
    pub issuer: Option<String>,
    /// `owner/name`, or the repository's number at the forge.
    pub repository: String,
    /// Its number, or the id in its tokens' scope.
    pub run: String,
}

/// The key of a repository that people name: `owner/name`, or its number at the forge.
///
/// # Errors
/// [`Error::Invalid`] if it is neither.
pub fn key_of(repository: &str) -> Result<String> {
    match repository.parse::<i64>() {
        Ok(id) if id > 0 && repository.bytes().all(|byte| byte.is_ascii_digit()) => Ok(format!("id:{id}")),
        _ if is_repository(repository) => Ok(repository_key(repository)),
        _ => Err(Error::Invalid(
            "a repository is owner/name, or its number at the forge".to_owned(),
        )),
    }
}

impl Services {
    /// Brings what this process knows of keys and closed runs up to date.
    pub async fn refresh_papers(&self) -> Result<()> {
        let now_ms = self.clock.now_ms();
        let keys = self.db.signing_keys().await?;
        self.papers.use_keys(&keys, now_ms).map_err(Error::Internal)?;
        let known_until_ms = self.papers.closed_runs_known_until_ms();
        // What was closed by a clock that is behind is not missed.
        let closed = self.db.closed_runs(known_until_ms - 2 * MAX_SKEW_MS).await?;
        self.papers.close_runs(closed, now_ms);
        Ok(())
    }

    /// Does so for ever.
    pub async fn refresh_papers_in_background(&self) {
        let mut failed = false;
        loop {
            tokio::time::sleep(REFRESH_EVERY).await;
            match self.refresh_papers().await {
                Ok(()) => failed = false,
                // Once, and not every two seconds.
                Err(error) if !failed => {
                    failed = true;
                    tracing::warn!(%error, "cannot read which keys are in use and which runs are closed; the last known stay");
                }
                Err(_) => {}
            }
        }
    }

    /// Adds a signing key. It signs `after` so long, that every replica knows it by then.
    pub async fn rotate_keys(&self, after: Duration) -> Result<SigningKey> {
        let now_ms = self.clock.now_ms();
        let key = self.db.add_signing_key(now_ms, now_ms + millis(after)).await?;
        self.refresh_papers().await?;
        Ok(key)
    }

    /// All signing keys, retired ones too, the oldest first.
    pub async fn signing_keys(&self) -> Result<Vec<SigningKey>> {
        self.db.signing_keys().await
    }

    /// How long what a key signed may be in use after another one took over.
    pub fn signed_lives_for_ms(&self) -> i64 {
        let uploads = &self.settings.uploads;
        let links = uploads.link_ttl.max(uploads.download_link_ttl);
        millis(links.max(MINTED_MAX_LIFETIME)) + MAX_SKEW_MS
    }

    /// Retires a signing key: what it signed is refused from now on. `at_once`: also what may still be in use.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] says what is in the way.
    pub async fn retire_key(&self, id: &str, at_once: bool) -> Result<()> {
        let now_ms = self.clock.now_ms();
        let lives_for_ms = if at_once { 0 } else { self.signed_lives_for_ms() };
        if self.db.retire_signing_key(id, now_ms, now_ms - lives_for_ms).await? {
            return self.refresh_papers().await;
        }
        let keys = self.db.signing_keys().await?;
        let key = keys.iter().find(|key| key.id == id && key.retired_at_ms.is_none());
        let Some(key) = key else {
            return Err(Error::NotFound(format!("there is no key {id} that is not retired")));
        };
        let is_newer = |other: &&SigningKey| {
            other.retired_at_ms.is_none() && (key.signs_from_ms + 1..=now_ms).contains(&other.signs_from_ms)
        };
        Err(Error::FailedPrecondition(match keys.iter().find(is_newer) {
            None => format!("key {id} signs: rotate first, and wait until the new key does"),
            Some(newer) => {
                let ends_ms = newer.signs_from_ms + lives_for_ms - now_ms;
                let wait = Duration::from_secs(ends_ms.unsigned_abs().div_ceil(1000));
                format!(
                    "what key {id} signed may be in use for another {}: wait, or end it now with --at-once",
                    humantime::format_duration(wait)
                )
            }
        }))
    }

    /// Makes an API token. Its text is returned once and kept nowhere.
    ///
    /// # Errors
    /// [`Error::Invalid`] says what is wrong.
    pub async fn create_api_token(&self, new: NewApiToken) -> Result<(ApiToken, SecretString)> {
        let NewApiToken {
            name,
            issuer,
            repositories,
            access,
            lives_for,
        } = new;
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(char::is_control) {
            return Err(Error::Invalid(format!(
                "a token's name is 1 to {MAX_NAME_BYTES} bytes without control characters"
            )));
        }
        if lives_for < Duration::from_secs(1) {
            return Err(Error::Invalid("a token lives at least a second".to_owned()));
        }
        if let Repositories::Some(listed) = &repositories
            && listed.is_empty()
        {
            return Err(Error::Invalid("a token is for at least one repository".to_owned()));
        }
        let (read, text) = ApiTokenText::fresh();
        let now_ms = self.clock.now_ms();
        let token = ApiToken {
            id: read.id,
            name,
            issuer,
            repositories,
            access,
            created_at_ms: now_ms,
            expires_at_ms: now_ms.saturating_add(millis(lives_for)),
            last_used_at_ms: None,
            revoked_at_ms: None,
        };
        self.db.add_api_token(&token, &read.secret_sha256).await?;
        Ok((token, text))
    }

    /// All API tokens, expired and revoked ones too, the oldest first.
    pub async fn api_tokens(&self) -> Result<Vec<ApiToken>> {
        self.db.api_tokens().await
    }

    /// Ends an API token at once, on all replicas.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is none that could end.
    pub async fn revoke_api_token(&self, id: &str) -> Result<()> {
        if self.db.revoke_api_token(id, self.clock.now_ms()).await? {
            Ok(())
        } else {
            Err(Error::NotFound(format!(
                "there is no token {id} that is not revoked: `wharfinger token list` shows the ids"
            )))
        }
    }

    /// Says whose an API token is.
    ///
    /// # Errors
    /// [`Error::Unauthorized`], whatever is wrong; its reason is for the log only.
    pub async fn verify_api_token(&self, text: &str) -> Result<ApiToken> {
        let refuse = |reason: &str| Error::Unauthorized(reason.to_owned());
        let presented = ApiTokenText::read(text).ok_or_else(|| refuse("not an API token, or mistyped"))?;
        let known = self.db.api_token(&presented.id).await?;
        let (token, secret_sha256) = known.ok_or_else(|| refuse("no such API token"))?;
        let now_ms = self.clock.now_ms();
        if !presented.matches(&secret_sha256) {
            return Err(refuse("the API token's secret is wrong"));
        }
        if token.revoked_at_ms.is_some() {
            return Err(refuse("the API token was revoked"));
        }
        if now_ms >= token.expires_at_ms {
            return Err(refuse("the API token has expired"));
        }
        if token
            .last_used_at_ms
            .is_none_or(|used_at_ms| now_ms >= used_at_ms + NOTE_USE_EVERY_MS)
        {
            // The token is good, whether or not this is noted.
            if let Err(error) = self.db.note_api_token_use(&token.id, now_ms).await {
                tracing::warn!(%error, "the use of an API token was not noted");
            }
        }
        Ok(token)
    }

    /// Ends the runtime tokens of a run that were made until now. Those of its next attempt are good, if they are made
    /// a minute later: clocks may differ by so much.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the repository or the run is none.
    pub async fn close_run(&self, run: RunToClose) -> Result<()> {
        let RunToClose {
            issuer,
            repository,
            run,
        } = run;
        if !is_backend_id(&run) {
            return Err(Error::Invalid("a run has a number or an id".to_owned()));
        }
        let closed_at_ms = self.clock.now_ms();
        self.close(ClosedRun {
            issuer,
            repository: key_of(&repository)?,
            run,
            job: None,
            closed_at_ms,
            ends_issued_until_ms: closed_at_ms + MAX_SKEW_MS,
        })
        .await
    }

    /// Ends the runtime tokens of the caller's job.
    pub async fn close_job(&self, principal: &Principal) -> Result<()> {
        let closed_at_ms = self.clock.now_ms();
        let run = &principal.run;
        self.close(ClosedRun {
            issuer: Some(run.issuer.clone()),
            repository: run.repository.clone(),
            run: run.run_backend_id.clone(),
            job: Some(principal.job_backend_id.clone()),
            closed_at_ms,
            ends_issued_until_ms: principal.issued_at_ms.unwrap_or(closed_at_ms).max(closed_at_ms),
        })
        .await
    }

    async fn close(&self, closed: ClosedRun) -> Result<()> {
        self.db.close_run(&closed).await?;
        let (issuer, repository, run, job) = (&closed.issuer, &closed.repository, &closed.run, &closed.job);
        tracing::info!(issuer, repository, run, job, "closed: its runtime tokens end");
        self.papers.close_runs([closed], self.clock.now_ms());
        Ok(())
    }
}
