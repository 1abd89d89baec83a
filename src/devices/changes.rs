use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Tells whoever waits that a guest did something about its size: took a vCPU, gave one back, plugged RAM.
///
/// It says that, not what: who waits looks at the devices themselves. All devices of a machine share one, so
/// that one wait is for all of them, in this order, which misses nothing:
///
/// ```text
/// seen = changes.count(); look at the devices; changes.wait_beyond(seen, patience)
/// ```
#[derive(Debug, Default)]
pub struct Changes {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Changes {
    /// How many changes there were so far.
    pub fn count(&self) -> u64 {
        *self.lock()
    }

    /// Something changed. Never blocks for long, so a device may say so with its own lock held.
    pub fn note(&self) {
        *self.lock() += 1;
        self.changed.notify_all();
    }

    /// Waits until there were more than `seen` changes, and gives their number; `None` when nothing moved for
    /// as long as `patience`.
    pub fn wait_beyond(&self, seen: u64, patience: Duration) -> Option<u64> {
        let waited = self.changed.wait_timeout_while(self.lock(), patience, |count| *count <= seen);
        let (count, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        (!timeout.timed_out()).then_some(*count)
    }

    /// A number is right even if somebody panicked while holding the lock.
    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn a_change_is_heard_also_when_it_came_before_the_wait() {
        let changes = Arc::new(Changes::default());
        let seen = changes.count();
        changes.note();
        assert_eq!(changes.wait_beyond(seen, Duration::ZERO), Some(1));
        assert_eq!(changes.wait_beyond(1, Duration::from_millis(1)), None);
        let other = changes.clone();
        let noting = thread::spawn(move || other.note());
        assert_eq!(changes.wait_beyond(1, Duration::from_secs(30)), Some(2));
        noting.join().unwrap();
    }
}
