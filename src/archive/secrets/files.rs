//! The guest's files on a disk that is one ext4 filesystem, so that a secret can be told by the name of its file.
//!
//! The filesystem may be anybody's. It is read by a library that has no unsafe code, and only to find names: where it
//! is damaged or of another kind there are fewer names, and what was found on the disk stays found. The library goes
//! by the journal too, without which a snapshot of a running guest would lack its latest files.

use std::error::Error;
use std::ops::ControlFlow;

use ext4_view::{Ext4, Ext4Read, PathBuf};

use crate::disk::Reader;
use crate::sys::process;

/// How deep folders may lie in each other.
const MAX_DEPTH: usize = 64;
/// What looking at a file costs of the bytes that are read at most, however few it has.
const ENTRY: u64 = 4096;
/// Documentation/filesystems/ext4/super.rst: where the superblock is, and fields of it.
const SUPERBLOCK: u64 = 1024;
const BLOCKS_LOW: usize = 0x4;
const LOG_BLOCK_SIZE: usize = 0x18;
const BLOCKS_PER_GROUP: usize = 0x20;
const BLOCKS_HIGH: usize = 0x150;
/// The smallest group that is believed, in blocks. mke2fs makes them of 8192 or more.
const SMALLEST_GROUP: u32 = 1024;

/// Is given a file's path, an offset in it, and what is there; at its end, nothing. Ends it all when it breaks.
pub type Each<'a> = &'a mut dyn FnMut(&str, u64, &[u8]) -> ControlFlow<()>;

/// Reads all plain files that can be read, no more bytes than the disk has.
pub fn read(disk: Reader, each: Each<'_>) {
    let left = disk.size();
    if is_plausible(&disk)
        && let Ok(filesystem) = Ext4::load(Box::new(Blocks(disk)))
    {
        let _ = Walk { filesystem, left, each }.all();
    }
}

/// Whether the superblock, if it is one, promises no more than the disk can have: the library believes it how many
/// groups there are.
fn is_plausible(disk: &Reader) -> bool {
    let mut superblock = [0; 1024];
    if disk.read(SUPERBLOCK, &mut superblock).is_err() {
        return false;
    }
    let word = |at: usize| superblock[at..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
    let blocks = u64::from(word(BLOCKS_HIGH)) << 32 | u64::from(word(BLOCKS_LOW));
    let bytes = 1024u64.checked_shl(word(LOG_BLOCK_SIZE)).and_then(|size| blocks.checked_mul(size));
    bytes.is_some_and(|bytes| bytes <= disk.size()) && word(BLOCKS_PER_GROUP) >= SMALLEST_GROUP
}

struct Walk<'a> {
    filesystem: Ext4,
    /// How many bytes may still be read.
    left: u64,
    each: Each<'a>,
}

impl Walk<'_> {
    fn all(mut self) -> ControlFlow<()> {
        let mut folders = vec![(PathBuf::new("/"), 0)];
        while let Some((folder, depth)) = folders.pop() {
            let Ok(entries) = self.filesystem.read_dir(&folder) else { continue };
            for entry in entries.map_while(Result::ok) {
                if entry.file_name() == "." || entry.file_name() == ".." {
                    continue;
                }
                self.spend(ENTRY)?;
                let path = entry.path();
                // What an entry says of its kind need not be so, and no link is to be followed.
                match self.filesystem.symlink_metadata(&path) {
                    Ok(found) if found.is_dir() && depth < MAX_DEPTH => folders.push((path, depth + 1)),
                    Ok(found) if found.file_type().is_regular_file() => self.file(&path)?,
                    _ => {}
                }
            }
        }
        ControlFlow::Continue(())
    }

    fn file(&mut self, path: &PathBuf) -> ControlFlow<()> {
        let Ok(mut file) = self.filesystem.open(path) else { return ControlFlow::Continue(()) };
        let (name, mut block) = (path.display().to_string(), [0; 4096]);
        loop {
            let at = file.position();
            match file.read_bytes(&mut block) {
                Ok(count @ 1..) => {
                    self.spend(count as u64)?;
                    (self.each)(&name, at, &block[..count])?;
                }
                _ => return (self.each)(&name, at, &[]),
            }
        }
    }

    fn spend(&mut self, bytes: u64) -> ControlFlow<()> {
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                ControlFlow::Continue(())
            }
            None => ControlFlow::Break(()),
        }
    }
}

