//! Registries that die, fall silent, lose things and change them.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use catnap::snapshot::Kind;
use serde_json::Value;

use super::house::{House, said, soon};
use super::server::{Registry, json, nothing_has_come, parts, pull, push};
use super::shots::Shot;

/// Bytes of a kernel: sixteen chunks, of which eight are on their way at a time.
const KERNEL: usize = 64 << 20;
/// When a wire ends: some have arrived, and some have not.
const LIMIT: u64 = KERNEL as u64 / 4 * 3;

/// A snapshot of some size.
fn large(house: &House) {
    Shot::new(&house.store(), Kind::Crash, "anna@monday", 0).with_kernel(KERNEL).filled(3, 7).take();
}

#[test]
fn a_registry_that_dies_in_a_push_or_a_pull_loses_nothing() {
    let (registry, here, there) = (Registry::start(), House::new(), House::new());
    large(&here);
    let wire = registry.dies_after(LIMIT);
    let said = here.catnap(&format!("snapshot push anna@monday localhost:{wire}/cats/anna:monday"));
    assert!(said.code == Some(1) && said.err.contains("\ntry: the same again"), "{said:?}");
    let there_already = registry.blobs();
    assert!((1..16).contains(&there_already), "{there_already}");
    registry.restart();
    there.catnap(&format!("snapshot pull {}", registry.at("monday"))).refuses(3, "is not there");
    let pushed = push(&here, "anna@monday", &registry.at("monday"));
    let (sent, chunks) = (pushed["sent_chunks"].as_u64().unwrap(), pushed["chunks"].as_u64().unwrap());
    // A blob that it had and had not noted yet when it died is sent again.
    assert!(sent < chunks && sent + there_already as u64 >= chunks, "{there_already}: {pushed}");

    let wire = registry.dies_after(LIMIT);
    let said = there.catnap(&format!("snapshot pull localhost:{wire}/cats/anna:monday"));
    assert!(said.code == Some(1) && said.err.contains("\ntry: the same again"), "{said:?}");
    nothing_has_come(&there);
    assert_eq!(parts(&there), 1);
    registry.restart();
    let pulled = pull(&there, &registry.at("monday"));
    let fetched = pulled["fetched_chunks"].as_u64().unwrap();
    assert!(0 < fetched && fetched < pushed["chunks"].as_u64().unwrap(), "{pulled}");
    assert_eq!((there.catnap("snapshot verify").code, parts(&there)), (Some(0), 0));
}

#[test]
fn a_registry_that_comes_back_soon_is_waited_for() {
    let (registry, here) = (Registry::start(), House::new());
    large(&here);
    let wire = registry.dies_after(LIMIT);
    let mut push = here.program();
    push.args(["snapshot", "push", "anna@monday", &format!("localhost:{wire}/cats/anna:monday"), "--json"]);
    let push = push.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    soon(|| std::net::TcpStream::connect(("127.0.0.1", registry.port)).is_err());
    registry.restart();
    let said = said(push.wait_with_output().unwrap());
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(json(&said)["sent_chunks"], json(&said)["chunks"]);
    assert_eq!(super::server::push(&here, "anna@monday", &registry.at("again"))["sent_chunks"], 0);
}

#[test]
fn who_has_had_enough_gets_away_from_a_silent_registry() {
    let (registry, here, there) = (Registry::start(), House::new(), House::new());
    large(&here);
    let interrupt = |house: &House, words: &str, begun: &dyn Fn() -> bool| {
        let mut command = house.program();
        let child = command.args(words.split(' ')).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        soon(begun);
        let asked = Instant::now();
        // SAFETY: the process is our child, which has not been waited for, so that its number is its own.
        unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
        let said = said(child.wait_with_output().unwrap());
        assert!(said.code == Some(130) && said.err.contains("interrupted"), "{said:?}");
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    };
    let wire = registry.silent_after(LIMIT);
    let words = format!("snapshot push anna@monday localhost:{wire}/cats/anna:monday");
    interrupt(&here, &words, &|| registry.blobs() > 0);
    assert_eq!(
        fs::read_dir(here.store().root().join("staging"))
            .unwrap()
            .filter(|entry| { entry.as_ref().unwrap().path().is_dir() })
            .count(),
        0
    );
    push(&here, "anna@monday", &registry.at("monday"));
    let wire = registry.silent_after(LIMIT);
    let words = format!("snapshot pull localhost:{wire}/cats/anna:monday");
    interrupt(&there, &words, &|| parts(&there) > 0);
    nothing_has_come(&there);
    pull(&there, &registry.at("monday"));
    assert_eq!((there.catnap("snapshot verify").code, parts(&there)), (Some(0), 0));
}

