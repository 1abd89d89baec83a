//! The monitor's process, seen from outside.

use std::fs;

use super::{Machine, PATIENCE, within};

impl Machine {
    /// Its monitor's process id.
    pub fn pid(&self) -> i32 {
        self.view()["pid"].as_i64().expect("a monitor") as i32
    }

    /// `kill -9`, as the kernel does when memory runs out.
    pub fn kill_monitor(&self) {
        signal(self.pid(), libc::SIGKILL);
    }
}

/// The process id of a machine's monitor, also when that does not answer yet.
pub fn monitor_of(name: &str) -> Option<i32> {
    let (words, home) = (format!("monitor\0{name}\0"), format!("CATNAP_HOME={}\0", super::home().display()));
    let of = |pid: &str, file| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let is_it = |pid: &String| of(pid, "cmdline").ends_with(&words) && of(pid, "environ").contains(&home);
    let processes = fs::read_dir("/proc").expect("processes");
    processes.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).find(is_it)?.parse().ok()
}

/// Sends a signal to a process; with SIGKILL, waits for its end.
pub fn signal(pid: i32, number: i32) {
    // SAFETY: kill touches no memory.
    assert_eq!(unsafe { libc::kill(pid, number) }, 0, "process {pid} is gone");
    if number == libc::SIGKILL {
        within(PATIENCE, "the process is gone", || is_gone(pid));
    }
}

/// Whether a process has ended, also when nobody has asked for its exit code yet.
pub fn is_gone(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let ended = stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with(['Z', 'X']));
    // The first thread may have ended while others still do, and as long as they do, locks are held.
    let others = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, |tasks| tasks.count().saturating_sub(1));
    ended && others == 0
}

/// What a monitor holds in memory besides its guest's RAM of `ram` MiB, in KiB.
pub fn own_memory(pid: i32, ram: u64) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a process of ours");
    let number = |line: &str| line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number");
    let (mut own, mut is_ram) = (0, false);
    for line in maps.lines() {
        match line.split(':').next() {
            // The kernel may have joined a neighbour to it.
            Some("Size") => is_ram = number(line) >= ram << 10,
            Some("Rss") if !is_ram => own += number(line),
            _ => {}
        }
    }
    own
}
