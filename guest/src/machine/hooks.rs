//! Hooks: executables in a folder, run one after another in the order of their names.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::children::Process;
use crate::poll::{Poll, READ};

/// The time that all wake hooks have together.
pub(super) const WAKE_TIME: Duration = Duration::from_secs(10);
/// The time that all quiesce hooks have together, each way.
pub(super) const QUIESCE_TIME: Duration = Duration::from_secs(10);

/// Whether there may be hooks in `folder`.
pub(super) fn are_in(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// Runs all hooks in `folder` with `argument`. One that is not done when `time` is up is killed. A folder
/// that does not exist has no hooks. Every hook is run, even when one has failed; the first failure is returned.
pub(super) fn run(folder: &Path, argument: &str, time: Duration) -> Result<(), String> {
    let end = Instant::now() + time;
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let executable = |path: &std::path::PathBuf| {
        path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let mut result = Ok(());
    for path in paths.into_iter().filter(executable) {
        let done = run_one(&path, argument, end).map_err(|why| format!("{}: {why}", path.display()));
        result = result.and(done);
    }
    result
}

fn run_one(path: &Path, argument: &str, end: Instant) -> Result<(), String> {
    let mut command = Command::new(path);
    finish(command.arg(argument), end)
}

/// Runs a program to its end, which must be a good one and come before `end`.
pub(super) fn finish(command: &mut Command, end: Instant) -> Result<(), String> {
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = Process::start(command, false).map_err(|error| error.to_string())?;
    match ends_before(&process, end) {
        Ok(true) => match process.wait() {
            Ok(0) => Ok(()),
            Ok(code) => Err(format!("ended with code {code}")),
            Err(error) => Err(error.to_string()),
        },
        // Dropping the process kills it.
        Ok(false) => Err("took too long".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether the process has ended before `end`.
fn ends_before(process: &Process, end: Instant) -> io::Result<bool> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut poll = Poll::default();
        let at = poll.add(process, READ);
        poll.wait(Some(left))?;
        if poll.found(at) != 0 || left.is_zero() {
            return Ok(poll.found(at) != 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn hook(folder: &Path, name: &str, mode: u32, script: &str) {
        fs::write(folder.join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn hooks_run_in_order_and_slow_or_failing_ones_are_named() {
        let folder = std::env::temp_dir().join(format!("catnap-hooks-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let log = folder.join("log");
        hook(&folder, "10-first", 0o755, &format!("echo first $1 >> {}", log.display()));
        hook(&folder, "20-second", 0o755, &format!("echo second $1 >> {}", log.display()));
        hook(&folder, "30-not-executable", 0o644, &format!("echo third >> {}", log.display()));
        assert_eq!(run(&folder, "freeze", QUIESCE_TIME), Ok(()));
        assert_eq!(fs::read_to_string(&log).unwrap(), "first freeze\nsecond freeze\n");

        hook(&folder, "05-bad", 0o755, "exit 3");
        assert!(run(&folder, "thaw", QUIESCE_TIME).unwrap_err().contains("05-bad: ended with code 3"));
        hook(&folder, "05-bad", 0o755, "sleep 100");
        let start = Instant::now();
        assert!(run(&folder, "thaw", Duration::from_millis(200)).unwrap_err().contains("took too long"));
        assert!(start.elapsed() < Duration::from_secs(50));
        assert_eq!(run(&folder.join("missing"), "x", QUIESCE_TIME), Ok(()));
        fs::remove_dir_all(&folder).unwrap();
    }
}
