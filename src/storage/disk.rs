//! Objects as files on a local disk: `<data dir>/objects/blobs/<moment>/<blob id>.<uuid>`.
//!
//! Only `storage/mod.rs` calls this. Waits for the disk on blocking threads; what is expected to be a copy of memory is
//! done in place (`pace.rs`, `page_cache.rs`). Never maps files into memory, never takes a name from a client: paths are
//! made of the server's own ids, so nothing leads out of the root.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, DirEntry, File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::buffers::Buffers;
use super::intake::Intake;
use super::pace::{Pace, Writing};
use super::{Durability, Listed, MARKER, MARKER_MAX_BYTES, OpenError, damage, fetch, page_cache};
use crate::error::{Error, Result};
use crate::model::{BlobId, ObjectKey};

/// Enough for one trip to a blocking thread; more only costs memory.
const WRITE_BATCH_BYTES: usize = 256 * 1024;
/// Enough for one write in place, of bytes that a core's own cache still has.
const IN_PLACE_BYTES: usize = 64 * 1024;
/// What the kernel takes in one vectored write, and the bound on what a body of tiny frames can pile up.
const WRITE_BATCH_FRAMES: usize = 1024;
/// Files that are held open while they are synced in the background. When all are taken, the block list syncs the rest.
const BACKGROUND_SYNCS: usize = 64;
/// Syncs that one block list waits for at a time.
const LIST_SYNCS: usize = 16;
/// Finished syncs to remember for the list that will ask. Forgetting one costs a second, cheap sync.
const REMEMBERED_SYNCS: usize = 100_000;

/// How much of a blob's id names its directory. Ids begin with their time, and these are of the same 256 ms.
const MOMENT_CHARACTERS: usize = "01234567-89".len();
/// How often a directory is made again that the cleaner takes away, empty, before it has its file.
const CREATE_TRIES: usize = 3;
/// A list of so few blocks is looked at in place.
const FEW_BLOCKS: usize = 16;

/// Left free on the disk: without room for the database nothing could be deleted, and a full disk would stay full.
const RESERVED_BYTES: u64 = 16 * 1024 * 1024;

#[derive(Clone, Debug)]
pub struct Disk(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    durability: Durability,
    /// Files that are being synced or were, until their list has come.
    syncs: Mutex<HashMap<ObjectKey, Arc<OnceCell<()>>>>,
    slots: Arc<Semaphore>,
    buffers: Buffers,
    pace: Pace,
}

impl Disk {
    pub(super) async fn open(data_dir: &Path, durability: Durability) -> std::result::Result<Self, OpenError> {
        let root = data_dir.join("objects");
        let disk = Self(Arc::new(Inner {
            root: root.clone(),
            durability,
            syncs: Mutex::default(),
            slots: Arc::new(Semaphore::new(BACKGROUND_SYNCS)),
            buffers: Buffers::new(fetch::CHUNK_BYTES),
            pace: Pace::new(Handle::current().metrics().num_workers()),
        }));
        match spawn_blocking(move || prepare_root(&root)).await {
            Ok(result) => result.map(|()| disk),
            Err(error) => Err(OpenError(format!("the disk could not be looked at: {error}"))),
        }
    }

    fn path(&self, key: &ObjectKey) -> PathBuf {
        let blob = key.blob();
        let name = key.as_str().replace(&ObjectKey::prefix(blob), &format!("{blob}."));
        self.directory(blob).join(name)
    }

    /// Shared by the blobs of a moment. To make one for each of many small blobs would take longer than to write them;
    /// in one for very many, a blob's own files could not be found quickly.
    fn directory(&self, blob: BlobId) -> PathBuf {
        let mut moment = blob.to_string();
        moment.truncate(MOMENT_CHARACTERS);
        self.0.root.join("blobs").join(moment)
    }

    pub(super) async fn put(&self, key: &ObjectKey, mut intake: Intake) -> Result<u64> {
        let mut partial = Partial {
            path: self.path(key),
            file: None,
        };
        loop {
            let outcome;
            (partial, outcome) = self.put_some(partial, &mut intake).await?;
            if let Err(error) = outcome {
                // A failure leaves it to the cleaner.
                if let Err(error) = blocking(move || partial.remove()).await {
                    tracing::warn!(%error, "a file that was not written to its end stays until its blob is swept");
                }
                return Err(error);
            }
            intake.taken();
            if intake.is_complete() {
                break;
            }
        }
        if let Some(file) = partial.file.take()
            && self.0.durability == Durability::Full
        {
            self.sync_in_background(key, file);
        }
        Ok(intake.crc64())
    }

