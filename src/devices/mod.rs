//! What the guest sees as hardware.
//!
//! Every device keeps the contract of `docs/architecture.md`: its guest-visible registers *are* its saved
//! state, it is made by one constructor `new(state, wiring)` (a cold boot restores `Default`), and nothing
//! the guest sends can panic it or make it allocate without bound.

mod bus;
mod changes;
pub mod cpus;
pub mod events;
pub mod generation;
pub mod i8042;
pub mod power;
pub mod rtc;
pub mod serial;
#[cfg(test)]
mod tables;
#[cfg(test)]
pub mod testing;
mod throttle;
pub mod virtio;

pub use bus::{Bus, Overlap};
pub use changes::Changes;
pub use throttle::Throttle;

use std::io;

/// A device's interrupt line. The machine wires it to an irqfd; tests count the calls.
pub trait Interrupt: Send + Sync {
    /// Raises the line once (an edge).
    fn raise(&self) -> io::Result<()>;
}

/// A device that decodes addresses of its own, relative to where the bus put it.
///
/// `data` has the length of the guest's access (1, 2, 4 or 8 bytes). A device answers an access that it
/// does not understand like hardware does: reads give zeros (or all ones), writes are ignored.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device cannot be made from what it was given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A saved state that no device of ours can have been in.
    #[error("the saved state of {device} is not a possible one: {what}")]
    State {
        /// The device's kind.
        device: &'static str,
        /// The field, or the rule that it breaks.
        what: &'static str,
    },
}
