//! The bytes of one object on their way in: counts them and computes their checksum.
//!
//! Both stores pull their frames from here. Never buffers more than the frame at hand.

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};
use futures_util::StreamExt;
use futures_util::stream::{BoxStream, Fuse};

use crate::error::{Error, Result};
use crate::failpoint;

pub(super) struct Intake {
    body: Fuse<BoxStream<'static, Result<Bytes>>>,
    size_bytes: u64,
    left: u64,
    digest: Digest,
}

impl Intake {
    pub(super) fn new(size_bytes: u64, body: BoxStream<'static, Result<Bytes>>) -> Self {
        Self {
            body: body.fuse(),
            size_bytes,
            left: size_bytes,
            digest: Digest::new(CrcAlgorithm::Crc64Nvme),
        }
    }

    /// The next frame, never empty; `None` after the last one. A body of another length is refused before its last
    /// frame is given out, so that whoever declared the length downstream can't mistake the first part for all.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        let Some(frame) = self.frame().await? else {
            return match self.left {
                0 => Ok(None),
                left => Err(Error::Invalid(format!(
                    "the body ended after {} of {} bytes",
                    self.size_bytes - left,
                    self.size_bytes
                ))),
            };
        };
        self.left = self
            .left
            .checked_sub(frame.len() as u64)
            .ok_or_else(|| self.too_long())?;
        if self.left == 0 && self.frame().await?.is_some() {
            return Err(self.too_long());
        }
        self.digest.update(&frame);
        Ok(Some(frame))
    }

    /// Told when the store has taken what was given out so far.
    pub(super) fn taken(&self) {
        if (1..self.size_bytes).contains(&self.left) {
            failpoint::reach("block_first_byte");
            if self.left <= self.size_bytes / 2 {
                failpoint::reach("block_half");
            }
        }
    }

    /// Whether the last byte was given out. A body of no bytes is complete from the start, yet its end is unseen.
    pub(super) fn is_complete(&self) -> bool {
        self.left == 0
    }

    /// CRC-64/NVME of what was given out.
    pub(super) fn crc64(&self) -> u64 {
        self.digest.finalize()
    }

    async fn frame(&mut self) -> Result<Option<Bytes>> {
        loop {
            match self.body.next().await.transpose()? {
                Some(frame) if frame.is_empty() => {}
                frame => return Ok(frame),
            }
        }
    }

    fn too_long(&self) -> Error {
        Error::Invalid(format!("the body is longer than {} bytes", self.size_bytes))
    }
}
