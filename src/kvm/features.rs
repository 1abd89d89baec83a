//! What a guest's CPU can do, by name: read out of CPUID, held against this host's CPU, and limited so that snapshots
//! travel.
//!
//! Leaves, registers and bits are those of the Intel SDM volume 2A (CPUID) and the AMD APM volume 3 (appendix E), the
//! levels those of the x86-64 psABI. Features that KVM brings itself, such as x2APIC, are not listed, for no CPU must have
//! them; nor is virtualisation, for what a guest's own guests do is in no snapshot.

use std::arch::x86_64::{__cpuid, __cpuid_count};

use kvm_bindings::kvm_cpuid_entry2;

use crate::spec::Baseline;

/// The registers of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    A,
    B,
    C,
    D,
}
use Register::{A, B, C, D};

/// From which level on a CPU has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Level {
    V1,
    V2,
    V3,
    Beyond,
}
use Level::{Beyond, V1, V2, V3};

/// A register of a leaf with its features: bits, names, levels.
type Row = (u32, u32, Register, &'static [(u8, &'static str, Level)]);

const FEATURES: [Row; 10] = [
    (
        0x1,
        0,
        D,
        &[(8, "cx8", V1), (15, "cmov", V1), (23, "mmx", V1), (24, "fxsr", V1), (25, "sse", V1), (26, "sse2", V1)],
    ),
    (
        0x1,
        0,
        C,
        &[
            (0, "sse3", V2),
            (1, "pclmulqdq", Beyond),
            (9, "ssse3", V2),
            (12, "fma", V3),
            (13, "cx16", V2),
            (17, "pcid", Beyond),
            (19, "sse4_1", V2),
            (20, "sse4_2", V2),
            (22, "movbe", V3),
            (23, "popcnt", V2),
            (25, "aes", Beyond),
            (26, "xsave", V3),
            (28, "avx", V3),
            (29, "f16c", V3),
            (30, "rdrand", Beyond),
        ],
    ),
    (
        0x7,
        0,
        B,
        &[
            (0, "fsgsbase", Beyond),
            (3, "bmi1", V3),
            (4, "hle", Beyond),
            (5, "avx2", V3),
            (7, "smep", Beyond),
            (8, "bmi2", V3),
            (9, "erms", Beyond),
            (10, "invpcid", Beyond),
            (11, "rtm", Beyond),
            (14, "mpx", Beyond),
            (16, "avx512f", Beyond),
            (17, "avx512dq", Beyond),
            (18, "rdseed", Beyond),
            (19, "adx", Beyond),
            (20, "smap", Beyond),
            (21, "avx512ifma", Beyond),
            (23, "clflushopt", Beyond),
            (24, "clwb", Beyond),
            (28, "avx512cd", Beyond),
            (29, "sha_ni", Beyond),
            (30, "avx512bw", Beyond),
            (31, "avx512vl", Beyond),
        ],
    ),
    (
        0x7,
        0,
        C,
        &[
            (1, "avx512vbmi", Beyond),
            (3, "pku", Beyond),
            (5, "waitpkg", Beyond),
            (6, "avx512_vbmi2", Beyond),
            (7, "shstk", Beyond),
            (8, "gfni", Beyond),
            (9, "vaes", Beyond),
            (10, "vpclmulqdq", Beyond),
            (11, "avx512_vnni", Beyond),
            (12, "avx512_bitalg", Beyond),
            (14, "avx512_vpopcntdq", Beyond),
            (16, "la57", Beyond),
            (22, "rdpid", Beyond),
            (25, "cldemote", Beyond),
            (27, "movdiri", Beyond),
            (28, "movdir64b", Beyond),
        ],
    ),
    (
        0x7,
        0,
        D,
        &[
            (4, "fsrm", Beyond),
            (8, "avx512_vp2intersect", Beyond),
            (10, "md_clear", Beyond),
            (14, "serialize", Beyond),
            (20, "ibt", Beyond),
            (22, "amx_bf16", Beyond),
            (23, "avx512_fp16", Beyond),
            (24, "amx_tile", Beyond),
            (25, "amx_int8", Beyond),
            (26, "spec_ctrl", Beyond),
            (27, "intel_stibp", Beyond),
            (31, "ssbd", Beyond),
        ],
    ),
    (0x7, 1, A, &[(4, "avx_vnni", Beyond), (5, "avx512_bf16", Beyond)]),
    (0xd, 1, A, &[(0, "xsaveopt", Beyond), (1, "xsavec", Beyond), (2, "xgetbv1", Beyond), (3, "xsaves", Beyond)]),
    (
        0x8000_0001,
        0,
        C,
        &[
            (0, "lahf_lm", V2),
            (5, "abm", V3),
            (6, "sse4a", Beyond),
            (7, "misalignsse", Beyond),
            (8, "3dnowprefetch", Beyond),
            (11, "xop", Beyond),
            (16, "fma4", Beyond),
            (21, "tbm", Beyond),
        ],
    ),
    (
        0x8000_0001,
        0,
        D,
        &[
            (11, "syscall", V1),
            (20, "nx", V1),
            (22, "mmxext", Beyond),
            (25, "fxsr_opt", Beyond),
            (26, "pdpe1gb", Beyond),
            (27, "rdtscp", Beyond),
            (29, "lm", V1),
            (30, "3dnowext", Beyond),
            (31, "3dnow", Beyond),
        ],
    ),
    (
        0x8000_0008,
        0,
        B,
        &[
            (0, "clzero", Beyond),
            (2, "xsaveerptr", Beyond),
            (9, "wbnoinvd", Beyond),
            (12, "amd_ibpb", Beyond),
            (14, "amd_ibrs", Beyond),
            (15, "amd_stibp", Beyond),
            (24, "amd_ssbd", Beyond),
        ],
    ),
];

