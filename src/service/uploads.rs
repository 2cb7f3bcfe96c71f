//! Bytes coming in: blocks, block lists and whole blobs.
//!
//! Called by `api/blobs.rs` with a verified write link, and for objects by `files.rs`. An object is complete in the
//! store before any row names it, and is deleted when its row is refused.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt};
use md5::{Digest, Md5};
use serde::Deserialize;

use super::Services;
use crate::db::{Committed, ListEntry, WritableBlob};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::model::{BlobId, BlobKind, Block, ObjectKey};
use crate::storage::BlockStore;

/// The `[uploads]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub max_block_bytes: u64,
    pub max_put_blob_bytes: u64,
    /// How long an upload link lives, unless its token ends before.
    #[serde(with = "crate::duration")]
    pub link_ttl: Duration,
    #[serde(with = "crate::duration")]
    pub download_link_ttl: Duration,
    /// When an upload that was never finalized is given up, counted from its beginning.
    #[serde(with = "crate::duration")]
    pub abandoned_after: Duration,
}

/// Checksums that a client sent with its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checksums {
    pub md5: Option<[u8; 16]>,
    /// CRC-64/NVME, as in Azure's `x-ms-content-crc64`.
    pub crc64: Option<u64>,
}

/// A request's body: what it says of its length, and the bytes as they come.
pub struct Upload<S> {
    pub size_bytes: u64,
    pub body: S,
    pub checksums: Checksums,
}

/// How often a list is tried again when blocks are sent again at the same moment.
const LIST_TRIES: usize = 8;

impl Services {
    /// Stores one block. The same id again replaces it, until a list takes it.
    ///
    /// # Errors
    /// Before the body is read: [`Error::TooLarge`], [`Error::NotFound`], [`Error::Conflict`]. After it:
    /// [`Error::ChecksumMismatch`], and whatever body, store or database fail with; then nothing is kept.
    pub async fn stage_block<S>(&self, blob: BlobId, block_id: &str, upload: Upload<S>) -> Result<()>
    where
        S: Stream<Item = Result<Bytes>> + Send + 'static,
    {
        let limit = self.settings.uploads.max_block_bytes;
        if upload.size_bytes > limit {
            return Err(Error::TooLarge(format!("a block may have at most {limit} bytes")));
        }
        let kind = self.check_open(blob).await?;
        if self.max_bytes(kind).is_some() {
            let staged = self.db.staged_bytes(blob).await?;
            self.check_size(kind, staged.saturating_add(upload.size_bytes))?;
        }
        let share = self.memory.for_upload(BlockStore::PUT_HOLDS_BYTES).await?;
        let block = self.store_object(blob, upload).await?;
        drop(share);
        failpoint::reach("block_stored");
        let staged = self.db.stage_block(blob, block_id, &block, self.clock.now_ms()).await;
        match staged {
            Ok(true) => {
                failpoint::reach("block_row_committed");
                Ok(())
            }
            Ok(false) => {
                self.discard(&block.object_key).await;
                // It was open when the block began; say what it is now.
                self.check_open(blob).await?;
                Err(Error::Busy(
                    "the upload changed while the block came, send it again".to_owned(),
                ))
            }
            // Whether the row was written is unknown; the cleaner finds the object if it was not.
            Err(error) => Err(error),
        }
    }

    /// Makes the listed blocks the blob's content, durably.
    ///
    /// # Errors
    /// [`Error::UnknownBlock`], [`Error::Conflict`] after Finalize (unless it is the same list again),
    /// [`Error::NotFound`], [`Error::TooLarge`].
    pub async fn commit_block_list(&self, blob: BlobId, list: &[ListEntry], content_type: Option<&str>) -> Result<()> {
        failpoint::reach("list_parsed");
        for _ in 0..LIST_TRIES {
            let durable = match self.db.listed_blocks(blob, list).await {
                Ok(blocks) => {
                    self.check_list_size(blob, blocks.iter().map(|row| row.block.size_bytes).sum())
                        .await?;
                    let objects: Vec<_> = blocks
                        .iter()
                        .map(|row| (row.block.object_key.clone(), row.block.size_bytes))
                        .collect();
                    match self.store.make_durable(blob, &objects).await {
                        Ok(()) => blocks,
                        // Replaced by the same block sent again, and cleaned already.
                        Err(Error::Gone(_)) if self.db.listed_blocks(blob, list).await? != blocks => continue,
                        Err(error) => return Err(error),
                    }
                }
                Err(error @ Error::UnknownBlock(_)) => match self.db.writable_blob(blob).await? {
                    Some(WritableBlob::Open(_)) => return Err(error),
                    // The database compares the list with the content and answers.
                    Some(WritableBlob::Sealed | WritableBlob::Superseded) | None => Vec::new(),
                },
                Err(error) => return Err(error),
            };
            failpoint::reach("list_durable");
            let now_ms = self.clock.now_ms();
            match self
                .db
                .commit_block_list(blob, list, &durable, content_type, now_ms)
                .await?
            {
                Committed::Done | Committed::AlreadySealed => {
                    failpoint::reach("list_after_commit");
                    return Ok(());
                }
                Committed::BlocksChanged => {}
            }
        }
        Err(Error::Busy(
            "blocks of the list keep changing, send the list again".to_owned(),
        ))
    }

