//! Media: disks that live in the host's memory and are gone with it.
//!
//! A medium is a sparse file on a tmpfs. It is read and written, never mapped: whoever shortens a mapped file
//! kills its readers, and whoever shortens this one makes it fail. Nothing is ever synced, for there is nothing
//! behind it that would last longer.
//!
//! ```text
//!            blank                  a look at the file finds it removed or cut
//! (nothing) ───────> whole ───────────────────────────────────────────────────> lost
//!    adopt ──────────>  │ ─── give: another process may adopt it ──────────────>   │ every request fails
//!                       └─── drop: wiped and removed                               └─── drop
//! ```
//!
//! A medium's [`Mark`] tells one content from another: it changes with every write. Equal marks mean equal bytes;
//! that a medium which was adopted gets another id with its first write keeps that true when two futures of one
//! machine both go on counting.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::{Buffer, Disk, Error};
use crate::sys::files::At;
use crate::sys::{hex, random, tmpfs};

/// The digits of an id.
const ID: usize = 32;

/// What tells one content of a medium from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// 32 hexadecimal digits that no other medium has.
    pub id: String,
    /// How many requests have changed it.
    pub writes: u64,
}

impl Mark {
    fn new() -> io::Result<Mark> {
        Ok(Mark { id: hex::encode(&random::bytes::<{ ID / 2 }>()?), writes: 0 })
    }

    /// Whether it can have been made by [`Mark::new`]: it becomes part of a file's name.
    pub fn is_sound(&self) -> bool {
        self.id.len() == ID && self.id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    }

    /// The name of a medium that was given away. No machine's name begins with a dot.
    fn file_name(&self) -> String {
        format!(".given-{}-{}", self.id, self.writes)
    }
}

/// A disk in the host's memory.
pub struct Medium {
    file: File,
    length: u64,
    history: Mutex<History>,
}

struct History {
    path: PathBuf,
    mark: Mark,
    /// It comes from another process, and was not written to since.
    adopted: bool,
    /// Why nothing can be read or written any more.
    lost: Option<&'static str>,
}

impl Medium {
    /// Makes a blank medium of `length` bytes, a multiple of 512, as the new file `path`. Refused unless that is on
    /// a tmpfs that has as much room now.
    pub fn blank(path: &Path, length: u64) -> Result<Arc<Medium>, Error> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path).at("make", path)?;
        let medium = Medium::new(file, path, length, Mark::new().at("make", path)?, false);
        match tmpfs::room(&medium.file).at("look at", path)? {
            None => Err(Error::refused(path, "it does not live in memory: its filesystem is no tmpfs")),
            Some(room) if room < length => Err(Error::NoRoom { path: path.into(), wanted: length, room }),
            Some(_) => {
                medium.file.set_len(length).at("size", path)?;
                Ok(medium)
            }
        }
    }

    /// Takes over a medium of exactly this mark that another process [gave](Medium::give) into the folder `from`, as
    /// the file `path` of the same tmpfs. `None` when there is none.
    pub fn adopt(from: &Path, path: &Path, length: u64, mark: &Mark) -> Result<Option<Arc<Medium>>, Error> {
        if !mark.is_sound() {
            return Ok(None);
        }
        let given = from.join(mark.file_name());
        let mut options = OpenOptions::new();
        let file = match options.read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&given) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.at("open", &given)?,
        };
        let found = file.metadata().at("look at", &given)?;
        // SAFETY: geteuid touches no memory.
        let mine = found.uid() == unsafe { libc::geteuid() };
        let in_memory = tmpfs::room(&file).at("look at", &given)?.is_some();
        if !(found.is_file() && found.nlink() == 1 && found.len() == length && mine && in_memory) {
            return Ok(None);
        }
        fs::rename(&given, path).at("take over", &given)?;
        Ok(Some(Medium::new(file, path, length, mark.clone(), true)))
    }

    fn new(file: File, path: &Path, length: u64, mark: Mark, adopted: bool) -> Arc<Medium> {
        let history = History { path: path.into(), mark, adopted, lost: None };
        Arc::new(Medium { file, length, history: Mutex::new(history) })
    }

    /// The size in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Where its file is.
    pub fn path(&self) -> PathBuf {
        self.history().path.clone()
    }

    /// What it holds now, in a word that can be compared.
    pub fn mark(&self) -> Mark {
        self.history().mark.clone()
    }

    /// Why it cannot be used any more, once that is so.
    pub fn lost(&self) -> Option<&'static str> {
        let mut history = self.history();
        let _ = self.whole(&mut history);
        history.lost
    }

    /// Gives the medium to whoever [adopts](Medium::adopt) it from the folder `to`, if its content still is the one
    /// of `mark`; says whether it is. From then on it is lost for us, so that its content cannot change any more.
    pub fn give(&self, to: &Path, mark: &Mark) -> Result<bool, Error> {
        let mut history = self.history();
        if history.mark != *mark || self.whole(&mut history).is_err() {
            return Ok(false);
        }
        let given = to.join(mark.file_name());
        fs::rename(&history.path, &given).at("give away", &history.path)?;
        (history.path, history.lost) = (given, Some("it was given to another machine"));
        Ok(true)
    }

    /// That the file is as it was left. One that was once removed or cut stays lost: what is in it now, zeros in
    /// the place of data, is not what the guest wrote.
    fn whole(&self, history: &mut History) -> io::Result<()> {
        if history.lost.is_none() {
            history.lost = match self.file.metadata()? {
                found if found.nlink() == 0 => Some("its file was removed"),
                found if found.len() < self.length => Some("its file was cut short"),
                _ => None,
            };
        }
        history.lost.map_or(Ok(()), |why| Err(io::Error::other(why)))
    }

    /// Before a request: that it lies within the medium, and that there is one.
    fn begin(&self, offset: u64, length: u64, changes: bool) -> io::Result<()> {
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut history = self.history();
        self.whole(&mut history)?;
        if changes {
            if std::mem::take(&mut history.adopted) {
                history.mark = Mark::new()?;
            }
            history.mark.writes += 1;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let too_far = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (offset, length) = (offset.try_into().map_err(too_far)?, length.try_into().map_err(too_far)?);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: fallocate touches no memory of ours.
        match length == 0 || unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, offset, length) } == 0 {
            true => Ok(()),
            false => Err(io::Error::last_os_error()),
        }
    }

    /// Gives everything that was written back to the host, and removes the file. For whoever still has it, the medium
    /// is lost.
    pub fn wipe(&self) {
        let mut history = self.history();
        let there = fs::symlink_metadata(&history.path);
        let is_it = |here: &fs::Metadata| {
            there.as_ref().is_ok_and(|there| (there.dev(), there.ino()) == (here.dev(), here.ino()))
        };
        // One that was given away is somebody else's. Nobody is left to hear of what cannot be wiped.
        if history.path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".given-")) {
            return;
        }
        history.lost = history.lost.or(Some("it was given up"));
        if self.file.metadata().is_ok_and(|here| is_it(&here)) {
            let _ = fs::remove_file(&history.path);
        }
        let _ = self.file.set_len(0);
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        self.wipe();
    }
}

