//! Somebody else, to whom snapshots are handed.

use std::fs;
use std::path::PathBuf;

use super::home;
use super::ran::{self, Ran};

/// A house of a colleague's, who has nothing of ours but what we give.
pub struct Colleague(pub PathBuf);

impl Colleague {
    pub fn new() -> Colleague {
        let folder = home().with_file_name("colleague");
        let colleague = Colleague(folder);
        // A test that was killed has left it behind.
        colleague.leave();
        fs::create_dir_all(&colleague.0).expect("a folder");
        colleague
    }

    pub fn catnap(&self, line: &str) -> Ran {
        ran::run(ran::command().env("CATNAP_HOME", &self.0).args(line.split(' ')))
    }

    pub fn sh(&self, machine: &str, line: &str) -> String {
        let mut command = ran::command();
        command.env("CATNAP_HOME", &self.0).args(["exec", machine, "--", "sh", "-c", line]);
        ran::run(&mut command).succeeds().text()
    }

    fn leave(&self) {
        if self.0.exists() {
            for name in ["bella", "carla"] {
                drop(self.catnap(&format!("rm --force {name}")));
            }
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

impl Drop for Colleague {
    fn drop(&mut self) {
        self.leave();
    }
}
