//! The one thing that is left of the keyboard controller: pulling its output line 0 resets the PC.
//!
//! `reboot=k` and kernels without ACPI use it.

use super::BusDevice;

/// The ports 0x60 to 0x64.
pub const PORTS: u16 = 5;

const COMMAND: u64 = 4;
/// Pulse output line 0.
const PULSE_RESET: u8 = 0xfe;

/// A keyboard controller without a keyboard. It has no state.
pub struct I8042 {
    on_reset: Box<dyn Fn() + Send>,
}

impl I8042 {
    /// `on_reset` must not block.
    pub fn new(on_reset: Box<dyn Fn() + Send>) -> I8042 {
        I8042 { on_reset }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0); // status: nothing waits, and commands may be written
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (offset, data) == (COMMAND, &[PULSE_RESET]) {
            (self.on_reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn only_the_pulse_resets() {
        let (send, resets) = mpsc::channel();
        let mut i8042 = I8042::new(Box::new(move || send.send(()).unwrap()));
        i8042.write(0, &[PULSE_RESET]);
        i8042.write(COMMAND, &[0xff]);
        i8042.write(COMMAND, &[PULSE_RESET, 0]);
        assert!(resets.try_recv().is_err());
        i8042.write(COMMAND, &[PULSE_RESET]);
        assert!(resets.try_recv().is_ok());
    }
}
