//! Machines that make room for others of their names, and come back when those fail.

use std::fs;
use std::path::{Path, PathBuf};

use super::machines::lock;
use super::staging::Staging;
use super::{Error, Store};
use crate::spec::Name;
use crate::sys::files::{self, At};

/// A machine that was set aside. Dropped, it is gone for good, as if it had been removed.
pub struct Aside<'a> {
    store: &'a Store,
    name: Name,
    staging: Staging,
}

impl Aside<'_> {
    fn machine(&self) -> PathBuf {
        self.staging.dir().join("machine")
    }

    /// Puts it back, in the place of nobody.
    pub fn put_back(self) -> Result<(), Error> {
        let dir = self.store.machine_dir(&self.name);
        fs::rename(self.machine(), &dir).at("put back", &dir)?;
        move_if_there(&self.store.logs_aside(&self.name), &self.store.logs_dir(&self.name))?;
        Ok(files::sync_dir(&self.store.folder("machines"))?)
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        // Whoever sets aside a machine of that name again begins with this, too.
        let _ = fs::remove_dir_all(self.store.logs_aside(&self.name));
    }
}

/// Moves a folder in place of whatever is there; nothing happens when it is missing.
fn move_if_there(from: &Path, to: &Path) -> Result<(), Error> {
    if from.is_dir() {
        let _ = fs::remove_dir_all(to);
        fs::rename(from, to).at("move", from)?;
    }
    Ok(())
}

impl Store {
    /// Takes a machine away, to make room for another of its name, in such a way that it can be put back. Refused while
    /// it runs.
    pub fn set_aside(&self, name: &Name) -> Result<Aside<'_>, Error> {
        let dir = self.machine_dir(name);
        let _held = lock(&dir, name)?;
        let staging = self.stage()?;
        let aside = Aside { store: self, name: name.clone(), staging };
        // Logs first: a machine without them is whole, and the other way round they would be another's.
        move_if_there(&self.logs_dir(name), &self.logs_aside(name))?;
        fs::rename(&dir, aside.machine()).at("set aside", &dir)?;
        files::sync_dir(&self.folder("machines"))?;
        Ok(aside)
    }

    /// Where logs wait: a name that no machine has.
    fn logs_aside(&self, name: &Name) -> PathBuf {
        self.home.state.join("logs").join(format!(".{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Kind;
    use crate::store::testing::{Made, spec, store};
    use crate::sys::files::names_in;

    #[test]
    fn a_machine_that_was_set_aside_is_put_back_as_it_was_or_gone_for_good() {
        let (_dir, store) = store();
        let image = Made::new(Kind::Clean, "kitten").kernel().disk(None).publish(&store);
        let machine = store.create_machine(&spec("anna"), &image).unwrap();
        fs::write(machine.console_log().unwrap(), "purr").unwrap();
        fs::write(machine.dir.join("run.json"), "{}").unwrap();
        let aside = store.set_aside(&machine.spec.name).unwrap();
        assert!(matches!(store.machine(&machine.spec.name), Err(Error::NoMachine(_))));
        // Another one takes its place, and fails.
        let other = store.create_machine(&spec("anna"), &image).unwrap();
        fs::write(other.console_log().unwrap(), "hiss").unwrap();
        store.remove_machine(&other.spec.name).unwrap();
        aside.put_back().unwrap();
        let back = store.machine(&machine.spec.name).unwrap();
        assert_eq!(fs::read_to_string(back.console_log().unwrap()).unwrap(), "purr");
        assert!(back.dir.join("run.json").exists() && back.disk().exists());
        // It runs: nobody sets it aside.
        let held = back.lock().unwrap();
        assert!(matches!(store.set_aside(&back.spec.name), Err(Error::Running(_))));
        drop(held);
        drop(store.set_aside(&back.spec.name).unwrap());
        assert!(matches!(store.machine(&machine.spec.name), Err(Error::NoMachine(_))));
        assert_eq!(names_in(&store.folder("staging")).unwrap(), Vec::<String>::new());
        assert_eq!(fs::read_dir(store.home().state.join("logs")).unwrap().count(), 0);
    }
}
