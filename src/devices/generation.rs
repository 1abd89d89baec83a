//! The generation ID of the virtual machine: 128 bits in guest memory that change when the guest's time is
//! not a straight line any more, because a snapshot of it runs for a second time.
//!
//! Linux mixes a changed ID into its random numbers (drivers/virt/vmgenid.c, since 5.18), so that two clones
//! do not draw the same keys. It finds the device by either of two compatible IDs: VM_Gen_Counter, which is
//! Microsoft's specification's and which ACPICA turns into capitals as the driver has it, and VMGENCTR, which
//! Hyper-V says since. It looks at the memory when it is notified.

use std::io;

use acpi_tables::aml;
use vm_memory::{Bytes, GuestAddress};

use super::events::{Event, Events};
use crate::acpi;
use crate::mem::{GuestMemory, layout};

/// A generation's ID. Its bytes mean nothing but "the same" or "another"; they must be random.
pub type Id = [u8; 16];

/// Writes the ID where [`aml`] says that it is. To be done before the guest first runs, and before it runs
/// for a second time.
pub fn write(mem: &GuestMemory, id: &Id) -> io::Result<()> {
    mem.write_slice(id, GuestAddress(layout::GENERATION)).map_err(io::Error::other)
}

/// Writes another ID and tells a guest that has run before.
pub fn change(mem: &GuestMemory, id: &Id, events: &Events) -> io::Result<()> {
    write(mem, id)?;
    events.raise(Event::Generation)
}

/// Describes the ID to ACPI: `ADDR` has the lower and the upper half of its address.
pub fn aml() -> Vec<u8> {
    let hid = aml::Name::new("_HID".into(), &"CTNP0001");
    let compatible = aml::Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]);
    let cid = aml::Name::new("_CID".into(), &compatible);
    let ddn = aml::Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (layout::GENERATION as u32, (layout::GENERATION >> 32) as u32);
    let halves = aml::Package::new(vec![&low, &high]);
    let address = aml::Name::new("ADDR".into(), &halves);
    acpi::bytes(&aml::Device::new("VGEN".into(), vec![&hid, &cid, &ddn, &address]))
}

// It lies beyond all tables, whole.
const _: () = assert!(layout::GENERATION >= layout::ACPI_START + layout::ACPI_TABLES_LIMIT);
const _: () = assert!(layout::GENERATION + size_of::<Id>() as u64 <= layout::ACPI_END);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::devices::testing::Counter;

    #[test]
    fn a_changed_id_is_in_memory_before_the_guest_is_told() {
        let mem = crate::mem::from_ranges(&layout::ram(2 << 20)).unwrap();
        let line = Arc::new(Counter::default());
        let events = Events::new(0, line.clone()).unwrap();
        write(&mem, &[7; 16]).unwrap();
        assert_eq!((line.count(), events.pending()), (0, 0));
        change(&mem, &[9; 16], &events).unwrap();
        assert_eq!(mem.read_obj::<Id>(GuestAddress(layout::GENERATION)).unwrap(), [9; 16]);
        assert_eq!((line.count(), events.pending()), (1, Event::Generation as u8));

        // A guest that is not told of an ID that is not there is at least not told of one that is not new.
        let none = crate::mem::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert!(change(&none, &[9; 16], &events).is_err());
        assert_eq!(line.count(), 1);
    }
}
