//! Whether the disk takes what is written to it at once.
//!
//! As long as the kernel has room for bytes that are not on the disk yet, a write is a copy of memory. When it has none,
//! it lets the writer sleep. The same goes for new files and the file system's journal. `disk.rs` writes on async threads
//! in the first case only; each such write tells which it is.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

/// Far longer than a copy takes, also of most threads that had to wait for a processor.
const SLOW: Duration = Duration::from_millis(10);
/// How many in a row tell a disk from a thread that had to wait longer.
const ENOUGH: u32 = 2;
/// How long nothing is expected of a disk that was slow.
const REST: Duration = Duration::from_secs(10);

/// What is written. They wait for different things, so that a quick one of one kind says nothing of the other.
#[derive(Clone, Copy, Debug)]
pub(super) enum Writing {
    NewFile,
    More,
}

/// Quick until writes were slow.
#[derive(Debug)]
pub(super) struct Pace {
    /// By kind.
    slow_in_a_row: [AtomicU32; 2],
    last_slow: Mutex<Option<Instant>>,
    turns: Semaphore,
}

impl Pace {
    /// For a runtime that has so many threads for tasks.
    pub(super) fn new(workers: usize) -> Self {
        Self {
            slow_in_a_row: Default::default(),
            last_slow: Mutex::default(),
            // To keep one of two free would cost a seventh of their speed.
            turns: Semaphore::new(workers.saturating_sub(1).max(2)),
        }
    }

    pub(super) fn is_quick(&self) -> bool {
        self.last_slow().is_none_or(|last| last.elapsed() > REST)
    }

    /// The turn to write on an async thread, unless too many have one: a disk that hangs shall not stop all threads,
    /// where there are more than two.
    pub(super) fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.turns.try_acquire().ok()
    }

    /// Does some writing in place and remembers if it was slow.
    pub(super) fn watch<T>(&self, kind: Writing, write: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = write();
        self.note(kind, begun.elapsed());
        result
    }

    fn note(&self, kind: Writing, took: Duration) {
        let slow_in_a_row = &self.slow_in_a_row[kind as usize];
        if took <= SLOW {
            slow_in_a_row.store(0, Ordering::Relaxed);
        } else if slow_in_a_row.fetch_add(1, Ordering::Relaxed) + 1 >= ENOUGH {
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
    fn two_slow_writes_in_a_row_are_enough_to_be_careful_for_a_while() {
        for kind in [Writing::NewFile, Writing::More] {
            let (pace, slow) = (Pace::new(2), SLOW + Duration::from_millis(1));
            assert_eq!(pace.watch(kind, || 7), 7);
            for took in [SLOW, SLOW, slow, SLOW, slow] {
                pace.note(kind, took);
                assert!(pace.is_quick());
            }
            pace.note(kind, slow);
            assert!(!pace.is_quick());
            pace.note(kind, Duration::ZERO);
            assert!(!pace.is_quick());
            *pace.last_slow() = Instant::now().checked_sub(2 * REST);
            assert!(pace.is_quick());
        }
    }

    #[test]
    fn quick_writes_do_not_hide_slow_new_files() {
        let (pace, slow) = (Pace::new(2), 2 * SLOW);
        for (kind, took) in [
            (Writing::NewFile, slow),
            (Writing::More, SLOW),
            (Writing::NewFile, slow),
        ] {
            assert!(pace.is_quick());
            pace.note(kind, took);
        }
        assert!(!pace.is_quick());
    }

    #[test]
    fn one_of_many_threads_stays_free() {
        let pace = Pace::new(4);
        let turns: Vec<_> = (0..3).map(|_| pace.turn()).collect();
        assert!(turns.iter().all(Option::is_some));
        assert!(pace.turn().is_none());
        drop(turns);
        assert!(pace.turn().is_some());
    }
}
