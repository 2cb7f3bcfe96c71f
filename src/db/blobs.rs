//! Blobs and their blocks: staging, committing, reading, verifying.
//!
//! Called by `service/`. A blob's row is locked by the first statement of every transaction that gives it content
//! or seals it; staging a block inserts one row and takes no lock.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::sql::{Value, query};
use super::{Db, Failure, TRIES, lost_every_race, object_key, on, signed, transaction, unsigned};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::model::{BlobId, BlobKind, BlobState, Block, Sha256};

/// Rows per statement when a block list is written: seven parameters each, below SQLite's limit of 32,766.
pub(super) const ROWS_PER_INSERT: usize = 4_000;

/// How many blocks a blob may have, placed and not. Source: Azure's limits, 50,000 committed and 100,000 uncommitted ones.
const MAX_BLOCKS: usize = 150_000;

/// Locks a blob that is still open and gives it content: blob, size, type, time. The first statement of whoever does so.
const GIVE_CONTENT: &str = "UPDATE blobs
    SET state = 'committed', revision = revision + 1, size_bytes = $2, content_type = $3, changed_at_ms = $4
    WHERE id = $1 AND state IN ('staging', 'committed')";

/// Begins a blob: id, kind, time.
pub(super) const BEGIN: &str = "INSERT INTO blobs (id, kind, state, revision, size_bytes, verification,
        verify_lease_until_ms, created_at_ms, changed_at_ms)
    VALUES ($1, $2, 'staging', 0, 0, 'none', 0, $3, $3)";

/// Makes a blob's content of one revision final: blob, revision, what is known of its hash, the hash, time.
pub(super) const SEAL: &str = "UPDATE blobs
    SET state = 'sealed', verification = $3, sha256 = $4, changed_at_ms = $5, scrubbed_at_ms = $5
    WHERE id = $1 AND revision = $2 AND state = 'committed'";

/// Blocks that came after the list are nobody's content. There rarely are any. Records their objects as garbage: blob, time.
pub(super) const UNLISTED_TO_GARBAGE: &str = "INSERT INTO garbage (object_key, blob_id, created_at_ms)
    SELECT object_key, blob_id, CAST($2 AS BIGINT) FROM blocks WHERE blob_id = $1 AND start_offset IS NULL
    ON CONFLICT (object_key) DO NOTHING";
/// And forgets them: blob.
pub(super) const FORGET_UNLISTED: &str = "DELETE FROM blocks WHERE blob_id = $1 AND start_offset IS NULL";

/// What a holder of a write link may want to know of its blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WritableBlob {
    /// Staging or committed: bytes may come.
    Open(BlobKind),
    Sealed,
    /// A newer upload of the same name or key took its place.
    Superseded,
}

/// One entry of a block list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListEntry {
    pub block_id: String,
    pub from: ListSource,
}

/// Where a block list looks for a block. Source: Azure's Put Block List.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListSource {
    Committed,
    Uncommitted,
    /// The staged block if there is one, else the committed one.
    Latest,
}

/// A block that has a row, whether or not a list has placed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagedBlock {
    pub block_id: String,
    pub block: Block,
    /// Where it lies in the blob's content; `None` until a list names it.
    pub start_offset: Option<u64>,
}

/// What became of a block list.
#[derive(Debug, PartialEq, Eq)]
pub enum Committed {
    Done,
    /// The blocks that the list names are not those that the caller made durable: look again.
    BlocksChanged,
    /// The blob is sealed and this very list is its content.
    AlreadySealed,
}

/// A finalized blob that may be read, with what its readers are told.
#[derive(Clone, Debug)]
pub struct ReadableBlob {
    pub id: BlobId,
    /// The artifact's name or the cache entry's key.
    pub name: String,
    pub mime_type: Option<String>,
    pub content_type: Option<String>,
    pub size_bytes: u64,
    pub sealed_at_ms: i64,
    /// What the content must hash to, where that is known.
    pub sha256: Option<Sha256>,
    /// The content was not compared with `sha256` yet.
    pub unverified: bool,
    /// The bytes turned out missing or changed.
    pub lost: bool,
}

/// A sealed blob whose content is still to be hashed. Claimed for the time of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verification {
    pub blob: BlobId,
    pub size_bytes: u64,
    /// What the client said; `None` when it said nothing and the hash is only to be recorded.
    pub expected: Option<Sha256>,
}

