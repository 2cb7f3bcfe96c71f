//! `Content-Range` of a chunk of a file, which tells the file's length too.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wharfinger::api::fuzzing;

fuzz_target!(|header: &str| {
    let Ok(range) = fuzzing::file_range(header) else {
        return;
    };
    let (bytes, total) = (range.bytes.clone(), range.total_bytes);
    assert!(bytes.end <= total && i64::try_from(total).is_ok(), "{range:?}");
    assert!(bytes.start < bytes.end || (bytes.end, total) == (0, 0), "{range:?}");
    // Written in its one canonical way, it says the same.
    let written = format!("bytes {}-{}/{total}", bytes.start, i128::from(bytes.end) - 1);
    assert_eq!(fuzzing::file_range(&written).ok(), Some(range));
});
