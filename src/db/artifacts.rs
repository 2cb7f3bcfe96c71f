//! Artifacts: names within a workflow run, each pointing at a blob.
//!
//! Called by `service/artifacts.rs` and `service/repositories.rs`. Every look-up carries the whole key of the run. Locks
//! are taken artifact first, blob second, here and wherever both are touched, so that no two transactions wait for each
//! other.

use std::iter;

use uuid::Uuid;

use super::blobs::{BEGIN, FORGET_UNLISTED, SEAL, UNLISTED_TO_GARBAGE, digest};
use super::cleaning::bury;
use super::sql::query;
use super::{Db, Failure, TRIES, lost_every_race, on, transaction, unsigned};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::model::{ArtifactId, BlobId, BlobKind, BlobState, Principal, Sha256};

/// What `CreateArtifact` asks for, checked.
#[derive(Clone, Debug)]
pub struct NewArtifact<'a> {
    pub principal: &'a Principal,
    pub name: &'a str,
    pub version: i32,
    pub mime_type: Option<&'a str>,
    pub created_at_ms: i64,
    pub expires_at_ms: i64,
    /// At most this many artifacts of the job's, where there is a limit.
    pub max_per_job: Option<i64>,
    /// At most this many artifacts of the run's that are pending, where there is a limit.
    pub max_pending_per_run: Option<i64>,
}

/// What became of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Created<T = BlobId> {
    /// Bytes go here.
    Upload(T),
    /// The name is finalized in this run and attempt, or clients of another kind upload to it.
    Exists,
    /// The job has as many artifacts as it may have.
    TooMany,
    /// The run has as many that are pending as it may have.
    TooManyPending,
}

/// The artifact that `FinalizeArtifact` means, as it stands.
#[derive(Clone, Debug)]
pub struct FinalizeCandidate {
    pub id: ArtifactId,
    pub job_backend_id: String,
    pub finalized: bool,
    pub blob: BlobId,
    pub blob_state: Option<BlobState>,
    pub revision: i64,
    pub size_bytes: u64,
    pub sha256: Option<Sha256>,
}

/// How much is known of a blob's hash when it is sealed.
#[derive(Clone, Copy, Debug)]
pub enum Sealing {
    /// The content hashes to this.
    Verified(Sha256),
    /// To be hashed in the background and compared with what the client said, if it said anything.
    Pending(Option<Sha256>),
}

/// A row of a run's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedArtifact {
    pub id: ArtifactId,
    pub name: String,
    /// The job that uploaded it.
    pub job_backend_id: String,
    pub size_bytes: u64,
    pub created_at_ms: i64,
    pub sha256: Option<Sha256>,
    /// Of a container: the lengths of its files.
    pub files_bytes: Option<u64>,
}

/// The one artifact that a name means to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewestArtifact {
    pub id: ArtifactId,
    pub blob: BlobId,
}

/// Locks the row of a name in a run and attempt, so that any number of creates of it go one after the other.
pub(super) const LOCK_NAME: &str = "UPDATE artifacts SET state = state
    WHERE issuer = $1 AND repository = $2 AND run_backend_id = $3 AND name = $4 AND run_attempt = $5
    RETURNING id, state, blob_id, container_id, expires_at_ms";

/// No row if another request made one at the same moment.
pub(super) const INSERT_ARTIFACT: &str = "INSERT INTO artifacts (issuer, repository, run_backend_id, name, run_attempt,
        job_backend_id, repository_name, run_id, version, mime_type, state, blob_id, created_at_ms, expires_at_ms,
        container_id)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 'pending', $11, $12, $13, $14)
    ON CONFLICT (issuer, repository, run_backend_id, name, run_attempt) DO NOTHING
    RETURNING id";

pub(super) const COUNT_OF_JOB: &str = "SELECT count(*) FROM artifacts
    WHERE issuer = $1 AND repository = $2 AND run_backend_id = $3 AND run_attempt = $4 AND job_backend_id = $5";

