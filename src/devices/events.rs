//! What the machine has to tell the guest between two interrupts: a register of pending events, and the
//! Generic Event Device (ACPI 6.5, section 5.6.9) whose method reads it and passes the events on.
//!
//! The register is one of [`power`](super::power)'s ports. Other devices hold an [`Events`] to raise theirs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use acpi_tables::{Aml, aml};

use super::{Error, Interrupt};
use crate::acpi;

/// What can happen. The values are the register's bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Event {
    /// The power button was pressed.
    PowerButton = 1 << 0,
    /// A vCPU shall be used, or given back: see [`cpus`](super::cpus).
    Cpus = 1 << 1,
    /// This is another generation of the machine: see [`generation`](super::generation).
    Generation = 1 << 2,
}

const ALL: u8 = Event::PowerButton as u8 | Event::Cpus as u8 | Event::Generation as u8;

/// A handle to the register and its interrupt line. Raising an event takes no lock, so a device may do it
/// with its own lock held.
#[derive(Clone)]
pub struct Events(Arc<Register>);

struct Register {
    pending: AtomicU8,
    line: Arc<dyn Interrupt>,
}

impl Events {
    /// A register in which `pending` is set, with the interrupt line that [`aml`] names.
    pub fn new(pending: u8, line: Arc<dyn Interrupt>) -> Result<Events, Error> {
        if pending & !ALL != 0 {
            return Err(Error::State { device: "power", what: "events that do not exist are pending" });
        }
        Ok(Events(Arc::new(Register { pending: AtomicU8::new(pending), line })))
    }

    /// Something happened: the guest shall look.
    pub fn raise(&self, event: Event) -> io::Result<()> {
        self.0.pending.fetch_or(event as u8, Ordering::AcqRel);
        self.0.line.raise()
    }

    /// Interrupts again if something is pending, for after a restore: whether the interrupt was on its way
    /// then, nobody knows, and to be told once too often does no harm.
    pub fn remind(&self) -> io::Result<()> {
        if self.pending() != 0 { self.0.line.raise() } else { Ok(()) }
    }

    /// What the guest has not taken yet.
    pub fn pending(&self) -> u8 {
        self.0.pending.load(Ordering::Acquire)
    }

    /// The guest reads the register, and so takes all that is pending.
    pub(super) fn take(&self) -> u8 {
        self.0.pending.swap(0, Ordering::AcqRel)
    }
}

/// Describes the event device (ACPI0013) with its register at `port` and its interrupt.
pub(super) fn aml(port: u16, gsi: u32) -> Vec<u8> {
    let hid = aml::Name::new("_HID".into(), &"ACPI0013");
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let line = aml::Interrupt::new(true, true, false, false, gsi);
    let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&line]));
    let region = aml::OpRegion::new("EVRG".into(), aml::OpRegionSpace::SystemIO, &port, &1u8);
    let field = aml::Field::new(
        "EVRG".into(),
        aml::FieldAccessType::Byte,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::Preserve,
        vec![aml::FieldEntry::Named(*b"EVTS", 8)],
    );
    let (taken, pending) = (aml::Local(0), aml::Path::new("EVTS"));
    let take = aml::Store::new(&taken, &pending);
    let happened = |event: Event, then: &dyn Aml| {
        let bit = event as u8;
        acpi::bytes(&aml::If::new(&aml::And::new(&aml::ZERO, &taken, &bit), vec![then]))
    };
    // 0x80 means "pressed" to the button (section 5.6.6) and "changed" to the generation ID.
    let notify = |device: &str| acpi::bytes(&aml::Notify::new(&aml::Path::new(device), &0x80u8));
    let scan = aml::MethodCall::new("\\_SB_.CPUS.CSCN".into(), vec![]);
    let passed_on = [
        happened(Event::PowerButton, &acpi::Raw(&notify("\\_SB_.PWRB"))),
        happened(Event::Cpus, &scan),
        happened(Event::Generation, &acpi::Raw(&notify("\\_SB_.VGEN"))),
    ]
    .concat();
    let passed_on = acpi::Raw(&passed_on);
    let method = aml::Method::new("_EVT".into(), 1, true, vec![&take, &passed_on]);
    acpi::bytes(&aml::Device::new("GED_".into(), vec![&hid, &uid, &resources, &region, &field, &method]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Counter;

    #[test]
    fn an_event_is_pending_until_it_is_taken_and_is_told_again_only_then() {
        let line = Arc::new(Counter::default());
        let events = Events::new(0, line.clone()).unwrap();
        events.remind().unwrap();
        assert_eq!(line.count(), 0);
        events.raise(Event::Cpus).unwrap();
        events.clone().raise(Event::Generation).unwrap();
        events.remind().unwrap();
        assert_eq!((line.count(), events.pending()), (3, 6));
        assert_eq!((events.take(), events.take(), events.pending()), (6, 0, 0));
    }

    #[test]
    fn events_that_do_not_exist_are_not_restored() {
        for bit in 0..8 {
            let restored = Events::new(1 << bit, Arc::new(Counter::default()));
            assert_eq!(restored.is_ok(), bit < 3, "{bit}");
        }
    }
}
