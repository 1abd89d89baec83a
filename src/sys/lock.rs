//! Locks on files that go away with their holder, however it ends.
//!
//! These are open-file-description locks (fcntl(2), `F_OFD_SETLK`). Against `flock` they have two advantages:
//! who holds one can be asked without taking it, so that looking never gets in the way of a machine that is
//! about to start; and QEMU's tools use them too, so that `qemu-img` refuses a disk that a machine writes to.
//! QEMU gives each byte from 100 on a meaning of its own, so a shared lock covers the first byte only, which
//! leaves QEMU free to read as well; an exclusive one covers the whole file.
//!
//! A lock belongs to the open file, so a child made by `fork` holds it as well until it closes it or ends. That
//! goes for every program that is started, for the moment between fork and exec; so taking a lock has a little
//! patience, and looking at one may see it for a moment longer than its holder lived.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::files::{At, Error};

/// How long a lock may linger with a program that is just being started.
const PATIENCE: Duration = Duration::from_millis(30);

/// A lock on a file, held for as long as this value lives.
#[derive(Debug)]
pub struct FileLock {
    file: File,
}

impl FileLock {
    /// Takes the lock for this holder alone; `None` when someone else has it. Makes the file when missing.
    pub fn try_exclusive(path: &Path) -> Result<Option<FileLock>, Error> {
        let file = open(path)?;
        Ok(try_lock(&file, libc::F_WRLCK).at("lock", path)?.then_some(FileLock { file }))
    }

    /// Takes the lock beside other shared holders; `None` when someone has it for themselves.
    pub fn try_shared(path: &Path) -> Result<Option<FileLock>, Error> {
        let file = open(path)?;
        Ok(try_lock(&file, libc::F_RDLCK).at("lock", path)?.then_some(FileLock { file }))
    }

    /// Waits until the lock is free and takes it for this holder alone.
    pub fn exclusive(path: &Path) -> Result<FileLock, Error> {
        wait_for(path, libc::F_WRLCK)
    }

    /// Waits until nobody has the lock for themselves and takes it beside other shared holders.
    pub fn shared(path: &Path) -> Result<FileLock, Error> {
        wait_for(path, libc::F_RDLCK)
    }

    /// The locked file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// Locks a file that is open already, for as long as it is: for its holder alone when `exclusive` (it must be
/// open for writing then), otherwise beside other shared holders. `false` when someone is in the way.
pub fn try_lock_open(file: &File, exclusive: bool) -> io::Result<bool> {
    try_lock(file, if exclusive { libc::F_WRLCK } else { libc::F_RDLCK })
}

/// Gives back what [`try_lock_open`] took, with the file left open.
pub fn unlock(file: &File) -> io::Result<()> {
    // The whole file, whatever the lock covered.
    fcntl(file, libc::F_OFD_SETLK, &mut request(libc::F_UNLCK))
}

/// Whether anyone holds a lock on the file. Takes nothing. A missing file is not locked.
pub fn is_locked(path: &Path) -> Result<bool, Error> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other.at("open", path)?,
    };
    let mut lock = request(libc::F_WRLCK);
    fcntl(&file, libc::F_OFD_GETLK, &mut lock).at("ask for the lock of", path)?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

fn open(path: &Path) -> Result<File, Error> {
    // std opens with O_CLOEXEC: a program that we start does not inherit the lock.
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path).at("open", path)
}

fn wait_for(path: &Path, kind: libc::c_int) -> Result<FileLock, Error> {
    let file = open(path)?;
    loop {
        match fcntl(&file, libc::F_OFD_SETLKW, &mut request(kind)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => return other.at("lock", path).map(|()| FileLock { file }),
        }
    }
}

fn try_lock(file: &File, kind: libc::c_int) -> io::Result<bool> {
    let start = Instant::now();
    loop {
        match fcntl(file, libc::F_OFD_SETLK, &mut request(kind)) {
            Ok(()) => return Ok(true),
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => return Err(error),
            Err(_) if start.elapsed() > PATIENCE => return Ok(false),
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn request(kind: libc::c_int) -> libc::flock {
    // From the start (0) to wherever the end may come to be (a length of 0), or the first byte.
    let length = if kind == libc::F_RDLCK { 1 } else { 0 };
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: length,
        l_pid: 0, // must be, for these locks
    }
}

fn fcntl(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and these three commands read and
    // write nothing but the `struct flock` that `lock` points to.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, lock as *mut libc::flock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests start programs at the same time, and those hold our locks for a moment.
    fn soon_free(path: &Path) -> bool {
        (0..500).any(|_| {
            thread::sleep(Duration::from_millis(2));
            !is_locked(path).unwrap()
        })
    }

    #[test]
    fn one_holder_at_a_time_and_looking_takes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(!is_locked(&path).unwrap());
        let held = FileLock::try_exclusive(&path).unwrap().unwrap();
        assert!(is_locked(&path).unwrap());
        assert!(FileLock::try_exclusive(&path).unwrap().is_none());
        assert!(FileLock::try_shared(&path).unwrap().is_none());
        drop(held);
        assert!(soon_free(&path));

        let one = FileLock::try_shared(&path).unwrap().unwrap();
        let _two = FileLock::try_shared(&path).unwrap().unwrap();
        drop(one);
        assert!(is_locked(&path).unwrap());
        assert!(FileLock::try_exclusive(&path).unwrap().is_none());
        drop(FileLock::shared(&path).unwrap());
    }

    #[test]
    fn an_open_file_is_unlocked_without_being_closed() {
        let file = tempfile::tempfile().unwrap();
        let other = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        assert!(try_lock_open(&file, true).unwrap());
        assert!(!try_lock_open(&other, false).unwrap());
        unlock(&file).unwrap();
        assert!(try_lock_open(&other, true).unwrap());
    }

    #[test]
    fn a_killed_holder_gives_its_lock_back_and_its_programs_do_not_inherit_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = FileLock::exclusive(&path).unwrap();
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        drop(held);
        assert!(soon_free(&path));
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
    }
}
