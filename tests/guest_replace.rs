//! A machine that takes the place of another: nothing of the other is lost, whatever comes of it.

mod common;

use std::fs::{self, File};
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use common::naps::{Swept, wake};
use common::{catnap, home, machine, net, ran};

/// Counts on the disk, and says each number when it is there to stay.
const COUNTS: &str = "n=0; while :; do n=$((n+1)); echo $n >> /root/counted; sync; echo $n; done";

/// A program that is ended with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last whole line.
fn last(text: &str) -> u64 {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().last().and_then(|line| line.parse().ok()).unwrap_or(0)
}

#[test]
fn what_it_did_until_the_end_is_kept_and_a_failure_puts_it_back() {
    let _swept = Swept;
    let anna = machine("anna").publish(80).boot();
    anna.snapshot("old", &[]);
    let boot = anna.boot_id();

    // What can be known to fail is refused while the machine runs on.
    let taken = std::net::TcpListener::bind(("127.0.0.1", net::free_port())).expect("a port");
    let port = format!("{}:80", taken.local_addr().expect("an address").port());
    catnap(&["restore anna@old --replace -p", &port]).refuses(4, &["in use by another program"]);
    assert_eq!((anna.state().as_str(), anna.boot_id()), ("running", boot));

    // What fails later puts it back, as it was but for its memory.
    anna.sh("echo mine > /root/mine; sync");
    let failed = catnap(&["restore anna@old --replace --no-safety --cold --timeout 1"]);
    failed.refuses(1, &["did not answer within 1 seconds"]).says(&["anna is there again, stopped"]);
    assert_eq!(anna.state(), "stopped");
    anna.start();
    assert_eq!(anna.sh("cat /root/mine"), "mine");

    // It counts until it stands still, and all that it has said to be counted is in the snapshot.
    let said = home().with_file_name("counted");
    let mut counting = ran::command();
    counting.args(["exec", "anna", "--", "sh", "-c", COUNTS]).stdin(Stdio::null());
    let counting = counting.stdout(File::create(&said).expect("a file")).stderr(Stdio::null());
    let counting = Ended(counting.spawn().expect("a program"));
    thread::sleep(Duration::from_secs(2));
    catnap(&["restore anna@old --replace"]).succeeds();
    drop(counting);
    let acknowledged = last(&fs::read_to_string(&said).expect("what was said"));
    fs::remove_file(&said).expect("the file");
    let kept = Swept::listed().into_iter().find(|name| name.starts_with("anna@before-")).expect("a snapshot");
    let (late, _) = wake(&kept, "late", &["--cold"]);
    let found = last(&(late.sh("cat /root/counted") + "\n"));
    println!("    {acknowledged} were acknowledged, {found} found");
    assert!(acknowledged > 0 && found >= acknowledged, "{acknowledged} were acknowledged, {found} found");
    assert_eq!(anna.sh("ls /root/counted /root/mine 2>/dev/null || true"), "");

    // The new monitor has a log of its own, a session of its own, and no folder that it holds.
    let log = catnap(&["logs --monitor anna"]).text();
    assert!(log.contains("anna runs with"), "{log}");
    let pid = anna.everything()["pid"].to_string();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("its monitor");
    // Behind its name: state, parent, group, session (proc(5)).
    let session = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(3));
    assert_eq!(session, Some(pid.as_str()), "{stat}");
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).expect("a folder").to_str(), Some("/"));
}
