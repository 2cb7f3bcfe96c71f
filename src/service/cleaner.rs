//! Taking away what nobody needs: expired artifacts, unused cache entries, abandoned uploads, leftover blocks.
//!
//! `app` runs it in the background and `wharfinger clean` once. One replica cleans at a time, under a lease; every
//! step may be cut anywhere and repeated. Rows are tombstones before their objects go, and go after them.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use uuid::Uuid;

use super::{Services, millis};
use crate::error::Result;
use crate::failpoint;
use crate::model::{BlobId, ObjectKey};

/// The `[cleaner]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    #[serde(with = "crate::duration")]
    pub interval: Duration,
    /// How long the bytes of a deleted or expired artifact or cache entry stay for downloads that are under way.
    #[serde(with = "crate::duration")]
    pub delete_grace: Duration,
    /// When the prefix of a sealed or dead blob is searched for leftovers: later than any request can last.
    #[serde(with = "crate::duration")]
    pub sweep_after: Duration,
    /// How long another replica waits before it cleans in the place of one that died.
    #[serde(with = "crate::duration")]
    pub lease: Duration,
    /// Rows per step, at most [`MAX_BATCH`].
    pub batch: u32,
}

/// Statements name up to two blobs for each row, and a step holds the lease.
pub const MAX_BATCH: u32 = 1_000;

/// What one pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub expired_artifacts: u64,
    pub abandoned_uploads: u64,
    /// Cache entries that were not used, or made room for others.
    pub evicted_cache_entries: u64,
    pub deleted_objects: u64,
    pub dropped_blobs: u64,
    /// What could not be deleted and is tried again.
    pub put_off: u64,
}

const LEASE: &str = "cleaner";
/// Blobs, and objects of each, that are looked at or deleted at once: a bucket answers after tens of milliseconds.
const AT_ONCE: usize = 8;
/// So many times as long as a step took, the cleaner rests before the next.
const RESTS_PER_STEP: u32 = 20;
/// A slow database makes long steps: with longer rests, 10,000 rows on Postgres would take minutes.
const LONGEST_REST: Duration = Duration::from_millis(20);
/// More than this off the database's clock, a replica does not trust its own and does not clean.
const MAX_CLOCK_SKEW_MS: i64 = 60_000;

impl Services {
    /// Cleans every now and then, for ever.
    pub async fn clean_in_background(&self) {
        loop {
            tokio::time::sleep(self.settings.cleaner.interval).await;
            match self.clean().await {
                Ok(Some(report)) if report != Report::default() => {
                    tracing::info!(
                        expired_artifacts = report.expired_artifacts,
                        abandoned_uploads = report.abandoned_uploads,
                        evicted_cache_entries = report.evicted_cache_entries,
                        deleted_objects = report.deleted_objects,
                        dropped_blobs = report.dropped_blobs,
                        "cleaned"
                    );
                }
                Ok(_) => {}
                Err(error) => {
                    metrics::counter!("wharfinger_cleaner_failures_total").increment(1);
                    tracing::warn!(%error, "cleaning stopped and will be tried again");
                }
            }
        }
    }

    /// How far this machine's clock is off the database's, in milliseconds, if that is too far to trust it. Says in the
    /// log when that begins and when it ends.
    pub async fn clock_is_off_by(&self) -> Result<Option<i64>> {
        let skew_ms = self.db.clock_skew_ms(&self.clock).await?;
        let is_off = skew_ms.abs() > MAX_CLOCK_SKEW_MS;
        let skew_s = skew_ms / 1000;
        match (self.clock_was_off.swap(is_off, Ordering::Relaxed), is_off) {
            (false, true) => tracing::warn!(
                skew_s,
                "this machine's clock is off the database's: not ready, and the cleaner pauses; set the clock right"
            ),
            (true, false) => tracing::warn!(skew_s, "this machine's clock agrees with the database's again"),
            _ => {}
        }
        Ok(is_off.then_some(skew_ms))
    }