impl WritableBlob {
    /// Why a blob in this state takes no bytes.
    pub fn refusal(self) -> Error {
        Error::Conflict(match self {
            Self::Superseded => "a newer upload replaced this one".to_owned(),
            Self::Open(_) | Self::Sealed => "the upload is finalized and its content is final".to_owned(),
        })
    }

    /// What a holder of a write link hears when its blob is gone.
    pub fn missing() -> Error {
        Error::NotFound("the upload does not exist or was deleted".to_owned())
    }
}

type BlockRow = (String, String, i64, i64, i64, Option<i64>);

fn staged_block((block_id, key, object_offset, size, crc64, start): BlockRow) -> Result<StagedBlock> {
    let object_key = object_key(&key)?;
    Ok(StagedBlock {
        block_id,
        block: Block {
            object_key,
            object_offset: unsigned(object_offset)?,
            size_bytes: unsigned(size)?,
            crc64: crc64.cast_unsigned(),
        },
        start_offset: start.map(unsigned).transpose()?,
    })
}

/// Finds the blocks that a list names among those that have rows, in the list's order.
///
/// # Errors
/// [`Error::UnknownBlock`] if one is not there.
pub(super) fn arrange(rows: &[StagedBlock], list: &[ListEntry]) -> Result<Vec<StagedBlock>> {
    let mut staged = HashMap::new();
    let mut placed = HashMap::new();
    for row in rows {
        let known = if row.start_offset.is_some() {
            &mut placed
        } else {
            &mut staged
        };
        known.insert(row.block_id.as_str(), row);
    }
    list.iter()
        .map(|entry| {
            let id = entry.block_id.as_str();
            let found = match entry.from {
                ListSource::Committed => placed.get(id),
                ListSource::Uncommitted => staged.get(id),
                ListSource::Latest => staged.get(id).or_else(|| placed.get(id)),
            };
            found
                .map(|&row| row.clone())
                .ok_or_else(|| Error::UnknownBlock(format!("block {id} was not staged")))
        })
        .collect()
}

/// The row of a block that has its place in a content.
pub(super) fn placement<'q>(blob: BlobId, block_id: &'q str, block: &'q Block, start_offset: i64) -> [Value<'q>; 7] {
    [
        blob.0.into(),
        block_id.into(),
        block.object_key.as_str().into(),
        block.object_offset.cast_signed().into(),
        block.size_bytes.cast_signed().into(),
        block.crc64.cast_signed().into(),
        start_offset.into(),
    ]
}

impl Db {
    /// What a write link's blob can take. `None` if it is deleted or unknown.
    pub async fn writable_blob(&self, blob: BlobId) -> Result<Option<WritableBlob>> {
        let row: Option<(String, Option<String>, String)> = on!(self, Reading, |conn| {
            query("SELECT state, tombstone, kind FROM blobs WHERE id = $1")
                .bind(blob.0)
                .fetch_optional(conn)
                .await?
        });
        Ok(row.and_then(
            |(state, tombstone, kind)| match (BlobState::parse(&state)?, tombstone.as_deref()) {
                (BlobState::Staging | BlobState::Committed, _) => BlobKind::parse(&kind).map(WritableBlob::Open),
                (BlobState::Sealed, _) => Some(WritableBlob::Sealed),
                (BlobState::Deleting, Some("superseded")) => Some(WritableBlob::Superseded),
                (BlobState::Deleting, _) => None,
            },
        ))
    }

    /// Records a staged block; one with the same id that no list has placed yet becomes garbage.
    /// `false` if the blob takes no more blocks: the caller deletes the object.
    pub async fn stage_block(&self, blob: BlobId, block_id: &str, block: &Block, now_ms: i64) -> Result<bool> {
        let (size, offset) = (signed(block.size_bytes)?, signed(block.object_offset)?);
        let inserted = on!(self, Staging, |conn| {
            query(
                "INSERT INTO blocks (blob_id, block_id, object_key, object_offset, size_bytes, crc64)
                 SELECT id, $2, $3, $4, $5, $6 FROM blobs WHERE id = $1 AND state IN ('staging', 'committed')
                 ON CONFLICT DO NOTHING",
            )
            .bind(blob.0)
            .bind(block_id)
            .bind(block.object_key.as_str())
            .bind(offset)
            .bind(size)
            .bind(block.crc64.cast_signed())
            .execute(conn)
            .await?
        });
        if inserted == 1 {
            return Ok(true);
        }
        // Either the blob is closed or the block was staged before: the lock tells which, and replaces it in peace.
        for _ in 0..TRIES {
            if let Some(replaced) = self.replace_staged_block(blob, block_id, block, now_ms).await? {
                return Ok(replaced);
            }
        }
        Err(lost_every_race())
    }

