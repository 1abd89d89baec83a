//! Copies that are handed on: without secrets when that is wanted, and each a machine of its own.

mod common;

use std::fs;
use std::path::Path;

use common::colleague::Colleague;
use common::naps::{Swept, wake};
use common::{catnap, home, http, machine, net};
use serde_json::Value;

/// Whether any file of the snapshot but what it boots with has these bytes anywhere.
fn has(snapshot: &Value, marker: &str) -> bool {
    has_in(&home(), snapshot, marker)
}

fn has_in(home: &Path, snapshot: &Value, marker: &str) -> bool {
    let digest = snapshot["digest"].as_str().expect("a digest").strip_prefix("sha256:").expect("a digest");
    let folder = home.join("data/snapshots").join(digest);
    let files = fs::read_dir(&folder).expect("a snapshot").map(|entry| entry.expect("an entry").path());
    files.filter(|path| !path.ends_with("kernel") && !path.ends_with("initrd")).any(|path| {
        let bytes = fs::read(path).expect("a file");
        bytes.windows(marker.len()).any(|window| window == marker.as_bytes())
    })
}

fn nothing_is_half_made() {
    let staging = fs::read_dir(home().join("data/staging")).expect("a folder").map(|entry| entry.expect("an entry"));
    let left: Vec<_> = staging.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_is_scrubbed_is_gone_from_every_byte() {
    let _swept = Swept;
    let anna = machine("anna").boot();
    anna.sh("for m in typed also logged kept gone; do yes marker-$m-x | head -c 30000 >/root/$m; done; sync");
    anna.sh(
        "mv /root/typed /root/.ash_history; mkdir -p /var/log/app; mv /root/logged /var/log/app/named-secretly.log",
    );
    anna.sh("rm /root/gone; sync");
    let live = anna.snapshot("one", &[]);
    let before = anna.sh("cat /etc/machine-id");
    let markers = ["marker-typed-x", "marker-also-x", "marker-logged-x", "marker-gone-x", "named-secretly", &before];
    for marker in markers.iter().chain(&["marker-kept-x", "OPENSSH PRIVATE KEY"]) {
        assert!(has(&live, marker) || *marker == "OPENSSH PRIVATE KEY", "{marker} is in the original");
    }

    let told =
        catnap(&["snapshot scrub", "anna@one", "anna@public", "--json", "--also", "/root/also"]).succeeds().json();
    println!("    {} s, {} bytes removed, {} wiped", told["seconds"], told["bytes"], told["wiped"]);
    assert_eq!((&told["kind"], &told["secrets"]), (&"crash".into(), &0.into()), "{told}");
    assert_eq!(told["notes"], serde_json::json!([]));
    for name in ["/root/.ash_history", "/root/also", "/root/.ssh/id_ed25519", "/var/log/app/named-secretly.log"] {
        assert!(told["names"].as_array().expect("names").contains(&name.into()), "{name}: {told}");
    }
    let shown = catnap(&["snapshot inspect", "anna@public"]).succeeds().json();
    assert_eq!(shown[0]["manifest"]["disks"][0].get("backing"), None, "{shown}");
    for marker in markers.iter().chain(&["OPENSSH PRIVATE KEY"]) {
        assert!(!has(&told, marker), "{marker} is still there");
    }
    assert!(has(&told, "marker-kept-x"));

    // The original is as it was, and nothing is left of the machine that scrubbed.
    catnap(&["snapshot verify"]).succeeds();
    assert!(has(&live, "marker-typed-x"));
    nothing_is_half_made();
    assert_eq!(catnap(&["ps -q"]).succeeds().text(), "anna");

    // It boots, as a machine of its own.
    drop(anna);
    let (bella, told) = wake("anna@public", "bella", &[]);
    assert_eq!(told["resumed"], false);
    assert_eq!(bella.sh("cat /root/kept | sha256sum"), bella.sh("yes marker-kept-x | head -c 30000 | sha256sum"));
    assert_eq!(bella.sh("ls -A /root"), "kept");
    assert_eq!(bella.sh("ls /var/log"), "app");
    assert_ne!(bella.sh("cat /etc/machine-id"), before);
    bella.stop();
    bella.filesystem_is_clean();
}

#[test]
fn what_cannot_be_scrubbed_is_told_and_leaves_nothing() {
    let _swept = Swept;
    let anna = machine("anna").boot();
    // Folders in each other, deeper than anybody has them.
    anna.sh("d=/root/stuck; for i in $(seq 200); do d=$d/d; done; mkdir -p $d; sync");
    anna.snapshot("one", &[]);
    let also = ["snapshot scrub", "anna@one", "--also", "/root/stuck"];
    catnap(&also).refuses(1, &["/root/stuck/d/d", "Is a directory"]);
    catnap(&["snapshot scrub", "anna@one", "--also", "root"]).refuses(2, &["no path below /"]);
    catnap(&["snapshot scrub", "anna@one", "--also", "/a/../b"]).refuses(2, &["no path below /"]);
    catnap(&["snapshot scrub", "anna@one", "anna@one"]).refuses(4, &["anna@one"]);
    assert_eq!(Swept::listed().iter().filter(|name| name.starts_with("anna")).count(), 1);
    nothing_is_half_made();
}

/// The colour of the kitten on the page, and its title.
fn looks(port: u16) -> (String, String) {
    let answer = http::get(port, "/");
    let page = answer.text();
    let between = |start: &str, end: &str| {
        let rest = page.split_once(start).expect("a page").1;
        rest.split_once(end).expect("a page").0.to_owned()
    };
    (between("<html lang=\"en\" class=\"", "\""), between("<title>", "</title>"))
}

#[test]
fn a_copy_is_told_from_its_original_awake_and_after_a_boot() {
    let _swept = Swept;
    let who = "cat /etc/machine-id; cat /etc/hostname; hostname; ls /etc/ssh";
    let anna = machine("anna").publish(80).with(["--set", "title=Anna's first & best"]).boot();
    anna.sh(
        "mkdir -p /etc/ssh; touch /etc/ssh/ssh_host_rsa_key /etc/ssh/ssh_host_rsa_key.pub /etc/ssh/sshd_config; sync",
    );
    assert_eq!(looks(anna.port(80)), ("ginger".into(), "Anna&#39;s first &amp; best".into()));
    anna.snapshot("one", &[]);
    let original = anna.sh(who);
    anna.stop();

    // Awake: another name is enough to be somebody else.
    let (bella, _) = wake("anna@one", "bella", &["--set", "colour=grey"]);
    let copy = bella.sh(who);
    assert_ne!(copy.lines().next(), original.lines().next());
    assert_eq!(copy.lines().skip(1).collect::<Vec<_>>(), ["bella", "bella", "sshd_config"], "{copy}");
    assert_eq!(looks(bella.port(80)), ("grey".into(), "Anna&#39;s first &amp; best".into()));
    assert!(bella.status_of("generation") > 0);
    // What it got it keeps.
    bella.stop();
    bella.start();
    assert_eq!(bella.sh(who), copy);
    assert_eq!(looks(bella.port(80)).0, "grey");

    // Booted from its disks.
    let (carla, _) = wake("anna@one", "carla", &["--cold", "--set", "color=Black", "--set", "title=Carla"]);
    let cold = carla.sh(who);
    assert_eq!(cold.lines().skip(1).collect::<Vec<_>>(), ["carla", "carla", "sshd_config"], "{cold}");
    let ids: Vec<_> = [&original, &copy, &cold].iter().map(|said| said.lines().next().expect("an id").len()).collect();
    assert_eq!(ids, [32; 3]);
    assert!(cold.lines().next() != original.lines().next() && cold.lines().next() != copy.lines().next());
    assert_eq!(looks(carla.port(80)), ("black".into(), "Carla".into()));
    drop(carla);

    let (same, _) = wake("anna@one", "same", &["--keep-identity"]);
    assert_eq!(same.sh(who), original);
    catnap(&["restore", "anna@one", "--name", "x", "--set", "colour=pink"]).exits(2).says(&["pink", "ginger, grey"]);
}

#[test]
fn a_colleague_gets_it_with_secrets_or_without() {
    let _swept = Swept;
    let (colleague, colour) = (Colleague::new(), |port| looks(port).0);
    let anna = machine("anna").publish(80).boot();
    anna.sh("echo what-anna-typed >/root/.ash_history; echo for all >/root/note; sync");
    anna.snapshot("one", &[]);
    // The file is so new that the filesystem has it in its journal alone.
    let told = catnap(&["snapshot inspect anna@one --json --secrets --find what-anna-typed"]).succeeds().json();
    for (shown, file) in [("what-anna-typed", "/root/.ash_history"), ("OPENSSH", "/root/.ssh/id_ed25519")] {
        let findings = told[0]["secrets"]["findings"].as_array().expect("findings");
        let named = |finding: &&Value| {
            finding["shown"].as_str().expect("a word").contains(shown) && finding["places"][0]["file"]["path"] == file
        };
        assert!(findings.iter().any(|finding| named(&finding)), "{file} has {shown}: {told}");
    }
    let key = catnap(&["key new", "anna"]).succeeds().text();
    let archive = |name: &str| colleague.0.join(name).to_str().expect("a plain path").to_owned();
    let (full, clean) = (archive("full.catnap"), archive("clean.catnap"));
    catnap(&["snapshot export", "anna@one", &full, "--yes", "--sign", "anna"]).succeeds();
    let exported = catnap(&["snapshot export", "anna@one", &clean, "--scrub", "--sign", "anna", "--json"]).succeeds();
    let exported = exported.json();
    assert_eq!((&exported["name"], &exported["secrets"]), (&"anna@one-scrubbed".into(), &0.into()));

    colleague.catnap(&format!("key trust anna {key}")).succeeds();
    let import = |file: &str| {
        let line = format!("snapshot import {file} --require-signature --json");
        colleague.catnap(&line).succeeds().says(&["signed by anna"]).json()
    };
    let (whole, scrubbed) = (import(&full), import(&clean));
    assert_eq!((&whole["kind"], &scrubbed["kind"]), (&"live".into(), &"crash".into()));
    let secrets = ["what-anna-typed", "OPENSSH PRIVATE KEY", &anna.sh("cat /etc/machine-id")];
    for secret in secrets {
        assert!(has_in(&colleague.0, &whole, secret), "{secret} is in the one with memory");
        assert!(!has_in(&colleague.0, &scrubbed, secret), "{secret} is still there");
    }

    // Bigger, in another colour, beside the original.
    let port = net::free_port();
    let wake = format!("restore --json anna@one --name bella --cpus 2 --memory 512M --set colour=grey -p {port}:80");
    let told = colleague.catnap(&wake).succeeds().json();
    assert_eq!((&told["resumed"], &told["resized"]["reached"]["cpus"]), (&true.into(), &2.into()), "{told}");
    let (ours, theirs) = (anna.status(), http::get(port, "/api/status").json());
    for same in ["nonce", "boot_id"] {
        assert_eq!(ours[same], theirs[same], "{same}");
    }
    for differs in ["hostname", "cpus", "memory_bytes", "generation"] {
        assert_ne!(ours[differs], theirs[differs], "{differs}");
    }
    assert_eq!((colour(anna.port(80)).as_str(), colour(port).as_str()), ("ginger", "grey"));
    let id = "cat /etc/machine-id";
    assert_ne!(anna.sh(id), colleague.sh("bella", id));
    assert_eq!(colleague.sh("bella", "cat /root/.ash_history"), "what-anna-typed");
    colleague.catnap("stop bella").succeeds();
    colleague.catnap("start bella").succeeds();
    assert_eq!((colour(port).as_str(), colleague.sh("bella", "hostname").as_str()), ("grey", "bella"));
    colleague.catnap("stop bella").succeeds();

    // Without secrets it boots.
    let port = net::free_port();
    let boot = format!("restore --json anna@one-scrubbed --name carla --set colour=black -p {port}:80");
    assert_eq!(colleague.catnap(&boot).succeeds().json()["resumed"], false);
    assert_eq!(colleague.sh("carla", "ls -A /root; cat /root/note"), "note\nfor all");
    assert_eq!((colour(port).as_str(), colleague.sh("carla", "hostname").as_str()), ("black", "carla"));
    let ids = [anna.sh(id), colleague.sh("carla", id)];
    assert!(ids[0] != ids[1] && ids[1].len() == 32, "{ids:?}");
    catnap(&["key rm", "anna", "--yes"]).succeeds();
}
