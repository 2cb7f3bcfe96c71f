//! What the cleaner asks of the database: what is due, and to forget what is gone; and how others leave blobs to it.
//!
//! Called by `service/cleaner.rs`; [`bury`] by the other modules here, and the two counts at the end by `api/ops.rs`.
//! Every step is safe to repeat and safe beside another cleaner. What the cleaner would find again after a power cut is
//! not waited for.

use std::iter;

use uuid::Uuid;

use super::blobs::{FORGET_UNLISTED, UNLISTED_TO_GARBAGE};
use super::session::Session;
use super::sql::{ALL_OF_A_TABLE, SqlError, query};
use super::{Db, object_key, on, transaction};
use crate::error::Result;
use crate::model::{BlobId, ObjectKey};

/// Leaves blobs to be deleted, for the reason `tombstone`.
pub(super) async fn bury(
    tx: &mut Session,
    blobs: impl IntoIterator<Item = Uuid>,
    tombstone: &str,
    now_ms: i64,
) -> std::result::Result<(), SqlError> {
    let blobs: Vec<_> = blobs.into_iter().collect();
    let count = blobs.len();
    if count > 0 {
        query(
            "UPDATE blobs SET state = 'deleting', tombstone = $1, changed_at_ms = $2, cleaned_at_ms = NULL
             WHERE state <> 'deleting' AND id IN ",
        )
        .bind(tombstone)
        .bind(now_ms)
        .push_list(blobs)
        .rows(count)
        .execute(tx)
        .await?;
    }
    Ok(())
}

impl Db {
    /// Takes artifacts whose time is up out of the database and leaves their blobs to be deleted.
    /// Returns how many.
    pub async fn expire_artifacts(&self, now_ms: i64, limit: i64) -> Result<u64> {
        let expired = transaction!(self, Durable, |tx| {
            // Postgres' statistics may say that hardly any row is due. Inside of the DELETE it would then ask this anew for
            // each that is, and without the `+ 0` look through all of them for those in the list.
            let due: Vec<i64> = query(
                "SELECT id FROM artifacts WHERE state <> 'pending' AND expires_at_ms <= $1
                 ORDER BY expires_at_ms LIMIT $2",
            )
            .bind(now_ms)
            .bind(limit)
            .fetch_all(tx)
            .await?;
            let mut blobs: Vec<(Uuid, Option<Uuid>)> = Vec::new();
            if !due.is_empty() {
                blobs = query("DELETE FROM artifacts WHERE state <> 'pending' AND expires_at_ms + 0 <= $1 AND id IN ")
                    .bind(now_ms)
                    .rows(due.len())
                    .push_list(due)
                    .push(" RETURNING blob_id, container_id")
                    .fetch_all(tx)
                    .await?;
            }
            let count = blobs.len() as u64;
            let blobs = blobs
                .into_iter()
                .flat_map(|(blob, container)| iter::once(blob).chain(container));
            bury(tx, blobs, "expired", now_ms).await?;
            Some(count)
        })?;
        Ok(expired.unwrap_or_default())
    }

    /// Gives up on uploads begun at or before `begun_before_ms` and never finalized. Returns how many.
    pub async fn abandon_uploads(&self, begun_before_ms: i64, now_ms: i64, limit: i64) -> Result<u64> {
        let abandoned = transaction!(self, Durable, |tx| {
            let blobs: Vec<Uuid> = query(
                "SELECT id FROM blobs
                 WHERE (state = 'staging' OR (state = 'committed' AND kind <> 'container')) AND created_at_ms <= $1
                 ORDER BY created_at_ms LIMIT $2",
            )
            .bind(begun_before_ms)
            .bind(limit)
            .fetch_all(tx)
            .await?;
            let mut abandoned = 0;
            for blob in blobs {
                // One that was finalized meanwhile is neither pending nor open any more, and a container that others joined
                // has begun anew: looked at once they can't any more.
                query("UPDATE artifacts SET state = state WHERE blob_id = $1 AND state = 'pending'")
                    .bind(blob)
                    .execute(tx)
                    .await?;
                for row in [
                    "DELETE FROM artifacts WHERE blob_id = $1 AND state = 'pending'
                         AND EXISTS (SELECT 1 FROM blobs WHERE id = $1 AND created_at_ms <= $2)",
                    "DELETE FROM cache_entries WHERE blob_id = $1 AND state = 'reserved'
                         AND EXISTS (SELECT 1 FROM blobs WHERE id = $1 AND created_at_ms <= $2)",
                ] {
                    query(row).bind(blob).bind(begun_before_ms).execute(tx).await?;
                }
                abandoned += query(
                    "UPDATE blobs SET state = 'deleting', tombstone = 'abandoned', changed_at_ms = $2,
                         cleaned_at_ms = NULL
                     WHERE id = $1 AND (state = 'staging' OR (state = 'committed' AND kind <> 'container'))
                         AND created_at_ms <= $3",
                )
                .bind(blob)
                .bind(now_ms)
                .bind(begun_before_ms)
                .execute(tx)
                .await?;
            }
            Some(abandoned)
        })?;
        Ok(abandoned.unwrap_or_default())
    }

