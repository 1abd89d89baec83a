//! Who needs whom: what would break without a snapshot.
//!
//! A snapshot needs those that its manifest names for its disks and its memory. A machine needs the snapshot
//! that it was made from, and whatever the headers of its disks name: those also tell when `machine.json`
//! cannot be read. A snapshot of a later format may need anything.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use super::machines::Listed as ListedMachine;
use super::snapshots::backing_of_path;
use super::{Error, Listed, Store};
use crate::disk::Header;
use crate::snapshot::{self, Digest, Need};
use crate::spec::Name;
use crate::sys::files::names_in;

/// The snapshots and machines of a store with what they need, as read at one moment.
#[derive(Debug)]
pub struct Family {
    /// The snapshots, in the order of their digests.
    pub snapshots: Vec<Listed>,
    /// The machines, in the order of their names.
    pub machines: Vec<ListedMachine>,
    /// For each machine, the snapshots that it stands on.
    stands_on: Vec<(Name, BTreeSet<Digest>)>,
}

/// Something that would break without a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dependent {
    /// Another snapshot.
    Snapshot {
        /// Its identity.
        digest: Digest,
        /// A name of it, or the beginning of its digest when it has none.
        name: String,
        /// What it needs the snapshot for; none when it is of a later format and may need anything.
        need: Option<Need>,
    },
    /// A machine.
    Machine {
        /// Its name.
        name: Name,
    },
}

impl Dependent {
    /// How a person calls it.
    pub fn name(&self) -> &str {
        match self {
            Dependent::Snapshot { name, .. } => name,
            Dependent::Machine { name } => name.as_str(),
        }
    }

    /// Whether it is that one, whatever either needs.
    fn is_same(&self, other: &Dependent) -> bool {
        match (self, other) {
            (Dependent::Snapshot { digest: one, .. }, Dependent::Snapshot { digest: two, .. }) => one == two,
            (Dependent::Machine { name: one }, Dependent::Machine { name: two }) => one == two,
            _ => false,
        }
    }

    /// What it needs the snapshot `of` for, as a clause.
    pub fn clause(&self, of: &str) -> String {
        match self {
            Dependent::Snapshot { name, need: Some(Need::Disk), .. } => {
                format!("a disk of {name} lies over one of {of}")
            }
            Dependent::Snapshot { name, need: Some(Need::Memory), .. } => {
                format!("the memory of {name} is a difference to that of {of}")
            }
            Dependent::Snapshot { name, need: None, .. } => {
                format!("{name} was made by a later catnap and may need {of}")
            }
            Dependent::Machine { name } => format!("the machine {name} is made from {of}"),
        }
    }
}

impl Store {
    /// Reads every manifest, and what every machine stands on.
    pub fn family(&self) -> Result<Family, Error> {
        let machines = self.machines()?;
        let stands_on = machines.iter().map(|(name, machine)| {
            let image = machine.as_ref().ok().and_then(|machine| machine.spec.image.parse().ok());
            let disks = below_disks(&self.root().join("machines").join(name.as_str()));
            (name.clone(), image.into_iter().chain(disks).collect())
        });
        let stands_on = stands_on.collect();
        Ok(Family { snapshots: self.list()?, machines, stands_on })
    }

    /// What would break without the snapshot.
    pub fn dependents(&self, digest: &Digest) -> Result<Vec<Dependent>, Error> {
        Ok(self.family()?.dependents(digest))
    }
}

impl Family {
    /// What would break without the snapshot: each with every reason that it has.
    pub fn dependents(&self, digest: &Digest) -> Vec<Dependent> {
        self.dependents_without(digest, &BTreeSet::new())
    }

    /// The same, when the snapshots `gone` were not there any more.
    pub fn dependents_without(&self, digest: &Digest, gone: &BTreeSet<Digest>) -> Vec<Dependent> {
        let mut found = Vec::new();
        for listed in self.snapshots.iter().filter(|listed| listed.digest != *digest && !gone.contains(&listed.digest))
        {
            let needs: BTreeSet<Option<Need>> = match &listed.snapshot {
                Ok(snapshot) => {
                    snapshot.manifest.needs().filter(|(on, _)| on == digest).map(|(_, n)| Some(n)).collect()
                }
                Err(Error::Manifest(snapshot::Error::Later { .. })) => [None].into(),
                // Nobody can use it any more, whatever it needs.
                Err(_) => BTreeSet::new(),
            };
            let dependent = |need| Dependent::Snapshot { digest: listed.digest, name: listed.name(), need };
            found.extend(needs.into_iter().map(dependent));
        }
        let machines = self.stands_on.iter().filter(|(_, on)| on.contains(digest));
        found.extend(machines.map(|(name, _)| Dependent::Machine { name: name.clone() }));
        found
    }

