//! Caches: reserve a key, finalize what was uploaded, look it up by key or prefix, and what makes room for others.
//!
//! Called by `api/cache_v2.rs`, `api/cache_v1.rs` and `cleaner.rs`. A principal writes into one scope and reads from
//! those that its token lists, in that order, within its own repository; nothing that a request says changes that.

use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use serde::Deserialize;

use super::uploads::Upload;
use super::{Services, millis};
use crate::db::{
    CacheCandidate, FoundCacheEntry, ListEntry, ListSource, ListedCacheEntry, NewCacheEntry, Reservation, Reserved,
    StagedBlock, WantedKeys,
};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::model::{BlobId, BlobKind, BlobState, CacheEntryId, Principal};
use crate::papers::Permission;

/// The `[cache]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Bytes that the entries of one repository may have together; 0 for no limit.
    pub max_bytes_per_repository: u64,
    /// Bytes that one entry may have; 0 for no limit.
    pub max_entry_bytes: u64,
    /// When an entry that nobody uses is removed.
    #[serde(with = "crate::duration")]
    pub idle_after: Duration,
    /// When an upload that was never finalized frees its key, counted from its beginning.
    #[serde(with = "crate::duration")]
    pub reservation_ttl: Duration,
    /// Whether events that outsiders can cause only read the caches of branches.
    pub untrusted_events_readonly: bool,
}

/// An entry that may be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    pub key: String,
    pub scope: String,
    pub created_at_ms: i64,
    pub link: String,
}

/// Characters of a key. Source: `@actions/cache`, `cache.ts`: `checkKey`.
const MAX_KEY_CHARS: usize = 512;
/// Restore keys of one look-up. Source: as above, ten keys in all; Go's client repeats the first.
const MAX_RESTORE_KEYS: usize = 10;
/// Clients send a SHA-256 in hex or a short text.
const MAX_VERSION_BYTES: usize = 128;
/// With a key of full length, what an index of Postgres takes. Forges have no refs as long as this.
const MAX_SCOPE_BYTES: usize = 384;
/// How often Finalize looks again when the content changes under it.
const FINALIZE_TRIES: usize = 8;
/// Entries in a list.
const LIST_LIMIT: i64 = 100;
/// An entry's use is noted no more often than this, so that most look-ups write nothing.
const NOTE_USE_EVERY_MS: i64 = 5 * 60 * 1000;

fn check_key(key: &str) -> Result<()> {
    let chars = key.chars().count();
    if chars == 0 || chars > MAX_KEY_CHARS {
        return Err(Error::Invalid(format!(
            "a cache key must have 1 to {MAX_KEY_CHARS} characters"
        )));
    }
    if key.trim().is_empty() || key.contains(|c: char| c == ',' || c.is_control()) {
        return Err(Error::Invalid(
            "a cache key must not be blank and must not contain commas or control characters".to_owned(),
        ));
    }
    Ok(())
}

fn check_version(version: &str) -> Result<()> {
    if version.is_empty() || version.len() > MAX_VERSION_BYTES || version.contains(char::is_control) {
        return Err(Error::Invalid(format!(
            "a cache version must have 1 to {MAX_VERSION_BYTES} bytes and no control characters"
        )));
    }
    Ok(())
}

/// The clients look for the words before the colon.
fn write_denied(why: &str) -> Error {
    Error::Forbidden(format!("cache write denied: {why}"))
}

fn read_denied(why: &str) -> Error {
    Error::Forbidden(format!("cache read denied: {why}"))
}

/// The one scope that a principal writes into: the first that its token lets it write.
fn writable_scope(principal: &Principal) -> Result<&str> {
    if principal.run.repository.is_empty() {
        return Err(write_denied("token names no repository"));
    }
    let scope = principal.cache_scopes.iter().find(|scope| scope.write);
    match scope {
        Some(scope) if scope.scope.len() <= MAX_SCOPE_BYTES => Ok(&scope.scope),
        Some(_) => Err(write_denied("the scope's name is too long")),
        None => Err(write_denied("token has no writable scopes")),
    }
}

