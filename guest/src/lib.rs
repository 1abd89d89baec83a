//! What the monitor and the guest must agree on ([`protocol`]), and everything that runs inside the guest.
//!
//! ```text
//! main ─ init ─┬─ agent ─┬─ machine ─┬─ children, facts
//!              │         └─ relay    │
//!              └─ site ──────────────┴─ socket
//! ```
//!
//! The monitor uses the library without the feature `init`, and then it is the protocol alone.

pub mod escape;
pub mod protocol;

#[cfg(feature = "init")]
pub mod agent;
#[cfg(feature = "init")]
pub mod children;
#[cfg(feature = "init")]
pub mod client;
#[cfg(feature = "init")]
pub mod facts;
#[cfg(feature = "init")]
pub mod init;
#[cfg(feature = "init")]
pub mod machine;
#[cfg(feature = "init")]
pub mod poll;
#[cfg(feature = "init")]
pub mod site;
#[cfg(feature = "init")]
pub mod socket;
