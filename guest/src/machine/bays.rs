//! Disks that live in the host's memory: in bays of this machine, known by their serial numbers, from which they come
//! and go. Here a blank one gets a filesystem and is mounted, and one that is to go is let go of.
//!
//! The filesystem has no journal. There is nothing that one could be played back after: whatever ends the machine
//! ends the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount as mount_it, umount2};

use super::hooks;
use super::mounts::{Mount, mounts};
use crate::protocol::WakeDisk;

/// How long a medium may take to be seen by the kernel after it was put in, ...
const APPEARING: Duration = Duration::from_secs(10);
/// ... making a filesystem may take, ...
const FORMATTING: Duration = Duration::from_secs(40);
/// ... and those may take who look at a file of the disk just now.
const LETTING_GO: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(10);
/// How often a filesystem is tried to be made, while the kernel still learns of the medium.
const TRIES: u32 = 3;

/// Says, for as long as this boot lasts, that what was on a disk is lost.
pub const LOST: &str = "/run/catnap-notes-lost";

// Documentation/filesystems/ext4/super.rst: the superblock lies at 1024, and its magic number, 0xef53, at 0x38 of it.
const MAGIC_AT: usize = 1024 + 0x38;
const MAGIC: [u8; 2] = [0x53, 0xef];
/// So much at the beginning tells a blank disk from others.
const LOOKED_AT: usize = 64 << 10;
const SECTOR: u64 = 512;

// fs/ext4/ext4.h: EXT4_IOC_SHUTDOWN is _IOR('X', 125, __u32); with this flag nothing more is written.
const SHUTDOWN: libc::Ioctl = 0x8004_587du32 as libc::Ioctl;
const NO_FLUSH: u32 = 2;

/// Mounts the disk in a bay, `size` bytes of it, after making a filesystem on it if it is blank.
pub(super) fn mount(bay: &str, at: &str, size: u64) -> Result<(), String> {
    let at = Path::new(at);
    if !at.is_absolute() {
        return Err(format!("{} is no absolute path", at.display()));
    }
    let disk = find(bay)?;
    if mounted(&disk).iter().any(|mount| mount.at == at) {
        return Ok(());
    }
    until(APPEARING, || read_number(&disk.sysfs("size")) == Some(size / SECTOR))
        .ok_or_else(|| format!("{bay} did not come to have {size} bytes"))?;
    if is_held(&disk.node) {
        return Err(format!("somebody still holds what was in {bay}"));
    }
    let mut tried = Err(String::new());
    for _ in 0..TRIES {
        tried = make_filesystem(&disk.node);
        if tried.is_ok() {
            break;
        }
        std::thread::sleep(10 * PAUSE);
    }
    tried?;
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", at.display());
    fs::create_dir_all(at).map_err(|error| failed(&error))?;
    // What files no longer use goes back to the host at once.
    let flags = MsFlags::MS_NOATIME | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_it(Some(&disk.node), at, Some("ext4"), flags, Some("discard")).map_err(|error| failed(&error))
}

/// Unmounts the disk in a bay wherever it is mounted; says whether nobody holds it any more. With `force` it is
/// unmounted also when it is in use or does not answer, and without it that is an error.
pub(super) fn unmount(bay: &str, force: bool) -> Result<bool, String> {
    let disk = find(bay)?;
    let mounts = mounted(&disk);
    for mount in mounts.iter().rev() {
        let failed = |error: Errno| match error {
            Errno::EBUSY => format!("{} is in use", mount.at.display()),
            error => format!("{}: {error}", mount.at.display()),
        };
        if force {
            // From now on not even its superblock is written: another disk may take its place.
            if let Ok(root) = File::open(&mount.at) {
                // SAFETY: the ioctl reads one u32 through the pointer, which is valid for that.
                unsafe { libc::ioctl(root.as_raw_fd(), SHUTDOWN, &NO_FLUSH) };
            }
            umount2(&mount.at, MntFlags::MNT_DETACH).map_err(failed)?;
        } else {
            let mut last = Ok(());
            let done = until(LETTING_GO, || {
                last = umount2(&mount.at, MntFlags::empty());
                last != Err(Errno::EBUSY)
            });
            last.map_err(failed)?;
            debug_assert!(done.is_some());
        }
    }
    // Whoever lets go of a disk has read the note. To ask again whether it is free, as after a wake, is not to do so.
    if !mounts.is_empty() {
        let _ = fs::remove_file(LOST);
    }
    Ok(until(LETTING_GO, || !is_held(&disk.node)).is_some())
}

/// After a wake: lets go of the disks whose content is lost. What fails of it is said.
pub(super) fn let_go(disks: &[WakeDisk]) -> Result<(), String> {
    let mut result = Ok(());
    for disk in disks.iter().filter(|disk| !disk.kept) {
        result = result.and(unmount(&disk.bay, true).map(drop));
    }
    if disks.iter().any(|disk| !disk.kept) {
        // Written after the unmounting, which takes such a note away.
        let noted = fs::write(LOST, "the host that had it in its memory is gone\n");
        result = result.and(noted.map_err(|error| format!("{LOST}: {error}")));
    }
    result
}