fn readable_scopes(principal: &Principal) -> Result<Vec<&str>> {
    if principal.run.repository.is_empty() {
        return Err(read_denied("token names no repository"));
    }
    let readable = principal.cache_scopes.iter().filter(|scope| scope.read);
    let scopes: Vec<_> = readable.map(|scope| scope.scope.as_str()).collect();
    if scopes.is_empty() {
        return Err(read_denied("token has no readable scopes"));
    }
    Ok(scopes)
}

/// The last key that begins with `prefix`, in the order of bytes, which for UTF-8 is that of characters.
fn last_with_prefix(prefix: &str) -> String {
    let rest = MAX_KEY_CHARS.saturating_sub(prefix.chars().count());
    prefix.chars().chain(std::iter::repeat_n(char::MAX, rest)).collect()
}

/// The name of the block that a chunk becomes.
fn chunk_id(offset: u64) -> String {
    format!("{offset:016x}")
}

/// The list that makes chunks the content of an entry of `size_bytes`.
///
/// # Errors
/// [`Error::Invalid`] unless they cover it without gap or overlap.
fn chunk_list(blocks: &[StagedBlock], size_bytes: u64) -> Result<Vec<ListEntry>> {
    let mut chunks = std::collections::BTreeMap::new();
    // Those that were sent again after a list come in the place of what it took.
    let (placed, staged): (Vec<_>, Vec<_>) = blocks.iter().partition(|row| row.start_offset.is_some());
    for row in placed.into_iter().chain(staged) {
        let offset = u64::from_str_radix(&row.block_id, 16)
            .map_err(|_| Error::Invalid("the cache was not uploaded in chunks".to_owned()))?;
        chunks.insert(offset, row);
    }
    let mut end = 0;
    let mut list = Vec::with_capacity(chunks.len());
    for (offset, row) in chunks {
        if offset != end {
            let wrong = if offset < end { "overlap" } else { "leave a gap" };
            return Err(Error::Invalid(format!(
                "the chunks {wrong} at byte {}",
                offset.min(end)
            )));
        }
        end += row.block.size_bytes;
        list.push(ListEntry {
            block_id: row.block_id.clone(),
            from: ListSource::Latest,
        });
    }
    if end == size_bytes {
        Ok(list)
    } else {
        Err(Error::Invalid(format!(
            "the chunks have {end} bytes and not {size_bytes}"
        )))
    }
}

impl Services {
    /// Reserves a key for an upload to come, whose size may be known already.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::Forbidden`] in the clients' words; [`Error::AlreadyExists`] if the key is there or
    /// somebody is uploading it; [`Error::QuotaExceeded`] if the size is too large.
    pub async fn reserve_cache(
        &self,
        principal: &Principal,
        key: &str,
        version: &str,
        size_bytes: Option<u64>,
    ) -> Result<(CacheEntryId, BlobId)> {
        check_key(key)?;
        check_version(version)?;
        let scope = writable_scope(principal)?;
        self.check_cache_size(size_bytes.unwrap_or_default())?;
        let now_ms = self.clock.now_ms();
        let new = NewCacheEntry {
            principal,
            scope,
            key,
            version,
            now_ms,
            dead_since_ms: now_ms - millis(self.settings.cache.reservation_ttl),
        };
        match self.db.reserve_cache_entry(&new).await? {
            Reserved::Upload(id, blob) => {
                failpoint::reach("cache_reserved");
                Ok((id, blob))
            }
            Reserved::Exists => Err(Error::AlreadyExists(
                "cache entry with the same key, version, and scope already exists".to_owned(),
            )),
        }
    }