    /// Tombstones from at or before `dead_since_ms` whose objects are still there.
    pub async fn blobs_to_empty(&self, dead_since_ms: i64, limit: i64) -> Result<Vec<BlobId>> {
        self.blob_ids(
            "SELECT id FROM blobs WHERE state = 'deleting' AND cleaned_at_ms IS NULL AND changed_at_ms <= $1
             ORDER BY changed_at_ms LIMIT $2",
            dead_since_ms,
            limit,
        )
        .await
    }

    /// Emptied tombstones from at or before `dead_since_ms`: no request can still be writing below their prefix.
    pub async fn blobs_to_drop(&self, dead_since_ms: i64, limit: i64) -> Result<Vec<BlobId>> {
        self.blob_ids(
            "SELECT id FROM blobs WHERE state = 'deleting' AND cleaned_at_ms IS NOT NULL AND changed_at_ms <= $1
             ORDER BY changed_at_ms LIMIT $2",
            dead_since_ms,
            limit,
        )
        .await
    }

    /// Blobs sealed at or before `sealed_before_ms` whose prefix was never searched for leftovers.
    pub async fn blobs_to_sweep(&self, sealed_before_ms: i64, limit: i64) -> Result<Vec<BlobId>> {
        self.blob_ids(
            "SELECT id FROM blobs WHERE state = 'sealed' AND cleaned_at_ms IS NULL AND changed_at_ms <= $1
             ORDER BY changed_at_ms LIMIT $2",
            sealed_before_ms,
            limit,
        )
        .await
    }

    /// Containers published at or before `published_before_ms` whose prefix was not searched for leftovers since.
    pub async fn containers_to_sweep(&self, published_before_ms: i64, limit: i64) -> Result<Vec<BlobId>> {
        self.blob_ids(
            "SELECT id FROM blobs
             WHERE kind = 'container' AND state = 'committed' AND cleaned_at_ms IS NULL AND changed_at_ms <= $1
             ORDER BY changed_at_ms LIMIT $2",
            published_before_ms,
            limit,
        )
        .await
    }

