//! The vCPUs as ACPI sees them: a processor container (ACPI0010, ACPI 6.5 section 8.4.2) with a processor
//! device (ACPI0007) for each that the machine can have, and the methods that work the registers.

use acpi_tables::madt::EnabledStatus;
use acpi_tables::{Aml, aml};

use super::{EVENT, NEXT_NONE, OUTCOME, PORTS, STATUS_ASKED_BACK, STATUS_EJECT, STATUS_OFFERED, STATUS_THERE};
use crate::acpi::{self, Raw, bytes};

/// What the notifications mean to a device: look whether it came (device check), and let go of it (eject
/// request): ACPI 6.5 section 5.6.6.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// _STA: present, enabled, shown and working (section 6.3.7).
const STATUS_FINE: u8 = 0xf;

// The registers' names within \_SB.CPUS.
const CPU: &str = "CSEL";
const STATUS: &str = "CSTA";
const NEXT: &str = "CNXT";

/// Describes `count` vCPUs whose registers begin at `base_port`. The event device calls `\_SB.CPUS.CSCN`.
pub fn aml(base_port: u16, count: u32) -> Vec<u8> {
    let hid = aml::Name::new("_HID".into(), &"ACPI0010");
    let methods = [status(), eject(), outcome(), scan(), notify(count)].concat();
    let cpus: Vec<u8> = (0..count).flat_map(cpu).collect();
    let inside = [bytes(&hid), registers(base_port), methods, cpus].concat();
    bytes(&aml::Device::new("CPUS".into(), vec![&Raw(&inside)]))
}

fn registers(base_port: u16) -> Vec<u8> {
    let region = aml::OpRegion::new("CPRG".into(), aml::OpRegionSpace::SystemIO, &base_port, &(PORTS as u8));
    let field = |access, entries| {
        let (lock, update) = (aml::FieldLockRule::NoLock, aml::FieldUpdateRule::WriteAsZeroes);
        bytes(&aml::Field::new("CPRG".into(), access, lock, update, entries))
    };
    let named = aml::FieldEntry::Named;
    let small = vec![named(*b"CSEL", 8), named(*b"CSTA", 8), named(*b"CNXT", 8)];
    let large = vec![aml::FieldEntry::Reserved(8 * EVENT as usize), named(*b"CEVT", 32), named(*b"COUT", 32)];
    const { assert!(OUTCOME == EVENT + 4) };
    // To select and then to work with what was selected must not be torn apart.
    let mutex = aml::Mutex::new("CPLK".into(), 0);
    let fields = [field(aml::FieldAccessType::Byte, small), field(aml::FieldAccessType::DWord, large)];
    [bytes(&region), fields.concat(), bytes(&mutex)].concat()
}

/// A method that holds the lock while it does `steps`, and then does `last`.
fn locked(name: &str, args: u8, steps: &[Vec<u8>], last: &[Vec<u8>]) -> Vec<u8> {
    let (acquire, release) = (aml::Acquire::new("CPLK".into(), u16::MAX), aml::Release::new("CPLK".into()));
    let body = [bytes(&acquire), steps.concat(), bytes(&release), last.concat()].concat();
    bytes(&aml::Method::new(name.into(), args, true, vec![&Raw(&body)]))
}

fn store(register: &str, value: &dyn Aml) -> Vec<u8> {
    bytes(&aml::Store::new(&aml::Path::new(register), value))
}

fn load(local: u8, register: &str) -> Vec<u8> {
    bytes(&aml::Store::new(&aml::Local(local), &aml::Path::new(register)))
}

fn when(value: &dyn Aml, bit: u8, steps: &[Vec<u8>]) -> Vec<u8> {
    let steps = steps.concat();
    bytes(&aml::If::new(&aml::And::new(&aml::ZERO, value, &bit), vec![&Raw(&steps)]))
}

