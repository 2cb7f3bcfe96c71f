//! How long a client may keep the server waiting for bytes, or for room to send them.
//!
//! Used by `socket.rs` for replies and by `body.rs` for bodies. Counts only the time spent waiting for the client,
//! never that of the store or the database.

use std::time::Duration;

/// A span that waiting uses up and bytes give back: who is silent, or slower than the minimum rate on the whole, ends
/// it within `most`.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    most: Duration,
    left: Duration,
    min_bytes_per_second: u32,
}

impl Patience {
    /// `min_bytes_per_second` 0: silence alone counts.
    pub fn new(most: Duration, min_bytes_per_second: u32) -> Self {
        Self {
            most,
            left: most,
            min_bytes_per_second,
        }
    }

    /// How much longer to wait.
    pub fn left(&self) -> Duration {
        self.left
    }

    /// So many bytes went over after so long a wait.
    pub fn waited(&mut self, wait: Duration, bytes: usize) {
        let earned = match self.min_bytes_per_second {
            0 => self.most,
            rate => Duration::from_secs_f64(bytes as f64 / f64::from(rate)),
        };
        self.left = self.left.saturating_sub(wait).saturating_add(earned).min(self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// After how many waits of a second, each ended by so many bytes, there is no patience left for another one.
    fn seconds(mut patience: Patience, bytes: usize) -> Option<u32> {
        (1..1000).find(|_| {
            patience.waited(SECOND, bytes);
            patience.left() < SECOND
        })
    }

    #[test]
    fn a_minimum_rate_keeps_a_place() {
        let patience = Patience::new(60 * SECOND, 4096);
        assert_eq!(seconds(patience, 0), Some(60));
        assert_eq!(seconds(patience, 1), Some(60));
        assert_eq!(seconds(patience, 2048), Some(119));
        assert_eq!(seconds(patience, 4096), None);
    }

    #[test]
    fn without_a_rate_a_byte_is_enough() {
        let patience = Patience::new(60 * SECOND, 0);
        assert_eq!(seconds(patience, 1), None);
    }

    #[test]
    fn what_was_fast_earns_no_more_than_all() {
        let mut patience = Patience::new(60 * SECOND, 4096);
        patience.waited(SECOND, usize::MAX / 2);
        assert_eq!(patience.left(), 60 * SECOND);
    }
}
