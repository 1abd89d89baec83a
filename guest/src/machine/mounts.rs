//! What is mounted where.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use super::bays::is_bay;

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Major and minor number of the filesystem's device.
    pub device: String,
    /// Where it is mounted.
    pub at: PathBuf,
    /// Whether it can be written to.
    pub writable: bool,
    /// The filesystem's type.
    pub kind: String,
    /// What is mounted, as the mounting program called it.
    pub source: PathBuf,
}

impl Mount {
    /// Whether it is a filesystem on a disk.
    pub fn on_disk(&self) -> bool {
        self.source.starts_with("/dev")
            && fs::metadata(&self.source).is_ok_and(|meta| meta.file_type().is_block_device())
    }
}

/// All mounts, in the order in which they were made.
pub fn mounts() -> Vec<Mount> {
    fs::read("/proc/self/mountinfo").map(|text| parse(&text)).unwrap_or_default()
}

/// The filesystems on disks that can be written to, each once, the last mounted first. Those that live in the host's
/// memory are in no snapshot, so there is no need to hold them still for one.
pub(super) fn writable_disks() -> Vec<Mount> {
    let mut seen = BTreeSet::new();
    let mut found: Vec<Mount> = mounts()
        .into_iter()
        .filter(|mount| mount.writable && mount.on_disk() && !is_bay(mount) && seen.insert(mount.device.clone()))
        .collect();
    found.reverse();
    found
}

/// Reads the format of proc(5): `36 35 98:0 /root /mnt rw,noatime master:1 - ext4 /dev/vda rw`.
fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    // The number of optional words before the dash varies.
    let dash = words.iter().position(|word| *word == b"-")?;
    let text = |at: usize| words.get(at).map(|word| String::from_utf8_lossy(word).into_owned());
    let has_rw = |at: usize| words.get(at).is_some_and(|word| word.split(|byte| *byte == b',').next() == Some(b"rw"));
    Some(Mount {
        device: text(2)?,
        at: unescape(words.get(4)?),
        writable: has_rw(5) && has_rw(dash + 3),
        kind: text(dash + 1)?,
        source: unescape(words.get(dash + 2)?),
    })
}

/// Blanks, tabs, line ends and backslashes are written as three octal digits.
fn unescape(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes_and_optional_words() {
        let text = b"22 1 254:0 / / rw,noatime - ext4 /dev/vda rw\n\
            23 22 254:16 / /mnt/a\\040b rw master:1 shared:2 - ext4 /dev/vdb ro,errors=continue\n\
            24 22 0:5 / /dev ro,nosuid - devtmpfs dev rw\nnonsense\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 3);
        assert!(mounts[0].writable && mounts[0].kind == "ext4" && mounts[0].source.as_os_str() == "/dev/vda");
        assert_eq!(mounts[1].at, PathBuf::from("/mnt/a b"));
        assert!(!mounts[1].writable && !mounts[2].writable);
        assert_eq!(mounts[1].device, "254:16");
    }

    #[test]
    fn this_machine_has_a_root() {
        assert!(super::mounts().iter().any(|mount| mount.at.as_os_str() == "/"));
    }
}
