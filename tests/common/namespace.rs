//! A host that looks a little different, for one command.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::ptr::null;

use super::ran::{Ran, command};

/// Runs `catnap` where another file stands in the place of `path`. `None` when this host does not let ordinary
/// users have namespaces (user_namespaces(7)).
///
/// In the new user namespace our user id means nothing, so that nobody, not even root, has any rights there
/// but those that a file gives to everybody or to its owner.
pub fn catnap_with_in_place_of(path: &str, file: &Path, arguments: &[&str]) -> Option<Ran> {
    let [at, file] = [path.as_bytes(), file.as_os_str().as_bytes()].map(|it| CString::new(it).expect("a path"));
    let mut command = command();
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let change = move || {
        // SAFETY: all pointers are null or to strings that the closure owns. This runs in a process that has
        // one thread, which unshare needs, and none of these calls allocates or locks.
        let done = unsafe {
            libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) == 0
                && libc::mount(null(), c"/".as_ptr(), null(), libc::MS_REC | libc::MS_PRIVATE, null()) == 0
                && libc::mount(file.as_ptr(), at.as_ptr(), null(), libc::MS_BIND, null()) == 0
        };
        if done { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: see in the closure.
    let child = unsafe { command.pre_exec(change) }.spawn().ok()?;
    Some(Ran::new(&command, child.wait_with_output().expect("catnap ends")))
}

/// Runs `catnap` where `/dev/shm` is a tmpfs of its own, of so many MiB; a monitor that it starts stays there. `None`
/// as above.
pub fn catnap_with_small_shm(megabytes: u32, arguments: &[&str]) -> Option<Ran> {
    on_a_small_disk(Path::new("/dev/shm"), megabytes, command().args(arguments))
}

/// Runs a program where `folder` is a filesystem of its own, in memory, with room for so many MiB. `None` when
/// this host does not let ordinary users have namespaces.
///
/// Unlike above, our own ids keep their meaning: files are made there.
pub fn on_a_small_disk(folder: &Path, megabytes: u32, command: &mut Command) -> Option<Ran> {
    // SAFETY: both only ask, and always succeed.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let at = CString::new(folder.as_os_str().as_bytes()).expect("a path");
    let options = CString::new(format!("size={megabytes}m,mode=700")).expect("no zeros");
    let maps = [
        (c"/proc/self/setgroups", "deny".to_owned()),
        (c"/proc/self/uid_map", format!("{user} {user} 1")),
        (c"/proc/self/gid_map", format!("{group} {group} 1")),
    ];
    let change = move || {
        // SAFETY: all pointers are null or to strings that the closure owns. This runs in a process that has
        // one thread, which unshare needs, and none of these calls allocates or locks.
        let done = unsafe {
            let write = |(path, text): &(&std::ffi::CStr, String)| {
                let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                file >= 0 && libc::write(file, text.as_ptr().cast(), text.len()) == text.len() as isize
            };
            libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) == 0
                && maps.iter().all(write)
                && libc::mount(null(), c"/".as_ptr(), null(), libc::MS_REC | libc::MS_PRIVATE, null()) == 0
                && libc::mount(c"tmpfs".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast()) == 0
        };
        if done { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: see in the closure.
    let child = unsafe { command.pre_exec(change) }.spawn().ok()?;
    Some(Ran::new(command, child.wait_with_output().expect("it ends")))
}
