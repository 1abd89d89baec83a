//! Snapshots of a machine, and the machines that wake from them.

use serde_json::Value;

use super::ran::{Ran, catnap, catnap_with};
use super::{Machine, net};

impl Machine {
    /// Takes a snapshot `NAME@tag`; what `--json` says of it.
    pub fn snapshot(&self, tag: &str, options: &[&str]) -> Value {
        self.try_to_snapshot(tag, options).succeeds().json()
    }

    /// The same, which may fail.
    pub fn try_to_snapshot(&self, tag: &str, options: &[&str]) -> Ran {
        let name = format!("{}@{tag}", self.name);
        catnap_with(["snapshot", "create", "--json", &name].iter().chain(options))
    }
}

/// Wakes a snapshot under another name, with the guest's port 80 on a free port; also what `--json` says of it.
pub fn wake(snapshot: &str, name: &str, options: &[&str]) -> (Machine, Value) {
    let (machine, ran) = wake_with(snapshot, name, options);
    (machine, ran.succeeds().json())
}

/// The same, which may fail.
pub fn wake_with(snapshot: &str, name: &str, options: &[&str]) -> (Machine, Ran) {
    let machine = Machine { name: name.into(), ports: vec![(net::free_port(), 80)] };
    // A test that was killed has left its machines behind.
    drop(machine.catnap("rm --force"));
    let port = format!("{}:80", machine.port(80));
    let words = ["restore", "--json", snapshot, "--name", name, "-p", &port];
    let ran = catnap_with(words.iter().chain(options));
    (machine, ran)
}

/// Snapshots that go away with the test, whatever comes of it.
pub struct Swept;

impl Drop for Swept {
    fn drop(&mut self) {
        let listed = catnap(&["snapshot", "ls", "--json"]);
        let Ok(Value::Array(all)) = serde_json::from_slice(&listed.out) else { return };
        let names: Vec<String> = all
            .iter()
            .flat_map(|one| one["names"].as_array().cloned().unwrap_or_default())
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect();
        // Those that others lie over go in a later round.
        for _ in 0..names.len() {
            let left = names.iter().filter(|name| catnap(&["snapshot", "rm", name]).code == 4).count();
            if left == 0 {
                return;
            }
        }
    }
}
