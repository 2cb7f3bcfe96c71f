//! Buffers to read into, used again and again.
//!
//! `fetch.rs` takes one for each large chunk; it comes back when the last reader of the chunk is done. A fresh one
//! costs a page fault for each 4 KiB, and its bytes are in no cache of the processor.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// How many are kept at rest; more are for the system again.
const KEPT: usize = 16;

/// A chunk is small below this part of a buffer. hyper queues no more of larger ones than would fill half a buffer.
const SMALL_PART: usize = 4;

#[derive(Clone, Debug)]
pub(super) struct Buffers {
    size_bytes: usize,
    resting: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Buffers {
    pub(super) fn new(size_bytes: usize) -> Self {
        Self {
            size_bytes,
            resting: Arc::default(),
        }
    }

    /// A buffer with room for `wanted` bytes, at most as many as one was made to have.
    pub(super) fn take(&self, wanted: usize) -> Buffer {
        let home = self.clone();
        // Many small chunks must not hold many large buffers.
        let bytes = if wanted >= self.size_bytes / SMALL_PART {
            let used = self.resting().pop();
            used.unwrap_or_else(|| vec![0; self.size_bytes])
        } else {
            vec![0; wanted]
        };
        Buffer {
            bytes,
            len: wanted,
            home,
        }
    }

    fn resting(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    home: Buffers,
}

impl Buffer {
    /// Where to read to. Whatever was read before may still be there.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }

    /// The first `len` bytes of the room, without a copy.
    pub(super) fn freeze(mut self, len: usize) -> Bytes {
        self.len = self.len.min(len);
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.len() == self.home.size_bytes {
            let mut resting = self.home.resting();
            if resting.len() < KEPT {
                resting.push(std::mem::take(&mut self.bytes));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_and_only_so_many_are_kept() {
        let buffers = Buffers::new(1000);
        let mut first = buffers.take(1000);
        first.room()[..5].copy_from_slice(b"first");
        let place = first.bytes.as_ptr();
        let chunk = first.freeze(5);
        assert_eq!(chunk, b"first"[..]);
        let part = chunk.slice(4..);
        drop(chunk);
        assert_ne!(buffers.take(1000).bytes.as_ptr(), place, "somebody still reads it");
        drop(part);
        let mut again = buffers.take(600);
        assert_eq!(again.bytes.as_ptr(), place);
        assert_eq!(again.room().len(), 600);
        drop(buffers.take(10));
        drop((0..2 * KEPT).map(|_| buffers.take(1000)).collect::<Vec<_>>());
        assert_eq!(buffers.resting().len(), KEPT);
    }
}
