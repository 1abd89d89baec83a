//! Requests to a monitor that speaks HTTP on a Unix socket, one connection each.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a monitor may take to open its socket.
const OPENING: Duration = Duration::from_secs(20);
/// How often a socket that is not open yet is tried: a monitor that was started just now opens it in milliseconds.
const GLANCE: Duration = Duration::from_micros(200);
/// How long one answer may take: gigabytes may be written before it comes.
const ANSWER: Duration = Duration::from_secs(600);

/// Sends a request and waits for its success.
pub fn call(socket: &Path, method: &str, path: &str, body: &Value) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{method} {path}: {error}");
    let mut stream = open(socket).map_err(failed)?;
    stream.set_read_timeout(Some(ANSWER)).map_err(failed)?;
    let body = body.to_string();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n");
    let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut answer = BufReader::new(stream);
    let mut status = String::new();
    answer.read_line(&mut status).map_err(failed)?;
    if status.split(' ').nth(1).is_some_and(|code| code.starts_with('2')) {
        return Ok(());
    }
    // Why not: it says so in the body, at the end of whatever is there by now.
    let _ = answer.get_ref().set_read_timeout(Some(Duration::from_millis(200)));
    let mut rest = Vec::new();
    let _ = answer.read_to_end(&mut rest);
    Err(format!("{method} {path}: {}{}", status, String::from_utf8_lossy(&rest)))
}

fn open(socket: &Path) -> std::io::Result<UnixStream> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Err(_) if begun.elapsed() < OPENING => std::thread::sleep(GLANCE),
            other => return other,
        }
    }
}
