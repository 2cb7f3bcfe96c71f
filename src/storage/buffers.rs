//! Buffers to read into, used again and again.
//!
//! `disk.rs` takes one for each large chunk; it comes back when the last reader of the chunk is done. A fresh megabyte
//! costs a page fault for each 4 KiB, which is a third of what a download takes of the processor.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// How many are kept at rest; more are for the system again. Eight downloads have two each.
const KEPT: usize = 16;

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

    /// An empty buffer with room for `wanted` bytes.
    pub(super) fn take(&self, wanted: usize) -> Buffer {
        let home = self.clone();
        // A small chunk must not hold a large buffer.
        let bytes = if wanted > self.size_bytes / 2 {
            let used = self.resting().pop();
            used.unwrap_or_else(|| Vec::with_capacity(self.size_bytes))
        } else {
            Vec::with_capacity(wanted)
        };
        Buffer { bytes, home }
    }

    fn resting(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Buffer {
    pub(super) bytes: Vec<u8>,
    home: Buffers,
}

impl Buffer {
    /// What was read, without a copy.
    pub(super) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.capacity() == self.home.size_bytes {
            let mut bytes = std::mem::take(&mut self.bytes);
            bytes.clear();
            let mut resting = self.home.resting();
            if resting.len() < KEPT {
                resting.push(bytes);
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
        first.bytes.extend_from_slice(b"what the first reader saw");
        let place = first.bytes.as_ptr();
        let chunk = first.freeze();
        let part = chunk.slice(5..);
        drop(chunk);
        assert_ne!(buffers.take(1000).bytes.as_ptr(), place, "somebody still reads it");
        drop(part);
        let again = buffers.take(600);
        assert_eq!(again.bytes.as_ptr(), place);
        assert!(again.bytes.is_empty());
        drop(buffers.take(10));
        drop((0..2 * KEPT).map(|_| buffers.take(1000)).collect::<Vec<_>>());
        assert_eq!(buffers.resting().len(), KEPT);
    }
}
