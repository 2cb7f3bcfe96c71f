//! Whether database and store agree: the invariants behind what was promised, checked while the server runs.
//!
//! `wharfinger fsck` calls it. Repairs only what is provable: deletes objects that nobody knows and that are older than
//! any request, marks artifacts and cache entries whose bytes are gone as lost, and counts caches anew. It never deletes what a row names.

use std::collections::{BTreeSet, HashMap};

use futures_util::StreamExt;
use serde::Serialize;

use super::{Services, millis};
use crate::db::{Miscount, SealedBlob, Standing};
use crate::error::{Error, Result};
use crate::model::{BlobId, ObjectKey};
use crate::storage::{self, Listed};

/// How thorough to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Read every byte and compare it with its checksums.
    pub deep: bool,
    /// Mend what can be mended.
    pub repair: bool,
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An artifact's or a cache entry's bytes are missing or changed. Repaired by marking it lost.
    Lost,
    /// The rows of a blob and of its artifact or cache entry say different things. Not repaired.
    Torn,
    /// A repository's cache has another size than was counted. Repaired by counting anew.
    Miscounted,
    /// An object that nobody knows. Repaired by deleting it.
    Orphan,
    /// A file of an artifact of version 3 does not have all its chunks.
    Broken,
    /// Something that the cleaner should have taken away. `wharfinger clean` does.
    Overdue,
}

/// One thing that is wrong.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    pub kind: Kind,
    /// The blob, object or kind of row.
    pub subject: String,
    pub detail: String,
    pub repaired: bool,
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub blobs: u64,
    pub objects: u64,
    pub problems: u64,
    pub repaired: u64,
}

const BATCH: i64 = 500;
/// The cleaner may be behind by this many of its intervals before its work is called overdue.
const PATIENCE_INTERVALS: i64 = 10;

impl Services {
    /// Checks everything and tells each problem as it is found. Safe beside running servers.
    ///
    /// # Errors
    /// If database or store can't be asked: then nothing is known.
    pub async fn fsck(&self, options: Options, tell: &mut (dyn FnMut(&Problem) + Send)) -> Result<Summary> {
        let mut check = Check {
            services: self,
            options,
            tell,
            summary: Summary::default(),
        };
        check.rows().await?;
        check.blobs().await?;
        check.files().await?;
        check.objects().await?;
        check.overdue().await?;
        Ok(check.summary)
    }

    /// Why a finalized blob can't be read whole; `None` if all is well. Shallow: objects are there and long enough.
    async fn damage(&self, blob: &SealedBlob, deep: bool) -> Result<Option<String>> {
        if blob.size_bytes == 0 {
            return Ok(None);
        }
        let blocks = self.db.content_blocks(blob.id, 0, blob.size_bytes).await?;
        let pieces = match storage::window(blocks, 0..blob.size_bytes) {
            Ok(pieces) => pieces,
            Err(error) => return Ok(Some(error.to_string())),
        };
        // A blob may be made of ranges of another's objects.
        let owners: BTreeSet<BlobId> = pieces.iter().map(|piece| piece.block.object_key.blob()).collect();
        let mut objects: HashMap<ObjectKey, u64> = HashMap::new();
        for owner in owners {
            let listed = self.store.list(owner).await?;
            objects.extend(listed.into_iter().map(|object| (object.key, object.size_bytes)));
        }
        for piece in &pieces {
            let (key, end) = (
                &piece.block.object_key,
                piece.block.object_offset + piece.block.size_bytes,
            );
            match objects.get(key) {
                None => return Ok(Some(format!("object {key} is missing"))),
                Some(&size) if size < end => return Ok(Some(format!("object {key} has {size} bytes of {end}"))),
                Some(_) => {}
            }
        }
        if !deep {
            return Ok(None);
        }
        match self.hash_blob(blob.id, blob.size_bytes, None).await {
            Ok(actual) if blob.sha256.is_some() && actual != blob.sha256 => Ok(Some(
                "its content does not have the SHA-256 that it was verified to have".to_owned(),
            )),
            Ok(_) => Ok(None),
            Err(Error::Gone(reason) | Error::Internal(reason)) => Ok(Some(reason)),
            Err(error) => Err(error),
        }
    }

    /// Confirms damage of a blob that is still shown, by looking twice.
    pub(super) async fn confirmed_damage(&self, blob: &SealedBlob, deep: bool) -> Result<Option<String>> {
        if self.damage(blob, deep).await?.is_none() {
            return Ok(None);
        }
        let Some(reason) = self.damage(blob, deep).await? else {
            return Ok(None);
        };
        // Deleted meanwhile: then its bytes may go.
        Ok(self.db.is_shown(blob.id).await?.then_some(reason))
    }
}

