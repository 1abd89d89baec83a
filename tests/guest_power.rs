//! How machines end, and begin again.

mod common;

use std::time::{Duration, Instant};

use common::monitor::{is_gone, signal};
use common::{Machine, PATIENCE, catnap, inside, machine, within};

/// The console's last word of a guest that turned itself off.
const POWER_DOWN: &str = "reboot: Power down";

#[test]
fn a_machine_stops_in_good_order_and_starts_again() {
    let anna = machine("anna").publish(80).boot();
    each!(anna;
        the_power_button_shuts_it_down, it_starts_as_it_was, a_signal_to_the_monitor_shuts_it_down,
        poweroff_in_the_guest_ends_it, reboot_in_the_guest_boots_it_anew, a_panic_boots_it_anew);
}

fn the_power_button_shuts_it_down(anna: &Machine) {
    anna.sh("echo miau >/root/note");
    let pid = anna.pid();
    anna.stop();
    assert!(is_gone(pid));
    assert_eq!(anna.state(), "stopped");
    assert!(anna.console_log().contains(POWER_DOWN), "{}", anna.console_log());
    anna.disk_is_sound();
    anna.filesystem_is_clean();
    anna.catnap("stop").refuses(4, &["anna does not run"]);
    catnap(&["exec", "anna", "--", "true"]).refuses(125, &["anna does not run"]);
}

fn it_starts_as_it_was(anna: &Machine) {
    anna.start();
    assert_eq!(anna.sh("cat /root/note"), "miau");
    assert!(!anna.sh("dmesg").contains("recovery"), "the journal was left behind");
    assert!(anna.get("/").text().contains("kitten"));
    anna.catnap("start").refuses(4, &["anna runs already"]);
}

fn a_signal_to_the_monitor_shuts_it_down(anna: &Machine) {
    let pid = anna.pid();
    signal(pid, libc::SIGTERM);
    within(PATIENCE, "the monitor has gone", || is_gone(pid));
    assert_eq!(anna.state(), "stopped");
    anna.filesystem_is_clean();
    anna.start();
}

fn poweroff_in_the_guest_ends_it(anna: &Machine) {
    anna.sh("poweroff");
    anna.comes_to_be("stopped");
    assert!(anna.console_log().trim_end().ends_with(POWER_DOWN), "{}", anna.console_log());
    anna.start();
}

fn reboot_in_the_guest_boots_it_anew(anna: &Machine) {
    let (boot, pid) = (anna.boot_id(), anna.pid());
    anna.sh("reboot");
    boots_anew(anna, &boot);
    assert_eq!(anna.pid(), pid, "the monitor is the same");
    assert_eq!(anna.everything()["monitor"]["boots"], 2);
    assert_eq!(anna.status()["boot_id"], anna.boot_id());
}

fn a_panic_boots_it_anew(anna: &Machine) {
    let boot = anna.boot_id();
    // Nobody is there to answer for this one.
    catnap(&["exec", "anna", "--", "sh", "-c", "echo c >/proc/sysrq-trigger"]).exits(125);
    boots_anew(anna, &boot);
    assert!(anna.console_log().contains("sysrq triggered crash"));
}

fn boots_anew(anna: &Machine, old: &str) {
    anna.boots_anew(old);
    assert_eq!(anna.state(), "running");
}

#[test]
fn a_guest_that_hangs_is_stopped_by_force() {
    if inside::here().is_some() {
        hang();
    }
    let anna = machine("anna").boot();
    let _hanging = anna.other_half_begins("a_guest_that_hangs_is_stopped_by_force", "hang", "good night");
    std::thread::sleep(Duration::from_secs(1));
    let begin = Instant::now();
    catnap(&["stop --time=3", "anna"]).succeeds().says(&["anna did not shut down within 3 seconds", "by force"]);
    assert!((3..13).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    assert_eq!(anna.view()["detail"], "by force");
    anna.disk_is_sound();
}

/// In the guest: a loop at the highest real-time priority on the only CPU, so that PID 1 never runs again.
fn hang() -> ! {
    std::fs::write("/proc/sys/kernel/sched_rt_runtime_us", "-1").expect("no share for the others");
    println!("good night");
    std::thread::sleep(Duration::from_millis(500));
    let highest = libc::sched_param { sched_priority: 99 };
    // SAFETY: the pointer is valid for the call.
    assert_eq!(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &highest) }, 0);
    loop {
        std::hint::spin_loop();
    }
}
