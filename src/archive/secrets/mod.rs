//! Which secrets a snapshot holds: keys, tokens and passwords in the forms that they usually have, and whatever
//! string the user asks for, on its disks and in its memory.
//!
//! Whoever gets a snapshot gets all of it: files that were removed and not overwritten, pages of programs that ended.
//! So bytes are searched and not files, and what is found is told with its address on the disk as the guest sees it,
//! or in the guest's memory. Where one of the guest's [`files`] lies there, its name is told too.
//! A secret that lies in pieces, compressed or encrypted, is not found: finding nothing proves nothing.

mod ext4;
mod files;
mod journal;
mod patterns;
mod search;

use std::collections::HashMap;
use std::fmt;
use std::ops::ControlFlow;

use serde::Serialize;

use super::{Error, Progress, Watch};
use crate::snapshot::{Digest, MANIFEST};
use crate::store::{Snapshot, Store};
use crate::sys::process;
use patterns::Pattern;
use search::Search;

pub use files::InFile;

/// The most different secrets that are told of.
const MAX_FINDINGS: usize = 100;
/// The most places that are told of each.
const MAX_PLACES: usize = 4;
/// The most that are noted of each on one disk, to tell those in files.
const MAX_NOTED: usize = 64;
/// The shortest and the longest string that can be searched for, in bytes.
pub const WANTED: std::ops::RangeInclusive<usize> = 4..=256;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The secrets, in the order in which they were met.
    pub findings: Vec<Finding>,
    /// How many times something was met that is not among them, because they are too many.
    pub more: u64,
    /// Bytes that were searched, zeros left out.
    pub searched_bytes: u64,
}

/// One secret, with the places where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is, such as `private key`.
    pub kind: &'static str,
    /// Enough of it to know it by, and not more.
    pub shown: String,
    /// How many times it is there.
    pub count: u64,
    /// Some places, those in files first.
    pub places: Vec<Place>,
}

/// Where something is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// `disk root`, `guest memory`, or a file of the snapshot.
    #[serde(rename = "in")]
    pub within: String,
    /// The offset on the disk as the guest sees it, the guest-physical address, or the offset in the file.
    pub offset: u64,
    /// The guest's file that lies there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<InFile>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { within, offset, file } = self;
        match file {
            Some(InFile { path, offset }) => write!(f, "{within}: {path} at {offset:#x}"),
            None => write!(f, "{within} at {offset:#x}"),
        }
    }
}

/// Searches a snapshot, with its memory if it has any, also for the strings in `wanted`.
pub fn scan(store: &Store, snapshot: &Snapshot, wanted: &[String], watch: Watch<'_>) -> Result<Report, Error> {
    let manifest = &snapshot.manifest;
    let mut total = 0u64;
    for disk in &manifest.disks {
        total = total.saturating_add(store.bytes_in(snapshot, Some(disk))?);
    }
    if manifest.memory.is_some() {
        total = total.saturating_add(store.bytes_in(snapshot, None)?);
    }
    let mut found = Found::new(wanted);
    found.feed(MANIFEST, 0, &manifest.to_bytes()?);
    found.end(MANIFEST);
    let mut read = |found: &mut Found, within: &str, at: u64, bytes: &[u8]| {
        if process::interrupted() {
            return ControlFlow::Break(());
        }
        found.feed(within, at, bytes);
        watch(Progress { what: within, done: found.report.searched_bytes.min(total), total: Some(total) });
        ControlFlow::Continue(())
    };
    for disk in &manifest.disks {
        let within = format!("disk {}", disk.device);
        store.read_disk(snapshot, disk, &mut |at, bytes| read(&mut found, &within, at, bytes))?;
        found.end(&within);
        let places = found.places(&within).map(|place| place.offset).collect::<Vec<_>>();
        if !places.is_empty() {
            let files = files::at(store.open_disk(snapshot, disk)?, places);
            found.places(&within).for_each(|place| place.file = files.get(&place.offset).cloned());
        }
    }
    if manifest.memory.is_some() {
        let within = "guest memory";
        store.read_memory(snapshot, &mut |at, bytes| read(&mut found, within, at, bytes))?;
        found.end(within);
    }
    if process::interrupted() { Err(Error::Interrupted) } else { Ok(found.report()) }
}

/// What was found so far.
struct Found {
    search: Search,
    known: HashMap<(&'static str, Digest), usize>,
    report: Report,
}

impl Found {
    fn new(wanted: &[String]) -> Found {
        Found { search: Search::new(patterns::all(wanted)), known: HashMap::new(), report: Report::default() }
    }

    fn feed(&mut self, within: &str, at: u64, bytes: &[u8]) {
        self.report.searched_bytes = self.report.searched_bytes.saturating_add(bytes.len() as u64);
        let Found { search, known, report } = self;
        search.feed(at, bytes, &mut |pattern, offset, secret| note(known, report, pattern, (within, offset), secret));
    }

    /// Nothing follows in this place.
    fn end(&mut self, within: &str) {
        let Found { search, known, report } = self;
        search.end(&mut |pattern, offset, secret| note(known, report, pattern, (within, offset), secret));
    }

    /// The places that are noted there.
    fn places(&mut self, within: &str) -> impl Iterator<Item = &mut Place> {
        let all = self.report.findings.iter_mut().flat_map(|finding| &mut finding.places);
        all.filter(move |place| place.within == within)
    }