    /// All that would have to go before the snapshot does, by each of its names: what would break without it, what would
    /// break without that, and so on.
    pub fn above(&self, digest: &Digest, gone: &BTreeSet<Digest>) -> Vec<Dependent> {
        let (mut above, mut next): (Vec<Dependent>, _) = (Vec::new(), vec![*digest]);
        while let Some(below) = next.pop() {
            for dependent in self.dependents_without(&below, gone) {
                let known = above.iter().any(|known| known.is_same(&dependent));
                match &dependent {
                    _ if known => continue,
                    Dependent::Snapshot { digest: itself, .. } if itself == digest => continue,
                    Dependent::Snapshot { digest, .. } => next.push(*digest),
                    Dependent::Machine { .. } => {}
                }
                above.push(dependent);
            }
        }
        above.into_iter().flat_map(|dependent| self.by_each_name(dependent)).collect()
    }

    fn by_each_name(&self, dependent: Dependent) -> Vec<Dependent> {
        match &dependent {
            Dependent::Snapshot { digest, need, .. } => match self.get(digest).map(|listed| &listed.names[..]) {
                None | Some([]) => vec![dependent],
                Some(names) => {
                    let by = |name: &String| Dependent::Snapshot { digest: *digest, name: name.clone(), need: *need };
                    names.iter().map(by).collect()
                }
            },
            Dependent::Machine { .. } => vec![dependent],
        }
    }

    /// The snapshot of this digest, if it is there.
    pub fn get(&self, digest: &Digest) -> Option<&Listed> {
        let found = self.snapshots.binary_search_by(|listed| listed.digest.cmp(digest));
        found.ok().map(|at| &self.snapshots[at])
    }
}

/// The snapshots that the headers of the disks in a machine's folder name. What cannot be read names none.
fn below_disks(dir: &Path) -> Vec<Digest> {
    let files = names_in(dir).unwrap_or_default();
    let disks = files.iter().filter(|name| name.ends_with(".qcow2"));
    let backing = |name: &String| backing_of_path(&Header::read(&dir.join(name)).ok()?.backing?.0);
    disks.filter_map(backing).map(|backing| backing.snapshot).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::snapshot::{Kind, MANIFEST};
    use crate::store::testing::{Made, store};

    fn names(found: &[Dependent]) -> Vec<&str> {
        found.iter().map(Dependent::name).collect()
    }

    #[test]
    fn disks_memories_and_machines_depend_and_lineage_does_not() {
        let (_dir, store) = store();
        let kitten = Made::new(Kind::Clean, "kitten").disk(None).publish(&store);
        let monday = Made::new(Kind::Live, "anna@monday").disk(Some(&kitten)).memory(None).publish(&store);
        let tuesday = Made::new(Kind::Live, "anna@tuesday").disk(Some(&kitten)).memory(Some(&monday)).publish(&store);
        let later = Made::new(Kind::Crash, "anna@later").disk(Some(&kitten)).parent(&tuesday).publish(&store);
        let machine = store.create_machine(&crate::store::testing::spec("ben"), &monday).unwrap();

        let found = store.dependents(&monday.digest).unwrap();
        assert_eq!(names(&found), ["anna@tuesday", "ben"]);
        assert_eq!(found[0].clause("anna@monday"), "the memory of anna@tuesday is a difference to that of anna@monday");
        let mut of_kitten = names(&store.dependents(&kitten.digest).unwrap())
            .join(" ")
            .split(' ')
            .map(String::from)
            .collect::<Vec<_>>();
        of_kitten.sort();
        assert_eq!(of_kitten, ["anna@later", "anna@monday", "anna@tuesday"]);
        assert_eq!(store.dependents(&tuesday.digest).unwrap(), []);
        assert_eq!(store.dependents(&later.digest).unwrap(), []);
        // A machine whose files cannot be read has a disk that tells.
        fs::write(machine.dir.join("machine.json"), "{").unwrap();
        assert_eq!(names(&store.dependents(&monday.digest).unwrap()), ["anna@tuesday", "ben"]);
        let (family, gone) = (store.family().unwrap(), [tuesday.digest].into());
        assert_eq!(names(&family.dependents_without(&monday.digest, &gone)), ["ben"]);
        let above = family.above(&kitten.digest, &BTreeSet::new());
        let mut above = names(&above);
        above.sort_unstable();
        assert_eq!(above, ["anna@later", "anna@monday", "anna@tuesday", "ben"]);
    }

    #[test]
    fn a_snapshot_of_a_later_format_may_need_anything_and_a_damaged_one_nothing() {
        let (_dir, store) = store();
        let kitten = Made::new(Kind::Clean, "kitten").disk(None).publish(&store);
        let other = Made::new(Kind::Crash, "anna@x").disk(Some(&kitten)).publish(&store);
        let path = other.dir.join(MANIFEST);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "{\"format\": 1").unwrap();
        assert_eq!(store.dependents(&kitten.digest).unwrap(), []);
        fs::write(&path, "{\"format\": 2}").unwrap();
        let found = store.dependents(&kitten.digest).unwrap();
        assert!(matches!(&found[..], [Dependent::Snapshot { need: None, .. }]), "{found:?}");
    }
}
