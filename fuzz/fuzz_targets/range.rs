//! `Range` and `x-ms-range`: the size, eight bytes, and the header.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wharfinger::api::fuzzing;

fuzz_target!(|data: &[u8]| {
    let Some((size_bytes, header)) = data.split_first_chunk() else {
        return;
    };
    let (size_bytes, header) = (u64::from_be_bytes(*size_bytes), String::from_utf8_lossy(header));
    if let Ok(Some(range)) = fuzzing::range(&header, size_bytes) {
        assert!(
            range.start < range.end && range.end <= size_bytes,
            "{range:?} of {size_bytes}"
        );
    }
});
