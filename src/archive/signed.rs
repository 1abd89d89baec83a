//! Signatures: before an archive's first frame, where `zstd` skips them, and beside the manifest in a registry.
//!
//! They are of the digest of the snapshot's manifest, which comes right behind: so they are checked before any file is
//! read.

use std::io::{Cursor, Read};

use super::Error;
use crate::snapshot::{Digest, PublicKey, Signature};

/// What it begins with: a skippable frame (RFC 8878, section 3.1.2) of another number than those between frames.
const MAGIC: [u8; 4] = [0x51, 0x2a, 0x4d, 0x18];

/// Whose snapshots are taken.
#[derive(Clone, Copy, Debug)]
pub enum Trust<'a> {
    /// Anybody's, signed or not. A signature must be right all the same.
    Anybody,
    /// Only those that one of these has signed.
    Only(&'a [PublicKey]),
}

/// What stands before a signed archive.
pub fn preface(signature: &Signature) -> Result<Vec<u8>, Error> {
    let text = serde_json::to_vec(signature).map_err(|error| Error::Write(error.into()))?;
    Ok([&MAGIC[..], &(text.len() as u32).to_le_bytes(), &text].concat())
}

/// The signature as an annotation of a manifest in a registry.
pub fn annotation(signature: &Signature) -> Result<String, Error> {
    serde_json::to_string(signature).map_err(|error| Error::Write(error.into()))
}

/// Reads such an annotation.
pub fn from_annotation(text: &str) -> Result<Signature, Error> {
    if text.len() > Signature::MAX {
        return Err(too_long());
    }
    serde_json::from_str(text).map_err(|error| Error::refused(format!("its signature cannot be read: {error}")))
}

/// Takes the signature from before an archive, if there is one; also gives the archive.
pub fn take(mut input: impl Read + Send + 'static) -> Result<(Option<Signature>, impl Read + Send + 'static), Error> {
    let mut first = Vec::new();
    input.by_ref().take(MAGIC.len() as u64).read_to_end(&mut first).map_err(Error::Read)?;
    let mut signature = None;
    if first == MAGIC {
        let mut length = [0; 4];
        input.read_exact(&mut length).map_err(Error::reading)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > Signature::MAX {
            return Err(too_long());
        }
        let mut text = vec![0; length];
        input.read_exact(&mut text).map_err(Error::reading)?;
        let text = String::from_utf8(text).map_err(|_| Error::refused("its signature is no text"))?;
        signature = Some(from_annotation(&text)?);
        first.clear();
    }
    Ok((signature, Cursor::new(first).chain(input)))
}

fn too_long() -> Error {
    Error::refused(format!("its signature has more than {} bytes", Signature::MAX))
}

/// Whether the snapshot of this digest is one of those that are taken; who has signed it.
pub fn judge(digest: &Digest, signature: Option<&Signature>, trust: Trust<'_>) -> Result<Option<PublicKey>, Error> {
    signature.map_or(Ok(()), |signature| signature.check(digest)).map_err(Error::Signature)?;
    let key = signature.map(|signature| signature.key);
    match trust {
        Trust::Only(known) if !key.is_some_and(|key| known.contains(&key)) => Err(Error::Unknown(key)),
        _ => Ok(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::SecretKey;

    fn taken(bytes: Vec<u8>) -> Result<(Option<Signature>, Vec<u8>), Error> {
        let (signature, mut rest) = take(Cursor::new(bytes))?;
        let mut left = Vec::new();
        rest.read_to_end(&mut left).unwrap();
        Ok((signature, left))
    }

    #[test]
    fn a_signature_is_taken_and_what_is_none_is_left() {
        let (key, digest) = (SecretKey::from_random([3; 32]), Digest::of(b"x"));
        let signature = key.sign(&digest);
        let before = preface(&signature).unwrap();
        let (found, left) = taken([&before[..], b"archive"].concat()).unwrap();
        assert_eq!((found.as_ref(), &left[..]), (Some(&signature), &b"archive"[..]));
        for plain in [&b""[..], b"ab", b"abcd", b"archive"] {
            assert_eq!(taken(plain.to_vec()).unwrap(), (None, plain.to_vec()));
        }
        for end in MAGIC.len()..before.len() {
            assert!(taken(before[..end].to_vec()).is_err(), "{end}");
        }
        assert_eq!(from_annotation(&annotation(&signature).unwrap()).unwrap(), signature);
        assert!(matches!(from_annotation(&" ".repeat(Signature::MAX + 1)), Err(Error::Refused(_))));
        let long = [&MAGIC[..], &u32::MAX.to_le_bytes(), &[b' '; 4096]].concat();
        assert!(matches!(taken(long), Err(Error::Refused(_))));
        assert!(matches!(taken([&MAGIC[..], &[2, 0, 0, 0], b"{}"].concat()), Err(Error::Refused(_))));
    }

    #[test]
    fn a_wrong_signature_is_refused_and_an_unknown_one_only_when_that_is_wanted() {
        let (anna, ben) = (SecretKey::from_random([3; 32]), SecretKey::from_random([4; 32]));
        let (digest, other) = (Digest::of(b"x"), Digest::of(b"y"));
        let signature = anna.sign(&digest);
        let known = [anna.public()];
        assert_eq!(judge(&digest, Some(&signature), Trust::Only(&known)).unwrap(), Some(anna.public()));
        assert_eq!(judge(&digest, Some(&ben.sign(&digest)), Trust::Anybody).unwrap(), Some(ben.public()));
        assert_eq!(judge(&digest, None, Trust::Anybody).unwrap(), None);
        assert!(matches!(judge(&other, Some(&signature), Trust::Anybody), Err(Error::Signature(_))));
        assert!(matches!(judge(&digest, None, Trust::Only(&known)), Err(Error::Unknown(None))));
        let strange = judge(&digest, Some(&ben.sign(&digest)), Trust::Only(&known));
        assert!(matches!(strange, Err(Error::Unknown(Some(key))) if key == ben.public()));
    }
}
