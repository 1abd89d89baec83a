//! Archives that come back as they went, and hostile ones that leave nothing.

use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use super::frames::{FRAME, FrameReader, FrameWriter};
use super::*;
use crate::snapshot::memory::{Index, PAGE, Region, Run};
use crate::snapshot::{Backing, Chunks, Digest, Kind, MANIFEST, Manifest, Role};
use crate::store::testing::{Made, store};
use crate::store::{Snapshot, Store};
use crate::sys::files::names_in;

const STATE: &[u8] = br#"{"format": 1, "parts": []}"#;
const PAGES: u64 = 4;

fn index(pages: &[u64], full: bool) -> Vec<u8> {
    let (mut runs, mut offset) = (Vec::new(), 0);
    for page in 0..PAGES {
        let data = pages.contains(&page).then_some(offset);
        if data.is_some() || full {
            runs.push(Run { address: page * PAGE, length: PAGE, offset: data });
        }
        offset += data.map_or(0, |_| PAGE);
    }
    Index::new(vec![Region { start: 0, length: PAGES * PAGE }], runs).unwrap().to_bytes()
}

fn live(name: &str, parent: Option<&Snapshot>, byte: u8) -> Made {
    let made = Made::new(Kind::Live, name).kernel().file("machine.state", STATE);
    made.memory_of(parent, &vec![byte; PAGE as usize], &index(&[1], parent.is_none()))
}

/// A live snapshot whose disk lies over another's, and whose memory is a difference.
fn chain(store: &Store) -> [Snapshot; 3] {
    let kitten = Made::new(Kind::Clean, "kitten").kernel().filled(7).publish(store);
    let one = live("anna@one", None, 1).disk(Some(&kitten)).publish(store);
    let two = live("anna@two", Some(&one), 2).successor(&one).publish(store);
    [kitten, one, two]
}

fn export(store: &Store, snapshot: &Snapshot, memory: bool) -> (Vec<u8>, Digest) {
    let outgoing = Outgoing::prepare(store, snapshot, memory, &mut |_| {}).unwrap();
    let (bytes, length) = outgoing.write(Vec::new(), &mut |_| {}).unwrap();
    assert_eq!(bytes.len() as u64, length);
    (bytes, outgoing.digest())
}

fn take(store: &Store, bytes: &[u8], naming: Naming<'_>) -> Result<Arrived, Error> {
    import(store, Cursor::new(bytes.to_vec()), naming, Trust::Anybody, &mut |_| {})
}

/// All that can be read of a snapshot.
fn contents(store: &Store, snapshot: &Snapshot) -> Vec<u8> {
    let mut found = Vec::new();
    let mut each = |at: u64, bytes: &[u8]| {
        found.extend(at.to_le_bytes());
        found.extend(bytes);
        std::ops::ControlFlow::Continue(())
    };
    snapshot.manifest.disks.iter().for_each(|disk| store.read_disk(snapshot, disk, &mut each).unwrap());
    if snapshot.manifest.memory.is_some() {
        store.read_memory(snapshot, &mut each).unwrap();
    }
    found
}

fn unpack(archive: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    FrameReader::new(Cursor::new(archive.to_vec()), 2).unwrap().read_to_end(&mut tar).unwrap();
    tar
}

fn pack(tar: &[u8]) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new(), 2).unwrap();
    writer.write_all(tar).unwrap();
    writer.finish().unwrap().0
}

/// Nothing of an archive is in the store.
#[track_caller]
fn nothing_is_left(store: &Store) {
    for folder in ["snapshots", "names", "verified", "arrived", "staging"] {
        assert_eq!(names_in(&store.root().join(folder)).unwrap(), [""; 0], "{folder}");
    }
}