/// Drives hold a medium together with whoever keeps it over a reboot.
impl Disk for Arc<Medium> {
    fn len(&self) -> u64 {
        self.length
    }

    fn read(&mut self, into: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        self.begin(offset, total(into), false)?;
        each_piece(into, offset, |piece, at| {
            let memory = piece.ptr_guard_mut();
            // SAFETY: the guard names memory of the guest that is mapped for as long as the guard lives, and the
            // kernel writes no more than its length.
            let read = unsafe { libc::pread64(self.file.as_raw_fd(), memory.as_ptr().cast(), memory.len(), at) };
            if let Ok(read @ 1..) = usize::try_from(read) {
                vm_memory::bitmap::Bitmap::mark_dirty(piece.bitmap(), 0, read);
            }
            read
        })
    }

    fn write(&mut self, from: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        self.begin(offset, total(from), true)?;
        each_piece(from, offset, |piece, at| {
            let memory = piece.ptr_guard();
            // SAFETY: as above, and the kernel only reads.
            unsafe { libc::pwrite64(self.file.as_raw_fd(), memory.as_ptr().cast(), memory.len(), at) }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.begin(0, 0, false)
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.write_zeroes(offset, length, true)
    }

    fn write_zeroes(&mut self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        self.begin(offset, length, true)?;
        self.punch(offset, length)
    }
}

fn total(pieces: &[Buffer<'_>]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

/// Has `act` do all pieces, the rest again of one that was done in part; it gives what pread(2) gives.
fn each_piece(pieces: &[Buffer<'_>], offset: u64, act: impl Fn(&Buffer<'_>, i64) -> isize) -> io::Result<()> {
    let mut at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            match act(&rest, at) {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                done @ 1.. => {
                    at += done as i64;
                    rest = rest.offset(done as usize).map_err(io::Error::other)?;
                }
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }
    Ok(())
}

/// In the place of a medium that is not there: `len` bytes, none of which can be read or written.
pub struct Gone(pub u64);

impl Gone {
    fn refuse(&self) -> io::Result<()> {
        Err(io::Error::other("there is no medium in the drive"))
    }
}

impl Disk for Gone {
    fn len(&self) -> u64 {
        self.0
    }
    fn read(&mut self, _: &[Buffer<'_>], _: u64) -> io::Result<()> {
        self.refuse()
    }
    fn write(&mut self, _: &[Buffer<'_>], _: u64) -> io::Result<()> {
        self.refuse()
    }
    fn flush(&mut self) -> io::Result<()> {
        self.refuse()
    }
    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        self.refuse()
    }
    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        self.refuse()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::sys::space::taken;

    const MIB: u64 = 1 << 20;

    fn shm() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    fn memory() -> vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap> {
        vm_memory::GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 10)]).unwrap()
    }

    /// Writes `byte` over 8 KiB, in two pieces, and reads it back.
    fn exchange(medium: &mut Arc<Medium>, byte: u8, offset: u64) -> io::Result<Vec<u8>> {
        let memory = memory();
        memory.write_slice(&[byte; 8192], GuestAddress(0)).unwrap();
        let piece = |at, length| memory.get_slice(GuestAddress(at), length).unwrap();
        medium.write(&[piece(0, 3000), piece(3000, 5192)], offset)?;
        medium.read(&[piece(0x4000, 8000), piece(0x8000, 192)], offset)?;
        let mut read = vec![0; 8192];
        memory.read_slice(&mut read[..8000], GuestAddress(0x4000)).unwrap();
        memory.read_slice(&mut read[8000..], GuestAddress(0x8000)).unwrap();
        Ok(read)
    }

    #[test]
    fn a_medium_is_sparse_gives_space_back_and_leaves_nothing() {
        let dir = shm();
        let path = dir.path().join("bay0.disk");
        let mut medium = Medium::blank(&path, 64 * MIB).unwrap();
        let used = || taken(&fs::metadata(&path).unwrap());
        assert_eq!((medium.length(), used()), (64 * MIB, 0));
        assert_eq!(exchange(&mut medium, 7, 64 * MIB - 8192).unwrap(), [7; 8192]);
        assert_eq!(used(), 8192);
        medium.discard(64 * MIB - 8192, 8192).unwrap();
        assert_eq!((used(), medium.mark().writes), (0, 2));
        for (offset, length) in [(64 * MIB, 1), (u64::MAX, 1), (0, 65 * MIB)] {
            assert_eq!(medium.write_zeroes(offset, length, true).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        assert_eq!(medium.mark().writes, 2);
        drop(medium);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_medium_off_tmpfs_or_larger_than_it_is_refused_and_leaves_nothing() {
        let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = disk.path().join("bay0.disk");
        assert!(matches!(Medium::blank(&path, MIB), Err(Error::Refused { .. })));
        let memory = shm();
        let large = memory.path().join("bay0.disk");
        assert!(matches!(Medium::blank(&large, 1 << 50), Err(Error::NoRoom { wanted, .. }) if wanted == 1 << 50));
        assert!(!path.exists() && !large.exists());
    }

    #[test]
    fn a_file_that_is_removed_or_cut_is_an_error_for_ever() {
        let dir = shm();
        let [removed, cut] = ["a", "b"].map(|name| dir.path().join(name));
        let mut media = [&removed, &cut].map(|path| Medium::blank(path, MIB).unwrap());
        fs::remove_file(&removed).unwrap();
        File::options().write(true).open(&cut).unwrap().set_len(4096).unwrap();
        for (medium, why) in media.iter_mut().zip(["removed", "cut"]) {
            assert!(exchange(medium, 1, 0).unwrap_err().to_string().contains(why));
            assert!(medium.flush().is_err() && medium.lost().is_some());
        }
        File::options().write(true).open(&cut).unwrap().set_len(MIB).unwrap();
        assert!(exchange(&mut media[1], 1, 0).is_err(), "zeros are not what was there");
        fs::write(&removed, "somebody else's").unwrap();
        drop(media);
        assert!(removed.exists() && !cut.exists());
    }

    #[test]
    fn only_the_very_content_is_given_and_two_futures_never_look_the_same() {
        let dir = shm();
        let [first, second, third] = ["a", "b", "c"].map(|name| dir.path().join(name));
        let mut medium = Medium::blank(&first, MIB).unwrap();
        let before = medium.mark();
        exchange(&mut medium, 9, 0).unwrap();
        let now = medium.mark();
        assert!(!medium.give(dir.path(), &before).unwrap());
        assert_eq!(exchange(&mut medium, 9, 0).unwrap(), [9; 8192]);
        assert!(!medium.give(dir.path(), &now).unwrap());
        let now = medium.mark();
        assert!(medium.give(dir.path(), &now).unwrap());
        assert!(exchange(&mut medium, 1, 0).is_err(), "what was given does not change");
        drop(medium);
        let adopt = |length, mark: &Mark| Medium::adopt(dir.path(), &second, length, mark).unwrap();
        assert!(adopt(MIB, &before).is_none() && adopt(2 * MIB, &now).is_none());
        assert!(adopt(MIB, &Mark { id: "../../etc/passwd".into(), writes: 0 }).is_none());
        let mut medium = adopt(MIB, &now).unwrap();
        let mut byte = [0];
        medium.file.read_exact_at(&mut byte, 8191).unwrap();
        assert_eq!((byte, medium.mark()), ([9], now.clone()));
        assert!(!first.exists() && second.exists());
        exchange(&mut medium, 2, 0).unwrap();
        assert_ne!(medium.mark().id, now.id, "the other future may have counted as far");
        assert!(Medium::adopt(dir.path(), &third, MIB, &now).unwrap().is_none());
    }
}
