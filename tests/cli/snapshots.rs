//! The verbs that look after snapshots, on snapshots that no machine took.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use catnap::snapshot::Kind;
use catnap::store::{Snapshot, Store};
use serde_json::Value;

use super::house::{House, Said, spec};
use super::shots::Shot;

/// kitten ◄ anna@monday (live) ◄ anna@tuesday (a difference), anna@later (crash); ben runs over anna@monday.
struct Family {
    kitten: Snapshot,
    monday: Snapshot,
    tuesday: Snapshot,
    later: Snapshot,
}

fn family(store: &Store) -> Family {
    let kitten = Shot::new(store, Kind::Clean, "kitten", 0).filled(2, 7).take();
    let monday = Shot::new(store, Kind::Live, "anna@monday", 60).over(&kitten).memory(&[(0, 1), (1, 1)], None);
    let monday = monday.note("before\nthe \u{1b}[31mexam").take();
    let tuesday = Shot::new(store, Kind::Live, "anna@tuesday", 120).same_disk(&monday);
    let tuesday = tuesday.memory(&[(1, 2), (5, 3)], Some(&monday)).take();
    let later = Shot::new(store, Kind::Crash, "anna@later", 180).same_disk(&monday).take();
    Family { kitten, monday, tuesday, later }
}

fn machine(store: &Store, name: &str, from: &Snapshot) {
    store.create_machine(&spec(name), from).unwrap();
}

fn json(said: &Said) -> Value {
    serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

/// Every file of a store with what is in it and when it was changed.
fn photograph(dir: &Path) -> Vec<(String, Vec<u8>, i64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(photograph(&path));
        } else if !path.file_name().unwrap().to_str().unwrap().starts_with('.') {
            let data = fs::metadata(&path).unwrap();
            found.push((path.display().to_string(), fs::read(&path).unwrap(), data.mtime()));
        }
    }
    found.sort();
    found
}

/// Changes a file that should never change.
fn meddle(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
}

#[test]
fn an_empty_store_has_empty_lists() {
    let house = House::new();
    house.catnap("snapshot ls").gives("NAME  KIND  AGE  SIZE  SHARED  CPUS  MEMORY  NOTE\n");
    house.catnap("snapshot ls --json").gives("[]\n");
    house.catnap("snapshot ls -q").gives("");
    house.catnap("snapshot tree").gives("");
    house.catnap("snapshot tree --json").gives("[]\n");
    house.catnap("snapshot verify").gives("");
    house.catnap("snapshot verify --json").gives("[]\n");
    let pruned = house.catnap("snapshot prune");
    assert_eq!((pruned.code, pruned.out.as_str(), pruned.err.as_str()), (Some(0), "", "There is nothing to remove\n"));
    for line in ["rm a@b", "diff a@b c@d", "verify a@b", "tree a@b", "ls nobody", "tree nobody"] {
        house.catnap(&format!("snapshot {line}")).refuses(3, "there is no ");
    }
    house.catnap("snapshot rm ../x").refuses(2, "names no snapshot");
    let inspected = house.catnap("snapshot inspect a@b");
    assert_eq!((inspected.code, inspected.out.as_str()), (Some(3), "[]\n"));
}

