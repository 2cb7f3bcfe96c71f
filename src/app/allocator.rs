//! Memory that a burst took is given back to the system when it is over, and not before.
//!
//! `app` sets it up and runs it in the background. glibc keeps what hundreds of streams held, in pieces between what is
//! still in use, until it is told otherwise; other allocators are left alone.

use std::hint::black_box;
use std::time::Duration;

use crate::service::Services;

const EVERY: Duration = Duration::from_secs(5);
/// To keep so much is cheaper than to ask for it again.
const KEPT_BYTES: u64 = 32 * 1024 * 1024;

/// What a request of a moment takes stays for the next one.
const LARGEST_KEPT_BYTES: usize = 1024 * 1024;

/// Makes the allocator keep what is freed in passing. glibc gives back whatever is above 128 KiB at once, and has to ask
/// for it again, which was a tenth of a small artifact's CPU; after it has freed a larger block, it takes blocks of that
/// size for ordinary and keeps twice as much (mallopt(3), `M_MMAP_THRESHOLD`). Others don't mind.
pub fn keep_what_passes() {
    drop(black_box(Vec::<u8>::with_capacity(LARGEST_KEPT_BYTES)));
}

/// Looks every now and then, for ever, and does something only while no bytes are under way.
pub async fn give_back_in_background(services: Services) {
    let mut least = 0;
    loop {
        tokio::time::sleep(EVERY).await;
        let held = anonymous_bytes();
        if held > least + KEPT_BYTES && services.is_at_rest() {
            // It visits all that is free, which is a matter of milliseconds.
            if tokio::task::spawn_blocking(give_back).await.is_err() {
                return;
            }
            // What is in use all the time is not looked for again and again.
            least = anonymous_bytes();
            tracing::debug!(held, now = least, "gave memory back");
        }
        least = least.min(held);
    }
}

/// Resident memory that is not a file's; 0 where nobody says.
fn anonymous_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut pages = statm.split(' ').skip(1).map_while(|pages| pages.parse::<u64>().ok());
    let (resident, shared) = (pages.next().unwrap_or_default(), pages.next().unwrap_or_default());
    resident.saturating_sub(shared) * rustix::param::page_size() as u64
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(
    unsafe_code,
    reason = "measured: 146 MiB stay after 200 uploads to a bucket without it; tested by faults::memory"
)]
fn give_back() {
    // SAFETY: it takes no pointers and may be called by any thread at any time.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back() {}
