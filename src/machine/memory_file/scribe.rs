//! The child's work: guest memory into the files.
//!
//! Everything here runs in the forked child of a process with many threads, so it neither allocates nor locks
//! nor panics. What goes wrong is left in the page that is shared with the parent.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

use crate::mem::PAGE;
use crate::snapshot::memory::{HEADER, Region, Run, header};
use crate::sys::mmap::Shared;

use super::calls::{sync, truncate, write};
use super::pages::{ENTRIES, Pagemap, is_zero};

/// The longest write, in bytes: so often is progress reported.
const CHUNK: u64 = 1 << 20;
/// So many bytes of zeros end a run of data. Fewer stay in it as a hole, which costs less than another run:
/// a run is 24 bytes in the index, but a mapping or a read at every restore.
const HOLE: u64 = 16 * PAGE;
/// Runs are written to the index in pieces of this size.
const BUFFER: usize = 64 << 10;

/// What the numbers in the shared page are.
#[derive(Clone, Copy)]
pub(super) enum Word {
    /// Bytes of guest memory gone through.
    Scanned,
    /// Bytes written to the data file.
    Written,
    /// The data file's length.
    Length,
    /// Runs in the index.
    Runs,
    /// The errno of what failed.
    Errno,
    /// What failed, a [`Step`].
    Step,
}

/// What can fail.
#[derive(Clone, Copy)]
enum Step {
    WriteData,
    WriteIndex,
    SyncData,
    SyncIndex,
}

struct Failure(Step, i32);

/// Pages in a row, to be written.
#[derive(Debug)]
pub(super) struct Span {
    /// The guest-physical address.
    pub address: u64,
    /// In bytes.
    pub length: u64,
    /// The address in this process.
    pub host: usize,
    /// Whether pages that were never touched are known to be zeros.
    pub anonymous: bool,
}

/// Memory that the child needs, had beforehand.
#[derive(Debug)]
pub(super) struct Buffers {
    index: Vec<u8>,
    pagemap: Box<[u64; ENTRIES]>,
}

/// All that the child needs.
pub(super) struct Task<'a> {
    pub spans: &'a [Span],
    pub regions: &'a [Region],
    pub buffers: &'a mut Buffers,
    pub report: &'a Shared,
    pub data: RawFd,
    pub index: RawFd,
}

impl Buffers {
    pub(super) fn new() -> Buffers {
        Buffers { index: Vec::with_capacity(BUFFER), pagemap: Box::new([0; ENTRIES]) }
    }
}

/// Does the task; gives the exit code.
pub(super) fn run(task: &mut Task<'_>) -> u8 {
    let Buffers { index, pagemap } = task.buffers;
    let mut scribe = Scribe {
        report: task.report,
        data: task.data,
        index: Index { fd: task.index, buffer: index, offset: HEADER, runs: 0 },
        pagemap: Pagemap::open(pagemap),
        length: 0,
        written: 0,
        scanned: 0,
    };
    match scribe.write(task.spans, task.regions) {
        Ok(()) => 0,
        Err(Failure(step, errno)) => {
            set(task.report, Word::Step, step as u64);
            set(task.report, Word::Errno, u64::from(errno.unsigned_abs()));
            1
        }
    }
}

/// In the parent: what failed in the child and why, if it said so.
pub(super) fn failure(report: &Shared) -> Option<(&'static str, io::Error)> {
    let word = |word: Word| report.words()[word as usize].load(Ordering::SeqCst);
    let errno = i32::try_from(word(Word::Errno)).ok().filter(|errno| *errno != 0)?;
    let doing = match word(Word::Step) {
        step if step == Step::WriteData as u64 => "write guest memory",
        step if step == Step::WriteIndex as u64 => "write the index of guest memory",
        step if step == Step::SyncData as u64 => "sync guest memory",
        _ => "sync the index of guest memory",
    };
    Some((doing, io::Error::from_raw_os_error(errno)))
}

fn set(report: &Shared, word: Word, value: u64) {
    report.words()[word as usize].store(value, Ordering::SeqCst);
}

struct Scribe<'a> {
    report: &'a Shared,
    data: RawFd,
    index: Index<'a>,
    pagemap: Pagemap<'a>,
    /// Where the next run of data begins in the file.
    length: u64,
    written: u64,
    /// Before the current span.
    scanned: u64,
}

