//! The time as a value, so that every expiry can be tested without waiting.
//!
//! Passed to whoever asks for the time; only `wharfinger doctor`, which compares two clocks, reads the system's itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::SystemTime;

#[derive(Clone, Debug)]
pub enum Clock {
    System,
    /// Milliseconds since the epoch, set by a test. The whole world's time, of which the machine knows nothing.
    Fixed(Arc<AtomicI64>),
    /// The system's clock, off by so many milliseconds, as a test wants it.
    Off(Arc<AtomicI64>),
}

impl Clock {
    /// Milliseconds since the Unix epoch.
    pub fn now_ms(&self) -> i64 {
        match self {
            Self::System => SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX)),
            Self::Fixed(now) => now.load(Ordering::Relaxed),
            Self::Off(by) => Self::System.now_ms() + by.load(Ordering::Relaxed),
        }
    }

    /// What this machine's clock shows beside those of others.
    pub fn machine_ms(&self) -> i64 {
        match self {
            Self::Fixed(_) => Self::System.now_ms(),
            own => own.now_ms(),
        }
    }
}