    /// Makes one body the blob's whole content, durably.
    ///
    /// # Errors
    /// As [`Services::stage_block`] and [`Services::commit_block_list`].
    pub async fn put_blob<S>(&self, blob: BlobId, upload: Upload<S>, content_type: Option<&str>) -> Result<()>
    where
        S: Stream<Item = Result<Bytes>> + Send + 'static,
    {
        let limit = self.settings.uploads.max_put_blob_bytes;
        if upload.size_bytes > limit {
            return Err(Error::TooLarge(format!(
                "a blob sent at once may have at most {limit} bytes"
            )));
        }
        let kind = self.check_open(blob).await?;
        self.check_size(kind, upload.size_bytes)?;
        let block = if upload.size_bytes == 0 {
            None
        } else {
            let _share = self.memory.for_upload(BlockStore::PUT_HOLDS_BYTES).await?;
            Some(self.store_object(blob, upload).await?)
        };
        failpoint::reach("put_blob_stored");
        if let Some(block) = &block {
            self.store
                .make_durable(blob, &[(block.object_key.clone(), block.size_bytes)])
                .await?;
        }
        failpoint::reach("put_blob_durable");
        let committed = self
            .db
            .commit_whole(blob, block.as_ref(), content_type, self.clock.now_ms())
            .await;
        if let (Err(Error::Conflict(_) | Error::NotFound(_)), Some(block)) = (&committed, &block) {
            self.discard(&block.object_key).await;
        }
        failpoint::reach("put_blob_before_reply");
        committed
    }

    /// Streams a body into a fresh object and checks it against the client's checksums.
    pub(super) async fn store_object<S>(&self, blob: BlobId, upload: Upload<S>) -> Result<Block>
    where
        S: Stream<Item = Result<Bytes>> + Send + 'static,
    {
        let Upload {
            size_bytes,
            body,
            checksums,
        } = upload;
        let object_key = ObjectKey::fresh(blob);
        let (crc64, matches) = if let Some(expected) = checksums.md5 {
            let (sender, digest) = tokio::sync::oneshot::channel();
            let body = digesting(body, sender);
            let crc64 = self.store.put(&object_key, size_bytes, body).await?;
            (crc64, digest.await.is_ok_and(|digest| digest == expected))
        } else {
            (self.store.put(&object_key, size_bytes, body).await?, true)
        };
        if !matches || checksums.crc64.is_some_and(|expected| expected != crc64) {
            self.discard(&object_key).await;
            return Err(Error::ChecksumMismatch(
                "the bytes received do not have the checksum that was sent".to_owned(),
            ));
        }
        Ok(Block {
            object_key,
            object_offset: 0,
            size_bytes,
            crc64,
        })
    }

    async fn check_open(&self, blob: BlobId) -> Result<BlobKind> {
        match self.db.writable_blob(blob).await? {
            Some(WritableBlob::Open(kind)) => Ok(kind),
            Some(state) => Err(state.refusal()),
            None => Err(WritableBlob::missing()),
        }
    }

    /// How large a blob of that kind may be, if there is a limit.
    fn max_bytes(&self, kind: BlobKind) -> Option<u64> {
        match kind {
            BlobKind::Artifact => Some(self.settings.artifacts.max_size_bytes).filter(|limit| *limit > 0),
            BlobKind::Cache => self.max_cache_bytes(),
        }
    }

    /// As [`Services::check_size`], for a blob whose kind is asked for only where it matters.
    async fn check_list_size(&self, blob: BlobId, size_bytes: u64) -> Result<()> {
        let limits = [BlobKind::Artifact, BlobKind::Cache].map(|kind| self.max_bytes(kind));
        if limits.into_iter().flatten().all(|limit| size_bytes <= limit) {
            return Ok(());
        }
        match self.db.writable_blob(blob).await? {
            Some(WritableBlob::Open(kind)) => self.check_size(kind, size_bytes),
            // The database answers.
            _ => Ok(()),
        }
    }

    fn check_size(&self, kind: BlobKind, size_bytes: u64) -> Result<()> {
        let what = match kind {
            BlobKind::Artifact => "an artifact",
            BlobKind::Cache => "a cache entry",
        };
        match self.max_bytes(kind) {
            Some(limit) if size_bytes > limit => Err(Error::TooLarge(format!("{what} may have at most {limit} bytes"))),
            _ => Ok(()),
        }
    }

    /// Deletes an object that no row names. A failure leaves it to the cleaner.
    pub(super) async fn discard(&self, key: &ObjectKey) {
        if let Err(error) = self.store.delete(key).await {
            tracing::warn!(%key, %error, "a refused object stays until its blob is swept");
        }
    }
}

/// Passes a body through and tells its MD5 when it has ended.
fn digesting<S>(body: S, sender: tokio::sync::oneshot::Sender<[u8; 16]>) -> impl Stream<Item = Result<Bytes>> + Send
where
    S: Stream<Item = Result<Bytes>> + Send + 'static,
{
    let digest = std::sync::Arc::new(std::sync::Mutex::new(Md5::new()));
    let updating = std::sync::Arc::clone(&digest);
    let end = futures_util::stream::once(async move {
        let digest = std::mem::take(&mut *digest.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        // Nobody waits any more if the request is gone.
        let _ = sender.send(digest.finalize().into());
        Ok(Bytes::new())
    });
    body.inspect_ok(move |bytes| {
        updating
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .update(bytes)
    })
    .chain(end)
}
