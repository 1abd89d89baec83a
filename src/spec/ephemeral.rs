use std::fmt;
use std::path::{Component, Path};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Error, Size};

/// A disk that lives in the host's memory (`--ephemeral 64M:/mnt`): blank at first, and never to be relied upon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ephemeral {
    /// Its size.
    pub size: Size,
    /// Where the guest has it mounted.
    pub at: String,
}

impl Ephemeral {
    /// Where it is mounted if nothing is said.
    pub const AT: &str = "/mnt";
    /// The unit of its size, and the smallest: a filesystem wants whole blocks, and some of them.
    pub const STEP: Size = Size::mib(1);
    /// The largest: 16 TiB, so that no sum of offsets and lengths comes near an overflow.
    pub const MAX: Size = Size(1 << 44);
    /// The most of them in a machine.
    pub const MOST: usize = 2;
    /// The longest path, in bytes.
    const MAX_PATH: usize = 255;
    /// Folders without which a guest cannot go on.
    const NEEDED: [&str; 11] = ["bin", "dev", "etc", "lib", "proc", "run", "sbin", "sys", "tmp", "usr", "var"];

    /// Checks that the fields make sense.
    pub fn check(&self) -> Result<(), Error> {
        let bytes = self.size.bytes();
        if bytes == 0 || !bytes.is_multiple_of(Self::STEP.bytes()) || self.size > Self::MAX {
            return Err(Error::Ephemeral(self.size));
        }
        let mut parts = Path::new(&self.at).components();
        let plain = |part| matches!(part, Component::Normal(_));
        let first = (parts.next() == Some(Component::RootDir)).then(|| parts.next()).flatten();
        let needed = first.is_some_and(|first| Self::NEEDED.iter().any(|name| first.as_os_str() == *name));
        let printable = |c: char| !c.is_control() && c != ':';
        let sound = self.at.len() <= Self::MAX_PATH && self.at.chars().all(printable) && !self.at.contains("/.");
        match first.is_some_and(plain) && parts.all(plain) && !needed && sound && !self.at.ends_with('/') {
            true => Ok(()),
            false => Err(Error::MountPoint(self.at.clone())),
        }
    }

    /// Checks several of one machine, also together.
    pub fn check_all(all: &[Ephemeral]) -> Result<(), Error> {
        if all.len() > Self::MOST {
            return Err(Error::TooManyEphemeral(all.len()));
        }
        all.iter().try_for_each(Ephemeral::check)?;
        match all.iter().enumerate().find(|(i, one)| all[..*i].iter().any(|other| other.at == one.at)) {
            Some((_, twice)) => Err(Error::MountedTwice(twice.at.clone())),
            None => Ok(()),
        }
    }
}

impl FromStr for Ephemeral {
    type Err = Error;

    fn from_str(text: &str) -> Result<Ephemeral, Error> {
        let (size, at) = text.split_once(':').unwrap_or((text, Self::AT));
        let ephemeral = Ephemeral { size: size.parse()?, at: at.into() };
        ephemeral.check()?;
        Ok(ephemeral)
    }
}

impl fmt::Display for Ephemeral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.size, self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_and_a_place_are_read_and_what_cannot_be_meant_is_refused() {
        let one: Ephemeral = "64M".parse().unwrap();
        assert_eq!(one, Ephemeral { size: Size::mib(64), at: "/mnt".into() });
        assert_eq!("1G:/srv/scratch".parse::<Ephemeral>().unwrap().to_string(), "1G:/srv/scratch");
        for size in ["0", "1", "512", "1048577", "65K", "17T"] {
            assert!(matches!(size.parse::<Ephemeral>(), Err(Error::Ephemeral(_))), "{size}");
        }
        for size in ["", "-1M", "M", ":/mnt", "64X"] {
            assert!(matches!(size.parse::<Ephemeral>(), Err(Error::Size(_))), "{size}");
        }
        for at in ["", "/", "mnt", "/mnt/", "/mnt/../etc", "/mnt/./a", "/a:/b", "/a\nb", "/etc", "/proc/1", "//"] {
            let text = format!("64M:{at}");
            assert!(matches!(text.parse::<Ephemeral>(), Err(Error::MountPoint(_))), "{at:?}");
        }
        assert!(format!("64M:/{}", "x".repeat(300)).parse::<Ephemeral>().is_err());
    }

    #[test]
    fn two_disks_do_not_share_a_place_and_three_are_too_many() {
        let [a, b, c] = ["1M:/a", "1M:/b", "1M:/c"].map(|text| text.parse::<Ephemeral>().unwrap());
        assert_eq!(Ephemeral::check_all(&[a.clone(), b.clone()]), Ok(()));
        assert_eq!(Ephemeral::check_all(&[a.clone(), a.clone()]), Err(Error::MountedTwice("/a".into())));
        assert_eq!(Ephemeral::check_all(&[a, b, c]), Err(Error::TooManyEphemeral(3)));
    }
}