    /// Notes that a container was swept.
    pub async fn mark_container_swept(&self, blob: BlobId, now_ms: i64) -> Result<()> {
        on!(self, Staging, |conn| {
            query("UPDATE blobs SET cleaned_at_ms = $2 WHERE id = $1 AND kind = 'container' AND state = 'committed'")
                .bind(blob.0)
                .bind(now_ms)
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    async fn blob_ids(&self, text: &'static str, before_ms: i64, limit: i64) -> Result<Vec<BlobId>> {
        let ids: Vec<Uuid> = on!(self, Reading, |conn| query(text)
            .bind(before_ms)
            .bind(limit)
            .fetch_all(conn)
            .await?);
        Ok(ids.into_iter().map(BlobId).collect())
    }

    /// Every object that a blob's rows name.
    pub async fn objects_of(&self, blob: BlobId) -> Result<Vec<ObjectKey>> {
        let keys: Vec<String> = on!(self, Reading, |conn| {
            query("SELECT DISTINCT object_key FROM blocks WHERE blob_id = $1")
                .bind(blob.0)
                .fetch_all(conn)
                .await?
        });
        keys.iter().map(|key| object_key(key)).collect()
    }

    /// Whether a row of any blob that is not being deleted names this object.
    pub async fn is_object_in_use(&self, key: &ObjectKey) -> Result<bool> {
        let user: Option<i64> = on!(self, Reading, |conn| {
            query(
                "SELECT CAST(1 AS BIGINT) FROM blocks k JOIN blobs b ON b.id = k.blob_id
                 WHERE k.object_key = $1 AND b.state <> 'deleting' LIMIT 1",
            )
            .bind(key.as_str())
            .fetch_optional(conn)
            .await?
        });
        Ok(user.is_some())
    }

    /// Has a tombstone whose objects could not be deleted count as one from `dead_since_ms`, so that it does not keep the
    /// rest waiting.
    pub async fn postpone_emptying(&self, blob: BlobId, dead_since_ms: i64) -> Result<()> {
        on!(self, Staging, |conn| {
            query("UPDATE blobs SET changed_at_ms = $2 WHERE id = $1 AND state = 'deleting' AND cleaned_at_ms IS NULL")
                .bind(blob.0)
                .bind(dead_since_ms)
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    /// Forgets the blocks of a tombstone whose objects were deleted.
    pub async fn mark_emptied(&self, blob: BlobId, now_ms: i64) -> Result<()> {
        transaction!(self, Staging, |tx| {
            let dead = query("UPDATE blobs SET cleaned_at_ms = $2 WHERE id = $1 AND state = 'deleting'")
                .bind(blob.0)
                .bind(now_ms)
                .execute(tx)
                .await?;
            if dead == 0 {
                None
            } else {
                for rest in [
                    "DELETE FROM blocks WHERE blob_id = $1",
                    "DELETE FROM files WHERE container_id = $1",
                ] {
                    query(rest).bind(blob.0).execute(tx).await?;
                }
                Some(())
            }
        })?;
        Ok(())
    }

    /// Forgets tombstones altogether: all that are named, at least one.
    pub async fn drop_blobs(&self, blobs: &[BlobId]) -> Result<()> {
        transaction!(self, Staging, |tx| {
            let dead: Vec<Uuid> = query("UPDATE blobs SET state = state WHERE state = 'deleting' AND id IN ")
                .push_list(blobs.iter().map(|blob| blob.0))
                .push(" RETURNING id")
                .rows(blobs.len())
                .fetch_all(tx)
                .await?;
            if dead.is_empty() {
                None
            } else {
                // Besides garbage there may be blocks of requests that saw a blob open and wrote their rows late.
                for rest in [
                    "DELETE FROM garbage WHERE blob_id IN ",
                    "DELETE FROM blocks WHERE blob_id IN ",
                    "DELETE FROM files WHERE container_id IN ",
                    "DELETE FROM containers WHERE blob_id IN ",
                    "DELETE FROM blobs WHERE id IN ",
                ] {
                    let dropped = dead.iter().copied();
                    query(rest).push_list(dropped).rows(dead.len()).execute(tx).await?;
                }
                Some(())
            }
        })?;
        Ok(())
    }

    /// Forgets blocks of a sealed blob that arrived too late to be content, and notes that it was swept.
    pub async fn mark_swept(&self, blob: BlobId, now_ms: i64) -> Result<()> {
        transaction!(self, Staging, |tx| {
            query("UPDATE blobs SET cleaned_at_ms = $2 WHERE id = $1 AND state = 'sealed'")
                .bind(blob.0)
                .bind(now_ms)
                .execute(tx)
                .await?;
            query(UNLISTED_TO_GARBAGE).bind(blob.0).bind(now_ms).execute(tx).await?;
            query(FORGET_UNLISTED).bind(blob.0).execute(tx).await?;
            Some(())
        })?;
        Ok(())
    }

    /// Objects recorded as garbage until `now_ms`, oldest first.
    pub async fn garbage(&self, now_ms: i64, limit: i64) -> Result<Vec<ObjectKey>> {
        let keys: Vec<String> = on!(self, Reading, |conn| {
            query("SELECT object_key FROM garbage WHERE created_at_ms <= $1 ORDER BY created_at_ms LIMIT $2")
                .bind(now_ms)
                .bind(limit)
                .fetch_all(conn)
                .await?
        });
        keys.iter().map(|key| object_key(key)).collect()
    }

    /// Leaves garbage that could not be deleted until `again_ms`, so that it does not keep the rest waiting.
    pub async fn postpone_garbage(&self, key: &ObjectKey, again_ms: i64) -> Result<()> {
        on!(self, Staging, |conn| {
            query("UPDATE garbage SET created_at_ms = $2 WHERE object_key = $1")
                .bind(key.as_str())
                .bind(again_ms)
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    /// Forgets garbage whose object was deleted.
    pub async fn drop_garbage(&self, key: &ObjectKey) -> Result<()> {
        on!(self, Staging, |conn| {
            query("DELETE FROM garbage WHERE object_key = $1")
                .bind(key.as_str())
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    /// How many blobs are in each state. Reads every row.
    pub async fn blob_counts(&self) -> Result<Vec<(String, i64)>> {
        Ok(on!(self, Reading, |conn| {
            query("SELECT state, CAST(count(*) AS BIGINT) FROM blobs GROUP BY state")
                .rows(ALL_OF_A_TABLE)
                .fetch_all(conn)
                .await?
        }))
    }

    /// How many sealed blobs wait for their hash.
    pub async fn pending_verifications(&self) -> Result<i64> {
        Ok(on!(self, Reading, |conn| {
            query("SELECT CAST(count(*) AS BIGINT) FROM blobs WHERE verification = 'pending' AND state = 'sealed'")
                .fetch_one(conn)
                .await?
        }))
    }
}