#[test]
fn what_came_in_part_is_not_believed() {
    let (registry, here, there) = (Registry::start(), House::new(), House::new());
    large(&here);
    let pushed = push(&here, "anna@monday", &registry.at("monday"));
    let wire = registry.dies_after(LIMIT);
    assert_eq!(there.catnap(&format!("snapshot pull localhost:{wire}/cats/anna:monday")).code, Some(1));
    registry.restart();
    let digest = pushed["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
    let part = there.store().root().join("arriving").join(digest);
    // A file of our own store, linked there, must not be written to; one of another length begins anew.
    let mine = there.store().root().join("mine");
    fs::write(&mine, vec![9; KERNEL]).unwrap();
    fs::remove_file(part.join("kernel")).unwrap();
    fs::hard_link(&mine, part.join("kernel")).unwrap();
    fs::write(part.join("root-1.qcow2"), "short").unwrap();
    fs::create_dir_all(part.join("nothing.of.ours")).ok();
    let said = there.catnap(&format!("snapshot pull {}", registry.at("monday")));
    assert!(said.code == Some(6) && said.err.contains("nothing.of.ours"), "{said:?}");
    nothing_has_come(&there);
    pull(&there, &registry.at("monday"));
    assert!(fs::read(&mine).unwrap() == vec![9; KERNEL]);
    assert_eq!(there.catnap("snapshot verify").code, Some(0));
}

/// The digests of the blobs of an artifact: `snapshot.json`, the list of chunks, and a chunk.
fn blobs(artifact: &Value) -> [String; 3] {
    let text = |value: &Value| value["digest"].as_str().unwrap().to_owned();
    [text(&artifact["config"]), text(&artifact["layers"][0]), text(&artifact["layers"][1])]
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_is_changed_or_lost_in_the_registry_is_refused_by_name() {
    let (registry, here) = (Registry::start(), House::new());
    Shot::new(&here.store(), Kind::Crash, "anna@monday", 0).with_kernel(1 << 20).filled(3, 7).take();
    let pushed = push(&here, "anna@monday", &registry.at("monday"));
    for digest in blobs(&registry.artifact(&pushed)) {
        let (there, path) = (House::new(), registry.blob(&digest));
        let whole = fs::read(&path).unwrap();
        flip(&path);
        let source = registry.at("monday");
        there.catnap(&format!("snapshot pull {source}")).refuses(6, &digest);
        nothing_has_come(&there);
        // Cut short, its length is another than the manifest's.
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let said = there.catnap(&format!("snapshot pull {source}"));
        assert!(matches!(said.code, Some(1 | 6)), "{said:?}");
        // This registry would keep it like that for ever. Whoever pushes it again hears of it.
        let said = here.catnap(&format!("snapshot push anna@monday {source} --yes"));
        assert!(said.code == Some(6) && said.err.contains(&format!("keeps as {digest}")), "{said:?}");
        fs::remove_file(&path).unwrap();
        there.catnap(&format!("snapshot pull {source}")).refuses(6, &format!("its blob {digest} is missing there"));
        nothing_has_come(&there);
        // Pushed again, it is there again, and only that.
        let again = json(&here.catnap(&format!("snapshot push anna@monday {source} --json")));
        assert_eq!(fs::read(&path).unwrap(), whole);
        assert!(again["sent_chunks"].as_u64().unwrap() <= 1, "{again}");
        pull(&there, &source);
    }
    // A registry that loses its power as it notes that it has a blob has an empty note, and cannot tell any more: that
    // one is sent again, and noted.
    let digest = &blobs(&registry.artifact(&pushed))[2];
    fs::write(registry.note(digest), "").unwrap();
    assert_eq!(push(&here, "anna@monday", &registry.at("monday"))["sent_chunks"], 1);
    pull(&House::new(), &registry.at("monday"));
    // The manifest itself.
    let (there, path) = (House::new(), registry.blob(pushed["artifact"].as_str().unwrap()));
    fs::write(&path, "{}").unwrap();
    let said = there.catnap(&format!("snapshot pull {}", registry.at("monday")));
    assert!(matches!(said.code, Some(1 | 3 | 6)), "{said:?}");
    nothing_has_come(&there);
}
