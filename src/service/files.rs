//! Artifacts of version 3: jobs fill a container with files, and publishing makes one zip of them.
//!
//! Called by `api/artifacts_v3.rs` with a principal whose run was already compared with the request's. What is
//! published is an artifact like any other. No byte of a file is ever moved, packed or unpacked: the zip's blocks are
//! ranges of the chunks as they came, between headers that lie together in one small object.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, checksum};
use futures_util::{Stream, TryStreamExt, stream};

use super::artifacts::{check_known, check_name, limit, no_such_artifact, too_many, too_many_pending};
use super::chunks::{Summing, deflate_member, packed_length, whole_crc32};
use super::downloads::ByteStream;
use super::uploads::Upload;
use super::zip::{Headers, Member, Method};
use super::{Services, millis};
use crate::db::{Container, Created, Encoding, File, NewArtifact, NewChunk, Publication, Staged};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::model::{ArtifactId, BlobId, Block, ObjectKey, Principal};
use crate::storage::{self, BlockStore};

/// What the rows of these artifacts carry as their protocol's version.
const VERSION: i32 = 3;
const DAY_MS: i64 = 24 * 3600 * 1000;
/// As many as a block list may name.
const MAX_CHUNKS: i64 = 50_000;
/// Files that are looked at in one go.
const PAGE: i64 = 500;
/// Files per page of a list, whose locations hold each path several times.
const LISTED_PAGE: i64 = 50;
/// What a zip's headers may take while it is made: for 200,000 files, paths of 270 bytes on average.
const MAX_HEADERS_BYTES: u64 = 128 * 1024 * 1024;
/// How often publishing begins anew when files are replaced at the same moment.
const PUBLISH_TRIES: usize = 8;
/// What the two copies of a path come to in memory: in both headers.
const PATH_COPIES: u64 = 2;

/// One chunk of a file, as its client describes it.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The first part of the file's path: the artifact's name.
    pub artifact: &'a str,
    /// The rest of it, `/` between its parts.
    pub path: &'a str,
    pub encoding: Encoding,
    /// What the file is when it is unpacked.
    pub length_bytes: u64,
    /// What is sent of it in all.
    pub total_bytes: u64,
    /// Where in that the chunk begins.
    pub file_offset: u64,
}

/// A published container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    pub id: ArtifactId,
    /// The lengths of its files.
    pub files_bytes: u64,
}

impl Services {
    /// The container of a name in this run and attempt, made if it is not there.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::AlreadyExists`] if clients of another kind made an artifact of this name,
    /// [`Error::QuotaExceeded`].
    pub async fn open_container(
        &self,
        principal: &Principal,
        name: &str,
        retention_days: Option<i64>,
    ) -> Result<ArtifactId> {
        check_name(name)?;
        let now_ms = self.clock.now_ms();
        let settings = &self.settings.artifacts;
        let lifetime_ms = match retention_days {
            // Where the workflow says nothing, clients leave it out or send 0.
            None | Some(0) => millis(settings.default_retention),
            Some(days) if days > 0 => days.saturating_mul(DAY_MS).min(millis(settings.max_retention)),
            Some(_) => return Err(Error::Invalid("RetentionDays must not be negative".to_owned())),
        };
        let new = NewArtifact {
            principal,
            name,
            version: VERSION,
            mime_type: Some("application/zip"),
            created_at_ms: now_ms,
            expires_at_ms: now_ms + lifetime_ms,
            max_per_job: limit(settings.max_per_job),
            max_pending_per_run: limit(settings.max_pending_per_run),
        };
        match self.db.open_container(&new).await? {
            Created::Upload(id) => {
                failpoint::reach("container_committed");
                Ok(id)
            }
            Created::Exists => Err(Error::AlreadyExists(
                "an artifact with this name already exists on the workflow run".to_owned(),
            )),
            Created::TooMany => Err(too_many(settings)),
            Created::TooManyPending => Err(too_many_pending(settings)),
        }
    }

    /// A container that the job may look into. Its answer is the same for one that is another run's and for one that is
    /// not there.
    ///
    /// # Errors
    /// [`Error::Forbidden`]; [`Error::Gone`] if its bytes are lost.
    pub async fn container(&self, principal: &Principal, id: ArtifactId) -> Result<Container> {
        match self.db.container(principal, id, self.clock.now_ms()).await? {
            Some(container) if container.lost => {
                Err(Error::Gone("the artifact's bytes were damaged in the store".to_owned()))
            }
            Some(container) => Ok(container),
            None => Err(Error::Forbidden("the token's run has no such container".to_owned())),
        }
    }

