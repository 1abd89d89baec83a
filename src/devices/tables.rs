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

/// Runs methods, with every port reading as `ports`.
fn evaluate(folder: &Path, methods: &[&str], ports: u8) -> String {
    let commands: Vec<String> = methods.iter().map(|method| format!("evaluate {method}")).collect();
    run(folder, "acpiexec", &["-di", "-to", "5", "-fv", &ports.to_string(), "-b", &commands.join(";"), "dsdt.aml"])
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
    let check = |ports, wanted: &[(&str, &str)]| {
        let methods: Vec<&str> = wanted.iter().map(|(method, _)| *method).collect();
        let said = evaluate(folder.path(), &methods, ports);
        let answers: Vec<&str> = said.split("Evaluating ").skip(1).collect();
        assert_eq!(answers.len(), wanted.len(), "{said}");
        for (answer, (method, want)) in answers.iter().zip(wanted) {
            assert!(answer.contains(want) && !answer.contains("Exception"), "{method} with {ports:#x}: {answer}");
        }
    };
    let integer = |value: u64| format!("[Integer] = {value:016X}");
    let (away, fine, address) = (integer(0), integer(0xf), integer(layout::GENERATION));
    check(1, &[("\\_SB.CPUS.C005._STA", &fine)]);
    check(6, &[("\\_SB.CPUS.C005._STA", &away)]);
    let (five, last) = (integer(5), integer(63));
    check(
        0,
        &[
            ("\\_SB.CPUS.C005._STA", &away),
            ("\\_SB.CPUS.C005._UID", &five),
            ("\\_SB.CPUS.C03F._UID", &last),
            ("\\_SB.CPUS.C005._MAT", "00 08 05 05 01 00 00 00"),
            ("\\_SB.VGEN.ADDR", &address),
        ],
    );
    let nothing = "No object was returned";
    check(
        0xff,
        &[
            ("\\_SB.CPUS.CSCN", nothing),
            ("\\_SB.CPUS.C001._EJ0 1", nothing),
            ("\\_SB.CPUS.C001._OST 3 0 0", nothing),
            ("\\_SB.GED._EVT 9", nothing),
        ],
    );
}
