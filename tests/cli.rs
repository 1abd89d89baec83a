//! The command line, as a user or a script meets it: the real program, in a folder of its own. No test here
//! needs a KVM that can run Linux; those of `monitor` need one that takes a guest of ten instructions.

#[path = "cli/archives.rs"]
mod archives;
#[path = "cli/copies.rs"]
mod copies;
#[path = "cli/damage.rs"]
mod damage;
#[path = "cli/dashboard.rs"]
mod dashboard;
#[path = "cli/house.rs"]
mod house;
#[path = "cli/machines.rs"]
mod machines;
#[path = "cli/monitor.rs"]
mod monitor;
#[allow(dead_code)] // tests/registry.rs needs other ones.
#[path = "cli/shots.rs"]
mod shots;
#[path = "cli/snapshots.rs"]
mod snapshots;
#[path = "cli/words.rs"]
mod words;
