//! Whatever makes no sense or cannot be is refused in clear words, with a next step, and leaves nothing behind.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::monitor::{is_gone, monitor_of, signal};
use common::{Machine, PATIENCE, catnap, home, machine, machine_folder, namespace, net, ran, traces_of, within};

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_made() {
    let anna = |options: &[&str]| machine("anna").with(options).try_to_boot().1;
    anna(&["--cpus", "0"]).refuses(2, &["0"]);
    anna(&["--cpus", "65"]).refuses(2, &["65"]);
    anna(&["--memory", "16T"]).refuses(4, &["16T", "this host has"]);
    anna(&["--memory", "1M"]).refuses(2, &["1M"]);
    anna(&["-p", "8080:80", "-p", "8080:81"]).refuses(2, &["8080"]);
    for nonsense in [["--memory", "much"], ["-p", "80"]] {
        anna(&nonsense).exits(2).says(&[nonsense[1]]);
    }
    catnap(&["run", "kitten", "--name", "../anna"]).exits(2).says(&["../anna"]);
    catnap(&["run", "tiger", "--name", "anna"]).refuses(3, &["tiger"]);
    assert_eq!(traces_of("anna"), Vec::<PathBuf>::new());
    for verb in ["start", "stop", "rm", "inspect", "logs", "console", "pause", "resume"] {
        catnap(&[verb, "nobody"]).refuses(3, &["nobody"]);
    }
}

#[test]
fn what_is_no_kernel_is_refused() {
    let folder = tempfile::tempdir_in(home()).expect("a folder");
    let kernel = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("a file");
        path
    };
    let refused = |path: &Path, code| {
        let ran = machine("anna").kernel(path).try_to_boot().1.refuses(code, &["kernel"]);
        assert_eq!(traces_of("anna"), Vec::<PathBuf>::new(), "{ran}");
    };
    let real = fs::read(image_file(&home(), "kernel")).expect("the image's kernel");
    assert!(real.starts_with(b"\x7fELF") || real[0x202..].starts_with(b"HdrS"));
    refused(&folder.path().join("missing"), 3);
    refused(&kernel("empty", b""), 2);
    refused(&kernel("letter", &b"Dear Anna, ".repeat(1000)), 2);
    // These look like kernels at first, and do not have what their headers promise.
    refused(&kernel("truncated", &real[..real.len() / 2]), 2);
    refused(&kernel("beginning", &real[..1000]), 2);
    let mut garbage: Vec<u8> = (0..1 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    garbage[..real.len().min(16)].copy_from_slice(&real[..16]);
    garbage[0x202..0x206].copy_from_slice(b"HdrS");
    refused(&kernel("garbage", &garbage), 2);
}

#[test]
fn a_guest_that_cannot_boot_is_an_error_with_its_last_words() {
    // Without a root and an init, the kernel panics and reboots, and would for ever.
    let (_anna, ran) = machine("anna").with(["--append", "rdinit=/no/such/init root=/dev/none"]).try_to_boot();
    ran.exits(1).says(&["Kernel panic"]);
    assert_eq!(traces_of("anna"), Vec::<PathBuf>::new());
    // A guest that takes too long is given up.
    let (_ben, ran) = machine("ben").with(["--timeout", "1"]).try_to_boot();
    ran.refuses(1, &["ben did not answer within 1 seconds"]);
    assert_eq!(traces_of("ben"), Vec::<PathBuf>::new());
}

/// A home of its own with a copy of the image.
fn another_home() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(home().parent().expect("a folder above")).expect("a folder");
    let copy = ran::run(Command::new("cp").arg("-a").arg(home().join("data")).arg(folder.path()));
    copy.succeeds();
    folder
}

fn image_file(home: &Path, name: &str) -> PathBuf {
    let digest = fs::read_to_string(home.join("data/names/kitten")).expect("the image's name");
    home.join("data/snapshots").join(digest.trim().trim_start_matches("sha256:")).join(name)
}

#[test]
fn an_image_that_was_changed_is_refused() {
    let home = another_home();
    let run = || {
        let run = ["run", "kitten", "--name", "anna"];
        ran::run(ran::command().args(run).env("CATNAP_HOME", home.path()).stdin(Stdio::null()))
    };
    // The largest comes last, as it is read again after each change.
    for file in ["snapshot.json", "root.qcow2", "initrd", "kernel"] {
        let path = image_file(home.path(), file);
        let whole = fs::read(&path).expect("a file of the image");
        let mut changed = whole.clone();
        changed[whole.len() / 2] ^= 1;
        fs::remove_file(&path).and_then(|()| fs::write(&path, &changed)).expect("the file is changed");
        run().refuses(6, &[file]);
        fs::write(&path, &whole[..whole.len() - 1]).expect("the file is cut short");
        run().refuses(6, &[file]);
        // Without its manifest it is no image any more, and would be made anew.
        if file != "snapshot.json" {
            fs::remove_file(&path).expect("the file is removed");
            run().refuses(6, &[file]);
        }
        fs::write(&path, &whole).expect("the file is as it was");
    }
    assert!(!home.path().join("data/machines/anna").exists());
}

#[test]
fn two_machines_do_not_get_in_each_others_way() {
    let anna = machine("anna").publish(80).boot();
    let ben = machine("ben").publish(80).boot();
    each!((anna, ben);
        each_has_its_own, a_name_is_taken, a_port_is_taken, rm_is_careful, a_list_says_who_does_what);
}

