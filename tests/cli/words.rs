//! What the program understands and how it says no.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use super::house::House;

#[test]
fn help_and_version_are_data_and_mistakes_are_not() {
    let house = House::new();
    let help = house.catnap("--help");
    assert_eq!((help.code, help.err.as_str()), (Some(0), ""));
    for word in ["Machines:", "Inside a machine:", "Snapshots:", "This host:", "catnap run kitten"] {
        assert!(help.out.contains(word), "{word}");
    }
    for verb in ["run", "ps", "exec", "image build", "snapshot", "snapshot tree", "doctor"] {
        let help = house.catnap(&format!("{verb} --help"));
        assert_eq!((help.code, help.err.as_str()), (Some(0), ""), "{verb}");
    }
    assert!(house.catnap("--version").out.starts_with("catnap "));
    for line in ["", "fly", "run", "rm", "stop --time forever anna", "exec anna", "ps anna", "run kitten --memory 1.5G"]
    {
        let said = house.catnap(line);
        assert_eq!((said.code, said.out.as_str()), (Some(2), ""), "{line}");
        assert!(said.err.contains("error: ") || line.is_empty(), "{line}: {said:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_next_step_and_nothing_is_left_behind() {
    let house = House::new();
    for verb in ["inspect", "start", "stop", "rm", "logs", "pause", "resume", "console"] {
        let said = house.catnap(&format!("{verb} nobody"));
        assert_eq!(said.code, Some(3), "{verb}: {said:?}");
        assert!(said.err.contains("there is no machine nobody\ntry: catnap ps"), "{verb}: {said:?}");
    }
    // As in docker, what is not the program's own code is 125.
    house.catnap("exec nobody -- ls").refuses(125, "there is no machine nobody");
    house.catnap("run kitten --cpus 0").refuses(2, "0 vCPUs");
    house.catnap("run kitten --cpus 65").refuses(2, "65 vCPUs");
    house.catnap("run kitten --memory 1M").refuses(2, "1M of memory");
    house.catnap("run kitten --memory 8T").refuses(4, "8T of memory cannot be had: this host has");
    house.catnap("run kitten -p 80:80 -p 80:81").refuses(2, "port 80 of the host is forwarded twice");
    house.catnap("run kitten --kernel /no/such/file").refuses(3, "/no/such/file cannot be read: No such file");
    house.catnap("run kitten --kernel /etc/passwd").refuses(2, "/etc/passwd is not a kernel");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    house.catnap(&format!("run kitten -p {port}:80")).refuses(4, &format!("port {port} of this host is in use"));
    for name in ["../etc", "a/b", "-x", "ä", ""] {
        let said = house.program().args(["run", "kitten", &format!("--name={name}")]).output().unwrap();
        assert_eq!(said.status.code(), Some(2), "{name}");
    }
    assert_eq!(house.catnap("ps -q").out, "");
    for folder in ["machines", "staging", "snapshots"] {
        let left = fs::read_dir(house.store().root().join(folder))
            .unwrap()
            .filter(|entry| !entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
        assert_eq!(left.count(), 0, "{folder}");
    }
}

#[test]
fn empty_lists_are_lists() {
    let house = House::new();
    house.catnap("ps").gives("NAME  STATE  IMAGE  CPUS  MEMORY  PORTS  EPHEMERAL  UPTIME\n");
    house.catnap("ps -q").gives("");
    house.catnap("ps --json").gives("[]\n");
    house.catnap("image ls").gives("NAME  DIGEST  SIZE  AGE\n");
    house.catnap("image ls -q").gives("");
    house.catnap("image ls --json").gives("[]\n");
    house.catnap("image rm nothing").refuses(3, "there is no snapshot nothing");
}

#[test]
fn the_doctor_and_run_agree_about_this_host() {
    let house = House::new();
    let doctor = house.catnap("doctor --json");
    let findings: serde_json::Value = serde_json::from_str(&doctor.out).unwrap();
    let findings = findings.as_array().unwrap();
    let of = |what: &str| findings.iter().find(|finding| finding["what"] == what).unwrap();
    for what in ["kvm", "memory", "disk", "store", "mke2fs"] {
        assert!(of(what)["found"].as_str().is_some_and(|found| !found.is_empty()), "{what}");
    }
    let bad = findings.iter().any(|finding| finding["health"] == "bad");
    assert_eq!(doctor.code, Some(if bad { 5 } else { 0 }));
    assert!(findings.iter().all(|finding| finding["health"] == "good" || finding["hint"].is_string()));

    let quick = house.catnap("doctor --kvm");
    assert_eq!(quick.code, Some(if of("kvm")["health"] == "bad" { 5 } else { 0 }));
    if Path::new("/sys/module/kvm_pvm").exists() {
        assert_eq!(quick.code, Some(5));
        let begun = Instant::now();
        house.catnap("run kitten").refuses(5, "kvm_pvm");
        assert!(begun.elapsed() < Duration::from_secs(2), "it was tried");
    }
}

#[test]
fn completions_know_the_verbs_and_ask_for_machines() {
    let house = House::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = house.catnap(&format!("completion {shell}"));
        assert_eq!(script.code, Some(0));
        for word in ["resume", "--publish", "catnap ps -q", "catnap snapshot ls --all -q"] {
            let word = if shell == "fish" { word.trim_start_matches('-') } else { word };
            assert!(script.out.contains(word), "{shell}: {word}");
        }
        assert!(!script.out.contains("monitor)"), "{shell}");
    }
    // Where there is a bash, it must take the script, and complete names with it.
    let machine = house.machine("anna", b"");
    let folder = Path::new(env!("CARGO_BIN_EXE_catnap")).parent().unwrap();
    for (words, name) in [
        ("start an", machine.spec.name.as_str()),
        ("start --attach an", machine.spec.name.as_str()),
        ("snapshot rm em", "empty"),
        // Behind an option its values.
        ("restore --flavor ti", "tiger"),
    ] {
        let try_it = format!(
            "PATH=$1:$PATH; source <(catnap completion bash); COMP_WORDS=(catnap {words}); \
             COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _catnap_with_machines catnap ${{COMP_WORDS[-1]}} ${{COMP_WORDS[-2]}}; echo $COMPREPLY"
        );
        let output = std::process::Command::new("bash")
            .args(["-c", &try_it, "-", folder.to_str().unwrap()])
            .env("CATNAP_HOME", house.store().root().parent().unwrap())
            .output();
        if let Ok(output) = output {
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), name, "{output:?}");
        }
    }
}

