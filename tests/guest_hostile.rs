//! A guest whose root is up to no good: it may harm its own machine, but not the monitor, whose memory stays
//! bounded. The devices' own tests do the same to each field; here it goes through KVM.

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use common::hardware::{Page, Ports, Registers};
use common::monitor::own_memory;
use common::{Machine, inside, machine};

const TEST: &str = "a_hostile_guest_harms_only_itself";
/// What a monitor may hold besides its guest's memory, in KiB.
const BOUND: u64 = 24 << 10;

#[test]
fn a_hostile_guest_harms_only_itself() {
    match inside::here().as_deref() {
        Some("ports") => return abuse_ports(),
        Some("registers") => return abuse_registers(),
        Some("rings") => return abuse_rings(),
        Some("vsock") => return flood_vsock(),
        Some("console") => return flood_console(),
        _ => {}
    }
    // Root reaches the ports, and devices that no driver has may be mapped.
    let options = ["--append", "iomem=relaxed"];
    let mallory = machine("mallory").cpus(2).publish(80).with(options).stock_kernel().boot();
    each!(mallory; out_of_range_ports, out_of_range_registers, malformed_rings, a_vsock_flood, a_console_flood);
    mallory.stop();
    mallory.disk_is_sound();
}

fn attack(mallory: &Machine, how: &str) {
    let pid = mallory.pid();
    let said = mallory.other_half(TEST, how).text();
    said.lines().filter(|line| line.starts_with("    ")).for_each(|line| println!("{line}"));
    assert_eq!((mallory.state().as_str(), mallory.pid()), ("running", pid));
    assert!(mallory.get("/").text().contains("kitten"));
    let own = own_memory(pid, 256);
    println!("    the monitor's own memory: {own} KiB");
    assert!(own < BOUND, "the monitor has {own} KiB");
}

fn out_of_range_ports(mallory: &Machine) {
    attack(mallory, "ports");
}

fn out_of_range_registers(mallory: &Machine) {
    unbind_rng(mallory);
    attack(mallory, "registers");
}

fn malformed_rings(mallory: &Machine) {
    attack(mallory, "rings");
    // After a reset, the device is as good as new.
    mallory.sh("echo $(cat /tmp/rng) >/sys/bus/platform/drivers/virtio-mmio/bind");
    assert_eq!(mallory.sh("head -c 8 /dev/hwrng | wc -c"), "8");
}

