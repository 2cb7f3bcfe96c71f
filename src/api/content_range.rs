//! `Content-Range` of a request: which part of a file its body is.
//!
//! Called by `api/artifacts_v3.rs`. Source: RFC 9110 §14.4, as `@actions/artifact` 0.x and 1.x send it, which say of
//! an empty file that it ends before it begins.

use std::ops::Range;

use crate::error::{Error, Result};

/// A part of something, and how long all of it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentRange {
    pub bytes: Range<u64>,
    pub total_bytes: u64,
}

/// Reads `bytes <first>-<last>/<total>`; of an empty file, `bytes 0--1/0`.
///
/// # Errors
/// [`Error::Invalid`] for any other form, for numbers above 2^63, and unless first ≤ last < total.
pub fn parse(header: &str) -> Result<ContentRange> {
    let invalid = || Error::Invalid("Content-Range must be `bytes <first>-<last>/<total>`".to_owned());
    let rest = header.strip_prefix("bytes ").ok_or_else(invalid)?;
    if rest == "0--1/0" {
        return Ok(ContentRange {
            bytes: 0..0,
            total_bytes: 0,
        });
    }
    let (range, total) = rest.split_once('/').ok_or_else(invalid)?;
    let (first, last) = range.split_once('-').ok_or_else(invalid)?;
    let numbers = (number(first), number(last), number(total));
    let (Some(first), Some(last), Some(total_bytes)) = numbers else {
        return Err(invalid());
    };
    if first > last || last >= total_bytes {
        return Err(invalid());
    }
    Ok(ContentRange {
        bytes: first..last + 1,
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
            ("bytes 0-20/21", 0..21, 21),
            ("bytes 8388608-16777215/41943040", 8_388_608..16_777_216, 41_943_040),
            ("bytes 0-0/1", 0..1, 1),
            ("bytes 0--1/0", 0..0, 0),
            (
                "bytes 9223372036854775806-9223372036854775806/9223372036854775807",
                9_223_372_036_854_775_806..9_223_372_036_854_775_807,
                9_223_372_036_854_775_807,
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
            "bytes 0-9/*",
            "bytes */10",
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
            assert!(matches!(parse(header), Err(Error::Invalid(_))), "{header}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(first: u32, length in 1_u64..u64::from(u32::MAX), rest: u32) {
            let end = u64::from(first) + length;
            let total_bytes = end + u64::from(rest);
            let header = format!("bytes {first}-{}/{total_bytes}", end - 1);
            prop_assert_eq!(parse(&header).unwrap(), ContentRange { bytes: first.into()..end, total_bytes });
        }

        #[test]
        fn no_text_panics(text in "(bytes )?[0-9*/ -]{0,24}") {
            if let Ok(range) = parse(&text) {
                prop_assert!(range.bytes.end <= range.total_bytes);
            }
        }
    }
}
