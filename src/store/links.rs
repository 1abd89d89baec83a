//! Whether what a snapshot builds on is what its manifest says.
//!
//! Digests prove that a file is what it was; they do not prove that the manifest tells the truth about it. The
//! header of a disk names the file below it, and that must be the next layer in the same folder or the very
//! file of the very snapshot that the manifest names: what depends on what is read from manifests alone.

use std::path::Path;

use super::snapshots::backing_path;
use super::{Error, Snapshot, Store};
use crate::disk::{Format, Header};
use crate::snapshot::{Backing, Digest, Disk, MANIFEST, Role};

impl Store {
    /// Checks the backing files that the disks' headers name, and that the snapshot whose memory this one's is
    /// a difference to is there and has memory. Reads only headers and manifests.
    pub fn verify_links(&self, snapshot: &Snapshot) -> Result<(), Error> {
        snapshot.manifest.disks.iter().try_for_each(|disk| self.verify_disk(snapshot, disk))?;
        let Some(parent) = snapshot.manifest.memory.as_ref().and_then(|memory| memory.parent) else { return Ok(()) };
        let damaged = |why| Error::Damaged { path: snapshot.dir.join(MANIFEST), why };
        let parent = self.needed(&parent, "its memory is a difference to").map_err(damaged)?;
        match parent.manifest.memory {
            Some(_) => Ok(()),
            None => Err(damaged(format!("its memory is a difference to {}, which has none", parent.digest.short()))),
        }
    }

    fn verify_disk(&self, snapshot: &Snapshot, disk: &Disk) -> Result<(), Error> {
        let mut name = disk.file.clone();
        let mut format = format_of(snapshot, &disk.format)?;
        let mut seen = Vec::new();
        loop {
            let path = snapshot.dir.join(&name);
            let damaged = |why: String| Error::Damaged { path: path.clone(), why };
            if seen.contains(&name) {
                return Err(damaged("it is backed by itself".into()));
            }
            let below = header(&path, format)?.inspect_size(seen.is_empty().then_some(disk), &path)?;
            let Some((below, below_format)) = below else {
                return match &disk.backing {
                    None => Ok(()),
                    Some(backing) => {
                        Err(damaged(format!("it has no backing file, but should lie over {}", shown(backing))))
                    }
                };
            };
            let layer = |file: &&crate::snapshot::File| file.role == Role::Disk && file.name == below;
            if snapshot.manifest.files.iter().any(|file| layer(&file)) {
                seen.push(std::mem::replace(&mut name, below));
                format = below_format;
                continue;
            }
            let backing = disk.backing.as_ref();
            let backing =
                backing.ok_or_else(|| damaged(format!("its backing file is `{}`", below.escape_default())))?;
            return self.verify_base(backing, &below, below_format).map_err(damaged);
        }
    }

    /// Checks that `below`, in a header, leads to `backing`, and that this is a disk of that snapshot.
    fn verify_base(&self, backing: &Backing, below: &str, format: Format) -> Result<(), String> {
        let base = self.needed(&backing.snapshot, "it lies over")?;
        if below != backing_path(&base, &backing.file) {
            return Err(format!("its backing file is `{}` in place of {}", below.escape_default(), shown(backing)));
        }
        let files = &base.manifest.files;
        if !files.iter().any(|file| file.name == backing.file && file.role == Role::Disk) {
            return Err(format!("it lies over {}, which is no disk", shown(backing)));
        }
        match base.manifest.disks.iter().find(|disk| disk.file == backing.file) {
            Some(disk) if disk.format != format.name() => {
                Err(format!("it takes {}, which is {}, for {}", shown(backing), disk.format, format.name()))
            }
            _ => Ok(()),
        }
    }

    fn needed(&self, digest: &Digest, why: &str) -> Result<Snapshot, String> {
        self.load(digest).map_err(|error| match error {
            Error::NoSnapshot(_) => format!("{why} {}, which is missing", digest.short()),
            error => format!("{why} {}: {error}", digest.short()),
        })
    }
}

/// What the header of a layer says.
struct Front {
    size: Option<u64>,
    backing: Option<(String, Format)>,
}

