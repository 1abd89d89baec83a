//! There and back, and the second time with less.

use std::fs;

use catnap::snapshot::Kind;
use catnap::store::{Snapshot, Store};

use super::house::House;
use super::server::{Registry, json, nothing_has_come, parts, pull, push};
use super::shots::Shot;

/// kitten ◄ anna@monday (live) ◄ anna@tuesday (a page more, a page changed)
fn family(store: &Store) -> [Snapshot; 3] {
    let kitten = Shot::new(store, Kind::Clean, "kitten", 0).with_kernel(5 << 20).noisy(15).take();
    let monday = Shot::new(store, Kind::Live, "anna@monday", 60).with_kernel(5 << 20).over(&kitten);
    let monday = monday.memory(&[(0, 1), (1, 1)], None).take();
    let tuesday = Shot::new(store, Kind::Live, "anna@tuesday", 120).with_kernel(5 << 20).same_disk(&monday);
    let tuesday = tuesday.memory(&[(1, 2), (5, 3)], Some(&monday)).take();
    [kitten, monday, tuesday]
}

#[test]
fn a_snapshot_comes_back_as_it_went() {
    let (registry, here, there) = (Registry::start(), House::new(), House::new());
    let [kitten, ..] = family(&here.store());
    let pushed = push(&here, "anna@tuesday", &registry.at("tuesday"));
    assert_eq!((&pushed["kind"], &pushed["name"]), (&"live".into(), &"anna@tuesday".into()));
    assert_eq!((&pushed["chunks"], &pushed["sent_bytes"]), (&pushed["sent_chunks"], &pushed["stored_bytes"]));
    let pulled = pull(&there, &registry.at("tuesday"));
    for same in ["artifact", "digest", "kind", "name", "chunks", "content_bytes"] {
        assert_eq!(pulled[same], pushed[same], "{same}");
    }
    assert_eq!((&pulled["known"], &pulled["fetched_chunks"]), (&false.into(), &pushed["chunks"]));
    assert_eq!(pulled["fetched_bytes"], pushed["stored_bytes"]);
    there.catnap("snapshot verify").gives("anna@tuesday\n");
    let snapshot = there.store().resolve("anna@tuesday").unwrap();
    assert_eq!(snapshot.manifest.needs().count(), 0);
    assert_eq!(fs::read(snapshot.dir.join("memory")).unwrap(), [vec![1; 4096], vec![2; 4096], vec![3; 4096]].concat());
    assert!(there.store().has_arrived(&snapshot.digest));
    assert_eq!(parts(&there), 0);

    // From there it is the same, whoever sends it, and under a digest as under a tag.
    let again = push(&there, "anna@tuesday", &registry.at("again"));
    assert_eq!((&again["artifact"], &again["sent_chunks"]), (&pushed["artifact"], &0.into()));
    let by_digest = format!("localhost:{}/cats/anna@{}", registry.port, pushed["artifact"].as_str().unwrap());
    let said = there.catnap(&format!("snapshot pull {by_digest} --name guest@day"));
    assert_eq!((said.code, said.out.as_str()), (Some(0), "guest@day\n"), "{said:?}");
    assert!(said.err.contains("it was here already"), "{said:?}");
    // Where it comes from, the name stands for what has a chain below it.
    here.catnap(&format!("snapshot pull {}", registry.at("tuesday"))).refuses(4, "another snapshot anna@tuesday");

    // A base image is the same snapshot there, and a file that is here is linked.
    let pushed = push(&here, "kitten", &registry.at("kitten"));
    let pulled = pull(&there, &registry.at("kitten"));
    assert_eq!(
        (&pulled["digest"], &pushed["digest"]),
        (&kitten.digest.to_string().into(), &kitten.digest.to_string().into())
    );
    let inode = |name: &str| {
        let kernel = there.store().resolve(name).unwrap().dir.join("kernel");
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(kernel).unwrap())
    };
    assert_eq!(inode("kitten"), inode("anna@tuesday"));
    let artifact = registry.artifact(&pushed);
    assert_eq!(artifact["artifactType"], "application/vnd.catnap.snapshot.v1");
    assert_eq!(artifact["config"]["digest"], pushed["digest"]);
    assert_eq!(artifact["annotations"]["org.opencontainers.image.title"], "kitten");
    assert_eq!(artifact["annotations"]["org.opencontainers.image.created"], "2023-11-14T22:13:20Z");
}