struct Blocks(Reader);

impl Ext4Read for Blocks {
    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        match process::interrupted() {
            false => Ok(self.0.read(at, into)?),
            true => Err("interrupted".into()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;
    use crate::disk::Format;
    use crate::sys::mutate::{Mutator, rounds};

    /// A filesystem of 4 MiB with a few files, made with these options more.
    pub fn filesystem(dir: &Path, options: &[&str]) -> PathBuf {
        let (content, raw) = (dir.join("content"), dir.join("raw"));
        fs::create_dir_all(content.join("a/b")).unwrap();
        fs::write(content.join("a/b/key"), [vec![b'.'; 5000], b"AKIAIOSFODNN7EXAMPLE".to_vec()].concat()).unwrap();
        fs::write(content.join("new\nline"), "kitten").unwrap();
        std::os::unix::fs::symlink("/a/b/key", content.join("link")).unwrap();
        fs::File::create(&raw).unwrap().set_len(4 << 20).unwrap();
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap()));
        mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&content).args(options).arg(&raw);
        assert!(mke2fs.status().unwrap().success());
        raw
    }

    fn found(raw: &Path) -> Vec<(String, u64, Vec<u8>)> {
        let mut found = Vec::new();
        read(Reader::open(raw, Format::Raw, raw.parent().unwrap()).unwrap(), &mut |path, at, bytes| {
            found.push((path.to_owned(), at, bytes.to_vec()));
            ControlFlow::Continue(())
        });
        found.sort();
        found
    }

    #[test]
    fn plain_files_are_read_by_their_names_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        for options in [&["-b", "1024"][..], &["-b", "4096"], &["-O", "^has_journal,^metadata_csum,^extents,^64bit"]] {
            let mut whole = std::collections::BTreeMap::<String, Vec<u8>>::new();
            for (path, at, bytes) in found(&filesystem(dir.path(), options)) {
                let file = whole.entry(path).or_default();
                assert_eq!(file.len() as u64, at);
                file.extend(bytes);
            }
            let names: Vec<_> = whole.keys().collect();
            assert_eq!(names, ["/a/b/key", "/new\nline"], "{options:?}");
            assert!(whole["/a/b/key"].ends_with(b".AKIAIOSFODNN7EXAMPLE") && whole["/a/b/key"].len() == 5020);
            fs::remove_dir_all(dir.path().join("content")).unwrap();
        }
    }

    #[test]
    fn no_filesystem_makes_it_panic_or_go_on_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        // Without checksums, changes are not seen at the door.
        let raw = filesystem(dir.path(), &["-O", "^metadata_csum", "-b", "1024", "-N", "64"]);
        let (good, mut mutator) = (fs::read(&raw).unwrap(), Mutator::from_env());
        let used: Vec<usize> =
            (0..good.len() / 1024).filter(|n| good[n * 1024..][..1024].iter().any(|byte| *byte != 0)).collect();
        let odd = dir.path().join("odd");
        for _ in 0..rounds(300) {
            let mut bytes = good.clone();
            for _ in 0..=mutator.below(3) {
                let at = used[mutator.below(used.len())] * 1024;
                let changed = mutator.bytes(&good[at..at + 1024]);
                let length = changed.len().min(1024);
                bytes[at..at + length].copy_from_slice(&changed[..length]);
            }
            fs::write(&odd, &bytes).unwrap();
            let read: usize = found(&odd).iter().map(|(_, _, bytes)| bytes.len()).sum();
            assert!(read <= good.len());
        }
    }

    #[test]
    fn a_superblock_that_promises_more_than_there_is_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let raw = filesystem(dir.path(), &[]);
        let good = fs::read(&raw).unwrap();
        for (at, value) in [(BLOCKS_HIGH, 1), (LOG_BLOCK_SIZE, 60), (LOG_BLOCK_SIZE, 300), (BLOCKS_PER_GROUP, 0)] {
            let mut bytes = good.clone();
            bytes[SUPERBLOCK as usize + at..][..4].copy_from_slice(&u32::to_le_bytes(value));
            fs::write(&raw, bytes).unwrap();
            assert_eq!(found(&raw), [], "{at:#x}");
        }
    }
}
