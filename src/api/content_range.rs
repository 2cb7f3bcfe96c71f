//! `Content-Range` of a request: which part of something its body is.
//!
//! Called by `api/artifacts_v3.rs` and `api/cache_v1.rs`. Source: RFC 9110 §14.4, as `@actions/artifact` 0.x and 1.x
//! send it, which say of an empty file that it ends before it begins, and `@actions/cache`, which does not say how long
//! all of it is.

use std::ops::Range;

/// A part of something, and how long all of it is, where that is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentRange {
    pub bytes: Range<u64>,
    pub total_bytes: Option<u64>,
}

/// Reads `bytes <first>-<last>/<total>`, with `*` for a total that is not said; of an empty file, `bytes 0--1/0`.
/// `None` for any other form, where an end is above 2^63 - 1, and unless first ≤ last < total.
pub fn parse(header: &str) -> Option<ContentRange> {
    let rest = header.strip_prefix("bytes ")?;
    if rest == "0--1/0" {
        return Some(ContentRange {
            bytes: 0..0,
            total_bytes: Some(0),
        });
    }
    let (range, total) = rest.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    let end = last.checked_add(1).filter(|end| i64::try_from(*end).is_ok())?;
    let total_bytes = match total {
        "*" => None,
        total => Some(number(total)?),
    };
    let fits = first < end && total_bytes.is_none_or(|total| end <= total);
    fits.then_some(ContentRange {
        bytes: first..end,
        total_bytes,
    })
}

/// Decimal digits and nothing else, up to 2^63 - 1, which is what the database can count to.
pub fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|number| digits && i64::try_from(*number).is_ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_and_wholes() {
        for (header, bytes, total_bytes) in [
            ("bytes 0-20/21", 0..21, Some(21)),
            (
                "bytes 8388608-16777215/41943040",
                8_388_608..16_777_216,
                Some(41_943_040),
            ),
            ("bytes 0-0/1", 0..1, Some(1)),
            ("bytes 0--1/0", 0..0, Some(0)),
            ("bytes 0-0/*", 0..1, None),
            ("bytes 33554432-41944311/*", 33_554_432..41_944_312, None),
            ("bytes 0-9/10", 0..10, Some(10)),
            ("bytes 5-9/999", 5..10, Some(999)),
            (
                "bytes 9223372036854775806-9223372036854775806/9223372036854775807",
                9_223_372_036_854_775_806..9_223_372_036_854_775_807,
                Some(9_223_372_036_854_775_807),
            ),
        ] {
            assert_eq!(parse(header).unwrap(), ContentRange { bytes, total_bytes }, "{header}");
        }
    }

    #[test]
    fn nothing_else() {
        for header in [
            "",
            "bytes",
            "bytes ",
            "bytes 0-9223372036854775807/*",
            "bytes 0-18446744073709551615/*",
            "bytes 0-18446744073709551616/*",
            "bytes */10",
            "bytes */*",
            "bytes 0-*/*",
            "bytes -5/*",
            "bytes 5-/*",
            "bytes 5-4/*",
            "bytes 0--1/*",
            "bytes +0-5/*",
            "bytes 0-5",
            "bytes 0-5/",
            "bytes 0-5/x",
            "items 0-5/*",
            "bytes=0-5/*",
            "bytes 5-4/10",
            "bytes -1-5/10",
            "bytes 0-9/5",
            "bytes 0-9/9",
            "bytes a-b/c",
            "bytes 0-1",
            "bytes 0--1/1",
            "bytes 0--2/0",
            "bytes 1--1/0",
            "bytes 0-0/0",
            "bytes +0-+1/+2",
            "bytes 0-1 /2",
            "bytes  0-1/2",
            "bytes=0-1/2",
            "Bytes 0-1/2",
            "items 0-1/2",
            "bytes 0-1/2/3",
            "bytes 0-1/2, bytes 0-1/2",
            "bytes 0-1/9223372036854775808",
            "bytes 0-1/99999999999999999999999",
            "bytes 0-1/٣",
        ] {
            assert_eq!(parse(header), None, "{header}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(first: u32, length in 1_u64..u64::from(u32::MAX), rest: u32) {
            let end = u64::from(first) + length;
            let total_bytes = end + u64::from(rest);
            let header = format!("bytes {first}-{}/{total_bytes}", end - 1);
            prop_assert_eq!(parse(&header).unwrap(), ContentRange { bytes: first.into()..end, total_bytes: Some(total_bytes) });
        }

        #[test]
        fn no_text_panics(text in "(bytes )?[0-9*/ -]{0,24}") {
            if let Some(range) = parse(&text) {
                prop_assert!(range.total_bytes.is_none_or(|total| range.bytes.end <= total));
            }
        }
    }
}