    /// `false` if the blob is closed. `None` if another request staged this block at the same moment.
    async fn replace_staged_block(
        &self,
        blob: BlobId,
        block_id: &str,
        block: &Block,
        now_ms: i64,
    ) -> Result<Option<bool>> {
        let (size, offset) = (signed(block.size_bytes)?, signed(block.object_offset)?);
        let mut raced = false;
        let replaced = transaction!(self, Staging, |tx| {
            let open = query("UPDATE blobs SET state = state WHERE id = $1 AND state IN ('staging', 'committed')")
                .bind(blob.0)
                .execute(tx)
                .await?;
            if open == 0 {
                None
            } else {
                let old: Option<String> = query(
                    "DELETE FROM blocks WHERE blob_id = $1 AND block_id = $2 AND start_offset IS NULL RETURNING object_key",
                )
                .bind(blob.0)
                .bind(block_id)
                .fetch_optional(tx)
                .await?;
                if let Some(key) = old {
                    query("INSERT INTO garbage (object_key, blob_id, created_at_ms) VALUES ($1, $2, $3)")
                        .bind(key)
                        .bind(blob.0)
                        .bind(now_ms)
                        .execute(tx)
                        .await?;
                }
                let inserted = query(
                    "INSERT INTO blocks (blob_id, block_id, object_key, object_offset, size_bytes, crc64)
                     VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
                )
                .bind(blob.0)
                .bind(block_id)
                .bind(block.object_key.as_str())
                .bind(offset)
                .bind(size)
                .bind(block.crc64.cast_signed())
                .execute(tx)
                .await?;
                raced = inserted == 0;
                failpoint::reach("block_resent_before_commit");
                (!raced).then_some(())
            }
        });
        match replaced {
            Err(Failure::Unknown(_)) if self.is_object_in_use(&block.object_key).await? => Ok(Some(true)),
            replaced => Ok(replaced?.map(|()| true).or((!raced).then_some(false))),
        }
    }

    /// What the blob's blocks add up to, listed or not.
    pub async fn staged_bytes(&self, blob: BlobId) -> Result<u64> {
        let sum: i64 = on!(self, Reading, |conn| {
            query("SELECT CAST(coalesce(sum(size_bytes), 0) AS BIGINT) FROM blocks WHERE blob_id = $1")
                .bind(blob.0)
                .fetch_one(conn)
                .await?
        });
        unsigned(sum)
    }

    /// The blocks that a list would give the blob, in its order, for the caller to make durable before
    /// [`Db::commit_block_list`].
    ///
    /// # Errors
    /// [`Error::UnknownBlock`] if the list names a block that has no row.
    pub async fn listed_blocks(&self, blob: BlobId, list: &[ListEntry]) -> Result<Vec<StagedBlock>> {
        arrange(&self.all_blocks(blob, list.len()).await?, list)
    }

    /// Every block of the blob that has a row, listed or not. There are `about` so many.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there are more than any blob may have.
    pub async fn all_blocks(&self, blob: BlobId, about: usize) -> Result<Vec<StagedBlock>> {
        let rows: Vec<BlockRow> = on!(self, Reading, |conn| {
            query(
                "SELECT block_id, object_key, object_offset, size_bytes, crc64, start_offset
                 FROM blocks WHERE blob_id = $1 ORDER BY start_offset LIMIT 150001",
            )
            .bind(blob.0)
            .rows(about)
            .fetch_all(conn)
            .await?
        });
        if rows.len() > MAX_BLOCKS {
            return Err(Error::TooLarge(format!("a blob may have at most {MAX_BLOCKS} blocks")));
        }
        rows.into_iter().map(staged_block).collect()
    }

