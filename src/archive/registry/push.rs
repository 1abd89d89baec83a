//! Bringing a snapshot to a registry.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use zstd::bulk::Compressor;

use super::list::{Chunk, Cut, List, MAX_CHUNKS};
use super::work::Work;
use super::{ARTIFACT_TYPE, Artifact, CHUNK_TYPE, CONFIG_TYPE, CREATED, Descriptor, KIND, LIST_TYPE, MANIFEST_TYPE};
use super::{MAX_CHUNK, PARENT, SIGNATURE, TITLE, cut};
use crate::archive::frames::LEVEL;
use crate::archive::{Error, Outgoing, Progress, Watch, signed};
use crate::oci::{self, Client, Presence};
use crate::snapshot::{Digest, Manifest};
use crate::store::Store;
use crate::sys::files::At;
use crate::sys::time::rfc3339;

/// What came of a push, or would come of it.
#[derive(Debug)]
pub struct Pushed {
    /// The digest of the manifest in the registry.
    pub artifact: Digest,
    /// Chunks, each counted once.
    pub chunks: usize,
    /// How many of them were sent; the registry had the others.
    pub sent_chunks: usize,
    /// All bytes that were sent, that of the list, of `snapshot.json` and of the manifest among them.
    pub sent_bytes: u64,
    /// Bytes of all that is there now, whoever sent it.
    pub stored_bytes: u64,
}

/// One piece of a file, to be sent.
struct Job {
    file: usize,
    at: u64,
    length: u64,
}

/// What became of a piece.
struct Done {
    job: usize,
    /// None when it is all zeros.
    content: Option<Digest>,
    /// For the first piece with this content: the blob, and whether it had to be sent.
    blob: Option<(Descriptor, bool)>,
}

/// Brings a snapshot to where `client` leads. What the registry has already is not sent again; when this fails, what
/// was sent is there for the next time, and the tag is as it was. A `rehearsal` asks only, and sends nothing.
pub fn push(
    store: &Store,
    outgoing: &Outgoing,
    client: &Arc<Client>,
    rehearsal: bool,
    watch: Watch<'_>,
) -> Result<Pushed, Error> {
    watch(Progress { what: "looking where to cut", done: 0, total: None });
    let cuts = cut::cut(store, &outgoing.snapshot())?;
    let mut jobs = Vec::new();
    for (file, cut) in cuts.iter().enumerate() {
        let mut at = 0;
        for length in &cut.lengths {
            jobs.push(Job { file, at, length: *length });
            at += length;
        }
    }
    let total = outgoing.size();
    let jobs = Arc::new(jobs);
    let mut contents = vec![None; jobs.len()];
    let mut blobs = HashMap::new();
    let (mut done, mut sent_chunks, mut sent_bytes) = (0, 0, 0);
    for piece in Work::begin(jobs.len(), sender(outgoing, client, &jobs, rehearsal)?)? {
        let piece = piece?;
        let job = &jobs[piece.job];
        done += job.length;
        if let (Some(content), Some((blob, sent))) = (piece.content, piece.blob) {
            (sent_chunks, sent_bytes) = (sent_chunks + usize::from(sent), sent_bytes + u64::from(sent) * blob.size);
            blobs.insert(content, blob);
        }
        contents[piece.job] = piece.content;
        watch(Progress { what: &outgoing.manifest().files[job.file].name, done, total: Some(total) });
    }
    let (list, chunks) = list(outgoing.manifest(), &cuts, &jobs, &contents, blobs)?;
    watch(Progress { what: "the manifest", done, total: Some(total) });
    let list = compress(&serde_json::to_vec(&list).map_err(|error| Error::Write(error.into()))?)?;
    let config = outgoing.bytes();
    let mut layers = vec![Descriptor::of(LIST_TYPE, &list)];
    layers.extend(chunks);
    let chunks = layers.len() - 1;
    let artifact = Artifact {
        schema_version: 2,
        media_type: MANIFEST_TYPE.into(),
        artifact_type: ARTIFACT_TYPE.into(),
        config: Descriptor::of(CONFIG_TYPE, config),
        layers,
        annotations: annotations(outgoing)?,
    };
    let bytes = serde_json::to_vec(&artifact).map_err(|error| Error::Write(error.into()))?;
    if bytes.len() as u64 > oci::MAX_MANIFEST {
        return Err(too_much());
    }
    for (blob, bytes) in [(&artifact.config, config), (&artifact.layers[0], &list)] {
        sent_bytes += u64::from(send(client, blob, bytes, rehearsal)?) * blob.size;
    }
    if !rehearsal {
        client.put_manifest(&bytes, MANIFEST_TYPE)?;
    }
    let size = |blobs: &[Descriptor]| blobs.iter().map(|blob| blob.size).sum::<u64>();
    Ok(Pushed {
        artifact: Digest::of(&bytes),
        chunks,
        sent_chunks,
        sent_bytes: sent_bytes + bytes.len() as u64,
        stored_bytes: size(&artifact.layers) + artifact.config.size + bytes.len() as u64,
    })
}

