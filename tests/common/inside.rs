//! The other half of a test: this very program, run in the guest.
//!
//! It is one static file, so it runs there too, as root. A test that needs a tool in the guest begins with
//! `if inside::here() { … }` and calls [`Machine::other_half`] with its own name.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Child;

use super::ran::{Ran, in_background, with_input};
use super::{Machine, catnap};

/// Where the program is in the guest, once it was sent.
pub const PROGRAM: &str = "/tmp/other-half";

/// What this half of the test was asked to do; `None` on the host.
pub fn here() -> Option<String> {
    std::env::var("CATNAP_INSIDE").ok()
}

impl Machine {
    /// Does the guest's half of `test` there. It must succeed.
    pub fn other_half(&self, test: &str, task: &str) -> Ran {
        self.send_program();
        catnap(&self.command(test, &format!("CATNAP_INSIDE={task}"))).succeeds()
    }

    /// Begins the guest's half of `test`; returns when it has said a line that begins with `ready`.
    pub fn other_half_begins(&self, test: &str, task: &str, ready: &str) -> Half {
        self.send_program();
        let mut child = in_background(&self.command(test, &format!("CATNAP_INSIDE={task}")));
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
        let first = lines.find(|line| line.starts_with(ready));
        assert!(first.is_some(), "the guest's half of {test} said nothing that begins with {ready}");
        Half { child, lines: Box::new(lines) }
    }

    /// With one thread alone, the test's name would stand before the first line that it prints.
    fn command<'a>(&'a self, test: &'a str, task: &'a str) -> [&'a str; 11] {
        let (name, threads) = (&self.name, "RUST_TEST_THREADS=2");
        ["exec", "-e", task, "-e", threads, name, "--", PROGRAM, "--exact", test, "--nocapture"]
    }

    /// Sends this program into the guest, unless it is there.
    pub fn send_program(&self) {
        if catnap(&["exec", &self.name, "--", "test", "-x", PROGRAM]).code == 0 {
            return;
        }
        let program = fs::read("/proc/self/exe").expect("this program");
        let take = format!("cat >{PROGRAM} && chmod 755 {PROGRAM}");
        with_input(&["exec", &self.name, "--", "sh", "-c", &take], &program).succeeds();
    }
}

/// A guest's half that goes on for a while. Its end here is its end there.
pub struct Half {
    child: Child,
    /// What it says from now on.
    pub lines: Box<dyn Iterator<Item = String> + Send>,
}

impl Drop for Half {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In the guest: the numbers of the physical pages behind memory (Documentation/admin-guide/mm/pagemap.rst).
pub fn frames(memory: &[u64]) -> Vec<u64> {
    use std::os::unix::fs::FileExt;
    const PAGE: usize = 4096;
    const PRESENT: u64 = 1 << 63;
    let first = (memory.as_ptr() as usize).div_ceil(PAGE);
    let last = (memory.as_ptr() as usize + size_of_val(memory)) / PAGE;
    let mut entries = vec![0; (last - first) * 8];
    let pagemap = fs::File::open("/proc/self/pagemap").expect("a pagemap");
    pagemap.read_exact_at(&mut entries, first as u64 * 8).expect("an entry for each page");
    let entries = entries.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")));
    entries.filter(|entry| entry & PRESENT != 0).map(|entry| entry & ((1 << 55) - 1)).collect()
}
