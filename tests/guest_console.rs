//! The serial console: for people at a terminal, and in the logs.

mod common;

use std::io::Read;

use common::terminal::Terminal;
use common::{Machine, catnap, in_background, machine, with_input};

/// Ctrl-].
const LEAVE: &str = "\x1d";

#[test]
fn the_console_can_be_joined_and_left() {
    let anna = machine("anna").boot();
    each!(anna;
        a_person_at_the_console_has_a_shell, two_people_see_the_same, what_is_piped_in_is_typed,
        the_log_has_everything, a_followed_log_and_a_joined_console_end_with_the_machine);
}

fn a_person_at_the_console_has_a_shell(anna: &Machine) {
    let mut terminal = Terminal::running(&["console", &anna.name]);
    terminal.shows("catnap: ready");
    terminal.types("\n");
    terminal.shows("# ");
    terminal.types("echo mi''au $((6 * 7)); tty\n");
    terminal.shows("miau 42");
    terminal.shows("/dev/ttyS0");
    assert!(!terminal.is_tidy(), "keys go to the guest as they are");
    terminal.types("sh -c 'echo aslee''p; sleep 1000'\n");
    terminal.shows("asleep");
    // Ctrl-C is the guest's.
    terminal.types("\x03");
    terminal.types("echo awa''ke\n");
    terminal.shows("awake");
    terminal.types(LEAVE);
    terminal.shows("anna runs on");
    assert_eq!(terminal.ends(), 0);
    assert!(terminal.is_tidy());
    assert_eq!(anna.state(), "running");
}

fn two_people_see_the_same(anna: &Machine) {
    let (mut one, mut other) =
        (Terminal::running(&["console", &anna.name]), Terminal::running(&["console", &anna.name]));
    // What was there before is shown to those who come later.
    one.shows("awake");
    other.shows("awake");
    one.types("echo hel''lo\n");
    one.shows("hello");
    other.shows("hello");
    for person in [&mut one, &mut other] {
        person.types(LEAVE);
        assert_eq!(person.ends(), 0);
    }
}

fn what_is_piped_in_is_typed(anna: &Machine) {
    // The end of input is no wish to leave, so the shell turns the machine off.
    let ran = with_input(&["console", &anna.name], b"echo pi''ped\npoweroff\n").succeeds();
    assert!(ran.text().contains("piped"), "{ran}");
    anna.comes_to_be("stopped");
    anna.start();
}

fn the_log_has_everything(anna: &Machine) {
    let log = anna.console_log();
    for words in ["catnap: ready", "miau 42", "hello", "piped", "reboot: Power down"] {
        assert!(log.contains(words), "{words}: {log}");
    }
    assert_eq!(log.matches("catnap: ready").count(), 2, "both boots are in it: {log}");
    let last = catnap(&["logs --tail=1", &anna.name]).succeeds();
    assert_eq!(last.text(), "catnap: ready");
    assert!(catnap(&["logs --monitor", &anna.name]).succeeds().text().contains("anna runs with 1 vCPUs"));
}

fn a_followed_log_and_a_joined_console_end_with_the_machine(anna: &Machine) {
    let mut following = in_background(&["logs", "--follow", &anna.name]);
    let mut terminal = Terminal::running(&["console", &anna.name]);
    terminal.shows("catnap: ready");
    anna.stop();
    terminal.shows("has ended");
    assert_eq!(terminal.ends(), 0);
    assert!(terminal.is_tidy());
    let mut log = String::new();
    following.stdout.take().expect("a pipe").read_to_string(&mut log).expect("a log");
    assert!(following.wait().expect("an end").success());
    assert!(log.trim_end().ends_with("reboot: Power down"), "{log}");
}
