//! Snapshots in a registry, as OCI artifacts: what travels is what [`Outgoing`] gathers, cut into chunks.
//!
//! ```text
//! the manifest in the registry      artifactType, annotations
//!  ├─ config    snapshot.json, so that its digest is the snapshot's
//!  ├─ layer 0   the list of chunks: which make up which file
//!  └─ layer n   chunk n - 1, each a zstd frame; the same content is there once
//! ```
//!
//! Where chunks end goes by what the guest sees ([`cut`]), so that a page or a cluster more does not move all that is
//! behind it. Of a second snapshot only chunks with something new in them travel: those that the registry has are not
//! sent, and those that a snapshot here holds are not fetched.

mod cut;
mod list;
mod pull;
mod push;
mod work;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use pull::{Pulled, pull};
pub use push::{Pushed, push};

use crate::snapshot::Digest;

/// The largest chunk, in bytes of content.
const MAX_CHUNK: u64 = super::frames::FRAME as u64;

/// What a manifest in a registry is (OCI Image Specification 1.1).
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const ARTIFACT_TYPE: &str = "application/vnd.catnap.snapshot.v1";
const CONFIG_TYPE: &str = "application/vnd.catnap.snapshot.manifest.v1+json";
const LIST_TYPE: &str = "application/vnd.catnap.snapshot.chunks.v1+json+zstd";
const CHUNK_TYPE: &str = "application/vnd.catnap.snapshot.chunk.v1+zstd";

/// When the snapshot was taken, and what it was called.
const CREATED: &str = "org.opencontainers.image.created";
const TITLE: &str = "org.opencontainers.image.title";
/// Its kind, and the digest of its parent, if it has one.
const KIND: &str = "vnd.catnap.snapshot.kind";
const PARENT: &str = "vnd.catnap.snapshot.parent";

/// Who stands for it, as in front of an archive.
const SIGNATURE: &str = "vnd.catnap.snapshot.signature";

/// The manifest in the registry. Nothing of it is needed but the digests and lengths, and the signature.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Artifact {
    schema_version: u32,
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// A blob.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: Digest,
    size: u64,
}

impl Descriptor {
    fn of(media_type: &str, bytes: &[u8]) -> Descriptor {
        Descriptor { media_type: media_type.into(), digest: Digest::of(bytes), size: bytes.len() as u64 }
    }
}