    /// Makes the listed blocks the blob's content, in one step. Blocks that the list leaves out become garbage.
    /// `durable` are the blocks that [`Db::listed_blocks`] found and the caller has made durable.
    ///
    /// # Errors
    /// [`Error::UnknownBlock`] as above; [`Error::Conflict`] if the blob is sealed with other content or superseded;
    /// [`Error::NotFound`] if it is gone.
    pub async fn commit_block_list(
        &self,
        blob: BlobId,
        list: &[ListEntry],
        durable: &[StagedBlock],
        content_type: Option<&str>,
        now_ms: i64,
    ) -> Result<Committed> {
        let size = signed(durable.iter().map(|row| row.block.size_bytes).sum())?;
        let mut changed = false;
        let done = transaction!(self, Durable, |tx| {
            changed = false;
            let open = query(GIVE_CONTENT)
                .bind(blob.0)
                .bind(size)
                .bind(content_type)
                .bind(now_ms)
                .execute(tx)
                .await?;
            if open == 0 {
                None
            } else {
                // Reading and removing in one statement: a block that is staged meanwhile is either seen here or stays.
                let rows: Vec<BlockRow> = query(
                    "DELETE FROM blocks WHERE blob_id = $1
                     RETURNING block_id, object_key, object_offset, size_bytes, crc64, start_offset",
                )
                .bind(blob.0)
                .rows(list.len())
                .fetch_all(tx)
                .await?;
                let mut rows = rows.into_iter().map(staged_block).collect::<Result<Vec<_>>>()?;
                // The order in which they were looked at before.
                rows.sort_by_key(|row| row.start_offset);
                let content = arrange(&rows, list)?;
                if content
                    .iter()
                    .map(|row| &row.block)
                    .ne(durable.iter().map(|row| &row.block))
                {
                    changed = true;
                    None
                } else {
                    let kept: HashSet<_> = content.iter().map(|row| &row.block.object_key).collect();
                    let dropped: Vec<_> = rows
                        .iter()
                        .map(|row| &row.block.object_key)
                        .filter(|key| !kept.contains(key))
                        .collect();
                    for page in dropped.chunks(ROWS_PER_INSERT) {
                        query("INSERT INTO garbage (object_key, blob_id, created_at_ms) ")
                            .push_values(page, |key| [key.as_str().into(), blob.0.into(), now_ms.into()])
                            .push(" ON CONFLICT (object_key) DO NOTHING")
                            .rows(page.len())
                            .execute(tx)
                            .await?;
                    }
                    let mut start_offset = 0;
                    for page in content.chunks(ROWS_PER_INSERT) {
                        query(
                            "INSERT INTO blocks
                                 (blob_id, block_id, object_key, object_offset, size_bytes, crc64, start_offset) ",
                        )
                        .push_values(page, |placed| {
                            let start = start_offset;
                            // Sizes and their sum were checked to fit when they came from the database.
                            start_offset += placed.block.size_bytes.cast_signed();
                            placement(blob, &placed.block_id, &placed.block, start)
                        })
                        .rows(page.len())
                        .execute(tx)
                        .await?;
                    }
                    failpoint::reach("list_before_commit");
                    Some(())
                }
            }
        });
        let done = match done {
            Err(Failure::Unknown(_)) if self.has_content(blob, durable).await? => Some(()),
            done => done?,
        };
        if done.is_some() {
            return Ok(Committed::Done);
        }
        if changed {
            return Ok(Committed::BlocksChanged);
        }
        match self.writable_blob(blob).await? {
            Some(WritableBlob::Sealed) => {
                let content = self.all_blocks(blob, list.len()).await?;
                let placed = content
                    .iter()
                    .filter(|row| row.start_offset.is_some())
                    .map(|row| &row.block_id);
                if placed.eq(list.iter().map(|entry| &entry.block_id)) {
                    Ok(Committed::AlreadySealed)
                } else {
                    Err(WritableBlob::Sealed.refusal())
                }
            }
            Some(state @ WritableBlob::Superseded) => Err(state.refusal()),
            // It was closed a moment ago and is open now: only a restored database does that.
            Some(WritableBlob::Open(_)) => Ok(Committed::BlocksChanged),
            None => Err(WritableBlob::missing()),
        }
    }