    /// Writes what comes next: on this thread as long as that is a copy into the page cache and no more. The file is made
    /// with its first bytes; a file system that waits for its journal then counts as slow, as when it waits for the disk.
    async fn put_some(&self, mut partial: Partial, intake: &mut Intake) -> Result<(Partial, Result<()>)> {
        let in_place = self.0.pace.is_quick();
        let frames = match batch(intake, if in_place { IN_PLACE_BYTES } else { WRITE_BATCH_BYTES }).await {
            Ok(frames) => frames,
            Err(error) => return Ok((partial, Err(error))),
        };
        if in_place && let Some(_turn) = self.0.pace.turn() {
            let kind = if partial.file.is_some() {
                Writing::More
            } else {
                Writing::NewFile
            };
            let outcome = self.0.pace.watch(kind, || partial.append(&frames));
            return Ok((partial, outcome.map_err(put_failed)));
        }
        let append = move || {
            let outcome = partial.append(&frames);
            (partial, outcome.map_err(put_failed))
        };
        spawn_blocking(append).await.map_err(task_failed)
    }

    pub(super) async fn make_durable(&self, blob: BlobId, blocks: &[(ObjectKey, u64)]) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let is_there = |(key, size_bytes): &(ObjectKey, u64)| page_cache::len(&self.path(key)) == Some(*size_bytes);
        if blocks.len() > FEW_BLOCKS || !blocks.iter().all(is_there) {
            let (disk, expected) = (self.clone(), blocks.to_vec());
            blocking(move || Ok(disk.check_sizes(&expected))).await??;
        }
        if self.0.durability == Durability::Process {
            return Ok(());
        }
        // The names are there already, so directories and files can be synced side by side.
        let disk = self.clone();
        let keys: Vec<_> = blocks.iter().map(|(key, _)| key.clone()).collect();
        let files = stream::iter(keys)
            .map(move |key| disk.clone().sync_block(key))
            .buffer_unordered(LIST_SYNCS);
        let (directory, parent) = (self.directory(blob), self.0.root.join("blobs"));
        tokio::try_join!(
            files.try_collect::<()>(),
            blocking(move || sync_directory(&directory)),
            blocking(move || sync_directory(&parent)),
        )?;
        Ok(())
    }

    /// In one go for all blocks: a look at a file is much cheaper than a trip to a blocking thread.
    fn check_sizes(&self, blocks: &[(ObjectKey, u64)]) -> Result<()> {
        for (key, size_bytes) in blocks {
            match fs::metadata(self.path(key)) {
                Ok(metadata) if metadata.len() == *size_bytes => {}
                Ok(_) => return Err(damage("short", key)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(damage("missing", key)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits for the sync that the put began; syncs now what is not known, say from before a restart.
    async fn sync_block(self, key: ObjectKey) -> Result<()> {
        let sync = self.syncs().remove(&key).unwrap_or_default();
        let path = self.path(&key);
        let result = sync
            .get_or_try_init(|| blocking(move || sync_file(&File::open(&path)?, &path)))
            .await;
        match result {
            Ok(()) => Ok(()),
            Err(Error::NotFound(_)) => Err(damage("missing", &key)),
            Err(error) => Err(error),
        }
    }

    fn sync_in_background(&self, key: &ObjectKey, file: File) {
        let Ok(slot) = self.0.slots.clone().try_acquire_owned() else {
            return;
        };
        let sync = Arc::new(OnceCell::new());
        {
            let mut syncs = self.syncs();
            if syncs.len() >= REMEMBERED_SYNCS {
                syncs.retain(|_, sync| !sync.initialized());
            }
            syncs.insert(key.clone(), sync.clone());
        }
        let path = self.path(key);
        tokio::spawn(async move {
            // An error is not lost: it has removed the file, which the list will miss.
            let _ = sync.get_or_try_init(|| blocking(move || sync_file(&file, &path))).await;
            drop(slot);
        });
    }

    fn syncs(&self) -> MutexGuard<'_, HashMap<ObjectKey, Arc<OnceCell<()>>>> {
        self.0.syncs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn fetch(&self, key: &ObjectKey, range: Range<u64>) -> BoxStream<'static, Result<Bytes>> {
        fetch::chunks(self.path(key), range, self.0.buffers.clone())
    }

    pub(super) async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.syncs().remove(key);
        let path = self.path(key);
        blocking(move || fs::remove_file(path).or_else(unless_missing)).await
    }

    pub(super) async fn list(&self, blob: BlobId) -> Result<Vec<Listed>> {
        let (disk, directory) = (self.clone(), self.directory(blob));
        blocking(move || disk.list_directory(&directory, |key| key.blob() == blob)).await
    }

    pub(super) fn list_all(&self) -> BoxStream<'static, Result<Listed>> {
        let (disk, blobs) = (self.clone(), self.0.root.join("blobs"));
        stream::once(blocking(move || {
            let directories = entries(&blobs)?.map(|entry| {
                let entry = entry?;
                Ok(entry.file_type()?.is_dir().then(|| entry.path()))
            });
            directories.filter_map(io::Result::transpose).collect()
        }))
        .map_ok(|directories: Vec<PathBuf>| stream::iter(directories).map(Ok))
        .try_flatten()
        .and_then(move |directory| {
            let disk = disk.clone();
            blocking(move || disk.list_directory(&directory, |_| true))
        })
        .map_ok(|objects| stream::iter(objects).map(Ok))
        .try_flatten()
        .boxed()
    }

    /// Leaves out what is not ours or not wanted.
    fn list_directory(&self, directory: &Path, is_wanted: impl Fn(&ObjectKey) -> bool) -> io::Result<Vec<Listed>> {
        let mut objects = Vec::new();
        for entry in entries(directory)? {
            let entry = entry?;
            if let Some(key) = key_of(&entry).filter(|key| is_wanted(key) && self.path(key) == entry.path()) {
                objects.extend(listed(key, &entry)?);
            }
        }
        Ok(objects)
    }

    pub(super) async fn remove_prefix(&self, blob: BlobId) -> Result<()> {
        let directory = self.directory(blob);
        blocking(move || match fs::remove_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            result => result.or_else(unless_missing),
        })
        .await
    }

    pub(super) async fn read_marker(&self) -> Result<Option<String>> {
        let path = self.0.root.join(MARKER);
        blocking(move || {
            let file = match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                result => result?,
            };
            let mut marker = String::new();
            file.take(MARKER_MAX_BYTES).read_to_string(&mut marker)?;
            Ok(Some(marker))
        })
        .await
    }

    pub(super) async fn write_marker(&self, marker: &str) -> Result<()> {
        let (root, marker) = (self.0.root.clone(), marker.to_owned());
        blocking(move || {
            let temporary = root.join(format!("{MARKER}.new"));
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(marker.as_bytes())?;
            file.sync_all()?;
            fs::rename(temporary, root.join(MARKER))?;
            sync_directory(&root)
        })
        .await
    }

    pub(super) async fn check(&self) -> Result<()> {
        let root = self.0.root.clone();
        let probing = blocking(move || probe(&root).and_then(|file| check_room(&file)));
        probing.await.map_err(|error| match error {
            Error::NotFound(_) => Error::Busy("the directory of the store is gone: is its disk mounted?".into()),
            error => error,
        })
    }
}

