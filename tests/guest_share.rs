//! A snapshot that is handed on: it wakes in another house as it was, and is somebody else there.

mod common;

use common::colleague::Colleague;
use common::naps::Swept;
use common::registry::Repository;
use common::{catnap, http, machine, net};

#[test]
fn a_colleague_wakes_it_as_somebody_else() {
    let _swept = Swept;
    let anna = machine("anna").publish(80).boot();
    anna.sh("echo early >/tmp/note; echo on the disk >/root/note; sync");
    anna.snapshot("one", &[]);
    anna.sh("echo late >/tmp/note");
    anna.snapshot("two", &[]);
    let before = anna.status();

    let colleague = Colleague::new();
    let archive = colleague.0.join("anna.catnap");
    let archive = archive.to_str().expect("a plain path");
    catnap(&["snapshot export", "anna@two", archive]).refuses(4, &["Nobody is there to be asked"]);
    let told = catnap(&["snapshot export", "anna@two", archive, "--yes", "--json"]).succeeds();
    // Anna's own key is in the kitten image on purpose.
    let told = told.says(&["private key", "public key", "disk root: /root/.ssh/id_ed25519 at 0x0"]);
    let exported = told.json();
    println!("    {} of {} bytes, {} s", exported["bytes"], exported["content_bytes"], exported["seconds"]);

    let imported = colleague.catnap(&format!("snapshot import --json {archive}")).succeeds().json();
    assert_eq!(imported["digest"], exported["digest"]);
    colleague.catnap("snapshot verify").succeeds();
    let port = net::free_port();
    let told = colleague.catnap(&format!("restore --json anna@two --name bella -p {port}:80")).succeeds().json();
    assert_eq!((&told["resumed"], &told["kind"]), (&true.into(), &"live".into()));
    let status = http::get(port, "/api/status").json();
    for same in ["nonce", "boot_id", "cpus", "memory_bytes"] {
        assert_eq!(status[same], before[same], "{same}");
    }
    assert_eq!(colleague.sh("bella", "cat /tmp/note /root/note"), "late\non the disk");

    // The original runs on, and they are told apart.
    let identity = "cat /etc/machine-id; hostname; cat /proc/sys/kernel/random/uuid";
    let (ours, theirs) = (anna.sh(identity), colleague.sh("bella", identity));
    let differ = ours.lines().zip(theirs.lines()).all(|(ours, theirs)| ours != theirs);
    assert!(differ && theirs.lines().nth(1) == Some("bella"), "{ours}\n{theirs}");
    colleague.catnap("stop bella").succeeds();

    // Without memory it boots, straight from the file.
    let archive = colleague.0.join("disk.catnap");
    let archive = archive.to_str().expect("a plain path");
    catnap(&["snapshot export", "anna@two", archive, "--yes", "--disk-only"]).succeeds();
    let told = colleague.catnap(&format!("restore --json {archive} --name carla")).succeeds();
    let told = told.says(&["was imported as anna@two-2"]).json();
    assert_eq!((&told["resumed"], &told["kind"]), (&false.into(), &"crash".into()));
    assert_eq!(colleague.sh("carla", "cat /root/note; ls /tmp/note 2>/dev/null || true"), "on the disk");
}

#[test]
fn through_a_registry_only_what_changed_travels_and_it_wakes_there() {
    let (_swept, registry) = (Swept, Repository::new());
    let anna = machine("anna").publish(80).boot();
    anna.sh("echo early >/tmp/note; sync");
    anna.snapshot("one", &[]);
    anna.sh("echo late >/tmp/note");
    anna.snapshot("two", &[]);
    let before = anna.status();
    catnap(&["snapshot push", "anna@one", &registry.at("one")]).refuses(4, &["Nobody is there to be asked"]);
    let push = |tag: &str| {
        let told = catnap(&["snapshot push", &format!("anna@{tag}"), &registry.at(tag), "--yes", "--json"]);
        let pushed = told.succeeds().says(&["private key"]).json();
        println!(
            "    {tag}: {} bytes sent of {}, {} s",
            pushed["sent_bytes"], pushed["stored_bytes"], pushed["seconds"]
        );
        pushed
    };
    let (one, two) = (push("one"), push("two"));
    let bytes = |pushed: &serde_json::Value| pushed["sent_bytes"].as_f64().expect("a number");
    assert!(bytes(&two) < bytes(&one) * 0.15, "{one}\n{two}");

    // A colleague wakes it without further ado, and anna runs on.
    let colleague = Colleague::new();
    let port = net::free_port();
    let line = format!("restore --json {} --name bella -p {port}:80", registry.at("two"));
    let told = colleague.catnap(&line).succeeds().says(&["was pulled as anna@two"]).json();
    assert_eq!((&told["resumed"], &told["kind"]), (&true.into(), &"live".into()));
    let status = http::get(port, "/api/status").json();
    for same in ["nonce", "boot_id", "cpus", "memory_bytes"] {
        assert_eq!(status[same], before[same], "{same}");
    }
    assert_eq!(colleague.sh("bella", "cat /tmp/note"), "late");
    let identity = "cat /etc/machine-id; hostname";
    assert_ne!(anna.sh(identity), colleague.sh("bella", identity));
    colleague.catnap("snapshot verify").succeeds();
}