#[test]
fn snapshots_of_every_kind_arrive_as_they_were() {
    let (_dir, here) = store();
    let [kitten, one, two] = chain(&here);
    for (snapshot, memory, kind) in
        [(&kitten, true, Kind::Clean), (&one, true, Kind::Live), (&two, true, Kind::Live), (&two, false, Kind::Crash)]
    {
        let (bytes, digest) = export(&here, snapshot, memory);
        assert!(bytes == export(&here, snapshot, memory).0, "there is one right archive");
        let (_dir, there) = store();
        let arrived = take(&there, &bytes, Naming::Own).unwrap();
        assert_eq!(
            (arrived.snapshot.digest, arrived.name.as_str(), arrived.known),
            (digest, &*snapshot.manifest.name, false)
        );
        let landed = there.resolve(&snapshot.manifest.name).unwrap();
        assert_eq!((landed.manifest.kind, landed.manifest.needs().count()), (kind, 0));
        there.verify(&landed, |_, _| {}).unwrap();
        assert!(there.has_arrived(&digest) && !here.has_arrived(&snapshot.digest));
        assert_eq!(digest == snapshot.digest, snapshot.digest == kitten.digest, "what was whole is the same there");
        let going = if memory { snapshot.clone() } else { Store::without_memory(snapshot) };
        assert!(contents(&there, &landed) == contents(&here, &going));
        assert_eq!(landed.manifest.parent, snapshot.manifest.parent);
        assert!(export(&there, &landed, true).0 == bytes, "it can be handed on");
        let roles: Vec<_> = landed.manifest.files.iter().map(|file| file.role).collect();
        assert!(roles.contains(&Role::Kernel) && roles.contains(&Role::Memory) == (kind == Kind::Live));
        // Once more changes nothing, and holes are holes.
        assert!(take(&there, &bytes, Naming::As("again@x")).unwrap().known);
        assert_eq!((there.list().unwrap().len(), there.sweep().unwrap()), (1, 0));
    }
    assert_eq!(here.list().unwrap().len(), 3);
    assert_eq!(names_in(&here.root().join("staging")).unwrap(), [""; 0]);
}

#[test]
fn other_programs_can_take_it_apart() {
    let (_dir, store) = store();
    let [.., two] = chain(&store);
    let (bytes, _) = export(&store, &two, true);
    let tar = zstd::decode_all(&bytes[..]).unwrap();
    let mut names = Vec::new();
    for entry in tar::Archive::new(&tar[..]).entries().unwrap() {
        names.push(entry.unwrap().path().unwrap().display().to_string());
    }
    assert_eq!(names, [MANIFEST, "kernel", "machine.state", "memory", "memory.index", "root-2.qcow2"]);
}

#[test]
fn names_that_are_taken_stay_with_their_snapshots() {
    let (_dir, here) = store();
    let [_, one, _] = chain(&here);
    let (bytes, digest) = export(&here, &one, true);
    assert!(matches!(take(&here, &bytes, Naming::Own), Err(Error::Taken(name)) if name == "anna@one"));
    assert!(matches!(take(&here, &bytes, Naming::As("kitten")), Err(Error::Taken(_))));
    for bad in ["../x", "a@b@c", ""] {
        assert!(matches!(take(&here, &bytes, Naming::As(bad)), Err(Error::Store(store::Error::Reference(_)))), "{bad}");
    }
    assert_eq!(take(&here, &bytes, Naming::OwnOrFree).unwrap().name, "anna@one-2");
    let again = take(&here, &bytes, Naming::OwnOrFree).unwrap();
    assert!(again.known && again.name == "anna@one-2");
    assert_eq!(here.resolve("anna@one").unwrap().digest, one.digest);
    assert_eq!(here.resolve("anna@one-2").unwrap().digest, digest);
}

#[test]
fn what_cannot_boot_does_not_go() {
    let (_dir, store) = store();
    let made = Made::new(Kind::Clean, "x").disk(None).publish(&store);
    assert!(
        matches!(Outgoing::prepare(&store, &made, true, &mut |_| {}), Err(Error::Refused(why)) if why.contains("kernel"))
    );
}

/// An archive in its parts, which can be changed before it is put together.
struct Forged {
    manifest: Manifest,
    files: Vec<(tar::Header, Vec<u8>)>,
    end: Vec<u8>,
}

impl Forged {
    fn new() -> Forged {
        let (_dir, store) = store();
        let [.., two] = chain(&store);
        let outgoing = Outgoing::prepare(&store, &two, true, &mut |_| {}).unwrap();
        let tar = unpack(&outgoing.write(Vec::new(), &mut |_| {}).unwrap().0);
        let mut files = Vec::new();
        for entry in tar::Archive::new(&tar[..]).entries().unwrap().skip(1) {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            files.push((entry.header().clone(), bytes));
        }
        Forged { manifest: outgoing.manifest().clone(), files, end: vec![0; 1024] }
    }

