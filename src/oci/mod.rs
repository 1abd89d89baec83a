//! A client of OCI registries: blobs and manifests, up and down.
//!
//! Of the OCI Distribution Specification (1.1) it speaks what pushing and pulling an artifact takes. It knows nothing
//! of snapshots; `archive::registry` does. It blocks, for whoever calls it has threads of its own.
//!
//! What a registry says is not believed: bodies are bounded, blobs and manifests are compared with their digests,
//! credentials go to the registry and to the token server that it names, over TLS, and nowhere else.

mod auth;
mod client;
mod credentials;
mod reference;
mod transport;

pub use client::{Access, Client, MAX_MANIFEST};
pub use reference::{Reference, Version};

use std::path::PathBuf;

use crate::snapshot::Digest;

/// What a registry says of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It has none.
    Missing,
    /// It has it.
    Whole,
    /// It has so many bytes in its place.
    Damaged(u64),
}

/// Why a registry does not do what is wanted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing that could be in a registry.
    #[error("`{text}` is nothing in a registry: {why}")]
    Reference {
        /// What was written.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The host could only be spoken to in the clear.
    #[error("{0} can only be spoken to without encryption")]
    Plain(String),
    /// The docker configuration cannot be used.
    #[error("the docker configuration {path} cannot be used: {why}")]
    Configuration {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A credential helper failed.
    #[error("the credential helper {program} gave nothing: {why}")]
    Helper {
        /// Its program.
        program: String,
        /// Why not.
        why: String,
    },
    /// This host trusts nobody.
    #[error("no certificates are to be found that this host trusts")]
    NoRoots,
    /// No connection, or it broke.
    #[error("{host} cannot be reached: {why}")]
    Unreachable {
        /// The registry.
        host: String,
        /// Why not.
        why: String,
    },
    /// It wants other credentials, or none will do.
    #[error("{host} does not let you {doing}{}{said}", if said.is_empty() { "" } else { ": " })]
    Denied {
        /// The registry.
        host: String,
        /// What was tried.
        doing: &'static str,
        /// What it said.
        said: String,
    },
    /// There is no such thing.
    #[error("{0} is not there")]
    NotFound(String),
    /// It cannot, and says so.
    #[error("{host} cannot {doing}: it answers {status}{}{said}", if said.is_empty() { "" } else { ", " })]
    Answer {
        /// The registry.
        host: String,
        /// What was tried.
        doing: &'static str,
        /// The status of its answer.
        status: u16,
        /// What it said.
        said: String,
    },
    /// It said something that makes no sense, or is not what its digest says.
    #[error("what {host} gives cannot be used: {why}")]
    Strange {
        /// The registry.
        host: String,
        /// What is wrong with it.
        why: String,
    },
    /// It has a damaged blob, and does not take another for it.
    #[error("what {host} keeps as {digest} has {found} bytes in place of {length}, and sending it again does not help")]
    Damaged {
        /// The registry.
        host: String,
        /// The blob.
        digest: Digest,
        /// The bytes that it has.
        found: u64,
        /// The bytes that it must have.
        length: u64,
    },
    /// The user wants it no more.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// Whether it may be gone when it is tried again.
    fn passes(&self) -> bool {
        match self {
            Error::Unreachable { .. } => true,
            Error::Answer { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }
}