impl Scribe<'_> {
    fn write(&mut self, spans: &[Span], regions: &[Region]) -> Result<(), Failure> {
        for region in regions {
            self.index.append(&region.to_bytes())?;
        }
        for span in spans {
            self.span(span)?;
            self.scanned += span.length;
            set(self.report, Word::Scanned, self.scanned);
        }
        // The last page of a run of data is written, so this changes nothing in a new file; in one that was not
        // new, what was there before does not stay behind.
        truncate(self.data, self.length).map_err(|errno| Failure(Step::WriteData, errno))?;
        sync(self.data).map_err(|errno| Failure(Step::SyncData, errno))?;
        self.index.finish(regions.len() as u32)?;
        set(self.report, Word::Length, self.length);
        set(self.report, Word::Runs, self.index.runs);
        Ok(())
    }

    /// Writes a span as runs of data, with small holes, and runs of zeros. Offsets count from its beginning.
    fn span(&mut self, span: &Span) -> Result<(), Failure> {
        let mut at = 0;
        // The open run of data: where it begins in the span and in the file.
        let mut open: Option<(u64, u64)> = None;
        while at < span.length {
            let zeros = self.zeros(span, at);
            let is_hole = zeros < HOLE && at + zeros < span.length;
            match open {
                // The file is longer by it, and reads as zeros where nothing is written.
                Some(_) if is_hole => self.length += zeros,
                _ if zeros > 0 => {
                    self.close(span, open.take(), at)?;
                    self.index.run(Run { address: span.address + at, length: zeros, offset: None })?;
                }
                _ => {}
            }
            at += zeros;
            let data = self.data(span, at);
            if data > 0 {
                open.get_or_insert((at, self.length));
                write(self.data, span.host.wrapping_add(at as usize) as *const u8, data as usize, self.length)
                    .map_err(|errno| Failure(Step::WriteData, errno))?;
                self.length += data;
                self.written += data;
                set(self.report, Word::Written, self.written);
            }
            at += data;
        }
        self.close(span, open, at)
    }

    /// Puts the open run of data, which ends at `end`, into the index.
    fn close(&mut self, span: &Span, open: Option<(u64, u64)>, end: u64) -> Result<(), Failure> {
        let Some((start, offset)) = open else { return Ok(()) };
        self.index.run(Run { address: span.address + start, length: end - start, offset: Some(offset) })
    }

    /// How many bytes of zero pages there are from `at` on.
    fn zeros(&mut self, span: &Span, at: u64) -> u64 {
        let mut end = at;
        while end < span.length {
            let page = span.host.wrapping_add(end as usize);
            let zero = span.anonymous && self.pagemap.untouched(page) || is_zero(page);
            if !zero {
                break;
            }
            end += PAGE;
            set(self.report, Word::Scanned, self.scanned + end);
        }
        end - at
    }

    /// How many bytes of pages that are not zero there are from `at` on, as far as one write goes.
    fn data(&mut self, span: &Span, at: u64) -> u64 {
        let limit = span.length.min(at + CHUNK);
        let mut end = at;
        while end < limit && !is_zero(span.host.wrapping_add(end as usize)) {
            end += PAGE;
        }
        set(self.report, Word::Scanned, self.scanned + end);
        end - at
    }
}

/// The index file.
struct Index<'a> {
    fd: RawFd,
    /// Never longer than its capacity, so that it never allocates.
    buffer: &'a mut Vec<u8>,
    /// Where the buffer belongs in the file.
    offset: u64,
    runs: u64,
}

impl Index<'_> {
    fn run(&mut self, run: Run) -> Result<(), Failure> {
        self.runs += 1;
        self.append(&run.to_bytes())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.buffer.capacity() - self.buffer.len() < bytes.len() {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        write(self.fd, self.buffer.as_ptr(), self.buffer.len(), self.offset)
            .map_err(|errno| Failure(Step::WriteIndex, errno))?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// The header comes last, and the sync before it: an index that has one is whole.
    fn finish(&mut self, regions: u32) -> Result<(), Failure> {
        self.flush()?;
        truncate(self.fd, self.offset).map_err(|errno| Failure(Step::WriteIndex, errno))?;
        sync(self.fd).map_err(|errno| Failure(Step::SyncIndex, errno))?;
        let header = header(regions, self.runs);
        write(self.fd, header.as_ptr(), header.len(), 0).map_err(|errno| Failure(Step::WriteIndex, errno))?;
        sync(self.fd).map_err(|errno| Failure(Step::SyncIndex, errno))
    }
}
