//! How large a machine is, and how large it can become without booting again: its envelope.

use std::fmt;
use std::str::FromStr;

use super::{Error, MachineSpec, Size};

/// RAM comes and goes in steps of this size, which is virtio-mem's block size and a huge page.
pub const MEMORY_STEP: Size = Size::mib(2);

/// Linux adds and removes RAM in blocks of this size on x86-64 (its sparse memory sections,
/// `SECTION_SIZE_BITS` 27): a region for RAM that comes later begins and ends on such a boundary.
pub const MEMORY_BLOCK: Size = Size::mib(128);

/// The vCPUs that a machine can have at most when nobody chooses: as many as the host has, but 4 at least and
/// 16 at most, and never fewer than it starts with.
///
/// A vCPU that is not there costs the guest only its per-CPU memory, some 250 KiB with a distribution's
/// kernel: 16 of them are 4 MiB, which a kitten of 256 MiB can afford, and 64 would be 16 MiB. More vCPUs than
/// the host has are allowed, so that a machine of a small host can wake on a larger one: hence the 4.
pub fn default_max_cpus(host_cpus: u32, cpus: u32) -> u32 {
    host_cpus.clamp(4, 16).max(cpus)
}

/// The RAM that a machine can have at most when nobody chooses: half of the host's, up to 16 GiB, and never
/// less than it starts with; what can be added is whole [`MEMORY_BLOCK`]s.
///
/// RAM that is not there takes address space, and bookkeeping by the page: a bit for the monitor's dirty
/// pages and up to two for KVM's, and 8 bytes for KVM's reverse map where it shadows page tables (hosts with
/// nested paging do without). For 16 GiB that is 1.5 MiB, or 34 MiB in the worst case. The guest pays for
/// what is plugged in, not for what may be. And 16 GiB above 4 GiB still lie within the 36 address bits that
/// the smallest x86-64 processors have.
pub fn default_max_memory(host_memory: Size, memory: Size) -> Size {
    let wanted = (host_memory.bytes() / 2).min(Size::mib(16 << 10).bytes());
    let more = wanted.saturating_sub(memory.bytes());
    Size(memory.bytes() + (more - more % MEMORY_BLOCK.bytes()))
}

/// A name for a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// 1 vCPU, 256 MiB.
    Kitten,
    /// 2 vCPUs, 512 MiB.
    Cat,
    /// 4 vCPUs, 1 GiB.
    Tiger,
}

impl Flavor {
    /// All of them, the smallest first.
    pub const ALL: [Flavor; 3] = [Flavor::Kitten, Flavor::Cat, Flavor::Tiger];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Flavor::Kitten => "kitten",
            Flavor::Cat => "cat",
            Flavor::Tiger => "tiger",
        }
    }

    /// How many vCPUs.
    pub const fn cpus(self) -> u32 {
        match self {
            Flavor::Kitten => 1,
            Flavor::Cat => 2,
            Flavor::Tiger => 4,
        }
    }

    /// How much RAM.
    pub const fn memory(self) -> Size {
        match self {
            Flavor::Kitten => Size::mib(256),
            Flavor::Cat => Size::mib(512),
            Flavor::Tiger => Size::mib(1024),
        }
    }
}

impl fmt::Display for Flavor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Flavor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Flavor, Error> {
        let named = Flavor::ALL.into_iter().find(|flavor| flavor.name() == text);
        named.ok_or_else(|| Error::Flavor(text.into()))
    }
}

// What is chosen for a person must pass the checks on what a person chooses.
const _: () = assert!(Flavor::Tiger.cpus() <= MachineSpec::MAX_CPUS && 16 <= MachineSpec::MAX_CPUS);
const _: () = assert!(MEMORY_BLOCK.bytes().is_multiple_of(MEMORY_STEP.bytes()));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flavors_are_read_as_they_are_shown() {
        let sizes = Flavor::ALL.map(|flavor| (flavor.to_string(), flavor.cpus(), flavor.memory().to_string()));
        let want = [("kitten", 1, "256M"), ("cat", 2, "512M"), ("tiger", 4, "1G")];
        assert_eq!(sizes, want.map(|(name, cpus, memory)| (name.into(), cpus, memory.into())));
        for flavor in Flavor::ALL {
            assert_eq!(flavor.to_string().parse(), Ok(flavor));
        }
        for text in ["", "Kitten", "cat ", "lion"] {
            assert_eq!(text.parse::<Flavor>(), Err(Error::Flavor(text.into())));
        }
    }

    #[test]
    fn the_host_bounds_the_default_envelope_but_never_the_machine() {
        let cpus = [(1, 1), (2, 8), (8, 1), (64, 1), (64, 64), (0, 1), (u32::MAX, 1)];
        assert_eq!(cpus.map(|(host, cpus)| default_max_cpus(host, cpus)), [4, 8, 8, 16, 64, 4, 16]);

        let gib = |n: u64| Size::mib(n << 10);
        assert_eq!(default_max_memory(gib(8), Size::mib(256)), gib(4));
        assert_eq!(default_max_memory(gib(256), gib(1)), gib(16));
        assert_eq!(default_max_memory(gib(8), gib(6)), gib(6));
        assert_eq!(default_max_memory(gib(256), gib(32)), gib(32));
        assert_eq!(default_max_memory(Size(0), Size::mib(256)), Size::mib(256));
        assert_eq!(default_max_memory(Size(u64::MAX), Size::mib(65)), Size::mib((16 << 10) - 63));
        // A host never has a round number of bytes.
        assert_eq!(default_max_memory(Size((4 << 30) - 12_345_678), Size::mib(257)), Size::mib(257 + 13 * 128));
    }
}