pub(super) const COUNT_PENDING_OF_RUN: &str = "SELECT count(*) FROM artifacts
    WHERE issuer = $1 AND repository = $2 AND run_backend_id = $3 AND state = 'pending'";

/// Which limit an artifact that was just placed is over, if it is. Nothing is counted where there is no limit.
macro_rules! over_limit {
    ($tx:expr, $new:expr) => {{
        let (principal, mut over) = ($new.principal, None);
        if let Some(limit) = $new.max_per_job {
            let count: i64 = query($crate::db::artifacts::COUNT_OF_JOB)
                .bind_run(&principal.run)
                .bind(principal.run_attempt)
                .bind(&principal.job_backend_id)
                .fetch_one($tx)
                .await?;
            if count > limit {
                over = Some($crate::db::artifacts::Created::TooMany);
            }
        }
        if let Some(limit) = $new.max_pending_per_run {
            let count: i64 = query($crate::db::artifacts::COUNT_PENDING_OF_RUN)
                .bind_run(&principal.run)
                .fetch_one($tx)
                .await?;
            if count > limit {
                over = Some($crate::db::artifacts::Created::TooManyPending);
            }
        }
        over
    }};
}
pub(super) use over_limit;

/// Id, blob, name, job, size, creation, SHA-256, and what its files have together.
type SeenRow = (i64, Uuid, String, String, i64, i64, Option<Vec<u8>>, Option<i64>);

/// What a job of a first attempt sees: the run's artifacts, narrowed by one more condition. A text for each condition, so
/// that each is planned for itself. No client keeps more than 10,000; the number stands in the text because SQLite plans
/// anew whenever a limit is bound.
macro_rules! seen_by_first_attempt {
    ($condition:literal) => {
        concat!(
            "SELECT a.id, a.blob_id, a.name, a.job_backend_id, b.size_bytes, a.created_at_ms, b.sha256,
                 (SELECT published_bytes FROM containers WHERE blob_id = a.container_id)
             FROM artifacts a JOIN blobs b ON b.id = a.blob_id
             WHERE a.issuer = $1 AND a.repository = $2 AND a.run_backend_id = $3 AND a.run_attempt <= $4
                 AND a.state = 'finalized' AND a.expires_at_ms > $5 ",
            $condition,
            " ORDER BY a.created_at_ms DESC, a.id DESC LIMIT 10000"
        )
    };
}

/// What a job of a later attempt ($4) sees, besides its own attempt's: what jobs made that were not run again since.
/// Of two with one name the newer attempt's. $6 is the job that asks: it was run again, whatever it made until now. No
/// look from each row at all others, for which Postgres reads the whole run again.
macro_rules! seen_by_later_attempt {
    ($condition:literal) => {
        concat!(
            "SELECT a.id, a.blob_id, a.name, a.job_backend_id, b.size_bytes, a.created_at_ms, b.sha256,
                 (SELECT published_bytes FROM containers WHERE blob_id = a.container_id)
             FROM (
                 SELECT id, name, run_attempt, job_backend_id, created_at_ms, blob_id, container_id,
                     row_number() OVER (PARTITION BY name ORDER BY run_attempt DESC) AS age,
                     max(run_attempt) OVER (PARTITION BY job_backend_id) AS last_attempt_of_job
                 FROM artifacts
                 WHERE issuer = $1 AND repository = $2 AND run_backend_id = $3 AND run_attempt <= $4
                     AND state = 'finalized' AND expires_at_ms > $5
             ) a JOIN blobs b ON b.id = a.blob_id
             WHERE a.age = 1 AND a.run_attempt = CASE a.job_backend_id WHEN $6 THEN $4 ELSE a.last_attempt_of_job END ",
            $condition,
            " ORDER BY a.created_at_ms DESC, a.id DESC LIMIT 10000"
        )
    };
}

