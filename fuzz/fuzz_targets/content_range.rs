//! `Content-Range` of a chunk.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wharfinger::api::fuzzing;

fuzz_target!(|header: &str| {
    let Some(range) = fuzzing::content_range(header) else {
        return;
    };
    assert!(range.start < range.end, "{range:?}");
    // Written in its one canonical way, it says the same.
    let written = format!("bytes {}-{}/*", range.start, range.end - 1);
    assert_eq!(fuzzing::content_range(&written), Some(range));
});
