//! Containers of files, as version 3 of the artifact protocol fills them.
//!
//! Called by `service/files.rs`; `publishing.rs` shows what is in them. A container is a blob that is never sealed: its
//! blocks are the chunks of its files, and they stay as long as its artifact. Each change of a file locks the
//! container's blob first.

use std::collections::HashMap;
use std::iter;

use uuid::Uuid;

use super::artifacts::{INSERT_ARTIFACT, LOCK_NAME, over_limit};
use super::blobs::BEGIN;
use super::cleaning::bury;
use super::sql::{query, row_struct};
use super::{Created, Db, Failure, NewArtifact, TRIES, lost_every_race, object_key, on, signed, transaction, unsigned};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::model::{ArtifactId, BlobId, Block, Principal};

/// How a file's bytes came and are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Identity,
    Gzip,
}

impl Encoding {
    fn as_str(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Gzip => "gzip",
        }
    }

    fn parse(text: &str) -> Result<Self> {
        [Self::Identity, Self::Gzip]
            .into_iter()
            .find(|encoding| encoding.as_str() == text)
            .ok_or_else(|| Error::Internal(format!("not an encoding of a file: {text}")))
    }
}

/// A container, as a job of its run sees it.
#[derive(Clone, Debug)]
pub struct Container {
    pub artifact: ArtifactId,
    pub name: String,
    pub run_attempt: i32,
    pub blob: BlobId,
    /// What its chunks add up to.
    pub stored_bytes: u64,
    /// The artifact's bytes turned out missing or changed.
    pub lost: bool,
}

/// Sums of a chunk besides its CRC-64.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkSums {
    pub crc32: u32,
    /// Its last bytes, at most 8, and the CRC-64/NVME of what is before them; both without the gzip header.
    pub tail: Vec<u8>,
    pub core_crc64: u64,
    /// How long the gzip header is that it begins with.
    pub header_bytes: Option<u64>,
}

/// A chunk that came, whose object is in the store.
#[derive(Clone, Debug)]
pub struct NewChunk<'a> {
    pub container: BlobId,
    pub path: &'a str,
    pub job_backend_id: &'a str,
    pub encoding: Encoding,
    /// What the file is when it is unpacked, as far as its chunk tells.
    pub length_bytes: u64,
    /// What is stored of it when it is complete.
    pub total_bytes: u64,
    /// Where in the file the chunk begins.
    pub file_offset: u64,
    /// `None` for the one chunk of an empty file.
    pub block: Option<&'a Block>,
    pub sums: &'a ChunkSums,
    pub max_files: i64,
    pub max_chunks: i64,
    pub now_ms: i64,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Staged {
    Done,
    /// The very same bytes are there: the caller deletes the object.
    AlreadyThere,
    /// The container is gone.
    Closed,
    /// The file does not go on here.
    OutOfOrder,
    TooManyFiles,
    TooManyChunks,
}

/// A complete file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub id: Uuid,
    pub path: String,
    pub encoding: Encoding,
    pub length_bytes: u64,
    pub stored_bytes: u64,
    pub header_bytes: Option<u64>,
    pub revision: i64,
    pub completed_at_ms: i64,
}

/// A part of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileChunk {
    pub file_offset: u64,
    pub block: Block,
    pub sums: ChunkSums,
}

/// The files of a container that do not fit together, for `fsck`.
#[derive(Clone, Debug)]
pub struct BrokenFile {
    pub container: BlobId,
    pub path: String,
}

row_struct! {
    struct FileRow {
        id: Uuid,
        path: String,
        encoding: String,
        length_bytes: i64,
        total_bytes: i64,
        header_bytes: Option<i64>,
        revision: Option<i64>,
        completed_at_ms: Option<i64>,
    }
}

impl TryFrom<FileRow> for File {
    type Error = Error;

