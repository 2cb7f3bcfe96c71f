//! `Range` and `x-ms-range` as a window of bytes.
//!
//! Called by `api/blobs.rs`. Source: RFC 9110 §14; one range only, never multipart.

use std::ops::Range;

use crate::error::{Error, Result};

/// The bytes that a range header asks for, of `size_bytes`. `None` for a header that is to be ignored: another unit,
/// several ranges, not numbers.
///
/// # Errors
/// [`Error::RangeNotSatisfiable`] for a range that begins behind the end, or ends before it begins.
pub fn parse(header: &str, size_bytes: u64) -> Result<Option<Range<u64>>> {
    let Some((first, last)) = header
        .trim()
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'))
    else {
        return Ok(None);
    };
    let (Some(first), Some(last)) = (number(first.trim()), number(last.trim())) else {
        return Ok(None);
    };
    let range = match (first, last) {
        (None, None) => return Ok(None),
        (Some(first), None) => first..size_bytes,
        (Some(first), Some(last)) => first..last.saturating_add(1).min(size_bytes),
        (None, Some(suffix)) => size_bytes.saturating_sub(suffix)..size_bytes,
    };
    if range.is_empty() {
        Err(Error::RangeNotSatisfiable { size_bytes })
    } else {
        Ok(Some(range))
    }
}

/// `Some(None)` for nothing, `None` for what is no number. Numbers above 2^64 are as good as 2^64.
fn number(text: &str) -> Option<Option<u64>> {
    if text.is_empty() {
        Some(None)
    } else if text.bytes().all(|byte| byte.is_ascii_digit()) {
        Some(Some(text.parse().unwrap_or(u64::MAX)))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::parse;
    use crate::error::Error;

    #[test]
    fn one_range_is_a_window() {
        for (header, expected) in [
            ("bytes=0-0", 0..1),
            ("bytes=-1", 9..10),
            ("bytes=5-", 5..10),
            ("bytes=2-4", 2..5),
            ("bytes=0-18446744073709551616", 0..10),
            ("bytes=-99", 0..10),
        ] {
            assert_eq!(parse(header, 10).unwrap(), Some(expected), "{header}");
        }
    }

    #[test]
    fn a_range_outside_is_not_satisfiable() {
        for header in ["bytes=10-", "bytes=999999999999-", "bytes=5-2", "bytes=-0"] {
            assert!(
                matches!(parse(header, 10), Err(Error::RangeNotSatisfiable { size_bytes: 10 })),
                "{header}"
            );
        }
        assert!(parse("bytes=0-", 0).is_err());
    }

    #[test]
    fn what_is_no_single_range_is_ignored() {
        for header in ["bytes=a-b", "bytes=0-1,3-4", "items=0-1", "bytes=-", "bytes", ""] {
            assert_eq!(parse(header, 10).unwrap(), None, "{header}");
        }
    }
}
