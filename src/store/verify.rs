//! Whether a snapshot's files are what its manifest says.
//!
//! Reading all of a snapshot for its digests takes too long to do at every start. So when that was done, a
//! stamp of each file is kept: its length, inode and time of last change. As long as the stamps agree, nobody
//! wrote to the file by any ordinary way. (`ctime` would tell even of those who turn the time back, but it moves
//! with every hard link, and snapshots share files by hard links.) When one differs, everything is read again.
//! Damage below the filesystem goes unseen until then: `verify` always reads.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, Snapshot, Store};
use crate::snapshot::{Chunks, Digest, MANIFEST};
use crate::sys::files::{At, names_in, read_bounded, write_atomically};

/// The longest file of stamps; each takes some 150 bytes, and a manifest lists a few hundred files at most.
const MAX_STAMPS: u64 = 1 << 20;

/// What changes when a file is written to or replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    size: u64,
    device: u64,
    inode: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Stamp {
        Stamp {
            size: metadata.len(),
            device: metadata.dev(),
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

type Stamps = BTreeMap<String, Stamp>;

/// Files that were read already: one that several snapshots share need not be read for each of them.
#[derive(Debug, Default)]
pub struct Seen(HashMap<(u64, u64), Whole>);

/// What was found of a file.
#[derive(Debug)]
struct Whole {
    changed: Changed,
    digest: Digest,
    /// Those of its pieces, where a manifest listed them.
    chunks: Option<Chunks>,
}

/// The length of a file and its time of change, which the kernel moves with every write.
type Changed = (u64, i64, i64);

impl Store {
    /// Reads every file of the snapshot and checks its digest; `done` is told of every piece that was read,
    /// with the file's name and the bytes.
    pub fn verify(&self, snapshot: &Snapshot, done: impl FnMut(&str, u64)) -> Result<(), Error> {
        self.verify_unseen(snapshot, &mut Seen::default(), done)
    }

    /// The same for one snapshot of many: files that are in `seen` as they are now count as read.
    pub fn verify_unseen(
        &self,
        snapshot: &Snapshot,
        seen: &mut Seen,
        mut done: impl FnMut(&str, u64),
    ) -> Result<(), Error> {
        self.check_manifest(snapshot)?;
        self.check_no_others(snapshot)?;
        let mut stamps = Stamps::new();
        for file in &snapshot.manifest.files {
            let path = snapshot.dir.join(&file.name);
            let damaged = |why: String| Error::Damaged { path: path.clone(), why };
            let open = self.open_file(snapshot, &file.name)?;
            // The stamp is taken first: a change while we read must not get a stamp that covers it.
            let metadata = open.metadata().at("open", &path)?;
            let (stamp, changed) = (Stamp::of(&metadata), (metadata.len(), metadata.ctime(), metadata.ctime_nsec()));
            if stamp.size != file.size {
                return Err(damaged(format!("it has {} bytes in place of {}", stamp.size, file.size)));
            }
            let inode = (stamp.device, stamp.inode);
            let serves = |it: &&Whole| it.changed == changed && (file.chunks.is_none() || file.chunks == it.chunks);
            let known = seen.0.get(&inode).filter(serves).map(|it| it.digest);
            let found = match known {
                Some(digest) => digest,
                None => {
                    let mut watched = Watched { from: open, tell: |bytes| done(&file.name, bytes) };
                    match &file.chunks {
                        None => Digest::of_all(&mut watched).at("read", &path)?,
                        Some(chunks) => {
                            let (whole, pieces) = Digest::of_pieces(&mut watched, chunks.size).at("read", &path)?;
                            // Of a file that is damaged, its digest tells; this is of a manifest that is wrong.
                            if whole == file.digest && pieces != chunks.digests {
                                return Err(damaged("the digests of its pieces are not those in the manifest".into()));
                            }
                            whole
                        }
                    }
                }
            };
            if found != file.digest {
                return Err(damaged(format!("its digest is {found} in place of {}", file.digest)));
            }
            if known.is_none() {
                seen.0.insert(inode, Whole { changed, digest: found, chunks: file.chunks.clone() });
            }
            stamps.insert(file.name.clone(), stamp);
        }
        self.keep_stamps(snapshot, &stamps);
        Ok(())
    }

    /// Checks that no file has changed since it was last verified, and verifies all when one has. The manifest was checked
    /// when it was read.
    pub fn verify_quickly(&self, snapshot: &Snapshot) -> Result<(), Error> {
        match self.stamps(snapshot)? == self.kept_stamps(snapshot) {
            true => Ok(()),
            false => self.verify(snapshot, |_, _| {}),
        }
    }

    /// Checks that every file is there and has its length, and keeps the stamps: for files whose digests
    /// were computed just now.
    pub(super) fn check_lengths(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let stamps = self.stamps(snapshot)?;
        for file in &snapshot.manifest.files {
            if stamps.get(&file.name).is_none_or(|stamp| stamp.size != file.size) {
                let why = format!("it does not have the {} bytes that its manifest says", file.size);
                return Err(Error::Damaged { path: snapshot.dir.join(&file.name), why });
            }
        }
        self.keep_stamps(snapshot, &stamps);
        Ok(())
    }

    fn check_manifest(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let path = snapshot.dir.join(MANIFEST);
        match Digest::of_all(&mut File::open(&path).at("open", &path)?).at("read", &path)? {
            found if found == snapshot.digest => Ok(()),
            found => Err(Error::Damaged { path, why: format!("its digest is {found}") }),
        }
    }

    /// What the manifest does not list has no digest, and nothing of ours put it there.
    fn check_no_others(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let listed = |name: &String| name == MANIFEST || snapshot.manifest.files.iter().any(|file| file.name == *name);
        match names_in(&snapshot.dir)?.into_iter().find(|name| !listed(name)) {
            None => Ok(()),
            Some(stray) => {
                Err(Error::Damaged { path: snapshot.dir.join(stray), why: "it is not in the manifest".into() })
            }
        }
    }

    fn open_file(&self, snapshot: &Snapshot, name: &str) -> Result<File, Error> {
        let path = snapshot.dir.join(name);
        plain_file(&path)?;
        Ok(File::open(&path).at("open", &path)?)
    }

    fn stamps(&self, snapshot: &Snapshot) -> Result<Stamps, Error> {
        let mut stamps = Stamps::new();
        for file in &snapshot.manifest.files {
            stamps.insert(file.name.clone(), Stamp::of(&plain_file(&snapshot.dir.join(&file.name))?));
        }
        Ok(stamps)
    }

    /// What was kept, if it can be read: stamps are only a reason not to look closer.
    fn kept_stamps(&self, snapshot: &Snapshot) -> Stamps {
        let bytes = read_bounded(&self.stamps_path(&snapshot.digest), MAX_STAMPS).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Stamps only spare work: where there is no room for them, all is read again the next time.
    fn keep_stamps(&self, snapshot: &Snapshot, stamps: &Stamps) {
        let _ = serde_json::to_vec(stamps).map(|bytes| write_atomically(&self.stamps_path(&snapshot.digest), &bytes));
    }

    pub(super) fn stamps_path(&self, digest: &Digest) -> PathBuf {
        self.folder("verified").join(digest.hex())
    }
}

/// What the filesystem says of a file, if it is one.
fn plain_file(path: &Path) -> Result<Metadata, Error> {
    let damaged = |why: &str| Error::Damaged { path: path.into(), why: why.into() };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged("it is missing")),
        Ok(metadata) if !metadata.is_file() => Err(damaged("it is not a plain file")),
        other => Ok(other.at("find", path)?),
    }
}

/// Tells of what is read from a file.
struct Watched<F> {
    from: File,
    tell: F,
}

impl<F: FnMut(u64)> Read for Watched<F> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(into)?;
        (self.tell)(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Kind, Manifest, Role, describe};
    use crate::sys::home::Home;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path()).unwrap()).unwrap();
        (dir, store)
    }

    fn publish(store: &Store, kernel: &str, name: &str) -> Result<Snapshot, Error> {
        let staging = store.stage().unwrap();
        fs::write(staging.dir().join("kernel"), kernel).unwrap();
        fs::write(staging.dir().join("initrd"), "initrd").unwrap();
        let mut manifest = Manifest::new(Kind::Clean, "kitten", 1);
        manifest.files = vec![
            describe(staging.dir(), "kernel", Role::Kernel).unwrap(),
            describe(staging.dir(), "initrd", Role::Initrd).unwrap(),
        ];
        store.publish(staging, &manifest, name)
    }

    /// Writes to a file of the store as a meddler would, leaving its time of change as it was.
    fn meddle(path: &std::path::Path, bytes: &[u8]) {
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn snapshots_are_found_by_name_and_by_the_beginning_of_their_digest() {
        let (_dir, store) = store();
        let one = publish(&store, "one", "kitten").unwrap();
        let two = publish(&store, "two", "anna@monday").unwrap();
        let same = publish(&store, "one", "again").unwrap();
        assert_eq!(one.digest, same.digest);
        let full = one.digest.to_string();
        for reference in ["kitten", "again", &full, &full[..15]] {
            assert_eq!(store.resolve(reference).unwrap().digest, one.digest, "{reference}");
        }
        assert_eq!(store.resolve("anna@monday").unwrap().manifest, two.manifest);
        for bad in ["", "../names/kitten", "sha256:", "sha256:xyzw", "sha256:abc", "a@b@c", "@x", "KITTEN/.."] {
            assert!(matches!(store.resolve(bad), Err(Error::Reference(_))), "{bad}");
        }
        for missing in ["nobody", "kitten@friday", "sha256:ffffffff"] {
            assert!(matches!(store.resolve(missing), Err(Error::NoSnapshot(_))), "{missing}");
        }
        let listed = store.list().unwrap();
        assert_eq!(listed.len(), 2);
        let names = &listed.iter().find(|listed| listed.digest == one.digest).unwrap().names;
        assert_eq!(names[..], ["again", "kitten"]);
        store.remove_name("again").unwrap();
        assert!(matches!(store.resolve("again"), Err(Error::NoSnapshot(_))));
    }

    #[test]
    fn any_change_to_any_file_is_refused_by_name() {
        for file in ["kernel", "initrd", MANIFEST] {
            let (_dir, store) = store();
            let snapshot = publish(&store, "kernel", "kitten").unwrap();
            let path = snapshot.dir.join(file);
            let mut bytes = fs::read(&path).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
            store.verify_quickly(&snapshot).unwrap();
            std::thread::sleep(Duration::from_millis(10));
            bytes[0] ^= 1;
            meddle(&path, &bytes);
            let failed = store.resolve("kitten").and_then(|snapshot| store.verify_quickly(&snapshot));
            let said = failed.unwrap_err().to_string();
            assert!(said.contains(&path.display().to_string()), "{said}");
            if file != MANIFEST {
                fs::remove_file(&path).unwrap();
                let said = store.verify_quickly(&snapshot).unwrap_err().to_string();
                assert!(said.contains(file) && said.contains("missing"), "{said}");
            }
        }
    }

    #[test]
    fn stamps_spare_the_reading_and_a_touched_file_is_read_again() {
        let (_dir, store) = store();
        let snapshot = publish(&store, "kernel", "kitten").unwrap();
        let stamps = store.stamps_path(&snapshot.digest);
        let before = fs::read(&stamps).unwrap();
        store.verify_quickly(&snapshot).unwrap();
        assert_eq!(fs::read(&stamps).unwrap(), before);
        std::thread::sleep(Duration::from_millis(10));
        File::open(snapshot.dir.join("kernel")).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
        store.verify_quickly(&snapshot).unwrap();
        assert_ne!(fs::read(&stamps).unwrap(), before, "not read again");
        for rubbish in ["", "{}", "\u{0}"] {
            fs::write(&stamps, rubbish).unwrap();
            store.verify_quickly(&snapshot).unwrap();
        }
    }

    #[test]
    fn a_removed_snapshot_is_gone_with_its_names_and_others_stay() {
        let (_dir, store) = store();
        let one = publish(&store, "one", "kitten").unwrap();
        publish(&store, "one", "again").unwrap();
        let two = publish(&store, "two", "other").unwrap();
        meddle(&one.dir.join("kernel"), b"eno");
        store.remove_snapshot(&one.digest).unwrap();
        assert!(matches!(store.resolve("again"), Err(Error::NoSnapshot(_))));
        assert!(!one.dir.exists());
        assert_eq!(store.list().unwrap().iter().map(|listed| listed.digest).collect::<Vec<_>>(), [two.digest]);
        assert_eq!(store.sweep().unwrap(), 0, "nothing is left to sweep");
    }

    #[test]
    fn making_a_damaged_snapshot_again_repairs_it() {
        let (_dir, store) = store();
        let snapshot = publish(&store, "kernel", "kitten").unwrap();
        meddle(&snapshot.dir.join("kernel"), b"kernal");
        publish(&store, "kernel", "kitten").unwrap();
        store.verify(&snapshot, |_, _| {}).unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
    }

    #[test]
    fn shared_files_are_read_once_and_changed_ones_again() {
        let (_dir, store) = store();
        let one = crate::store::testing::Made::new(Kind::Crash, "a@1").file("f", &[7; 20_000]).publish(&store);
        let two = crate::store::testing::Made::new(Kind::Crash, "a@2").link(&one, "f").publish(&store);
        let mut seen = Seen::default();
        let mut read = 0;
        store.verify_unseen(&one, &mut seen, |name, bytes| read += bytes * u64::from(name == "f")).unwrap();
        assert_eq!(read, 20_000);
        store.verify_unseen(&two, &mut seen, |_, bytes| read += bytes).unwrap();
        assert_eq!(read, 20_000);
        // Another manifest's digests of pieces are its own, and may be wrong.
        let mut wrong = two.manifest.clone();
        wrong.files[0].chunks = Some(Chunks { size: 10_000, digests: vec![two.digest; 2] });
        let staging = store.stage().unwrap();
        fs::hard_link(one.dir.join("f"), staging.dir().join("f")).unwrap();
        let three = store.publish(staging, &wrong, "a@3").unwrap();
        store.verify_unseen(&two, &mut seen, |_, _| {}).unwrap();
        let said = store.verify_unseen(&three, &mut seen, |_, _| {}).unwrap_err().to_string();
        assert!(said.contains("pieces"), "{said}");
        std::thread::sleep(Duration::from_millis(10));
        meddle(&one.dir.join("f"), &[8; 20_000]);
        assert!(matches!(store.verify_unseen(&two, &mut seen, |_, _| {}), Err(Error::Damaged { .. })));
        fs::write(two.dir.join("stray"), "").unwrap();
        let said = store.verify(&two, |_, _| {}).unwrap_err().to_string();
        assert!(said.contains("stray"), "{said}");
    }

    #[test]
    fn what_cannot_have_its_name_does_not_stay_and_stamps_are_no_need() {
        let (_dir, store) = store();
        let there = publish(&store, "one", "kitten").unwrap();
        let names = store.folder("names");
        fs::rename(&names, names.with_extension("away")).unwrap();
        publish(&store, "two", "taken").unwrap_err();
        assert_eq!(store.list().unwrap().len(), 1, "it is there after all");
        publish(&store, "one", "taken").unwrap_err();
        fs::rename(names.with_extension("away"), &names).unwrap();
        assert_eq!(store.resolve("kitten").unwrap().digest, there.digest, "what was there before goes too");
        let stamps = store.folder("verified");
        fs::remove_dir_all(&stamps).unwrap();
        fs::write(&stamps, "").unwrap();
        let three = publish(&store, "three", "other").unwrap();
        store.verify(&three, |_, _| {}).unwrap();
    }

    #[test]
    fn nothing_half_made_is_published() {
        let (_dir, store) = store();
        let staging = store.stage().unwrap();
        fs::write(staging.dir().join("stray"), "x").unwrap();
        let error = store.publish(staging, &Manifest::new(Kind::Clean, "kitten", 1), "kitten").unwrap_err();
        assert!(error.to_string().contains("stray"), "{error}");
        assert!(matches!(store.resolve("kitten"), Err(Error::NoSnapshot(_))));
        assert_eq!(store.list().unwrap().len(), 0);
    }
}
