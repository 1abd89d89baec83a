//! Where the lesson works: a catnap home of its own, with what its commands need around them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Error;
use crate::spec::Name;
use crate::store::{Condition, Store};
use crate::sys::files::{At, private_dir};
use crate::sys::home::Home;

/// The variable that names the lesson's home, set for all that the lesson starts.
pub const VARIABLE: &str = "CATNAP_LESSON_HOME";

/// The lesson's home: the one that is asked for, or `lesson` in CATNAP_HOME, or a folder beside that of the user's own
/// machines, which the lesson must never touch.
pub fn home(wanted: Option<PathBuf>) -> Result<PathBuf, Error> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = match wanted.or_else(|| set(VARIABLE)) {
        Some(home) => home,
        None if set("CATNAP_HOME").is_some() => Home::from_env()?.data.with_file_name("lesson"),
        None => Home::from_env()?.data.with_file_name("catnap-lesson"),
    };
    std::path::absolute(&home).at("use", &home).map_err(Error::from)
}

/// The lesson's place of work.
pub struct Desk {
    /// Its catnap home.
    pub home: PathBuf,
    /// Where commands run, and leave their files.
    pub folder: PathBuf,
    /// What the lesson itself remembers.
    pub state: PathBuf,
    store: Store,
}

impl Desk {
    /// Makes what is missing of it.
    pub fn at(home: &Path) -> Result<Desk, Error> {
        let folders = Home::at(home)?;
        let (folder, state) = (home.join("desk"), folders.state.join("lesson"));
        for folder in [&folder, &state, &state.join("bin")] {
            private_dir(folder)?;
        }
        // Commands say `catnap`, and this program is what they mean, whatever it is called and wherever it lies.
        let (link, program) = (state.join("bin/catnap"), env::current_exe().at("find", Path::new("/proc/self/exe"))?);
        if std::fs::read_link(&link).ok().as_ref() != Some(&program) {
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(&program, &link).at("make", &link)?;
        }
        Ok(Desk { home: home.into(), folder, state, store: Store::open(&folders)? })
    }

    /// A program that is to find the lesson's machines.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths([self.state.join("bin")].into_iter().chain(env::split_paths(&path)));
        command.env("CATNAP_HOME", &self.home).env(VARIABLE, &self.home).current_dir(&self.folder);
        if let Ok(path) = path {
            command.env("PATH", path);
        }
        command
    }

    /// All machines.
    pub fn machines(&self) -> Result<Vec<Name>, Error> {
        Ok(self.store.machines()?.into_iter().map(|(name, _)| name).collect())
    }

    /// Whether a machine runs.
    pub fn runs(&self, machine: &str) -> bool {
        let machine = machine.parse().ok().and_then(|name| self.store.machine(&name).ok());
        machine.is_some_and(|machine| matches!(machine.condition(), Ok(Condition::Running)))
    }

    /// The port here that leads to a machine's page.
    pub fn port(&self, machine: &str) -> Option<u16> {
        let machine = self.store.machine(&machine.parse().ok()?).ok()?;
        machine.spec.forwards.iter().find(|forward| forward.guest == 80).map(|forward| forward.host)
    }

    /// Whether a snapshot is there.
    pub fn has(&self, snapshot: &str) -> bool {
        self.store.resolve(snapshot).is_ok()
    }

    /// The names of all snapshots that are no images.
    pub fn snapshots(&self) -> Result<Vec<String>, Error> {
        let all = self.store.list()?.into_iter().filter(|listed| !listed.is_image());
        Ok(all.flat_map(|listed| listed.names).collect())
    }

    /// The store, for those who look into it.
    pub fn store(&self) -> &Store {
        &self.store
    }
}
