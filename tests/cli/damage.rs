//! A restore refuses what is not as it was, by name, and leaves nothing.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use catnap::snapshot::Kind;

use super::house::House;
use super::shots::Shot;

/// What is done to a file.
type Harm = fn(&Path);

fn flip(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    let middle = file.metadata().unwrap().len() / 2;
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
}

fn cut(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
}

fn remove(path: &Path) {
    fs::remove_file(path).unwrap();
}

/// Another file of the same length is in its place.
fn swap(path: &Path) {
    let length = fs::metadata(path).unwrap().len();
    fs::remove_file(path).unwrap();
    fs::write(path, vec![9; length as usize]).unwrap();
}

#[test]
fn whatever_is_changed_is_refused_by_name_and_leaves_nothing() {
    // kitten ◄ anna@monday ◄ anna@tuesday, which is what is to be restored: a difference to monday's memory.
    let files = [
        ("kitten", "root-1.qcow2"),
        ("monday", "root-1.qcow2"),
        ("monday", "memory"),
        ("monday", "memory.index"),
        ("tuesday", "machine.state"),
        ("tuesday", "memory"),
        ("tuesday", "memory.index"),
        ("tuesday", "snapshot.json"),
    ];
    let harms: [(&str, Harm); 4] = [("flipped", flip), ("cut", cut), ("removed", remove), ("swapped", swap)];
    for (of, name) in files {
        for (how, harm) in harms {
            let house = House::new();
            let store = house.store();
            let kitten = Shot::new(&store, Kind::Clean, "kitten", 0).filled(2, 7).take();
            let monday = Shot::new(&store, Kind::Live, "anna@monday", 60).over(&kitten);
            let monday = monday.memory(&[(0, 1), (1, 1)], None).state().take();
            let tuesday = Shot::new(&store, Kind::Live, "anna@tuesday", 120).same_disk(&monday);
            let tuesday = tuesday.memory(&[(1, 2), (5, 3)], Some(&monday)).state().take();
            let snapshot = [("kitten", &kitten), ("monday", &monday), ("tuesday", &tuesday)]
                .into_iter()
                .find_map(|(name, snapshot)| (name == of).then_some(snapshot));
            let path: PathBuf = snapshot.unwrap().dir.join(name);
            harm(&path);
            // Clones go the same way.
            for words in ["restore anna@tuesday", "restore anna@tuesday --cold --name bella", "clone anna@tuesday kit"]
            {
                let said = house.catnap(words);
                assert_eq!(said.code, Some(6), "{of}'s {name} was {how}: {words}: {said:?}");
                assert!(said.err.contains(name), "{of}'s {name} was {how}: {said:?}");
                assert_eq!(store.machines().unwrap().len(), 0);
                let logs = fs::read_dir(house.path().join("state/logs")).map_or(0, Iterator::count);
                assert_eq!(logs, 0, "the monitor that was begun meanwhile has left something");
            }
        }
    }
}
