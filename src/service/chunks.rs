//! What must be known of a file's chunks so that they can lie in a zip as they are: sums of the whole and of its parts.
//!
//! `service/files.rs` lets the bytes of each chunk run past [`Summing`] on their way to the store, and asks
//! [`deflate_member`] in the end where the deflate stream of a gzipped file is. Never unpacks anything.
//! Source of gzip: RFC 1952.

use crc_fast::{CrcAlgorithm, Digest, checksum, checksum_combine};

use crate::db::{ChunkSums, FileChunk};
use crate::model::Block;

/// CRC-32 and size of what was packed, at the end of gzip.
const TRAILER_BYTES: usize = 8;
/// A gzip header longer than this counts as none. Node's has 10 bytes.
const MAX_HEADER_BYTES: usize = 4096;

/// Bytes on their way past.
#[derive(Debug)]
pub struct Summing {
    /// The beginning, until the gzip header is complete; `None` when no header is expected any more.
    head: Option<Vec<u8>>,
    header_bytes: Option<u64>,
    crc32: Digest,
    core: Digest,
    tail: Vec<u8>,
}

impl Summing {
    /// `gzip_begins`: the bytes are the beginning of a gzip stream.
    pub fn new(gzip_begins: bool) -> Self {
        Self {
            head: gzip_begins.then(Vec::new),
            header_bytes: None,
            crc32: Digest::new(CrcAlgorithm::Crc32IsoHdlc),
            core: Digest::new(CrcAlgorithm::Crc64Nvme),
            tail: Vec::new(),
        }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.crc32.update(bytes);
        let Some(head) = &mut self.head else {
            return self.hold_back(bytes);
        };
        head.extend_from_slice(bytes);
        match header_length(head) {
            Header::Incomplete if head.len() < MAX_HEADER_BYTES => {}
            Header::Complete(length) if length <= MAX_HEADER_BYTES => {
                self.header_bytes = Some(length as u64);
                let content = head.split_off(length);
                self.head = None;
                self.hold_back(&content);
            }
            Header::Complete(_) | Header::Incomplete | Header::None => {
                let content = self.head.take().unwrap_or_default();
                self.hold_back(&content);
            }
        }
    }

    /// All but the last bytes go into the sum of the core.
    fn hold_back(&mut self, bytes: &[u8]) {
        if bytes.len() >= TRAILER_BYTES {
            let (before, last) = bytes.split_at(bytes.len() - TRAILER_BYTES);
            self.core.update(&self.tail);
            self.core.update(before);
            self.tail.clear();
            self.tail.extend_from_slice(last);
        } else {
            self.tail.extend_from_slice(bytes);
            let core: Vec<u8> = self
                .tail
                .drain(..self.tail.len().saturating_sub(TRAILER_BYTES))
                .collect();
            self.core.update(&core);
        }
    }

    pub fn finish(mut self) -> ChunkSums {
        if let Some(head) = self.head.take() {
            self.hold_back(&head);
        }
        ChunkSums {
            // The algorithm has 32 bits.
            crc32: self.crc32.finalize() as u32,
            core_crc64: self.core.finalize(),
            tail: self.tail,
            header_bytes: self.header_bytes,
        }
    }
}

enum Header {
    Incomplete,
    Complete(usize),
    /// These bytes begin no gzip stream.
    None,
}

fn header_length(bytes: &[u8]) -> Header {
    const FIXED: usize = 10;
    const CRC: u8 = 1 << 1;
    const EXTRA: u8 = 1 << 2;
    const TEXTS: [u8; 2] = [1 << 3, 1 << 4];
    const RESERVED: u8 = 0b1110_0000;
    if !bytes.iter().zip([0x1f, 0x8b, 8]).all(|(byte, magic)| *byte == magic) {
        return Header::None;
    }
    let Some(&flags) = bytes.get(3) else {
        return Header::Incomplete;
    };
    if flags & RESERVED != 0 {
        return Header::None;
    }
    let mut length = FIXED;
    if flags & EXTRA != 0 {
        let Some(size) = bytes.get(length..length + 2) else {
            return Header::Incomplete;
        };
        length += 2 + usize::from(u16::from_le_bytes([size[0], size[1]]));
    }
    for text in TEXTS {
        if flags & text != 0 {
            let rest = bytes.get(length..).unwrap_or_default();
            let Some(end) = rest.iter().position(|byte| *byte == 0) else {
                return Header::Incomplete;
            };
            length += end + 1;
        }
    }
    if flags & CRC != 0 {
        length += 2;
    }
    if bytes.len() < length {
        Header::Incomplete
    } else {
        Header::Complete(length)
    }
}

