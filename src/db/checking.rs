//! What `fsck` and the scrub ask of the database, and what little they may change: marking bytes as lost, and
//! counting anew.
//!
//! Called by `service/fsck.rs` and `service/scrub.rs`.

use uuid::Uuid;

use super::blobs::digest;
use super::sql::query;
use super::{Db, on, transaction, unsigned};
use crate::error::Result;
use crate::model::{BlobId, BlobState, ObjectKey, Sha256};

/// A finalized blob as the database describes it.
#[derive(Clone, Debug)]
pub struct SealedBlob {
    pub id: BlobId,
    pub size_bytes: u64,
    /// What the content hashes to, if it was hashed here.
    pub sha256: Option<Sha256>,
}

/// Whose an object in the store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A block's row names it.
    Named,
    /// No row names it, but the cleaner will come for it.
    Expected,
    /// Nobody knows it.
    Unknown,
}

/// Things that the cleaner should have taken away by now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overdue {
    pub uploads: i64,
    pub tombstones: i64,
    pub garbage: i64,
}

/// A repository whose counted cache size is not the sum of its entries'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miscount {
    pub repository: i64,
    pub counted_bytes: i64,
    pub actual_bytes: i64,
}

type SealedRow = (Uuid, i64, Option<Vec<u8>>);

fn sealed_blob((id, size, sha256): SealedRow) -> Result<SealedBlob> {
    Ok(SealedBlob {
        id: BlobId(id),
        size_bytes: unsigned(size)?,
        sha256: digest(sha256)?,
    })
}

impl Db {
    /// Finalized blobs whose bytes are not known to be lost, in the order of their ids, after `after`.
    pub async fn sealed_blobs(&self, after: BlobId, limit: i64) -> Result<Vec<SealedBlob>> {
        let rows: Vec<SealedRow> = on!(self, Reading, |conn| {
            query(
                "SELECT b.id, b.size_bytes, CASE WHEN b.verification = 'verified' THEN b.sha256 END
                 FROM blobs b
                 WHERE b.id > $1 AND b.state = 'sealed' AND (
                     EXISTS (SELECT 1 FROM artifacts a WHERE a.blob_id = b.id AND a.state = 'finalized')
                     OR EXISTS (SELECT 1 FROM cache_entries e WHERE e.blob_id = b.id AND e.state = 'finalized'))
                 ORDER BY b.id LIMIT $2",
            )
            .bind(after.0)
            .bind(limit)
            .fetch_all(conn)
            .await?
        });
        rows.into_iter().map(sealed_blob).collect()
    }

    /// The finalized blob that was not read for the longest time since Finalize, if that was at or before
    /// `read_before_ms`.
    pub async fn blob_to_scrub(&self, read_before_ms: i64) -> Result<Option<SealedBlob>> {
        let row: Option<SealedRow> = on!(self, Reading, |conn| {
            query(
                "SELECT id, size_bytes, CASE WHEN verification = 'verified' THEN sha256 END FROM blobs
                 WHERE state = 'sealed' AND scrubbed_at_ms <= $1
                 ORDER BY scrubbed_at_ms LIMIT 1",
            )
            .bind(read_before_ms)
            .fetch_optional(conn)
            .await?
        });
        row.map(sealed_blob).transpose()
    }

