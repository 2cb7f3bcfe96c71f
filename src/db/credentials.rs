//! What papers are checked against: signing keys, API tokens, closed runs.
//!
//! Called by `service/credentials.rs`, `service/cleaner.rs` and `app`. Knows no secret: of an API token only a hash comes
//! here, of a signing key only its id.

use super::sql::query;
use super::{Db, on, transaction};
use crate::error::{Error, Result};
use crate::model::{Access, ApiToken, ClosedRun, Repositories, SigningKey};

type KeyRow = (String, i64, i64, Option<i64>);
type TokenRow = (
    Vec<u8>,
    String,
    String,
    Option<String>,
    Option<String>,
    String,
    i64,
    i64,
    Option<i64>,
    Option<i64>,
);
type ClosedRow = (String, String, String, String, i64, i64);

fn signing_key((id, created_at_ms, signs_from_ms, retired_at_ms): KeyRow) -> SigningKey {
    SigningKey {
        id,
        created_at_ms,
        signs_from_ms,
        retired_at_ms,
    }
}

fn api_token(row: TokenRow) -> Result<(ApiToken, Vec<u8>)> {
    let (secret_sha256, id, name, issuer, repositories, access, created_at_ms, expires_at_ms, used, revoked) = row;
    let access =
        Access::parse(&access).ok_or_else(|| Error::Internal(format!("an API token with the access {access}")))?;
    let listed = |text: String| Repositories::Some(text.split(' ').map(str::to_owned).collect());
    let token = ApiToken {
        id,
        name,
        issuer,
        repositories: repositories.map_or(Repositories::All, listed),
        access,
        created_at_ms,
        expires_at_ms,
        last_used_at_ms: used,
        revoked_at_ms: revoked,
    };
    Ok((token, secret_sha256))
}

