//! The XML of Put Block List.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wharfinger::api::fuzzing;

fuzz_target!(|body: &[u8]| {
    let Ok(list) = fuzzing::block_list(body) else {
        return;
    };
    // What was read is canonical: written down, it reads the same.
    let written: String = list
        .iter()
        .map(|entry| format!("<Latest>{}</Latest>", entry.block_id))
        .collect();
    let again = fuzzing::block_list(format!("<BlockList>{written}</BlockList>").as_bytes());
    let ids = |list: Vec<_>| {
        list.into_iter()
            .map(|entry: wharfinger::db::ListEntry| entry.block_id)
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(again.unwrap_or_default()), ids(list));
});
