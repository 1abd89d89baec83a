//! ACPI tables (ACPI 6.5): pure functions from a description of the machine to bytes.
//!
//! The machine is a *hardware-reduced* one (section 4.1): no SCI, no fixed registers but those for sleep and
//! reset, and events by a Generic Event Device, which the DSDT describes like everything else.

use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::{Aml, aml, fadt, madt, rsdp, sdt, xsdt};

/// The OEM of our tables; identifies nobody but us.
const OEM_ID: [u8; 6] = *b"CATNAP";
const OEM_TABLE_ID: [u8; 8] = *b"CATNAPVM";

/// What the tables must say of a machine.
pub struct Description {
    /// vCPUs that are there at boot, whose local APICs have the IDs 0 to `cpus` - 1.
    pub cpus: u32,
    /// vCPUs that there can ever be, at most 255, whose IDs go on from there.
    pub max_cpus: u32,
    /// Address of the local APICs' registers.
    pub local_apic: u32,
    /// Address of the I/O APIC's registers; its 24 inputs are the interrupts 0 to 23.
    pub io_apic: u32,
    /// Ports of the sleep control, sleep status and reset registers (sections 4.8.3.7 and 4.8.3.6), each a byte.
    pub sleep_control: u16,
    /// See `sleep_control`.
    pub sleep_status: u16,
    /// See `sleep_control`. Writing [`RESET_VALUE`] resets.
    pub reset: u16,
    /// The devices' own descriptions, as AML inside of `\_SB`.
    pub devices: Vec<u8>,
}

/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that stands for S5, soft off, in the sleep control register.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Builds all tables, to be placed at the guest address `base` (aligned to 16). The RSDP comes first.
pub fn build(description: &Description, base: u64) -> Vec<u8> {
    // The RSDP points forward to the XSDT, and that to the rest: lay out the rest first, behind room for both.
    const RSDP_ROOM: usize = 64;
    const XSDT_ROOM: usize = 64;
    let mut tables = vec![0; RSDP_ROOM + XSDT_ROOM];
    let mut place = |table: &[u8]| {
        tables.resize(tables.len().next_multiple_of(16), 0);
        let at = base + tables.len() as u64;
        tables.extend_from_slice(table);
        at
    };
    let dsdt = place(&dsdt(&description.devices));
    let fadt = place(&bytes(&fadt(description, dsdt)));
    let madt = place(&madt(description));

    let mut xsdt = xsdt::XSDT::new(OEM_ID, OEM_TABLE_ID, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = bytes(&xsdt);
    let rsdp = bytes(&rsdp::Rsdp::new(OEM_ID, base + RSDP_ROOM as u64));
    tables[..rsdp.len()].copy_from_slice(&rsdp);
    tables[RSDP_ROOM..][..xsdt.len()].copy_from_slice(&xsdt);
    tables
}

/// AML as bytes.
pub fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// AML that is bytes already, to be put among other terms.
pub struct Raw<'a>(pub &'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.0);
    }
}

fn dsdt(devices: &[u8]) -> Vec<u8> {
    // Table revision 2: integers of 64 bits.
    let mut dsdt = sdt::Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, 1);
    let devices = Raw(devices);
    dsdt.append_slice(&bytes(&aml::Scope::new("\\_SB_".into(), vec![&devices])));
    // \_S5: what to write to the sleep control register to turn off (section 7.4.2).
    let s5 = aml::Package::new(vec![&SLEEP_TYPE_S5]);
    dsdt.append_slice(&bytes(&aml::Name::new("\\_S5_".into(), &s5)));
    dsdt.as_slice().to_vec()
}

fn fadt(description: &Description, dsdt: u64) -> fadt::FADT {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = fadt::FADTBuilder::new(OEM_ID, OEM_TABLE_ID, 1)
        .dsdt_64(dsdt)
        .flag(fadt::Flags::HwReducedAcpi)
        .flag(fadt::Flags::ResetRegSup)
        .flag(fadt::Flags::Headless);
    fadt.sleep_control_reg = port(description.sleep_control);
    fadt.sleep_status_reg = port(description.sleep_status);
    fadt.reset_reg = port(description.reset);
    fadt.reset_value = RESET_VALUE;
    // IA-PC boot architecture flags (table 5.11): no VGA to probe (bit 2), no MSI (bit 3), no ASPM (bit 4);
    // no 8042 (bit 1 clear), and an RTC that is really there (bit 5 clear).
    fadt.iapc_boot_arch = (1 << 2 | 1 << 3 | 1 << 4).into();
    fadt.finalize()
}