#[test]
fn every_verb_has_a_manual_page() {
    let house = House::new();
    let page = house.catnap("man");
    assert_eq!(page.code, Some(0));
    assert!(page.out.contains(".TH") && page.out.contains("doctor"), "{}", page.out);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    house.catnap(&format!("man {path}")).gives(&format!("{path}\n"));
    for (verb, word) in [("catnap", "restore"), ("catnap-restore", "cold"), ("catnap-snapshot-create", "doorbell")] {
        let page = std::fs::read_to_string(folder.path().join(format!("{verb}.1"))).unwrap();
        assert!(page.contains(".TH") && page.contains(word), "{verb}");
    }
    house.catnap(&format!("man {path}/none")).refuses(3, "there is no folder");
}

#[test]
fn the_lesson_knows_where_it_lives_and_asks_nobody_who_is_not_there() {
    let house = House::new();
    let list = house.catnap("lesson list");
    assert_eq!(list.code, Some(0));
    assert!(list.out.contains("→  prologue/doctor") && list.out.contains("transient/replacement"), "{}", list.out);
    let home = house.store().root().parent().unwrap().join("lesson");
    let check = house.catnap("lesson check");
    assert_eq!(
        (check.code, check.out.as_str()),
        (Some(0), &*format!("home: {}\nlast: -\nnext: prologue/doctor\n", home.display()))
    );
    house.catnap("lesson run").refuses(4, "nobody is there");
    house.catnap("lesson run --auto nowhere").refuses(3, "no step nowhere");
    house.catnap("lesson reset --to backup/7").refuses(3, "no step backup/7");
    assert_eq!(house.catnap("lesson reset").code, Some(0));
    let notes = house.catnap("lesson list --notes");
    assert!(notes.out.contains("goes wrong: ") && notes.out.contains("→ C. "), "{}", notes.out);
}
