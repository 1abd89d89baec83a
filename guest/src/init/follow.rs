//! Following the host: vCPUs, memory and disks that change their number or size while the machine runs.
//!
//! The kernel tells of each by a uevent, as it tells udev on other systems. A vCPU that was added is brought
//! online; so is memory, as *movable*, so that it can be given back; and a root filesystem grows with its disk.
//! Giving back needs nobody: the kernel takes a vCPU offline when ACPI asks it to eject it, and virtio_mem looks
//! after its memory itself.
//!
//! Only what the kernel tells of is touched, so that a vCPU which somebody took offline on purpose stays so;
//! except at the start, and when events were lost: then nobody knows, and all are brought online.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use nix::sys::socket::{MsgFlags, setsockopt, sockopt::RcvBuf};

use super::console::say;
use super::grow;

const CPUS: &str = "/devices/system/cpu";
const MEMORY: &str = "/devices/system/memory";
/// The multicast group of the kernel's own events (udev passes its own on in group 2).
const KERNEL: u32 = 1;
/// The longest uevent: `UEVENT_BUFFER_SIZE` of the kernel, and the path in front.
const EVENT: usize = 8 * 1024;
/// For a burst of events: 16 GiB are 128 blocks of memory.
const BUFFER: usize = 1 << 20;

/// Follows for as long as the machine runs.
pub(super) fn follow() {
    let events = match listen() {
        Ok(events) => events,
        Err(error) => return say(&format!("no events from the kernel, so nothing is brought online: {error}")),
    };
    // After the listener is there, so that nothing is missed in between.
    catch_up();
    let mut event = [0; EVENT];
    loop {
        match recv(events.as_raw_fd(), &mut event, MsgFlags::empty()) {
            Ok(length) => heed(&event[..length]),
            Err(Errno::ENOBUFS) => catch_up(),
            Err(Errno::EINTR) => {}
            Err(error) => return say(&format!("no more events from the kernel: {error}")),
        }
    }
}

fn listen() -> nix::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::Netlink, SockType::Datagram);
    let events = socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkKObjectUEvent)?;
    let _ = setsockopt(&events, RcvBuf, &BUFFER);
    bind(events.as_raw_fd(), &NetlinkAddr::new(0, KERNEL))?;
    Ok(events)
}

/// What an event begins with is `ACTION@PATH` and a zero byte (lib/kobject_uevent.c).
fn heed(event: &[u8]) {
    let head = event.split(|byte| *byte == 0).next().and_then(|head| std::str::from_utf8(head).ok());
    match head.and_then(|head| head.split_once('@')) {
        Some(("add", path)) if is_below(path, CPUS, "cpu") => bring_online(&device(path), "online", "0", "1"),
        Some(("add", path)) if is_below(path, MEMORY, "memory") => online_memory(&device(path)),
        Some(("change", path)) if path.contains("/block/") => grow::root(),
        _ => {}
    }
}

/// Whether the path is that of a thing right below `folder` with this name and a number.
fn is_below(path: &str, folder: &str, name: &str) -> bool {
    let number = path.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/')?.strip_prefix(name));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn device(path: &str) -> PathBuf {
    PathBuf::from(format!("/sys{path}"))
}

fn catch_up() {
    for (folder, name) in [(CPUS, "cpu"), (MEMORY, "memory")] {
        let entries = fs::read_dir(device(folder)).into_iter().flatten().flatten();
        for entry in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
            let path = format!("{folder}/{entry}");
            match name {
                _ if !is_below(&path, folder, name) => {}
                "cpu" => bring_online(&device(&path), "online", "0", "1"),
                _ => online_memory(&device(&path)),
            }
        }
    }
    grow::root();
}

fn online_memory(block: &Path) {
    bring_online(block, "state", "offline", "online_movable");
}

/// Writes `on` to a device's `file` if that says `off`. The first vCPU has no such file.
fn bring_online(device: &Path, file: &str, off: &str, on: &str) {
    let path = device.join(file);
    if !fs::read_to_string(&path).is_ok_and(|now| now.trim() == off) {
        return;
    }
    if let Err(error) = fs::write(&path, on) {
        // Somebody else may have been quicker, or it was taken away again.
        if fs::read_to_string(&path).is_ok_and(|now| now.trim() == off) {
            say(&format!("{}: {error}", path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_vcpus_and_blocks_of_memory_are_meant() {
        assert!(is_below("/devices/system/cpu/cpu12", CPUS, "cpu"));
        assert!(is_below("/devices/system/memory/memory32", MEMORY, "memory"));
        for other in ["/devices/system/cpu", "/devices/system/cpu/cpu", "/devices/system/cpu/cpu1/cache"] {
            assert!(!is_below(other, CPUS, "cpu"), "{other}");
        }
        assert!(!is_below("/devices/system/cpu/cpufreq", CPUS, "cpu"));
        assert!(!is_below("/devices/system/cpu/cpu../../x", CPUS, "cpu"));
        heed(b"");
        heed(b"add@\xff\0");
        heed(b"add");
    }

    #[test]
    fn what_is_off_is_brought_online_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("catnap-online-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for (before, after) in [("offline\n", "online_movable"), ("online\n", "online\n")] {
            fs::write(folder.join("state"), before).unwrap();
            online_memory(&folder);
            assert_eq!(fs::read_to_string(folder.join("state")).unwrap(), after);
        }
        fs::remove_dir_all(&folder).unwrap();
        online_memory(&folder);
    }
}