#[test]
fn of_the_second_snapshot_only_what_changed_travels() {
    let (registry, here, there) = (Registry::start(), House::new(), House::new());
    let [_, monday, _] = family(&here.store());
    let first = push(&here, "anna@monday", &registry.at("monday"));
    pull(&there, &registry.at("monday"));

    // What would be sent is what is sent.
    let blobs = registry.blobs();
    let said = here.catnap(&format!("snapshot push anna@tuesday {} --dry-run --json", registry.at("tuesday")));
    let (rehearsed, before) = (json(&said), registry.blobs());
    assert_eq!((&rehearsed["dry_run"], before), (&true.into(), blobs));
    there.catnap(&format!("snapshot pull {}", registry.at("tuesday"))).refuses(3, "is not there");

    // The one piece of its memory, and the index of that.
    let second = push(&here, "anna@tuesday", &registry.at("tuesday"));
    assert_eq!((&second["sent_chunks"], &second["sent_bytes"]), (&2.into(), &rehearsed["sent_bytes"]));
    let share = second["sent_bytes"].as_f64().unwrap() / first["sent_bytes"].as_f64().unwrap();
    assert!(share < 0.01, "{share}: {second} {first}");
    assert_eq!(registry.artifact(&second)["annotations"]["vnd.catnap.snapshot.parent"], monday.digest.to_string());
    // Two pieces, and the list and manifests of them: nothing of it is at our colleague's.
    let pulled = pull(&there, &registry.at("tuesday"));
    assert_eq!((&pulled["fetched_chunks"], &pulled["fetched_bytes"]), (&2.into(), &second["sent_bytes"]));
    assert_eq!(there.catnap("snapshot verify").code, Some(0));

    // A disk with one cluster more, in its middle, moves nothing.
    let store = here.store();
    let crash = |name: &'static str, after| Shot::new(&store, Kind::Crash, name, after).with_kernel(5 << 20);
    crash("ben@less", 180).noisy(16).but(8).take();
    crash("ben@more", 240).noisy(16).take();
    let less = push(&here, "ben@less", &registry.at("less"));
    let more = push(&here, "ben@more", &registry.at("more"));
    assert!(less["chunks"].as_u64().unwrap() > 8, "{less}");
    // The piece with that cluster; the table of refcounts, and that of addresses.
    assert!((1..=3).contains(&more["sent_chunks"].as_u64().unwrap()), "{more}");
}

#[test]
fn nobody_is_asked_in_vain_and_memory_can_stay_behind() {
    let (registry, here, there) = (Registry::start(), House::new(), House::new());
    family(&here.store());
    let target = registry.at("x");
    let said = here.catnap(&format!("snapshot push anna@monday {target}"));
    assert_eq!((said.code, said.out.as_str(), registry.blobs()), (Some(4), "", 0), "{said:?}");
    for words in ["anna@monday: live, taken ", "Nobody is there to be asked", "\ntry: --yes"] {
        assert!(said.err.contains(words), "{words}: {said:?}");
    }
    let said = here.catnap(&format!("snapshot push anna@tuesday {target} --disk-only"));
    assert_eq!((said.code, said.out), (Some(0), format!("{target}\n")));
    assert!(said.err.contains("left out  memory and machine state"), "{}", said.err);
    assert_eq!(pull(&there, &target)["kind"], "crash");
    here.catnap(&format!("snapshot push anna@never {target}")).refuses(3, "there is no snapshot anna@never");
    here.catnap("snapshot push anna@monday anna:monday").refuses(2, "`anna:monday` is nothing in a registry");
    here.catnap("snapshot push anna@monday a.b/Anna:x").refuses(2, "its repository");
    here.catnap(&format!("snapshot pull localhost:{}/cats/anna", registry.port)).refuses(2, "it has no tag");
    let digest = here.store().resolve("kitten").unwrap().digest;
    here.catnap(&format!("snapshot push kitten localhost:1/x@{digest}")).refuses(2, "is a digest");
    there.catnap(&format!("snapshot pull {}", registry.at("other"))).refuses(3, "cats/anna:other is not there");
    // The verbs that start machines bring it here first, and say so.
    let empty = House::new();
    let said = empty.catnap(&format!("restore {target} --name bella --cpus 64"));
    assert!(matches!(said.code, Some(4 | 5)) && said.err.contains("was pulled as anna@tuesday"), "{said:?}");
    let said = empty.catnap(&format!("clone {} bella", registry.at("other")));
    assert!(said.code == Some(3) && said.err.contains("is not there"), "{said:?}");
    let other = House::new();
    let said = other.catnap(&format!("restore {} --name bella", registry.at("other")));
    assert_eq!(said.code, Some(3), "{said:?}");
    nothing_has_come(&other);
}

#[test]
fn a_signature_travels_along() {
    let (registry, anna, ben) = (Registry::start(), House::new(), House::new());
    Shot::new(&anna.store(), Kind::Crash, "anna@one", 0).with_kernel(1 << 20).filled(1, 7).take();
    let key = anna.catnap("key new anna");
    let (key, signed, plain) = (key.out.trim(), registry.at("signed"), registry.at("plain"));
    let pushed = anna.catnap(&format!("snapshot push anna@one {signed} --sign anna --yes --json"));
    assert_eq!(json(&pushed)["signed"], key);
    push(&anna, "anna@one", &plain);
    for source in [&signed, &plain] {
        let pull = format!("snapshot pull {source} --require-signature");
        ben.catnap(&pull).refuses(4, "the snapshot is refused");
    }
    nothing_has_come(&ben);
    assert_eq!(ben.catnap(&format!("key trust ann {key}")).code, Some(0));
    let said = ben.catnap(&format!("snapshot pull {signed} --require-signature"));
    assert!(said.code == Some(0) && said.err.contains("signed by ann\n"), "{said:?}");
    let said = ben.catnap(&format!("snapshot pull {plain}"));
    assert!(said.code == Some(0) && said.err.contains("nobody stands for it"), "{said:?}");
}