/// CSTT(cpu): what the processor's _STA gives.
fn status() -> Vec<u8> {
    let fine = bytes(&aml::Return::new(&STATUS_FINE));
    let there = when(&aml::Local(0), STATUS_THERE, &[fine]);
    let away = bytes(&aml::Return::new(&aml::ZERO));
    locked("CSTT", 1, &[store(CPU, &aml::Arg(0)), load(0, STATUS)], &[there, away])
}

/// CEJC(cpu): gives a vCPU back.
fn eject() -> Vec<u8> {
    locked("CEJC", 1, &[store(CPU, &aml::Arg(0)), store(STATUS, &STATUS_EJECT)], &[])
}

/// COST(cpu, event, status): passes on what _OST is told.
fn outcome() -> Vec<u8> {
    let steps = [store(CPU, &aml::Arg(0)), store("CEVT", &aml::Arg(1)), store("COUT", &aml::Arg(2))];
    locked("COST", 3, &steps, &[])
}

/// CSCN(): acknowledges and notifies until nothing is pending any more.
fn scan() -> Vec<u8> {
    let (cpu, status) = (aml::Local(0), aml::Local(1));
    let pass_on = |bit: u8, what: u8| {
        let notify = bytes(&aml::MethodCall::new("CTFY".into(), vec![&cpu, &what]));
        when(&status, bit, &[store(STATUS, &bit), notify])
    };
    let each = [
        store(CPU, &cpu),
        load(1, STATUS),
        pass_on(STATUS_OFFERED, DEVICE_CHECK),
        pass_on(STATUS_ASKED_BACK, EJECT_REQUEST),
        load(0, NEXT),
    ]
    .concat();
    let more = aml::NotEqual::new(&cpu, &NEXT_NONE);
    let all = bytes(&aml::While::new(&more, vec![&Raw(&each)]));
    locked("CSCN", 0, &[load(0, NEXT), all], &[])
}

/// CTFY(cpu, what): notifies the processor's device, which AML cannot compute the name of.
fn notify(count: u32) -> Vec<u8> {
    let each = |cpu: u32| {
        let device = aml::Path::new(&name(cpu));
        let notify = aml::Notify::new(&device, &aml::Arg(1));
        bytes(&aml::If::new(&aml::Equal::new(&aml::Arg(0), &(cpu as u8)), vec![&notify]))
    };
    let body: Vec<u8> = (0..count).flat_map(each).collect();
    bytes(&aml::Method::new("CTFY".into(), 2, true, vec![&Raw(&body)]))
}

fn name(cpu: u32) -> String {
    format!("C{cpu:03X}")
}

fn cpu(cpu: u32) -> Vec<u8> {
    let (hid, uid) = (aml::Name::new("_HID".into(), &"ACPI0007"), aml::Name::new("_UID".into(), &cpu));
    // The MADT's entry as it is once the vCPU is there: nobody looks at it before _STA says so, and Linux
    // takes no APIC's number from an entry that is not enabled (`map_lapic_id`).
    let entry = aml::BufferData::new(acpi::local_apic(cpu, EnabledStatus::Enabled));
    let madt = aml::Name::new("_MAT".into(), &entry);
    let number = cpu as u8;
    let status = aml::MethodCall::new("CSTT".into(), vec![&number]);
    let status = aml::Return::new(&status);
    let status = aml::Method::new("_STA".into(), 0, true, vec![&status]);
    let eject = aml::MethodCall::new("CEJC".into(), vec![&number]);
    let eject = aml::Method::new("_EJ0".into(), 1, true, vec![&eject]);
    let outcome = aml::MethodCall::new("COST".into(), vec![&number, &aml::Arg(0), &aml::Arg(1)]);
    let outcome = aml::Method::new("_OST".into(), 3, true, vec![&outcome]);
    let mut inside: Vec<&dyn Aml> = vec![&hid, &uid, &status, &madt, &outcome];
    if cpu != 0 {
        inside.push(&eject);
    }
    bytes(&aml::Device::new(name(cpu).as_str().into(), inside))
}
