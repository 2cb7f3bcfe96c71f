//! Bytes going out: a finalized blob, whole or in part.
//!
//! Called by `api/blobs.rs` with a verified read link, and for pieces by `files.rs`. Bytes that were not compared with
//! the client's hash yet never leave as a complete reply unless they match it.

use std::ops::Range;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use sha2::Digest;

use super::Services;
use crate::db::ReadableBlob;
use crate::error::{Error, Result};
use crate::model::{BlobId, Sha256};
use crate::storage::{self, BlockStore, Piece};

/// How much of an unverified blob is held back until its hash is known.
const HELD_BACK_BYTES: u64 = 64 * 1024;

/// What a piece of a download takes until it is sent, and how many are not counted.
const PIECE_BYTES: u64 = 256;
const FREE_PIECES: usize = 1_000;

/// The bytes of a reply. An error item means that the reply must be cut.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>;

impl Services {
    /// Looks a blob up for a read link.
    ///
    /// # Errors
    /// [`Error::NotFound`] while it is pending, and once it is expired or deleted; [`Error::Gone`] if it is lost.
    pub async fn readable_blob(&self, blob: BlobId) -> Result<ReadableBlob> {
        match self.db.readable_blob(blob, self.clock.now_ms()).await? {
            Some(blob) if blob.lost => Err(Error::Gone("the bytes were damaged in the store".to_owned())),
            Some(blob) => Ok(blob),
            None => Err(Error::NotFound(
                "the blob does not exist, expired or was deleted".to_owned(),
            )),
        }
    }

    /// Opens the bytes `range` of a blob. The first of them are at hand when this returns.
    ///
    /// # Errors
    /// [`Error::Busy`] for a part of an unverified blob that touches its last block; store and database errors.
    pub async fn read_blob(&self, blob: &ReadableBlob, range: Range<u64>) -> Result<ByteStream> {
        if range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        let whole = range == (0..blob.size_bytes);
        let expected = if blob.unverified { blob.sha256 } else { None };
        let blocks = self.db.content_blocks(blob.id, range.start, range.end).await?;
        if expected.is_some() && !whole && range.end > self.last_block_start(blob).await? {
            return Err(Error::Busy(
                "the end of the artifact is still being verified, try again".to_owned(),
            ));
        }
        let bytes = self.read_pieces(storage::window(blocks, range)?).await?;
        Ok(match expected {
            Some(expected) if whole => self.verified(blob, expected, bytes),
            _ => bytes,
        })
    }

    /// Opens pieces of objects, within the memory that downloads may take.
    pub(super) async fn read_pieces(&self, pieces: Vec<Piece>) -> Result<ByteStream> {
        // A blob of very many blocks needs room for what is known of them.
        let rows = pieces.len().saturating_sub(FREE_PIECES) as u64 * PIECE_BYTES;
        let share = self.memory.for_download(BlockStore::READ_HOLDS_BYTES + rows).await?;
        let reader = self.store.read(pieces).await?;
        Ok(Box::pin(reader.inspect(move |_| {
            let _held = &share;
        })))
    }

    async fn last_block_start(&self, blob: &ReadableBlob) -> Result<u64> {
        let end = blob.size_bytes;
        let last = self.db.content_blocks(blob.id, end.saturating_sub(1), end).await?;
        Ok(last.first().map_or(0, |(start, _)| *start))
    }

    /// Hashes a whole blob while it goes out, and cuts it before its end if the hash is wrong.
    fn verified(&self, blob: &ReadableBlob, expected: Sha256, bytes: ByteStream) -> ByteStream {
        let reply = Verified {
            services: self.clone(),
            blob: blob.id,
            expected,
            left: blob.size_bytes,
            bytes,
            hasher: sha2::Sha256::new(),
            held: Vec::new(),
        };
        let chunks = stream::unfold(Some(reply), |reply| async {
            let mut reply = reply?;
            match reply.next().await {
                Ok(Step::Send(chunk)) => Some((Ok(chunk), Some(reply))),
                Ok(Step::End(chunk)) => Some((Ok(chunk), None)),
                Err(error) => Some((Err(error), None)),
            }
        });
        Box::pin(chunks)
    }
}

/// A reply whose last bytes wait for the hash of all.
struct Verified {
    services: Services,
    blob: BlobId,
    expected: Sha256,
    /// Bytes not yet read.
    left: u64,
    bytes: ByteStream,
    hasher: sha2::Sha256,
    held: Vec<u8>,
}

enum Step {
    Send(Bytes),
    End(Bytes),
}

impl Verified {
    async fn next(&mut self) -> Result<Step> {
        while let Some(chunk) = self.bytes.next().await {
            let mut chunk = chunk?;
            self.hasher = super::verification::hash(std::mem::take(&mut self.hasher), chunk.clone()).await?;
            self.left = self.left.saturating_sub(chunk.len() as u64);
            let tail = HELD_BACK_BYTES.saturating_sub(self.left).min(chunk.len() as u64);
            let now = chunk.split_to(chunk.len() - usize::try_from(tail).unwrap_or(chunk.len()));
            self.held.extend_from_slice(&chunk);
            if !now.is_empty() {
                return Ok(Step::Send(now));
            }
        }
        let actual = Sha256(std::mem::take(&mut self.hasher).finalize().into());
        if actual == self.expected {
            self.services.db.pass_verification(self.blob, &actual).await?;
            Ok(Step::End(std::mem::take(&mut self.held).into()))
        } else {
            Err(self.services.reject_content(self.blob, self.expected, actual).await)
        }
    }
}
