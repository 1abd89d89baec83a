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

impl Swept {
    /// The names of all snapshots that are listed.
    pub fn listed() -> Vec<String> {
        let listed = catnap(&["snapshot", "ls", "--json"]).succeeds().json();
        let names = |one: &Value| one["names"].as_array().cloned().unwrap_or_default();
        let all = listed.as_array().expect("a list").iter().flat_map(names);
        all.filter_map(|name| name.as_str().map(str::to_owned)).collect()
    }
}

/// How often a test does what scripts/soak lets it do hundreds of times.
pub fn rounds(usual: u64) -> u64 {
    std::env::var("CATNAP_TEST_ROUNDS").map_or(usual, |rounds| rounds.parse().expect("a number of rounds"))
}

/// Random enough for the choice of moments.
pub struct Dice(pub u64);

impl Dice {
    /// Seeded with this process, and told so that a failure can be looked into.
    pub fn new() -> Dice {
        let seed = std::process::id().into();
        println!("  the dice begin with {seed}");
        Dice(seed)
    }

    /// A number below `limit` (Knuth's generator, of which the upper bits are good).
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }
}
