//! One boot under the stopwatch, from the start of the first process to a page of the guest's site.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;
use crate::monitor::{Monitor, Running};
use crate::process;

/// What the guest's program says first.
const FIRST_LINE: &[u8] = b"catnap: init";
/// What it says when its site can be asked.
const READY: &[u8] = b"catnap: ready";
/// How often is looked. Looking costs the host something, and under emulation not little.
const GLANCE: Duration = Duration::from_micros(500);
/// How long a boot may take; emulated hosts that have other work to do are slow.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// What one boot gave.
pub struct Sample {
    /// From process start until the control socket answers.
    pub control: Duration,
    /// Until the guest's first line is on the console.
    pub first_line: Duration,
    /// Until the guest's site has sent its page.
    pub page: Duration,
    /// CPU time that the monitor has used when its control socket answers, vCPUs not counted.
    pub cpu: Duration,
    /// The monitor's own memory when the page has come, in bytes.
    pub memory: u64,
}

/// Boots a guest and takes the times.
pub fn measure(monitor: &dyn Monitor, folder: &Path) -> Result<Sample> {
    let mut running = monitor.start(folder)?;
    let sample = watch(monitor, &mut running).map_err(|error| format!("{error}\n{}", running.said()).into());
    running.end()?;
    sample
}

fn watch(monitor: &dyn Monitor, running: &mut Running) -> Result<Sample> {
    let (begun, console) = (running.started, running.console.clone());
    // Two things are waited for at one time, so that neither look delays the other.
    thread::scope(|scope| {
        let first_line = scope.spawn(|| until(begun, "first line", || shows(&console, FIRST_LINE)));
        let (control, answer) = until(begun, "answer of the control socket", || {
            // A process that has given up is not waited for. `catnap run` goes too, when all is well.
            let gone = running.child.try_wait().ok().flatten().is_some_and(|status| !status.success());
            if gone { Some(Err("it gave up")) } else { ask(running).map(Ok) }
        })?;
        let answer = answer?;
        let pid = monitor.pid(running, &answer)?;
        let cpu = process::cpu_time(pid)?;
        let (first_line, ()) = first_line.join().map_err(|_| "the watcher of the console died")??;
        // Asking a guest that is not up costs the one monitor more than the other, so nobody asks before.
        until(begun, "ready", || shows(&running.console, READY))?;
        let (page, ()) = until(begun, "page", || page(running))?;
        let memory = process::own_memory(pid, monitor.guest_memory())?;
        Ok(Sample { control, first_line, page, cpu, memory })
    })
}

/// Looks again and again, and gives the time at which there was something to be seen.
fn until<T>(
    begun: Instant,
    what: &str,
    mut look: impl FnMut() -> Option<T>,
) -> std::result::Result<(Duration, T), String> {
    loop {
        if let Some(seen) = look() {
            return Ok((begun.elapsed(), seen));
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("no {what} within {PATIENCE:?}"));
        }
        thread::sleep(GLANCE);
    }
}

fn shows(console: &Path, line: &[u8]) -> Option<()> {
    let said = fs::read(console).ok()?;
    said.windows(line.len()).any(|window| window == line).then_some(())
}

/// The answer of the control socket, once it gives one.
fn ask(running: &Running) -> Option<String> {
    let mut socket = UnixStream::connect(&running.control).ok()?;
    socket.set_read_timeout(Some(ANSWER)).ok()?;
    get(&mut socket, running.question).ok().filter(|answer| is_ok(answer))
}

/// Whether the guest's site sends its page.
fn page(running: &Running) -> Option<()> {
    let mut stream = running.site.connect(ANSWER).ok()?;
    get(&mut stream, "/").ok().filter(|answer| is_ok(answer)).map(drop)
}

fn is_ok(answer: &str) -> bool {
    answer.split(' ').nth(1) == Some("200")
}

/// Asks over HTTP, and reads what comes until it is known to be all: the head, and as much as that promises.
fn get(stream: &mut (impl Read + Write), path: &str) -> io::Result<String> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !is_whole(&answer) {
        match stream.read(&mut buffer)? {
            0 => break,
            count => answer.extend(&buffer[..count]),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn is_whole(answer: &[u8]) -> bool {
    let Some(head) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { return false };
    let text = String::from_utf8_lossy(&answer[..head]).to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    length.is_some_and(|length| answer.len() >= head + 4 + length)
}