    /// As [`Services::reserve_cache`], with a link to upload by. It works as long as the reservation.
    ///
    /// # Errors
    /// As there.
    pub async fn create_cache_entry(&self, principal: &Principal, key: &str, version: &str) -> Result<String> {
        let (_, blob) = self.reserve_cache(principal, key, version, None).await?;
        let lives_for = self.settings.uploads.link_ttl.min(self.settings.cache.reservation_ttl);
        let link_ends_ms = principal.expires_at_ms.min(self.clock.now_ms() + millis(lives_for));
        Ok(self
            .papers
            .sign_link(BlobKind::Cache, Permission::Write, blob, link_ends_ms / 1000))
    }

    /// Ends an upload that this run began: from now on its key is found. The same again returns the same id.
    ///
    /// # Errors
    /// [`Error::NotFound`] without such a reservation; [`Error::FailedPrecondition`] without content;
    /// [`Error::Invalid`] for a wrong size, and then the upload stays open; [`Error::QuotaExceeded`];
    /// [`Error::Forbidden`].
    pub async fn finalize_cache_entry(
        &self,
        principal: &Principal,
        key: &str,
        version: &str,
        size_bytes: u64,
    ) -> Result<CacheEntryId> {
        check_key(key)?;
        check_version(version)?;
        let scope = writable_scope(principal)?;
        self.check_cache_size(size_bytes)?;
        for _ in 0..FINALIZE_TRIES {
            let candidate = self
                .reservation(principal, scope, Reservation::Key { key, version })
                .await?;
            if self.seal_cache_entry(&candidate, size_bytes).await? {
                return Ok(candidate.id);
            }
        }
        Err(Error::Busy("the upload keeps changing, finalize it again".to_owned()))
    }

    /// Stores the bytes of a reserved entry from `offset` on. Those of the same offset that came before are replaced.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Conflict`] after the end, and as [`Services::stage_block`].
    pub async fn stage_cache_chunk<S>(
        &self,
        principal: &Principal,
        id: CacheEntryId,
        offset: u64,
        upload: Upload<S>,
    ) -> Result<()>
    where
        S: Stream<Item = Result<Bytes>> + Send + 'static,
    {
        let scope = writable_scope(principal)?;
        self.check_cache_size(offset.saturating_add(upload.size_bytes))?;
        let candidate = self.reservation(principal, scope, Reservation::Id(id)).await?;
        self.stage_block(candidate.blob, &chunk_id(offset), upload).await
    }

    /// Makes the chunks of a reserved entry its content and ends the upload, durably. The same again does nothing.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Invalid`] unless the chunks have `size_bytes` without gap or overlap.
    pub async fn commit_cache_chunks(&self, principal: &Principal, id: CacheEntryId, size_bytes: u64) -> Result<()> {
        let scope = writable_scope(principal)?;
        self.check_cache_size(size_bytes)?;
        for _ in 0..FINALIZE_TRIES {
            let mut candidate = self.reservation(principal, scope, Reservation::Id(id)).await?;
            if !candidate.finalized {
                // Clients send chunks of 32 MiB.
                let about = usize::try_from(size_bytes >> 25).unwrap_or(usize::MAX);
                let list = chunk_list(&self.db.all_blocks(candidate.blob, about).await?, size_bytes)?;
                self.commit_block_list(candidate.blob, &list, None).await?;
                failpoint::reach("cache_chunks_listed");
                candidate = self.reservation(principal, scope, Reservation::Id(id)).await?;
            }
            if self.seal_cache_entry(&candidate, size_bytes).await? {
                return Ok(());
            }
        }
        Err(Error::Busy("the upload keeps changing, commit it again".to_owned()))
    }

    async fn reservation(
        &self,
        principal: &Principal,
        scope: &str,
        reservation: Reservation<'_>,
    ) -> Result<CacheCandidate> {
        let candidate = self.db.cache_candidate(principal, scope, reservation).await?;
        candidate.ok_or_else(|| Error::NotFound("this workflow run has not reserved such a cache entry".to_owned()))
    }

