//! Removes files from a disk so that nothing is left of them: for a machine that has another's disk in it and does not
//! run on it.
//!
//! ```text
//! mount ─ each file: zeros over it, then it goes ─ unmount ─ mount ─ wipe what is free ─ zeros over the journal ─ unmount
//! ```
//!
//! Zeros over a file's own blocks make sure of it where the filesystem's blocks are smaller than what a disk discards.
//! The second mount has all of the first one's changes on the disk, so that what they freed counts as free. The
//! journal has old folders in it, with names of files that are gone.

use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::facts;
use crate::init::wait_for;
use crate::protocol::{Fate, Scrubbed, pattern};

const DISK: &str = "/dev/vda";
const AT: &str = "/sysroot";
/// How long the disk may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// No folders lie in each other so deep.
const DEEPEST: usize = 128;
/// So many bytes of names are told: a reply is one line of the protocol, in which a byte may become six.
const MAX_NAMES: usize = 8 << 10;

// include/uapi/linux/fs.h: _IOWR('X', 121, struct fstrim_range).
const FITRIM: libc::Ioctl = 0xc018_5879;
// include/uapi/linux/ext4.h: _IOW('f', 43, __u32), and its flag that puts zeros over the journal.
const EXT4_IOC_CHECKPOINT: libc::Ioctl = 0x4004_662b;
const CHECKPOINT_ZEROOUT: u32 = 2;

/// `struct fstrim_range`.
#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    least: u64,
}

/// Does all of it. Whatever of the list cannot be removed makes it fail.
pub(super) fn scrub(patterns: &[String]) -> Result<Scrubbed, String> {
    if facts::root_disk_bytes().is_some() {
        return Err("this machine runs on its disk".into());
    }
    let read = |text: &String| pattern(text).ok_or_else(|| format!("`{}` is no path below /", text.escape_debug()));
    let patterns = patterns.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    wait_for(Path::new(DISK), PATIENCE)?;
    let mut eraser = Eraser::new(AT.into());
    on_disk(|| {
        patterns.iter().for_each(|(fate, names)| eraser.apply(*fate, names));
        match eraser.failed.first() {
            None => Ok(()),
            Some(first) => Err(format!("{first}{}", more(eraser.failed.len() - 1))),
        }
    })?;
    on_disk(|| {
        let root = File::open(AT).map_err(|error| error.to_string())?;
        eraser.done.wiped = wipe_free(&root).map_err(|error| format!("free space cannot be wiped: {error}"))?;
        if let Err(error) = wipe_journal(&root) {
            eraser.done.notes.push(format!("the journal was not wiped: it may have names of removed files ({error})"));
        }
        Ok(())
    })?;
    Ok(eraser.done)
}

fn more(count: usize) -> String {
    if count == 0 { String::new() } else { format!(" (and {count} more like that)") }
}

/// Does something while the disk is mounted.
fn on_disk(act: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("{DISK}: {error}");
    fs::create_dir_all(AT).map_err(|error| failed(&error))?;
    // Nothing on it is to be run or to act as a device.
    let flags = MsFlags::MS_NOATIME | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(DISK), AT, Some("ext4"), flags, None::<&str>).map_err(|error| failed(&error))?;
    let done = act();
    let left = umount2(AT, MntFlags::empty()).map_err(|error| failed(&error));
    nix::unistd::sync();
    done.and(left)
}

