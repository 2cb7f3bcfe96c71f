//! Rows and a window of bytes become one stream.
//!
//! `service/` asks [`window`] which pieces of which blocks a reader wants, [`BlockReader`] sends them.
//! Never ends cleanly when the store comes short: the last item is then an error.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::vec;

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};

use super::{BlockStore, damage};
use crate::error::{Error, Result};
use crate::model::Block;

/// How many small pieces are fetched ahead from a bucket, and how many bytes they may have together.
const MAX_AHEAD: usize = 16;
const AHEAD_BYTES: u64 = 256 * 1024;

/// Bytes `from..to` of a block, counted from the block's own start. Never empty when [`window`] made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub block: Block,
    pub from: u64,
    pub to: u64,
}

impl Piece {
    fn is_whole_block(&self) -> bool {
        self.from == 0 && self.to == self.block.size_bytes
    }
}

/// The pieces that make up bytes `range` of a blob.
///
/// `blocks` are pairs of a block and where in the blob it starts, in order; blocks outside of the range may be
/// there or be left out. [`Error::Internal`] when they leave a hole in the range or overlap in it.
pub fn window(blocks: impl IntoIterator<Item = (u64, Block)>, range: Range<u64>) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut at = range.start;
    for (start, block) in blocks {
        let end = start.saturating_add(block.size_bytes);
        if end.min(range.end) <= start.max(range.start) {
            continue;
        }
        if start.max(range.start) != at {
            return Err(Error::Internal(format!(
                "block rows do not join at byte {at} of the blob"
            )));
        }
        at = end.min(range.end);
        pieces.push(Piece {
            from: start.max(range.start) - start,
            to: at - start,
            block,
        });
    }
    if at < range.end {
        return Err(Error::Internal(format!(
            "block rows end at byte {at} of the blob, {} are wanted",
            range.end
        )));
    }
    Ok(pieces)
}

/// The bytes of some pieces, in order. Dropping it stops the reading.
///
/// A block that is read whole is checked against its CRC before its last chunk is given out.
pub struct BlockReader(BoxStream<'static, Result<Bytes>>);

impl BlockReader {
    pub(super) async fn open(store: BlockStore, pieces: Vec<Piece>) -> Result<Self> {
        let reading = Reading {
            ahead: VecDeque::new(),
            pieces: pieces.into_iter(),
            store,
        };
        let mut chunks = Box::pin(stream::try_unfold((None, reading), |(current, reading)| {
            next(current, reading)
        }));
        let first = chunks.next().await.transpose()?;
        Ok(Self(stream::iter(first.map(Ok)).chain(chunks).boxed()))
    }
}

impl Stream for BlockReader {
    type Item = Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(context)
    }
}

/// What comes after the current piece.
struct Reading {
    /// Being fetched already: all the while from a bucket, which takes long to answer; from a disk, which has its kernel
    /// read ahead, only behind the last chunk of the current piece.
    ahead: VecDeque<Source>,
    pieces: vec::IntoIter<Piece>,
    store: BlockStore,
}

impl Reading {
    fn fetch_next(&mut self) -> Option<Source> {
        let piece = self.pieces.next()?;
        let digest = piece.is_whole_block().then(|| Digest::new(CrcAlgorithm::Crc64Nvme));
        Some(Source {
            chunks: self.store.fetch(&piece),
            left: piece.to.saturating_sub(piece.from),
            digest,
            piece,
        })
    }

    /// Keeps the next piece ahead, and those behind it as long as all of them are small: a bucket takes as long to
    /// answer for a few bytes as for many.
    fn fetch_ahead(&mut self) {
        while let Some(next) = self.pieces.as_slice().first() {
            let bytes: u64 = self.ahead.iter().map(|source| source.left).sum();
            let small = self.ahead.len() < MAX_AHEAD && bytes + next.to.saturating_sub(next.from) <= AHEAD_BYTES;
            if !self.ahead.is_empty() && !small {
                break;
            }
            let next = self.fetch_next();
            self.ahead.extend(next);
        }
    }
}

type Step = (Bytes, (Option<Source>, Reading));

async fn next(mut current: Option<Source>, mut reading: Reading) -> Result<Option<Step>> {
    loop {
        let Some(source) = &mut current else {
            current = reading.ahead.pop_front().or_else(|| reading.fetch_next());
            if current.is_none() {
                return Ok(None);
            }
            if matches!(reading.store, BlockStore::Object(_)) {
                reading.fetch_ahead();
            }
            continue;
        };
        match source.next().await? {
            Some(chunk) => {
                if source.left == 0 && reading.ahead.is_empty() {
                    let next = reading.fetch_next();
                    reading.ahead.extend(next);
                }
                return Ok(Some((chunk, (current, reading))));
            }
            None => current = None,
        }
    }
}

