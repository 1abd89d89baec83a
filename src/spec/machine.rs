use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use catnap_guest::protocol::{Settings, check_settings};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Baseline, Ephemeral, Error, MEMORY_STEP, Name, Size};

/// Everything that must be known to start a machine, as kept in its folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
// `remote` makes serde's derived functions our own, so that reading can be completed below.
#[serde(deny_unknown_fields, remote = "Self")]
pub struct MachineSpec {
    /// The machine's name.
    pub name: Name,
    /// The digest (`sha256:…`) of the manifest of the snapshot that it was made from: its kernel, its
    /// initramfs, and the backing file of its root disk.
    pub image: String,
    /// vCPUs at start.
    pub cpus: u32,
    /// RAM at start.
    pub memory: Size,
    /// vCPUs that it can ever have: with `max_memory` the envelope, which is fixed at the first boot. A file
    /// of before there were envelopes has none, and reads as a machine that stays as it is.
    #[serde(default)]
    pub max_cpus: u32,
    /// RAM that it can ever have. See `max_cpus`.
    #[serde(default)]
    pub max_memory: Size,
    /// Words added to the kernel's command line.
    #[serde(default)]
    pub append: String,
    /// A kernel of the user's own in place of the image's: the path of a copy that nobody changes.
    #[serde(default)]
    pub kernel: Option<std::path::PathBuf>,
    /// TCP ports brought out of the guest.
    #[serde(default)]
    pub forwards: Vec<Forward>,
    /// Disks in the host's memory that it starts with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ephemeral: Vec<Ephemeral>,
    /// Settings of its site, at every boot.
    #[serde(default, skip_serializing_if = "Settings::is_empty")]
    pub settings: Settings,
    /// Who it is, when it was made as a copy that must be told from its original: for `/etc/machine-id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// How much of the host's CPU its guest is shown.
    #[serde(default, skip_serializing_if = "Baseline::is_host")]
    pub cpu_baseline: Baseline,
}

impl MachineSpec {
    /// The largest number of vCPUs; our ACPI tables and the minimal kernel are made for so many.
    pub const MAX_CPUS: u32 = 64;
    /// The smallest RAM in which the tiny guest's kernel still unpacks its initramfs.
    pub const MIN_MEMORY: Size = Size::mib(64);
    /// The largest RAM: 16 TiB, so that no sum of addresses and sizes comes near an overflow.
    pub const MAX_MEMORY: Size = Size(1 << 44);

    /// A machine of one size, made from `image`, with nothing else that can be chosen.
    pub fn new(name: Name, image: &str, cpus: u32, memory: Size) -> MachineSpec {
        MachineSpec {
            name,
            image: image.into(),
            cpus,
            memory,
            max_cpus: cpus,
            max_memory: memory,
            append: String::new(),
            kernel: None,
            forwards: Vec::new(),
            ephemeral: Vec::new(),
            settings: Settings::new(),
            machine_id: None,
            cpu_baseline: Baseline::Host,
        }
    }

    /// Checks that the fields make sense, alone and together.
    pub fn check(&self) -> Result<(), Error> {
        if !(1..=Self::MAX_CPUS).contains(&self.cpus) {
            return Err(Error::Cpus(self.cpus));
        }
        if self.memory < Self::MIN_MEMORY
            || !self.memory.bytes().is_multiple_of(1 << 20)
            || self.memory > Self::MAX_MEMORY
        {
            return Err(Error::Memory(self.memory));
        }
        if !(self.cpus..=Self::MAX_CPUS).contains(&self.max_cpus) {
            return Err(Error::MaxCpus { cpus: self.cpus, max: self.max_cpus });
        }
        let more = self.max_memory.bytes().checked_sub(self.memory.bytes());
        if self.max_memory > Self::MAX_MEMORY || !more.is_some_and(|more| more.is_multiple_of(MEMORY_STEP.bytes())) {
            return Err(Error::MaxMemory { memory: self.memory, max: self.max_memory });
        }
        Ephemeral::check_all(&self.ephemeral)?;
        check_settings(&self.settings).map_err(Error::Setting)?;
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if self.machine_id.as_ref().is_some_and(|id| id.len() != 32 || !id.bytes().all(digit)) {
            return Err(Error::MachineId);
        }
        let mut taken = HashSet::new();
        match self.forwards.iter().find(|forward| !taken.insert(forward.host)) {
            Some(twice) => Err(Error::ForwardTwice(twice.host)),
            None => Ok(()),
        }
    }
}

impl<'de> Deserialize<'de> for MachineSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MachineSpec, D::Error> {
        let mut spec = MachineSpec::deserialize(deserializer)?;
        if spec.max_cpus == 0 {
            spec.max_cpus = spec.cpus;
        }
        if spec.max_memory == Size(0) {
            spec.max_memory = spec.memory;
        }
        Ok(spec)
    }
}

impl Serialize for MachineSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        MachineSpec::serialize(self, serializer)
    }
}