/// Discards all blocks that are free. The monitor puts zeros in their place.
fn wipe_free(root: &File) -> io::Result<u64> {
    let mut range = TrimRange { start: 0, length: u64::MAX, least: 0 };
    // SAFETY: the kernel reads and writes one fstrim_range through the pointer, which `range` is.
    match unsafe { libc::ioctl(root.as_raw_fd(), FITRIM, &raw mut range) } {
        0 => Ok(range.length),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Brings everything from the journal to its place, and puts zeros over the journal.
fn wipe_journal(root: &File) -> io::Result<()> {
    let flags = CHECKPOINT_ZEROOUT;
    // SAFETY: the kernel reads one u32 through the pointer.
    match unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_CHECKPOINT, &raw const flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a name is as `wanted`, in which `*` stands for anything.
fn matches(wanted: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match wanted.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == name[n] => (p, n) = (p + 1, n + 1),
            // The last star takes one byte more.
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    wanted[p..].iter().all(|byte| *byte == b'*')
}

/// Removes what patterns match, below a folder. It follows no link.
struct Eraser {
    root: PathBuf,
    done: Scrubbed,
    failed: Vec<String>,
    /// Bytes of the names that are told.
    told: usize,
}

impl Eraser {
    fn new(root: PathBuf) -> Eraser {
        Eraser { root, done: Scrubbed::default(), failed: Vec::new(), told: 0 }
    }

    fn apply(&mut self, fate: Fate, names: &[String]) {
        let root = self.root.clone();
        self.walk(&root, names, fate, 0);
    }

    /// Goes from a folder to what the rest of a pattern means.
    fn walk(&mut self, folder: &Path, names: &[String], fate: Fate, depth: usize) {
        let Some((name, rest)) = names.split_first() else { return };
        if depth > DEEPEST {
            return self.note(folder, Err(io::Error::other(format!("it is more than {DEEPEST} folders deep"))));
        }
        if name == "**" {
            self.walk(folder, rest, fate, depth + 1);
        }
        for (path, meta) in self.entries(folder) {
            let called = path.file_name().unwrap_or_default().as_encoded_bytes();
            match (name.as_str(), rest) {
                ("**", []) => self.meet(&path, &meta, fate, depth),
                ("**", _) if meta.is_dir() => self.walk(&path, names, fate, depth + 1),
                ("**", _) => {}
                _ if !matches(name.as_bytes(), called) => {}
                (_, []) => self.meet(&path, &meta, fate, depth),
                _ if meta.is_dir() => self.walk(&path, rest, fate, depth + 1),
                _ => {}
            }
        }
    }

    /// Does to what was found what is to become of it.
    fn meet(&mut self, path: &Path, meta: &Metadata, fate: Fate, depth: usize) {
        if meta.is_dir() && depth <= DEEPEST {
            for (path, meta) in self.entries(path) {
                // Of what is emptied, only a folder's own file stays.
                self.meet(&path, &meta, if fate == Fate::Emptied { Fate::Goes } else { fate }, depth + 1);
            }
            if fate == Fate::Goes {
                self.note(path, fs::remove_dir(path));
            }
            return;
        }
        self.done.files += 1;
        self.done.bytes += if meta.is_file() { meta.len() } else { 0 };
        let name = format!("/{}", path.strip_prefix(&self.root).unwrap_or(path).display());
        if self.told + name.len() <= MAX_NAMES {
            self.told += name.len();
            self.done.names.push(name);
        }
        // What has another name elsewhere stays there as it is.
        let alone = meta.is_file() && meta.nlink() == 1;
        let empties = fate == Fate::Emptied && meta.is_file();
        let wiped = if alone || empties { overwrite(path, meta.len()) } else { Ok(()) };
        // A link or a pipe has nothing that could be emptied, and to open it might never end: it goes.
        let done = wiped.and_then(|()| match empties {
            true => File::options().write(true).truncate(true).custom_flags(libc::O_NOFOLLOW).open(path).map(drop),
            false => fs::remove_file(path),
        });
        self.note(path, done);
    }

    /// What is in a folder, its links as links.
    fn entries(&mut self, folder: &Path) -> Vec<(PathBuf, Metadata)> {
        let read = |entry: io::Result<fs::DirEntry>| {
            let path = entry?.path();
            let meta = fs::symlink_metadata(&path)?;
            Ok((path, meta))
        };
        match fs::read_dir(folder).and_then(|entries| entries.map(read).collect()) {
            Ok(found) => found,
            Err(error) => {
                self.note(folder, Err(error));
                Vec::new()
            }
        }
    }

    fn note(&mut self, path: &Path, done: io::Result<()>) {
        if let Err(error) = done {
            // One is told, and the number of the others.
            let below = path.strip_prefix(&self.root).unwrap_or(path);
            self.failed.push(format!("/{}: {error}", below.display()));
        }
    }
}

/// Zeros over all of a file, on the disk.
fn overwrite(path: &Path, length: u64) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut file = File::options().write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    // What lies between holes is left to the wiping of free blocks: to fill the holes could take any room.
    let mut left = if file.metadata()?.blocks() * 512 < length { 0 } else { length };
    while left > 0 {
        let part = left.min(ZEROS.len() as u64) as usize;
        file.write_all(&ZEROS[..part])?;
        left -= part as u64;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_as_a_shell_would() {
        for (wanted, name, expected) in [
            ("*", "", true),
            ("*", ".x", true),
            (".*_history", ".bash_history", true),
            (".*_history", ".bash_history2", false),
            ("a*b*c", "axxbyybzc", true),
            ("a*b*c", "axxbyybz", false),
            ("ssh_host_*_key*", "ssh_host_ed25519_key.pub", true),
            ("a", "ab", false),
            ("**a", "ba", true),
        ] {
            assert_eq!(matches(wanted.as_bytes(), name.as_bytes()), expected, "{wanted} {name}");
        }
    }

    /// A folder with `files` in it, scrubbed by `patterns`; what is left.
    fn left(name: &str, patterns: &[&str]) -> (Vec<String>, Eraser) {
        let root = std::env::temp_dir().join(format!("catnap-scrub-{name}-{}", std::process::id()));
        for file in
            ["root/.ssh/key", "root/.bash_history", "root/kept", "var/log/a/b.log", "var/log/c", "etc/machine-id"]
        {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        std::os::unix::fs::symlink(root.join("root"), root.join("var/link")).unwrap();
        let mut eraser = Eraser::new(root.clone());
        for (fate, names) in patterns.iter().map(|text| pattern(text).unwrap()) {
            eraser.apply(fate, &names);
        }
        let mut names = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for (path, meta) in eraser.entries(&folder) {
                let length = if meta.is_file() { meta.len().to_string() } else { "-".into() };
                names.push(format!("{} {length}", path.strip_prefix(&root).unwrap().display()));
                if meta.is_dir() {
                    folders.push(path);
                }
            }
        }
        fs::remove_dir_all(root).unwrap();
        names.sort();
        (names, eraser)
    }

    #[test]
    fn what_is_listed_goes_and_nothing_else() {
        let (names, eraser) = left("some", &["/root/.ssh", "/root/.*_history", "/var/log/", "empty /etc/machine-id"]);
        let expected =
            ["etc -", "etc/machine-id 0", "root -", "root/kept 9", "var -", "var/link -", "var/log -", "var/log/a -"];
        assert_eq!(names, expected);
        assert_eq!((eraser.done.files, eraser.failed.len()), (5, 0), "{:?}", eraser.failed);
        assert!(eraser.done.names.contains(&"/root/.ssh/key".to_owned()));
        assert!(eraser.done.bytes > 40);
    }

    #[test]
    fn what_is_told_fits_into_a_reply() {
        let root = std::env::temp_dir().join(format!("catnap-scrub-many-{}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        for number in 0..100 {
            fs::write(root.join(format!("{number}{}", "\u{1}".repeat(200))), "x").unwrap();
        }
        let mut eraser = Eraser::new(root.clone());
        eraser.apply(Fate::Goes, &["*".to_owned()]);
        assert_eq!((eraser.done.files, eraser.failed.len()), (100, 0));
        let reply = crate::protocol::Reply::Scrubbed(eraser.done.clone());
        crate::protocol::write_line(&mut Vec::new(), &reply).unwrap();
        assert!(eraser.done.names.len() > 10);
        fs::remove_dir(root).unwrap();
    }

    #[test]
    fn what_cannot_be_emptied_goes_and_what_is_too_deep_is_said() {
        let root = std::env::temp_dir().join(format!("catnap-scrub-odd-{}", std::process::id()));
        let deep = (0..DEEPEST + 2).fold(root.join("deep"), |folder, _| folder.join("d"));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("x.pem"), "x").unwrap();
        nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", root.join("link")).unwrap();
        let mut eraser = Eraser::new(root.clone());
        for text in ["empty /pipe", "empty /link"] {
            let (fate, names) = pattern(text).unwrap();
            eraser.apply(fate, &names);
        }
        assert_eq!((eraser.done.files, eraser.failed.len()), (2, 0), "{:?}", eraser.failed);
        assert!(!root.join("pipe").exists() && root.join("link").symlink_metadata().is_err());
        let (fate, names) = pattern("/**/*.pem").unwrap();
        eraser.apply(fate, &names);
        assert!(eraser.failed.iter().any(|why| why.contains("folders deep")), "{:?}", eraser.failed);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn links_are_not_followed_and_stars_reach_any_folder() {
        let (names, _) = left("links", &["/var/link/kept", "/**/*.log", "/**/key", "/nothing/here"]);
        assert!(names.contains(&"root/kept 9".to_owned()) && names.contains(&"var/log/c 9".to_owned()), "{names:?}");
        assert!(!names.iter().any(|name| name.contains("b.log") || name.contains("key")), "{names:?}");
        // A link itself goes.
        let (names, _) = left("link", &["/var/*"]);
        assert!(names.contains(&"root/kept 9".to_owned()) && !names.iter().any(|name| name.starts_with("var/")));
    }
}