/// The MADT is written here, because the crate's claims to be of revision 1. Operating systems heed the flag
/// Online Capable only in a MADT of revision 5 or in tables of ACPI 6.3 and later, and Linux makes room for no
/// vCPU that is neither enabled nor online capable (`acpi_is_processor_usable` in arch/x86/kernel/acpi/boot.c,
/// which looked at the MADT's revision before 6.3 and looks at the FADT's since).
fn madt(description: &Description) -> Vec<u8> {
    const REVISION: u8 = 5;
    let mut madt = sdt::Sdt::new(*b"APIC", 36, REVISION, OEM_ID, OEM_TABLE_ID, 1);
    madt.append_slice(&description.local_apic.to_le_bytes());
    madt.append_slice(&[0; 4]); // flags: there are no 8259 interrupt controllers
    for cpu in 0..description.max_cpus {
        let later = madt::EnabledStatus::DisabledOnlineCapable;
        let status = if cpu < description.cpus { madt::EnabledStatus::Enabled } else { later };
        madt.append_slice(&local_apic(cpu, status));
    }
    madt.append_slice(&bytes(&madt::IoApic::new(0, description.io_apic, 0)));
    madt.as_slice().to_vec()
}

/// The MADT's entry for one vCPU (section 5.2.12.2, Processor Local APIC Structure), with one number for processor
/// and APIC.
///
/// # Panics
/// Beyond 255 vCPUs, of which this structure cannot speak.
pub fn local_apic(cpu: u32, status: madt::EnabledStatus) -> Vec<u8> {
    let id = u8::try_from(cpu).expect("a machine has 64 vCPUs at most");
    bytes(&madt::ProcessorLocalApic::new(id, id, status))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables() -> Vec<u8> {
        let description = Description {
            cpus: 3,
            max_cpus: 64,
            local_apic: 0xfee0_0000,
            io_apic: 0xfec0_0000,
            sleep_control: 0x600,
            sleep_status: 0x601,
            reset: 0x602,
            devices: bytes(&aml::Device::new("TEST".into(), vec![])),
        };
        build(&description, 0xe_0000)
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        let tables = tables();
        let table = |address: u64| {
            let start = (address - 0xe_0000) as usize;
            let length = u32::from_le_bytes(tables[start + 4..start + 8].try_into().unwrap()) as usize;
            let table = &tables[start..start + length];
            assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "{:?}", &table[..4]);
            table
        };
        assert_eq!(&tables[..8], b"RSD PTR ");
        assert_eq!(tables[..20].iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        assert_eq!(tables[..36].iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        let xsdt = table(u64_at(&tables, 24));
        let (fadt, madt) = (table(u64_at(xsdt, 36)), table(u64_at(xsdt, 44)));
        assert_eq!((&fadt[..4], &madt[..4]), (b"FACP".as_slice(), b"APIC".as_slice()));
        // X_DSDT is at offset 140 of the FADT (table 5.9); 64 local APICs of 8 bytes and one I/O APIC of 12.
        assert_eq!(&table(u64_at(fadt, 140))[..4], b"DSDT");
        assert_eq!(madt.len(), 44 + 64 * 8 + 12);
        // Revisions by which Linux believes in the flag Online Capable (bit 1) beside Enabled (bit 0).
        assert_eq!((madt[8], fadt[8], fadt[131]), (5, 6, 5));
        let cpus: Vec<_> =
            madt[44..44 + 64 * 8].chunks(8).map(|entry| (entry[0], entry[1], entry[2], entry[3])).collect();
        assert_eq!(cpus, (0..64).map(|id| (0, 8, id, id)).collect::<Vec<_>>());
        let flags: Vec<_> = madt[44..44 + 64 * 8].chunks(8).map(|entry| entry[4]).collect();
        assert_eq!(flags, [vec![1; 3], vec![2; 61]].concat());
    }
}