impl Front {
    /// Checks the size of the top layer, and gives what lies below.
    fn inspect_size(self, top: Option<&Disk>, path: &Path) -> Result<Option<(String, Format)>, Error> {
        match (top, self.size) {
            (Some(disk), Some(size)) if size != disk.virtual_size => {
                let why = format!("the disk in it has {size} bytes in place of {}", disk.virtual_size);
                Err(Error::Damaged { path: path.into(), why })
            }
            _ => Ok(self.backing),
        }
    }
}

fn header(path: &Path, format: Format) -> Result<Front, Error> {
    if format == Format::Raw {
        return Ok(Front { size: None, backing: None });
    }
    match Header::read(path) {
        Ok(header) => Ok(Front { size: Some(header.size), backing: header.backing }),
        Err(crate::disk::Error::Refused { path, why }) => Err(Error::Damaged { path, why }),
        Err(error) => Err(error.into()),
    }
}

fn format_of(snapshot: &Snapshot, name: &str) -> Result<Format, Error> {
    Format::from_name(name).ok_or_else(|| Error::Damaged {
        path: snapshot.dir.join(MANIFEST),
        why: format!("a disk's format is {:?}", name.chars().take(20).collect::<String>()),
    })
}

fn shown(backing: &Backing) -> String {
    format!("{} of {}", backing.file, backing.snapshot.short())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::snapshot::Kind;
    use crate::store::testing::{Made, store};

    fn refusal(store: &Store, snapshot: &Snapshot) -> String {
        match store.verify_links(snapshot).unwrap_err() {
            error @ Error::Damaged { .. } => error.to_string(),
            error => panic!("{error:?}"),
        }
    }

    #[test]
    fn chains_that_are_as_the_manifest_says_are_taken() {
        let (_dir, store) = store();
        let kitten = Made::new(Kind::Clean, "kitten").disk(None).publish(&store);
        let one = Made::new(Kind::Live, "anna@one").disk(Some(&kitten)).memory(None).publish(&store);
        let two = Made::new(Kind::Live, "anna@two").successor(&one).memory(Some(&one)).publish(&store);
        for snapshot in [&kitten, &one, &two] {
            store.verify_links(snapshot).unwrap();
        }
        store.remove_snapshot(&two.digest).unwrap();
        // What is gone by other hands than ours is told of.
        let three = Made::new(Kind::Live, "anna@three").successor(&one).memory(Some(&one)).publish(&store);
        fs::remove_dir_all(&one.dir).unwrap();
        assert!(refusal(&store, &three).contains("which is missing"));
        fs::remove_dir_all(&kitten.dir).unwrap();
        let said = refusal(&store, &three);
        assert!(said.contains("root-1.qcow2") && said.contains("which is missing"), "{said}");
    }

    #[test]
    fn manifests_that_do_not_tell_the_truth_are_refused() {
        let (_dir, store) = store();
        let kitten = Made::new(Kind::Clean, "kitten").disk(None).publish(&store);
        let other = Made::new(Kind::Clean, "other").filled(1).publish(&store);
        let over = || Made::new(Kind::Crash, "anna@x").disk(Some(&kitten));
        let to =
            |digest| move |m: &mut crate::snapshot::Manifest| m.disks[0].backing.as_mut().unwrap().snapshot = digest;
        for (liar, why) in [
            (over().with(to(other.digest)), "in place of root-1.qcow2 of"),
            (over().with(|m| m.disks[0].backing = None), "its backing file is"),
            (over().with(|m| m.disks[0].virtual_size += 512), "bytes in place of"),
            (over().with(|m| m.disks[0].format = "vmdk".into()), "format is \"vmdk\""),
            (over().with(|m| m.disks[0].backing.as_mut().unwrap().file = "kernel".into()), "in place of kernel"),
            (
                Made::new(Kind::Clean, "x").filled(2).with(|m| {
                    m.disks[0].backing = Some(Backing { snapshot: kitten.digest, file: "root-1.qcow2".into() });
                }),
                "it has no backing file",
            ),
            (Made::new(Kind::Live, "anna@y").memory(Some(&kitten)), "which has none"),
        ] {
            let liar = liar.publish(&store);
            let said = refusal(&store, &liar);
            assert!(said.contains(why), "{said}");
        }
        let raw = Made::new(Kind::Clean, "raw").filled(3).with(|m| m.disks[0].format = "raw".into()).publish(&store);
        let misread = Made::new(Kind::Crash, "anna@z").disk(Some(&raw)).publish(&store);
        assert!(refusal(&store, &misread).contains("which is raw, for qcow2"));
    }
}
