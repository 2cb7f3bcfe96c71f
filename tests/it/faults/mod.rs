//! Machines, disks, stores and databases that misbehave: nothing acknowledged is lost, nothing half is shown, and all
//! works again when the fault ends, without a restart.

mod client;
mod database;
mod disk;
mod memory;
mod mount;
mod power;
mod s3;
mod soak;
mod vanishing;
mod verification;

use std::io::Write;
use std::time::{Duration, Instant};

use wharfinger::service::fsck;

use self::client::Client;
use crate::common::TestServer;

/// Longer than anything here takes; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Says that a test did not run, past libtest, which keeps what a passing test prints to itself.
pub fn skipped(test: &str, reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

/// Tests that take long run only when asked for.
pub fn is_long_run(test: &str) -> bool {
    let asked = std::env::var_os("WHARFINGER_TEST_LONG").is_some();
    if !asked {
        skipped(test, "it takes half a minute or more; set WHARFINGER_TEST_LONG=1");
    }
    asked
}

/// Waits until something holds.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Bytes that differ from place to place and from seed to seed.
fn content(seed: u64, size_bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(size_bytes).collect()
}

/// After the cleaner, store and database agree to the last byte, and so does the client.
async fn check_all(server: &TestServer, client: Client) {
    server.advance(Duration::from_secs(3 * 24 * 3600));
    let client = client.handed_over_to(Client::of(server));
    server.app.services.clean().await.unwrap().expect("nobody else cleans");
    let deep = fsck::Options {
        deep: true,
        repair: false,
    };
    let mut problems = Vec::new();
    let summary = server
        .app
        .services
        .fsck(deep, &mut |problem| problems.push(format!("{problem:?}")))
        .await
        .unwrap();
    assert!(problems.is_empty(), "{problems:#?}");
    assert_eq!(summary.blobs, client.list().await.len() as u64, "{summary:?}");
    client.check_ledger().await;
}