    /// `false` if the content changed since the candidate was read.
    async fn seal_cache_entry(&self, candidate: &CacheCandidate, size_bytes: u64) -> Result<bool> {
        if !candidate.finalized && candidate.blob_state != Some(BlobState::Committed) {
            return Err(Error::FailedPrecondition(
                "no block list or blob was committed yet".to_owned(),
            ));
        }
        if candidate.size_bytes != size_bytes {
            return Err(Error::Invalid(format!(
                "the upload has {} bytes and not {size_bytes}",
                candidate.size_bytes
            )));
        }
        let done = candidate.finalized || self.db.finalize_cache_entry(candidate, self.clock.now_ms()).await?;
        if done {
            failpoint::reach("cache_finalized");
        }
        Ok(done)
    }

    /// Looks for `key`, then for keys that begin with it, then for those that begin with each of `restore_keys`: all
    /// of this in the first scope, then in the next; of several the newest. Source: GitHub's "Dependency caching
    /// reference", "Cache key matching", which the version 1 of the protocol spells out too.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::Forbidden`] in the clients' words.
    pub async fn look_up_cache(
        &self,
        principal: &Principal,
        key: &str,
        restore_keys: &[&str],
        version: &str,
    ) -> Result<Option<Hit>> {
        check_version(version)?;
        if restore_keys.len() > MAX_RESTORE_KEYS {
            return Err(Error::Invalid(format!(
                "a look-up may have at most {MAX_RESTORE_KEYS} restore keys"
            )));
        }
        let prefixes: Vec<&str> = std::iter::once(key).chain(restore_keys.iter().copied()).collect();
        prefixes.iter().try_for_each(|key| check_key(key))?;
        let ranges: Vec<_> = std::iter::once((key, key.to_owned()))
            .chain(prefixes.into_iter().map(|prefix| (prefix, last_with_prefix(prefix))))
            .collect();
        let mut wanted = Vec::new();
        for scope in readable_scopes(principal)? {
            wanted.extend(ranges.iter().map(|(low, high)| WantedKeys { scope, low, high }));
        }
        let Some(found) = self.db.find_cache_entry(&principal.run, &wanted, version).await? else {
            return Ok(None);
        };
        let now_ms = self.clock.now_ms();
        self.note_use(&found, now_ms).await;
        let link_ends_ms = now_ms + millis(self.settings.uploads.download_link_ttl);
        Ok(Some(Hit {
            link: self
                .papers
                .sign_link(BlobKind::Cache, Permission::Read, found.blob, link_ends_ms / 1000),
            key: found.key,
            scope: found.scope,
            created_at_ms: found.created_at_ms,
        }))
    }

    /// The newest entries of any version whose keys begin with `prefix`, in the scopes that the principal may read: for
    /// whoever wonders why a look-up missed.
    ///
    /// # Errors
    /// As [`Services::look_up_cache`].
    pub async fn list_caches(&self, principal: &Principal, prefix: &str) -> Result<Vec<ListedCacheEntry>> {
        check_key(prefix)?;
        let (low, high) = (prefix, last_with_prefix(prefix));
        let wanted: Vec<_> = readable_scopes(principal)?
            .into_iter()
            .map(|scope| WantedKeys {
                scope,
                low,
                high: &high,
            })
            .collect();
        self.db.list_cache_entries(&principal.run, &wanted, LIST_LIMIT).await
    }

    /// Keeps an entry that is used from being the next to go. Without it the look-up is as good.
    async fn note_use(&self, found: &FoundCacheEntry, now_ms: i64) {
        if now_ms - found.last_used_at_ms >= NOTE_USE_EVERY_MS
            && let Err(error) = self.db.touch_cache_entry(found.id, now_ms).await
        {
            tracing::warn!(%error, "the use of a cache entry was not noted");
        }
    }