    fn try_from(row: FileRow) -> Result<Self> {
        Ok(Self {
            id: row.id,
            path: row.path,
            encoding: Encoding::parse(&row.encoding)?,
            length_bytes: unsigned(row.length_bytes)?,
            stored_bytes: unsigned(row.total_bytes)?,
            header_bytes: row.header_bytes.map(unsigned).transpose()?,
            revision: row.revision.unwrap_or_default(),
            completed_at_ms: row.completed_at_ms.unwrap_or_default(),
        })
    }
}

row_struct! {
    struct ChunkRow {
        file_id: Uuid,
        file_offset: i64,
        crc32: i64,
        tail: Vec<u8>,
        core_crc64: i64,
        object_key: String,
        object_offset: i64,
        size_bytes: i64,
        crc64: i64,
    }
}

impl TryFrom<ChunkRow> for FileChunk {
    type Error = Error;

    fn try_from(row: ChunkRow) -> Result<Self> {
        let crc32 = u32::try_from(row.crc32).map_err(|_| Error::Internal("a CRC-32 above 32 bits".to_owned()))?;
        Ok(Self {
            file_offset: unsigned(row.file_offset)?,
            block: Block {
                object_key: object_key(&row.object_key)?,
                object_offset: unsigned(row.object_offset)?,
                size_bytes: unsigned(row.size_bytes)?,
                crc64: row.crc64.cast_unsigned(),
            },
            sums: ChunkSums {
                crc32,
                tail: row.tail,
                core_crc64: row.core_crc64.cast_unsigned(),
                header_bytes: None,
            },
        })
    }
}

row_struct! {
    struct ContainerRow {
        id: i64,
        name: String,
        run_attempt: i32,
        container_id: Uuid,
        size_bytes: i64,
        state: String,
    }
}

row_struct! {
    /// A file as whoever sends a chunk finds it.
    struct Begun {
        id: Uuid,
        uploader: String,
        encoding: String,
        total_bytes: i64,
        received_bytes: i64,
        chunk_count: i64,
    }
}

/// Locks an open container and returns its new revision. The first statement of whoever changes a file.
/// Its second parameter is by how much what is stored grows.
const LOCK_CONTAINER: &str = "UPDATE blobs SET revision = revision + 1, size_bytes = size_bytes + $2
    WHERE id = $1 AND kind = 'container' AND state IN ('staging', 'committed') RETURNING revision";

/// A file's objects become garbage, unless a zip has them too: then they go with the last zip that does.
const DISCARD_OBJECTS: &str = "INSERT INTO garbage (object_key, blob_id, created_at_ms)
    SELECT b.object_key, b.blob_id, CAST($3 AS BIGINT)
    FROM chunks c JOIN blocks b ON b.blob_id = $2 AND b.block_id = c.block_id AND b.start_offset IS NULL
    WHERE c.file_id = $1
        AND NOT EXISTS (SELECT 1 FROM blocks o WHERE o.object_key = b.object_key AND o.blob_id <> b.blob_id)
    ON CONFLICT (object_key) DO NOTHING";
/// And they are forgotten; found by their objects, because SQLite would look at all blocks of the container.
const FORGET_BLOCKS: &str = "DELETE FROM blocks WHERE start_offset IS NULL AND object_key IN (
    SELECT b.object_key
    FROM chunks c JOIN blocks b ON b.blob_id = $2 AND b.block_id = c.block_id AND b.start_offset IS NULL
    WHERE c.file_id = $1)";

/// The chunks of files, without an end to the condition.
const CHUNKS: &str = "SELECT c.file_id, c.file_offset, c.crc32, c.tail, c.core_crc64,
        b.object_key, b.object_offset, b.size_bytes, b.crc64
    FROM files f JOIN chunks c ON c.file_id = f.id
        JOIN blocks b ON b.blob_id = f.container_id AND b.block_id = c.block_id AND b.start_offset IS NULL
    WHERE f.container_id = $1 AND f.uploader = '' AND f.path >= $2 AND f.path <= $3
    ORDER BY f.path, c.file_offset";