    fn at(&mut self, name: &str) -> &mut (tar::Header, Vec<u8>) {
        self.files.iter_mut().find(|(head, _)| *head.path_bytes() == *name.as_bytes()).unwrap()
    }

    /// Puts other bytes into a file, and into the manifest what is true of them.
    fn put(&mut self, name: &str, bytes: &[u8]) {
        let at = self.manifest.files.iter().position(|file| file.name == name).unwrap();
        let file = &mut self.manifest.files[at];
        (file.size, file.digest) = (bytes.len() as u64, Digest::of(bytes));
        let head = head(name, file.size, &self.manifest).unwrap();
        *self.at(name) = (head, bytes.into());
    }

    fn tar(&self) -> Vec<u8> {
        let text = serde_json::to_vec_pretty(&self.manifest).unwrap();
        let mut tar = head(MANIFEST, text.len() as u64, &self.manifest).unwrap().as_bytes().to_vec();
        let mut add = |bytes: &[u8]| {
            tar.extend(bytes);
            tar.resize(tar.len().next_multiple_of(BLOCK), 0);
        };
        add(&text);
        for (head, bytes) in &self.files {
            add(head.as_bytes());
            add(bytes);
        }
        tar.extend(&self.end);
        tar
    }
}

fn entry(name: &str, kind: tar::EntryType, size: u64) -> tar::Header {
    let mut head = tar::Header::new_gnu();
    // What the crate would not write, others will.
    head.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    head.set_entry_type(kind);
    head.set_link_name("/etc/passwd").unwrap();
    head.set_mode(0o4777);
    head.set_size(size);
    head.set_cksum();
    head
}

/// Changes an honest archive.
type Forge = fn(&mut Forged);

#[test]
fn hostile_entries_are_refused_and_leave_nothing() {
    use tar::EntryType as E;
    let cases: &[(&str, Forge)] = &[
        ("`../../evil` stands where kernel must be", |f| f.files[0].0 = entry("../../evil", E::Regular, 8)),
        ("`/etc/cron.d/x` stands where", |f| f.files[0].0 = entry("/etc/cron.d/x", E::Regular, 8)),
        ("kernel is not a plain file", |f| f.files[0].0 = entry("kernel", E::Symlink, 8)),
        ("kernel is not a plain file", |f| f.files[0].0 = entry("kernel", E::Link, 8)),
        ("kernel is not a plain file", |f| f.files[0].0 = entry("kernel", E::Char, 8)),
        ("kernel is not a plain file", |f| f.files[0].0 = entry("kernel", E::Directory, 8)),
        ("`././@LongLink` stands", |f| f.files.insert(0, (entry("././@LongLink", E::GNULongName, 1 << 40), vec![]))),
        ("`pax` stands where", |f| f.files.insert(0, (entry("pax", E::XHeader, 3), b"x=y".to_vec()))),
        ("the head of kernel is not", |f| f.files[0].0 = entry("kernel", E::Regular, 8)),
        ("kernel has 9 bytes in place of 8", |f| f.files[0].0 = entry("kernel", E::Regular, 9)),
        ("kernel has 1099511627776 bytes", |f| f.files[0].0 = entry("kernel", E::Regular, 1 << 40)),
        ("`kernel` stands where machine.state must be", |f| f.files.insert(1, f.files[0].clone())),
        ("`machine.state` stands where kernel must be", |f| f.files.swap(0, 1)),
        ("`machine.state` stands where kernel must be", |f| drop(f.files.remove(0))),
        ("root-2.qcow2 is missing", |f| drop(f.files.pop())),
        ("`extra` follows behind its last file", |f| f.files.push((entry("extra", E::Regular, 1), b"x".to_vec()))),
        ("follows behind its last file", |f| f.end[700] = 1),
        ("something follows behind its end", |f| f.end.push(0)),
        ("it is cut off", |f| f.end.truncate(512)),
        ("kernel is damaged: its digest", |f| f.files[0].1[3] ^= 1),
        ("something hides between its files", |f| f.files[0].1.resize(100, 1)),
    ];
    for (why, forge) in cases {
        let (_dir, store) = store();
        let mut forged = Forged::new();
        forge(&mut forged);
        refused(&store, &pack(&forged.tar()), why);
        assert!(!Path::new("/etc/cron.d/x").exists());
    }
}

