//! What is refused to a copy before any KVM is asked, and what is told of it.

use catnap::snapshot::{Cpu, Kind};

use super::house::House;
use super::shots::Shot;

/// A live snapshot of a CPU that no host is.
fn strange(house: &House, vendor: Option<&str>) {
    let store = house.store();
    let kitten = Shot::new(&store, Kind::Clean, "kitten", 0).bootable().filled(1, 7).take();
    let here = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let here = here.lines().find_map(|line| line.strip_prefix("vendor_id")).unwrap();
    let here = here.trim_start_matches(['\t', ' ', ':']).to_owned();
    let features = ["sse2", "purring", "napping"].map(str::to_owned).to_vec();
    let cpu = Cpu { vendor: vendor.map_or(here, str::to_owned), features, tsc_khz: 1 };
    let live = Shot::new(&store, Kind::Live, "anna@one", 60).bootable().over(&kitten).memory(&[(0, 1)], None);
    live.with(|manifest| manifest.cpu = Some(cpu)).take();
}

#[test]
fn a_cpu_that_lacks_something_is_refused_before_kvm_is_asked() {
    let house = House::new();
    strange(&house, None);
    for verb in ["restore anna@one", "restore anna@one --name ben --cpus 1", "clone anna@one ben"] {
        house.catnap(verb).refuses(4, "its CPU lacks purring, napping, which the guest was shown");
        assert!(house.catnap(verb).err.contains("catnap restore anna@one --cold"));
    }
    let said = house.catnap("restore anna@one --cold");
    assert!(!said.err.contains("purring"), "{said:?}");
    assert!(house.catnap("snapshot inspect anna@one").out.contains("\"purring\""));
    let house = House::new();
    strange(&house, Some("CatsAndMore"));
    house.catnap("restore anna@one").refuses(4, "was shown a CPU of CatsAndMore");
}

#[test]
fn what_is_left_without_memory_needs_no_cpu() {
    let (here, there) = (House::new(), House::new());
    strange(&here, Some("CatsAndMore"));
    let path = here.store().root().with_file_name("x.catnap");
    let shown = path.display();
    assert_eq!(here.catnap(&format!("snapshot export anna@one {shown} --yes --disk-only")).code, Some(0));
    assert_eq!(there.catnap(&format!("snapshot import {shown}")).code, Some(0));
    assert!(!there.catnap("snapshot inspect anna@one").out.contains("CatsAndMore"));
}

#[test]
fn the_list_of_a_scrub_is_shown_and_mistakes_are_refused() {
    let house = House::new();
    strange(&house, None);
    let list = house.catnap("snapshot scrub --show-list");
    assert!(list.code == Some(0) && list.out.contains("\n/root/.ssh\n"), "{list:?}");
    house.catnap("snapshot scrub anna@one --also etc").refuses(2, "no path below /");
    house.catnap("snapshot scrub anna@one --also-from /no/such/list").refuses(3, "/no/such/list");
    house.catnap("snapshot scrub anna@never").refuses(3, "anna@never");
    house.catnap("snapshot scrub anna@one anna@one").refuses(4, "anna@one");
    let path = house.store().root().with_file_name("x.catnap");
    house.catnap(&format!("snapshot export anna@one {} --also /x", path.display())).refuses(2, "--scrub removes");
    assert!(!path.exists());
}

