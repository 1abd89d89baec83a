//! What a Linux system expects to find once its root is there.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::console::say;
use super::root::Options;
use crate::facts;
use crate::machine;
use crate::protocol::Identity;

/// Descriptors: two for each forward, one for each visitor, and some.
const DESCRIPTORS: u64 = 65536;
const MACHINE_ID: &str = "/etc/machine-id";

/// Makes the machine usable.
pub(super) fn down(options: &Options) {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    tmpfs("tmpfs", "/tmp", plain, "mode=1777");
    tmpfs("tmpfs", "/dev/shm", plain, "mode=1777");
    tmpfs("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666");
    for (name, to) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let _ = std::os::unix::fs::symlink(format!("/proc/self/fd{to}"), format!("/dev/{name}"));
    }
    let note = |what: &str, result: Result<(), String>| {
        if let Err(why) = result {
            say(&format!("{what}: {why}"));
        }
    };
    note("lo", loopback_up().map_err(|error| error.to_string()));
    let named = options.hostname.clone().or_else(|| fs::read_to_string("/etc/hostname").ok());
    let name = named.as_deref().map(str::trim).filter(|name| !name.is_empty()).unwrap_or("kitten");
    note("host name", nix::unistd::sethostname(name).map_err(|error| error.to_string()));
    let identity = options.machine_id.as_ref();
    let identity = identity.map(|id| Identity { machine_id: id.clone(), hostname: name.into() });
    // Before the site serves anybody.
    note("identity", machine::settle(identity.as_ref(), &options.settings));
    note(
        "descriptors",
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).map_err(|error| error.to_string()),
    );
    // SAFETY: umask touches no memory.
    unsafe { libc::umask(0o022) };
    // Ctrl-Alt-Del sends us SIGINT in place of resetting the machine on the spot.
    let _ = nix::sys::reboot::set_cad_enabled(false);
}

/// What nobody waits for: a machine id of its own for a disk that has none yet.
pub(super) fn later() {
    if fs::read_to_string(MACHINE_ID).is_ok_and(|id| !id.trim().is_empty()) {
        return;
    }
    // A root that cannot be written to goes without.
    let _ = fs::write(MACHINE_ID, facts::random_hex() + "\n");
}

fn tmpfs(kind: &str, at: &str, flags: MsFlags, data: &str) {
    let _ = fs::create_dir(at);
    if let Err(error) = mount(Some(kind), at, Some(kind), flags, Some(data)) {
        say(&format!("{at}: {error}"));
    }
}

/// Brings up the loopback interface; its address comes with it.
fn loopback_up() -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the kernel reads one ifreq through the pointer, which is valid for that.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