    /// Stores a chunk of a file. Chunks come one after the other; the one that begins the file begins it anew. The last
    /// one puts the file in the place of the one that was there.
    ///
    /// # Errors
    /// Before the body is read: [`Error::Forbidden`], [`Error::Invalid`], [`Error::QuotaExceeded`]. After it:
    /// [`Error::Invalid`] if the file does not go on here, [`Error::ChecksumMismatch`], and whatever body, store or
    /// database fail with; then nothing is kept.
    pub async fn put_chunk<S>(
        &self,
        principal: &Principal,
        id: ArtifactId,
        chunk: &Chunk<'_>,
        upload: Upload<S>,
    ) -> Result<()>
    where
        S: Stream<Item = Result<Bytes>> + Send + 'static,
    {
        let container = self.container(principal, id).await?;
        if container.run_attempt != principal.run_attempt {
            return Err(Error::Forbidden("the container is an earlier attempt's".to_owned()));
        }
        if chunk.artifact != container.name {
            return Err(Error::Invalid(format!(
                "the path must begin with {}/, the artifact's name",
                container.name
            )));
        }
        let limit = self.settings.uploads.max_block_bytes;
        if upload.size_bytes > limit {
            return Err(Error::Invalid(format!("a chunk may have at most {limit} bytes")));
        }
        let limit = self.settings.artifacts.max_size_bytes;
        let stored_bytes = container.stored_bytes.saturating_add(upload.size_bytes);
        if limit > 0 && stored_bytes > limit {
            return Err(Error::QuotaExceeded(format!(
                "an artifact may have at most {limit} bytes"
            )));
        }
        let begins_gzip = chunk.encoding == Encoding::Gzip && chunk.file_offset == 0;
        let sums = Arc::new(Mutex::new(Summing::new(begins_gzip)));
        let block = if upload.size_bytes == 0 {
            None
        } else {
            let _share = self.memory.for_upload(BlockStore::PUT_HOLDS_BYTES).await?;
            let passing = Arc::clone(&sums);
            let upload = Upload {
                size_bytes: upload.size_bytes,
                body: upload.body.inspect_ok(move |bytes| {
                    passing.lock().unwrap_or_else(PoisonError::into_inner).update(bytes);
                }),
                checksums: upload.checksums,
            };
            Some(self.store_object(container.blob, upload).await?)
        };
        failpoint::reach("chunk_stored");
        let sums = std::mem::replace(
            &mut *sums.lock().unwrap_or_else(PoisonError::into_inner),
            Summing::new(false),
        )
        .finish();
        // Of a named pipe the client knows no length and says 0; what it has packed tells.
        let length_bytes = match packed_length(&sums.tail) {
            Some(length) if chunk.encoding == Encoding::Gzip && chunk.length_bytes == 0 => length,
            _ => chunk.length_bytes,
        };
        let max_files = self.settings.artifacts.max_files;
        let new = NewChunk {
            container: container.blob,
            path: chunk.path,
            job_backend_id: &principal.job_backend_id,
            encoding: chunk.encoding,
            length_bytes,
            total_bytes: chunk.total_bytes,
            file_offset: chunk.file_offset,
            block: block.as_ref(),
            sums: &sums,
            max_files: i64::from(max_files),
            max_chunks: MAX_CHUNKS,
            now_ms: self.clock.now_ms(),
        };
        // On an error it is not known whether the row was written; the cleaner finds the object if it was not.
        let staged = self.db.stage_chunk(&new).await?;
        if let (true, Some(block)) = (staged != Staged::Done, &block) {
            self.discard(&block.object_key).await;
        }
        match staged {
            Staged::Done | Staged::AlreadyThere => {
                failpoint::reach("chunk_committed");
                Ok(())
            }
            Staged::Closed => Err(Error::Forbidden("the container is gone".to_owned())),
            Staged::OutOfOrder => Err(Error::Invalid(
                "the chunks of a file come in their order, each once".to_owned(),
            )),
            Staged::TooManyFiles => Err(Error::Invalid(format!(
                "an artifact may have at most {max_files} files"
            ))),
            Staged::TooManyChunks => Err(Error::Invalid(format!("a file may have at most {MAX_CHUNKS} chunks"))),
        }
    }

