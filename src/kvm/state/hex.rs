//! KVM's structures as text: their bytes in hexadecimal, as the kernel's ABI lays them out.

use std::fmt;

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::sys::hex;

/// A structure of the kernel, saved as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plain<T>(pub T);

/// Bytes whose number depends on the host. Zeros at the end are not written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl<T: IntoBytes + Immutable> Serialize for Plain<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&hex::encode(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Plain<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Plain<T>, D::Error> {
        let bytes = read(from)?;
        let wanted = size_of::<T>();
        T::read_from_bytes(&bytes)
            .map(Plain)
            .map_err(|_| D::Error::custom(format!("{} bytes in place of {wanted}", bytes.len())))
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let end = self.0.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        to.serialize_str(&hex::encode(&self.0[..end]))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
        read(from).map(Bytes)
    }
}

/// The bytes that a string stands for, without a copy of the string where its reader has one.
fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    struct Hex;
    impl Visitor<'_> for Hex {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("hexadecimal digits")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<u8>, E> {
            hex::decode(text).ok_or_else(|| E::custom("not hexadecimal"))
        }
    }
    from.deserialize_str(Hex)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_mp_state;

    use super::*;

    #[test]
    fn structures_survive_and_others_are_refused() {
        let state = Plain(kvm_mp_state { mp_state: 0x0102_0304 });
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(text, "\"04030201\"");
        assert_eq!(serde_json::from_str::<Plain<kvm_mp_state>>(&text).unwrap(), state);
        for bad in ["\"040302\"", "\"0403020101\"", "\"0403020\"", "\"zz030201\"", "1", "\"é4030201\""] {
            assert!(serde_json::from_str::<Plain<kvm_mp_state>>(bad).is_err(), "{bad}");
        }
        assert_eq!(serde_json::to_string(&Bytes(vec![0, 7, 0, 0])).unwrap(), "\"0007\"");
        assert_eq!(serde_json::from_str::<Bytes>("\"0007\"").unwrap(), Bytes(vec![0, 7]));
    }
}
