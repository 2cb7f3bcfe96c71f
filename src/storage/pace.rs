//! Whether the disk takes what is written to it at once.
//!
//! As long as the kernel has room for bytes that are not on the disk yet, a write is a copy of memory. When it has none,
//! it lets the writer sleep. `disk.rs` writes on async threads in the first case only; each write tells which it is.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Far longer than a copy takes, also of a thread that had to wait for a processor.
const SLOW: Duration = Duration::from_millis(10);
/// How long nothing is expected of a disk that was slow.
const REST: Duration = Duration::from_secs(10);

/// Quick until a write was slow.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last_slow: Mutex<Option<Instant>>,
}

impl Pace {
    pub(super) fn is_quick(&self) -> bool {
        self.last_slow().is_none_or(|last| last.elapsed() > REST)
    }

    /// Does some writing and remembers if it was slow.
    pub(super) fn watch<T>(&self, write: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = write();
        self.note(begun.elapsed());
        result
    }

    fn note(&self, took: Duration) {
        if took > SLOW {
            *self.last_slow() = Some(Instant::now());
        }
    }

    fn last_slow(&self) -> MutexGuard<'_, Option<Instant>> {
        self.last_slow.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_write_is_enough_to_be_careful_for_a_while() {
        let pace = Pace::default();
        assert_eq!(pace.watch(|| 7), 7);
        pace.note(SLOW);
        assert!(pace.is_quick());
        pace.note(SLOW + Duration::from_millis(1));
        assert!(!pace.is_quick());
        pace.note(Duration::ZERO);
        assert!(!pace.is_quick());
        *pace.last_slow() = Instant::now().checked_sub(2 * REST);
        assert!(pace.is_quick());
    }
}