    /// A page of a container's complete files, in the order of their paths, behind `after`.
    pub async fn files(&self, container: &Container, after: &str) -> Result<Vec<File>> {
        self.db.files(container.blob, after, LISTED_PAGE).await
    }

    /// A file of a container and its bytes, as they came.
    ///
    /// # Errors
    /// [`Error::NotFound`]; store and database errors.
    pub async fn read_file(&self, container: &Container, path: &str) -> Result<(File, ByteStream)> {
        let no_such_file = || Error::NotFound(format!("there is no file {path} in {}", container.name));
        let file = self.db.file(container.blob, path).await?.ok_or_else(no_such_file)?;
        if file.stored_bytes == 0 {
            return Ok((file, Box::pin(stream::empty())));
        }
        let mut chunks = self.db.chunks(container.blob, path, path).await?;
        // Gone if it was replaced meanwhile.
        let chunks = chunks.remove(&file.id).ok_or_else(no_such_file)?;
        let blocks = chunks.into_iter().map(|chunk| (chunk.file_offset, chunk.block));
        let bytes = self.read_pieces(storage::window(blocks, 0..file.stored_bytes)?).await?;
        Ok((file, bytes))
    }

    /// Shows all complete files of a container as one zip, in the place of what the artifact showed before.
    /// `files_bytes` is what the client says that its own files are when they are unpacked.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Invalid`] if fewer bytes came than the client says, or if a file came as gzip and
    /// is none.
    pub async fn publish_files(&self, principal: &Principal, name: &str, files_bytes: u64) -> Result<Published> {
        check_known(name)?;
        let mut needed = None;
        for _ in 0..PUBLISH_TRIES {
            let publication = self
                .db
                .publication(principal, name, self.clock.now_ms())
                .await?
                .ok_or_else(|| no_such_artifact(name))?;
            // Others may have sent files too, and may have replaced the client's own: less is no sign of anything.
            if files_bytes > publication.received_bytes {
                return Err(Error::Invalid(format!(
                    "{} bytes came, and not {files_bytes}",
                    publication.received_bytes
                )));
            }
            let needed = *needed.get_or_insert(publication.revision);
            if publication
                .published_revision
                .is_some_and(|revision| revision >= needed)
            {
                return Ok(Published {
                    id: publication.artifact,
                    files_bytes: publication.published_bytes,
                });
            }
            let zip = BlobId::fresh();
            self.db.begin_zip(zip, self.clock.now_ms()).await?;
            let published = self.try_publish(&publication, zip).await;
            if let Ok(Some(published)) = published {
                failpoint::reach("publish_after_commit");
                self.wake_verifier();
                return Ok(published);
            }
            // Nothing is done if it was published after all.
            self.db.discard_zip(zip, self.clock.now_ms()).await?;
            if let Err(error) = published
                && !self.db.is_outdated(&publication).await?
            {
                return Err(error);
            }
        }
        Err(Error::Busy("the files keep changing, finalize them again".to_owned()))
    }

    /// `None` if it has to be looked at again.
    async fn try_publish(&self, publication: &Publication, zip: BlobId) -> Result<Option<Published>> {
        let (count, path_bytes) = self.db.path_bytes(publication.container).await?;
        let room = count * Headers::MEMBER_BYTES + PATH_COPIES * path_bytes;
        if room > MAX_HEADERS_BYTES {
            return Err(Error::Invalid(
                "the paths of the artifact's files are too long together".to_owned(),
            ));
        }
        let _share = self.memory.for_upload(room).await?;
        let mut building = Building {
            services: self,
            publication,
            zip,
            headers_object: ObjectKey::fresh(zip),
            headers: Headers::default(),
            local_at: 0,
            files_bytes: 0,
        };
        let mut after = String::new();
        loop {
            let files = self.db.files(publication.container, &after, PAGE).await?;
            let Some(last) = files.last() else { break };
            after.clone_from(&last.path);
            building.add(&files).await?;
        }
        let files_bytes = building.files_bytes;
        let size_bytes = building.finish().await?;
        failpoint::reach("publish_zip_made");
        let now_ms = self.clock.now_ms();
        let published = self
            .db
            .publish(publication, zip, size_bytes, files_bytes, now_ms)
            .await?;
        Ok(published.then_some(Published {
            id: publication.artifact,
            files_bytes,
        }))
    }
}

