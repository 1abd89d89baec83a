//! What a process has used, as /proc tells (proc(5)).

use std::fs;
use std::time::Duration;

use crate::Result;

/// The CPU time of all threads of a process but its vCPUs, whose time is the guest's.
///
/// From `schedstat`, in nanoseconds: the sum of utime and stime in `stat` is the same figure, in steps of
/// 10 ms, and there it contains the vCPUs.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut sum = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        // A thread may end while we look.
        let Ok(name) = fs::read_to_string(thread.join("comm")) else { continue };
        if !name.contains("vcpu") {
            let times = fs::read_to_string(thread.join("schedstat"))?;
            sum += times.split(' ').next().unwrap_or_default().parse::<u64>()?;
        }
    }
    Ok(Duration::from_nanos(sum))
}

/// The resident memory of a process in bytes, without the mappings that are large enough to be the guest's
/// memory. A mapping of the monitor's own that lies right beside it can be taken for a part of it; anything
/// that is not the guest's memory, and as large, is not resident.
pub fn own_memory(pid: u32, guest: u64) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut sum = 0;
    let mut size = 0;
    for line in smaps.lines() {
        match line.split_once(':') {
            Some(("Size", value)) => size = kib(value)?,
            Some(("Rss", value)) if size < guest => sum += kib(value)?,
            _ => {}
        }
    }
    Ok(sum)
}

/// The memory of a process in bytes, of pages that others have too its part (PSS).
pub fn proportional_memory(pid: u32) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let pss = smaps.lines().find_map(|line| line.strip_prefix("Pss:")).ok_or("smaps_rollup lacks Pss")?;
    kib(pss)
}

/// A value such as `   132 kB`, in bytes.
fn kib(value: &str) -> Result<u64> {
    Ok(value.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}