/// Makes the root and `blobs/`, and refuses what another user of the machine could have put there or could change.
fn prepare_root(root: &Path) -> std::result::Result<(), OpenError> {
    let shown = root.display();
    let blobs = root.join("blobs");
    for directory in [root, &blobs] {
        let shown = directory.display();
        // Not following a link: a dangling one must not lead us to make a directory elsewhere.
        if fs::symlink_metadata(directory).is_err() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(|error| {
                    OpenError(format!(
                        "can't make the directory {shown} ({error}): let the server's user write there"
                    ))
                })?;
        }
        let metadata = fs::symlink_metadata(directory)
            .map_err(|error| OpenError(format!("can't look at the directory {shown}: {error}")))?;
        if metadata.is_symlink() {
            return Err(OpenError(format!(
                "{shown} is a symbolic link, which could lead anywhere: choose the data directory where the bytes are"
            )));
        }
        if !metadata.is_dir() {
            return Err(OpenError(format!("{shown} is not a directory: move it away")));
        }
        if metadata.mode() & 0o002 != 0 {
            return Err(OpenError(format!(
                "every user may write to {shown}: run `chmod o-w {shown}`"
            )));
        }
    }
    // So that a power cut can't take the new directories away again.
    let parents = [Some(root), root.parent()];
    parents
        .into_iter()
        .flatten()
        .try_for_each(sync_directory)
        .and_then(|()| probe(root).map(drop))
        .map_err(|error| {
            OpenError(format!(
                "can't write to {shown} ({error}): let the server's user write there"
            ))
        })
}

