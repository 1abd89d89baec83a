use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Error;

/// A number of bytes, typed and shown with binary units (`512M`, `2G`), stored as a plain number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Size(pub u64);

const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl Size {
    /// `n` mebibytes.
    pub const fn mib(n: u64) -> Size {
        Size(n << 20)
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Size, Error> {
        let refuse = || Error::Size(text.into());
        let number = text.trim_end_matches(['b', 'B']).trim_end_matches('i');
        let unit = number.chars().last().map(|c| c.to_ascii_uppercase());
        let (digits, shift) = match UNITS.iter().find(|(name, _)| Some(*name) == unit) {
            Some((_, shift)) => (&number[..number.len() - 1], *shift),
            None => (text, 0),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(refuse());
        }
        let count: u64 = digits.parse().map_err(|_| refuse())?;
        count.checked_mul(1 << shift).map(Size).ok_or_else(refuse)
    }
}

impl fmt::Display for Size {
    /// The largest unit that divides the size exactly, so that what is shown can be typed again.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return f.pad(&format!("{}{unit}", self.0 >> shift));
            }
        }
        f.pad(&self.0.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown_in_binary_units() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64K", 65536),
            ("256M", 256 << 20),
            ("2g", 2 << 30),
            ("1GiB", 1 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "M", "-1M", "1.5G", "12X", "1 G", "99999999999999999999", "20000000T", "1Mi i", "iB"] {
            assert_eq!(text.parse::<Size>(), Err(Error::Size(text.into())), "{text}");
        }
        assert_eq!(Size::mib(256).to_string(), "256M");
        assert_eq!(Size::mib(1024).to_string(), "1G");
        assert_eq!(Size(1536 << 20).to_string(), "1536M");
        assert_eq!(Size(0).to_string(), "0");
    }
}
