//! How a machine is spoken to from outside its process: HTTP with JSON over a Unix socket.
//!
//! `docs/control.md` describes the protocol for people. [`protocol`] has its words, [`http`] its envelope,
//! [`server`] takes connections, [`host`] holds the guest over its reboots, [`api`] answers for it and
//! [`snapshots`] takes snapshots of it.
//! [`client`] is what everything else uses.

pub mod api;
pub mod client;
pub mod failure;
pub mod host;
pub mod http;
pub mod protocol;
pub mod server;
pub mod snapshots;

pub use client::Client;
pub use failure::{Code, Failure};
pub use snapshots::{Keeper, Watch};

#[cfg(test)]
mod tests;
