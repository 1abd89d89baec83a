//! Removing a snapshot that others need, by giving them what they need of it.
//!
//! ```text
//! kitten ◄── monday ◄── tuesday ◄── wednesday        before
//! kitten ◄───────────── tuesday' ◄── wednesday'      after
//! ```
//!
//! A snapshot never changes. So each that needs the one that goes is made anew: its lowest disk layers and its
//! memory are laid over those that go, everything else is linked. Its digest is another one then, and whatever
//! needs it is made anew as well, to name that. The names move over one by one, each to a snapshot with the same
//! content, and the old ones go last: a kill at any moment leaves every name with a whole snapshot.

mod memory;
mod whole;

pub use whole::Each;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::snapshots::backing_path;
use super::{Dependent, Error, Family, Seen, Snapshot, Staging, Store};
use crate::disk::{Format, chain_files, fold};
use crate::snapshot::{self, Backing, Digest, Disk, MANIFEST, Manifest, MemoryInfo, Role, describe};
use crate::sys::files::At;

impl Store {
    /// Checks that nothing is in the way of [`Store::merge_snapshot`], short of damage.
    pub fn check_merge(&self, digest: &Digest) -> Result<(), Error> {
        heirs(&self.family()?, digest).map(|_| ())
    }

    /// Removes a snapshot; what needs it takes over what it needs of it. Gives the names of the snapshots that
    /// were made anew for that. Refused while a machine stands on any of them; nothing has changed then. `step` is
    /// told what is being done.
    pub fn merge_snapshot(&self, digest: &Digest, mut step: impl FnMut(&str)) -> Result<Vec<String>, Error> {
        let family = self.family()?;
        let heirs = heirs(&family, digest)?;
        let going = self.load(digest)?;
        // New digests are computed from what is read here: damage must not get one.
        let mut seen = Seen::default();
        for snapshot in std::iter::once(&going).chain(heirs.iter().map(|(_, heir)| *heir)) {
            step(&format!("verifying {}", snapshot.manifest.name));
            self.verify_unseen(snapshot, &mut seen, |_, _| {})?;
            self.verify_links(snapshot)?;
        }
        let mut merge = Merge { store: self, going, anew: BTreeMap::new(), layers: HashMap::new() };
        let mut names = Vec::new();
        for (listed, heir) in &heirs {
            step(&format!("making {} anew", listed.join(", ")));
            let made = merge.make_anew(heir)?;
            listed.iter().try_for_each(|name| self.set_name(name, &made.digest))?;
            names.extend(listed.iter().cloned());
            merge.anew.insert(heir.digest, made);
        }
        let alone = self.alone()?;
        for (_, heir) in heirs.iter().rev() {
            alone.remove(&heir.digest)?;
        }
        alone.remove(digest)?;
        Ok(names)
    }
}

/// A snapshot that is made anew, with its names.
type Heir<'a> = (&'a [String], &'a Snapshot);

/// All that needs the snapshot, directly or not, each behind what it needs and what it comes from.
fn heirs<'a>(family: &'a Family, digest: &Digest) -> Result<Vec<Heir<'a>>, Error> {
    let mut affected = BTreeSet::from([*digest]);
    let mut heirs: Vec<Heir<'a>> = Vec::new();
    let (mut next, mut refusal, mut above) = (vec![*digest], None, Vec::new());
    while let Some(needed) = next.pop() {
        let (of, mut by) = (family.get(&needed).map_or_else(|| needed.short(), super::Listed::name), Vec::new());
        for dependent in family.dependents(&needed) {
            match dependent {
                Dependent::Snapshot { digest, need: Some(_), .. } if affected.insert(digest) => next.push(digest),
                Dependent::Snapshot { need: Some(_), .. } => {}
                other => by.push(other),
            }
        }
        if !by.is_empty() {
            above.extend(by.iter().cloned());
            refusal.get_or_insert((of, by));
        }
    }
    if let Some((of, by)) = refusal {
        // The snapshots need not go: they are made anew.
        return Err(Error::Needed { of, by, above });
    }
    affected.remove(digest);
    // No manifest can hold a digest that depends on its own, so there is always one whose needs are met.
    let comes_first = |digest: &Digest, affected: &BTreeSet<Digest>| {
        let heir = family.get(digest).and_then(|listed| listed.snapshot.as_ref().ok());
        heir.is_some_and(|heir| {
            let mut before = heir.manifest.needs().map(|(needed, _)| needed).chain(heir.manifest.parent);
            before.all(|digest| !affected.contains(&digest))
        })
    };
    while let Some(ready) = affected.iter().copied().find(|digest| comes_first(digest, &affected)) {
        affected.remove(&ready);
        let listed = family.get(&ready);
        heirs.extend(listed.and_then(|listed| Some((&listed.names[..], listed.snapshot.as_ref().ok()?))));
    }
    Ok(heirs)
}

