//! Everything that knows where bytes lie: immutable objects on a disk or in an S3 bucket.
//!
//! `service/` puts blocks in, reads windows of blobs out and deletes what no row names any more.
//! Never knows HTTP requests, SQL or who may do what; never overwrites an object.

mod buffers;
mod disk;
mod fetch;
mod intake;
mod object;
mod pace;
mod page_cache;
mod read;

use std::io;
use std::path::Path;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use secrecy::SecretString;
use serde::Deserialize;

use self::disk::Disk;
use self::intake::Intake;
use self::object::Object;
pub use self::read::{BlockReader, Piece, window};
use crate::error::{Error, Result};
use crate::model::{BlobId, ObjectKey};

/// Name of the marker beside the `blobs/` tree.
const MARKER: &str = "wharfinger-store";
/// A marker is a few words; anything longer is not one of ours.
const MARKER_MAX_BYTES: u64 = 4096;

/// The `[storage]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Empty: a disk, below the data directory. `s3://bucket/prefix`: a bucket. `memory://`: gone at exit, for tests.
    pub url: String,
    /// The `http://` or `https://` address of an S3 server that is not Amazon's; empty for Amazon's own.
    pub endpoint: String,
    pub region: String,
    /// The bucket is named in the path of S3 requests; otherwise in their host name.
    pub path_style: bool,
    /// Empty: credentials come from `AWS_*` variables or from the machine's role.
    pub access_key_id: String,
    pub secret_access_key: SecretString,
    pub session_token: SecretString,
    pub durability: Durability,
}

/// What a finished [`BlockStore::make_durable`] means on a disk. A bucket is always durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// The objects survive a power cut.
    Full,
    /// They survive the end of the process only. For measuring against servers that sync nothing.
    Process,
}

/// Why a store can't be used: one sentence for the person who configures it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OpenError(String);

/// An object as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub key: ObjectKey,
    pub size_bytes: u64,
    /// Milliseconds since the epoch, by the store's clock.
    pub modified_ms: i64,
}

/// The one place for blocks. Clones share everything.
#[derive(Clone, Debug)]
pub enum BlockStore {
    Disk(Disk),
    Object(Object),
}

impl BlockStore {
    /// What one [`Self::put`] holds of its body at most, with what is read from the client ahead of it.
    pub const PUT_HOLDS_BYTES: u64 = 512 * 1024;
    /// What one [`BlockReader`] and the reply that it feeds hold at most: up to three chunks on their way and the next.
    pub const READ_HOLDS_BYTES: u64 = 4 * fetch::CHUNK_BYTES as u64;

    /// Opens the configured store and checks that it can be used. `data_dir` matters to a disk only;
    /// `ca_file` is a PEM bundle of further authorities that may vouch for an S3 server.
    pub async fn open(
        settings: &Settings,
        data_dir: &Path,
        ca_file: Option<&Path>,
    ) -> std::result::Result<Self, OpenError> {
        if settings.url.is_empty() {
            return Ok(Self::Disk(Disk::open(data_dir, settings.durability).await?));
        }
        if settings.url == "memory://" {
            return Ok(Self::Object(Object::in_memory()));
        }
        let Some(place) = settings.url.strip_prefix("s3://") else {
            return Err(OpenError(format!(
                "storage.url is `{}`: leave it empty for a disk, or write `s3://bucket` or `s3://bucket/prefix`",
                settings.url
            )));
        };
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        Ok(Self::Object(
            Object::in_bucket(settings, bucket, prefix, ca_file).await?,
        ))
    }

    /// Streams a body of exactly `size_bytes` into the fresh object `key` and returns the CRC-64/NVME of its bytes.
    ///
    /// After any error, and when the future is dropped, there is no object. Errors of the body come back unchanged;
    /// a body of another length is [`Error::Invalid`]. The object survives `kill -9`; see [`Self::make_durable`].
    pub async fn put<S>(&self, key: &ObjectKey, size_bytes: u64, body: S) -> Result<u64>
    where
        S: Stream<Item = Result<Bytes>> + Send + 'static,
    {
        let intake = Intake::new(size_bytes, body.boxed());
        match self {
            Self::Disk(disk) => disk.put(key, intake).await,
            Self::Object(object) => object.put(key, size_bytes, intake).await,
        }
    }

    /// When this returns, these objects of `blob` survive a power cut.
    ///
    /// [`Error::Gone`] when one is missing or has another size: bytes that were acknowledged are lost, and no retry
    /// of the caller's request brings them back. In a bucket every finished put is durable and of the right size.
    pub async fn make_durable(&self, blob: BlobId, blocks: &[(ObjectKey, u64)]) -> Result<()> {
        match self {
            Self::Disk(disk) => disk.make_durable(blob, blocks).await,
            Self::Object(_) => Ok(()),
        }
    }