    /// One pass over everything that is due. `None` if another replica is cleaning, or the clocks disagree.
    pub async fn clean(&self) -> Result<Option<Report>> {
        let holder = Uuid::new_v4();
        let pass = Pass {
            services: self,
            holder,
            report: Report::default(),
        };
        let outcome = pass.run().await;
        // If this fails the lease runs out by itself.
        let _ = self.db.release_lease(LEASE, holder).await;
        outcome
    }
}

/// What a pass does to many at once. Each returns how many objects it deleted.
impl Services {
    /// `None` if they could not be deleted, and the blob was put off.
    async fn empty_or_postpone(self, blob: BlobId, now_ms: i64, dead_again_ms: i64) -> Result<Option<u64>> {
        match self.clone().empty(blob, now_ms).await {
            Ok(deleted) => Ok(Some(deleted)),
            Err(error) => {
                tracing::warn!(%blob, %error, "a deleted blob's objects could not be deleted; it is tried again");
                self.db.postpone_emptying(blob, dead_again_ms).await?;
                Ok(None)
            }
        }
    }

    /// As [`Services::empty_or_postpone`].
    async fn collect_or_postpone(self, garbage: ObjectKey, again_ms: i64) -> Result<Option<u64>> {
        match self.clone().collect(garbage.clone()).await {
            Ok(deleted) => Ok(Some(deleted)),
            Err(error) => {
                tracing::warn!(key = %garbage, %error, "a replaced object could not be deleted; it is tried again");
                self.db.postpone_garbage(&garbage, again_ms).await?;
                Ok(None)
            }
        }
    }

    async fn empty(self, blob: BlobId, now_ms: i64) -> Result<u64> {
        let mut keys = self.db.objects_of(blob).await?;
        let rest = keys.split_off(keys.len() / 2);
        let halved = !keys.is_empty();
        let mut deleted = self.delete_unused(keys).await?;
        if halved {
            failpoint::reach("clean_half_of_blocks_deleted");
        }
        deleted += self.delete_unused(rest).await?;
        failpoint::reach("clean_before_emptied");
        self.db.mark_emptied(blob, now_ms).await?;
        Ok(deleted)
    }

    async fn collect(self, garbage: ObjectKey) -> Result<u64> {
        let deleted = self.clone().delete_if_unused(garbage.clone()).await?;
        failpoint::reach("clean_garbage_deleted");
        self.db.drop_garbage(&garbage).await?;
        Ok(deleted)
    }

    async fn delete_unused(&self, keys: Vec<ObjectKey>) -> Result<u64> {
        let deletes = stream::iter(keys).map(|key| self.clone().delete_if_unused(key));
        deletes.buffer_unordered(AT_ONCE).try_fold(0, sum).await
    }

    /// Deletes all that lies below the prefix of a blob which has no rows for it any more.
    async fn clear(self, blob: BlobId) -> Result<u64> {
        let deleted = self.delete_leftovers(blob, &HashSet::new(), i64::MAX).await?;
        self.store.remove_prefix(blob).await?;
        Ok(deleted)
    }

    async fn forget(self, blob: BlobId) -> Result<u64> {
        self.db.drop_blobs(&[blob]).await.map(|()| 0)
    }

    async fn sweep_blob(self, blob: BlobId, now_ms: i64) -> Result<u64> {
        let named = self.db.objects_of(blob).await?.into_iter().collect();
        let deleted = self.delete_leftovers(blob, &named, i64::MAX).await?;
        failpoint::reach("clean_before_swept");
        self.db.mark_swept(blob, now_ms).await?;
        Ok(deleted)
    }

    /// Chunks may still be coming: what is younger than any request may be named yet.
    async fn sweep_container(self, blob: BlobId, now_ms: i64, settled_ms: i64) -> Result<u64> {
        let named = self.db.objects_of(blob).await?.into_iter().collect();
        let deleted = self.delete_leftovers(blob, &named, settled_ms).await?;
        self.db.mark_container_swept(blob, now_ms).await?;
        Ok(deleted)
    }

