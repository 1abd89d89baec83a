//! How much of a monitor's memory is its own, and how much it shares with other clones of one snapshot.

use serde::Serialize;

use crate::sys::files;

/// Longer than any such file, in bytes.
const LIMIT: u64 = 16 << 10;

/// A process's memory in bytes, as the kernel counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Share {
    /// What is in the host's memory.
    pub resident: u64,
    /// Pages that others have mapped too.
    pub shared: u64,
    /// Pages that nobody else has.
    pub private: u64,
    /// Its part: each shared page divided by those who share it.
    pub proportional: u64,
}

/// That of a process; none when it has gone.
pub fn of(pid: u32) -> Option<Share> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = files::read_bounded(path.as_ref(), LIMIT).ok()?;
    parse(std::str::from_utf8(&text).ok()?)
}

fn parse(text: &str) -> Option<Share> {
    let mut share = Share::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(kib)) = (words.next(), words.next()) else { continue };
        let field = match name {
            "Rss:" => &mut share.resident,
            "Pss:" => &mut share.proportional,
            "Shared_Clean:" | "Shared_Dirty:" => &mut share.shared,
            "Private_Clean:" | "Private_Dirty:" => &mut share.private,
            _ => continue,
        };
        *field = field.saturating_add(kib.parse::<u64>().ok()?.saturating_mul(1024));
    }
    (share.resident > 0).then_some(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_account_is_read() {
        let text = "00400000-7fff000 ---p 00000000 00:00 0 [rollup]\nRss: 12 kB\nPss: 7 kB\nPss_Anon: 4 kB\n\
                    Shared_Clean: 5 kB\nShared_Dirty: 1 kB\nPrivate_Clean: 2 kB\nPrivate_Dirty: 4 kB\n";
        let kib = |n: u64| n << 10;
        let expected = Share { resident: kib(12), shared: kib(6), private: kib(6), proportional: kib(7) };
        assert_eq!(parse(text), Some(expected));
        for rubbish in ["", "Rss:", "Rss: much kB", "Rss: 0 kB"] {
            assert_eq!(parse(rubbish), None, "{rubbish}");
        }
        let own = of(std::process::id()).unwrap();
        assert_eq!(own.resident, own.shared + own.private);
        assert_eq!(of(u32::MAX), None);
    }
}