/// Takes the second slot's device, which does no harm to anybody else, from its driver.
fn unbind_rng(mallory: &Machine) {
    mallory.sh("device=$(readlink -f /sys/class/misc/hw_random/device 2>/dev/null)
         for device in /sys/bus/platform/drivers/virtio-mmio/LNRO0005:*; do
             grep -q 0x0004 $device/virtio*/device && basename $device >/tmp/rng
         done
         cat /tmp/rng >/sys/bus/platform/drivers/virtio-mmio/unbind");
}

fn a_vsock_flood(mallory: &Machine) {
    attack(mallory, "vsock");
}

fn a_console_flood(mallory: &Machine) {
    attack(mallory, "console");
    assert!(mallory.console_log().contains("the end of the flood"));
}

// --- in the guest ---

/// Random numbers that are the same in each run (xorshift, Marsaglia 2003).
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// The last port at which four bytes can be had.
const LAST_PORT: u16 = 0xfffc;

fn abuse_ports() {
    let (ports, mut state) = (Ports::all(), 0x00ca_7ca7);
    for port in (0..0x800).chain((0x800..=LAST_PORT).step_by(97)) {
        let _ = ports.read(port);
    }
    // Nobody is here; and the edges of those who are, with accesses that are too wide and reach beyond them.
    for port in
        (0x200..0x2f8).chain([0x5c, 0x5d, 0x5f, 0x6f, 0x3f5, 0x3f7, 0x5ff, 0x608, 0x609]).chain(0xff00..=LAST_PORT)
    {
        ports.write(port, random(&mut state) as u32);
    }
    // Wide accesses to devices made for bytes. Zeros, as other values would turn the machine off.
    for port in [0x60, 0x61, 0x63, 0x64, 0x70, 0x71, 0x600, 0x601, 0x603, 0x606, 0x607] {
        ports.write(port, 0);
    }
    ports.write_string(0x80, &[0; 4096]);
    ports.write_string(0x3f8, &[b'.'; 4096]);
}

fn abuse_registers() {
    let rng = rng_registers();
    assert_eq!(rng.read::<u32>(0), u32::from_le_bytes(*b"virt"));
    let mut state = 0x00ca_7ca7;
    for round in 0..3000 {
        let offset = (random(&mut state) % if round % 2 == 0 { 0x200 } else { 0xff8 }) as usize;
        let value = random(&mut state);
        match random(&mut state) % 8 {
            0 => drop(rng.read::<u8>(offset)),
            1 => drop(rng.read::<u16>(offset)),
            2 => drop(rng.read::<u32>(offset)),
            3 => drop(rng.read::<u64>(offset)),
            4 => rng.write(offset, value as u8),
            5 => rng.write(offset, value as u16),
            6 => rng.write(offset & !3, value as u32),
            _ => rng.write(offset, value),
        }
    }
    // Where nobody is: between the slots, in the hole, and far above all RAM.
    for address in [0xc000_0000, 0xd000_e000, 0xdfff_f000, 0xfed0_0000, 0xffff_f000, 1 << 36, (1 << 39) - 4096] {
        let nothing = Registers::at(address);
        nothing.write(0, 0x00ca_7ca7_u32);
        assert_eq!(nothing.read::<u64>(8), u64::MAX, "{address:#x}");
    }
}

fn rng_registers() -> Registers {
    let name = std::fs::read_to_string("/tmp/rng").expect("the device's name");
    let resource = std::fs::read_to_string("/proc/iomem").expect("the address map");
    let line = resource.lines().find(|line| line.contains(name.trim())).expect("the device's registers");
    let start = line.trim().split('-').next().and_then(|start| u64::from_str_radix(start, 16).ok());
    Registers::at(start.expect("an address"))
}

// Registers of virtio-mmio (virtio 1.2, section 4.2.2).
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SELECT: usize = 0x24;
const QUEUE_SIZE: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const STATUS: usize = 0x70;
const NEEDS_RESET: u32 = 64;
const QUEUE_ADDRESSES: [usize; 3] = [0x80, 0x90, 0xa0];

/// Rings whose every word is random, or nearly right.
fn abuse_rings() {
    let (rng, mut state) = (rng_registers(), 0x00ca_7ca7);
    let (mut worked, mut broken) = (0, 0);
    let pages = [Page::new(), Page::new(), Page::new()];
    let somewhere = [
        pages[0].address,
        pages[1].address,
        pages[2].address,
        0,
        0xd000_0000,
        (256 << 20) - 64,
        1 << 40,
        u64::MAX - 15,
    ];
    let [table, avail, used] = pages;
    for round in 0..400 {
        rng.write(STATUS, 0u32);
        for step in [1u32, 3] {
            rng.write(STATUS, step);
        }
        rng.write(DRIVER_FEATURES_SELECT, 1u32);
        rng.write(DRIVER_FEATURES, 1u32);
        rng.write(DRIVER_FEATURES_SELECT, 0u32);
        // Indirect descriptors and event indices, or not.
        rng.write(DRIVER_FEATURES, (random(&mut state) as u32) & (3 << 28));
        rng.write(STATUS, 11u32);
        let size = if round % 4 == 0 { random(&mut state) as u32 } else { 1 << (random(&mut state) % 8) };
        rng.write(QUEUE_SIZE, size);
        for (register, page) in QUEUE_ADDRESSES.into_iter().zip([&table, &avail, &used]) {
            let at = if round % 3 == 0 { somewhere[random(&mut state) as usize % 8] } else { page.address };
            rng.write(register, at as u32);
            rng.write(register + 4, (at >> 32) as u32);
        }
        // Descriptors: address, then length, flags (next, write, indirect) and the next one's number.
        for descriptor in table.words.chunks_exact_mut(2) {
            descriptor[0] = somewhere[random(&mut state) as usize % 8];
            let length = if random(&mut state).is_multiple_of(2) { 4096 } else { random(&mut state) & 0xffff_ffff };
            descriptor[1] = length | (random(&mut state) & 7) << 32 | (random(&mut state) % 256) << 48;
        }
        avail.words.iter_mut().for_each(|word| *word = random(&mut state) & 0x00ff_00ff_00ff_00ff);
        avail.words[0] = random(&mut state) & 0x00ff_00ff_00ff_0000 | (1 + round % 130) << 16;
        rng.write(QUEUE_READY, 1u32);
        rng.write(STATUS, 15u32);
        rng.write(QUEUE_NOTIFY, 0u32);
        rng.write(QUEUE_NOTIFY, random(&mut state) as u32);
        // Some are changed or taken away while the device may be at work.
        if round % 5 == 0 {
            table.words.fill(random(&mut state));
        }
        // Some have been given to the device by then, some are taken from it in the middle.
        std::thread::sleep(Duration::from_millis(round % 3));
        // SAFETY: a word of our own page, into which the device may write.
        worked += usize::from(unsafe { std::ptr::read_volatile(&used.words[0]) } != 0);
        used.words[0] = 0;
        broken += usize::from(rng.read::<u32>(STATUS) & NEEDS_RESET != 0);
    }
    rng.write(STATUS, 0u32);
    println!("    of 400 rings {worked} were worked off in part or whole, and {broken} found to make no sense");
    assert!(worked > 0 && broken > 0);
}

/// A connection over vsock to the host.
fn connect_to_host(port: u32) -> std::io::Result<std::fs::File> {
    // SAFETY: socket touches no memory.
    let descriptor = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    assert!(descriptor >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
    // SAFETY: all zeros are a valid address.
    let mut host: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    (host.svm_family, host.svm_port, host.svm_cid) = (libc::AF_VSOCK as u16, port, libc::VMADDR_CID_HOST);
    let length = size_of_val(&host) as u32;
    // SAFETY: the pointer is to an address of that length.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const host).cast(), length) } {
        0 => Ok(socket.into()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn flood_vsock() {
    let begin = Instant::now();
    // Nobody listens there.
    (0..300).for_each(|n| assert!(connect_to_host(2000 + n * 7919).is_err()));
    println!("    300 refusals in {:?}", begin.elapsed());
    // Here the host waits for a line, and never gets its end.
    let begin = Instant::now();
    let mut open = Vec::new();
    for _ in 0..500 {
        let Ok(mut stream) = connect_to_host(1024) else { continue };
        let timeout = libc::timeval { tv_sec: 0, tv_usec: 1000 };
        // SAFETY: the pointer is to a timeval of that length.
        let set = unsafe {
            let length = size_of_val(&timeout) as u32;
            libc::setsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_SNDTIMEO,
                (&raw const timeout).cast(),
                length,
            )
        };
        assert_eq!(set, 0);
        // As much as it takes, which is not much.
        let _ = stream.write_all(&[b'x'; 1 << 20]);
        open.push(stream);
    }
    println!("    {} connections in {:?}", open.len(), begin.elapsed());
    // And all of that with those who come, write a little and go at once.
    while begin.elapsed() < Duration::from_secs(5) {
        let _ = connect_to_host(1024).map(|mut stream| stream.write_all(b"{").and_then(|()| stream.read(&mut [0; 1])));
    }
}

fn flood_console() {
    let mut console = std::fs::File::options().write(true).open("/dev/ttyS0").expect("the console");
    let begin = Instant::now();
    let noise: Vec<u8> = (0..1024).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 9) as u8).collect();
    while begin.elapsed() < Duration::from_secs(3) {
        console.write_all(&noise).expect("the console takes it");
    }
    console.write_all(b"\nthe end of the flood\n").expect("the console takes it");
}
