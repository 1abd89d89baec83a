//! A host that looks a little different, for one command.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
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

/// Runs `catnap` where `/dev/shm` is a tmpfs of its own, of that size; a monitor that it starts stays there. `None` as
/// above. Our user and group keep their numbers, so that files have an owner.
pub fn catnap_with_small_shm(size: &str, arguments: &[&str]) -> Option<Ran> {
    let options = CString::new(format!("size={size},mode=1777")).expect("options");
    // SAFETY: neither touches memory.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let map = |id: u32| CString::new(format!("{id} {id} 1")).expect("a map");
    let files = [
        (c"/proc/self/uid_map", map(user)),
        (c"/proc/self/setgroups", c"deny".into()),
        (c"/proc/self/gid_map", map(group)),
    ];
    let mut command = command();
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let change = move || {
        // SAFETY: all pointers are null or to strings that the closure owns, with their lengths; as above.
        let done = unsafe {
            libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) == 0
                && files.iter().all(|(path, text)| {
                    let file = libc::open(path.as_ptr(), libc::O_WRONLY);
                    let length = text.as_bytes().len();
                    libc::write(file, text.as_ptr().cast(), length) == length as isize && libc::close(file) == 0
                })
                && libc::mount(null(), c"/".as_ptr(), null(), libc::MS_REC | libc::MS_PRIVATE, null()) == 0
                && libc::mount(c"shm".as_ptr(), c"/dev/shm".as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast())
                    == 0
        };
        if done { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: see in the closure.
    let child = unsafe { command.pre_exec(change) }.spawn().ok()?;
    Some(Ran::new(&command, child.wait_with_output().expect("catnap ends")))
}
