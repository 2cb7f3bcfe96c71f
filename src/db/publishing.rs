//! Showing the files of a container: the zips that are made of them.
//!
//! Called by `service/files.rs`. What an artifact of version 3 shows is a blob sealed like any other, whose blocks are
//! ranges of the objects that its container's chunks are. It is filled where nobody sees it and shown in one step.

use uuid::Uuid;

use super::blobs::{BEGIN, ROWS_PER_INSERT, placement};
use super::cleaning::bury;
use super::sql::{ALL_OF_A_TABLE, query, row_struct};
use super::{Db, Failure, on, signed, transaction, unsigned};
use crate::error::Result;
use crate::failpoint;
use crate::model::{ArtifactId, BlobId, BlobKind, Block, Principal};

/// A container that is to be published, as it stands.
#[derive(Clone, Debug)]
pub struct Publication {
    pub artifact: ArtifactId,
    pub container: BlobId,
    /// Grows with every change of a file.
    pub revision: i64,
    pub published_revision: Option<i64>,
    /// The lengths of all files that were ever complete.
    pub received_bytes: u64,
    /// The lengths of the files that are published.
    pub published_bytes: u64,
    /// What the artifact points at: the container itself, or the zip that was published last.
    shown: BlobId,
    replaced_count: i64,
}

row_struct! {
    struct PublicationRow {
        id: i64,
        container_id: Uuid,
        blob_id: Uuid,
        revision: i64,
        published_revision: Option<i64>,
        received_bytes: i64,
        published_bytes: i64,
        replaced_count: i64,
    }
}

impl Db {
    /// The container of a name in the job's run and attempt, to be published.
    pub async fn publication(&self, principal: &Principal, name: &str, now_ms: i64) -> Result<Option<Publication>> {
        let run = &principal.run;
        let row: Option<PublicationRow> = on!(self, Reading, |conn| {
            query(
                "SELECT a.id, a.container_id, a.blob_id, b.revision, c.published_revision, c.received_bytes,
                     c.published_bytes, c.replaced_count
                 FROM artifacts a JOIN containers c ON c.blob_id = a.container_id JOIN blobs b ON b.id = c.blob_id
                 WHERE a.issuer = $1 AND a.repository = $2 AND a.run_backend_id = $3 AND a.name = $4
                     AND a.run_attempt = $5 AND a.expires_at_ms > $6 AND a.state <> 'lost'",
            )
            .bind_run(run)
            .bind(name)
            .bind(principal.run_attempt)
            .bind(now_ms)
            .fetch_optional(conn)
            .await?
        });
        row.map(|row| {
            Ok(Publication {
                artifact: ArtifactId(row.id),
                container: BlobId(row.container_id),
                revision: row.revision,
                published_revision: row.published_revision,
                received_bytes: unsigned(row.received_bytes)?,
                published_bytes: unsigned(row.published_bytes)?,
                shown: BlobId(row.blob_id),
                replaced_count: row.replaced_count,
            })
        })
        .transpose()
    }

    /// How many complete files a container has, and what their paths add up to.
    pub async fn path_bytes(&self, container: BlobId) -> Result<(u64, u64)> {
        let (count, bytes): (i64, i64) = on!(self, Reading, |conn| {
            query(
                "SELECT CAST(count(*) AS BIGINT), CAST(coalesce(sum(octet_length(path)), 0) AS BIGINT)
                 FROM files WHERE container_id = $1 AND uploader = ''",
            )
            .bind(container.0)
            .rows(ALL_OF_A_TABLE)
            .fetch_one(conn)
            .await?
        });
        Ok((unsigned(count)?, unsigned(bytes)?))
    }

    /// Whether a complete file was replaced since the publication was looked at: then its zip may not be right.
    pub async fn is_outdated(&self, publication: &Publication) -> Result<bool> {
        let replaced: Option<i64> = on!(self, Reading, |conn| {
            query("SELECT replaced_count FROM containers WHERE blob_id = $1")
                .bind(publication.container.0)
                .fetch_optional(conn)
                .await?
        });
        Ok(replaced != Some(publication.replaced_count))
    }