#[test]
fn snapshots_are_listed_with_what_they_take() {
    let house = House::new();
    let store = house.store();
    let of = family(&store);
    house.catnap("snapshot ls -q").gives("anna@monday\nanna@tuesday\nanna@later\n");
    house.catnap("snapshot ls -q --all").gives("kitten\nanna@monday\nanna@tuesday\nanna@later\n");
    house.catnap("snapshot ls -q anna").gives("anna@monday\nanna@tuesday\nanna@later\n");
    house.catnap("image ls -q").gives("kitten\n");
    let listed = house.catnap("snapshot ls").out;
    let line = listed.lines().nth(1).unwrap();
    assert!(
        line.starts_with("anna@monday   live   ") && line.ends_with("  2     256M    before the [31mexam"),
        "{line}"
    );

    let views = json(&house.catnap("snapshot ls --json --all"));
    let view = |name: &str| views.as_array().unwrap().iter().find(|view| view["names"][0] == name).unwrap().clone();
    let blocks = |snapshot: &Snapshot, file: &str| snapshot.dir.join(file).metadata().unwrap().blocks() * 512;
    let layer = blocks(&of.monday, "root-1.qcow2");
    assert_eq!(view("anna@later")["shared_bytes"], layer);
    assert_eq!(view("anna@later")["own_bytes"], blocks(&of.later, "snapshot.json"));
    assert_eq!(view("kitten")["shared_bytes"], 0);
    assert_eq!((&view("kitten")["image"], &view("anna@later")["image"]), (&Value::Bool(true), &Value::Bool(false)));
    assert_eq!((&view("anna@monday")["cpus"], &view("anna@monday")["kind"]), (&2.into(), &"live".into()));

    let all = json(&house.catnap("snapshot inspect anna@monday kitten"));
    assert_eq!(all[0]["digest"], of.monday.digest.to_string());
    assert_eq!(all[0]["dependents"][0]["snapshot"]["name"], "anna@tuesday");
    assert_eq!(all[0]["dependents"][0]["snapshot"]["need"], "memory");
    assert_eq!(all[0]["manifest"]["note"], "before\nthe \u{1b}[31mexam");
    assert_eq!(all[1]["dependents"].as_array().unwrap().len(), 3);
}

