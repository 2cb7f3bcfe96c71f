//! `itemPath` in a query.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wharfinger::api::fuzzing;

fuzz_target!(|query: &str| {
    let Some((artifact, below)) = fuzzing::item_path(query) else {
        return;
    };
    let whole = if below.is_empty() {
        artifact.clone()
    } else {
        format!("{artifact}/{below}")
    };
    assert!(whole.len() <= 2048);
    for part in whole.split('/') {
        assert!(!matches!(part, "" | "." | ".."), "{whole:?} leads elsewhere");
        assert!(
            !part.contains(|c: char| c == '\\' || c == ':' || c.is_control()),
            "{whole:?}"
        );
    }
    // Written in its one canonical way, it says the same.
    let written: String = whole.bytes().map(|byte| format!("%{byte:02X}")).collect();
    assert_eq!(
        fuzzing::item_path(&format!("itemPath={written}")),
        Some((artifact, below))
    );
});
