//! Wiring for tests of devices.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Interrupt;

/// An interrupt line that counts.
#[derive(Default)]
pub struct Counter(AtomicUsize);

impl Counter {
    /// How often the line was raised.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Interrupt for Counter {
    fn raise(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