impl Db {
    /// Begins an upload. Over a name that is still pending the newest wins, with a fresh blob.
    pub async fn create_artifact(&self, new: &NewArtifact<'_>) -> Result<Created> {
        for _ in 0..TRIES {
            if let Some(created) = self.try_create_artifact(new).await? {
                return Ok(created);
            }
        }
        Err(lost_every_race())
    }

    /// `None` if another request got in between.
    async fn try_create_artifact(&self, new: &NewArtifact<'_>) -> Result<Option<Created>> {
        let NewArtifact {
            principal,
            name,
            version,
            mime_type,
            created_at_ms: now_ms,
            ..
        } = *new;
        let run = &principal.run;
        let blob = BlobId::fresh();
        let mut refused = None;
        let created = transaction!(self, Durable, |tx| {
            refused = None;
            type There = (i64, String, Uuid, Option<Uuid>, i64);
            let there: Option<There> = query(LOCK_NAME)
                .bind_run(run)
                .bind(name)
                .bind(principal.run_attempt)
                .fetch_optional(tx)
                .await?;
            let mut pending = None;
            if let Some((id, state, old_blob, container, expires_at_ms)) = there {
                let is_pending = state == "pending";
                if state == "finalized" && expires_at_ms > now_ms || is_pending && container.is_some() {
                    refused = Some(Created::Exists);
                }
                // The older upload ends here, whoever began it.
                let tombstone = if is_pending { "superseded" } else { "expired" };
                bury(tx, iter::once(old_blob).chain(container), tombstone, now_ms).await?;
                if is_pending {
                    pending = Some(id);
                } else {
                    // What was finalized under an id never changes: whoever comes now gets another.
                    query("DELETE FROM artifacts WHERE id = $1")
                        .bind(id)
                        .execute(tx)
                        .await?;
                }
            }
            query(BEGIN)
                .bind(blob.0)
                .bind(BlobKind::Artifact.as_str())
                .bind(now_ms)
                .execute(tx)
                .await?;
            let placed = if let Some(id) = pending {
                query(
                    "UPDATE artifacts SET blob_id = $2, job_backend_id = $3, version = $4, mime_type = $5,
                         created_at_ms = $6, expires_at_ms = $7
                     WHERE id = $1",
                )
                .bind(id)
                .bind(blob.0)
                .bind(&principal.job_backend_id)
                .bind(version)
                .bind(mime_type)
                .bind(now_ms)
                .bind(new.expires_at_ms)
                .execute(tx)
                .await?
                    == 1
            } else {
                let id: Option<i64> = query(INSERT_ARTIFACT)
                    .bind_run(run)
                    .bind(name)
                    .bind(principal.run_attempt)
                    .bind(&principal.job_backend_id)
                    .bind(principal.repository_name.as_deref())
                    .bind(principal.run_id)
                    .bind(version)
                    .bind(mime_type)
                    .bind(blob.0)
                    .bind(now_ms)
                    .bind(new.expires_at_ms)
                    .bind(None::<Uuid>)
                    .fetch_optional(tx)
                    .await?;
                id.is_some()
            };
            if placed && refused.is_none() {
                refused = over_limit!(tx, new);
            }
            (placed && refused.is_none()).then_some(())
        });
        match created {
            // Whether or not it came to be, the next takes its place.
            Err(Failure::Unknown(_)) => Ok(None),
            created => Ok(created?.map(|()| Created::Upload(blob)).or(refused)),
        }
    }

