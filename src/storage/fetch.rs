//! The bytes of a file on their way out.
//!
//! `disk.rs` begins one for each piece of a block that is read. What the page cache has is read in place, chunk by chunk
//! as it is sent; the rest is read on blocking threads. Never holds more than the chunk at hand.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::task::{JoinHandle, spawn_blocking};

use super::buffers::Buffers;
use super::disk::task_failed;
use super::page_cache;
use crate::error::Result;

/// Stays in a core's own cache on the way from the file through the checksum to the socket.
pub(super) const CHUNK_BYTES: usize = 256 * 1024;
/// What the kernel is asked for at once where it has to read from the disk.
const AHEAD_BYTES: u64 = 1024 * 1024;

/// The bytes `range` of a file, which is opened at once. They end early when the file does.
pub(super) fn chunks(path: PathBuf, range: Range<u64>, buffers: Buffers) -> BoxStream<'static, Result<Bytes>> {
    let first = match page_cache::open(&path) {
        Some(file) => Fetch::Here(Rest::of(file, range, buffers)),
        None => Fetch::Away(spawn_blocking(move || {
            Rest::of(File::open(path)?, range, buffers)?.wait()
        })),
    };
    stream::try_unfold(first, Fetch::next).boxed()
}

enum Fetch {
    Here(io::Result<Rest>),
    Away(JoinHandle<io::Result<(Bytes, Rest)>>),
}

impl Fetch {
    async fn next(self) -> Result<Option<(Bytes, Self)>> {
        let away = match self {
            Self::Here(rest) => {
                let mut rest = rest?;
                match rest.read(page_cache::read_at) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => spawn_blocking(move || rest.wait()),
                    chunk => return Ok(some(chunk?, rest)),
                }
            }
            Self::Away(away) => away,
        };
        let (chunk, rest) = away.await.map_err(task_failed)??;
        Ok(some(chunk, rest))
    }
}

/// An empty chunk is the end: of the range, or of a file that is shorter.
fn some(chunk: Bytes, rest: Rest) -> Option<(Bytes, Fetch)> {
    (!chunk.is_empty()).then_some((chunk, Fetch::Here(Ok(rest))))
}

/// What is still to be read of a range of a file.
struct Rest {
    file: File,
    range: Range<u64>,
    buffers: Buffers,
}

impl Rest {
    /// Nothing when the file is too short for the range.
    fn of(file: File, mut range: Range<u64>, buffers: Buffers) -> io::Result<Self> {
        if file.metadata()?.len() < range.end {
            range = 0..0;
        }
        Ok(Self { file, range, buffers })
    }

    /// Reads the next chunk from the disk, and has the ones behind it read meanwhile.
    fn wait(mut self) -> io::Result<(Bytes, Self)> {
        let left = self.range.end - self.range.start;
        page_cache::will_need(&self.file, self.range.start, left.min(AHEAD_BYTES));
        let chunk = self.read(File::read_at)?;
        Ok((chunk, self))
    }

    fn read(&mut self, read_at: impl Fn(&File, &mut [u8], u64) -> io::Result<usize>) -> io::Result<Bytes> {
        let left = usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX);
        let mut chunk = self.buffers.take(left.min(CHUNK_BYTES));
        let got = read_at(&self.file, chunk.room(), self.range.start)?;
        self.range.start += got as u64;
        Ok(chunk.freeze(got))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt;
    use rustix::fs::{Advice, fadvise};

    use super::*;

    async fn read(path: PathBuf, range: Range<u64>) -> Result<Vec<u8>> {
        let chunks: Vec<_> = chunks(path, range, Buffers::new(CHUNK_BYTES)).try_collect().await?;
        assert!(chunks.iter().all(|chunk| (1..=CHUNK_BYTES).contains(&chunk.len())));
        Ok(chunks.concat())
    }

    #[tokio::test]
    async fn a_range_is_read_whether_it_is_in_memory_or_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let content: Vec<u8> = (0..3_000_017_u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        for range in [0..content.len(), 5..6, 1_000_000..2_500_000] {
            let asked = range.start as u64..range.end as u64;
            fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            assert!(read(path.clone(), asked.clone()).await.unwrap() == content[range.clone()]);
            assert!(read(path.clone(), asked).await.unwrap() == content[range]);
        }
        assert_eq!(read(path.clone(), 5..content.len() as u64 + 1).await.unwrap(), b"");
        assert!(read(directory.path().join("missing"), 0..1).await.is_err());
        // Cut while it is read.
        let mut chunks = chunks(path.clone(), 0..content.len() as u64, Buffers::new(CHUNK_BYTES));
        assert_eq!(chunks.next().await.unwrap().unwrap().len(), CHUNK_BYTES);
        File::options().write(true).open(&path).unwrap().set_len(10).unwrap();
        assert!(chunks.next().await.is_none());
    }
}