/// Writes to the disks in all bays what is still held back.
pub(super) fn sync() -> Result<(), String> {
    for mount in mounts().iter().filter(|mount| is_bay(mount)) {
        let root = File::open(&mount.at).map_err(|error| format!("{}: {error}", mount.at.display()))?;
        nix::unistd::syncfs(&root).map_err(|error| format!("{}: {error}", mount.at.display()))?;
    }
    Ok(())
}

/// Whether what is mounted is a disk in a bay.
pub(super) fn is_bay(mount: &Mount) -> bool {
    let sysfs = format!("/sys/dev/block/{}/serial", mount.device);
    fs::read_to_string(sysfs).is_ok_and(|serial| serial.starts_with("bay"))
}

/// A block device.
struct Disk {
    name: String,
    node: PathBuf,
}

impl Disk {
    fn sysfs(&self, file: &str) -> PathBuf {
        Path::new("/sys/block").join(&self.name).join(file)
    }
}

fn find(bay: &str) -> Result<Disk, String> {
    let entries = fs::read_dir("/sys/block").map_err(|error| format!("/sys/block: {error}"))?;
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let disk = Disk { node: Path::new("/dev").join(&name), name };
        if fs::read_to_string(disk.sysfs("serial")).is_ok_and(|serial| serial.trim_end_matches(['\0', '\n']) == bay) {
            return Ok(disk);
        }
    }
    Err(format!("this machine has no {bay}"))
}

fn mounted(disk: &Disk) -> Vec<Mount> {
    let number = fs::read_to_string(disk.sysfs("dev")).unwrap_or_default();
    mounts().into_iter().filter(|mount| mount.device == number.trim()).collect()
}

/// Whether a filesystem, mounted or only held open, has the disk: then it cannot be had for oneself (open(2)).
fn is_held(node: &Path) -> bool {
    let alone = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(node);
    alone.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

fn make_filesystem(node: &Path) -> Result<(), String> {
    match look(node).map_err(|error| format!("{}: {error}", node.display()))? {
        Found::Filesystem => Ok(()),
        Found::Else => Err(format!("{} holds something else than a filesystem", node.display())),
        Found::Nothing => {
            let mut command = mke2fs();
            command.args(["-b", "4096", "-m", "0", "-L", "transient"]).arg(node);
            hooks::finish(&mut command, Instant::now() + FORMATTING).map_err(|why| format!("mke2fs {why}"))
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Filesystem,
    Else,
}

fn look(path: &Path) -> io::Result<Found> {
    let mut file = File::open(path)?;
    let mut bytes = vec![0; LOOKED_AT];
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut bytes)?;
    Ok(match bytes.get(MAGIC_AT..MAGIC_AT + MAGIC.len()) == Some(&MAGIC) {
        true => Found::Filesystem,
        false if bytes.iter().all(|byte| *byte == 0) => Found::Nothing,
        false => Found::Else,
    })
}

/// The program that makes filesystems: one of its own, or that of busybox.
fn mke2fs() -> Command {
    let own = ["/sbin/mke2fs", "/usr/sbin/mke2fs"].iter().find(|path| Path::new(path).exists());
    match own {
        Some(path) => Command::new(path),
        None => {
            let mut busybox = Command::new("/bin/busybox");
            busybox.arg("mke2fs");
            busybox
        }
    }
}

/// Waits up to `time` for a condition.
fn until(time: Duration, mut condition: impl FnMut() -> bool) -> Option<()> {
    let end = Instant::now() + time;
    loop {
        match condition() {
            true => return Some(()),
            false if Instant::now() >= end => return None,
            false => std::thread::sleep(PAUSE),
        }
    }
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_blank_disk_is_told_from_a_filesystem_and_from_anything_else() {
        let path = std::env::temp_dir().join(format!("catnap-look-{}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(look(&path).unwrap(), Found::Nothing);
        file.write_all_at(&[1], 4000).unwrap();
        assert_eq!(look(&path).unwrap(), Found::Else);
        file.write_all_at(&MAGIC, MAGIC_AT as u64).unwrap();
        assert_eq!(look(&path).unwrap(), Found::Filesystem);
        file.set_len(100).unwrap();
        assert!(look(&path).is_err());
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_bay_that_is_not_there_is_an_error() {
        assert!(mount("bay9", "/mnt", 512).unwrap_err().contains("no bay9"));
        assert!(mount("bay9", "mnt", 512).unwrap_err().contains("absolute"));
        assert!(unmount("bay9", true).unwrap_err().contains("no bay9"));
    }
}