    /// The artifact that a job is about to finalize, if it lives at `now_ms`.
    pub async fn finalize_candidate(
        &self,
        principal: &Principal,
        name: &str,
        now_ms: i64,
    ) -> Result<Option<FinalizeCandidate>> {
        type Row = (i64, String, String, Uuid, String, i64, i64, Option<Vec<u8>>);
        let run = &principal.run;
        let row: Option<Row> = on!(self, Reading, |conn| {
            query(
                "SELECT a.id, a.job_backend_id, a.state, b.id, b.state, b.revision, b.size_bytes, b.sha256
                 FROM artifacts a JOIN blobs b ON b.id = a.blob_id
                 WHERE a.issuer = $1 AND a.repository = $2 AND a.run_backend_id = $3 AND a.name = $4
                     AND a.run_attempt = $5 AND a.expires_at_ms > $6",
            )
            .bind_run(run)
            .bind(name)
            .bind(principal.run_attempt)
            .bind(now_ms)
            .fetch_optional(conn)
            .await?
        });
        row.map(
            |(id, job_backend_id, state, blob, blob_state, revision, size, sha256)| {
                Ok(FinalizeCandidate {
                    id: ArtifactId(id),
                    job_backend_id,
                    finalized: state == "finalized",
                    blob: BlobId(blob),
                    blob_state: BlobState::parse(&blob_state),
                    revision,
                    size_bytes: unsigned(size)?,
                    sha256: digest(sha256)?,
                })
            },
        )
        .transpose()
    }

    /// Seals the blob's content of that revision and shows the artifact, in one step.
    /// `false` if the artifact or the content changed since the candidate was read, or if it may have been sealed
    /// now and nobody said so: look again.
    pub async fn finalize_artifact(
        &self,
        candidate: &FinalizeCandidate,
        sealing: Sealing,
        now_ms: i64,
    ) -> Result<bool> {
        let (verification, sha256) = match sealing {
            Sealing::Verified(sha256) => ("verified", Some(sha256)),
            Sealing::Pending(expected) => ("pending", expected),
        };
        let done = transaction!(self, Durable, |tx| {
            let shown = query(
                "UPDATE artifacts SET state = 'finalized', finalized_at_ms = $3
                 WHERE id = $1 AND blob_id = $2 AND state = 'pending'",
            )
            .bind(candidate.id.0)
            .bind(candidate.blob.0)
            .bind(now_ms)
            .execute(tx)
            .await?;
            let sealed = query(SEAL)
                .bind(candidate.blob.0)
                .bind(candidate.revision)
                .bind(verification)
                .bind(sha256.map(|sha256| sha256.0.to_vec()))
                .bind(now_ms)
                .execute(tx)
                .await?;
            if sealed == 1 && shown == 1 {
                let late = query(UNLISTED_TO_GARBAGE)
                    .bind(candidate.blob.0)
                    .bind(now_ms)
                    .execute(tx)
                    .await?;
                if late > 0 {
                    query(FORGET_UNLISTED).bind(candidate.blob.0).execute(tx).await?;
                }
                failpoint::reach("finalize_before_commit");
                Some(())
            } else {
                None
            }
        });
        match done {
            Err(Failure::Unknown(_)) => Ok(false),
            done => Ok(done?.is_some()),
        }
    }

    /// The finalized artifacts of a run that live at `now_ms`, newest first. An attempt sees its own, and of earlier
    /// attempts those whose jobs were not run again; of two with one name the newer attempt's.
    pub async fn list_artifacts(
        &self,
        principal: &Principal,
        name: Option<&str>,
        id: Option<ArtifactId>,
        now_ms: i64,
    ) -> Result<Vec<ListedArtifact>> {
        let rows = self.seen(principal, name, id, now_ms).await?;
        let listed = rows.into_iter().filter(|row| id.is_none_or(|id| row.0 == id.0));
        listed
            .map(
                |(id, _, name, job_backend_id, size, created_at_ms, sha256, files_bytes)| {
                    Ok(ListedArtifact {
                        id: ArtifactId(id),
                        name,
                        job_backend_id,
                        size_bytes: unsigned(size)?,
                        created_at_ms,
                        sha256: digest(sha256)?,
                        files_bytes: files_bytes.map(unsigned).transpose()?,
                    })
                },
            )
            .collect()
    }