/// A layer that was made anew, and the device and inode of the old one.
type Relaid = (snapshot::File, (u64, u64));

/// A merge under way.
struct Merge<'a> {
    store: &'a Store,
    going: Snapshot,
    /// What was made anew so far, by the digests that are replaced.
    anew: BTreeMap<Digest, Snapshot>,
    /// Layers that were made anew, by the inodes of the old ones: snapshots share them, and shall again.
    layers: HashMap<(u64, u64), (PathBuf, snapshot::File)>,
}

impl Merge<'_> {
    fn make_anew(&mut self, heir: &Snapshot) -> Result<Snapshot, Error> {
        let staging = self.store.stage()?;
        let mut manifest = Manifest { files: Vec::new(), ..heir.manifest.clone() };
        manifest.parent = heir.manifest.parent.and_then(|parent| match parent {
            parent if parent == self.going.digest => self.going.manifest.parent,
            parent => Some(self.moved(parent)),
        });
        let mut made = Vec::new();
        for disk in &mut manifest.disks {
            made.extend(self.lay_anew(heir, disk, &staging)?);
        }
        manifest.memory = self.memory_anew(heir, &staging)?;
        for old in &heir.manifest.files {
            let memory = matches!(old.role, Role::Memory | Role::MemoryIndex);
            let path = staging.dir().join(&old.name);
            let file = match made.iter().find(|(file, _)| file.name == old.name) {
                Some((file, _)) => file.clone(),
                None if memory && path.exists() => describe(staging.dir(), &old.name, old.role)?,
                None => {
                    let from = heir.dir.join(&old.name);
                    fs::hard_link(&from, &path).at("link", &from)?;
                    old.clone()
                }
            };
            manifest.files.push(file);
        }
        let snapshot = self.store.publish_nameless(staging, &manifest)?;
        self.layers.extend(made.into_iter().map(|(file, inode)| (inode, (snapshot.dir.join(&file.name), file))));
        Ok(snapshot)
    }

    /// The digest under which a snapshot is found after the merge.
    fn moved(&self, digest: Digest) -> Digest {
        self.anew.get(&digest).map_or(digest, |anew| anew.digest)
    }

    /// Puts the lowest own layer of a disk over what comes to lie below it. Gives the new file, with the inode of
    /// the old one; none when the disk does not lie over anything that goes or was made anew.
    fn lay_anew(&self, heir: &Snapshot, disk: &mut Disk, staging: &Staging) -> Result<Option<Relaid>, Error> {
        let Some(backing) = disk.backing.clone() else { return Ok(None) };
        let goes = backing.snapshot == self.going.digest;
        if !goes && !self.anew.contains_key(&backing.snapshot) {
            return Ok(None);
        }
        let unsound = |why: &str| Error::Damaged { path: heir.dir.join(MANIFEST), why: why.into() };
        let format = Format::from_name(&disk.format).ok_or_else(|| unsound("a disk's format is not known"))?;
        let chain = chain_files(&heir.dir.join(&disk.file), format, self.store.root())?;
        let own = files_in(&heir.dir, &chain)?;
        let (lowest, _) =
            own.checked_sub(1).and_then(|at| chain.get(at)).ok_or_else(|| unsound("a disk has no file"))?;
        let below = if goes { files_in(&self.going.dir, &chain[own..])? } else { 0 };
        disk.backing = match goes {
            true => self.backing_of_going(&backing)?,
            false => Some(Backing { snapshot: self.moved(backing.snapshot), ..backing }),
        };

        let metadata = fs::metadata(lowest).at("find", lowest)?;
        let inode = (metadata.dev(), metadata.ino());
        let name = lowest.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let path = staging.dir().join(name);
        if let Some((made, file)) = self.layers.get(&inode) {
            fs::hard_link(made, &path).at("link", made)?;
            return Ok(Some((file.clone(), inode)));
        }
        let lies_over = match &disk.backing {
            None => None,
            Some(backing) => {
                let base = self.store.load(&backing.snapshot)?;
                let format = chain.get(own + below).map_or(Format::Qcow2, |(_, format)| *format);
                Some((backing_path(&base, &backing.file), format))
            }
        };
        let lies_over = lies_over.as_ref().map(|(path, format)| (path.as_str(), *format));
        fold(&chain[own - 1..own + below], &path, lies_over, self.store.root())?;
        Ok(Some((describe(staging.dir(), name, Role::Disk)?, inode)))
    }

    /// What the disk that goes lies over itself.
    fn backing_of_going(&self, backing: &Backing) -> Result<Option<Backing>, Error> {
        let disk = self.going.manifest.disks.iter().find(|disk| disk.file == backing.file);
        let damaged = || Error::Damaged { path: self.going.dir.join(MANIFEST), why: "it lacks a disk".into() };
        Ok(disk.ok_or_else(damaged)?.backing.clone())
    }

    /// Puts the memory of `heir` over that of the snapshot that goes, if it is a difference to it.
    fn memory_anew(&self, heir: &Snapshot, staging: &Staging) -> Result<Option<MemoryInfo>, Error> {
        let Some(memory) = heir.manifest.memory.clone() else { return Ok(None) };
        match memory.parent {
            Some(parent) if parent == self.going.digest => {
                let bytes = memory::merge(self.store, heir, 2, staging.dir())?;
                let parent = self.going.manifest.memory.as_ref().and_then(|memory| memory.parent);
                Ok(Some(MemoryInfo { parent, bytes }))
            }
            parent => Ok(Some(MemoryInfo { parent: parent.map(|parent| self.moved(parent)), ..memory })),
        }
    }
}

