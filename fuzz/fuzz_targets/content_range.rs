//! `Content-Range` of a chunk, with or without the length of all.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wharfinger::api::fuzzing;

fuzz_target!(|header: &str| {
    let Some(range) = fuzzing::content_range(header) else {
        return;
    };
    let (bytes, total) = (range.bytes.clone(), range.total_bytes);
    assert!(i64::try_from(bytes.end).is_ok(), "{range:?}");
    assert!(
        total.is_none_or(|total| bytes.end <= total && i64::try_from(total).is_ok()),
        "{range:?}"
    );
    assert!(
        bytes.start < bytes.end || (bytes.end, total) == (0, Some(0)),
        "{range:?}"
    );
    // Written in its one canonical way, it says the same.
    let total = total.map_or("*".to_owned(), |total| total.to_string());
    let written = format!("bytes {}-{}/{total}", bytes.start, i128::from(bytes.end) - 1);
    assert_eq!(fuzzing::content_range(&written), Some(range));
});
