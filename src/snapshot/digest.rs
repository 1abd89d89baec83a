use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::sys::hex;

/// A SHA-256 digest, written `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// What the text begins with, before the digits.
    pub const PREFIX: &'static str = "sha256:";

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// The digest of everything that `from` gives.
    pub fn of_all(from: &mut impl Read) -> io::Result<Digest> {
        let mut whole = Sha256::new();
        io::copy(from, &mut whole)?;
        Ok(Digest(whole.finalize().into()))
    }

    /// The digest of everything that `from` gives, and those of its pieces of `size` bytes.
    pub fn of_pieces(from: &mut impl Read, size: u64) -> io::Result<(Digest, Vec<Digest>)> {
        let (mut whole, mut pieces) = (Sha256::new(), Vec::new());
        let mut piece = Vec::new();
        while from.by_ref().take(size).read_to_end(&mut piece)? > 0 {
            whole.update(&piece);
            pieces.push(Digest::of(&piece));
            piece.clear();
        }
        Ok((Digest(whole.finalize().into()), pieces))
    }

    /// Its beginning, with as many digits as tell snapshots apart: what a person is shown, and can type.
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(Self::PREFIX.len() + 12);
        text
    }

    /// The 64 hexadecimal digits, as used for the names of folders.
    pub fn hex(&self) -> String {
        hex::encode(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", Self::PREFIX, self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not a digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a digest: write sha256: and 64 hexadecimal digits")]
pub struct NotADigest(String);

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Digest, NotADigest> {
        let refuse = || NotADigest(text.chars().take(80).collect());
        let digits = text.strip_prefix(Self::PREFIX).ok_or_else(refuse)?;
        hex::decode_array(digits).map(Digest).ok_or_else(refuse)
    }
}

impl TryFrom<String> for Digest {
    type Error = NotADigest;

    fn try_from(text: String) -> Result<Digest, NotADigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_standard_and_bad_text_is_refused() {
        // FIPS 180-4's example for "abc".
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Digest::of(b"abc").to_string(), abc);
        assert_eq!(abc.parse(), Ok(Digest::of(b"abc")));
        assert_eq!(Digest::of_all(&mut &b"abc"[..]).unwrap(), Digest::of(b"abc"));
        let pieces = vec![Digest::of(b"ab"), Digest::of(b"c")];
        assert_eq!(Digest::of_pieces(&mut &b"abc"[..], 2).unwrap(), (Digest::of(b"abc"), pieces));
        for bad in ["", "sha256:", &abc[7..], &abc.to_uppercase(), &abc[..70], &format!("{abc}0"), "sha256:é"] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
