//! Comparing content with the hash that its client sent.
//!
//! `service/artifacts.rs` calls it at Finalize, `service/downloads.rs` while bytes go out, `fsck.rs` for what it
//! reads, and `app` runs it in the background for what is too large for either. It never changes bytes.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use serde::Deserialize;
use sha2::Digest;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{Services, millis};
use crate::db::Verification;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::model::{BlobId, Sha256};
use crate::storage::{self, BlockReader};

/// The `[verification]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Up to this size the hash is checked before Finalize answers.
    pub inline_max_bytes: u64,
    /// How long another replica waits before it takes over from one that died while hashing.
    #[serde(with = "crate::duration")]
    pub lease: Duration,
}

/// How long the verifier sleeps at most when nobody wakes it: for what other replicas left.
const IDLE: Duration = Duration::from_secs(15);

/// The right to hash a blob while the others leave it alone, to be renewed now and then.
pub(super) struct Claim {
    lease_ms: i64,
    renew_at_ms: i64,
}

/// Hashing so little takes less than the trip to another thread.
const HASHED_IN_PLACE_BYTES: u64 = 64 * 1024;
/// Blobs that are hashed at once on a machine of few cores; on others one for each.
const LEAST_HASHES_AT_ONCE: usize = 4;

pub(super) fn hashes_at_once() -> usize {
    std::thread::available_parallelism().map_or(LEAST_HASHES_AT_ONCE, |cores| cores.get().max(LEAST_HASHES_AT_ONCE))
}

/// Feeds a chunk to a hash, a large one away from the threads that serve requests.
pub(super) async fn hash(mut hasher: sha2::Sha256, chunk: Bytes) -> Result<sha2::Sha256> {
    if chunk.len() as u64 <= HASHED_IN_PLACE_BYTES {
        hasher.update(&chunk);
        return Ok(hasher);
    }
    tokio::task::spawn_blocking(move || {
        hasher.update(&chunk);
        hasher
    })
    .await
    .map_err(stopped)
}

fn stopped(error: tokio::task::JoinError) -> Error {
    Error::Internal(format!("hashing stopped: {error}"))
}

impl Services {
    /// The SHA-256 of a blob's content. `None` if it is hashed under a claim, and the claim ended because somebody
    /// else hashed or deleted the blob.
    pub(super) async fn hash_blob(
        &self,
        blob: BlobId,
        size_bytes: u64,
        claim: Option<Claim>,
    ) -> Result<Option<Sha256>> {
        let _place = self
            .hashing
            .acquire()
            .await
            .map_err(|_| Error::Busy("the server stops".to_owned()))?;
        let blocks = self.db.content_blocks(blob, 0, size_bytes).await?;
        let pieces = storage::window(blocks, 0..size_bytes)?;
        let services = self.clone();
        let hashing = async move {
            let bytes = services.store.read(pieces).await?;
            services.hash_bytes(blob, bytes, claim).await
        };
        if size_bytes <= HASHED_IN_PLACE_BYTES {
            return hashing.await;
        }
        // One thread reads and hashes all of it: bytes that change the processor's core are fetched from memory again.
        // It stops at the next chunk when nobody waits any more.
        let stop = CancellationToken::new();
        let _waiting = stop.clone().drop_guard();
        let runtime = Handle::current();
        tokio::task::spawn_blocking(move || runtime.block_on(stop.run_until_cancelled(hashing)))
            .await
            .map_err(stopped)?
            .ok_or_else(|| Error::Busy("nobody waits for the hash".to_owned()))?
    }

    async fn hash_bytes(
        &self,
        blob: BlobId,
        mut bytes: BlockReader,
        mut claim: Option<Claim>,
    ) -> Result<Option<Sha256>> {
        let mut hasher = sha2::Sha256::new();
        while let Some(chunk) = bytes.next().await {
            hasher.update(&chunk?);
            let now_ms = self.clock.now_ms();
            if let Some(claim) = claim.as_mut().filter(|claim| claim.renew_at_ms <= now_ms) {
                claim.renew_at_ms = now_ms + claim.lease_ms / 2;
                if !self.db.extend_verification(blob, now_ms + claim.lease_ms).await? {
                    return Ok(None);
                }
            }
            // Where the cancellation is seen.
            tokio::task::yield_now().await;
        }
        Ok(Some(Sha256(hasher.finalize().into())))
    }

    /// Takes content that is not what its client hashed out of sight, and says so.
    pub(super) async fn reject_content(&self, blob: BlobId, expected: Sha256, actual: Sha256) -> Error {
        failpoint::reach("verify_before_reject");
        match self.db.fail_verification(blob, self.clock.now_ms()).await {
            Ok(true) => {
                metrics::counter!("wharfinger_verification_failed_total").increment(1);
                tracing::error!(%blob, %expected, %actual, "an artifact is not what its client hashed and was taken out");
            }
            Ok(false) => {}
            Err(error) => return error,
        }
        Error::Gone(format!(
            "the artifact's content has {actual} and not {expected} as its client said"
        ))
    }

    pub(super) fn wake_verifier(&self) {
        self.verify.notify_one();
    }

    /// Verifies whatever waits, for ever. Dropping the future loses nothing: the claim runs out.
    pub async fn verify_in_background(&self) {
        // A claim left by a crash runs out after a lease.
        let idle = IDLE.min(self.settings.verification.lease);
        loop {
            match self.verify_next().await {
                Ok(true) => {}
                Ok(false) => {
                    // Either way the queue is looked at again.
                    let _ = tokio::time::timeout(idle, self.verify.notified()).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "verification failed and will be tried again");
                    tokio::time::sleep(idle).await;
                }
            }
        }
    }

    /// Verifies one blob. `false` if none waits.
    pub async fn verify_next(&self) -> Result<bool> {
        let now_ms = self.clock.now_ms();
        let lease_ms = millis(self.settings.verification.lease);
        let Some(Verification {
            blob,
            size_bytes,
            expected,
        }) = self.db.claim_verification(now_ms, now_ms + lease_ms).await?
        else {
            return Ok(false);
        };
        failpoint::reach("verify_claimed");
        let claim = Claim {
            lease_ms,
            renew_at_ms: now_ms + lease_ms / 2,
        };
        let actual = self.hash_blob(blob, size_bytes, Some(claim)).await?;
        match (actual, expected) {
            (Some(actual), Some(expected)) if actual != expected => {
                match self.reject_content(blob, expected, actual).await {
                    Error::Gone(_) => {}
                    error => return Err(error),
                }
            }
            (Some(actual), _) => {
                failpoint::reach("verify_before_pass");
                self.db.pass_verification(blob, &actual).await?;
            }
            // Somebody's download hashed it first, or it was deleted.
            (None, _) => {}
        }
        Ok(true)
    }
}