#[test]
fn who_stands_for_a_snapshot_is_told() {
    let (anna, ben) = (House::new(), House::new());
    let store = anna.store();
    Shot::new(&store, Kind::Crash, "anna@one", 0).bootable().filled(1, 7).take();
    let key = anna.catnap("key new anna");
    assert!(key.code == Some(0) && key.out.starts_with("ed25519:") && key.out.len() == 73, "{key:?}");
    let key = key.out.trim();
    let paths = ["signed", "plain", "other"].map(|name| store.root().with_file_name(format!("{name}.catnap")));
    let [signed, plain, other] = paths.each_ref().map(|path| path.to_str().unwrap());
    let exported = anna.catnap(&format!("snapshot export anna@one {signed} --sign anna --json"));
    assert!(exported.code == Some(0) && exported.out.contains(key), "{exported:?}");
    assert_eq!(anna.catnap(&format!("snapshot export anna@one {plain}")).code, Some(0));
    anna.catnap(&format!("snapshot export anna@one {other} --sign ben")).refuses(3, "there is no key ben");

    // Ben does not know the key yet.
    for path in [signed, plain] {
        ben.catnap(&format!("snapshot import {path} --require-signature")).refuses(4, "the snapshot is refused");
    }
    assert_eq!(ben.store().names().unwrap(), []);
    let said = ben.catnap(&format!("snapshot import {signed}"));
    assert!(
        said.code == Some(0) && said.err.contains(&format!("not known here, so by whoever that is: {key}")),
        "{said:?}"
    );
    assert!(ben.catnap(&format!("snapshot import {plain}")).err.contains("not signed: nobody stands for it"));
    // Now he does, by another name.
    assert_eq!(ben.catnap(&format!("key trust ann {key}")).code, Some(0));
    ben.catnap(&format!("key trust x {key}")).refuses(4, "known as ann");
    ben.catnap("key new ann").refuses(4, "there is a key ann already");
    let said = ben.catnap(&format!("snapshot import {signed} --require-signature --name anna@again"));
    assert!(said.code == Some(0) && said.err.contains("signed by ann\n"), "{said:?}");
    assert!(ben.catnap("key ls").out.contains(key) && ben.catnap("key ls --json").out.contains("\"own\": false"));
    assert!(anna.catnap(&format!("snapshot import {signed} --name anna@x")).err.contains("your own key anna"));
    ben.catnap(&format!("snapshot export anna@one {other} --sign ann")).refuses(4, "somebody else's");

    // A signature for another snapshot, and one whose key was put in place of another's.
    Shot::new(&store, Kind::Crash, "anna@two", 1).bootable().filled(1, 8).take();
    assert_eq!(anna.catnap(&format!("snapshot export anna@two {other}")).code, Some(0));
    let (mine, theirs) = (std::fs::read(signed).unwrap(), std::fs::read(other).unwrap());
    let length = 8 + u32::from_le_bytes(mine[4..8].try_into().unwrap()) as usize;
    std::fs::write(other, [&mine[..length], &theirs[..]].concat()).unwrap();
    ben.catnap(&format!("snapshot import {other}")).refuses(6, "did not sign this snapshot");
    assert!(ben.store().resolve("anna@two").is_err());
    // What skips the signature reads the archive.
    let tar = std::process::Command::new("zstd").args(["-dcq", signed]).output().unwrap();
    assert!(tar.status.success() && tar.stdout.starts_with(b"snapshot.json"), "{tar:?}");
    anna.catnap("key rm anna").refuses(4, "Nobody is there to be asked");
    assert_eq!(anna.catnap("key rm anna --yes").code, Some(0));
    anna.catnap("key rm anna --yes").refuses(3, "there is no key anna");
}

#[test]
fn only_whose_key_it_is_reads_an_encrypted_archive() {
    let (anna, ben) = (House::new(), House::new());
    let store = anna.store();
    Shot::new(&store, Kind::Crash, "anna@one", 0).bootable().with_text("purring in secret").take();
    let folder = store.root().parent().unwrap().to_owned();
    let keys = ["ben", "carla"].map(|name| folder.join(name));
    let public = keys.each_ref().map(|path| {
        let made = std::process::Command::new("age-keygen").arg("-o").arg(path).output().expect("the package age");
        let said = String::from_utf8(made.stderr).unwrap();
        said.trim().rsplit(' ').next().unwrap().to_owned()
    });
    let path = folder.join("x.catnap");
    let shown = path.display();
    assert_eq!(anna.catnap(&format!("snapshot export anna@one {shown} --encrypt-to age1x")).code, Some(2));
    let told = anna.catnap(&format!("snapshot export anna@one {shown} --yes --json --encrypt-to {}", public[0]));
    assert_eq!(told.code, Some(0), "{told:?}");
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes.starts_with(b"age-encryption.org/v1") && told.out.contains(&format!("\"bytes\": {}", bytes.len())));

    for verb in ["snapshot import", "restore"] {
        ben.catnap(&format!("{verb} {shown}")).refuses(4, "the archive is encrypted");
    }
    let said = ben.catnap(&format!("snapshot import {shown} --identity {}", keys[1].display()));
    assert!(said.code == Some(1) && said.err.contains("`age` failed"), "{said:?}");
    assert_eq!(ben.store().names().unwrap(), []);
    let said = ben.catnap(&format!("snapshot import {shown} --identity {}", keys[0].display()));
    assert_eq!((said.code, said.out.as_str()), (Some(0), "anna@one\n"), "{said:?}");
    assert_eq!(ben.catnap("snapshot verify").code, Some(0));
    // Cut off, it is nothing.
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let said = House::new().catnap(&format!("snapshot import {shown} --identity {}", keys[0].display()));
    assert!(said.code == Some(6) || said.code == Some(1), "{said:?}");
}
