//! Where everything is kept: one folder of four, by `CATNAP_HOME` or by the XDG base directories.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::files::{self, private_dir};

/// No folder to keep things in is known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The environment says nothing.
    #[error("neither HOME nor CATNAP_HOME is set: set CATNAP_HOME to the folder where machines shall be kept")]
    NoHome,
    /// A folder could not be made.
    #[error(transparent)]
    File(#[from] files::Error),
}

/// The four folders. They exist, and only their owner can use them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    /// Snapshots, names and machines.
    pub data: PathBuf,
    /// Logs.
    pub state: PathBuf,
    /// What can be fetched again.
    pub cache: PathBuf,
    /// Sockets.
    pub runtime: PathBuf,
}

impl Home {
    /// The folders that the environment asks for.
    pub fn from_env() -> Result<Home, Error> {
        Home::from_variables(|name| env::var_os(name))?.make()
    }

    /// All four folders below one, as `CATNAP_HOME` puts them.
    pub fn at(folder: &Path) -> Result<Home, Error> {
        Home::below(folder).make()
    }

    fn below(folder: &Path) -> Home {
        Home {
            data: folder.join("data"),
            state: folder.join("state"),
            cache: folder.join("cache"),
            runtime: folder.join("run"),
        }
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Home, Error> {
        let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(folder) = set("CATNAP_HOME") {
            // Made absolute, because a machine's process does not stay in the folder where it was started.
            return Ok(Home::below(&std::path::absolute(&folder).unwrap_or(folder)));
        }
        // The XDG specification has relative paths ignored.
        let xdg = |name| set(name).filter(|path| path.is_absolute()).map(|path| path.join("catnap"));
        let home = set("HOME").filter(|path| path.is_absolute());
        let folder = |name, default: &str| {
            xdg(name).or_else(|| home.as_ref().map(|home| home.join(default).join("catnap"))).ok_or(Error::NoHome)
        };
        let state = folder("XDG_STATE_HOME", ".local/state")?;
        // Left behind by `su` and the like, the variable may name a folder that is not there.
        let runtime = xdg("XDG_RUNTIME_DIR").filter(|path| path.parent().is_some_and(Path::is_dir));
        Ok(Home {
            data: folder("XDG_DATA_HOME", ".local/share")?,
            cache: folder("XDG_CACHE_HOME", ".cache")?,
            runtime: runtime.unwrap_or_else(|| state.join("run")),
            state,
        })
    }

    fn make(self) -> Result<Home, Error> {
        for folder in [&self.data, &self.state, &self.cache, &self.runtime] {
            private_dir(folder)?;
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn home(variables: &[(&str, &str)]) -> Result<Home, Error> {
        Home::from_variables(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn one_variable_moves_everything_and_the_defaults_follow_xdg() {
        let moved = home(&[("CATNAP_HOME", "/class"), ("HOME", "/home/anna"), ("XDG_DATA_HOME", "/d")]).unwrap();
        assert_eq!(moved, Home::below(Path::new("/class")));
        let usual = home(&[("HOME", "/home/anna"), ("XDG_DATA_HOME", "relative"), ("XDG_CACHE_HOME", "/c")]).unwrap();
        assert_eq!(usual.data, Path::new("/home/anna/.local/share/catnap"));
        assert_eq!(usual.cache, Path::new("/c/catnap"));
        assert_eq!(usual.runtime, Path::new("/home/anna/.local/state/catnap/run"));
        let missing = home(&[("HOME", "/home/anna"), ("XDG_RUNTIME_DIR", "/no/such/folder")]).unwrap();
        assert_eq!(missing.runtime, Path::new("/home/anna/.local/state/catnap/run"));
        assert!(matches!(home(&[("CATNAP_HOME", "")]), Err(Error::NoHome)));
    }

    #[test]
    fn the_folders_are_made_for_their_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(&dir.path().join("new")).unwrap();
        for folder in [home.data, home.state, home.cache, home.runtime] {
            assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700, "{folder:?}");
        }
    }
}
