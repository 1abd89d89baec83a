//! Which of the guest's files lies at a place of its disk, when the disk is one ext4 filesystem.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::ext4::Filesystem;
use crate::disk::Reader;

/// The number of the inode of `/`.
const ROOT: u32 = 2;
/// The most folders that are looked into, and the longest path that is told (PATH_MAX of Linux).
const MAX_FOLDERS: usize = 1 << 18;
const MAX_PATH: usize = 4096;

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InFile {
    /// The file's path; one of them, when it has several.
    pub path: String,
    /// The offset in it.
    pub offset: u64,
}

/// The files that lie at these offsets of a disk. Where none is, or the filesystem is unknown or damaged, none is told.
pub fn at(disk: Reader, mut places: Vec<u64>) -> HashMap<u64, InFile> {
    let Some(mut filesystem) = Filesystem::open(disk) else { return HashMap::new() };
    places.sort_unstable();
    places.dedup();
    let found = inodes_at(&mut filesystem, &places);
    let paths = paths(&mut filesystem, found.values().map(|(inode, _)| *inode).collect());
    let named = |(place, (inode, offset))| Some((place, InFile { path: paths.get(&inode)?.clone(), offset }));
    found.into_iter().filter_map(named).collect()
}

/// For each place in a file, the file's inode and the offset in it.
fn inodes_at(filesystem: &mut Filesystem, places: &[u64]) -> HashMap<u64, (u32, u64)> {
    let (mut found, block) = (HashMap::new(), filesystem.block_size());
    filesystem.each_file(&mut |filesystem, number, inode| {
        filesystem.extents(inode, &mut |extent| {
            let bytes = |blocks: u64| blocks.checked_mul(block);
            let ends = (bytes(extent.physical), bytes(extent.physical + extent.length), bytes(extent.logical));
            // Room that was never written still holds what was there before.
            let (Some(begin), Some(end), Some(logical), true) = (ends.0, ends.1, ends.2, extent.written) else {
                return;
            };
            let first = places.partition_point(|place| *place < begin);
            for place in places[first..].iter().take_while(|place| **place < end) {
                let offset = logical + (place - begin);
                if offset < inode.size {
                    found.insert(*place, (number, offset));
                }
            }
        });
    });
    found
}

/// A path of each of these inodes, as far as folders lead to it.
fn paths(filesystem: &mut Filesystem, mut wanted: HashSet<u32>) -> HashMap<u32, String> {
    // Each folder with the place of the one that it lies in, and its name.
    let (mut folders, mut seen) = (vec![(ROOT, 0, String::new())], HashSet::from([ROOT]));
    let (mut paths, mut next) = (HashMap::new(), 0);
    while next < folders.len() && !wanted.is_empty() {
        if let Some(folder) = filesystem.inode(folders[next].0).filter(|inode| inode.is_folder) {
            let mut found = Vec::new();
            filesystem.entries(&folder, &mut |entry| {
                let name = || String::from_utf8_lossy(entry.name).into_owned();
                if wanted.remove(&entry.inode) {
                    paths.insert(entry.inode, path(&folders, next, &name()));
                } else if entry.is_folder && folders.len() + found.len() < MAX_FOLDERS {
                    found.push((entry.inode, next, name()));
                }
            });
            folders.extend(found.into_iter().filter(|(inode, ..)| seen.insert(*inode)));
        }
        next += 1;
    }
    paths.into_iter().filter_map(|(inode, path)| Some((inode, path?))).collect()
}

