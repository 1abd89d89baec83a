//! `catnap exec`: programs in the guest as if they were here.

mod common;

use std::process::Child;
use std::thread;
use std::time::Duration;

use common::monitor::signal;
use common::terminal::Terminal;
use common::{Machine, PATIENCE, Ran, catnap, in_background, machine, with_input, within};

#[test]
fn programs_run_in_the_guest_as_if_they_were_here() {
    let anna = machine("anna").cpus(2).boot();
    each!(anna;
        streams_stay_apart, codes_are_the_programs_own, input_has_an_end, folder_and_variables_are_set,
        ten_megabytes_pass_both_ways, twenty_run_at_once, signals_reach_the_program,
        a_program_ends_with_its_client, a_terminal_is_a_terminal);
}

fn exec(anna: &Machine, command: &[&str]) -> Ran {
    catnap(&[&["exec", &anna.name, "--"], command].concat())
}

fn streams_stay_apart(anna: &Machine) {
    let ran = exec(anna, &["sh", "-c", "echo out; echo err >&2; printf end"]).succeeds();
    assert_eq!((ran.out.as_slice(), ran.err.as_str()), (b"out\nend".as_slice(), "err\n"));
}

fn codes_are_the_programs_own(anna: &Machine) {
    exec(anna, &["true"]).exits(0);
    exec(anna, &["sh", "-c", "exit 3"]).exits(3);
    exec(anna, &["/etc/motd"]).exits(126).says(&["/etc/motd"]);
    exec(anna, &["no-such-cat"]).exits(127).says(&["no-such-cat"]);
    exec(anna, &["sh", "-c", "kill -9 $$"]).exits(128 + libc::SIGKILL);
    exec(anna, &["sh", "-c", "kill -TERM $$"]).exits(128 + libc::SIGTERM);
    catnap(&["exec", "nobody", "--", "true"]).refuses(125, &["nobody"]);
}

fn input_has_an_end(anna: &Machine) {
    let ran = with_input(&["exec", &anna.name, "--", "sh", "-c", "wc -c; cat"], b"miau").succeeds();
    assert_eq!(ran.text(), "4");
    // A program that does not care for its input is not held up by it.
    with_input(&["exec", &anna.name, "--", "true"], &vec![b'x'; 1 << 20]).succeeds();
}

fn folder_and_variables_are_set(anna: &Machine) {
    let line = ["exec", "-w", "/var/lib", "-e", "CAT=Anna's", &anna.name, "--", "sh", "-c", "pwd; echo \"$CAT\""];
    assert_eq!(catnap(&line).succeeds().text(), "/var/lib\nAnna's");
    catnap(&["exec", "-w", "/no/such/folder", &anna.name, "--", "pwd"]).exits(126).says(&["/no/such/folder"]);
}

fn ten_megabytes_pass_both_ways(anna: &Machine) {
    let bytes: Vec<u8> = (0..10u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let there_and_back = with_input(&["exec", &anna.name, "--", "cat"], &bytes).succeeds();
    assert!(there_and_back.out == bytes, "{} of {} bytes came back", there_and_back.out.len(), bytes.len());
}

fn twenty_run_at_once(anna: &Machine) {
    thread::scope(|scope| {
        let run = |number: usize| move || anna.sh(&format!("sleep 0.2; echo {number}"));
        let all: Vec<_> = (0..20).map(|number| scope.spawn(run(number))).collect();
        for (number, one) in all.into_iter().enumerate() {
            assert_eq!(one.join().expect("a program"), number.to_string());
        }
    });
}

/// A program in the guest that only a signal ends.
fn sleeper(anna: &Machine, seconds: &str) -> Child {
    let child = in_background(&["exec", &anna.name, "--", "sleep", seconds]);
    within(PATIENCE, "the program runs", || sleeps(anna, seconds));
    child
}

fn sleeps(anna: &Machine, seconds: &str) -> bool {
    anna.sh("ps -o args").lines().any(|line| line == format!("sleep {seconds}"))
}

fn signals_reach_the_program(anna: &Machine) {
    let mut child = sleeper(anna, "1001");
    signal(child.id() as i32, libc::SIGTERM);
    assert_eq!(child.wait().expect("an end").code(), Some(128 + libc::SIGTERM));
    assert!(!sleeps(anna, "1001"));
}

fn a_program_ends_with_its_client(anna: &Machine) {
    let mut child = sleeper(anna, "1002");
    child.kill().expect("a child");
    child.wait().expect("an end");
    within(Duration::from_secs(10), "the program has ended", || !sleeps(anna, "1002"));
}

fn a_terminal_is_a_terminal(anna: &Machine) {
    let mut terminal = Terminal::running(&["exec", "-t", &anna.name, "--", "sh"]);
    terminal.types("tty; stty size; echo mi''au\n");
    terminal.shows("/dev/pts/");
    terminal.shows("30 100");
    terminal.shows("miau");
    terminal.types("sh -c 'echo aslee''p; sleep 1000'\n");
    terminal.shows("asleep");
    terminal.types("\x03echo awa''ke\nexit 7\n");
    terminal.shows("awake");
    assert_eq!(terminal.ends(), 7);
    assert!(terminal.is_tidy());
}
