//! The headers of a zip file whose members lie elsewhere, as they are: stored, or deflated by somebody else.
//!
//! `service/files.rs` calls it. Knows only sizes and sums, never sees a member's bytes. The same members in the same
//! order give the same bytes. Source: PKWARE's APPNOTE 6.3.10, sections 4.3 to 4.5.

use std::ops::Range;

/// How a member's bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Stored,
    Deflate,
}

/// What is said of a member before and behind its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// `/` between its parts; shorter than 64 KiB.
    pub name: &'a str,
    pub method: Method,
    /// Of the unpacked bytes.
    pub crc32: u32,
    pub packed_bytes: u64,
    pub unpacked_bytes: u64,
}

/// The headers so far.
#[derive(Debug, Default)]
pub struct Headers {
    /// The local headers, one behind the other.
    local: Vec<u8>,
    directory: Vec<u8>,
    members: u64,
    /// Where the next local header is in the zip.
    at: u64,
}

/// A value that does not fit stands elsewhere, and this in its place.
const MAX16: u64 = 0xffff;
const MAX32: u64 = 0xffff_ffff;
/// Deflate and directories, or sizes of 64 bits.
const NEEDS_2_0: u16 = 20;
const NEEDS_4_5: u16 = 45;
/// Made on Unix, so that the upper half of the attributes is a mode.
const MADE_BY: u16 = 3 << 8 | NEEDS_4_5;
const REGULAR_FILE_0644: u32 = 0o100_644 << 16;
const UTF8_NAME: u16 = 1 << 11;
/// 1980-01-01 00:00, the first time there is: nothing of when it was made is left.
const TIME: u16 = 0;
const DATE: u16 = 1 << 5 | 1;
const ZIP64_EXTRA: u16 = 1;

/// Numbers of a header, in its order.
struct Record<'a>(&'a mut Vec<u8>);