#[test]
fn the_tree_shows_where_everything_comes_from() {
    let house = House::new();
    let store = house.store();
    let of = family(&store);
    machine(&store, "ben", &of.monday);
    machine(&store, "anna", &of.kitten);
    let whole = house.catnap("snapshot tree");
    assert!(
        whole.out.contains("├── anna@monday  live  ") && whole.out.contains("  before the [31mexam\n"),
        "{whole:?}"
    );
    let names = |said: &Said| {
        let lines = said.out.lines().map(|line| line.trim_start_matches(['│', '├', '└', '─', ' ']));
        lines.map(|line| line.split("  ").next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    // The machine anna was made after the snapshots of its name, which are an earlier one's.
    let expected = ["kitten", "anna@monday", "anna@tuesday", "anna@later", "ben (stopped)", "anna (stopped)"];
    assert_eq!(names(&whole), expected);
    assert!(whole.out.contains("\n│   └── ben (stopped)\n└── anna (stopped)\n"), "{whole:?}");

    assert_eq!(names(&house.catnap("snapshot tree ben")), ["kitten", "anna@monday", "ben (stopped)"]);
    assert_eq!(names(&house.catnap("snapshot tree anna@tuesday")), ["kitten", "anna@monday", "anna@tuesday"]);
    let flat = json(&house.catnap("snapshot tree --json"));
    let depths: Vec<_> = flat.as_array().unwrap().iter().map(|line| line["depth"].as_u64().unwrap()).collect();
    assert_eq!(depths, [0, 1, 2, 2, 2, 1]);
    assert_eq!(flat[4]["machine"]["name"], "ben");

    // A lineage goes on over a snapshot that was removed.
    house.catnap("snapshot rm anna@tuesday").gives("anna@tuesday\n");
    let orphan = Shot::new(&store, Kind::Crash, "carl@x", 200).filled(1, 1);
    orphan.with(|manifest| manifest.parent = Some(of.tuesday.digest)).take();
    let tree = house.catnap("snapshot tree carl").out;
    assert!(tree.starts_with(&format!("{} (not here)\n└── carl@x  crash  ", of.tuesday.digest.short())), "{tree}");
}

#[test]
fn whoever_does_what_a_refusal_says_gets_there() {
    let house = House::new();
    let store = house.store();
    let of = family(&store);
    machine(&store, "ben", &of.later);
    // One has two names, and would stay as the other.
    store.set_name("anna@again", &of.later.digest).unwrap();
    let refused = house.catnap("image rm kitten");
    let (_, hint) = refused.err.split_once("\ntry: ").expect("a next step");
    let commands = hint.trim_end().trim_end_matches(" first").split(" and ");
    for command in commands {
        assert_eq!(house.catnap(command.strip_prefix("catnap ").expect("a command")).code, Some(0), "{refused:?}");
    }
    house.catnap("image rm kitten").gives("kitten\n");
}

#[test]
fn what_is_needed_stays_and_goes_with_what_needs_it() {
    let house = House::new();
    let store = house.store();
    let of = family(&store);
    machine(&store, "ben", &of.later);
    let refused = house.catnap("snapshot rm anna@monday");
    refused.refuses(4, "the memory of anna@tuesday is a difference to that of anna@monday");
    assert!(refused.err.contains("\ntry: catnap snapshot rm anna@tuesday first"), "{refused:?}");
    let refused = house.catnap("snapshot rm anna@later");
    refused.refuses(4, "the machine ben is made from anna@later");
    assert!(refused.err.contains("\ntry: catnap rm ben first"), "{refused:?}");
    house.catnap("image rm kitten").refuses(4, "a disk of anna@");
    house.catnap("snapshot rm --dry-run anna@monday").refuses(4, "a difference to that of anna@monday");

    let before = photograph(store.root());
    house.catnap("snapshot rm --dry-run anna@monday anna@tuesday").gives("anna@tuesday\nanna@monday\n");
    assert!(photograph(store.root()) == before);
    // One that stays does not keep the others.
    let said = house.catnap("snapshot rm anna@monday anna@later nobody@x anna@tuesday");
    assert_eq!((said.code, said.out.as_str()), (Some(3), "anna@tuesday\nanna@monday\n"), "{said:?}");
    assert!(!of.monday.dir.exists() && !of.tuesday.dir.exists() && of.later.dir.exists());
    house.catnap("rm ben").gives("ben\n");
    house.catnap("snapshot rm kitten anna@later").gives("anna@later\nkitten\n");
    for folder in ["snapshots", "names", "verified", "staging"] {
        let left = fs::read_dir(store.root().join(folder)).unwrap();
        let left: Vec<_> =
            left.map(|entry| entry.unwrap().file_name()).filter(|name| name != ".lock" && name != ".guard").collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
}

#[test]
fn what_is_needed_goes_when_others_take_it_over() {
    let house = House::new();
    let store = house.store();
    let of = family(&store);
    machine(&store, "ben", &of.tuesday);
    house.catnap("snapshot rm --merge anna@monday").refuses(4, "the machine ben is made from anna@tuesday");
    house.catnap("rm ben").gives("ben\n");
    house.catnap("snapshot rm --merge --dry-run anna@monday").gives("anna@monday\n");
    assert!(of.monday.dir.exists());
    let said = house.catnap("snapshot rm --merge anna@monday");
    assert_eq!((said.code, said.out.as_str()), (Some(0), "anna@monday\n"), "{said:?}");
    assert!(said.err.contains("with the same content: anna@tuesday"), "{said:?}");
    assert!(!of.monday.dir.exists() && !of.tuesday.dir.exists());
    assert_eq!(house.catnap("snapshot verify").code, Some(0));
    let tuesday = store.resolve("anna@tuesday").unwrap();
    assert_eq!(fs::read(tuesday.dir.join("memory")).unwrap(), [vec![1; 4096], vec![2; 4096], vec![3; 4096]].concat());
    assert_eq!(tuesday.manifest.memory.unwrap().parent, None);
    // Several at once, of which some are made anew on the way.
    let said = house.catnap("snapshot rm --merge kitten anna@tuesday");
    assert_eq!(said.code, Some(0), "{said:?}");
    house.catnap("snapshot ls -q --all").gives("anna@later\n");
    assert_eq!(house.catnap("snapshot verify").code, Some(0));
}

#[test]
fn a_snapshot_stays_until_its_last_name_goes() {
    let house = House::new();
    let store = house.store();
    let of = family(&store);
    store.set_name("anna@exam", &of.later.digest).unwrap();
    let said = house.catnap("snapshot rm anna@later");
    assert_eq!((said.code, said.out.as_str()), (Some(0), "anna@later\n"));
    assert!(said.err.contains("the snapshot stays as anna@exam"), "{said:?}");
    assert!(of.later.dir.exists());
    house.catnap(&format!("snapshot rm {}", &of.later.digest.to_string()[..20])).refuses_not();
    assert!(!of.later.dir.exists());
    store.set_name("anna@again", &of.tuesday.digest).unwrap();
    house.catnap("snapshot rm anna@again anna@tuesday").gives("anna@again\nanna@tuesday\n");
    assert!(!of.tuesday.dir.exists());
}

#[test]
fn any_damage_is_found_and_named() {
    let house = House::new();
    let store = house.store();
    let of = family(&store);
    house.catnap("snapshot verify anna@tuesday").gives("anna@tuesday\nanna@monday\nkitten\n");
    assert_eq!(house.catnap("snapshot verify").out.lines().count(), 4);

    let memory = of.monday.dir.join("memory");
    let whole = fs::read(&memory).unwrap();
    let swapped = fs::read(of.tuesday.dir.join("memory")).unwrap();
    for (what, change) in [
        ("its digest is", Box::new(|bytes: &mut Vec<u8>| bytes[4100] ^= 0x10) as Box<dyn FnOnce(&mut Vec<u8>)>),
        ("bytes in place of", Box::new(|bytes: &mut Vec<u8>| bytes.truncate(5000))),
        ("its digest is", Box::new(move |bytes: &mut Vec<u8>| *bytes = swapped)),
    ] {
        meddle(&memory, change);
        let said = house.catnap("snapshot verify");
        assert_eq!((said.code, said.out.lines().count()), (Some(6), 3), "{said:?}");
        assert!(said.err.contains(memory.to_str().unwrap()) && said.err.contains(what), "{said:?}");
        // What needs it is damaged with it.
        house.catnap("snapshot verify anna@tuesday --json").tells(6, "damage", &memory);
        meddle(&memory, |bytes| *bytes = whole.clone());
        assert_eq!(house.catnap("snapshot verify").code, Some(0));
    }
    fs::write(of.later.dir.join("stray"), "").unwrap();
    house.catnap("snapshot verify anna@later --json").tells(6, "damage", &of.later.dir.join("stray"));
    fs::remove_file(of.later.dir.join("stray")).unwrap();
    fs::remove_file(&memory).unwrap();
    house.catnap("snapshot verify --json").tells(6, "it is missing", &memory);
    let manifest = of.later.dir.join("snapshot.json");
    meddle(&manifest, |bytes| bytes[20] ^= 1);
    house.catnap("snapshot verify anna@later").finds(6, manifest.to_str().unwrap());
    fs::remove_file(&manifest).unwrap();
    house.catnap("snapshot verify anna@later").finds(6, manifest.to_str().unwrap());
    assert!(house.catnap("snapshot ls").out.contains("anna@later    damaged  -"));
    house.catnap("snapshot rm anna@later").gives("anna@later\n");
    fs::remove_dir_all(&of.tuesday.dir).unwrap();
    house.catnap("snapshot verify").finds(6, "anna@tuesday stands for");
    fs::remove_dir_all(&of.kitten.dir).unwrap();
    house.catnap("snapshot verify anna@monday").finds(6, "memory");
}

#[test]
fn pruning_tells_first_and_never_takes_what_is_needed() {
    let house = House::new();
    let store = house.store();
    let of = family(&store);
    machine(&store, "ben", &of.monday);
    let dead = store.root().join("staging/1-2-3");
    fs::create_dir_all(&dead).unwrap();
    fs::write(dead.join("half"), [1; 10_000]).unwrap();
    let before = photograph(store.root());
    for line in ["--dry-run", "--dry-run --older-than 1d", "--dry-run --images", "--dry-run --machine anna"] {
        let said = house.catnap(&format!("snapshot prune {line}"));
        assert_eq!((said.code, said.out.as_str()), (Some(0), "anna@later\nanna@tuesday\n"), "{line}: {said:?}");
        assert!(said.err.starts_with("It would remove 2 snapshots and 1 half-made things, "), "{said:?}");
    }
    let said = house.catnap("snapshot prune --dry-run --keep 1");
    assert_eq!(said.out, "anna@tuesday\n");
    for line in ["--dry-run --keep 3", "--dry-run --older-than 9999w"] {
        let said = house.catnap(&format!("snapshot prune {line}"));
        assert_eq!(said.out, "", "{said:?}");
    }
    let told = json(&house.catnap("snapshot prune --dry-run --json"));
    assert_eq!(
        (&told["snapshots"], &told["half_made"]),
        (&serde_json::json!(["anna@later", "anna@tuesday"]), &1.into())
    );
    assert!(told["bytes"].as_u64().is_some_and(|bytes| bytes > 10_000) && told["dry_run"] == true, "{told}");
    // Nobody is there to be asked.
    house.catnap("snapshot prune").finds(4, "Nobody is there");
    assert!(photograph(store.root()) == before);

    let said = house.catnap("snapshot prune --yes");
    assert_eq!((said.code, said.out.as_str()), (Some(0), "anna@later\nanna@tuesday\n"), "{said:?}");
    assert!(said.err.starts_with("Removed 2 snapshots and 1 half-made things, "), "{said:?}");
    assert!(!dead.exists() && of.monday.dir.exists());
    house.catnap("rm ben").gives("ben\n");
    let told = json(&house.catnap("snapshot prune --yes --images --json"));
    assert_eq!(told["snapshots"], serde_json::json!(["anna@monday", "kitten"]));
    let nothing = serde_json::json!({"snapshots": [], "half_made": 0, "bytes": 0, "dry_run": false});
    assert_eq!(json(&house.catnap("snapshot prune --json")), nothing);
    assert!(!of.monday.dir.exists() && !of.kitten.dir.exists());
}

#[test]
fn what_changed_is_told_in_pages_and_clusters() {
    let house = House::new();
    let store = house.store();
    let of = family(&store);
    let other = Shot::new(&store, Kind::Clean, "other@x", 3600).filled(3, 7).with(|manifest| {
        manifest.machine.as_mut().unwrap().cpus = 4;
    });
    let other = other.take();
    let difference = json(&house.catnap("snapshot diff anna@monday anna@tuesday --json"));
    // Page 1 has another byte, page 5 is new.
    assert_eq!(difference["memory"], serde_json::json!({"in": "both", "changed_pages": 2, "changed_bytes": 8192}));
    assert_eq!(difference["seconds"], 60);
    assert_eq!(difference["disks"][0]["changed_clusters"], 0);
    assert_eq!(difference["disks"][0]["written_clusters"], 0);
    let text = house.catnap("snapshot diff anna@monday anna@tuesday").out;
    assert!(text.starts_with("anna@monday → anna@tuesday\n") && text.contains("2 pages differ, 8K\n"), "{text}");

    let difference = json(&house.catnap("snapshot diff anna@later other@x --json"));
    assert_eq!(difference["memory"]["in"], "neither");
    assert_eq!(difference["disks"][0]["changed_clusters"], 1, "two are the same");
    assert_eq!(difference["disks"][0]["written_clusters"], 3);
    let text = house.catnap(&format!("snapshot diff other@x {}", of.monday.digest)).out;
    assert!(text.contains("4 → 2\n") && text.contains("59m0s earlier\n"), "{text}");
    assert!(text.contains("memory in the second alone\n") && text.contains("1 clusters differ, 64K, of 3"), "{text}");

    let same = house.catnap("snapshot diff anna@tuesday anna@tuesday").out;
    assert!(same.matches("the same\n").count() == 2, "{same}");
    fs::remove_file(of.monday.dir.join("memory")).unwrap();
    house.catnap("snapshot diff anna@monday anna@tuesday").refuses(6, "memory");
    meddle(&other.dir.join("root-1.qcow2"), |bytes| bytes[0] = 0);
    assert_ne!(house.catnap("snapshot diff anna@later other@x").code, Some(0));
}

impl Said {
    /// Checks that it went well, whatever it said.
    #[track_caller]
    fn refuses_not(&self) {
        assert_eq!(self.code, Some(0), "{self:?}");
    }

    /// Checks that it found something wrong, and that there is a next step; there may be data as well.
    #[track_caller]
    fn finds(&self, code: i32, words: &str) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.err.contains(words) && self.err.contains("\ntry: "), "{self:?}");
    }

    /// Checks that its JSON tells of it too.
    #[track_caller]
    fn tells(&self, code: i32, words: &str, path: &Path) {
        self.finds(code, path.to_str().unwrap());
        assert!(self.out.contains(words) && self.out.contains(path.to_str().unwrap()), "{self:?}");
    }
}
