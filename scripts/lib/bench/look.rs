//! Waiting for something to be seen: on a console, behind a socket, on the guest's site.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Result;
use crate::monitor::Running;

/// What the guest's program says when its site can be asked.
pub const READY: &[u8] = b"catnap: ready";
/// How often is looked. Looking costs the host something, and under emulation not little.
const GLANCE: Duration = Duration::from_micros(500);
/// How long a boot may take; emulated hosts that have other work to do are slow.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Starts a machine without a clock, and waits until its site has answered.
pub fn up(running: &Running) -> Result<()> {
    until(running.started, "ready", || shows(&running.console, READY))?;
    until(running.started, "page", || page(running))?;
    Ok(())
}

/// Looks again and again, and gives the time at which there was something to be seen.
pub fn until<T>(
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

/// Whether `line` is on the console.
pub fn shows(console: &Path, line: &[u8]) -> Option<()> {
    let said = fs::read(console).ok()?;
    said.windows(line.len()).any(|window| window == line).then_some(())
}

/// The answer of the control socket, once it gives one.
pub fn ask(running: &Running) -> Option<String> {
    let mut socket = UnixStream::connect(&running.control).ok()?;
    socket.set_read_timeout(Some(ANSWER)).ok()?;
    get(&mut socket, running.question).ok().filter(|answer| is_ok(answer))
}

/// Whether the guest's site sends its page.
pub fn page(running: &Running) -> Option<()> {
    let mut stream = running.site.connect(ANSWER).ok()?;
    get(&mut stream, "/").ok().filter(|answer| is_ok(answer)).map(drop)
}

/// What the guest says of itself on its site.
pub fn status(running: &Running) -> Option<Value> {
    let mut stream = running.site.connect(ANSWER).ok()?;
    let answer = get(&mut stream, "/api/status").ok().filter(|answer| is_ok(answer))?;
    serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
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