    /// All of it, with the places in files first.
    fn report(mut self) -> Report {
        for finding in &mut self.report.findings {
            finding.places.sort_by_key(|place| place.file.is_none());
            finding.places.truncate(MAX_PLACES);
        }
        self.report
    }
}

fn note(
    known: &mut HashMap<(&'static str, Digest), usize>,
    report: &mut Report,
    pattern: &Pattern,
    (within, offset): (&str, u64),
    secret: &[u8],
) {
    let key = (pattern.kind, Digest::of(secret));
    let finding = match known.get(&key) {
        Some(at) => report.findings.get_mut(*at),
        None if report.findings.len() < MAX_FINDINGS => {
            known.insert(key, report.findings.len());
            let shown = (pattern.show)(secret);
            report.findings.push(Finding { kind: pattern.kind, shown, count: 0, places: Vec::new() });
            report.findings.last_mut()
        }
        None => None,
    };
    let Some(finding) = finding else {
        report.more += 1;
        return;
    };
    finding.count += 1;
    if finding.places.iter().filter(|place| place.within == within).count() < MAX_NOTED {
        finding.places.push(Place { within: within.into(), offset, file: None });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Access, Format, create_from_raw, open};
    use crate::snapshot::Kind;
    use crate::snapshot::memory::{Index, PAGE, Region, Run};
    use crate::store::testing::{DISK_SIZE, Made, store};
    use vm_memory::VolatileSlice;

    fn write(path: &std::path::Path, root: &std::path::Path, offset: u64, text: &[u8]) {
        let mut bytes = vec![0; 4096];
        bytes[100..100 + text.len()].copy_from_slice(text);
        let mut disk = open(path, Format::Qcow2, Access::ReadWrite, root).unwrap();
        let memory = vm_memory::MmapRegion::<vm_memory::bitmap::AtomicBitmap>::new(4096).unwrap();
        use vm_memory::{Bytes, VolatileMemory};
        let slice: VolatileSlice<'_, _> = memory.get_slice(0, 4096).unwrap();
        slice.write_slice(&bytes, 0).unwrap();
        disk.write(&[slice], offset).unwrap();
        disk.flush().unwrap();
    }

    #[test]
    fn secrets_are_found_through_chains_and_told_with_their_places() {
        let (_dir, store) = store();
        let kitten = Made::new(Kind::Clean, "kitten").disk(None);
        let kitten = kitten
            .touch(|store, dir, layer| {
                write(&dir.join(layer), store.root(), 65536, b"AKIAIOSFODNN7EXAMPLE ");
                write(&dir.join(layer), store.root(), 1 << 20, b"password=hidden-below");
            })
            .publish(&store);
        let mut page = vec![0; PAGE as usize];
        page[8..28].copy_from_slice(b"AKIAIOSFODNN7EXAMPLE");
        page[99..105].copy_from_slice(b"purrrr");
        let region = Region { start: 0, length: 2 * PAGE };
        let runs = [(0, None), (PAGE, Some(0))].map(|(address, offset)| Run { address, length: PAGE, offset });
        let index = Index::new(vec![region], runs.to_vec()).unwrap().to_bytes();
        let anna = Made::new(Kind::Live, "anna@x").disk(Some(&kitten)).memory_of(None, &page, &index);
        let anna = anna.touch(|store, dir, layer| write(&dir.join(layer), store.root(), 1 << 20, b"overwritten"));
        let anna = anna.publish(&store);
        let report = scan(&store, &anna, &["purrrr".into()], &mut |_| {}).unwrap();
        let shown: Vec<_> = report.findings.iter().map(|one| (one.kind, one.count, &one.places[..])).collect();
        let place = |within: &str, offset| Place { within: within.into(), offset, file: None };
        let key = [place("disk root", 65536 + 100), place("guest memory", PAGE + 8)];
        assert_eq!(shown, [("AWS key", 2, &key[..]), ("wanted", 1, &[place("guest memory", PAGE + 99)][..])]);
        assert!(!report.findings[0].shown.contains("IOSFODNN7EXAMPLE"), "it is masked");
        assert_eq!(report.findings[0].places[0].to_string(), "disk root at 0x10064");
    }

    #[test]
    fn a_secret_in_a_file_is_told_by_the_name_of_the_file() {
        let (dir, store) = store();
        let raw = files::tests::filesystem(dir.path(), &[]);
        let (at, kitten) = (DISK_SIZE - 65536, Made::new(Kind::Clean, "kitten").disk(None));
        let kitten = kitten.touch(move |store, dir, layer| {
            std::fs::remove_file(dir.join(layer)).unwrap();
            create_from_raw(&raw, &dir.join(layer)).unwrap();
            write(&dir.join(layer), store.root(), at, b"=AKIAIOSFODNN7EXAMPLE ");
        });
        let report = scan(&store, &kitten.publish(&store), &[], &mut |_| {}).unwrap();
        let key = &report.findings[0];
        let places: Vec<_> = key.places.iter().map(ToString::to_string).collect();
        assert_eq!((report.findings.len(), key.count, places.len()), (1, 2, 2), "{places:?}");
        assert_eq!((places[0].as_str(), key.places[0].offset % 1024), ("disk root: /a/b/key at 0x1388", 5000 % 1024));
        assert_eq!(key.places[1], Place { within: "disk root".into(), file: None, offset: at + 101 });
    }

    #[test]
    fn results_are_bounded() {
        let (mut found, x) = (Found::new(&[]), "x");
        for number in 0..1000 {
            found.feed(x, number * 100, format!(" AKIA{number:016} ").as_bytes());
            found.feed(x, number * 100 + 50, b" AKIAIOSFODNN7EXAMPLE ");
        }
        found.end(x);
        let report = &found.report();
        assert_eq!((report.findings.len(), report.more), (MAX_FINDINGS, 1000 + 1 - MAX_FINDINGS as u64));
        assert_eq!((report.findings[1].count, report.findings[1].places.len()), (1000, MAX_PLACES));
    }
}