/// An empty text stands for "whichever".
fn given(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl Db {
    /// All signing keys, retired ones too, the oldest first.
    pub async fn signing_keys(&self) -> Result<Vec<SigningKey>> {
        let rows: Vec<KeyRow> = on!(self, Reading, |conn| {
            query("SELECT id, created_at_ms, signs_from_ms, retired_at_ms FROM signing_keys ORDER BY signs_from_ms, id")
                .fetch_all(conn)
                .await?
        });
        Ok(rows.into_iter().map(signing_key).collect())
    }

    /// Adds a key that signs from `signs_from_ms` on.
    pub async fn add_signing_key(&self, now_ms: i64, signs_from_ms: i64) -> Result<SigningKey> {
        let row: Option<KeyRow> = transaction!(self, Durable, |tx| {
            // Of two that rotate at once the second waits here, or is refused by the key.
            let (count,): (i64,) = query("SELECT COUNT(*) FROM signing_keys").fetch_one(tx).await?;
            query(
                "INSERT INTO signing_keys (id, created_at_ms, signs_from_ms) VALUES ($1, $2, $3)
                 ON CONFLICT (id) DO NOTHING RETURNING id, created_at_ms, signs_from_ms, retired_at_ms",
            )
            .bind((count + 1).to_string())
            .bind(now_ms)
            .bind(signs_from_ms)
            .fetch_optional(tx)
            .await?
        })?;
        row.map(signing_key)
            .ok_or_else(|| Error::Conflict("another key was added at the same time: look at the list".to_owned()))
    }

    /// Retires a key, if a newer one has been signing since `superseded_since_ms` or before, or if it never signed.
    /// So the newest that signs always stays. Whether it was retired.
    pub async fn retire_signing_key(&self, id: &str, now_ms: i64, superseded_since_ms: i64) -> Result<bool> {
        let retired = on!(self, Durable, |conn| {
            query(
                "UPDATE signing_keys SET retired_at_ms = $2
                 WHERE id = $1 AND retired_at_ms IS NULL AND (signs_from_ms > $2 OR EXISTS (
                     SELECT 1 FROM signing_keys newer WHERE newer.retired_at_ms IS NULL
                     AND newer.signs_from_ms > signing_keys.signs_from_ms AND newer.signs_from_ms <= $3))",
            )
            .bind(id)
            .bind(now_ms)
            .bind(superseded_since_ms)
            .execute(conn)
            .await?
        });
        Ok(retired > 0)
    }

    /// Keeps a new API token.
    pub async fn add_api_token(&self, token: &ApiToken, secret_sha256: &[u8]) -> Result<()> {
        let repositories = match &token.repositories {
            Repositories::All => None,
            Repositories::Some(listed) => Some(listed.join(" ")),
        };
        on!(self, Durable, |conn| {
            query(
                "INSERT INTO api_tokens
                 (id, secret_sha256, name, issuer, repositories, access, created_at_ms, expires_at_ms)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            )
            .bind(&token.id)
            .bind(secret_sha256)
            .bind(&token.name)
            .bind(&token.issuer)
            .bind(repositories)
            .bind(token.access.as_str())
            .bind(token.created_at_ms)
            .bind(token.expires_at_ms)
            .execute(conn)
            .await?;
        });
        Ok(())
    }

    /// All API tokens, expired and revoked ones too, the oldest first.
    pub async fn api_tokens(&self) -> Result<Vec<ApiToken>> {
        let rows = self.token_rows(None).await?;
        rows.into_iter()
            .map(|row| api_token(row).map(|(token, _)| token))
            .collect()
    }

    /// An API token, and the hash of its secret.
    pub async fn api_token(&self, id: &str) -> Result<Option<(ApiToken, Vec<u8>)>> {
        let mut rows = self.token_rows(Some(id)).await?;
        rows.pop().map(api_token).transpose()
    }

    async fn token_rows(&self, id: Option<&str>) -> Result<Vec<TokenRow>> {
        let rows = on!(self, Reading, |conn| {
            query(
                "SELECT secret_sha256, id, name, issuer, repositories, access, created_at_ms, expires_at_ms,
                     last_used_at_ms, revoked_at_ms
                 FROM api_tokens WHERE (CAST($1 AS TEXT) IS NULL OR id = $1) ORDER BY created_at_ms, id",
            )
            .bind(id)
            .fetch_all(conn)
            .await?
        });
        Ok(rows)
    }

    /// Notes that an API token was used.
    pub async fn note_api_token_use(&self, id: &str, now_ms: i64) -> Result<()> {
        on!(self, Staging, |conn| {
            query("UPDATE api_tokens SET last_used_at_ms = $2 WHERE id = $1")
                .bind(id)
                .bind(now_ms)
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    /// Ends an API token. Whether there was one that had not ended that way.
    pub async fn revoke_api_token(&self, id: &str, now_ms: i64) -> Result<bool> {
        let revoked = on!(self, Durable, |conn| {
            query("UPDATE api_tokens SET revoked_at_ms = $2 WHERE id = $1 AND revoked_at_ms IS NULL")
                .bind(id)
                .bind(now_ms)
                .execute(conn)
                .await?
        });
        Ok(revoked > 0)
    }

    /// Notes that a run or a job was closed; closed again, it is closed for longer.
    pub async fn close_run(&self, run: &ClosedRun) -> Result<()> {
        on!(self, Durable, |conn| {
            query(
                "INSERT INTO closed_runs (issuer, repository, run, job, closed_at_ms, ends_issued_until_ms)
                 VALUES ($1, $2, $3, $4, $5, $6)
                 ON CONFLICT (issuer, repository, run, job) DO UPDATE
                 SET closed_at_ms = excluded.closed_at_ms, ends_issued_until_ms = excluded.ends_issued_until_ms",
            )
            .bind(run.issuer.as_deref().unwrap_or_default())
            .bind(&run.repository)
            .bind(&run.run)
            .bind(run.job.as_deref().unwrap_or_default())
            .bind(run.closed_at_ms)
            .bind(run.ends_issued_until_ms)
            .execute(conn)
            .await?;
        });
        Ok(())
    }

    /// What was closed at `since_ms` or later.
    pub async fn closed_runs(&self, since_ms: i64) -> Result<Vec<ClosedRun>> {
        let rows: Vec<ClosedRow> = on!(self, Reading, |conn| {
            query(
                "SELECT issuer, repository, run, job, closed_at_ms, ends_issued_until_ms
                 FROM closed_runs WHERE closed_at_ms >= $1",
            )
            .bind(since_ms)
            .fetch_all(conn)
            .await?
        });
        let closed = |(issuer, repository, run, job, closed_at_ms, ends_issued_until_ms)| ClosedRun {
            issuer: given(issuer),
            repository,
            run,
            job: given(job),
            closed_at_ms,
            ends_issued_until_ms,
        };
        Ok(rows.into_iter().map(closed).collect())
    }

    /// Forgets what was closed before `before_ms`.
    pub async fn forget_closed_runs(&self, before_ms: i64) -> Result<()> {
        on!(self, Staging, |conn| {
            query("DELETE FROM closed_runs WHERE closed_at_ms < $1")
                .bind(before_ms)
                .execute(conn)
                .await?;
        });
        Ok(())
    }
}
