//! The gate through which every worker goes to its device, so that a pause gets hold of all devices soon,
//! however busy they are. A mutex alone would not do: it is not fair.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Open or closed, and how many workers are inside.
#[derive(Default)]
pub struct Gate {
    inside: Mutex<Inside>,
    changed: Condvar,
}

#[derive(Default)]
struct Inside {
    closed: u32,
    workers: u32,
}

/// One worker's stay inside; over when dropped, also by a panic.
pub struct Stay<'g>(&'g Gate);

impl Gate {
    /// Closes the gate and waits until nobody is inside. Closed twice, it must be opened twice.
    pub fn close(&self) {
        let mut inside = self.lock();
        inside.closed += 1;
        while inside.workers > 0 {
            inside = self.changed.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens the gate again.
    pub fn open(&self) {
        let mut inside = self.lock();
        inside.closed = inside.closed.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Goes in, after a wait if the gate is closed. `None` when `stop` says that there is no point any more.
    pub fn enter(&self, stop: impl Fn() -> bool) -> Option<Stay<'_>> {
        let mut inside = self.lock();
        while inside.closed > 0 && !stop() {
            inside = self.changed.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        if stop() {
            return None;
        }
        inside.workers += 1;
        Some(Stay(self))
    }

    /// Makes those who wait outside ask again whether to stop.
    pub fn nudge(&self) {
        let _inside = self.lock();
        self.changed.notify_all();
    }

    /// Two counters are right even if somebody panicked while holding the lock.
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        let mut inside = self.0.lock();
        inside.workers -= 1;
        // Waking is a system call, and only a pause waits for workers to leave.
        if inside.closed > 0 {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_pause_waits_for_those_inside_and_two_pauses_need_two_ends() {
        let (gate, (send, receive)) = (Arc::new(Gate::default()), channel());
        let stay = gate.enter(|| false).unwrap();
        let other = gate.clone();
        std::thread::spawn(move || {
            other.close();
            send.send("closed").unwrap();
            other.close();
            other.open();
            assert!(other.enter(|| true).is_none(), "one who gives up does not get in");
            drop(other.enter(|| false));
            send.send("got in").unwrap();
        });
        let soon = |limit| receive.recv_timeout(Duration::from_millis(limit));
        assert!(soon(20).is_err(), "somebody is inside");
        drop(stay);
        assert_eq!(soon(10_000), Ok("closed"));
        assert!(soon(20).is_err(), "closed twice, opened once");
        gate.open();
        assert_eq!(soon(10_000), Ok("got in"));
    }
}
