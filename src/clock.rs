//! The time as a value, so that every expiry can be tested without waiting.
//!
//! Passed to whoever asks for the time; only `wharfinger doctor`, which compares two clocks, reads the system's itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

/// The last millisecond of the year 9999, the last that can be written down.
const LAST_MS: i64 = 253_402_300_799_999;

/// A time as `SystemTime`, to be written down: as late as can be if it is later.
pub fn writable(at_ms: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(at_ms.clamp(0, LAST_MS).unsigned_abs())
}

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

#[cfg(test)]
mod tests {
    use super::writable;

    #[test]
    fn no_time_is_too_late_to_be_written_down() {
        let written = |at_ms| humantime::format_rfc3339_seconds(writable(at_ms)).to_string();
        assert_eq!(written(1_000), "1970-01-01T00:00:01Z");
        assert_eq!(written(i64::MAX), "9999-12-31T23:59:59Z");
        assert_eq!(written(-1), "1970-01-01T00:00:00Z");
    }
}
