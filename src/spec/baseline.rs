use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Error;

/// How much of its CPU the host shows to a guest: all of it, or what the CPUs of a level have in common, so that its
/// snapshots wake on other hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Baseline {
    /// All that there is.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// About 2009: SSE4.2 and POPCNT.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// About 2015: AVX2, BMI and FMA.
    #[serde(rename = "x86-64-v3")]
    V3,
}

impl Baseline {
    /// Whether the guest is shown all.
    pub fn is_host(&self) -> bool {
        *self == Baseline::Host
    }
}

impl FromStr for Baseline {
    type Err = Error;

    fn from_str(text: &str) -> Result<Baseline, Error> {
        let all = [Baseline::Host, Baseline::V2, Baseline::V3];
        all.into_iter().find(|one| one.to_string() == text).ok_or_else(|| Error::Baseline(text.into()))
    }
}

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Baseline::Host => "host",
            Baseline::V2 => "x86-64-v2",
            Baseline::V3 => "x86-64-v3",
        })
    }
}