struct Check<'a> {
    services: &'a Services,
    options: Options,
    tell: &'a mut (dyn FnMut(&Problem) + Send),
    summary: Summary,
}

impl Check<'_> {
    fn problem(&mut self, kind: Kind, subject: String, detail: String, repaired: bool) {
        self.summary.problems += 1;
        self.summary.repaired += u64::from(repaired);
        (self.tell)(&Problem {
            kind,
            subject,
            detail,
            repaired,
        });
    }

    /// Rows that belong together agree.
    async fn rows(&mut self) -> Result<()> {
        for blob in self.services.db.torn_blobs().await? {
            let detail = "its row and that of its artifact or cache entry do not agree".to_owned();
            self.problem(Kind::Torn, format!("blob {blob}"), detail, false);
        }
        for miscount in self.services.db.miscounted_caches().await? {
            let Miscount {
                repository,
                counted_bytes,
                actual_bytes,
            } = miscount;
            if self.options.repair {
                self.services.db.recount_cache(repository).await?;
            }
            let detail = format!("its entries have {actual_bytes} bytes and not {counted_bytes} as counted");
            self.problem(
                Kind::Miscounted,
                format!("cache of repository {repository}"),
                detail,
                self.options.repair,
            );
        }
        Ok(())
    }

    /// Every finalized blob can be read whole.
    async fn blobs(&mut self) -> Result<()> {
        let mut after = BlobId(uuid::Uuid::nil());
        loop {
            let batch = self.services.db.sealed_blobs(after, BATCH).await?;
            let Some(last) = batch.last() else { return Ok(()) };
            after = last.id;
            for blob in &batch {
                self.summary.blobs += 1;
                if let Some(reason) = self.services.confirmed_damage(blob, self.options.deep).await? {
                    let repaired = self.options.repair && self.services.db.mark_lost(blob.id).await?;
                    self.problem(Kind::Lost, format!("blob {}", blob.id), reason, repaired);
                }
            }
        }
    }

    /// Every file that was uploaded by itself has its chunks.
    async fn files(&mut self) -> Result<()> {
        let mut batch = self.services.db.broken_files(None, BATCH).await?;
        while let Some(last) = batch.last().cloned() {
            for file in &batch {
                let subject = format!("file {} of container {}", file.path, file.container);
                self.problem(Kind::Broken, subject, "chunks of it are missing".to_owned(), false);
            }
            batch = self.services.db.broken_files(Some(&last), BATCH).await?;
        }
        Ok(())
    }

    /// Every object is somebody's.
    async fn objects(&mut self) -> Result<()> {
        let services = self.services;
        let settled_ms = services.clock.now_ms() - millis(services.settings.cleaner.sweep_after);
        let mut objects = services.store.list_all();
        while let Some(object) = objects.next().await {
            let Listed {
                key,
                modified_ms,
                size_bytes,
            } = object?;
            self.summary.objects += 1;
            // A request that is under way names its object only at its end.
            if modified_ms > settled_ms || services.db.standing(&key, key.blob()).await? != Standing::Unknown {
                continue;
            }
            if self.options.repair {
                services.store.delete(&key).await?;
            }
            self.problem(
                Kind::Orphan,
                format!("object {key}"),
                format!("{size_bytes} bytes that no row names"),
                self.options.repair,
            );
        }
        Ok(())
    }

    /// The cleaner keeps up.
    async fn overdue(&mut self) -> Result<()> {
        let settings = &self.services.settings;
        let patience_ms = millis(settings.cleaner.interval).saturating_mul(PATIENCE_INTERVALS);
        let now_ms = self.services.clock.now_ms();
        let dead_for_ms = millis(settings.cleaner.sweep_after.max(settings.cleaner.delete_grace));
        let overdue = self
            .services
            .db
            .overdue(
                now_ms - millis(settings.uploads.abandoned_after) - patience_ms,
                now_ms - dead_for_ms - patience_ms,
            )
            .await?;
        for (what, count) in [
            ("uploads", overdue.uploads),
            ("tombstones", overdue.tombstones),
            ("garbage", overdue.garbage),
        ] {
            if count > 0 {
                let detail = format!("{count} are older than the cleaner leaves them: does it run?");
                self.problem(Kind::Overdue, what.to_owned(), detail, false);
            }
        }
        Ok(())
    }
}