/// What each thread does with a piece.
fn sender(
    outgoing: &Outgoing,
    client: &Arc<Client>,
    jobs: &Arc<Vec<Job>>,
    rehearsal: bool,
) -> Result<impl Fn(usize) -> Result<Done, Error> + Send + Sync + 'static, Error> {
    let open = |file: &crate::snapshot::File| -> Result<(PathBuf, File), Error> {
        let path = outgoing.dir().join(&file.name);
        let open = File::open(&path).at("open", &path)?;
        Ok((path, open))
    };
    let files = outgoing.manifest().files.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let (client, jobs, known) = (client.clone(), jobs.clone(), Mutex::new(HashSet::new()));
    Ok(move |number: usize| {
        let job = &jobs[number];
        let (path, file) = &files[job.file];
        // A piece has MAX_CHUNK bytes at most.
        let mut content = vec![0; job.length as usize];
        file.read_exact_at(&mut content, job.at).at("read", path)?;
        if content.iter().all(|byte| *byte == 0) {
            return Ok(Done { job: number, content: None, blob: None });
        }
        let digest = Digest::of(&content);
        if !known.lock().unwrap_or_else(PoisonError::into_inner).insert(digest) {
            return Ok(Done { job: number, content: Some(digest), blob: None });
        }
        let bytes = compress(&content)?;
        let blob = Descriptor::of(CHUNK_TYPE, &bytes);
        let sent = send(&client, &blob, &bytes, rehearsal)?;
        Ok(Done { job: number, content: Some(digest), blob: Some((blob, sent)) })
    })
}

/// Sends a blob that the registry does not have, or not whole. Whether that was so.
fn send(client: &Client, blob: &Descriptor, bytes: &[u8], rehearsal: bool) -> Result<bool, Error> {
    let (digest, length) = (blob.digest, blob.size);
    let before = match client.has_blob(&digest, length) {
        Ok(Presence::Whole) => return Ok(false),
        // A registry that lost its power as it noted that it has a blob fails at its note, until that is sent again.
        Err(oci::Error::Answer { status: 500, .. }) if !rehearsal => None,
        told => Some(told?),
    };
    if !rehearsal {
        client.put_blob(&digest, bytes)?;
        // Debian's docker-registry keeps what has the right name, whatever is in it.
        if before != Some(Presence::Missing)
            && let Presence::Damaged(found) = client.has_blob(&digest, length)?
            // It may also be that it tells a wrong length.
            && client.blob(&digest, length).is_err()
        {
            let host = client.reference().host.clone();
            return Err(oci::Error::Damaged { host, digest, found, length }.into());
        }
    }
    Ok(true)
}

/// The list of chunks, and their blobs, in the order in which the files have them.
fn list(
    manifest: &Manifest,
    cuts: &[cut::Lengths],
    jobs: &[Job],
    contents: &[Option<Digest>],
    mut blobs: HashMap<Digest, Descriptor>,
) -> Result<(List, Vec<Descriptor>), Error> {
    let empty = |(file, cut): (&crate::snapshot::File, &cut::Lengths)| Cut {
        name: file.name.clone(),
        span: cut.span,
        pieces: Vec::new(),
    };
    let mut files: Vec<_> = manifest.files.iter().zip(cuts).map(empty).collect();
    let (mut chunks, mut layers, mut numbers) = (Vec::new(), Vec::new(), HashMap::new());
    for (job, content) in jobs.iter().zip(contents) {
        let pieces = &mut files[job.file].pieces;
        let Some(digest) = content else {
            match pieces.last_mut() {
                Some(zeros) if *zeros < 0 => *zeros -= job.length as i64,
                _ => pieces.push(-(job.length as i64)),
            }
            continue;
        };
        if let Some(blob) = blobs.remove(digest) {
            numbers.insert(*digest, chunks.len() as i64);
            chunks.push(Chunk { size: job.length, digest: *digest });
            layers.push(blob);
        }
        // The first piece with this content has given the number.
        pieces.extend(numbers.get(digest));
    }
    match chunks.len() {
        0..=MAX_CHUNKS => Ok((List::new(chunks, files), layers)),
        _ => Err(too_much()),
    }
}

fn too_much() -> Error {
    Error::Large { chunks: MAX_CHUNKS, of: MAX_CHUNK }
}

fn compress(content: &[u8]) -> Result<Vec<u8>, Error> {
    Compressor::new(LEVEL).and_then(|mut compressor| compressor.compress(content)).map_err(Error::Write)
}

fn annotations(outgoing: &Outgoing) -> Result<BTreeMap<String, String>, Error> {
    let manifest = outgoing.manifest();
    let mut annotations =
        BTreeMap::from([(TITLE.into(), manifest.name.clone()), (KIND.into(), manifest.kind.name().into())]);
    annotations.extend(rfc3339(manifest.created).map(|time| (CREATED.into(), time)));
    annotations.extend(manifest.parent.map(|parent| (PARENT.into(), parent.to_string())));
    if let Some(signature) = outgoing.signature() {
        annotations.insert(SIGNATURE.into(), signed::annotation(signature)?);
    }
    Ok(annotations)
}
