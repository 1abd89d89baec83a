//! `catnap logs`: what the console showed, or what the monitor had to say.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use super::home::House;
use super::{Outcome, ui};
use crate::control::Failure;
use crate::spec::Name;
use crate::store::Machine;

/// How often a followed log is looked at.
const GLANCE: Duration = Duration::from_millis(200);

/// Show what a machine's console has shown
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  catnap logs anna
  catnap logs -f anna            go on until the machine stops, or Ctrl-C
  catnap logs --tail 20 anna
  catnap logs --monitor anna     the monitor's own log")]
pub struct Args {
    /// Go on showing what comes
    #[arg(short, long)]
    follow: bool,
    /// Show only so many of the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<usize>,
    /// The monitor's own log in place of the console's
    #[arg(long)]
    monitor: bool,
    /// The machine
    #[arg(value_name = "MACHINE")]
    name: Name,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let machine = house.machine(&args.name)?;
    let path = if args.monitor { machine.monitor_log()? } else { machine.console_log()? };
    let failed = |error: io::Error| Failure::while_doing(path.display(), error);
    let mut log = Log::open(path.clone()).map_err(failed)?;
    let old = older(&path).map_err(failed)?;
    let now = log.more().map_err(failed)?;
    match args.tail {
        None => {
            ui::data(&old)?;
            ui::data(&now)?;
        }
        Some(lines) => ui::data(last_lines(&[old, now].concat(), lines))?,
    }
    if args.follow {
        follow(&machine, &mut log).map_err(failed)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows what comes, until the machine does not run any more and all is shown.
fn follow(machine: &Machine, log: &mut Log) -> io::Result<()> {
    loop {
        let stopped = !machine.is_running().map_err(io::Error::other)?;
        let more = log.more()?;
        match (more.is_empty(), stopped) {
            (true, true) => return Ok(()),
            (true, false) => thread::sleep(GLANCE),
            (false, _) => ui::data(more).map_err(io::Error::other)?,
        }
    }
}

/// The end of a log file for an error message: its last lines, harmless for a terminal.
pub fn tail(path: &Path, lines: usize) -> String {
    /// More than the last lines of any sane log.
    const ENOUGH: i64 = 16 * 1024;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len().min(ENOUGH as u64) as i64;
        file.seek(SeekFrom::End(-length))?;
        let mut bytes = Vec::new();
        file.take(ENOUGH as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    ui::harmless(last_lines(&read().unwrap_or_default(), lines))
}

/// How long a log file is; 0 when there is none.
pub fn length(path: &Path) -> u64 {
    path.metadata().map_or(0, |data| data.len())
}

fn last_lines(bytes: &[u8], lines: usize) -> &[u8] {
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let Some(before) = lines.checked_sub(1) else { return b"" };
    let newlines = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    newlines.map(|(at, _)| at).nth(before).map_or(bytes, |at| &bytes[at + 1..])
}

/// What was put aside when the log had grown too long, if anything.
fn older(path: &Path) -> io::Result<Vec<u8>> {
    let mut old = path.as_os_str().to_owned();
    old.push(".old");
    match std::fs::read(old) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

/// A log that grows, and is now and then put aside for a new file of the same name.
struct Log {
    path: PathBuf,
    file: Option<File>,
}

impl Log {
    fn open(path: PathBuf) -> io::Result<Log> {
        let file = open_if_there(&path)?;
        Ok(Log { path, file })
    }

    /// What has come since the last call.
    fn more(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Some(file) = &mut self.file {
            file.read_to_end(&mut bytes)?;
        }
        let next = open_if_there(&self.path)?;
        let number = |file: &Option<File>| -> io::Result<_> {
            Ok(file.as_ref().map(File::metadata).transpose()?.map(|m| m.ino()))
        };
        if next.is_some() && number(&next)? != number(&self.file)? {
            // The old file may have grown between the read and the change.
            if let Some(file) = &mut self.file {
                file.read_to_end(&mut bytes)?;
            }
            self.file = next;
            if let Some(file) = &mut self.file {
                file.read_to_end(&mut bytes)?;
            }
        }
        Ok(bytes)
    }
}

fn open_if_there(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_last_lines_are_counted_from_the_end() {
        let text = b"a\nb\nc\n";
        assert_eq!(last_lines(text, 0), b"");
        assert_eq!(last_lines(text, 1), b"c\n");
        assert_eq!(last_lines(text, 2), b"b\nc\n");
        assert_eq!(last_lines(text, 9), text);
        assert_eq!(last_lines(b"a\nno end", 1), b"no end");
        assert_eq!(last_lines(b"", 3), b"");
    }

    #[test]
    fn a_log_is_followed_over_its_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut log = Log::open(path.clone()).unwrap();
        assert_eq!(log.more().unwrap(), b"");
        fs::write(&path, "one\n").unwrap();
        assert_eq!(log.more().unwrap(), b"one\n");
        fs::write(&path, "one\ntwo\n").unwrap();
        fs::rename(&path, folder.path().join("console.log.old")).unwrap();
        fs::write(&path, "three\n").unwrap();
        assert_eq!(log.more().unwrap(), b"two\nthree\n");
        assert_eq!(log.more().unwrap(), b"");
        assert_eq!(older(&path).unwrap(), b"one\ntwo\n");
        assert_eq!(tail(&path, 5), "three\n");
    }
}