type Both = (Machine, Machine);

fn each_has_its_own((anna, ben): &Both) {
    anna.sh("echo anna >/root/whose");
    ben.sh("echo ben >/root/whose");
    assert_eq!((anna.sh("cat /root/whose"), ben.sh("cat /root/whose")), ("anna".into(), "ben".into()));
    let (one, other) = (anna.status(), ben.status());
    for different in ["boot_id", "nonce", "hostname"] {
        assert_ne!(one[different], other[different]);
    }
    assert_ne!(anna.sh("cat /etc/machine-id"), ben.sh("cat /etc/machine-id"));
}

fn a_name_is_taken((anna, _): &Both) {
    catnap(&["run", "kitten", "--name", "anna"]).refuses(4, &["anna"]);
    assert_eq!(anna.sh("cat /root/whose"), "anna");
}

fn a_port_is_taken((anna, _): &Both) {
    let claim = |port: u16| {
        let (_cleo, ran) = machine("cleo").with(["-p".into(), format!("{port}:80")]).try_to_boot();
        assert_eq!(traces_of("cleo"), Vec::<PathBuf>::new());
        ran.refuses(4, &[&port.to_string()])
    };
    claim(anna.port(80)).says(&["the machine anna"]);
    let foreign = net::listen();
    claim(foreign.local_addr().expect("an address").port()).says(&["another program"]);
    // SAFETY: geteuid touches no memory.
    if unsafe { libc::geteuid() } != 0 {
        claim(80).says(&["root"]);
    }
}

fn rm_is_careful((anna, ben): &Both) {
    anna.catnap("rm").refuses(4, &["anna runs"]);
    assert_eq!(anna.catnap("rm --force --dry-run").succeeds().text(), "anna");
    assert_eq!((anna.state().as_str(), ben.state().as_str()), ("running", "running"));
    // Of several, those that can be removed are, and the code tells of the others.
    ben.stop();
    assert_eq!(ben.catnap("rm --dry-run").succeeds().text(), "ben");
    assert_eq!(ben.state(), "stopped");
}

fn a_list_says_who_does_what((anna, _): &Both) {
    let names = |options| catnap(&[options]).succeeds().text().lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(names("ps --quiet"), ["anna", "ben"]);
    assert_eq!(names("ps --quiet --running"), ["anna"]);
    let table = catnap(&["ps"]).succeeds().text();
    let line = table.lines().find(|line| line.starts_with("anna ")).expect("a line");
    for word in ["running", "kitten", "256M", &anna.port(80).to_string()] {
        assert!(line.contains(word), "{table}");
    }
    let all = catnap(&["inspect", "--json", "anna", "ben"]).succeeds().json();
    assert_eq!((&all[0]["name"], &all[1]["name"]), (&"anna".into(), &"ben".into()));
    assert_eq!(all[0]["monitor"]["agent"]["boot_id"], anna.boot_id());
    let pid = anna.pid();
    catnap(&["rm --force", "anna", "ben", "nobody"]).exits(3);
    assert!(is_gone(pid));
    assert_eq!([traces_of("anna"), traces_of("ben")].concat(), Vec::<PathBuf>::new());
}

/// A moment of a boot, and whether it has come.
type Moment<'a> = (&'a str, &'a dyn Fn() -> bool);

#[test]
fn ctrl_c_during_a_boot_leaves_nothing_behind() {
    let log = home().join("state/logs/anna/console.log");
    let moments: [Moment; 4] = [
        ("at once", &|| true),
        ("with its folder made", &|| machine_folder("anna").exists()),
        ("with its monitor started", &|| monitor_of("anna").is_some()),
        ("with the kernel's first words said", &|| fs::metadata(&log).is_ok_and(|log| log.len() > 0)),
    ];
    for (moment, has_come) in moments {
        let mut running = ran::in_background(&["run", "kitten", "--name", "anna"]);
        within(PATIENCE, moment, has_come);
        signal(running.id() as i32, libc::SIGINT);
        let begin = Instant::now();
        let status = running.wait().expect("an end");
        // At the very beginning, the signal itself ends it.
        let code = status.code().or(status.signal().map(|signal| 128 + signal));
        assert_eq!(code, Some(130), "{moment}");
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        assert_eq!(monitor_of("anna"), None, "{moment}");
        assert_eq!(traces_of("anna"), Vec::<PathBuf>::new(), "{moment}");
    }
}

/// As an ordinary user sees it: who may not open it, who has none, and who has something else in its place.
#[test]
fn a_host_without_kvm_is_told_so() {
    let folder = tempfile::tempdir_in(home()).expect("a folder");
    let (closed, other) = (folder.path().join("closed"), folder.path().join("other"));
    fs::write(&closed, "").and_then(|()| fs::write(&other, "")).expect("files");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).expect("a mode");
    let run =
        |device: &Path| namespace::catnap_with_in_place_of("/dev/kvm", device, &["run", "kitten", "--name", "anna"]);
    let Some(ran) = run(&closed) else {
        return println!("skipped: this host gives ordinary users no namespaces");
    };
    ran.refuses(5, &["/dev/kvm", "group `kvm`"]);
    run(&other).expect("a namespace").refuses(5, &["/dev/kvm"]);
    assert_eq!(traces_of("anna"), Vec::<PathBuf>::new());
}
