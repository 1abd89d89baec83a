//! Catnap: a microVM monitor on KVM whose one idea is the nap.
//!
//! The crate is a house of rooms on floors. A room uses only rooms on lower floors, and rooms on one
//! floor do not know each other; `tests/rooms.rs` enforces it. `docs/architecture.md` is the tour.

// Floor 0: the host's operating system, and the words for what a machine is.
pub mod spec;
pub mod sys;

// Floor 1: guest memory, ACPI tables, disks and the on-disk snapshot format, each on its own.
pub mod acpi;
pub mod disk;
pub mod mem;
pub mod snapshot;

// Floor 2: the VM and its vCPUs, the devices, the folder where everything is kept, and a client of registries.
pub mod devices;
pub mod kvm;
pub mod oci;
pub mod store;

// Floor 3: what must be in guest memory before the first instruction; how base images are made; snapshots as files
// and in registries.
pub mod archive;
pub mod boot;
pub mod image;

// Floor 4: the only room that knows both `kvm` and `devices`.
pub mod machine;

// Floor 5: how a machine is spoken to from outside its process.
pub mod control;

// Floor 6: what shows and steers machines for people.
pub mod lesson;
pub mod web;

// Floor 7: the verbs.
pub mod cli;