    /// Whether these blocks are the blob's content, as a list would leave it. Of no blocks nobody can tell.
    async fn has_content(&self, blob: BlobId, blocks: &[StagedBlock]) -> Result<bool> {
        let rows = self.all_blocks(blob, blocks.len()).await?;
        let content = rows.iter().filter(|row| row.start_offset.is_some());
        let content = content.map(|row| &row.block);
        Ok(!blocks.is_empty() && content.eq(blocks.iter().map(|row| &row.block)))
    }

    /// Makes one object the blob's whole content (Put Blob). What it had before becomes garbage.
    /// `None` for an empty blob.
    ///
    /// # Errors
    /// As [`Db::commit_block_list`].
    pub async fn commit_whole(
        &self,
        blob: BlobId,
        block: Option<&Block>,
        content_type: Option<&str>,
        now_ms: i64,
    ) -> Result<()> {
        let size = signed(block.map_or(0, |block| block.size_bytes))?;
        let done = transaction!(self, Durable, |tx| {
            let open = query(GIVE_CONTENT)
                .bind(blob.0)
                .bind(size)
                .bind(content_type)
                .bind(now_ms)
                .execute(tx)
                .await?;
            if open == 0 {
                None
            } else {
                query(
                    "INSERT INTO garbage (object_key, blob_id, created_at_ms)
                     SELECT DISTINCT object_key, blob_id, CAST($2 AS BIGINT) FROM blocks WHERE blob_id = $1
                     ON CONFLICT (object_key) DO NOTHING",
                )
                .bind(blob.0)
                .bind(now_ms)
                .execute(tx)
                .await?;
                query("DELETE FROM blocks WHERE blob_id = $1")
                    .bind(blob.0)
                    .execute(tx)
                    .await?;
                if let Some(block) = block {
                    query(
                        "INSERT INTO blocks
                             (blob_id, block_id, object_key, object_offset, size_bytes, crc64, start_offset)
                         VALUES ($1, '', $2, 0, $3, $4, 0)",
                    )
                    .bind(blob.0)
                    .bind(block.object_key.as_str())
                    .bind(size)
                    .bind(block.crc64.cast_signed())
                    .execute(tx)
                    .await?;
                }
                failpoint::reach("put_blob_before_commit");
                Some(())
            }
        });
        let done = match (done, block) {
            (Err(Failure::Unknown(_)), Some(block)) if self.is_object_in_use(&block.object_key).await? => Some(()),
            (done, _) => done?,
        };
        match done {
            Some(()) => Ok(()),
            None => Err(self
                .writable_blob(blob)
                .await?
                .map_or_else(WritableBlob::missing, WritableBlob::refusal)),
        }
    }

    /// The blob and its artifact or cache entry, if that was finalized and lives at `now_ms`.
    pub async fn readable_blob(&self, blob: BlobId, now_ms: i64) -> Result<Option<ReadableBlob>> {
        type Row = (
            String,
            Option<String>,
            Option<String>,
            i64,
            i64,
            Option<Vec<u8>>,
            String,
            String,
        );
        let row: Option<Row> = on!(self, Reading, |conn| {
            query(
                "SELECT a.name, a.mime_type, b.content_type, b.size_bytes, b.changed_at_ms, b.sha256, b.verification, a.state
                 FROM blobs b JOIN artifacts a ON a.blob_id = b.id
                 WHERE b.id = $1 AND b.state = 'sealed' AND a.state <> 'pending' AND a.expires_at_ms > $2
                 UNION ALL
                 SELECT e.key, CAST(NULL AS TEXT), b.content_type, b.size_bytes, b.changed_at_ms, b.sha256, b.verification,
                     e.state
                 FROM blobs b JOIN cache_entries e ON e.blob_id = b.id
                 WHERE b.id = $1 AND b.state = 'sealed' AND e.state <> 'reserved'",
            )
            .bind(blob.0)
            .bind(now_ms)
            .fetch_optional(conn)
            .await?
        });
        row.map(
            |(name, mime_type, content_type, size, sealed_at_ms, sha256, verification, state)| {
                Ok(ReadableBlob {
                    id: blob,
                    name,
                    mime_type,
                    content_type,
                    size_bytes: unsigned(size)?,
                    sealed_at_ms,
                    sha256: digest(sha256)?,
                    unverified: verification == "pending",
                    lost: state == "lost",
                })
            },
        )
        .transpose()
    }

