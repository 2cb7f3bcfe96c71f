//! Files as far as the kernel has them in memory: what can be had without waiting for a disk.
//!
//! `fetch.rs` and `disk.rs` ask here first, on async threads, and go to a blocking thread for the rest. Never waits: on
//! systems that can't promise that, nothing is ever in memory.

use std::fs::File;
use std::io;
use std::path::Path;

/// The file, if nothing of its path or of what is known about it has to be read from the disk.
#[cfg(target_os = "linux")]
pub(super) fn open(path: &Path) -> Option<File> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    // Kernels before 5.12 and some sandboxes refuse the call: any error leaves it to the one who may wait.
    let file = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::CACHED);
    file.ok().map(File::from)
}

/// The length of the file, under the same conditions.
pub(super) fn len(path: &Path) -> Option<u64> {
    let metadata = open(path)?.metadata().ok()?;
    metadata.is_file().then_some(metadata.len())
}

/// Reads like `FileExt::read_at`. [`io::ErrorKind::WouldBlock`] when the first of the bytes are not in memory.
#[cfg(target_os = "linux")]
pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    let buffers = &mut [io::IoSliceMut::new(buffer)];
    match preadv2(file, buffers, offset, ReadWriteFlags::NOWAIT) {
        // Not every file system can.
        Err(Errno::OPNOTSUPP) => Err(io::ErrorKind::WouldBlock.into()),
        result => Ok(result?),
    }
}

/// Has the kernel read these bytes of a file soon.
#[cfg(target_os = "linux")]
pub(super) fn will_need(file: &File, offset: u64, bytes: u64) {
    use rustix::fs::{Advice, fadvise};

    // Advice only: without it the file is read more slowly.
    let _ = fadvise(file, offset, std::num::NonZeroU64::new(bytes), Advice::WillNeed);
}

#[cfg(not(target_os = "linux"))]
pub(super) fn open(_path: &Path) -> Option<File> {
    None
}

#[cfg(not(target_os = "linux"))]
pub(super) fn read_at(_file: &File, _buffer: &mut [u8], _offset: u64) -> io::Result<usize> {
    Err(io::ErrorKind::WouldBlock.into())
}

#[cfg(not(target_os = "linux"))]
pub(super) fn will_need(_file: &File, _offset: u64, _bytes: u64) {}
