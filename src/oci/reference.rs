use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use super::Error;
use crate::snapshot::Digest;

/// The longest name of a repository (OCI Distribution Specification, "Pulling manifests").
const MAX_REPOSITORY: usize = 255;
/// The longest tag.
const MAX_TAG: usize = 128;

/// Where in a registry something is: `HOST[:PORT]/REPOSITORY:TAG`, or `@sha256:…` in place of the tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The registry, with its port if one was given.
    pub host: String,
    /// The repository in it.
    pub repository: String,
    /// Which of the things in there.
    pub version: Version,
}

/// One of the things in a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Version {
    /// Whatever has this tag now.
    Tag(String),
    /// The one with this digest.
    Digest(Digest),
}

impl Reference {
    /// Whether a registry is meant: the first part looks like a host, as docker decides it, and is no folder.
    pub fn is_meant(text: &str) -> bool {
        text.split_once('/').is_some_and(|(host, _)| {
            let like_a_host = host == "localhost" || host.contains(['.', ':']);
            like_a_host && is_host(host)
        })
    }

    /// Whether the registry is on this machine.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

/// Whether a host, with or without a port, is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let name = without_port(host);
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => name,
        _ => host,
    }
}

fn is_host(host: &str) -> bool {
    let name = without_port(host);
    let port = host.strip_prefix(name).and_then(|rest| rest.strip_prefix(':'));
    let good_port = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
    let label = |label: &str| {
        let inside = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        (1..=63).contains(&label.len()) && label.bytes().all(inside) && !label.starts_with('-') && !label.ends_with('-')
    };
    let bracketed = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let good_name = match bracketed {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => name.len() <= 253 && name.split('.').all(label),
    };
    good_port && good_name
}

fn is_repository(name: &str) -> bool {
    // Words of small letters and digits, with a dot, one or two underscores, or dashes between them.
    let component = |part: &str| {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let mut between = part.split(|c: char| plain(c as u8) && c.is_ascii()).filter(|run| !run.is_empty());
        let ends = part.bytes().next().is_some_and(plain) && part.bytes().last().is_some_and(plain);
        ends && between.all(|run| matches!(run, "." | "_" | "__") || run.bytes().all(|b| b == b'-'))
    };
    name.len() <= MAX_REPOSITORY && name.split('/').all(component)
}

fn is_tag(tag: &str) -> bool {
    let inside = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=MAX_TAG).contains(&tag.len()) && tag.bytes().all(inside) && !tag.starts_with(['.', '-'])
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Reference, Error> {
        let refuse =
            |why| Error::Reference { text: text.chars().take(300).collect::<String>().escape_debug().to_string(), why };
        let (host, path) = text.split_once('/').ok_or_else(|| refuse("it has no registry"))?;
        if !is_host(host) {
            return Err(refuse("its registry is not a host"));
        }
        let (repository, version) = if let Some((repository, digest)) = path.split_once('@') {
            (repository, Version::Digest(digest.parse().map_err(|_| refuse("behind its @ is not a digest"))?))
        } else {
            let (repository, tag) = path.rsplit_once(':').ok_or_else(|| refuse("it has no tag"))?;
            match is_tag(tag) {
                true => (repository, Version::Tag(tag.into())),
                false => return Err(refuse("its tag is not letters, digits, `_`, `.` and `-`")),
            }
        };
        match is_repository(repository) {
            true => Ok(Reference { host: host.into(), repository: repository.into(), version }),
            false => Err(refuse("its repository is not small letters, digits and what may stand between them")),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Version::Tag(tag) => f.write_str(tag),
            Version::Digest(digest) => digest.fmt(f),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = if matches!(self.version, Version::Tag(_)) { ':' } else { '@' };
        write!(f, "{}/{}{between}{}", self.host, self.repository, self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_taken_apart_and_shown_as_they_were() {
        let digest = Digest::of(b"x").to_string();
        for (text, host, repository) in [
            ("localhost:5000/cats/anna:monday", "localhost:5000", "cats/anna"),
            ("registry.example/anna:1.2_x-y", "registry.example", "anna"),
            ("[::1]:5000/a-b/c__d.e/f--g:T", "[::1]:5000", "a-b/c__d.e/f--g"),
            (&format!("127.0.0.1:80/anna@{digest}"), "127.0.0.1:80", "anna"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.host.as_str(), reference.repository.as_str()), (host, repository));
            assert_eq!(reference.to_string(), text);
            assert!(Reference::is_meant(text), "{text}");
            assert_eq!(reference.is_loopback(), host != "registry.example", "{text}");
        }
    }

    #[test]
    fn what_leads_elsewhere_is_refused() {
        for bad in [
            "anna",
            "anna@monday",
            "a.b/anna",
            "a.b/anna:",
            "a.b/:x",
            "a.b/Anna:x",
            "a.b/../x:y",
            "a.b//x:y",
            "a.b/x/:y",
            "a.b/x:../y",
            "a.b/x:-y",
            "a.b/x.._y:z",
            "a.b/x___y:z",
            "a.b/x?y:z",
            "a.b/ä:z",
            "a.b:0/x:y",
            "a.b:99999/x:y",
            "-a.b/x:y",
            "a@b.c/x:y",
            "a.b/x@sha256:0123",
            "[::1/x:y",
            "a b.c/x:y",
            "a.b/x:y\r\nHost: z",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
        for other in ["anna@monday", "./x/y", "../a.b/x:y", "folder/anna.catnap", "sha256:0123", "/tmp/a:b", "kitten"] {
            assert!(!Reference::is_meant(other), "{other}");
        }
        for far in ["localhost.example/x:y", "127.example/x:y", "10.0.0.1:5000/x:y"] {
            assert!(!far.parse::<Reference>().unwrap().is_loopback(), "{far}");
        }
    }
}