/// The path of what has this name in the folder of this number; none when it is too long.
fn path(folders: &[(u32, usize, String)], mut folder: usize, name: &str) -> Option<String> {
    let (mut parts, mut length) = (vec![name], name.len());
    while folder > 0 {
        parts.push(&folders[folder].2);
        length += 1 + folders[folder].2.len();
        folder = folders[folder].1;
        if length > MAX_PATH {
            return None;
        }
    }
    Some(parts.iter().rev().map(|part| format!("/{part}")).collect())
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;
    use crate::disk::Format;
    use crate::sys::mutate::{Mutator, rounds};

    const KEY: &[u8] = b"AKIAIOSFODNN7EXAMPLE";

    fn run(program: &str, words: &[&str], file: &Path) -> String {
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
        let done = Command::new(program).env("PATH", path).args(words).arg(file).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// A filesystem of 4 MiB with a few files, made with these options more.
    pub fn filesystem(dir: &Path, options: &[&str]) -> PathBuf {
        let (content, raw) = (dir.join("content"), dir.join("raw"));
        fs::create_dir_all(content.join("a/b")).unwrap();
        fs::write(content.join("a/b/key"), [vec![b'.'; 5000], KEY.to_vec()].concat()).unwrap();
        fs::write(content.join("new\nline"), "kitten").unwrap();
        // A folder of many blocks, and a file of many extents: every second block is a hole.
        fs::create_dir(content.join("many")).unwrap();
        (0..400).for_each(|n| fs::write(content.join(format!("many/{n:0100}")), "").unwrap());
        let sparse = fs::File::create(content.join("sparse")).unwrap();
        (0..40).for_each(|n| std::os::unix::fs::FileExt::write_all_at(&sparse, b"purr", n * 8192).unwrap());
        std::os::unix::fs::symlink("/a/b/key", content.join("link")).unwrap();
        fs::File::create(&raw).unwrap().set_len(4 << 20).unwrap();
        let words = [&["-q", "-F", "-t", "ext4", "-N", "512", "-d", content.to_str().unwrap()], options].concat();
        run("mke2fs", &words, &raw);
        fs::remove_dir_all(content).unwrap();
        raw
    }

    fn named(raw: &Path, places: &[u64]) -> Vec<Option<(String, u64)>> {
        let found = at(Reader::open(raw, Format::Raw, raw.parent().unwrap()).unwrap(), places.to_vec());
        places.iter().map(|place| found.get(place).map(|file| (file.path.clone(), file.offset))).collect()
    }

    fn all(raw: &Path, text: &[u8]) -> Vec<u64> {
        let bytes = fs::read(raw).unwrap();
        (0..bytes.len() as u64).filter(|at| bytes[*at as usize..].starts_with(text)).collect()
    }

    #[test]
    fn a_place_is_told_by_its_file() {
        let dir = tempfile::tempdir().unwrap();
        for options in [&["-b", "1024"][..], &["-b", "4096"], &["-O", "^metadata_csum,^64bit"], &["-I", "128"]] {
            let raw = filesystem(dir.path(), options);
            let key = all(&raw, KEY)[0];
            let (kitten, purrs) = (all(&raw, b"kitten")[0], all(&raw, b"purr"));
            let found = named(&raw, &[key, kitten, 0, 2048, (4 << 20) - 1]);
            let file = |path: &str, offset| Some((path.to_owned(), offset));
            assert_eq!(found, [file("/a/b/key", 5000), file("/new\nline", 0), None, None, None], "{options:?}");
            let expected: Vec<_> = (0..40).map(|n| file("/sparse", n * 8192)).collect();
            assert_eq!(named(&raw, &purrs), expected, "{options:?}");
            // Behind the file's end there is what was there before.
            assert_eq!(named(&raw, &[key + KEY.len() as u64]), [None]);
            // A file that goes leaves its bytes behind, without a name.
            run("debugfs", &["-w", "-R", "rm /a/b/key"], &raw);
            assert_eq!((all(&raw, KEY)[0], named(&raw, &[key])), (key, vec![None]));
        }
    }

    #[test]
    fn room_that_was_set_aside_and_never_written_is_no_files() {
        let dir = tempfile::tempdir().unwrap();
        let raw = filesystem(dir.path(), &["-b", "4096"]);
        let key = all(&raw, KEY)[0];
        // The file gives up the block and gets it back, to be written some day.
        run("debugfs", &["-w", "-R", "punch /a/b/key 1 1"], &raw);
        run("debugfs", &["-w", "-R", "fallocate /a/b/key 1 1"], &raw);
        assert!(run("debugfs", &["-R", "stat /a/b/key"], &raw).contains(&format!("(1[u]):{}", key / 4096)));
        assert_eq!(all(&raw, KEY), [key]);
        assert_eq!(named(&raw, &[key]), [None]);
    }

    #[test]
    fn no_filesystem_makes_it_panic_or_go_on_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let raw = filesystem(dir.path(), &["-b", "1024", "-J", "size=1"]);
        let (good, mut mutator) = (fs::read(&raw).unwrap(), Mutator::from_env());
        let used: Vec<usize> =
            (0..good.len() / 1024).filter(|n| good[n * 1024..][..1024].iter().any(|byte| *byte != 0)).collect();
        let (odd, key) = (dir.path().join("odd"), all(&raw, KEY)[0]);
        for _ in 0..rounds(300) {
            let mut bytes = good.clone();
            for _ in 0..=mutator.below(3) {
                let at = used[mutator.below(used.len())] * 1024;
                let changed = mutator.bytes(&good[at..at + 1024]);
                let length = changed.len().min(1024);
                bytes[at..at + length].copy_from_slice(&changed[..length]);
            }
            fs::write(&odd, &bytes).unwrap();
            named(&odd, &[key]);
        }
    }
}
