use std::collections::BTreeMap;
use std::str::FromStr;

use catnap_guest::protocol::{self, Settings};

use super::Error;

/// What tells a machine's site from others (`--set colour=grey`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    key: String,
    value: String,
}

impl Setting {
    /// The settings that were given; of two of one key, the later.
    pub fn gather(given: &[Setting]) -> Settings {
        given.iter().map(|one| (one.key.clone(), one.value.clone())).collect::<BTreeMap<_, _>>()
    }
}

impl FromStr for Setting {
    type Err = Error;

    fn from_str(text: &str) -> Result<Setting, Error> {
        let (key, value) = text.split_once('=').ok_or_else(|| Error::Setting(format!("`{text}` is not KEY=VALUE")))?;
        let (key, value) = protocol::setting(key, value).map_err(Error::Setting)?;
        Ok(Setting { key, value })
    }
}
