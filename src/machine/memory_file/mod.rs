//! Guest memory, written to a snapshot's files while the guest runs on, and loaded from them again.
//!
//! A forked child has a frozen copy of all memory, made by the kernel page by page when the guest changes one,
//! and writes it out ([`scribe`]). For the guest the pause is the fork; how fast the disk is does not matter.
//!
//! ```text
//! Plan::full, Plan::changed        while the machine runs or is paused: everything that takes time
//!     │ spawn                      while it is paused: the fork
//!     ▼
//! Writing ── wait, try_wait ──▶ Written, or why not
//!     └───── cancel, drop ────▶ the child is killed; the files are worth nothing
//! ```

mod calls;
mod load;
mod pages;
mod scribe;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::mem::{Dirty, GuestMemory, PAGE, Range};
use crate::snapshot::memory::Region;
use crate::sys::fork::{self, Child};
use crate::sys::mmap::Shared;

pub use load::load;

use scribe::{Buffers, Span, Task, Word};

/// Why guest memory was not written or loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// RAM that is not made of whole pages, or changed pages of another guest.
    #[error("there are no {length} bytes in whole pages of RAM at {start:#x}")]
    Pages {
        /// Where.
        start: u64,
        /// How many.
        length: u64,
    },
    /// No child, or no memory for the little that it needs.
    #[error("the host has no process to write guest memory: {0}")]
    Host(#[source] io::Error),
    /// A call failed in the child.
    #[error("cannot {doing}: {source}")]
    Write {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The child ended before its work was done, and did not say why.
    #[error("the process that wrote guest memory ended early ({0})")]
    Died(ExitStatus),
    /// A snapshot's `memory` and its index are not of one another.
    #[error("the memory of snapshot {layer} of the chain has {length} bytes, and its index knows {expected}")]
    Length {
        /// Its place in the chain, counted from the base.
        layer: usize,
        /// How long the file is, in bytes.
        length: u64,
        /// How long it should be.
        expected: u64,
    },
}

/// What is to be written, with all that can be had beforehand.
#[derive(Debug)]
pub struct Plan {
    spans: Vec<Span>,
    regions: Vec<Region>,
    buffers: Buffers,
    meter: Meter,
    /// The spans point into it.
    _mem: GuestMemory,
}

/// A child at work. It is killed when this is dropped.
#[derive(Debug)]
pub struct Writing {
    child: Child,
    meter: Meter,
}

/// Reads how far the child is; stays valid when the child has ended.
#[derive(Clone, Debug)]
pub struct Meter {
    report: Arc<Shared>,
    total: u64,
}

/// How far the child is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Guest memory to be gone through.
    pub total: u64,
    /// Guest memory gone through.
    pub scanned: u64,
    /// Written to `memory`.
    pub written: u64,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The pages that the index covers.
    pub pages: u64,
    /// The length of `memory`, in bytes.
    pub length: u64,
    /// What of it was written, in bytes; the rest are holes.
    pub written: u64,
    /// The bytes of guest memory that are zeros, in runs of their own or as holes in `memory`.
    pub zeros: u64,
    /// The runs in the index.
    pub runs: u64,
}

impl Plan {
    /// All of memory.
    pub fn full(mem: &GuestMemory) -> Result<Plan, Error> {
        let whole = mem.iter().map(|region| Range { start: region.start_addr().0, length: region.len() });
        Plan::new(mem, whole.collect())
    }

    /// The pages that changed.
    pub fn changed(mem: &GuestMemory, dirty: &Dirty) -> Result<Plan, Error> {
        Plan::new(mem, dirty.ranges())
    }

    fn new(mem: &GuestMemory, ranges: Vec<Range>) -> Result<Plan, Error> {
        let regions = mem.iter().map(|region| Region { start: region.start_addr().0, length: region.len() });
        let spans = ranges.into_iter().map(|range| span(mem, range)).collect::<Result<Vec<_>, _>>()?;
        let total = spans.iter().map(|span| span.length).sum();
        let report = Arc::new(Shared::new().map_err(Error::Host)?);
        Ok(Plan {
            spans,
            regions: regions.collect(),
            buffers: Buffers::new(),
            meter: Meter { report, total },
            _mem: mem.clone(),
        })
    }

    /// How many bytes of guest memory are to be gone through.
    pub fn total(&self) -> u64 {
        self.meter.total
    }

    /// Forks the child that writes memory, as it is now, to `data` and its index to `index`. Both files must be
    /// new. vCPUs and devices must stand still until this returns.
    pub fn spawn(mut self, data: File, index: File) -> Result<Writing, Error> {
        let (data, index) = (data.as_raw_fd(), index.as_raw_fd());
        let mut task = Task {
            spans: &self.spans,
            regions: &self.regions,
            buffers: &mut self.buffers,
            report: &self.meter.report,
            data,
            index,
        };
        // SAFETY: `scribe` does in the child only what signal-safety(7) allows: system calls, reading memory,
        // and writing to buffers that are there already. The task is borrowed, so that nothing is freed.
        let child = unsafe { fork::fork([data, index], || scribe::run(&mut task)) }.map_err(Error::Host)?;
        Ok(Writing { child, meter: self.meter })
    }
}

/// The host memory of a range, which must be whole pages of one region.
fn span(mem: &GuestMemory, range: Range) -> Result<Span, Error> {
    let Range { start, length } = range;
    let refuse = Error::Pages { start, length };
    let Some((region, at)) = mem.to_region_addr(GuestAddress(start)) else { return Err(refuse) };
    let aligned = start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && region.len().is_multiple_of(PAGE);
    if !aligned || length == 0 || length > region.len() - at.0 {
        return Err(refuse);
    }
    let host = region.mapping().as_ptr() as usize + at.0 as usize;
    Ok(Span { address: start, length, host, anonymous: region.is_anonymous() })
}

impl Writing {
    /// Waits until everything is written and synced.
    pub fn wait(&mut self) -> Result<Written, Error> {
        let status = self.child.wait().map_err(Error::Host)?;
        self.result(status)
    }

    /// What was written, if the child is done.
    pub fn try_wait(&mut self) -> Result<Option<Written>, Error> {
        let status = self.child.try_wait().map_err(Error::Host)?;
        status.map(|status| self.result(status)).transpose()
    }

    /// How far the child is.
    pub fn progress(&self) -> Progress {
        self.meter.read()
    }

    /// The same for somebody else.
    pub fn meter(&self) -> Meter {
        self.meter.clone()
    }

    /// Kills the child and waits for its end. What it had written is worth nothing.
    pub fn cancel(mut self) -> Result<(), Error> {
        self.child.kill().map_err(Error::Host)
    }

    fn result(&self, status: ExitStatus) -> Result<Written, Error> {
        let word = |word| self.meter.word(word);
        if status.success() {
            return Ok(Written {
                pages: word(Word::Scanned) / PAGE,
                length: word(Word::Length),
                written: word(Word::Written),
                zeros: word(Word::Scanned) - word(Word::Written),
                runs: word(Word::Runs),
            });
        }
        match scribe::failure(&self.meter.report) {
            Some((doing, source)) => Err(Error::Write { doing, source }),
            None => Err(Error::Died(status)),
        }
    }
}

impl Meter {
    /// How far the child is.
    pub fn read(&self) -> Progress {
        Progress { total: self.total, scanned: self.word(Word::Scanned), written: self.word(Word::Written) }
    }

    fn word(&self, word: Word) -> u64 {
        self.report.words()[word as usize].load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests;