/// The CRC-32 of a file from those of its chunks.
pub fn whole_crc32(chunks: &[FileChunk]) -> u32 {
    chunks.iter().fold(0, |crc32, chunk| {
        // The algorithm has 32 bits.
        checksum_combine(
            CrcAlgorithm::Crc32IsoHdlc,
            crc32.into(),
            chunk.sums.crc32.into(),
            chunk.block.size_bytes,
        ) as u32
    })
}

/// What the end of a gzip stream says of the length of what was packed, modulo 2^32.
pub fn packed_length(tail: &[u8]) -> Option<u64> {
    let size = tail.get(TRAILER_BYTES - 4..TRAILER_BYTES)?;
    Some(u32::from_le_bytes(size.try_into().ok()?).into())
}

/// A gzipped file's deflate stream.
#[derive(Debug, PartialEq, Eq)]
pub struct DeflateMember {
    /// Of what was packed, as the trailer says.
    pub crc32: u32,
    pub blocks: Vec<Block>,
}

/// Where the deflate stream of a gzipped file of `length_bytes` lies in its chunks: without the header, of
/// `header_bytes`, and without the trailer. `None` if they are no gzip stream of so many bytes, as far as its ends tell.
pub fn deflate_member(chunks: &[FileChunk], header_bytes: u64, length_bytes: u64) -> Option<DeflateMember> {
    // What may be the trailer begins in the chunk before the last if that one is shorter.
    let mut last = Vec::new();
    for chunk in chunks.iter().rev().take(TRAILER_BYTES) {
        last.splice(0..0, chunk.sums.tail.iter().copied());
    }
    let trailer = last.last_chunk::<TRAILER_BYTES>()?;
    let [a, b, c, d, size @ ..] = *trailer;
    if u64::from(u32::from_le_bytes(size)) != length_bytes & u64::from(u32::MAX) {
        return None;
    }
    let mut blocks = Vec::with_capacity(chunks.len());
    let mut behind = TRAILER_BYTES as u64;
    for (at, chunk) in chunks.iter().enumerate().rev() {
        let before = if at == 0 { header_bytes } else { 0 };
        let content = chunk.block.size_bytes.checked_sub(before)?;
        let trimmed = behind.min(content);
        behind -= trimmed;
        if trimmed == content {
            continue;
        }
        let kept = (chunk.sums.tail.len() as u64).checked_sub(trimmed)?;
        let tail = chunk.sums.tail.get(..usize::try_from(kept).ok()?)?;
        blocks.push(Block {
            object_key: chunk.block.object_key.clone(),
            object_offset: chunk.block.object_offset + before,
            size_bytes: content - trimmed,
            crc64: checksum_combine(
                CrcAlgorithm::Crc64Nvme,
                chunk.sums.core_crc64,
                checksum(CrcAlgorithm::Crc64Nvme, tail),
                kept,
            ),
        });
    }
    blocks.reverse();
    (behind == 0 && !blocks.is_empty()).then_some(DeflateMember {
        crc32: u32::from_le_bytes([a, b, c, d]),
        blocks,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{BlobId, ObjectKey};

    /// As if these bytes had come in chunks of these sizes, the first frames of each being small.
    fn arrive(bytes: &[u8], sizes: &[usize], gzip: bool) -> (Vec<FileChunk>, Option<u64>) {
        let (mut chunks, mut header, mut at) = (Vec::new(), None, 0);
        let mut sizes = sizes.iter().copied().chain([bytes.len()]);
        while at < bytes.len() {
            let size = sizes.next().unwrap().clamp(1, bytes.len() - at);
            let chunk = &bytes[at..at + size];
            let mut summing = Summing::new(gzip && at == 0);
            chunk.chunks(3).for_each(|frame| summing.update(frame));
            let sums = summing.finish();
            header = header.or(sums.header_bytes);
            chunks.push(FileChunk {
                file_offset: at as u64,
                block: Block {
                    object_key: ObjectKey::fresh(BlobId::fresh()),
                    object_offset: 0,
                    size_bytes: size as u64,
                    crc64: checksum(CrcAlgorithm::Crc64Nvme, chunk),
                },
                sums,
            });
            at += size;
        }
        (chunks, header)
    }

    fn gzip(header: &[u8], deflate: &[u8], crc32: u32, length: u32) -> Vec<u8> {
        [header, deflate, &crc32.to_le_bytes(), &length.to_le_bytes()].concat()
    }

    const PLAIN: &[u8] = &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];

    proptest! {
        #[test]
        fn the_deflate_stream_is_found_however_it_was_cut(
            deflate in prop::collection::vec(any::<u8>(), 1..60),
            sizes in prop::collection::vec(1_usize..20, 0..9),
            length: u64,
        ) {
            // A header that is cut counts as none.
            let sizes: Vec<usize> = sizes.iter().enumerate().map(|(at, size)| if at == 0 { size + 10 } else { *size }).collect();
            let bytes = gzip(PLAIN, &deflate, 0xdead_beef, length as u32);
            let (chunks, header) = arrive(&bytes, &sizes, true);
            prop_assert_eq!(header, Some(10));
            let member = deflate_member(&chunks, 10, length).unwrap();
            prop_assert_eq!(member.crc32, 0xdead_beef);
            let mut found = Vec::new();
            for block in &member.blocks {
                let chunk = chunks.iter().find(|chunk| chunk.block.object_key == block.object_key).unwrap();
                let from = (chunk.file_offset + block.object_offset) as usize;
                let part = &bytes[from..from + block.size_bytes as usize];
                prop_assert_eq!(checksum(CrcAlgorithm::Crc64Nvme, part), block.crc64);
                found.extend_from_slice(part);
            }
            prop_assert_eq!(found, deflate);
            prop_assert_eq!(deflate_member(&chunks, 10, length ^ 1), None);
        }

        #[test]
        fn a_files_crc32_is_that_of_its_chunks_together(
            bytes in prop::collection::vec(any::<u8>(), 0..60),
            sizes in prop::collection::vec(1_usize..20, 0..9),
        ) {
            let (chunks, _) = arrive(&bytes, &sizes, false);
            prop_assert_eq!(whole_crc32(&chunks), checksum(CrcAlgorithm::Crc32IsoHdlc, &bytes) as u32);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..40), sizes in prop::collection::vec(1_usize..20, 0..9), length: u64) {
            let bytes = [&[0x1f, 0x8b, 8][..], &bytes].concat();
            let (chunks, header) = arrive(&bytes, &sizes, true);
            deflate_member(&chunks, header.unwrap_or(3), length);
        }
    }

    #[test]
    fn headers_with_all_their_options() {
        let mut header = vec![0x1f, 0x8b, 8, 0b0001_1110, 0, 0, 0, 0, 2, 3];
        header.extend_from_slice(&[3, 0, b'a', b'b', b'c']);
        header.extend_from_slice(b"name\0comment\0");
        header.extend_from_slice(&[1, 2]);
        let bytes = gzip(&header, b"deflated", 1, 5);
        let (chunks, found) = arrive(&bytes, &[], true);
        assert_eq!(found, Some(header.len() as u64));
        let member = deflate_member(&chunks, header.len() as u64, 5).unwrap();
        assert_eq!(member.blocks[0].size_bytes, 8);
    }

    #[test]
    fn what_is_no_gzip_is_no_member() {
        for bytes in [
            &b"plain text that says nothing"[..],
            &[0x1f, 0x8b, 8],
            &[0x1f, 0x8b, 8, 0xff, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(arrive(bytes, &[], true).1, None, "{bytes:?}");
        }
        // A name that never ends.
        let endless = [&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 3][..], &[b'a'; 2 * MAX_HEADER_BYTES]].concat();
        assert_eq!(arrive(&endless, &[], true).1, None);
        // Nothing between header and trailer.
        let (chunks, _) = arrive(&gzip(PLAIN, b"", 0, 0), &[], true);
        assert_eq!(deflate_member(&chunks, 10, 0), None);
        // A part of a trailer.
        let (chunks, _) = arrive(&[PLAIN, &[0; 5]].concat(), &[], true);
        assert_eq!(deflate_member(&chunks, 10, 0), None);
        assert_eq!(deflate_member(&[], 10, 0), None);
    }
}