    /// The largest entry that is taken: what does not fit into a repository's cache is of no use either.
    pub(super) fn max_cache_bytes(&self) -> Option<u64> {
        let settings = &self.settings.cache;
        [settings.max_entry_bytes, settings.max_bytes_per_repository]
            .into_iter()
            .filter(|limit| *limit > 0)
            .min()
    }

    fn check_cache_size(&self, size_bytes: u64) -> Result<()> {
        match self.max_cache_bytes() {
            Some(limit) if size_bytes > limit => Err(Error::QuotaExceeded(format!(
                "insufficient usage: a cache entry may have at most {limit} bytes"
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{check_key, check_version, chunk_id, chunk_list, last_with_prefix};
    use crate::db::StagedBlock;
    use crate::model::{BlobId, Block, ObjectKey};

    #[test]
    fn keys_are_what_clients_send() {
        for key in [
            "a",
            "npm-Linux-%_\\",
            " padded ",
            "index-buildkit.1#3",
            "../../x",
            &"🚢".repeat(512),
        ] {
            assert!(check_key(key).is_ok(), "{key}");
        }
        for key in ["", "   ", "a,b", "a\0b", "a\nb", &"x".repeat(513)] {
            assert!(check_key(key).is_err(), "{key:?}");
        }
        assert!(check_version("%").is_ok());
        for version in ["", "a\0", &"x".repeat(1024)] {
            assert!(check_version(version).is_err(), "{version:?}");
        }
    }

    #[test]
    fn a_prefix_is_a_range() {
        for prefix in ["a", "a%", "é", "\u{d7ff}", "\u{10ffff}"] {
            let last = last_with_prefix(prefix);
            for rest in ["", "a", "\u{10ffff}", "\u{10ffff}\u{10ffff}"] {
                let key = format!("{prefix}{rest}");
                assert!(prefix <= key.as_str() && key <= last, "{key:?}");
            }
        }
        for (prefix, other) in [("a", "b"), ("a", "A"), ("a%", "ab"), ("aa", "a"), ("é", "ê")] {
            assert!(
                !(prefix..=last_with_prefix(prefix).as_str()).contains(&other),
                "{other:?}"
            );
        }
    }

    fn chunk(offset: u64, size_bytes: u64, placed: bool) -> StagedBlock {
        StagedBlock {
            block_id: chunk_id(offset),
            block: Block {
                object_key: ObjectKey::fresh(BlobId::fresh()),
                object_offset: 0,
                size_bytes,
                crc64: 0,
            },
            start_offset: placed.then_some(offset),
        }
    }

    #[test]
    fn chunks_are_content_if_they_fit_together() {
        let ids = |blocks: &[StagedBlock], size| {
            chunk_list(blocks, size).map(|list| list.into_iter().map(|entry| entry.block_id).collect::<Vec<_>>())
        };
        assert_eq!(
            ids(&[chunk(20, 5, false), chunk(0, 20, false)], 25).unwrap(),
            [chunk_id(0), chunk_id(20)]
        );
        assert!(ids(&[], 0).unwrap().is_empty());
        // Sent again, in another size, after a list.
        assert_eq!(
            ids(&[chunk(0, 25, true), chunk(0, 20, false), chunk(20, 5, false)], 25).unwrap(),
            [chunk_id(0), chunk_id(20)]
        );
        for (blocks, size, why) in [
            (vec![chunk(1, 5, false)], 6, "gap at byte 0"),
            (vec![chunk(0, 5, false), chunk(6, 5, false)], 11, "gap at byte 5"),
            (vec![chunk(0, 5, false), chunk(4, 5, false)], 9, "overlap at byte 4"),
            (vec![chunk(0, 5, false)], 6, "5 bytes and not 6"),
            (Vec::new(), 1, "0 bytes and not 1"),
        ] {
            let error = chunk_list(&blocks, size).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
