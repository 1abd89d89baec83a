//! Snapshots in a registry: Debian's `docker-registry`, a real one, started by each test on a port of its own. No
//! guest is needed: the snapshots are made as those of a machine would be.
#![allow(dead_code)] // The house and the shots have more than is used here.

#[path = "registry/access.rs"]
mod access;
#[path = "registry/harm.rs"]
mod harm;
#[path = "registry/hostile.rs"]
mod hostile;
#[path = "cli/house.rs"]
mod house;
#[path = "registry/server.rs"]
mod server;
#[path = "cli/shots.rs"]
mod shots;
#[path = "registry/travel.rs"]
mod travel;