    /// Deletes the objects below a blob's prefix that are not named and were made at or before `until_ms`. Returns how
    /// many there were.
    async fn delete_leftovers(&self, blob: BlobId, named: &HashSet<ObjectKey>, until_ms: i64) -> Result<u64> {
        let objects = self.store.list(blob).await?.into_iter();
        let leftovers = objects
            .filter(|object| object.modified_ms <= until_ms && !named.contains(&object.key))
            .map(|object| object.key);
        self.delete_unused(leftovers.collect()).await
    }

    /// The one place that deletes an object: only if no living blob has a row that names it.
    async fn delete_if_unused(self, key: ObjectKey) -> Result<u64> {
        if self.db.is_object_in_use(&key).await? {
            return Ok(0);
        }
        self.store.delete(&key).await?;
        failpoint::reach("clean_object_deleted");
        Ok(1)
    }
}

/// One pass. Each step works in batches. Before each of them it renews the lease and has the time confirmed by which it
/// judges what is due, so that a clock that jumps meanwhile deletes nothing.
struct Pass<'a> {
    services: &'a Services,
    holder: Uuid,
    report: Report,
}

impl Pass<'_> {
    async fn run(mut self) -> Result<Option<Report>> {
        if self.hold().await?.is_none() {
            return Ok(None);
        }
        self.bury().await?;
        self.bury_caches().await?;
        self.collect_garbage().await?;
        self.empty().await?;
        self.sweep().await?;
        self.collect_garbage().await?;
        self.drop_dead().await?;
        self.forget_closed_runs().await?;
        self.count();
        Ok(Some(self.report))
    }

    /// Takes or renews the lease and returns the time. `None` if another replica has it, or the clock is off.
    async fn hold(&self) -> Result<Option<i64>> {
        let Services(parts) = self.services;
        // Before the check: what it was then is what the check vouches for.
        let now_ms = parts.clock.now_ms();
        if self.services.clock_is_off_by().await?.is_some() {
            return Ok(None);
        }
        let until_ms = now_ms + millis(parts.settings.cleaner.lease);
        let held = parts.db.take_lease(LEASE, self.holder, now_ms, until_ms).await?;
        Ok(held.then_some(now_ms))
    }

    async fn forget_closed_runs(&self) -> Result<()> {
        let Services(parts) = self.services;
        if let Some(now_ms) = self.hold().await? {
            let before_ms = now_ms - parts.papers.closed_runs_count_for_ms();
            parts.db.forget_closed_runs(before_ms).await?;
        }
        Ok(())
    }

    fn batch(&self) -> i64 {
        self.services.settings.cleaner.batch.into()
    }

    async fn bury(&mut self) -> Result<()> {
        let Services(parts) = self.services;
        while let Some(now_ms) = self.hold().await? {
            let begun = Instant::now();
            let expired = parts.db.expire_artifacts(now_ms, self.batch()).await?;
            self.report.expired_artifacts += expired;
            if expired == 0 {
                break;
            }
            failpoint::reach("clean_expired");
            give_way(begun).await;
        }
        while let Some(now_ms) = self.hold().await? {
            let begun = Instant::now();
            let begun_before_ms = now_ms - millis(parts.settings.uploads.abandoned_after);
            let abandoned = parts.db.abandon_uploads(begun_before_ms, now_ms, self.batch()).await?;
            self.report.abandoned_uploads += abandoned;
            if abandoned == 0 {
                break;
            }
            failpoint::reach("clean_tombstoned");
            give_way(begun).await;
        }
        Ok(())
    }

    async fn bury_caches(&mut self) -> Result<()> {
        let Services(parts) = self.services;
        let settings = &parts.settings.cache;
        while let Some(now_ms) = self.hold().await? {
            let begun = Instant::now();
            let dead_since_ms = now_ms - millis(settings.reservation_ttl);
            let dead = parts.db.dead_reservations(dead_since_ms, self.batch()).await?;
            let given_up = parts.db.evict_cache_entries(&dead, "abandoned", now_ms).await?;
            self.report.abandoned_uploads += given_up;
            if given_up == 0 {
                break;
            }
            give_way(begun).await;
        }
        while let Some(now_ms) = self.hold().await? {
            let begun = Instant::now();
            let idle_since_ms = now_ms - millis(settings.idle_after);
            let idle = parts.db.idle_cache_entries(idle_since_ms, self.batch()).await?;
            let evicted = parts.db.evict_cache_entries(&idle, "expired", now_ms).await?;
            self.report.evicted_cache_entries += evicted;
            if evicted == 0 {
                break;
            }
            give_way(begun).await;
        }
        if settings.max_bytes_per_repository == 0 {
            return Ok(());
        }
        loop {
            let before = self.report.evicted_cache_entries;
            let large = parts
                .db
                .large_caches(settings.max_bytes_per_repository, self.batch())
                .await?;
            for cache in large {
                let Some(now_ms) = self.hold().await? else {
                    return Ok(());
                };
                let begun = Instant::now();
                let unused = parts.db.least_used_cache_entries(cache, self.batch()).await?;
                self.report.evicted_cache_entries += parts.db.evict_cache_entries(&unused, "evicted", now_ms).await?;
                failpoint::reach("clean_evicted");
                give_way(begun).await;
            }
            if self.report.evicted_cache_entries == before {
                return Ok(());
            }
        }
    }

    /// Deletes the objects of blobs that have been dead for the grace time.
    async fn empty(&mut self) -> Result<()> {
        let Services(parts) = self.services;
        while let Some(now_ms) = self.hold().await? {
            let dead_since_ms = now_ms - millis(parts.settings.cleaner.delete_grace);
            let blobs = parts.db.blobs_to_empty(dead_since_ms, self.batch()).await?;
            let again_ms = dead_since_ms + millis(parts.settings.cleaner.interval);
            let services = self.services;
            let work = blobs.into_iter();
            let work = work.map(|blob| services.clone().empty_or_postpone(blob, now_ms, again_ms));
            if !self.got_on(work).await? {
                break;
            }
        }
        Ok(())
    }

    /// Forgets dead blobs that no request can still be writing to, with all that lies below their prefix.
    async fn drop_dead(&mut self) -> Result<()> {
        let Services(parts) = self.services;
        while let Some(now_ms) = self.hold().await? {
            let begun = Instant::now();
            let dead_since_ms = now_ms - millis(parts.settings.cleaner.sweep_after);
            let blobs = parts.db.blobs_to_drop(dead_since_ms, self.batch()).await?;
            let services = self.services;
            let cleared = self.each(blobs, AT_ONCE, |blob| services.clone().clear(blob)).await;
            if cleared.is_empty() {
                break;
            }
            failpoint::reach("clean_before_drop");
            let dropped = match parts.db.drop_blobs(&cleared).await {
                Ok(()) => cleared,
                // It may be about one of them.
                Err(_) => self.each(cleared, 1, |blob| services.clone().forget(blob)).await,
            };
            if dropped.is_empty() {
                break;
            }
            self.report.dropped_blobs += dropped.len() as u64;
            give_way(begun).await;
        }
        Ok(())
    }

    /// Looks once below the prefix of each sealed blob for objects that a crash left without a row.
    async fn sweep(&mut self) -> Result<()> {
        let Services(parts) = self.services;
        while let Some(now_ms) = self.hold().await? {
            let begun = Instant::now();
            let sealed_before_ms = now_ms - millis(parts.settings.cleaner.sweep_after);
            let blobs = parts.db.blobs_to_sweep(sealed_before_ms, self.batch()).await?;
            let services = self.services;
            let sweep = |blob| services.clone().sweep_blob(blob, now_ms);
            if self.each(blobs, AT_ONCE, sweep).await.is_empty() {
                break;
            }
            give_way(begun).await;
        }
        while let Some(now_ms) = self.hold().await? {
            let begun = Instant::now();
            let settled_ms = now_ms - millis(parts.settings.cleaner.sweep_after);
            let containers = parts.db.containers_to_sweep(settled_ms, self.batch()).await?;
            let services = self.services;
            let sweep = |blob| services.clone().sweep_container(blob, now_ms, settled_ms);
            // One by one: each may have hundreds of thousands of objects.
            if self.each(containers, 1, sweep).await.is_empty() {
                break;
            }
            give_way(begun).await;
        }
        Ok(())
    }

    /// Deletes the objects that a transaction recorded as named by no row any more.
    async fn collect_garbage(&mut self) -> Result<()> {
        let Services(parts) = self.services;
        while let Some(now_ms) = self.hold().await? {
            let garbage = parts.db.garbage(now_ms, self.batch()).await?;
            let again_ms = now_ms + millis(parts.settings.cleaner.interval);
            let services = self.services;
            let work = garbage.into_iter();
            let work = work.map(|key| services.clone().collect_or_postpone(key, again_ms));
            if !self.got_on(work).await? {
                break;
            }
        }
        Ok(())
    }

    /// Does a batch, and counts what it deleted. `false` if there was nothing to do, or the first of it could not be done:
    /// a store that answers nobody would be waited for longer than the lease lasts.
    async fn got_on(&mut self, work: impl Iterator<Item = impl Future<Output = Result<Option<u64>>>>) -> Result<bool> {
        let begun = Instant::now();
        let (mut done, mut put_off) = (0, 0);
        let mut outcomes = stream::iter(work).buffer_unordered(AT_ONCE);
        while let Some(outcome) = outcomes.try_next().await? {
            match outcome {
                Some(deleted) => {
                    done += 1;
                    self.report.deleted_objects += deleted;
                }
                None => put_off += 1,
            }
            if done == 0 && put_off == AT_ONCE {
                break;
            }
        }
        self.report.put_off += put_off as u64;
        if done > 0 {
            give_way(begun).await;
        }
        Ok(done > 0)
    }

    /// Does its work for the blobs of a batch, some at once, as long as the lease is sure to last; a store that answers
    /// nobody is waited for long. Counts what was deleted and returns the blobs that are done with.
    async fn each<F>(&mut self, blobs: Vec<BlobId>, at_once: usize, work: impl Fn(BlobId) -> F) -> Vec<BlobId>
    where
        F: Future<Output = Result<u64>>,
    {
        let until = Instant::now() + self.services.settings.cleaner.lease / 2;
        let in_time = blobs.into_iter().take_while(|_| Instant::now() < until);
        let work = in_time.map(|blob| work(blob).map(move |outcome| (blob, outcome)));
        let mut outcomes = stream::iter(work).buffer_unordered(at_once);
        let mut done = Vec::new();
        while let Some((blob, outcome)) = outcomes.next().await {
            match outcome {
                Ok(deleted) => {
                    self.report.deleted_objects += deleted;
                    done.push(blob);
                }
                Err(error) => {
                    tracing::warn!(%blob, %error, "what is left of a blob could not be deleted; it is tried again");
                    self.report.put_off += 1;
                }
            }
        }
        done
    }

    fn count(&self) {
        metrics::counter!("wharfinger_cleaner_expired_artifacts_total").increment(self.report.expired_artifacts);
        metrics::counter!("wharfinger_cleaner_abandoned_uploads_total").increment(self.report.abandoned_uploads);
        metrics::counter!("wharfinger_cleaner_evicted_cache_entries_total")
            .increment(self.report.evicted_cache_entries);
        metrics::counter!("wharfinger_cleaner_deleted_objects_total").increment(self.report.deleted_objects);
        metrics::counter!("wharfinger_cleaner_dropped_blobs_total").increment(self.report.dropped_blobs);
        metrics::counter!("wharfinger_cleaner_passes_total").increment(1);
        if self.report.put_off > 0 {
            metrics::counter!("wharfinger_cleaner_failures_total").increment(1);
        }
    }
}

async fn sum(so_far: u64, more: u64) -> Result<u64> {
    Ok(so_far + more)
}

/// Rests between two steps, so that nearly all requests find the database and the processor free.
async fn give_way(begun: Instant) {
    let rest = begun.elapsed() * RESTS_PER_STEP;
    tokio::time::sleep(rest.min(LONGEST_REST)).await;
}
