//! What the kernel says about this machine.

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};

/// vCPUs that are online.
pub fn cpus() -> u32 {
    sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten().and_then(|n| u32::try_from(n).ok()).unwrap_or(1)
}

/// MemTotal in bytes, 0 when /proc is missing.
pub fn memory_bytes() -> u64 {
    meminfo("MemTotal:")
}

/// MemAvailable in bytes: what programs could still have without swapping. 0 when /proc is missing.
pub fn available_bytes() -> u64 {
    meminfo("MemAvailable:")
}

/// The memory that the kernel has, in bytes, also what of it is not in use: a block that leaves counts until it is gone.
/// 0 when /proc is missing.
pub fn present_bytes() -> u64 {
    present_pages(&fs::read_to_string("/proc/zoneinfo").unwrap_or_default()) * page_bytes()
}

/// The sum of the zones' own (Documentation/filesystems/proc.rst, section 1.5: `present` pages of a zone).
fn present_pages(zones: &str) -> u64 {
    zones.lines().filter_map(|line| line.trim().strip_prefix("present ")?.trim().parse::<u64>().ok()).sum()
}

fn page_bytes() -> u64 {
    sysconf(SysconfVar::PAGE_SIZE).ok().flatten().map_or(4096, |bytes| bytes as u64)
}

fn meminfo(field: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let found = text.lines().find_map(|line| line.strip_prefix(field));
    found.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The size in bytes of the disk that the root filesystem lies on, `None` when it lies on none.
pub fn root_disk_bytes() -> Option<u64> {
    let device = fs::metadata("/").ok()?.dev();
    let (major, minor) = (nix::libc::major(device), nix::libc::minor(device));
    // In sectors of 512 bytes, whatever the disk's own are (Documentation/ABI/stable/sysfs-block).
    let sectors = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")).ok()?;
    sectors.trim().parse::<u64>().ok()?.checked_mul(512)
}

/// The size in bytes of the root filesystem, without what it needs for itself.
pub fn root_bytes() -> u64 {
    nix::sys::statvfs::statvfs("/").map_or(0, |fs| fs.blocks().saturating_mul(fs.fragment_size()))
}

/// Seconds since boot, sleep included.
pub fn uptime_seconds() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| time.tv_sec() as u64)
}

/// Wall clock in nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_REALTIME)
        .map_or(0, |time| (time.tv_sec() as u64).saturating_mul(1_000_000_000) + time.tv_nsec() as u64)
}

/// The kernel's name for this boot.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().into()
}

/// The host name.
pub fn hostname() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Sixteen random bytes in hexadecimal, from the kernel.
pub fn random_hex() -> String {
    let mut bytes = [0u8; 16];
    // SAFETY: the pointer and length are those of `bytes`. 16 bytes are never given in part.
    unsafe { nix::libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_are_summed() {
        let zones = "Node 0, zone      DMA\n  pages free     3840\n        spanned  4095\n        present  3998\n        managed  3840\n\
                     Node 0, zone  Movable\n        present  32768\n        managed  0\n";
        assert_eq!(present_pages(zones), 3998 + 32768);
        assert_eq!(present_pages("present at the party\npresent -1"), 0);
        assert!(present_bytes() >= memory_bytes());
    }
}
