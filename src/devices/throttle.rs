use std::time::{Duration, Instant};

/// Lets one message through in a while, so that a guest cannot fill the log.
#[derive(Debug, Default)]
pub struct Throttle {
    last: Option<Instant>,
    withheld: u64,
}

impl Throttle {
    const PAUSE: Duration = Duration::from_secs(5);

    /// Whether a message may be written now; if so, how many were withheld since the last one.
    pub fn pass(&mut self) -> Option<u64> {
        if self.last.is_some_and(|last| last.elapsed() < Self::PAUSE) {
            self.withheld += 1;
            return None;
        }
        self.last = Some(Instant::now());
        Some(std::mem::take(&mut self.withheld))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_messages_is_counted_and_not_written() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.pass(), Some(0));
        assert_eq!((throttle.pass(), throttle.pass()), (None, None));
        throttle.last = Instant::now().checked_sub(Throttle::PAUSE);
        assert_eq!(throttle.pass(), Some(2));
    }
}