    /// Streams the pieces in order. The first bytes are fetched and checked before this returns, so that a missing
    /// or damaged first block is an error here. [`Error::Gone`] means damage, [`Error::Busy`] passing trouble.
    pub async fn read(&self, pieces: Vec<Piece>) -> Result<BlockReader> {
        BlockReader::open(self.clone(), pieces).await
    }

    /// Deletes an object. One that is not there is deleted already.
    pub async fn delete(&self, key: &ObjectKey) -> Result<()> {
        match self {
            Self::Disk(disk) => disk.delete(key).await,
            Self::Object(object) => object.delete(key).await,
        }
    }

    /// All objects staged for `blob`, in no particular order. Names that are not ours are left out.
    pub async fn list(&self, blob: BlobId) -> Result<Vec<Listed>> {
        match self {
            Self::Disk(disk) => disk.list(blob).await,
            Self::Object(object) => object.list(blob).await,
        }
    }

    /// Every object of the store, in no particular order.
    pub fn list_all(&self) -> BoxStream<'static, Result<Listed>> {
        match self {
            Self::Disk(disk) => disk.list_all(),
            Self::Object(object) => object.list_all(),
        }
    }

    /// Takes away what a disk keeps for a blob besides its objects: the directory, with the last of those that share it.
    pub async fn remove_prefix(&self, blob: BlobId) -> Result<()> {
        match self {
            Self::Disk(disk) => disk.remove_prefix(blob).await,
            Self::Object(_) => Ok(()),
        }
    }

    /// The words by which this store is known; `None` before [`Self::write_marker`].
    pub async fn read_marker(&self) -> Result<Option<String>> {
        match self {
            Self::Disk(disk) => disk.read_marker().await,
            Self::Object(object) => object.read_marker().await,
        }
    }

    /// Names the store, durably. At most 4096 bytes.
    pub async fn write_marker(&self, marker: &str) -> Result<()> {
        if marker.len() as u64 > MARKER_MAX_BYTES {
            return Err(Error::Internal("a marker of more than 4096 bytes".into()));
        }
        match self {
            Self::Disk(disk) => disk.write_marker(marker).await,
            Self::Object(object) => object.write_marker(marker).await,
        }
    }

    /// A cheap question whether the store would take requests now; for readiness.
    pub async fn check(&self) -> Result<()> {
        match self {
            Self::Disk(disk) => disk.check().await,
            Self::Object(object) => object.read_marker().await.map(drop),
        }
    }

    /// Opens bytes `from..to` of a block, whether or not the stream is polled yet: what is not in memory begins to come.
    /// A stream that ends early means that the store has fewer bytes.
    fn fetch(&self, piece: &Piece) -> BoxStream<'static, Result<Bytes>> {
        let start = piece.block.object_offset.saturating_add(piece.from);
        let end = piece.block.object_offset.saturating_add(piece.to);
        if start >= end {
            return stream::empty().boxed();
        }
        match self {
            Self::Disk(disk) => disk.fetch(&piece.block.object_key, start..end),
            Self::Object(object) => object.fetch(&piece.block.object_key, start..end),
        }
    }
}

/// What can be wrong with stored bytes: the labels of `wharfinger_storage_damage_total`.
pub const KINDS_OF_DAMAGE: [&str; 3] = ["missing", "short", "crc"];

/// Counts and logs bytes that the store has lost, and says so to the caller. `kind` is one of [`KINDS_OF_DAMAGE`].
fn damage(kind: &'static str, key: &ObjectKey) -> Error {
    metrics::counter!("wharfinger_storage_damage_total", "kind" => kind).increment(1);
    tracing::error!(%key, kind, "stored bytes are damaged");
    Error::Gone(format!("stored bytes are damaged ({kind})"))
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        // The same numbers on every Unix; std has no words for them.
        const ENFILE: i32 = 23;
        const EMFILE: i32 = 24;
        let sentence = match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::NotFound, _) => return Self::NotFound("no such object".into()),
            (io::ErrorKind::StorageFull, _) => "the disk is full",
            (io::ErrorKind::QuotaExceeded, _) => "the disk quota is used up",
            (io::ErrorKind::ReadOnlyFilesystem, _) => "the disk can only be read",
            (_, Some(ENFILE | EMFILE)) => "too many files are open",
            _ => return Self::Internal(format!("disk: {error}")),
        };
        tracing::warn!(%error, "the disk refuses");
        Self::Busy(sentence.into())
    }
}