    /// Notes that a blob's bytes were read at `now_ms`.
    pub async fn mark_scrubbed(&self, blob: BlobId, now_ms: i64) -> Result<()> {
        on!(self, Staging, |conn| {
            query("UPDATE blobs SET scrubbed_at_ms = $2 WHERE id = $1")
                .bind(blob.0)
                .bind(now_ms)
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    /// Shows the artifact or cache entry of a blob no more, because its bytes are missing or changed; its links answer
    /// "gone". `false` if it was not shown anyway.
    pub async fn mark_lost(&self, blob: BlobId) -> Result<bool> {
        let marked = transaction!(self, Durable, |tx| {
            let mut marked = 0;
            for mark in [
                "UPDATE artifacts SET state = 'lost' WHERE blob_id = $1 AND state = 'finalized'",
                "UPDATE cache_entries SET state = 'lost' WHERE blob_id = $1 AND state = 'finalized'",
            ] {
                marked += query(mark).bind(blob.0).execute(tx).await?;
            }
            (marked > 0).then_some(())
        })?;
        Ok(marked.is_some())
    }

    /// Whether a blob is finalized and shown.
    pub async fn is_shown(&self, blob: BlobId) -> Result<bool> {
        let shown: Option<i64> = on!(self, Reading, |conn| {
            query(
                "SELECT id FROM artifacts WHERE blob_id = $1 AND state = 'finalized'
                 UNION ALL SELECT id FROM cache_entries WHERE blob_id = $1 AND state = 'finalized'",
            )
            .bind(blob.0)
            .fetch_optional(conn)
            .await?
        });
        Ok(shown.is_some())
    }

    /// Blobs whose state is not what their artifact or cache entry says, or that have none although they are sealed.
    pub async fn torn_blobs(&self) -> Result<Vec<BlobId>> {
        let ids: Vec<Uuid> = on!(self, Reading, |conn| {
            // One statement, so that all of it is seen as of one moment.
            query(
                "SELECT b.id FROM blobs b WHERE b.state = 'sealed'
                     AND NOT EXISTS (SELECT 1 FROM artifacts a WHERE a.blob_id = b.id)
                     AND NOT EXISTS (SELECT 1 FROM cache_entries e WHERE e.blob_id = b.id)
                 UNION ALL
                 SELECT b.id FROM artifacts a JOIN blobs b ON b.id = a.blob_id
                 WHERE b.state = 'deleting' OR (a.state = 'pending') = (b.state = 'sealed')
                 UNION ALL
                 SELECT b.id FROM cache_entries e JOIN blobs b ON b.id = e.blob_id
                 WHERE b.state = 'deleting' OR (e.state = 'reserved') = (b.state = 'sealed')",
            )
            .fetch_all(conn)
            .await?
        });
        Ok(ids.into_iter().map(BlobId).collect())
    }

    /// Repositories whose counted cache size is wrong.
    pub async fn miscounted_caches(&self) -> Result<Vec<Miscount>> {
        let rows: Vec<(i64, i64, i64)> = on!(self, Reading, |conn| {
            query(
                "SELECT r.id, r.size_bytes, CAST(coalesce(sum(e.size_bytes), 0) AS BIGINT)
                 FROM cache_repositories r LEFT JOIN cache_entries e
                     ON e.repository_id = r.id AND e.state <> 'reserved'
                 GROUP BY r.id, r.size_bytes HAVING r.size_bytes <> coalesce(sum(e.size_bytes), 0)",
            )
            .fetch_all(conn)
            .await?
        });
        let miscount = |(repository, counted_bytes, actual_bytes)| Miscount {
            repository,
            counted_bytes,
            actual_bytes,
        };
        Ok(rows.into_iter().map(miscount).collect())
    }

    /// Counts a repository's cache anew.
    pub async fn recount_cache(&self, repository: i64) -> Result<()> {
        transaction!(self, Durable, |tx| {
            // Locked first: the sum must not be from before somebody else's change.
            for step in [
                "UPDATE cache_repositories SET size_bytes = size_bytes WHERE id = $1",
                "UPDATE cache_repositories SET size_bytes = (
                     SELECT CAST(coalesce(sum(size_bytes), 0) AS BIGINT) FROM cache_entries
                     WHERE repository_id = $1 AND state <> 'reserved') WHERE id = $1",
            ] {
                query(step).bind(repository).execute(tx).await?;
            }
            Some(())
        })?;
        Ok(())
    }

    /// Whose an object is that lies below the prefix of `blob`.
    pub async fn standing(&self, key: &ObjectKey, blob: BlobId) -> Result<Standing> {
        let named: Option<i64> = on!(self, Reading, |conn| {
            query("SELECT size_bytes FROM blocks WHERE object_key = $1 LIMIT 1")
                .bind(key.as_str())
                .fetch_optional(conn)
                .await?
        });
        if named.is_some() {
            return Ok(Standing::Named);
        }
        let garbage: Option<i64> = on!(self, Reading, |conn| {
            query("SELECT created_at_ms FROM garbage WHERE object_key = $1")
                .bind(key.as_str())
                .fetch_optional(conn)
                .await?
        });
        let owner: Option<(String, Option<i64>)> = on!(self, Reading, |conn| {
            query("SELECT state, cleaned_at_ms FROM blobs WHERE id = $1")
                .bind(blob.0)
                .fetch_optional(conn)
                .await?
        });
        let owned = owner.is_some_and(|(state, swept)| state != BlobState::Sealed.as_str() || swept.is_none());
        Ok(if garbage.is_some() || owned {
            Standing::Expected
        } else {
            Standing::Unknown
        })
    }

    /// Counts what should be gone: uploads begun, tombstones and garbage made at or before these times.
    pub async fn overdue(&self, uploads_before_ms: i64, dead_before_ms: i64) -> Result<Overdue> {
        let count = async |text: &'static str, before_ms: i64| -> Result<i64> {
            Ok(on!(self, Reading, |conn| query(text)
                .bind(before_ms)
                .fetch_one(conn)
                .await?))
        };
        Ok(Overdue {
            uploads: count(
                "SELECT CAST(count(*) AS BIGINT) FROM blobs
                 WHERE (state = 'staging' OR (state = 'committed' AND kind <> 'container')) AND created_at_ms <= $1",
                uploads_before_ms,
            )
            .await?,
            tombstones: count(
                "SELECT CAST(count(*) AS BIGINT) FROM (
                     SELECT 1 FROM blobs WHERE state = 'deleting' AND cleaned_at_ms IS NULL AND changed_at_ms <= $1
                     UNION ALL
                     SELECT 1 FROM blobs WHERE state = 'deleting' AND cleaned_at_ms IS NOT NULL AND changed_at_ms <= $1
                 ) dead",
                dead_before_ms,
            )
            .await?,
            garbage: count(
                "SELECT CAST(count(*) AS BIGINT) FROM garbage WHERE created_at_ms <= $1",
                dead_before_ms,
            )
            .await?,
        })
    }
}