#[track_caller]
fn refused(store: &Store, bytes: &[u8], why: &str) {
    match take(store, bytes, Naming::Own) {
        Err(Error::Refused(said)) => assert!(said.contains(why), "{said} ({why})"),
        other => panic!("{other:?} ({why})"),
    }
    nothing_is_left(store);
}

#[test]
fn manifests_that_do_not_fit_an_archive_are_refused() {
    let cases: &[(&str, Forge)] = &[
        ("it needs another snapshot", |f| f.manifest.memory.as_mut().unwrap().parent = Some(Digest::of(b""))),
        ("it needs another snapshot", |f| {
            f.manifest.disks[0].backing = Some(Backing { snapshot: Digest::of(b""), file: "x".into() });
        }),
        ("memory and state are not those of a live", |f| f.manifest.memory = None),
        ("its memory.index has 1048576 bytes, and such a memory needs", |f| f.put("memory.index", &[0; 1 << 20])),
        ("is not sound", |f| f.manifest.kind = Kind::Crash),
        ("is not sound", |f| f.manifest.files[0].name = "../kernel".into()),
        ("is not sound", |f| f.manifest.files[0].name = "machine.state".into()),
        ("has not one kernel", |f| f.manifest.files[0].role = Role::Initrd),
        ("its disks are not of one file each", |f| {
            let more =
                crate::snapshot::File { name: "root-1.qcow2".into(), role: Role::Disk, ..f.manifest.files[0].clone() };
            f.manifest.files.push(more);
        }),
        ("its disks are not of one file each", |f| f.manifest.disks.push(f.manifest.disks[0].clone())),
        ("larger than anything", |f| f.manifest.files.iter_mut().for_each(|file| file.size = u64::MAX)),
        ("the pieces of kernel are larger", |f| {
            f.manifest.files[0].chunks = Some(Chunks { size: 1 << 40, digests: vec![Digest::of(b"")] });
        }),
        ("kernel is damaged", |f| {
            f.manifest.files[0].chunks = Some(Chunks { size: 8, digests: vec![Digest::of(b"")] });
        }),
        ("kernel is damaged", |f| f.manifest.files[0].digest = Digest::of(b"")),
        ("its state is not sound", |f| f.put("machine.state", b"{}")),
        ("memory.index is not sound", |f| f.put("memory.index", b"CATNAPMI")),
        ("its memory is not all of it", |f| f.put("memory.index", &index(&[1, 2], false))),
        ("its memory is not all of it", |f| f.put("memory.index", &index(&[1, 2], true))),
        ("root-2.qcow2 is damaged", |f| f.put("root-2.qcow2", b"QFI\xfb")),
        ("bytes in place of", |f| f.manifest.disks[0].virtual_size += 512),
    ];
    for (why, forge) in cases {
        let (_dir, store) = store();
        let mut forged = Forged::new();
        forge(&mut forged);
        refused(&store, &pack(&forged.tar()), why);
    }
    // A disk that names a file of the host.
    let (_dir, there) = store();
    let mut forged = Forged::new();
    let path = there.root().join("overlay");
    crate::disk::create_overlay(&path, "/etc/shadow", crate::disk::Format::Raw, forged.manifest.disks[0].virtual_size)
        .unwrap();
    forged.put("root-2.qcow2", &fs::read(&path).unwrap());
    fs::remove_file(&path).unwrap();
    refused(&there, &pack(&forged.tar()), "its backing file is `/etc/shadow`");

    let mut forged = Forged::new();
    forged.manifest.name = "../../.bashrc".into();
    assert!(matches!(take(&there, &pack(&forged.tar()), Naming::Own), Err(Error::BadName(_))));
    forged.manifest.format = 2;
    assert!(matches!(take(&there, &pack(&forged.tar()), Naming::Own), Err(Error::Store(store::Error::Manifest(_)))));
    // More than there is room for is not even begun.
    let mut forged = Forged::new();
    forged.manifest.files[0].size = 1 << 60;
    let error = take(&there, &pack(&forged.tar()), Naming::Own).unwrap_err();
    assert!(matches!(error, Error::Store(store::Error::NoRoom { needed, .. }) if needed >= 1 << 60), "{error}");
    nothing_is_left(&there);
}

