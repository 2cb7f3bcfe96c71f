//! Cache entries: keys within a scope of a repository, each pointing at a blob.
//!
//! Called by `service/caches.rs` and `service/cleaner.rs`. Every look-up carries the whole key of the repository and
//! the scope. Locks are taken entry first, blob second, repository last.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::blobs::{BEGIN, FORGET_UNLISTED, SEAL, UNLISTED_TO_GARBAGE};
use super::cleaning::bury;
use super::sql::query;
use super::{Db, Failure, TRIES, lost_every_race, on, signed, transaction, unsigned};
use crate::error::Result;
use crate::failpoint;
use crate::model::{BlobId, BlobKind, BlobState, CacheEntryId, Principal, RunKey};

/// What a reservation asks for, checked.
#[derive(Clone, Copy, Debug)]
pub struct NewCacheEntry<'a> {
    pub principal: &'a Principal,
    pub scope: &'a str,
    pub key: &'a str,
    pub version: &'a str,
    pub now_ms: i64,
    /// Reservations begun at or before this are nobody's any more.
    pub dead_since_ms: i64,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// Bytes go to this blob.
    Upload(CacheEntryId, BlobId),
    /// The key is there, or somebody is uploading it.
    Exists,
}

/// Which entry a run means that it reserved.
#[derive(Clone, Copy, Debug)]
pub enum Reservation<'a> {
    Key { key: &'a str, version: &'a str },
    Id(CacheEntryId),
}

/// The entry that a run is about to finalize, as it stands.
#[derive(Clone, Copy, Debug)]
pub struct CacheCandidate {
    pub id: CacheEntryId,
    pub finalized: bool,
    pub blob: BlobId,
    pub blob_state: Option<BlobState>,
    pub revision: i64,
    pub size_bytes: u64,
}

/// Keys that a reader takes: those of a scope from `low` to `high`, both included, in the order of their bytes.
#[derive(Clone, Copy, Debug)]
pub struct WantedKeys<'a> {
    pub scope: &'a str,
    pub low: &'a str,
    pub high: &'a str,
}

/// The entry that a look-up found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundCacheEntry {
    pub id: CacheEntryId,
    pub scope: String,
    pub key: String,
    pub blob: BlobId,
    pub created_at_ms: i64,
    pub last_used_at_ms: i64,
}

/// A row of a list of entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedCacheEntry {
    pub scope: String,
    pub key: String,
    pub version: String,
    pub created_at_ms: i64,
}

/// An entry that the cleaner may take out, as long as it is as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evictable {
    id: i64,
    state: String,
    blob: Uuid,
    size_bytes: i64,
    last_used_at_ms: i64,
}

/// A repository whose entries are larger than they may be together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LargeCache {
    pub repository: i64,
    pub excess_bytes: i64,
}

type EvictableRow = (i64, String, Uuid, i64, i64);

fn evictable((id, state, blob, size_bytes, last_used_at_ms): EvictableRow) -> Evictable {
    Evictable {
        id,
        state,
        blob,
        size_bytes,
        last_used_at_ms,
    }
}

/// Whether an entry keeps others from its key.
fn holds_its_key(state: &str, created_at_ms: i64, dead_since_ms: i64) -> bool {
    match state {
        "finalized" => true,
        "reserved" => created_at_ms > dead_since_ms,
        // Lost: what is saved now takes its place.
        _ => false,
    }
}

impl Db {
    /// Reserves a key for an upload. One reservation wins; one that is dead, or an entry whose bytes are lost, makes
    /// room for the next.
    pub async fn reserve_cache_entry(&self, new: &NewCacheEntry<'_>) -> Result<Reserved> {
        let blob = BlobId::fresh();
        for _ in 0..TRIES {
            if let Some(reserved) = self.try_reserve_cache_entry(new, blob).await? {
                return Ok(reserved);
            }
        }
        Err(lost_every_race())
    }

