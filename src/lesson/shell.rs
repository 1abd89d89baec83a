//! Runs a line as a student's shell would, shows what it prints while it prints it, and keeps that.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use super::figures::json_in;
use super::{Desk, Error, Show};

/// How much of an output is kept and shown, in bytes; the rest is read and forgotten.
const MAX_OUTPUT: usize = 1 << 20;
/// The longest line of it.
const MAX_LINE: u64 = 64 << 10;

/// What came of a line.
pub struct Ran {
    /// Its exit code; 128 and the signal's number when one ended it.
    pub code: i32,
    /// Its standard output, and how long it took.
    out: String,
    err: String,
    seconds: f64,
}

impl Ran {
    /// Its figures: those of the JSON that it printed, and `text`, `error`, `seconds` and `code`.
    pub fn figures(&self) -> Value {
        let own =
            json!({"text": self.out.trim(), "error": self.err.trim(), "seconds": self.seconds, "code": self.code});
        match (json_in(&self.out), own) {
            (Some(Value::Object(printed)), Value::Object(mut own)) => {
                own.extend(printed);
                Value::Object(own)
            }
            (Some(list @ Value::Array(_)), Value::Object(mut own)) => {
                own.insert("list".into(), list);
                Value::Object(own)
            }
            (_, own) => own,
        }
    }
}

/// Runs a line of shell, and shows what it prints.
pub fn run(desk: &Desk, line: &str, show: &mut Show) -> Result<Ran, Error> {
    let failed = |source| Error::Io { doing: line.into(), source };
    let begun = Instant::now();
    let mut command = desk.command("sh");
    command.args(["-c", line]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let (told, heard) = mpsc::channel();
    let (mut out, mut err) = (String::new(), String::new());
    thread::scope(|scope| {
        if let Some(pipe) = child.stdout.take() {
            let told = told.clone();
            scope.spawn(move || pass_on(pipe, |line| told.send((true, line)).is_ok()));
        }
        if let Some(pipe) = child.stderr.take() {
            scope.spawn(move || pass_on(pipe, |line| told.send((false, line)).is_ok()));
        }
        let mut lines = show.output();
        for (is_data, line) in heard {
            let kept = if is_data { &mut out } else { &mut err };
            if kept.len() + line.len() < MAX_OUTPUT {
                lines.line(&line);
                *kept += &line;
                kept.push('\n');
            }
        }
    });
    let status = child.wait().map_err(failed)?;
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(Ran { code, out, err, seconds: begun.elapsed().as_secs_f64() })
}

/// Gives on line by line. What is no text becomes some.
fn pass_on(pipe: impl Read, mut tell: impl FnMut(String) -> bool) {
    let mut reader = BufReader::new(pipe);
    loop {
        let mut line = Vec::new();
        match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let harmless = text.chars().filter(|c| !c.is_control() || *c == '\t').collect();
        if !tell(harmless) {
            return;
        }
    }
}