    /// The finalized artifact of that name that the list would show.
    pub async fn newest_artifact(
        &self,
        principal: &Principal,
        name: &str,
        now_ms: i64,
    ) -> Result<Option<NewestArtifact>> {
        if principal.run_attempt > 1 {
            let rows = self.seen(principal, Some(name), None, now_ms).await?;
            return Ok(rows.first().map(|row| NewestArtifact {
                id: ArtifactId(row.0),
                blob: BlobId(row.1),
            }));
        }
        // A first attempt's is found by its key alone, at half the cost.
        let run = &principal.run;
        let row: Option<(i64, Uuid)> = on!(self, Reading, |conn| {
            query(
                "SELECT id, blob_id FROM artifacts
                 WHERE issuer = $1 AND repository = $2 AND run_backend_id = $3 AND name = $4 AND run_attempt = $5
                     AND state = 'finalized' AND expires_at_ms > $6",
            )
            .bind_run(run)
            .bind(name)
            .bind(principal.run_attempt)
            .bind(now_ms)
            .fetch_optional(conn)
            .await?
        });
        Ok(row.map(|(id, blob)| NewestArtifact {
            id: ArtifactId(id),
            blob: BlobId(blob),
        }))
    }

    async fn seen(
        &self,
        principal: &Principal,
        name: Option<&str>,
        id: Option<ArtifactId>,
        now_ms: i64,
    ) -> Result<Vec<SeenRow>> {
        let is_first = principal.run_attempt == 1;
        let text = match (name, id, is_first) {
            (Some(_), _, true) => seen_by_first_attempt!("AND a.name = $6"),
            (None, Some(_), true) => seen_by_first_attempt!("AND a.id = $6"),
            (None, None, true) => seen_by_first_attempt!(""),
            (Some(_), _, false) => seen_by_later_attempt!("AND a.name = $7"),
            (None, Some(_), false) => seen_by_later_attempt!("AND a.id = $7"),
            (None, None, false) => seen_by_later_attempt!(""),
        };
        let run = &principal.run;
        let rows = on!(self, Reading, |conn| {
            let mut query = query(text).bind_run(run).bind(principal.run_attempt).bind(now_ms);
            if !is_first {
                query = query.bind(&principal.job_backend_id);
            }
            let query = match (name, id) {
                (Some(name), _) => query.bind(name),
                (None, Some(id)) => query.bind(id.0),
                (None, None) => query,
            };
            query.fetch_all(conn).await?
        });
        Ok(rows)
    }

    /// Takes an artifact out of everybody's sight and ends its links. `false` if it was gone already.
    pub async fn delete_artifact(&self, artifact: &NewestArtifact, now_ms: i64) -> Result<bool> {
        match self.try_delete_artifact(artifact, now_ms).await {
            // It was there a moment ago. If it is gone, this has done it; if not, it is done now.
            Err(Failure::Unknown(_)) => self.try_delete_artifact(artifact, now_ms).await.map(|_| true),
            deleted => deleted,
        }
        .map_err(Error::from)
    }

    async fn try_delete_artifact(&self, artifact: &NewestArtifact, now_ms: i64) -> std::result::Result<bool, Failure> {
        let deleted = transaction!(self, Durable, |tx| {
            let hidden: Option<(Uuid, Option<Uuid>)> = query(
                "DELETE FROM artifacts WHERE id = $1 AND blob_id = $2 AND state = 'finalized'
                 RETURNING blob_id, container_id",
            )
            .bind(artifact.id.0)
            .bind(artifact.blob.0)
            .fetch_optional(tx)
            .await?;
            if let Some((blob, container)) = hidden {
                bury(tx, iter::once(blob).chain(container), "deleted", now_ms).await?;
                failpoint::reach("delete_before_commit");
                Some(())
            } else {
                None
            }
        })?;
        Ok(deleted.is_some())
    }
}
