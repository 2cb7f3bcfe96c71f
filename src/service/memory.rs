//! How much memory bytes may take on their way through the server, and who waits when it is taken.
//!
//! `uploads.rs`, `files.rs` and `downloads.rs` take a share before the first byte moves and keep it until the last. A
//! share is what one stream can hold at once, whatever it says of its length; who waits for one holds next to nothing.
//! What is read or sent whole has one for what there is of it, through [`Services::grow_upload`] and [`Services::hold`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::Services;
use crate::error::{Error, Result};

/// The `[memory]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// What all uploads together may hold.
    pub upload_bytes: u64,
    /// What all downloads together may hold.
    pub download_bytes: u64,
    /// How long a request waits for its share.
    #[serde(with = "crate::duration")]
    pub wait: Duration,
}

/// Shares are counted in pieces of this size, so that a semaphore's counter is enough.
const UNIT_BYTES: u64 = 64 * 1024;
/// So much of what is read or sent whole is not counted: nearly every message is smaller.
pub const SMALL_BYTES: usize = 64 * 1024;
/// A downloading client gives up for good after 30 s without a byte, but comes again after a 503.
const DOWNLOAD_WAIT: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub struct Memory {
    uploads: Budget,
    downloads: Budget,
}

/// A part of the memory, given back when it is dropped.
#[derive(Debug)]
pub struct Share(OwnedSemaphorePermit);

/// Bytes with the share that they take.
struct Held {
    bytes: Vec<u8>,
    _share: Share,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Services {
    /// Adds to the share of what is read whole, as more of it comes.
    ///
    /// # Errors
    /// [`Error::Busy`] when there is none within the time to wait.
    pub async fn grow_upload(&self, share: &mut Option<Share>, bytes: u64) -> Result<()> {
        self.memory.uploads.grow(share, bytes).await
    }

    /// A reply, or a part of one, that was made in memory: with a share of it until its client has taken it, unless it
    /// is small.
    ///
    /// # Errors
    /// As above.
    pub async fn hold(&self, bytes: Vec<u8>) -> Result<Bytes> {
        if bytes.len() <= SMALL_BYTES {
            return Ok(bytes.into());
        }
        let share = self.memory.for_download(bytes.len() as u64).await?;
        Ok(with_share(bytes, share))
    }
}

/// Bytes that give their share back when nobody has them any more.
pub fn with_share(bytes: Vec<u8>, share: Share) -> Bytes {
    Bytes::from_owner(Held { bytes, _share: share })
}

#[derive(Debug)]
struct Budget {
    free: Arc<Semaphore>,
    units: u32,
    wait: Duration,
    metric: &'static str,
}

impl Memory {
    pub fn new(settings: &Settings) -> Self {
        Self {
            uploads: Budget::new(settings.upload_bytes, settings.wait, "upload"),
            downloads: Budget::new(settings.download_bytes, settings.wait.min(DOWNLOAD_WAIT), "download"),
        }
    }

    /// A share for an upload that holds up to so many bytes at once.
    ///
    /// # Errors
    /// [`Error::Busy`] when there is none within the time to wait.
    pub async fn for_upload(&self, bytes: u64) -> Result<Share> {
        self.uploads.take(bytes).await
    }

    /// Whether nobody holds anything.
    pub fn is_free(&self) -> bool {
        self.uploads.is_free() && self.downloads.is_free()
    }

    /// A share for a download.
    ///
    /// # Errors
    /// As for an upload.
    pub async fn for_download(&self, bytes: u64) -> Result<Share> {
        self.downloads.take(bytes).await
    }
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

impl Budget {
    fn new(bytes: u64, wait: Duration, metric: &'static str) -> Self {
        let units = units(bytes).clamp(1, u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX));
        Self {
            free: Arc::new(Semaphore::new(units as usize)),
            units,
            wait,
            metric,
        }
    }

    fn is_free(&self) -> bool {
        self.free.available_permits() == self.units as usize
    }

    async fn take(&self, bytes: u64) -> Result<Share> {
        // A stream that is larger than all there is goes alone.
        self.take_units(units(bytes).min(self.units)).await
    }

    /// Many that grow can wait for each other, until the time to wait is over for the first of them.
    async fn grow(&self, share: &mut Option<Share>, bytes: u64) -> Result<()> {
        let held = share.as_ref().map_or(0, |share| share.0.num_permits());
        let free_for_it = self.units.saturating_sub(u32::try_from(held).unwrap_or(u32::MAX));
        let more = self.take_units(units(bytes).min(free_for_it)).await?;
        match share {
            Some(share) => share.0.merge(more.0),
            None => *share = Some(more),
        }
        Ok(())
    }

    async fn take_units(&self, wanted: u32) -> Result<Share> {
        match timeout(self.wait, Arc::clone(&self.free).acquire_many_owned(wanted)).await {
            Ok(Ok(permit)) => Ok(Share(permit)),
            Ok(Err(_)) | Err(_) => {
                metrics::counter!("wharfinger_memory_refused_total", "for" => self.metric).increment(1);
                Err(Error::Busy("the server is busy, try again".to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With no time to wait at all.
    fn memory() -> Memory {
        Memory::new(&Settings {
            upload_bytes: 4 * UNIT_BYTES,
            download_bytes: UNIT_BYTES,
            wait: Duration::ZERO,
        })
    }

    #[tokio::test]
    async fn a_share_is_there_when_enough_is_free() {
        let memory = memory();
        let first = memory.for_upload(3 * UNIT_BYTES - 1).await.unwrap();
        assert!(matches!(memory.for_upload(2 * UNIT_BYTES).await, Err(Error::Busy(_))));
        let second = memory.for_upload(UNIT_BYTES).await.unwrap();
        drop(first);
        let third = memory.for_upload(3 * UNIT_BYTES).await.unwrap();
        drop((second, third));
        memory.for_download(1).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_larger_than_all_goes_alone() {
        let memory = memory();
        let mut grown = None;
        for _ in 0..10 {
            memory.uploads.grow(&mut grown, UNIT_BYTES).await.unwrap();
        }
        assert!(memory.for_upload(1).await.is_err());
        drop(grown);
        memory.for_upload(1).await.unwrap();
        let alone = memory.for_download(100 * UNIT_BYTES).await.unwrap();
        assert!(memory.for_download(1).await.is_err());
        drop(alone);
        memory.for_download(1).await.unwrap();
    }
}