#[test]
fn what_is_no_archive_is_refused() {
    let (_dir, store) = store();
    let whole = pack(&Forged::new().tar());
    refused(&store, b"", "it is cut off");
    refused(&store, b"PK\x03\x04 or whatever", "it is not an archive of Catnap's");
    refused(&store, &zstd::encode_all(&b"x"[..], 3).unwrap(), "it is not an archive");
    refused(&store, &[&whole[..], b"garbage"].concat(), "something strange follows");
    refused(&store, &[&whole[..], &whole[..]].concat(), "a frame in its middle");
    for cut in (0..whole.len()).step_by(whole.len() / 50) {
        refused(&store, &whole[..cut], "it is cut off");
    }
    // A manifest of nearly any length, and frames of nothing but zeros, which are not even read.
    refused(
        &store,
        &pack(&[entry(MANIFEST, tar::EntryType::Regular, 1 << 40).as_bytes(), &[b' '; 512][..]].concat()),
        "16777216",
    );
    refused(&store, &pack(&vec![0; FRAME * 3]), "it begins with ``");
    refused(&store, &pack(entry("kernel", tar::EntryType::Regular, 1).as_bytes()), "it begins with `kernel`");
}

/// SplitMix64: small, and the same in every run.
fn random(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) as usize
}

#[test]
fn mangled_archives_are_refused_or_still_the_same() {
    let (_dir, origin) = store();
    let kitten = Made::new(Kind::Live, "anna@x").kernel().file("machine.state", STATE).disk(None);
    let kitten = kitten.memory_of(None, &vec![9; PAGE as usize], &index(&[1], true)).publish(&origin);
    let (whole, digest) = export(&origin, &kitten, true);
    let tar = unpack(&whole);
    let (_dir, there) = store();
    let mut seed = 6;
    let mut taken = 0;
    for round in 0..400 {
        // Either the archive or what is in it: the checksums of its frames would catch nearly everything.
        let inside = round % 2 == 1;
        let mut bytes = if inside { tar.clone() } else { whole.clone() };
        // The manifest and the heads are where it hurts most.
        let within = if inside && round % 4 == 1 { 8192.min(bytes.len()) } else { bytes.len() };
        for _ in 0..=random(&mut seed) % 3 {
            let at = random(&mut seed) % within.min(bytes.len());
            match random(&mut seed) % 8 {
                0 => bytes.truncate(at + 1),
                1 => bytes.insert(at, random(&mut seed) as u8),
                2 => drop(bytes.remove(at)),
                3 => {
                    let part: Vec<u8> = bytes[at..].iter().copied().take(random(&mut seed) % 1500).collect();
                    bytes.splice(at..at, part);
                }
                4 => bytes[at] = random(&mut seed) as u8,
                _ => bytes[at] ^= 1 << (random(&mut seed) % 8),
            }
        }
        let archive = if inside { pack(&bytes) } else { bytes };
        match take(&there, &archive, Naming::OwnOrFree) {
            // Unused bits of a frame, or a manifest that says something else and as true.
            Ok(arrived) => {
                taken += 1;
                there.verify(&arrived.snapshot, |_, _| {}).unwrap();
                assert!(inside || arrived.snapshot.digest == digest);
                assert!(contents(&there, &arrived.snapshot) == contents(&origin, &kitten));
                there.remove_snapshot(&arrived.snapshot.digest).unwrap();
            }
            Err(
                Error::Refused(_)
                | Error::BadName(_)
                | Error::Store(store::Error::NoRoom { .. } | store::Error::Manifest(_)),
            ) => {}
            Err(other) => panic!("{other:?}"),
        }
        nothing_is_left(&there);
    }
    assert!(taken < 100, "{taken} were taken");
}
