//! The host's entropy.

use std::fs::File;
use std::io::{self, Read};

/// Where it is read (random(4)).
pub const SOURCE: &str = "/dev/urandom";

/// Bytes that nobody can guess.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open(SOURCE)?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_come_twice() {
        assert_ne!(bytes::<16>().unwrap(), bytes::<16>().unwrap());
    }
}