/// A TCP port of the host's loopback that leads to a port of the guest (`-p 8080:80`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// The port on 127.0.0.1 of the host.
    pub host: u16,
    /// The port on 127.0.0.1 of the guest.
    pub guest: u16,
}

impl FromStr for Forward {
    type Err = Error;

    fn from_str(text: &str) -> Result<Forward, Error> {
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
        match text.split_once(':').map(|(host, guest)| (port(host), port(guest))) {
            Some((Some(host), Some(guest))) => Ok(Forward { host, guest }),
            _ => Err(Error::Forward(text.into())),
        }
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Setting;

    fn spec() -> MachineSpec {
        MachineSpec {
            max_cpus: 4,
            max_memory: Size::mib(4096),
            forwards: vec!["8080:80".parse().unwrap()],
            ..MachineSpec::new("anna".parse().unwrap(), "sha256:00", 1, Size::mib(256))
        }
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert_eq!(spec().check(), Ok(()));
        for cpus in [0, 65, u32::MAX] {
            assert_eq!(MachineSpec { cpus, ..spec() }.check(), Err(Error::Cpus(cpus)));
        }
        for memory in [Size(0), Size::mib(63), Size((256 << 20) + 1), Size(u64::MAX)] {
            assert_eq!(MachineSpec { memory, ..spec() }.check(), Err(Error::Memory(memory)));
        }
    }

    #[test]
    fn an_envelope_holds_the_machine_and_grows_in_whole_steps() {
        let still = MachineSpec { max_cpus: 1, max_memory: Size::mib(256), ..spec() };
        assert_eq!(still.check(), Ok(()));
        for max in [0, 65, u32::MAX] {
            let narrow = MachineSpec { max_cpus: max, ..spec() };
            assert_eq!(narrow.check(), Err(Error::MaxCpus { cpus: 1, max }));
        }
        let (memory, odd) = (Size::mib(256), Size::mib(257));
        for max in [Size(0), Size::mib(254), odd, Size(memory.bytes() + 1), Size((1 << 44) + (2 << 20)), Size(u64::MAX)]
        {
            let narrow = MachineSpec { max_memory: max, ..spec() };
            assert_eq!(narrow.check(), Err(Error::MaxMemory { memory, max }));
        }
        // What counts is the part that is plugged in later.
        assert_eq!(MachineSpec { memory: odd, max_memory: Size::mib(259), ..spec() }.check(), Ok(()));
    }

    #[test]
    fn files_of_before_there_were_envelopes_are_read() {
        let old = r#"{"name":"anna","image":"sha256:00","cpus":3,"memory":268435456}"#;
        let read: MachineSpec = serde_json::from_str(old).unwrap();
        assert_eq!((read.max_cpus, read.max_memory), (3, Size::mib(256)));
        assert_eq!(read.check(), Ok(()));
        let again = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<MachineSpec>(&again).unwrap(), spec());
        assert!(serde_json::from_str::<MachineSpec>(&again.replace("max_cpus", "most_cpus")).is_err());
    }

    #[test]
    fn what_makes_a_copy_its_own_is_checked_when_it_is_read() {
        let setting = |text: &str| text.parse::<Setting>();
        let settings = Setting::gather(&[setting("colour=black").unwrap(), setting("Color=Grey").unwrap()]);
        assert_eq!(settings, [("colour".to_owned(), "grey".to_owned())].into());
        let own = MachineSpec { settings, machine_id: Some("0a".repeat(16)), cpu_baseline: Baseline::V2, ..spec() };
        assert_eq!(own.check(), Ok(()));
        let text = serde_json::to_string(&own).unwrap();
        assert_eq!(serde_json::from_str::<MachineSpec>(&text).unwrap(), own);
        assert!(!serde_json::to_string(&spec()).unwrap().contains("settings"));
        for bad in ["colour", "colour=pink", "x=y", "=grey"] {
            assert!(matches!(setting(bad), Err(Error::Setting(_))), "{bad}");
        }
        let pink: MachineSpec = serde_json::from_str(&text.replace("grey", "pink")).unwrap();
        assert!(matches!(pink.check(), Err(Error::Setting(_))));
        for id in ["", "0A", &"0A".repeat(16), &"g".repeat(32)] {
            assert_eq!(MachineSpec { machine_id: Some(id.into()), ..spec() }.check(), Err(Error::MachineId));
        }
        assert_eq!("x86-64-v3".parse(), Ok(Baseline::V3));
        assert_eq!("x86-64-v9".parse::<Baseline>(), Err(Error::Baseline("x86-64-v9".into())));
    }

    #[test]
    fn forwards_are_read_and_may_not_collide() {
        for bad in ["80", "0:80", "80:0", "70000:80", ":80", "a:b", "1:2:3"] {
            assert_eq!(bad.parse::<Forward>(), Err(Error::Forward(bad.into())));
        }
        let twice = vec!["8080:80".parse().unwrap(), "8080:81".parse().unwrap()];
        assert_eq!(MachineSpec { forwards: twice, ..spec() }.check(), Err(Error::ForwardTwice(8080)));
    }
}
