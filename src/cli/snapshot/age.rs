//! Encryption to a recipient, by the program `age`: archives go through it as through a pipe.
//!
//! Its crate would bring some eighty others, most of them for translations of its messages.

use std::ffi::OsStr;
use std::io::{self, Cursor, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::control::{Code, Failure};

const PROGRAM: &str = "age";
/// What a file of age's begins with (age-encryption.org/v1, "Header").
const MAGIC: &[u8] = b"age-encryption.org/v1";

/// A recipient's public key.
pub fn recipient(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    match text.starts_with("age1") && (50..=2000).contains(&text.len()) && text.bytes().all(plain) {
        true => Ok(text.into()),
        false => Err("a recipient is written age1…, as age-keygen shows it".into()),
    }
}

/// `age` at work.
pub struct Age(Child);

impl Age {
    /// Encrypts to all of these what is written to it, into `to`.
    pub fn encrypt(recipients: &[String], to: Stdio) -> Result<(Age, ChildStdin), Failure> {
        let words = recipients.iter().flat_map(|recipient| ["--recipient", recipient.as_str()]);
        let mut child = start(words, Stdio::piped(), to)?;
        let input = child.stdin.take().ok_or_else(|| failed("it takes nothing"))?;
        Ok((Age(child), input))
    }

    /// Decrypts what comes from `from`.
    pub fn decrypt(identity: &Path, from: Stdio) -> Result<(Age, impl Read + Send + use<>), Failure> {
        let words = [OsStr::new("--decrypt"), OsStr::new("--identity"), identity.as_os_str()];
        let mut child = start(words, from, Stdio::piped())?;
        let mut output = child.stdout.take().ok_or_else(|| failed("it gives nothing"))?;
        let age = Age(child);
        // Whoever has the wrong key gets nothing at all.
        let mut first = Vec::new();
        if output.by_ref().take(1).read_to_end(&mut first).map_err(failed)? == 0 {
            age.finish()?;
            return Err(failed("it gives nothing"));
        }
        Ok((age, Cursor::new(first).chain(output)))
    }

    /// Waits for its end, which must be a good one. What went wrong it has said itself.
    pub fn finish(mut self) -> Result<(), Failure> {
        match self.0.wait().map_err(failed)? {
            status if status.success() => Ok(()),
            status => Err(failed(status)),
        }
    }
}

impl Drop for Age {
    fn drop(&mut self) {
        // One that has ended is not there to be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(words: impl IntoIterator<Item = impl AsRef<OsStr>>, from: Stdio, to: Stdio) -> Result<Child, Failure> {
    Command::new(PROGRAM).args(words).stdin(from).stdout(to).spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Failure::new(Code::Host, "`age`, which encrypts and decrypts, is not installed")
            .hint("install the package age"),
        _ => failed(error),
    })
}

fn failed(why: impl std::fmt::Display) -> Failure {
    Failure::new(Code::Failed, format!("`age` failed: {why}")).hint("age --help; what it said is above")
}

/// Refuses what is encrypted, for whoever has no key for it; gives the input as it was.
pub fn refuse_encrypted(mut input: impl Read + Send + 'static) -> Result<impl Read + Send + 'static, Failure> {
    let mut first = Vec::new();
    let read = input.by_ref().take(MAGIC.len() as u64).read_to_end(&mut first);
    read.map_err(|error| {
        Failure::while_doing("the archive cannot be read", error).hint("catnap snapshot export makes such files")
    })?;
    match first == MAGIC {
        true => Err(Failure::new(Code::Refused, "the archive is encrypted")
            .hint("catnap snapshot import --identity FILE, with the key of whom it was encrypted to")),
        false => Ok(Cursor::new(first).chain(input)),
    }
}

/// Writes through `age`; gives back what was done with the way in.
pub fn through<T>(
    recipients: &[String],
    to: Stdio,
    write: impl FnOnce(ChildStdin) -> Result<(ChildStdin, T), Failure>,
) -> Result<T, Failure> {
    let (age, input) = Age::encrypt(recipients, to)?;
    let (mut input, done) = write(input)?;
    input.flush().map_err(failed)?;
    drop(input);
    age.finish()?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_age_keygen_writes_is_a_recipient() {
        let key = format!("age1{}", "q".repeat(58));
        assert_eq!(recipient(&key), Ok(key.clone()));
        for bad in ["", "age1", "--help", &key.to_uppercase(), &format!("{key} x"), &"age1q".repeat(1000)] {
            assert!(recipient(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_encrypted_is_known_by_its_head() {
        let read = |bytes: &'static [u8]| {
            let mut all = Vec::new();
            refuse_encrypted(bytes)
                .map(|mut input| input.read_to_end(&mut all).map(|_| all))
                .map_err(|error| error.code)
        };
        assert_eq!(read(b"age-encryption.org/v1\n-> X25519 x").unwrap_err(), Code::Refused);
        for plain in [&b""[..], b"age-enc", b"something else that is longer"] {
            assert_eq!(read(plain).unwrap().unwrap(), plain);
        }
    }
}