    /// Begins a blob that [`Db::add_content`] fills and [`Db::publish`] shows. If it comes to nothing it is an abandoned
    /// upload like any other.
    pub async fn begin_zip(&self, zip: BlobId, now_ms: i64) -> Result<()> {
        on!(self, Staging, |conn| {
            query(BEGIN)
                .bind(zip.0)
                .bind(BlobKind::Artifact.as_str())
                .bind(now_ms)
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    /// Appends blocks to the content of a zip that nobody sees yet, each with its start.
    pub async fn add_content(&self, zip: BlobId, blocks: &[(u64, Block)]) -> Result<()> {
        for page in blocks.chunks(ROWS_PER_INSERT) {
            on!(self, Staging, |conn| {
                query(
                    "INSERT INTO blocks (blob_id, block_id, object_key, object_offset, size_bytes, crc64, start_offset) ",
                )
                .push_values(page, |(start, block)| placement(zip, "", block, start.cast_signed()))
                .rows(page.len())
                .execute(conn)
                .await?;
            });
        }
        Ok(())
    }

    /// Gives up a zip that was begun.
    pub async fn discard_zip(&self, zip: BlobId, now_ms: i64) -> Result<()> {
        on!(self, Staging, |conn| {
            query(
                "UPDATE blobs SET state = 'deleting', tombstone = 'abandoned', changed_at_ms = $2, cleaned_at_ms = NULL
                 WHERE id = $1 AND state = 'staging'",
            )
            .bind(zip.0)
            .bind(now_ms)
            .execute(conn)
            .await?;
        });
        Ok(())
    }

    /// Seals a zip of `size_bytes` that has files of `length_bytes` in it, and lets the artifact show it in the place of
    /// what it showed before. `false` if another publication was first, if a file was replaced since this one was
    /// looked at, or if the artifact is gone; or if it may have been done and nobody said so: look again.
    pub async fn publish(
        &self,
        publication: &Publication,
        zip: BlobId,
        size_bytes: u64,
        length_bytes: u64,
        now_ms: i64,
    ) -> Result<bool> {
        let (size, length) = (signed(size_bytes)?, signed(length_bytes)?);
        let done = transaction!(self, Durable, |tx| {
            let shown = query(
                "UPDATE artifacts SET state = 'finalized', blob_id = $3, finalized_at_ms = $4
                 WHERE id = $1 AND blob_id = $2 AND state IN ('pending', 'finalized')",
            )
            .bind(publication.artifact.0)
            .bind(publication.shown.0)
            .bind(zip.0)
            .bind(now_ms)
            .execute(tx)
            .await?;
            let kept = query(
                "UPDATE blobs SET state = 'committed', changed_at_ms = $2, cleaned_at_ms = NULL
                 WHERE id = $1 AND state IN ('staging', 'committed')",
            )
            .bind(publication.container.0)
            .bind(now_ms)
            .execute(tx)
            .await?;
            let current = query(
                "UPDATE containers SET published_revision = $3, published_bytes = $4
                 WHERE blob_id = $1 AND replaced_count = $2",
            )
            .bind(publication.container.0)
            .bind(publication.replaced_count)
            .bind(publication.revision)
            .bind(length)
            .execute(tx)
            .await?;
            let sealed = query(
                "UPDATE blobs SET state = 'sealed', revision = 1, size_bytes = $2, content_type = 'application/zip',
                     verification = 'pending', changed_at_ms = $3, scrubbed_at_ms = $3
                 WHERE id = $1 AND state = 'staging'",
            )
            .bind(zip.0)
            .bind(size)
            .bind(now_ms)
            .execute(tx)
            .await?;
            if shown + kept + current + sealed == 4 {
                if publication.shown != publication.container {
                    bury(tx, [publication.shown.0], "superseded", now_ms).await?;
                }
                failpoint::reach("publish_before_commit");
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
}
