//! The time as a value, so that every expiry can be tested without waiting.
//!
//! Passed to whoever asks for the time; nothing else in the product reads the system clock,
//! except the check of the machine's clock against the database's.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::SystemTime;

#[derive(Clone, Debug)]
pub enum Clock {
    System,
    /// Milliseconds since the epoch, set by a test.
    Fixed(Arc<AtomicI64>),
}

impl Clock {
    /// Milliseconds since the Unix epoch.
    pub fn now_ms(&self) -> i64 {
        match self {
            Self::System => SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX)),
            Self::Fixed(now) => now.load(Ordering::Relaxed),
        }
    }
}