/// One piece on its way out of the store.
struct Source {
    piece: Piece,
    chunks: BoxStream<'static, Result<Bytes>>,
    left: u64,
    /// There when the piece is the whole block, so that its CRC is known.
    digest: Option<Digest>,
}

impl Source {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        if self.left == 0 {
            return Ok(None);
        }
        let key = &self.piece.block.object_key;
        let chunk = match self.chunks.next().await {
            Some(Ok(chunk)) => chunk,
            Some(Err(Error::NotFound(_))) => return Err(damage("missing", key)),
            Some(Err(error)) => return Err(error),
            None => return Err(damage("short", key)),
        };
        self.left = self
            .left
            .checked_sub(chunk.len() as u64)
            .ok_or_else(|| Error::Internal(format!("the store sent more of {key} than was asked for")))?;
        if let Some(digest) = &mut self.digest {
            digest.update(&chunk);
            if self.left == 0 && digest.finalize() != self.piece.block.crc64 {
                return Err(damage("crc", key));
            }
        }
        Ok(Some(chunk))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{BlobId, ObjectKey};

    /// Blocks of these sizes, one after the other.
    fn rows(sizes: &[u64]) -> Vec<(u64, Block)> {
        let blob = BlobId::fresh();
        let mut start = 0;
        sizes
            .iter()
            .map(|&size_bytes| {
                let block = Block {
                    object_key: ObjectKey::fresh(blob),
                    object_offset: 0,
                    size_bytes,
                    crc64: 0,
                };
                start += size_bytes;
                (start - size_bytes, block)
            })
            .collect()
    }

    fn ranges(pieces: &[Piece]) -> Vec<(u64, u64)> {
        pieces.iter().map(|piece| (piece.from, piece.to)).collect()
    }

    #[test]
    fn cuts_the_first_and_the_last_block() {
        let rows = rows(&[10, 10, 10]);
        let pieces = window(rows.clone(), 5..25).unwrap();
        assert_eq!(ranges(&pieces), [(5, 10), (0, 10), (0, 5)]);
        assert_eq!(pieces[1].block, rows[1].1);
        assert_eq!(ranges(&window(rows.clone(), 10..20).unwrap()), [(0, 10)]);
        assert_eq!(ranges(&window(rows.clone(), 12..13).unwrap()), [(2, 3)]);
        assert!(window(rows, 30..30).unwrap().is_empty());
    }

    #[test]
    fn leaves_out_empty_blocks() {
        let rows = rows(&[0, 4, 0, 0, 4, 0]);
        assert_eq!(ranges(&window(rows.clone(), 0..8).unwrap()), [(0, 4), (0, 4)]);
        assert!(window(rows, 0..0).unwrap().is_empty());
        assert!(window([], 0..0).unwrap().is_empty());
    }

    #[test]
    fn refuses_holes_overlaps_and_a_short_end() {
        let mut with_hole = rows(&[4, 4, 4]);
        with_hole.remove(1);
        assert!(matches!(window(with_hole.clone(), 0..12), Err(Error::Internal(_))));
        assert_eq!(ranges(&window(with_hole, 8..12).unwrap()), [(0, 4)]);
        let mut overlapping = rows(&[4, 4]);
        overlapping[1].0 = 3;
        assert!(matches!(window(overlapping, 0..7), Err(Error::Internal(_))));
        assert!(matches!(window(rows(&[4]), 0..5), Err(Error::Internal(_))));
        assert!(matches!(window([], 0..1), Err(Error::Internal(_))));
    }

    proptest! {
        #[test]
        fn pieces_are_exactly_the_range(sizes in prop::collection::vec(0_u64..9, 0..12), a in 0_u64..99, b in 0_u64..99) {
            let total: u64 = sizes.iter().sum();
            let range = a.min(b).min(total)..a.max(b).min(total);
            let rows = rows(&sizes);
            let pieces = window(rows.clone(), range.clone()).unwrap();
            let mut at = range.start;
            for piece in &pieces {
                prop_assert!(piece.from < piece.to && piece.to <= piece.block.size_bytes);
                let (start, _) = rows.iter().find(|(_, block)| *block == piece.block).unwrap();
                prop_assert_eq!(start + piece.from, at);
                at += piece.to - piece.from;
            }
            prop_assert_eq!(at, range.end);
        }
    }
}
