//! A signed link's path and query: as they are, and behind a link that is good.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use wharfinger::model::{BlobId, BlobKind};
use wharfinger::papers::{Papers, Permission};
use wharfinger_fuzz::{NOW_MS, papers};

static PAPERS: LazyLock<Papers> = LazyLock::new(papers);
const BLOB: &str = "0199a0b1-c2d3-7e4f-8a5b-6c7d8e9f0a1b";

fuzz_target!(|text: &str| {
    let blob = BlobId(BLOB.parse().unwrap());
    let good = PAPERS.sign_link(BlobKind::Artifact, Permission::Read, blob, NOW_MS / 1000 + 60);
    let (_, good) = good.split_once('?').unwrap();
    // Nobody but us can sign.
    let (path, query) = text.split_once('?').unwrap_or((BLOB, text));
    let (kind, id) = path.split_once('/').unwrap_or(("art", path));
    if let Ok(link) = PAPERS.verify_link(kind, id, query, NOW_MS) {
        assert!(query.contains(good.rsplit_once('=').unwrap().1), "{link:?}");
    }
    // Whatever is put before or behind it, what is signed stays.
    for query in [
        format!("{good}&{text}"),
        format!("{text}&{good}"),
        format!("{good}{text}"),
    ] {
        if let Ok(link) = PAPERS.verify_link("art", BLOB, &query, NOW_MS) {
            assert_eq!(
                (link.blob, link.kind, link.permission),
                (blob, BlobKind::Artifact, Permission::Read)
            );
        }
    }
});
