//! Whether the disk takes what is written to it at once.
//!
//! As long as the kernel has room for bytes that are not on the disk yet, a write is a copy of memory. When it has none,
//! it lets the writer sleep. `disk.rs` writes on async threads in the first case only; each write tells which it is.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

/// Far longer than a copy takes, also of a thread that had to wait for a processor.
const SLOW: Duration = Duration::from_millis(10);
/// How long nothing is expected of a disk that was slow.
const REST: Duration = Duration::from_secs(10);

/// Quick until a write was slow.
#[derive(Debug)]
pub(super) struct Pace {
    last_slow: Mutex<Option<Instant>>,
    turns: Semaphore,
}

impl Pace {
    /// For a runtime that has so many threads for tasks.
    pub(super) fn new(workers: usize) -> Self {
        Self {
            last_slow: Mutex::default(),
            turns: Semaphore::new(workers.saturating_sub(1)),
        }
    }

    pub(super) fn is_quick(&self) -> bool {
        self.last_slow().is_none_or(|last| last.elapsed() > REST)
    }

    /// The turn to write on an async thread, unless too many have one: a disk that hangs shall not stop all threads.
    pub(super) fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.turns.try_acquire().ok()
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
        let pace = Pace::new(2);
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

    #[test]
    fn one_thread_always_stays_free() {
        let pace = Pace::new(2);
        let turn = pace.turn();
        assert!(turn.is_some());
        assert!(pace.turn().is_none());
        drop(turn);
        assert!(pace.turn().is_some());
        assert!(Pace::new(1).turn().is_none());
    }
}