impl Db {
    /// The container of a name in the job's run and attempt, made if it is not there. What is there is kept longer if
    /// the new wish goes further.
    pub async fn open_container(&self, new: &NewArtifact<'_>) -> Result<Created<ArtifactId>> {
        for _ in 0..TRIES {
            if let Some(opened) = self.try_open_container(new).await? {
                return Ok(opened);
            }
        }
        Err(lost_every_race())
    }

    /// `None` if another request got in between.
    async fn try_open_container(&self, new: &NewArtifact<'_>) -> Result<Option<Created<ArtifactId>>> {
        let NewArtifact {
            principal,
            name,
            created_at_ms: now_ms,
            ..
        } = *new;
        let run = &principal.run;
        let blob = BlobId::fresh();
        let mut refused = None;
        let opened = transaction!(self, Durable, |tx| {
            refused = None;
            type There = (i64, String, Uuid, Option<Uuid>, i64);
            let there: Option<There> = query(LOCK_NAME)
                .bind_run(run)
                .bind(name)
                .bind(principal.run_attempt)
                .fetch_optional(tx)
                .await?;
            let mut joined = None;
            if let Some((id, state, shown, container, expires_at_ms)) = there {
                let lives = state == "pending" || state == "finalized" && expires_at_ms > now_ms;
                match container {
                    Some(container) if lives => {
                        query("UPDATE artifacts SET expires_at_ms = $2 WHERE id = $1 AND expires_at_ms < $2")
                            .bind(id)
                            .bind(new.expires_at_ms)
                            .execute(tx)
                            .await?;
                        // Whoever joins an upload has as much time as whoever begins one.
                        query("UPDATE blobs SET created_at_ms = $2 WHERE id = $1 AND state = 'staging'")
                            .bind(container)
                            .bind(now_ms)
                            .execute(tx)
                            .await?;
                        joined = Some(id);
                    }
                    None if lives => refused = Some(Created::Exists),
                    _ => {
                        bury(tx, iter::once(shown).chain(container), "expired", now_ms).await?;
                        query("DELETE FROM artifacts WHERE id = $1")
                            .bind(id)
                            .execute(tx)
                            .await?;
                    }
                }
            }
            let mut opened = joined;
            if joined.is_none() && refused.is_none() {
                query(BEGIN)
                    .bind(blob.0)
                    .bind("container")
                    .bind(now_ms)
                    .execute(tx)
                    .await?;
                query(
                    "INSERT INTO containers (blob_id, file_count, received_bytes, replaced_count, published_bytes)
                     VALUES ($1, 0, 0, 0, 0)",
                )
                .bind(blob.0)
                .execute(tx)
                .await?;
                opened = query(INSERT_ARTIFACT)
                    .bind_run(run)
                    .bind(name)
                    .bind(principal.run_attempt)
                    .bind(&principal.job_backend_id)
                    .bind(principal.repository_name.as_deref())
                    .bind(principal.run_id)
                    .bind(new.version)
                    .bind(new.mime_type)
                    .bind(blob.0)
                    .bind(now_ms)
                    .bind(new.expires_at_ms)
                    .bind(blob.0)
                    .fetch_optional(tx)
                    .await?;
                if opened.is_some() {
                    refused = over_limit!(tx, new);
                }
            }
            failpoint::reach("container_before_commit");
            opened.filter(|_| refused.is_none())
        });
        match opened {
            // The next finds what it made.
            Err(Failure::Unknown(_)) => Ok(None),
            opened => Ok(opened?.map(|id| Created::Upload(ArtifactId(id))).or(refused)),
        }
    }