impl Record<'_> {
    fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// The value, or the sign that it is too large to stand here.
    fn u16_or_max(&mut self, value: u64) -> &mut Self {
        self.u16(u16::try_from(value).unwrap_or(u16::MAX))
    }

    fn u32_or_max(&mut self, value: u64) -> &mut Self {
        self.u32(u32::try_from(value).unwrap_or(u32::MAX))
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

impl Headers {
    /// What [`Self::add`] and [`Self::finish`] write for a member at most, besides its name twice.
    pub const MEMBER_BYTES: u64 = 30 + 20 + 46 + 28;

    /// Adds a member. Returns where its local header is in what [`Self::finish`] gives; its bytes follow it in the zip.
    pub fn add(&mut self, member: &Member<'_>) -> Range<usize> {
        let sizes = [member.unpacked_bytes, member.packed_bytes];
        // Both sizes or none: a local header allows nothing else.
        let large = sizes.iter().any(|size| *size >= MAX32);
        let offset = (self.at >= MAX32).then_some(self.at);
        let from = self.local.len();
        Record(&mut self.local)
            .u32(0x0403_4b50)
            .u16(if large { NEEDS_4_5 } else { NEEDS_2_0 })
            .what(member, large)
            .u16(if large { 20 } else { 0 })
            .bytes(member.name.as_bytes());
        if large {
            Record(&mut self.local)
                .u16(ZIP64_EXTRA)
                .u16(16)
                .u64(sizes[0])
                .u64(sizes[1]);
        }
        let extra: Vec<u64> = sizes.into_iter().filter(|_| large).chain(offset).collect();
        Record(&mut self.directory)
            .u32(0x0201_4b50)
            .u16(MADE_BY)
            .u16(if extra.is_empty() { NEEDS_2_0 } else { NEEDS_4_5 })
            .what(member, large)
            .u16(if extra.is_empty() {
                0
            } else {
                4 + 8 * extra.len() as u16
            })
            // No comment, on the first disk, and nothing said of text.
            .u16(0)
            .u16(0)
            .u16(0)
            .u32(REGULAR_FILE_0644)
            .u32_or_max(self.at)
            .bytes(member.name.as_bytes());
        if !extra.is_empty() {
            Record(&mut self.directory).u16(ZIP64_EXTRA).u16(8 * extra.len() as u16);
            for value in extra {
                Record(&mut self.directory).u64(value);
            }
        }
        self.members += 1;
        let header = from..self.local.len();
        self.at = self
            .at
            .saturating_add(header.len() as u64)
            .saturating_add(member.packed_bytes);
        header
    }

    /// The bytes of a local header that was added.
    pub fn local(&self, header: Range<usize>) -> &[u8] {
        &self.local[header]
    }

    /// Where the next member's header, or else the directory, is in the zip.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The local headers, and the directory with all that comes after it.
    pub fn finish(mut self) -> (Vec<u8>, Vec<u8>) {
        let (size, at, members) = (self.directory.len() as u64, self.at, self.members);
        let mut end = Record(&mut self.directory);
        if size >= MAX32 || at >= MAX32 || members >= MAX16 {
            end.u32(0x0606_4b50)
                .u64(44)
                .u16(MADE_BY)
                .u16(NEEDS_4_5)
                // On the first disk, which has all of it.
                .u32(0)
                .u32(0)
                .u64(members)
                .u64(members)
                .u64(size)
                .u64(at)
                .u32(0x0706_4b50)
                .u32(0)
                .u64(at.saturating_add(size))
                .u32(1);
        }
        end.u32(0x0605_4b50)
            .u16(0)
            .u16(0)
            .u16_or_max(members)
            .u16_or_max(members)
            .u32_or_max(size)
            .u32_or_max(at)
            .u16(0);
        (self.local, self.directory)
    }
}

impl Record<'_> {
    /// What both headers say of a member in the same words, up to the length of its name.
    fn what(&mut self, member: &Member<'_>, large: bool) -> &mut Self {
        let size = |bytes| if large { MAX32 } else { bytes };
        self.u16(UTF8_NAME)
            .u16(match member.method {
                Method::Stored => 0,
                Method::Deflate => 8,
            })
            .u16(TIME)
            .u16(DATE)
            .u32(member.crc32)
            .u32_or_max(size(member.packed_bytes))
            .u32_or_max(size(member.unpacked_bytes))
            .u16_or_max(member.name.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(name: &str, size: u64) -> Member<'_> {
        Member {
            name,
            method: Method::Stored,
            crc32: 0x1234_5678,
            packed_bytes: size,
            unpacked_bytes: size,
        }
    }

    fn u16_at(bytes: &[u8], at: usize) -> u64 {
        u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()).into()
    }

    fn u32_at(bytes: &[u8], at: usize) -> u64 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()).into()
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// What a reader makes of a directory: name, packed and unpacked size, and where the local header is.
    fn read(directory: &[u8], mut members: u64) -> Vec<(String, u64, u64, u64)> {
        let (mut at, mut found) = (0, Vec::new());
        while members > 0 {
            assert_eq!(u32_at(directory, at), 0x0201_4b50);
            let (name, extra) = (u16_at(directory, at + 28) as usize, u16_at(directory, at + 30) as usize);
            let mut large = at + 46 + name;
            let end = large + extra;
            if extra > 0 {
                assert_eq!(u16_at(directory, large), 1);
                assert_eq!(u16_at(directory, large + 2) as usize, extra - 4);
                assert_eq!(u16_at(directory, at + 6), 45);
                large += 4;
            }
            let mut full = |short: u64| {
                if short < MAX32 {
                    return short;
                }
                large += 8;
                u64_at(directory, large - 8)
            };
            let unpacked = full(u32_at(directory, at + 24));
            let packed = full(u32_at(directory, at + 20));
            let offset = full(u32_at(directory, at + 42));
            assert_eq!(large, end, "no more and no less in the extra field");
            let name = String::from_utf8(directory[at + 46..at + 46 + name].to_vec()).unwrap();
            found.push((name, packed, unpacked, offset));
            at = end;
            members -= 1;
        }
        found
    }

    #[test]
    fn a_small_zip_is_an_old_one() {
        let mut headers = Headers::default();
        assert_eq!(headers.add(&stored("a", 5)), 0..31);
        let deflated = Member {
            name: "dir/ü",
            method: Method::Deflate,
            crc32: 1,
            packed_bytes: 7,
            unpacked_bytes: 700,
        };
        assert_eq!(headers.add(&deflated), 31..67);
        assert_eq!(headers.position(), 31 + 5 + 36 + 7);
        let (local, directory) = headers.finish();
        assert_eq!(
            (u16_at(&local, 4), u16_at(&local, 6), u16_at(&local, 8)),
            (20, 0x800, 0)
        );
        assert_eq!(
            (u32_at(&local, 14), u32_at(&local, 18), u32_at(&local, 22)),
            (0x1234_5678, 5, 5)
        );
        assert_eq!(
            (u16_at(&local, 31 + 8), u32_at(&local, 31 + 18), u32_at(&local, 31 + 22)),
            (8, 7, 700)
        );
        assert_eq!(
            read(&directory, 2),
            [("a".to_owned(), 5, 5, 0), ("dir/ü".to_owned(), 7, 700, 36)]
        );
        let end = directory.len() - 22;
        assert_eq!(end, 47 + 52);
        assert_eq!(
            (u16_at(&directory, end + 10), u32_at(&directory, end + 12)),
            (2, end as u64)
        );
        assert_eq!(u32_at(&directory, end + 16), 79);
    }

    #[test]
    fn nothing_at_all_is_a_zip_too() {
        let (local, directory) = Headers::default().finish();
        assert!(local.is_empty());
        assert_eq!(directory.len(), 22);
        assert!(directory[4..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_does_not_fit_in_32_bits_has_64() {
        let mut headers = Headers::default();
        let below = MAX32 - 1;
        assert_eq!(headers.add(&stored("fits", below)).len(), 30 + 4);
        // The first that begins behind 4 GiB, though small itself.
        headers.add(&stored("far", 3));
        assert_eq!(headers.add(&stored("large", MAX32)).len(), 30 + 5 + 20);
        // One size alone takes both along.
        let packed = Member {
            method: Method::Deflate,
            packed_bytes: 9,
            ..stored("packed", 1 << 40)
        };
        let header = headers.add(&packed);
        let far = below + 34;
        let large = far + 33 + 3;
        let last = large + 55 + MAX32;
        let at = last + header.len() as u64 + 9;
        assert_eq!(headers.position(), at);
        let (local, directory) = headers.finish();
        let local = &local[header];
        assert_eq!((u32_at(local, 18), u32_at(local, 22)), (MAX32, MAX32));
        assert_eq!((u16_at(local, 36), u16_at(local, 38)), (1, 16));
        assert_eq!((u64_at(local, 40), u64_at(local, 48)), (1 << 40, 9));
        let name = str::to_owned;
        assert_eq!(
            read(&directory, 4),
            [
                (name("fits"), below, below, 0),
                (name("far"), 3, 3, far),
                (name("large"), MAX32, MAX32, large),
                (name("packed"), 9, 1 << 40, last),
            ]
        );
        let end = directory.len() - 22;
        let (locator, record) = (end - 20, end - 76);
        assert_eq!(u32_at(&directory, end + 16), MAX32);
        assert_eq!(u32_at(&directory, locator), 0x0706_4b50);
        assert_eq!(u64_at(&directory, locator + 8), at + record as u64);
        assert_eq!(u32_at(&directory, record), 0x0606_4b50);
        assert_eq!(u64_at(&directory, record + 4), 76 - 20 - 12);
        assert_eq!(
            (u64_at(&directory, record + 32), u64_at(&directory, record + 40)),
            (4, record as u64)
        );
        assert_eq!(u64_at(&directory, record + 48), at);
    }

    #[test]
    fn more_members_than_16_bits_can_count() {
        for (members, large) in [(65_534_u64, false), (65_535, true), (70_000, true)] {
            let mut headers = Headers::default();
            for i in 0..members {
                headers.add(&stored(&i.to_string(), 0));
            }
            let (_, directory) = headers.finish();
            let end = directory.len() - 22;
            assert_eq!(u16_at(&directory, end + 10), members.min(MAX16));
            let found = read(&directory, members);
            assert_eq!(found.last().unwrap().0, (members - 1).to_string());
            let has_record = u32_at(&directory, end - 20) == 0x0706_4b50;
            assert_eq!(has_record, large, "{members}");
            if large {
                assert_eq!(u64_at(&directory, end - 76 + 32), members);
            }
        }
    }

    #[test]
    fn a_member_takes_no_more_than_is_said() {
        let mut headers = Headers::default();
        headers.add(&stored("x", u64::MAX / 4));
        headers.add(&stored("name", u64::MAX / 4));
        let (local, directory) = headers.finish();
        let all = (local.len() + directory.len()) as u64;
        assert!(all <= 2 * Headers::MEMBER_BYTES + 2 * 5 + 98, "{all}");
    }
}
