//! The platform's power: sleep and reset registers, the power button, and the register of pending
//! [`events`](super::events), of which the button's is one.
//!
//! ```text
//! port  +0  sleep control (ACPI 6.5, 4.8.3.7): write SLP_TYP << 2 | SLP_EN
//!       +1  sleep status: reads 0, for we never wake from sleep
//!       +2  reset register: write 1
//!       +4  pending events, a bit each; reading takes them (ours; only our own AML reads it)
//! ```

use std::sync::Arc;

use acpi_tables::aml;
use serde::{Deserialize, Serialize};

use super::events::{self, Event, Events};
use super::{BusDevice, Error, Interrupt};
use crate::acpi::{self, RESET_VALUE, SLEEP_TYPE_S5};

/// How many ports the registers take.
pub const PORTS: u16 = 8;
/// Offsets of the registers, as in the picture above.
pub const SLEEP_CONTROL: u16 = 0;
/// See [`SLEEP_CONTROL`].
pub const SLEEP_STATUS: u16 = 1;
/// See [`SLEEP_CONTROL`].
pub const RESET: u16 = 2;
const EVENTS: u16 = 4;

/// SLP_EN and SLP_TYP of the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// The guest-visible registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    /// Events that the guest has not taken yet.
    pub events: u8,
}

/// What the guest asks of the platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Turn off.
    Off,
    /// Start again.
    Reset,
}

/// The registers, an interrupt line, and someone who ends the machine.
pub struct Power {
    events: Events,
    on_request: Box<dyn Fn(PowerRequest) + Send>,
}

impl Power {
    /// `line` is the interrupt that [`aml`] names; `on_request` must not block.
    pub fn new(
        state: PowerState,
        line: Arc<dyn Interrupt>,
        on_request: Box<dyn Fn(PowerRequest) + Send>,
    ) -> Result<Power, Error> {
        Ok(Power { events: Events::new(state.events, line)?, on_request })
    }

    /// The state to save.
    pub fn state(&self) -> PowerState {
        PowerState { events: self.events.pending() }
    }

    /// Presses the power button.
    pub fn press_button(&self) -> std::io::Result<()> {
        self.events.raise(Event::PowerButton)
    }

    /// A handle for other devices that have something to tell.
    pub fn events(&self) -> Events {
        self.events.clone()
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == u64::from(EVENTS)
            && let [first, ..] = data
        {
            *first = self.events.take();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        const OFF: u8 = SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE;
        match (u16::try_from(offset), data) {
            (Ok(SLEEP_CONTROL), [OFF]) => (self.on_request)(PowerRequest::Off),
            (Ok(RESET), [RESET_VALUE]) => (self.on_request)(PowerRequest::Reset),
            _ => {}
        }
    }
}

/// Describes the button (PNP0C0C, a control method power button, 4.8.3.3.1.2) and the event device.
pub fn aml(base_port: u16, gsi: u32) -> Vec<u8> {
    let hid = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C"));
    let button = aml::Device::new("PWRB".into(), vec![&hid]);
    [acpi::bytes(&button), events::aml(base_port + EVENTS, gsi)].concat()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::devices::testing::Counter;

    #[test]
    fn the_button_is_seen_once_and_only_whole_requests_count() {
        let (line, (requests, asked)) = (Arc::new(Counter::default()), mpsc::channel());
        let ask = Box::new(move |request| requests.send(request).unwrap());
        let mut power = Power::new(PowerState::default(), line.clone(), ask).unwrap();
        power.press_button().unwrap();
        assert_eq!((line.count(), power.state()), (1, PowerState { events: 1 }));
        let mut data = [0xff];
        power.read(EVENTS.into(), &mut data);
        assert_eq!(data, [Event::PowerButton as u8]);
        power.read(EVENTS.into(), &mut data);
        assert_eq!(data, [0]);

        for (register, value) in [(0, 5 << 2), (0, 1 << 5), (2, 0), (1, 1), (7, 1)] {
            power.write(register, &[value]);
        }
        power.write(0, &[5 << 2 | 1 << 5, 0]);
        assert!(asked.try_recv().is_err());
        power.write(0, &[5 << 2 | 1 << 5]);
        power.write(2, &[1]);
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [PowerRequest::Off, PowerRequest::Reset]);
    }
}