/// How many of the first files of a chain lie in this folder.
fn files_in(dir: &Path, chain: &[(PathBuf, Format)]) -> Result<usize, Error> {
    let dir = fs::canonicalize(dir).at("find", dir)?;
    Ok(chain.iter().take_while(|(path, _)| path.parent() == Some(&dir)).count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Access, compare, open};
    use crate::snapshot::Kind;
    use crate::store::testing::{Made, spec, store};

    fn zero(store: &Store, made: &Path, offset: u64) {
        let mut disk = open(made, Format::Qcow2, Access::ReadWrite, store.root()).unwrap();
        disk.write_zeroes(offset, 65536, false).unwrap();
        disk.flush().unwrap();
    }

    /// A chain like that of the module's head, with something written to each layer.
    fn chain(store: &Store) -> [Snapshot; 4] {
        let kitten = Made::new(Kind::Clean, "kitten").filled(7).publish(store);
        let touch = |at: u64| move |store: &Store, dir: &Path, layer: &str| zero(store, &dir.join(layer), at * 65536);
        let monday = Made::new(Kind::Crash, "anna@monday").disk(Some(&kitten)).touch(touch(1)).publish(store);
        let tuesday = Made::new(Kind::Crash, "ben@tuesday").disk(Some(&monday)).touch(touch(2));
        let tuesday = tuesday.parent(&monday).publish(store);
        let wednesday = Made::new(Kind::Crash, "ben@wednesday").successor(&tuesday).touch(touch(3));
        let wednesday = wednesday.parent(&tuesday).publish(store);
        [kitten, monday, tuesday, wednesday]
    }

    #[test]
    fn heirs_read_as_before_and_share_as_before() {
        let (dir, store) = store();
        let [kitten, monday, tuesday, wednesday] = chain(&store);
        // One that lies over an heir has to name the new one.
        let carl = Made::new(Kind::Crash, "carl@x").disk(Some(&tuesday)).publish(&store);
        store.set_name("ben@again", &tuesday.digest).unwrap();
        let whole = |snapshot: &Snapshot, name: &str| {
            let copy = dir.path().join(name);
            let top = snapshot.dir.join(&snapshot.manifest.disks[0].file);
            let chain = chain_files(&top, Format::Qcow2, store.root()).unwrap();
            fold(&chain, &copy, None, store.root()).unwrap();
            copy
        };
        let before = [&tuesday, &wednesday, &carl].map(|snapshot| whole(snapshot, &snapshot.manifest.name));
        let mut names = store.merge_snapshot(&monday.digest, |_| {}).unwrap();
        names.sort();
        assert_eq!(names, ["ben@again", "ben@tuesday", "ben@wednesday", "carl@x"]);
        assert!([&monday, &tuesday, &wednesday, &carl].iter().all(|gone| !gone.dir.exists()));
        assert_eq!(store.list().unwrap().len(), 4);
        for (name, before) in ["ben@again", "ben@wednesday", "carl@x"].into_iter().zip(&before) {
            let anew = store.resolve(name).unwrap();
            store.verify(&anew, |_, _| {}).unwrap();
            store.verify_links(&anew).unwrap();
            let after = whole(&anew, &format!("{name}-after"));
            let same = compare((before, Format::Qcow2), (&after, Format::Qcow2), dir.path(), |_, _| true).unwrap();
            assert_eq!(same.clusters, 0, "{name}");
        }
        let [tuesday, wednesday, carl] =
            ["ben@tuesday", "ben@wednesday", "carl@x"].map(|name| store.resolve(name).unwrap());
        assert_eq!(tuesday.manifest.disks[0].backing.as_ref().unwrap().snapshot, kitten.digest);
        assert_eq!(carl.manifest.disks[0].backing.as_ref().unwrap().snapshot, tuesday.digest);
        assert_eq!(
            (tuesday.manifest.parent, wednesday.manifest.parent),
            (monday.manifest.parent, Some(tuesday.digest))
        );
        let inode = |snapshot: &Snapshot| fs::metadata(snapshot.dir.join("root-1.qcow2")).unwrap().ino();
        assert_eq!(inode(&tuesday), inode(&wednesday), "what was shared is shared");
        // Down to the base, and that too.
        store.merge_snapshot(&kitten.digest, |_| {}).unwrap();
        let last = store.resolve("ben@wednesday").unwrap();
        assert_eq!(last.manifest.disks[0].backing, None);
        store.verify_links(&last).unwrap();
        assert_eq!(store.sweep().unwrap(), 0);
    }

    #[test]
    fn a_machine_or_damage_is_in_the_way_and_nothing_changes() {
        let (_dir, store) = store();
        let [_, monday, _, wednesday] = chain(&store);
        store.create_machine(&spec("dora"), &wednesday).unwrap();
        let refused = store.merge_snapshot(&monday.digest, |_| {});
        let Err(Error::Needed { of, above, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!((of.as_str(), above.len(), above[0].name()), ("ben@wednesday", 1, "dora"));
        store.remove_machine(&"dora".parse().unwrap()).unwrap();
        let layer = monday.dir.join("root-1.qcow2");
        let mut bytes = fs::read(&layer).unwrap();
        bytes[70_000] ^= 1;
        fs::remove_file(&layer).unwrap();
        fs::write(&layer, bytes).unwrap();
        assert!(matches!(store.merge_snapshot(&monday.digest, |_| {}), Err(Error::Damaged { .. })));
        assert_eq!(store.list().unwrap().len(), 4);
        assert_eq!(store.sweep().unwrap(), 0);
    }
}