    /// The placed blocks that overlap `from..to`, in order, each with its start in the blob's content.
    pub async fn content_blocks(&self, blob: BlobId, from: u64, to: u64) -> Result<Vec<(u64, Block)>> {
        let rows: Vec<BlockRow> = on!(self, Reading, |conn| {
            // What comes before the last block that begins at or before the window is passed over unread.
            query(
                "SELECT block_id, object_key, object_offset, size_bytes, crc64, start_offset FROM blocks
                 WHERE blob_id = $1 AND start_offset < $3 AND start_offset + size_bytes > $2 AND start_offset >= (
                     SELECT start_offset FROM blocks WHERE blob_id = $1 AND start_offset <= $2
                     ORDER BY start_offset DESC LIMIT 1)
                 ORDER BY start_offset",
            )
            .bind(blob.0)
            .bind(signed(from)?)
            .bind(signed(to)?)
            .fetch_all(conn)
            .await?
        });
        rows.into_iter()
            .map(|row| {
                let row = staged_block(row)?;
                let start = row
                    .start_offset
                    .ok_or_else(|| Error::Internal("a placed block without place".to_owned()))?;
                Ok((start, row.block))
            })
            .collect()
    }

    /// Takes one sealed blob that waits for its hash and that nobody else is hashing.
    pub async fn claim_verification(&self, now_ms: i64, lease_until_ms: i64) -> Result<Option<Verification>> {
        let row: Option<(Uuid, i64, Option<Vec<u8>>)> = on!(self, Durable, |conn| {
            query(
                "UPDATE blobs SET verify_lease_until_ms = $2
                 WHERE verification = 'pending' AND verify_lease_until_ms <= $1 AND id = (
                     SELECT id FROM blobs
                     WHERE verification = 'pending' AND state = 'sealed' AND verify_lease_until_ms <= $1
                     ORDER BY verify_lease_until_ms LIMIT 1)
                 RETURNING id, size_bytes, sha256",
            )
            .bind(now_ms)
            .bind(lease_until_ms)
            .fetch_optional(conn)
            .await?
        });
        row.map(|(id, size, expected)| {
            Ok(Verification {
                blob: BlobId(id),
                size_bytes: unsigned(size)?,
                expected: digest(expected)?,
            })
        })
        .transpose()
    }

    /// Keeps a claim while a long hash is under way. `false` if the blob needs no verification any more.
    pub async fn extend_verification(&self, blob: BlobId, lease_until_ms: i64) -> Result<bool> {
        let rows = on!(self, Durable, |conn| {
            query(
                "UPDATE blobs SET verify_lease_until_ms = $2
                 WHERE id = $1 AND verification = 'pending' AND state = 'sealed'",
            )
            .bind(blob.0)
            .bind(lease_until_ms)
            .execute(conn)
            .await?
        });
        Ok(rows == 1)
    }

    /// Records that the content hashes to `sha256`, as the client said or because it said nothing.
    pub async fn pass_verification(&self, blob: BlobId, sha256: &Sha256) -> Result<()> {
        on!(self, Durable, |conn| {
            query("UPDATE blobs SET verification = 'verified', sha256 = $2 WHERE id = $1 AND verification = 'pending'")
                .bind(blob.0)
                .bind(sha256.0.as_slice())
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    /// Takes a blob whose content is not what its client hashed out of everybody's sight and frees its name.
    /// `true` if this call did it.
    pub async fn fail_verification(&self, blob: BlobId, now_ms: i64) -> Result<bool> {
        let failed = transaction!(self, Durable, |tx| {
            query("DELETE FROM artifacts WHERE blob_id = $1")
                .bind(blob.0)
                .execute(tx)
                .await?;
            let rows = query(
                "UPDATE blobs SET state = 'deleting', tombstone = 'mismatch', verification = 'failed',
                     changed_at_ms = $2, cleaned_at_ms = NULL
                 WHERE id = $1 AND verification = 'pending' AND state = 'sealed'",
            )
            .bind(blob.0)
            .bind(now_ms)
            .execute(tx)
            .await?;
            (rows == 1).then_some(())
        })?;
        Ok(failed.is_some())
    }
}

pub(super) fn digest(bytes: Option<Vec<u8>>) -> Result<Option<Sha256>> {
    bytes
        .map(|bytes| {
            bytes
                .try_into()
                .map(Sha256)
                .map_err(|_| Error::Internal("a digest that is not 32 bytes".to_owned()))
        })
        .transpose()
}