/// Makes and removes an empty file, which a full disk still allows.
fn probe(root: &Path) -> io::Result<File> {
    let path = root.join(format!("probe-{}", Uuid::now_v7()));
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    fs::remove_file(path)?;
    Ok(file)
}

/// A file that is being written. It is removed again unless its `file` is taken out.
struct Partial {
    path: PathBuf,
    /// There as soon as the file is.
    file: Option<File>,
}

impl Partial {
    fn append(&mut self, frames: &[Bytes]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(create(&self.path)?),
        };
        check_room(file)?;
        write_all_vectored(file, frames)
    }

    fn remove(mut self) -> io::Result<()> {
        match self.file.take() {
            Some(_) => fs::remove_file(&self.path),
            None => Ok(()),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let Some(file) = self.file.take() else {
            return;
        };
        let path = std::mem::take(&mut self.path);
        let remove = move || {
            drop(file);
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "an unfinished file stays until the cleaner finds it");
            }
        };
        // Removing many megabytes takes a while and the future was most likely dropped on an async thread.
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

/// Frames of so many bytes together, or a little more; fewer only at the end of the body.
async fn batch(intake: &mut Intake, wanted: usize) -> Result<Vec<Bytes>> {
    let mut frames = Vec::new();
    let mut bytes = 0;
    while bytes < wanted && frames.len() < WRITE_BATCH_FRAMES {
        let Some(frame) = intake.next().await? else {
            break;
        };
        bytes += frame.len();
        frames.push(frame);
        if intake.is_complete() {
            break;
        }
    }
    Ok(frames)
}

/// Opens a file that must not be there yet, and makes its directory with the first one.
fn create(path: &Path) -> io::Result<File> {
    let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    for _ in 1..CREATE_TRIES {
        match (open(), path.parent()) {
            (Err(error), Some(directory)) if error.kind() == io::ErrorKind::NotFound => {
                match DirBuilder::new().mode(0o700).create(directory) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                    _ => {}
                }
            }
            (result, _) => return result,
        }
    }
    open()
}

fn check_room(file: &File) -> io::Result<()> {
    let disk = rustix::fs::fstatvfs(file)?;
    if disk.f_bavail.saturating_mul(disk.f_frsize) < RESERVED_BYTES {
        Err(io::ErrorKind::StorageFull.into())
    } else {
        Ok(())
    }
}

fn write_all_vectored(file: &mut File, frames: &[Bytes]) -> io::Result<()> {
    let mut slices: Vec<_> = frames.iter().map(|frame| IoSlice::new(frame)).collect();
    let mut slices = slices.as_mut_slice();
    while !slices.is_empty() {
        match file.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A failed sync is final: the kernel may have dropped the bytes and would call the next sync a success.
/// So the file goes, and whoever asks for it is told that it is missing.
fn sync_file(file: &File, path: &Path) -> io::Result<()> {
    file.sync_data().inspect_err(|error| {
        tracing::error!(path = %path.display(), %error, "the disk did not take a file; it is removed");
        if let Err(error) = fs::remove_file(path) {
            tracing::error!(path = %path.display(), %error, "nor could it be removed");
        }
    })
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// What is in a directory; nothing if there is no directory.
fn entries(directory: &Path) -> io::Result<impl Iterator<Item = io::Result<DirEntry>>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
    .map(|entries| entries.into_iter().flatten())
}

fn key_of(entry: &DirEntry) -> Option<ObjectKey> {
    let name = entry.file_name().into_string().ok()?;
    ObjectKey::parse(&format!("blobs/{}", name.replacen('.', "/", 1)))
}

/// `None` for what is not a file, and for what was deleted meanwhile.
fn listed(key: ObjectKey, entry: &DirEntry) -> io::Result<Option<Listed>> {
    let metadata = match entry.metadata() {
        Ok(metadata) if metadata.is_file() => metadata,
        Ok(_) => return Ok(None),
        Err(error) => return unless_missing(error).map(|()| None),
    };
    let age = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    let modified_ms = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
    Ok(Some(Listed {
        key,
        size_bytes: metadata.len(),
        modified_ms,
    }))
}

fn unless_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound {
        Ok(())
    } else {
        Err(error)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T> {
    Ok(spawn_blocking(work).await.map_err(task_failed)??)
}

fn put_failed(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::Internal("the directory of the store is gone: is its disk mounted?".into()),
        _ => error.into(),
    }
}

pub(super) fn task_failed(error: tokio::task::JoinError) -> Error {
    Error::Internal(format!("a background task of the store failed: {error}"))
}
