//! The kernel's own filesystems, the root disk, and the move onto it.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::unistd::{chdir, chroot};

use super::console::say;
use super::modules::{self, Module};
use crate::escape::unescape;
use crate::poll::{Poll, READ};
use crate::protocol::Settings;

/// How long the root disk may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);
const SYSROOT: &str = "/sysroot";

/// What the kernel's command line says to us.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// `catnap.root=none`, or another disk than `/dev/vda`.
    root: Option<String>,
    /// `catnap.hostname=NAME`, in place of `/etc/hostname`.
    pub hostname: Option<String>,
    /// `catnap.machine_id=DIGITS`, for a copy that is to be told from its original.
    pub machine_id: Option<String>,
    /// `catnap.set.KEY=VALUE`, with `%` and two digits for each byte that a command line cannot have.
    pub settings: Settings,
}

impl Options {
    /// Mounts what is needed to read them, and reads them.
    pub(super) fn read() -> Options {
        mount_early("proc", "/proc", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, "");
        Options::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(line: &str) -> Options {
        let mut options = Options::default();
        for word in line.split_whitespace() {
            match word.split_once('=') {
                Some(("catnap.root", root)) => options.root = Some(root.into()),
                Some(("catnap.hostname", name)) => options.hostname = Some(name.into()),
                Some(("catnap.machine_id", id)) => options.machine_id = Some(id.into()),
                Some((key, value)) => {
                    if let (Some(key), Some(value)) = (key.strip_prefix("catnap.set."), unescape(value)) {
                        options.settings.insert(key.into(), value);
                    }
                }
                None => {}
            }
        }
        options
    }
}

/// Mounts, loads modules, and makes the root disk the root. An error is for the
/// console; the modules are those that may be loaded later.
pub(super) fn find(options: &Options) -> Result<Vec<Module>, String> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_early("sysfs", "/sys", plain, "");
    mount_early("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755");
    mount_early("tmpfs", "/run", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0755");
    let later = modules::load();
    let disk = match options.root.as_deref() {
        Some("none") => return Ok(later),
        Some(disk) => Path::new("/dev").join(disk),
        None => PathBuf::from("/dev/vda"),
    };
    wait_for(&disk, PATIENCE)?;
    let failed = |error: &dyn std::fmt::Display| format!("root disk {}: {error}", disk.display());
    fs::create_dir_all(SYSROOT).map_err(|error| failed(&error))?;
    mount(Some(&disk), SYSROOT, Some("ext4"), MsFlags::MS_NOATIME, None::<&str>).map_err(|error| failed(&error))?;
    switch().map_err(|error| failed(&error))?;
    Ok(later)
}

/// The initramfs may come without the folder, and a kernel may have mounted `/dev` already.
fn mount_early(kind: &str, at: &str, flags: MsFlags, data: &str) {
    let _ = fs::create_dir(at);
    match mount(Some(kind), at, Some(kind), flags, Some(data)) {
        Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
        Err(error) => say(&format!("{at}: {error}")),
    }
}

/// Sleeps until the disk's node appears in `/dev`.
pub(crate) fn wait_for(disk: &Path, patience: Duration) -> Result<(), String> {
    let there = || fs::metadata(disk).is_ok_and(|meta| meta.file_type().is_block_device());
    let end = Instant::now() + patience;
    // Watched before it is looked at, so that it cannot appear in between.
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .and_then(|inotify| inotify.add_watch("/dev", AddWatchFlags::IN_CREATE).map(|_| inotify))
        .map_err(|error| format!("/dev cannot be watched: {error}"))?;
    while !there() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("root disk {} did not appear in {} s", disk.display(), patience.as_secs()));
        }
        let mut poll = Poll::default();
        poll.add(&watch, READ);
        poll.wait(Some(left)).map_err(|error| error.to_string())?;
        let _ = watch.read_events();
    }
    Ok(())
}

/// Takes the kernel's filesystems along and makes the disk `/`. The initramfs stays below, with our text.
fn switch() -> nix::Result<()> {
    for folder in ["/dev", "/proc", "/sys", "/run"] {
        let to = format!("{SYSROOT}{folder}");
        let _ = fs::create_dir(&to);
        mount(Some(folder), to.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    }
    chdir(SYSROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read() {
        let options = Options::parse("console=ttyS0 catnap.root=none quiet catnap.hostname=anna\n");
        assert_eq!(options, Options { root: Some("none".into()), hostname: Some("anna".into()), ..Options::default() });
        assert_eq!(Options::parse("quiet catnap.root"), Options::default());
        let options = Options::parse("catnap.machine_id=77 catnap.set.title=Ben%27s%20cat catnap.set.x=%f");
        assert_eq!(options.machine_id.as_deref(), Some("77"));
        assert_eq!(options.settings, Settings::from([("title".into(), "Ben's cat".into())]));
    }

    #[test]
    fn a_disk_that_is_no_disk_is_not_waited_for_for_ever() {
        let why = wait_for(Path::new("/dev/null"), Duration::from_millis(20)).unwrap_err();
        assert!(why.contains("did not appear"));
    }
}