    /// `None` if another request got in between.
    async fn try_reserve_cache_entry(&self, new: &NewCacheEntry<'_>, blob: BlobId) -> Result<Option<Reserved>> {
        let NewCacheEntry {
            principal,
            scope,
            key,
            version,
            now_ms,
            dead_since_ms,
        } = *new;
        let run = &principal.run;
        // Most keys that are reserved exist: that is found out without a lock.
        type Seen = (i64, Option<i64>, Option<String>, Option<i64>, Option<Uuid>);
        let seen: Option<Seen> = on!(self, Reading, |conn| {
            query(
                "SELECT r.id, e.id, e.state, e.created_at_ms, e.blob_id
                 FROM cache_repositories r LEFT JOIN cache_entries e
                     ON e.repository_id = r.id AND e.scope = $3 AND e.version = $4 AND e.key = $5
                 WHERE r.issuer = $1 AND r.repository = $2",
            )
            .bind(&run.issuer)
            .bind(&run.repository)
            .bind(scope)
            .bind(version)
            .bind(key)
            .fetch_optional(conn)
            .await?
        });
        let repository = match seen {
            // The answer to an earlier try was lost.
            Some((_, Some(id), _, _, Some(there))) if there == blob.0 => {
                return Ok(Some(Reserved::Upload(CacheEntryId(id), blob)));
            }
            Some((_, _, Some(state), Some(created_at_ms), _))
                if holds_its_key(&state, created_at_ms, dead_since_ms) =>
            {
                return Ok(Some(Reserved::Exists));
            }
            Some((repository, ..)) => repository,
            None => {
                self.add_cache_repository(run).await?;
                return Ok(None);
            }
        };
        let mut exists = false;
        let reserved = transaction!(self, Durable, |tx| {
            exists = false;
            // Locks the key, so that any number of reservations of it go one after the other.
            let there: Option<(i64, String, Uuid, i64, i64)> = query(
                "UPDATE cache_entries SET state = state
                 WHERE repository_id = $1 AND scope = $2 AND version = $3 AND key = $4
                 RETURNING id, state, blob_id, size_bytes, created_at_ms",
            )
            .bind(repository)
            .bind(scope)
            .bind(version)
            .bind(key)
            .fetch_optional(tx)
            .await?;
            if let Some((id, state, old_blob, size_bytes, created_at_ms)) = there {
                exists = holds_its_key(&state, created_at_ms, dead_since_ms);
                query("DELETE FROM cache_entries WHERE id = $1")
                    .bind(id)
                    .execute(tx)
                    .await?;
                bury(tx, [old_blob], "superseded", now_ms).await?;
                if size_bytes > 0 {
                    query("UPDATE cache_repositories SET size_bytes = size_bytes - $2 WHERE id = $1")
                        .bind(repository)
                        .bind(size_bytes)
                        .execute(tx)
                        .await?;
                }
            }
            query(BEGIN)
                .bind(blob.0)
                .bind(BlobKind::Cache.as_str())
                .bind(now_ms)
                .execute(tx)
                .await?;
            let id: Option<i64> = query(
                "INSERT INTO cache_entries (repository_id, scope, version, key, state, blob_id, size_bytes,
                     run_backend_id, job_backend_id, repository_name, created_at_ms, last_used_at_ms)
                 VALUES ($1, $2, $3, $4, 'reserved', $5, 0, $6, $7, $8, $9, $9)
                 ON CONFLICT (repository_id, scope, version, key) DO NOTHING RETURNING id",
            )
            .bind(repository)
            .bind(scope)
            .bind(version)
            .bind(key)
            .bind(blob.0)
            .bind(&run.run_backend_id)
            .bind(&principal.job_backend_id)
            .bind(principal.repository_name.as_deref())
            .bind(now_ms)
            .fetch_optional(tx)
            .await?;
            failpoint::reach("cache_reserve_before_commit");
            id.filter(|_| !exists)
        });
        match reserved {
            // The next try finds out.
            Err(Failure::Unknown(_)) => Ok(None),
            reserved => Ok(reserved?
                .map(|id| Reserved::Upload(CacheEntryId(id), blob))
                .or(exists.then_some(Reserved::Exists))),
        }
    }

    async fn add_cache_repository(&self, run: &RunKey) -> Result<()> {
        on!(self, Durable, |conn| {
            query(
                "INSERT INTO cache_repositories (issuer, repository, size_bytes) VALUES ($1, $2, 0)
                 ON CONFLICT (issuer, repository) DO NOTHING",
            )
            .bind(&run.issuer)
            .bind(&run.repository)
            .execute(conn)
            .await?;
        });
        Ok(())
    }

    /// The entry that the principal's run reserved in a scope, if it is still there.
    pub async fn cache_candidate(
        &self,
        principal: &Principal,
        scope: &str,
        reservation: Reservation<'_>,
    ) -> Result<Option<CacheCandidate>> {
        /// The run's entries in a scope, narrowed by one more condition.
        macro_rules! reserved_by_run {
            ($condition:literal) => {
                concat!(
                    "SELECT e.id, e.state, b.id, b.state, b.revision, b.size_bytes
                     FROM cache_entries e JOIN cache_repositories r ON r.id = e.repository_id
                         JOIN blobs b ON b.id = e.blob_id
                     WHERE r.issuer = $1 AND r.repository = $2 AND e.scope = $3 AND e.run_backend_id = $4
                         AND e.state <> 'lost' AND ",
                    $condition
                )
            };
        }
        let RunKey {
            issuer,
            repository,
            run_backend_id,
        } = &principal.run;
        let text = match reservation {
            Reservation::Key { .. } => reserved_by_run!("e.version = $5 AND e.key = $6"),
            Reservation::Id(_) => reserved_by_run!("e.id = $5"),
        };
        let row: Option<(i64, String, Uuid, String, i64, i64)> = on!(self, Reading, |conn| {
            let query = query(text)
                .bind(issuer)
                .bind(repository)
                .bind(scope)
                .bind(run_backend_id);
            let query = match reservation {
                Reservation::Key { key, version } => query.bind(version).bind(key),
                Reservation::Id(id) => query.bind(id.0),
            };
            query.fetch_optional(conn).await?
        });
        row.map(|(id, state, blob, blob_state, revision, size)| {
            Ok(CacheCandidate {
                id: CacheEntryId(id),
                finalized: state == "finalized",
                blob: BlobId(blob),
                blob_state: BlobState::parse(&blob_state),
                revision,
                size_bytes: unsigned(size)?,
            })
        })
        .transpose()
    }

    /// Seals the blob's content of that revision and shows the entry, in one step.
    /// `false` if either changed since the candidate was read, or if nobody said what became of it: look again.
    pub async fn finalize_cache_entry(&self, candidate: &CacheCandidate, now_ms: i64) -> Result<bool> {
        let size_bytes = signed(candidate.size_bytes)?;
        let done = transaction!(self, Durable, |tx| {
            let repository: Option<i64> = query(
                "UPDATE cache_entries SET state = 'finalized', size_bytes = $3, finalized_at_ms = $4,
                     last_used_at_ms = $4
                 WHERE id = $1 AND blob_id = $2 AND state = 'reserved' RETURNING repository_id",
            )
            .bind(candidate.id.0)
            .bind(candidate.blob.0)
            .bind(size_bytes)
            .bind(now_ms)
            .fetch_optional(tx)
            .await?;
            // No client says what a cache entry hashes to: its blocks' checksums are all there is.
            let sealed = query(SEAL)
                .bind(candidate.blob.0)
                .bind(candidate.revision)
                .bind("none")
                .bind(None::<Vec<u8>>)
                .bind(now_ms)
                .execute(tx)
                .await?;
            if let (Some(repository), 1) = (repository, sealed) {
                let late = query(UNLISTED_TO_GARBAGE)
                    .bind(candidate.blob.0)
                    .bind(now_ms)
                    .execute(tx)
                    .await?;
                if late > 0 {
                    query(FORGET_UNLISTED).bind(candidate.blob.0).execute(tx).await?;
                }
                query("UPDATE cache_repositories SET size_bytes = size_bytes + $2 WHERE id = $1")
                    .bind(repository)
                    .bind(size_bytes)
                    .execute(tx)
                    .await?;
                failpoint::reach("cache_finalize_before_commit");
                Some(())
            } else {
                None
            }
        });
        match done {
            Err(Failure::Unknown(_)) => Ok(false),
            done => Ok(done?.is_some()),
        }
    }

    /// The newest finalized entry of that version among the first wanted keys that there are any of.
    pub async fn find_cache_entry(
        &self,
        run: &RunKey,
        wanted: &[WantedKeys<'_>],
        version: &str,
    ) -> Result<Option<FoundCacheEntry>> {
        if wanted.is_empty() {
            return Ok(None);
        }
        type Row = (i64, String, String, Uuid, i64, i64);
        let row: Option<Row> = on!(self, Reading, |conn| {
            query("WITH wanted (place, scope, low, high) AS (")
                .push_values((0_i64..).zip(wanted), |(place, keys)| {
                    [place.into(), keys.scope.into(), keys.low.into(), keys.high.into()]
                })
                .push(
                    ") SELECT e.id, e.scope, e.key, e.blob_id, e.created_at_ms, e.last_used_at_ms FROM (
                         SELECT w.place, (
                             SELECT c.id FROM cache_entries c
                             WHERE c.repository_id = r.id AND c.scope = w.scope AND c.version = ",
                )
                .push_bind(version)
                .push(
                    " AND c.key >= w.low AND c.key <= w.high AND c.state = 'finalized'
                             ORDER BY c.finalized_at_ms DESC, c.id DESC LIMIT 1) AS id
                         FROM wanted w, cache_repositories r WHERE r.issuer = ",
                )
                .push_bind(&run.issuer)
                .push(" AND r.repository = ")
                .push_bind(&run.repository)
                .push(") found JOIN cache_entries e ON e.id = found.id ORDER BY found.place LIMIT 1")
                .fetch_optional(conn)
                .await?
        });
        Ok(row.map(
            |(id, scope, key, blob, created_at_ms, last_used_at_ms)| FoundCacheEntry {
                id: CacheEntryId(id),
                scope,
                key,
                blob: BlobId(blob),
                created_at_ms,
                last_used_at_ms,
            },
        ))
    }

    /// Finalized entries among the wanted keys, of all versions, newest first. Reads all of the scopes' entries: for
    /// people who look for a mistake, not for jobs.
    pub async fn list_cache_entries(
        &self,
        run: &RunKey,
        wanted: &[WantedKeys<'_>],
        limit: i64,
    ) -> Result<Vec<ListedCacheEntry>> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let rows: Vec<(String, String, String, i64)> = on!(self, Reading, |conn| {
            query("WITH wanted (scope, low, high) AS (")
                .push_values(wanted, |keys| [keys.scope.into(), keys.low.into(), keys.high.into()])
                .push(
                    ") SELECT e.scope, e.key, e.version, e.created_at_ms
                     FROM wanted w, cache_repositories r, cache_entries e
                     WHERE e.repository_id = r.id AND e.scope = w.scope AND e.key >= w.low AND e.key <= w.high
                         AND e.state = 'finalized' AND r.issuer = ",
                )
                .push_bind(&run.issuer)
                .push(" AND r.repository = ")
                .push_bind(&run.repository)
                .push(" ORDER BY e.finalized_at_ms DESC, e.id DESC LIMIT ")
                .push_bind(limit)
                .fetch_all(conn)
                .await?
        });
        let listed = |(scope, key, version, created_at_ms)| ListedCacheEntry {
            scope,
            key,
            version,
            created_at_ms,
        };
        Ok(rows.into_iter().map(listed).collect())
    }

    /// Notes that an entry was used at `now_ms`.
    pub async fn touch_cache_entry(&self, id: CacheEntryId, now_ms: i64) -> Result<()> {
        on!(self, Staging, |conn| {
            query("UPDATE cache_entries SET last_used_at_ms = $2 WHERE id = $1 AND last_used_at_ms < $2")
                .bind(id.0)
                .bind(now_ms)
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    /// Reservations begun at or before `dead_since_ms`, oldest first.
    pub async fn dead_reservations(&self, dead_since_ms: i64, limit: i64) -> Result<Vec<Evictable>> {
        self.evictables(
            "SELECT id, state, blob_id, size_bytes, last_used_at_ms FROM cache_entries
             WHERE state = 'reserved' AND created_at_ms <= $1 ORDER BY created_at_ms LIMIT $2",
            dead_since_ms,
            limit,
        )
        .await
    }

    /// Entries not used since `idle_since_ms`, least recently used first.
    pub async fn idle_cache_entries(&self, idle_since_ms: i64, limit: i64) -> Result<Vec<Evictable>> {
        self.evictables(
            "SELECT id, state, blob_id, size_bytes, last_used_at_ms FROM cache_entries
             WHERE state <> 'reserved' AND last_used_at_ms >= 0 AND last_used_at_ms <= $1
             ORDER BY last_used_at_ms LIMIT $2",
            idle_since_ms,
            limit,
        )
        .await
    }

    /// The repositories whose entries have more bytes than this together, largest first.
    pub async fn large_caches(&self, max_bytes: u64, limit: i64) -> Result<Vec<LargeCache>> {
        let max_bytes = i64::try_from(max_bytes).unwrap_or(i64::MAX);
        let rows: Vec<(i64, i64)> = on!(self, Reading, |conn| {
            query(
                "SELECT id, size_bytes - $1 FROM cache_repositories WHERE size_bytes > $1
                 ORDER BY size_bytes DESC LIMIT $2",
            )
            .bind(max_bytes)
            .bind(limit)
            .fetch_all(conn)
            .await?
        });
        let cache = |(repository, excess_bytes)| LargeCache {
            repository,
            excess_bytes,
        };
        Ok(rows.into_iter().map(cache).collect())
    }

    /// The least recently used entries of a repository, no more of them than make up for its excess.
    pub async fn least_used_cache_entries(&self, cache: LargeCache, limit: i64) -> Result<Vec<Evictable>> {
        let mut entries = self
            .evictables(
                "SELECT id, state, blob_id, size_bytes, last_used_at_ms FROM cache_entries
                 WHERE repository_id = $1 AND state <> 'reserved' ORDER BY last_used_at_ms LIMIT $2",
                cache.repository,
                limit,
            )
            .await?;
        let mut left = cache.excess_bytes;
        entries.retain(|entry| {
            let needed = left > 0;
            left -= entry.size_bytes;
            needed
        });
        Ok(entries)
    }

    async fn evictables(&self, text: &'static str, what: i64, limit: i64) -> Result<Vec<Evictable>> {
        let rows: Vec<EvictableRow> = on!(self, Reading, |conn| query(text)
            .bind(what)
            .bind(limit)
            .fetch_all(conn)
            .await?);
        Ok(rows.into_iter().map(evictable).collect())
    }

    /// Takes entries out and leaves their blobs to be deleted, for the reason `tombstone`. Those that were finalized or
    /// used since they were seen stay. Returns how many went.
    pub async fn evict_cache_entries(&self, entries: &[Evictable], tombstone: &str, now_ms: i64) -> Result<u64> {
        if entries.is_empty() {
            return Ok(0);
        }
        let evicted = transaction!(self, Durable, |tx| {
            let mut evicted = Vec::new();
            let mut freed = BTreeMap::<i64, i64>::new();
            for entry in entries {
                let gone: Option<(i64, i64)> = query(
                    "DELETE FROM cache_entries WHERE id = $1 AND state = $2 AND last_used_at_ms = $3
                     RETURNING repository_id, size_bytes",
                )
                .bind(entry.id)
                .bind(&entry.state)
                .bind(entry.last_used_at_ms)
                .fetch_optional(tx)
                .await?;
                if let Some((repository, size_bytes)) = gone {
                    *freed.entry(repository).or_default() += size_bytes;
                    evicted.push(entry.blob);
                }
            }
            let count = evicted.len() as u64;
            bury(tx, evicted, tombstone, now_ms).await?;
            for (repository, bytes) in freed.into_iter().filter(|(_, bytes)| *bytes > 0) {
                query("UPDATE cache_repositories SET size_bytes = size_bytes - $2 WHERE id = $1")
                    .bind(repository)
                    .bind(bytes)
                    .execute(tx)
                    .await?;
            }
            failpoint::reach("clean_evict_before_commit");
            Some(count)
        })?;
        Ok(evicted.unwrap_or_default())
    }
}
