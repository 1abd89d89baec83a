//! What ACPICA, the interpreter of Linux and of others, makes of all devices' AML: `iasl` takes it apart and
//! puts it together again, and `acpiexec` runs its methods over simulated ports.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::virtio::{self, mmio};
use super::{cpus, generation, power, rtc, serial};
use crate::acpi::{self, Description};
use crate::mem::layout;

const CPUS: u32 = 64;

/// The tables of a machine with everything in it, and the offset of its DSDT.
fn tables() -> (Vec<u8>, usize) {
    let slots = (0..14).flat_map(|slot| virtio::aml(slot, 0xd000_0000 + u64::from(slot) * mmio::LENGTH, 10 + slot));
    let devices = [
        serial::aml(0x3f8, 4),
        rtc::aml(0x70),
        power::aml(0x600, 9),
        cpus::aml(0x608, CPUS),
        generation::aml(),
        slots.collect(),
    ];
    let tables = acpi::build(
        &Description {
            cpus: 1,
            max_cpus: CPUS,
            local_apic: layout::LOCAL_APIC as u32,
            io_apic: layout::IOAPIC as u32,
            sleep_control: 0x600,
            sleep_status: 0x601,
            reset: 0x602,
            devices: devices.concat(),
        },
        layout::ACPI_START,
    );
    let dsdt = tables.windows(4).position(|name| name == b"DSDT").unwrap();
    (tables, dsdt)
}

fn dsdt() -> Vec<u8> {
    let (tables, at) = tables();
    let length = u32::from_le_bytes(tables[at + 4..at + 8].try_into().unwrap()) as usize;
    tables[at..at + length].to_vec()
}

/// What a tool says, standard output and error together.
fn run(folder: &Path, tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool).current_dir(folder).args(arguments).output();
    let output =
        output.unwrap_or_else(|error| panic!("{tool} cannot be run, try: apt-get install acpica-tools: {error}"));
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{tool} {arguments:?}: {said}");
    said
}

/// Runs a method, with every port reading as `ports`.
fn evaluate(folder: &Path, method: &str, ports: u8) -> String {
    let (fill, command) = (format!("{ports:#x}"), format!("evaluate {method}"));
    run(folder, "acpiexec", &["-di", "-to", "5", "-fv", &fill, "-b", &command, "dsdt.aml"])
}

#[test]
fn the_largest_tables_leave_the_generation_id_alone() {
    let (tables, _) = tables();
    assert!((tables.len() as u64) < layout::ACPI_TABLES_LIMIT / 2, "{} bytes", tables.len());
}

#[test]
fn the_devices_can_be_read_and_written_again_as_source() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("dsdt.aml"), dsdt()).unwrap();
    run(folder.path(), "iasl", &["-d", "dsdt.aml"]);
    let source = fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap();
    assert!(!source.contains("External"), "something is named that is not there");
    for device in ["CPUS", "C000", "C001", "C03F", "VGEN", "GED", "PWRB", "VR0D"] {
        assert!(source.contains(&format!("Device ({device})")), "{device}");
    }
    assert_eq!(source.matches("Method (_EJ0").count(), CPUS as usize - 1, "vCPU 0 cannot go");
    let said = run(folder.path(), "iasl", &["-p", "again", "dsdt.dsl"]);
    assert!(said.contains("0 Errors"), "{said}");
}

#[test]
fn methods_run_and_understand_the_registers() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("dsdt.aml"), dsdt()).unwrap();
    let integer = |value: u64| format!("[Integer] = {value:016X}");
    let check = |method: &str, ports: u8, want: &str| {
        let said = evaluate(folder.path(), method, ports);
        assert!(said.contains(want), "{method} with {ports:#x}: {said}");
    };
    check("\\_SB.CPUS.C005._STA", 0, &integer(0));
    check("\\_SB.CPUS.C005._STA", 1, &integer(0xf));
    check("\\_SB.CPUS.C005._STA", 6, &integer(0));
    check("\\_SB.CPUS.C005._UID", 0, &integer(5));
    check("\\_SB.CPUS.C005._MAT", 0, "00 08 05 05 01 00 00 00");
    // The last one, whose number must not be read as a sign.
    check("\\_SB.CPUS.C03F._UID", 0, &integer(63));
    check("\\_SB.VGEN.ADDR", 0, &integer(layout::GENERATION));
    for method in ["\\_SB.CPUS.CSCN", "\\_SB.CPUS.C001._EJ0 1", "\\_SB.CPUS.C001._OST 3 0 0", "\\_SB.GED._EVT 9"] {
        let said = evaluate(folder.path(), method, 0xff);
        assert!(said.contains("No object was returned") && !said.contains("Exception"), "{method}: {said}");
    }
}