/// What KVM brings itself and a limited guest keeps: x2APIC, the deadline timer, being a guest; TSC_ADJUST; the APIC
/// timer that never stops; that there are cores.
const KVMS_OWN: [(u32, u32, Register, u32); 4] =
    [(0x1, 0, C, 1 << 21 | 1 << 24 | 1 << 31), (0x7, 0, B, 1 << 1), (0x6, 0, A, 1 << 2), (0x8000_0001, 0, C, 1 << 1)];
/// Leaves that tell of what lies beyond all levels: SGX, tracing, key locker, tiles, AVX10; SVM, SEV, more of AMD's.
const BEYOND: [u32; 9] = [0x12, 0x14, 0x19, 0x1d, 0x1e, 0x24, 0x8000_000a, 0x8000_001f, 0x8000_0021];
/// The state that XSAVE has at the level of AVX: x87, SSE and AVX, in so many bytes.
const AVX_STATE: (u32, u32) = (0b111, 832);

/// A CPU as CPUID tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Its maker, such as `GenuineIntel`.
    pub vendor: String,
    /// What it can do.
    pub features: Vec<&'static str>,
}

impl Cpu {
    /// This host's. Asks the CPU and not KVM.
    pub fn of_host() -> Cpu {
        let (most, most_extended) = (__cpuid(0).eax, __cpuid(0x8000_0000).eax);
        Cpu::read(|leaf, index| {
            let there = leaf <= most || (0x8000_0000..=most_extended).contains(&leaf);
            there.then(|| __cpuid_count(leaf, index)).map(|found| [found.eax, found.ebx, found.ecx, found.edx])
        })
    }

    /// That which a guest is shown.
    pub fn of_guest(entries: &[kvm_cpuid_entry2]) -> Cpu {
        Cpu::read(|leaf, index| {
            let found = entries.iter().find(|entry| (entry.function, entry.index) == (leaf, index));
            found.map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
        })
    }

    fn read(ask: impl Fn(u32, u32) -> Option<[u32; 4]>) -> Cpu {
        let [_, b, c, d] = ask(0, 0).unwrap_or_default();
        let name = [b, d, c].map(u32::to_le_bytes).concat();
        let vendor = name.iter().map(|byte| *byte as char).filter(char::is_ascii_graphic).collect();
        let mut features = Vec::new();
        for (leaf, index, register, listed) in FEATURES {
            let value = ask(leaf, index).map_or(0, |found| found[register as usize]);
            features.extend(listed.iter().filter(|(bit, ..)| value >> bit & 1 == 1).map(|(_, name, _)| *name));
        }
        Cpu { vendor, features }
    }

    /// What of these features it has not.
    pub fn lacks<'a>(&self, wanted: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
        wanted.into_iter().filter(|name| !self.features.contains(name)).collect()
    }

    /// What it lacks for a baseline.
    pub fn lacks_for(&self, baseline: Baseline) -> Vec<&'static str> {
        let Some(level) = level(baseline) else { return Vec::new() };
        let listed = FEATURES.iter().flat_map(|(.., listed)| listed.iter());
        self.lacks(listed.filter(|(_, _, since)| *since <= level).map(|(_, name, _)| *name))
    }
}

fn level(baseline: Baseline) -> Option<Level> {
    match baseline {
        Baseline::Host => None,
        Baseline::V2 => Some(V2),
        Baseline::V3 => Some(V3),
    }
}