/// A zip that is being put together. Its headers are held until the end: [`Headers::MEMBER_BYTES`] and twice its path
/// for each file.
struct Building<'a> {
    services: &'a Services,
    publication: &'a Publication,
    zip: BlobId,
    headers_object: ObjectKey,
    headers: Headers,
    /// How much of the headers' object is taken by local headers.
    local_at: u64,
    files_bytes: u64,
}

impl Building<'_> {
    async fn add(&mut self, files: &[File]) -> Result<()> {
        let Services(parts) = self.services;
        let (Some(first), Some(last)) = (files.first(), files.last()) else {
            return Ok(());
        };
        let container = self.publication.container;
        let mut chunks = parts.db.chunks(container, &first.path, &last.path).await?;
        let (mut rows, mut objects) = (Vec::new(), Vec::new());
        for file in files {
            // Those that came since belong to whoever publishes next.
            if file.revision > self.publication.revision {
                continue;
            }
            let chunks = chunks.remove(&file.id).unwrap_or_default();
            // What was published before is durable.
            if self
                .publication
                .published_revision
                .is_none_or(|done| file.revision > done)
            {
                objects.extend(
                    chunks
                        .iter()
                        .map(|chunk| (chunk.block.object_key.clone(), chunk.block.size_bytes)),
                );
            }
            let stored: u64 = chunks.iter().map(|chunk| chunk.block.size_bytes).sum();
            if stored != file.stored_bytes {
                // Replaced since the page was read, or broken.
                return Err(Error::Internal(format!("chunks of {} are missing", file.path)));
            }
            let (method, crc32, blocks) = match file.encoding {
                Encoding::Identity => {
                    let crc32 = whole_crc32(&chunks);
                    let blocks: Vec<Block> = chunks.into_iter().map(|chunk| chunk.block).collect();
                    (Method::Stored, crc32, blocks)
                }
                Encoding::Gzip => {
                    let member = file
                        .header_bytes
                        .and_then(|header| deflate_member(&chunks, header, file.length_bytes))
                        .ok_or_else(|| {
                            Error::Invalid(format!(
                                "{} came as gzip of {} bytes, and is not",
                                file.path, file.length_bytes
                            ))
                        })?;
                    (Method::Deflate, member.crc32, member.blocks)
                }
            };
            let mut at = self.headers.position();
            let header = self.headers.add(&Member {
                name: &file.path,
                method,
                crc32,
                packed_bytes: blocks.iter().map(|block| block.size_bytes).sum(),
                unpacked_bytes: file.length_bytes,
            });
            let header = self.headers.local(header);
            let header_block = self.header_block(self.local_at, header);
            self.local_at += header_block.size_bytes;
            self.files_bytes += file.length_bytes;
            for block in std::iter::once(header_block).chain(blocks) {
                let size_bytes = block.size_bytes;
                rows.push((at, block));
                at += size_bytes;
            }
        }
        parts.store.make_durable(container, &objects).await?;
        parts.db.add_content(self.zip, &rows).await
    }

    /// A part of the headers' object.
    fn header_block(&self, object_offset: u64, bytes: &[u8]) -> Block {
        Block {
            object_key: self.headers_object.clone(),
            object_offset,
            size_bytes: bytes.len() as u64,
            crc64: checksum(CrcAlgorithm::Crc64Nvme, bytes),
        }
    }

    /// Stores the headers and appends the directory. Returns how large the zip is.
    async fn finish(mut self) -> Result<u64> {
        let at = self.headers.position();
        let (local, directory) = std::mem::take(&mut self.headers).finish();
        let row = (at, self.header_block(self.local_at, &directory));
        let object_bytes = self.local_at + directory.len() as u64;
        let zip_bytes = at + directory.len() as u64;
        let Services(parts) = self.services;
        let body = [local, directory].into_iter().map(Bytes::from).map(Ok);
        parts
            .store
            .put(
                &self.headers_object,
                object_bytes,
                stream::iter(body.collect::<Vec<_>>()),
            )
            .await?;
        parts
            .store
            .make_durable(self.zip, &[(self.headers_object.clone(), object_bytes)])
            .await?;
        parts.db.add_content(self.zip, &[row]).await?;
        Ok(zip_bytes)
    }
}
