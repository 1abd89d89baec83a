//! Signatures: that somebody stands for a snapshot. Ed25519 (RFC 8032) over its digest, which covers its manifest and by
//! that every byte of it.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signature as Bytes, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use super::Digest;
use crate::sys::hex;

/// What is signed besides the digest, so that no signature for something else is one for a snapshot.
const PURPOSE: &str = "catnap snapshot 1\n";
const PREFIX: &str = "ed25519:";
const SECRET_PREFIX: &str = "catnap-secret-ed25519:";

/// Why something is no key or no signature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a public key.
    #[error("`{0}` is no public key: it is written ed25519: and 64 hexadecimal digits")]
    Public(String),
    /// Not a secret key.
    #[error("this is no secret key of Catnap's")]
    Secret,
    /// Not by this key, or not for this snapshot.
    #[error("the signature is wrong: {0} did not sign this snapshot as it is here")]
    Wrong(PublicKey),
}

/// Whose signature can be checked: its 32 bytes, which are a point of the curve and not a weak one.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

/// Who can sign.
pub struct SecretKey(SigningKey);

/// A signature, and whose it is said to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// The key that is said to have made it.
    pub key: PublicKey,
    /// 64 bytes in hexadecimal.
    signature: String,
}

impl Signature {
    /// The longest, as JSON, in bytes.
    pub const MAX: usize = 1024;

    /// Whether the key has signed the snapshot with this digest.
    pub fn check(&self, digest: &Digest) -> Result<(), KeyError> {
        let wrong = || KeyError::Wrong(self.key);
        let bytes = hex::decode_array::<64>(&self.signature).ok_or_else(wrong)?;
        let key = VerifyingKey::from_bytes(&self.key.0).map_err(|_| wrong())?;
        key.verify_strict(message(digest).as_bytes(), &Bytes::from_bytes(&bytes)).map_err(|_| wrong())
    }
}

impl SecretKey {
    /// One made of 32 random bytes.
    pub fn from_random(bytes: [u8; 32]) -> SecretKey {
        SecretKey(SigningKey::from_bytes(&bytes))
    }

    /// The key by which its signatures are checked.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// Signs a snapshot.
    pub fn sign(&self, digest: &Digest) -> Signature {
        let signature = self.0.sign(message(digest).as_bytes());
        Signature { key: self.public(), signature: hex::encode(&signature.to_bytes()) }
    }

    /// How it is kept in a file.
    pub fn to_text(&self) -> String {
        format!("{SECRET_PREFIX}{}\n", hex::encode(&self.0.to_bytes()))
    }

    /// Reads what [`SecretKey::to_text`] gave.
    pub fn from_text(text: &str) -> Result<SecretKey, KeyError> {
        let digits = text.trim().strip_prefix(SECRET_PREFIX).ok_or(KeyError::Secret)?;
        Ok(SecretKey::from_random(hex::decode_array(digits).ok_or(KeyError::Secret)?))
    }
}

fn message(digest: &Digest) -> String {
    format!("{PURPOSE}{digest}\n")
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<PublicKey, KeyError> {
        let wrong = || KeyError::Public(text.chars().take(100).flat_map(char::escape_debug).collect());
        let bytes = text.strip_prefix(PREFIX).and_then(hex::decode_array::<32>).ok_or_else(wrong)?;
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| wrong())?;
        // With such a key anybody's signature is right.
        if key.is_weak() { Err(wrong()) } else { Ok(PublicKey(bytes)) }
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", hex::encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = KeyError;

    fn try_from(text: String) -> Result<PublicKey, KeyError> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_of_one_key_for_one_snapshot() {
        let (anna, ben) = (SecretKey::from_random([1; 32]), SecretKey::from_random([2; 32]));
        let (monday, tuesday) = (Digest::of(b"monday"), Digest::of(b"tuesday"));
        let signature = anna.sign(&monday);
        assert_eq!(signature.check(&monday), Ok(()));
        assert_eq!(signature.check(&tuesday), Err(KeyError::Wrong(anna.public())));
        let stolen = Signature { key: ben.public(), ..signature.clone() };
        assert_eq!(stolen.check(&monday), Err(KeyError::Wrong(ben.public())));
        for damaged in [String::new(), "0".repeat(128), signature.signature.to_uppercase(), "ä".repeat(64)] {
            assert!(Signature { signature: damaged, ..signature.clone() }.check(&monday).is_err());
        }
        let text = serde_json::to_string(&signature).unwrap();
        assert!(text.len() < Signature::MAX);
        assert_eq!(serde_json::from_str::<Signature>(&text).unwrap(), signature);
        // A signature of the digest alone is none.
        let bare = anna.0.sign(monday.to_string().as_bytes());
        assert!(Signature { signature: hex::encode(&bare.to_bytes()), ..signature }.check(&monday).is_err());
    }

    #[test]
    fn keys_are_read_as_they_are_written_and_nothing_else_is() {
        let key = SecretKey::from_random([7; 32]);
        let again = SecretKey::from_text(&key.to_text()).unwrap();
        assert_eq!(again.public(), key.public());
        assert_eq!(key.public().to_string().parse(), Ok(key.public()));
        for bad in ["", "ed25519:", "ed25519:12", &format!("ed25519:{}", "g".repeat(64)), &"0".repeat(72)] {
            assert!(bad.parse::<PublicKey>().is_err() && SecretKey::from_text(bad).is_err(), "{bad}");
        }
        // The neutral point, by which everything is signed.
        assert!(format!("ed25519:01{}", "0".repeat(62)).parse::<PublicKey>().is_err());
    }
}