/// Hides from a guest what lies beyond the baseline.
pub(super) fn limit(entry: &mut kvm_cpuid_entry2, baseline: Baseline) {
    let Some(level) = level(baseline) else { return };
    let (leaf, index) = (entry.function, entry.index);
    if BEYOND.contains(&leaf) {
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
    }
    if leaf == 0xd {
        return limit_state(entry, level);
    }
    let allowed = |register: Register| {
        let rows = FEATURES.iter().filter(|row| (row.0, row.1, row.2) == (leaf, index, register));
        let bits = rows.flat_map(|row| row.3).filter(|(_, _, since)| *since <= level);
        let own = KVMS_OWN.iter().filter(|own| (own.0, own.1, own.2) == (leaf, index, register));
        bits.fold(0, |mask, (bit, ..)| mask | 1 << bit) | own.fold(0, |mask, own| mask | own.3)
    };
    match (leaf, index) {
        // All of EDX is as old as x86-64.
        (0x1, _) => entry.ecx &= allowed(C),
        (0x6, _) => (entry.eax, entry.ecx) = (entry.eax & allowed(A), 0),
        // EAX of the first: how many more there are.
        (0x7, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, entry.ebx & allowed(B), 0, 0),
        (0x7, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        (0x8000_0001, _) => {
            entry.ecx &= allowed(C);
            // AMD has the bits of leaf 1 here too.
            let newer = 1 << 22 | 1 << 25 | 1 << 26 | 1 << 27 | 1 << 30 | 1 << 31;
            entry.edx &= !newer;
        }
        (0x8000_0008, _) => entry.ebx = 0,
        _ => {}
    }
}

/// XSAVE's leaf: which state it saves, and in how many bytes.
fn limit_state(entry: &mut kvm_cpuid_entry2, level: Level) {
    let (state, bytes) = AVX_STATE;
    match entry.index {
        0 if level >= V3 => {
            (entry.eax, entry.edx) = (entry.eax & state, 0);
            (entry.ebx, entry.ecx) = (entry.ebx.min(bytes), entry.ecx.min(bytes));
        }
        2 if level >= V3 => {}
        _ => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let all = u32::MAX;
        kvm_cpuid_entry2 { function, index, eax: all, ebx: all, ecx: all, edx: all, ..Default::default() }
    }

    /// A CPU that can do everything, as a guest of this baseline sees it.
    fn seen(baseline: Baseline) -> Cpu {
        let mut entries: Vec<_> = FEATURES.iter().map(|row| entry(row.0, row.1)).collect();
        entries.iter_mut().for_each(|entry| limit(entry, baseline));
        Cpu::of_guest(&entries)
    }

    #[test]
    fn a_baseline_shows_what_its_level_has_and_nothing_more() {
        let count =
            |least: Level| FEATURES.iter().flat_map(|row| row.3).filter(|(_, _, since)| *since <= least).count();
        for (baseline, level) in [(Baseline::V2, V2), (Baseline::V3, V3), (Baseline::Host, Beyond)] {
            let cpu = seen(baseline);
            assert_eq!(cpu.features.len(), count(level), "{baseline}: {:?}", cpu.features);
            assert_eq!(cpu.lacks_for(baseline), [""; 0]);
        }
        let v2 = seen(Baseline::V2);
        assert_eq!(v2.lacks(["sse4_2", "avx2", "nx", "made_up"]), ["avx2", "made_up"]);
        assert!(v2.lacks_for(Baseline::V3).contains(&"bmi2"));
        let mut names: Vec<_> = seen(Baseline::Host).features;
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "a name is there twice");
    }

    #[test]
    fn what_kvm_brings_itself_stays() {
        let mut one = entry(1, 0);
        limit(&mut one, Baseline::V2);
        assert_eq!(one.ecx & (1 << 31 | 1 << 21 | 1 << 24), 1 << 31 | 1 << 21 | 1 << 24);
        assert_eq!(one.edx, u32::MAX);
        let mut tiles = entry(0x1d, 0);
        limit(&mut tiles, Baseline::V3);
        assert_eq!((tiles.eax, tiles.edx), (0, 0));
        let mut state = kvm_cpuid_entry2 { ecx: 2696, ebx: 576, ..entry(0xd, 0) };
        limit(&mut state, Baseline::V3);
        assert_eq!((state.eax, state.ebx, state.ecx), (7, 576, 832));
        limit(&mut state, Baseline::V2);
        assert_eq!((state.eax, state.ecx), (0, 0));
        let mut clock = entry(0x4000_0001, 0);
        limit(&mut clock, Baseline::V2);
        assert_eq!(clock, entry(0x4000_0001, 0));
    }

    #[test]
    fn this_host_is_an_x86_64_cpu() {
        let host = Cpu::of_host();
        assert_eq!(host.lacks(["cx8", "cmov", "sse2", "syscall", "nx", "lm"]), [""; 0]);
        assert!((4..=12).contains(&host.vendor.len()), "{}", host.vendor);
    }
}
