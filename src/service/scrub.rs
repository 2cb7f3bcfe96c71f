//! Reading everything again, slowly, so that rot is found before somebody needs the bytes.
//!
//! `app` runs it in the background; one replica at a time, under a lease. Damaged artifacts and cache entries are marked
//! lost and reported; nothing is deleted.

use std::time::Duration;

use futures_util::StreamExt;
use serde::Deserialize;
use uuid::Uuid;

use super::{Services, millis};
use crate::db::SealedBlob;
use crate::error::{Error, Result};
use crate::storage;

/// The `[scrub]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Everything is read once in this time.
    #[serde(with = "crate::duration")]
    pub cycle: Duration,
    /// And not faster than this; 0 for no scrub at all.
    pub max_bytes_per_second: u64,
}

const LEASE: &str = "scrub";
/// How long to sleep when nothing is due or another replica scrubs.
const IDLE: Duration = Duration::from_secs(60);

impl Services {
    /// Scrubs whatever is due, for ever.
    pub async fn scrub_in_background(&self) {
        let holder = Uuid::new_v4();
        if self.settings.scrub.max_bytes_per_second == 0 {
            return;
        }
        loop {
            match self.scrub_next(holder).await {
                Ok(true) => {}
                Ok(false) => tokio::time::sleep(IDLE).await,
                Err(error) => {
                    tracing::warn!(%error, "scrubbing stopped and will be tried again");
                    tokio::time::sleep(IDLE).await;
                }
            }
        }
    }

    /// Reads the blob that is due the longest. `false` if none is, or another replica scrubs.
    pub async fn scrub_next(&self, holder: Uuid) -> Result<bool> {
        let now_ms = self.clock.now_ms();
        let lease_ms = millis(self.settings.cleaner.lease);
        if !self.db.take_lease(LEASE, holder, now_ms, now_ms + lease_ms).await? {
            return Ok(false);
        }
        let Some(blob) = self
            .db
            .blob_to_scrub(now_ms - millis(self.settings.scrub.cycle))
            .await?
        else {
            return Ok(false);
        };
        match self.read_slowly(&blob, holder).await {
            Ok(true) => {}
            // Another replica took over: it reads the blob too.
            Ok(false) => return Ok(false),
            Err(Error::Gone(_) | Error::Internal(_)) => {
                if let Some(reason) = self.confirmed_damage(&blob, true).await?
                    && self.db.mark_lost(blob.id).await?
                {
                    metrics::counter!("wharfinger_lost_artifacts_total").increment(1);
                    tracing::error!(blob = %blob.id, %reason, "an artifact or a cache entry is damaged and was taken out");
                }
            }
            Err(error) => return Err(error),
        }
        self.db.mark_scrubbed(blob.id, self.clock.now_ms()).await?;
        Ok(true)
    }

    /// Reads a blob block by block, each checked by its CRC, within the rate. `false` if the lease was lost meanwhile.
    async fn read_slowly(&self, blob: &SealedBlob, holder: Uuid) -> Result<bool> {
        if blob.size_bytes == 0 {
            return Ok(true);
        }
        let lease_ms = millis(self.settings.cleaner.lease);
        let mut renew_at_ms = self.clock.now_ms() + lease_ms / 2;
        let blocks = self.db.content_blocks(blob.id, 0, blob.size_bytes).await?;
        let mut bytes = self.store.read(storage::window(blocks, 0..blob.size_bytes)?).await?;
        while let Some(chunk) = bytes.next().await {
            let seconds = chunk?.len() as f64 / self.settings.scrub.max_bytes_per_second as f64;
            tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
            let now_ms = self.clock.now_ms();
            if now_ms >= renew_at_ms {
                if !self.db.take_lease(LEASE, holder, now_ms, now_ms + lease_ms).await? {
                    return Ok(false);
                }
                renew_at_ms = now_ms + lease_ms / 2;
            }
        }
        Ok(true)
    }
}