    /// A container of the job's run, of its own attempt or an earlier one, if it lives at `now_ms`.
    pub async fn container(&self, principal: &Principal, id: ArtifactId, now_ms: i64) -> Result<Option<Container>> {
        let run = &principal.run;
        let row: Option<ContainerRow> = on!(self, Reading, |conn| {
            query(
                "SELECT a.id, a.name, a.run_attempt, a.container_id, b.size_bytes, a.state
                 FROM artifacts a JOIN blobs b ON b.id = a.container_id
                 WHERE a.id = $1 AND a.issuer = $2 AND a.repository = $3 AND a.run_backend_id = $4
                     AND a.run_attempt <= $5 AND a.expires_at_ms > $6",
            )
            .bind(id.0)
            .bind_run(run)
            .bind(principal.run_attempt)
            .bind(now_ms)
            .fetch_optional(conn)
            .await?
        });
        row.map(|row| {
            Ok(Container {
                artifact: ArtifactId(row.id),
                name: row.name,
                run_attempt: row.run_attempt,
                blob: BlobId(row.container_id),
                stored_bytes: unsigned(row.size_bytes)?,
                lost: row.state == "lost",
            })
        })
        .transpose()
    }

    /// Records a chunk. With the last one of a file it takes the place of the file that had its path before.
    pub async fn stage_chunk(&self, new: &NewChunk<'_>) -> Result<Staged> {
        let (length, total) = (signed(new.length_bytes)?, signed(new.total_bytes)?);
        let offset = signed(new.file_offset)?;
        let size = signed(new.block.map_or(0, |block| block.size_bytes))?;
        let header = new.sums.header_bytes.map(signed).transpose()?;
        let fresh = Uuid::now_v7();
        let mut refused = Staged::Closed;
        let staged = transaction!(self, Staging, |tx| {
            refused = Staged::Closed;
            let revision: Option<i64> = query(LOCK_CONTAINER)
                .bind(new.container.0)
                .bind(size)
                .fetch_optional(tx)
                .await?;
            if let Some(revision) = revision {
                let there: Vec<Begun> = query(
                    "SELECT id, uploader, encoding, total_bytes, received_bytes, chunk_count FROM files
                     WHERE container_id = $1 AND path = $2 AND uploader IN ('', $3)",
                )
                .bind(new.container.0)
                .bind(new.path)
                .bind(new.job_backend_id)
                .fetch_all(tx)
                .await?;
                let (complete, begun): (Vec<_>, Vec<_>) = there.into_iter().partition(|file| file.uploader.is_empty());
                let (complete, begun) = (complete.into_iter().next(), begun.into_iter().next());
                let is_this_file = |file: &&Begun| file.total_bytes == total && file.encoding == new.encoding.as_str();
                let (mut file, mut received, mut chunk_count) = (None, size, 1);
                let mut forgotten = Vec::new();
                if offset == 0 {
                    let file_count: i64 = query("SELECT file_count FROM containers WHERE blob_id = $1")
                        .bind(new.container.0)
                        .fetch_one(tx)
                        .await?;
                    if begun.is_none() && complete.is_none() && file_count >= new.max_files {
                        refused = Staged::TooManyFiles;
                    } else {
                        file = Some(fresh);
                        forgotten.extend(begun);
                    }
                } else if let Some(begun) = begun
                    .as_ref()
                    .filter(|file| file.received_bytes == offset)
                    .filter(is_this_file)
                {
                    received += offset;
                    chunk_count += begun.chunk_count;
                    if begun.chunk_count >= new.max_chunks {
                        refused = Staged::TooManyChunks;
                    } else {
                        file = Some(begun.id);
                    }
                } else {
                    // Perhaps the answer to it was lost.
                    refused = Staged::OutOfOrder;
                    for file in [&begun, &complete].into_iter().flatten().filter(is_this_file) {
                        let same: Option<(i64, i64)> = query(
                            "SELECT b.size_bytes, b.crc64 FROM chunks c
                                 JOIN blocks b ON b.blob_id = $1 AND b.block_id = c.block_id AND b.start_offset IS NULL
                             WHERE c.file_id = $2 AND c.file_offset = $3",
                        )
                        .bind(new.container.0)
                        .bind(file.id)
                        .bind(offset)
                        .fetch_optional(tx)
                        .await?;
                        if same.is_some() && same == new.block.map(|block| (size, block.crc64.cast_signed())) {
                            refused = Staged::AlreadyThere;
                        }
                    }
                }
                if let Some(file) = file {
                    let is_complete = received == total;
                    let replaces = is_complete && complete.is_some();
                    if is_complete {
                        forgotten.extend(complete);
                    }
                    for old in &forgotten {
                        query(DISCARD_OBJECTS)
                            .bind(old.id)
                            .bind(new.container.0)
                            .bind(new.now_ms)
                            .execute(tx)
                            .await?;
                        query(FORGET_BLOCKS)
                            .bind(old.id)
                            .bind(new.container.0)
                            .execute(tx)
                            .await?;
                        query("DELETE FROM files WHERE id = $1")
                            .bind(old.id)
                            .execute(tx)
                            .await?;
                    }
                    if offset == 0 {
                        query(
                            "INSERT INTO files (id, container_id, path, uploader, encoding, length_bytes, total_bytes,
                                 received_bytes, chunk_count, header_bytes)
                             VALUES ($1, $2, $3, $4, $5, $6, $7, 0, 0, $8)",
                        )
                        .bind(file)
                        .bind(new.container.0)
                        .bind(new.path)
                        .bind(new.job_backend_id)
                        .bind(new.encoding.as_str())
                        .bind(length)
                        .bind(total)
                        .bind(header)
                        .execute(tx)
                        .await?;
                    }
                    query(
                        "UPDATE files SET received_bytes = $2, chunk_count = $3, uploader = $4, revision = $5,
                             completed_at_ms = $6, length_bytes = $7
                         WHERE id = $1",
                    )
                    .bind(file)
                    .bind(received)
                    .bind(chunk_count)
                    .bind(if is_complete { "" } else { new.job_backend_id })
                    .bind(is_complete.then_some(revision))
                    .bind(is_complete.then_some(new.now_ms))
                    .bind(length)
                    .execute(tx)
                    .await?;
                    if let Some(block) = new.block {
                        // Any id will do that no other block of the container has.
                        let block_id = fresh.simple().to_string();
                        query(
                            "INSERT INTO blocks (blob_id, block_id, object_key, object_offset, size_bytes, crc64)
                             VALUES ($1, $2, $3, $4, $5, $6)",
                        )
                        .bind(new.container.0)
                        .bind(&block_id)
                        .bind(block.object_key.as_str())
                        .bind(signed(block.object_offset)?)
                        .bind(size)
                        .bind(block.crc64.cast_signed())
                        .execute(tx)
                        .await?;
                        query(
                            "INSERT INTO chunks (file_id, file_offset, block_id, crc32, tail, core_crc64)
                             VALUES ($1, $2, $3, $4, $5, $6)",
                        )
                        .bind(file)
                        .bind(offset)
                        .bind(&block_id)
                        .bind(i64::from(new.sums.crc32))
                        .bind(new.sums.tail.as_slice())
                        .bind(new.sums.core_crc64.cast_signed())
                        .execute(tx)
                        .await?;
                    }
                    let (gone, gone_bytes) = (
                        forgotten.len() as i64,
                        forgotten.iter().map(|old| old.received_bytes).sum::<i64>(),
                    );
                    query(
                        "UPDATE containers SET file_count = file_count + $2, received_bytes = received_bytes + $3,
                             replaced_count = replaced_count + $4
                         WHERE blob_id = $1",
                    )
                    .bind(new.container.0)
                    .bind(i64::from(offset == 0) - gone)
                    .bind(if is_complete { length } else { 0 })
                    .bind(i64::from(replaces))
                    .execute(tx)
                    .await?;
                    if gone_bytes > 0 {
                        query("UPDATE blobs SET size_bytes = size_bytes - $2 WHERE id = $1")
                            .bind(new.container.0)
                            .bind(gone_bytes)
                            .execute(tx)
                            .await?;
                    }
                    failpoint::reach("chunk_before_commit");
                    Some(())
                } else {
                    None
                }
            } else {
                None
            }
        });
        let staged = match (staged, new.block) {
            (Err(Failure::Unknown(_)), Some(block)) if self.is_object_in_use(&block.object_key).await? => Some(()),
            (staged, _) => staged?,
        };
        Ok(staged.map_or(refused, |()| Staged::Done))
    }

    /// Complete files of a container whose paths come after `after`, in their order.
    pub async fn files(&self, container: BlobId, after: &str, limit: i64) -> Result<Vec<File>> {
        let rows: Vec<FileRow> = on!(self, Reading, |conn| {
            query(
                "SELECT id, path, encoding, length_bytes, total_bytes, header_bytes, revision, completed_at_ms
                 FROM files WHERE container_id = $1 AND uploader = '' AND path > $2 ORDER BY path LIMIT $3",
            )
            .bind(container.0)
            .bind(after)
            .bind(limit)
            .fetch_all(conn)
            .await?
        });
        rows.into_iter().map(File::try_from).collect()
    }

    /// The complete file that has a path.
    pub async fn file(&self, container: BlobId, path: &str) -> Result<Option<File>> {
        let row: Option<FileRow> = on!(self, Reading, |conn| {
            query(
                "SELECT id, path, encoding, length_bytes, total_bytes, header_bytes, revision, completed_at_ms
                 FROM files WHERE container_id = $1 AND uploader = '' AND path = $2",
            )
            .bind(container.0)
            .bind(path)
            .fetch_optional(conn)
            .await?
        });
        row.map(File::try_from).transpose()
    }

    /// The chunks of the complete files from one path to another, both included, by file; those of each in order.
    pub async fn chunks(&self, container: BlobId, from: &str, to: &str) -> Result<HashMap<Uuid, Vec<FileChunk>>> {
        let rows: Vec<ChunkRow> = on!(self, Reading, |conn| query(CHUNKS)
            .bind(container.0)
            .bind(from)
            .bind(to)
            .fetch_all(conn)
            .await?);
        let mut chunks: HashMap<_, Vec<_>> = HashMap::new();
        for row in rows {
            chunks.entry(row.file_id).or_default().push(row.try_into()?);
        }
        Ok(chunks)
    }

    /// Complete files whose chunks are not all there, or do not add up, of the containers that artifacts have.
    pub async fn broken_files(&self, after: Option<&BrokenFile>, limit: i64) -> Result<Vec<BrokenFile>> {
        let (container, path) = after.map_or((Uuid::nil(), ""), |file| (file.container.0, file.path.as_str()));
        let rows: Vec<(Uuid, String)> = on!(self, Reading, |conn| {
            query(
                "SELECT f.container_id, f.path FROM files f
                 WHERE (f.container_id, f.path) > ($1, $2) AND f.uploader = ''
                     AND EXISTS (SELECT 1 FROM artifacts a WHERE a.container_id = f.container_id)
                     AND (f.received_bytes <> f.total_bytes OR f.total_bytes <> (
                         SELECT CAST(coalesce(sum(b.size_bytes), 0) AS BIGINT) FROM chunks c
                             JOIN blocks b ON b.blob_id = f.container_id AND b.block_id = c.block_id
                                 AND b.start_offset IS NULL
                         WHERE c.file_id = f.id))
                 ORDER BY f.container_id, f.path LIMIT $3",
            )
            .bind(container)
            .bind(path)
            .bind(limit)
            .fetch_all(conn)
            .await?
        });
        Ok(rows
            .into_iter()
            .map(|(container, path)| BrokenFile {
                container: BlobId(container),
                path,
            })
            .collect())
    }
}
