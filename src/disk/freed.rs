//! Giving the space of discarded clusters back to the host.
//!
//! imago counts them as free and uses them again, and leaves what is in them. Punching a hole into the file is
//! only right once no table on the disk leads to the cluster any more, so the clusters wait here for the next
//! flush; and only while nothing new has been written to them, so every write takes its clusters out.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use super::layout::CLUSTER;

/// The most clusters that wait. More than these (a gigabyte) stay allocated until they are used again.
const MAX_WAITING: usize = 16384;

/// Clusters of one file that are free and still take space, by their offsets.
#[derive(Debug, Default)]
pub(super) struct Freed(Mutex<BTreeSet<u64>>);

impl Freed {
    /// These bytes, whole clusters, are free.
    pub(super) fn add(&self, range: Range<u64>) {
        let mut waiting = self.waiting();
        let room = MAX_WAITING.saturating_sub(waiting.len());
        waiting.extend(range.step_by(CLUSTER as usize).take(room));
    }

    /// These bytes are about to be written.
    pub(super) fn used(&self, range: Range<u64>) {
        let mut waiting = self.waiting();
        if waiting.is_empty() {
            return;
        }
        let clusters: Vec<u64> = waiting.range(range.start / CLUSTER * CLUSTER..range.end).copied().collect();
        for cluster in clusters {
            waiting.remove(&cluster);
        }
    }

    /// Everything that leads to the clusters is gone from the disk: gives their space back, telling `each` of
    /// every range. A filesystem that has no holes keeps the space, which harms nothing.
    pub(super) fn give_back(&self, file: &File, mut each: impl FnMut(Range<u64>)) {
        let mut clusters = std::mem::take(&mut *self.waiting()).into_iter().peekable();
        while let Some(start) = clusters.next() {
            let mut end = start + CLUSTER;
            while clusters.next_if_eq(&end).is_some() {
                end += CLUSTER;
            }
            if punch(file, start..end).is_err() {
                return;
            }
            each(start..end);
        }
    }

    /// The set stays sound whatever happens to a thread that holds it: it is changed by single calls.
    fn waiting(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn punch(file: &File, range: Range<u64>) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (offset, length) = (range.start as libc::off_t, (range.end - range.start) as libc::off_t);
    // SAFETY: fallocate takes plain numbers; the descriptor is open while `file` is borrowed.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_again_is_not_given_back() {
        let freed = Freed::default();
        freed.add(0..4 * CLUSTER);
        freed.add(6 * CLUSTER..7 * CLUSTER);
        freed.used(CLUSTER + 512..CLUSTER + 1024);
        let file = tempfile::tempfile().unwrap();
        let mut given = Vec::new();
        freed.give_back(&file, |range| given.push(range));
        assert_eq!(given, [0..CLUSTER, 2 * CLUSTER..4 * CLUSTER, 6 * CLUSTER..7 * CLUSTER]);
        freed.give_back(&file, |_| panic!("given back twice"));
    }
}
