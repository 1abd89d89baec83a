//! What Catnap needs of the host's operating system and the standard library does not have.

pub mod files;
pub mod fork;
pub mod hex;
pub mod home;
pub mod kick;
pub mod limits;
pub mod local;
pub mod lock;
pub mod mmap;
#[cfg(test)]
pub mod mutate;
pub mod patient;
pub mod peer;
pub mod process;
pub mod program;
pub mod random;
pub mod space;
pub mod thread;
pub mod time;
pub mod tmpfs;
pub mod tty;
