//! How the program speaks: data on standard output, everything else on standard error, progress only where
//! someone watches.

use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::control::{Code, Failure};
use crate::sys::patient::Patient;

/// Writes data to standard output. A reader that has seen enough (`| head`) ends the program quietly.
pub fn data(bytes: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes.as_ref()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Failure::while_doing("standard output", error)),
        Ok(()) => Ok(()),
    }
}

/// Writes data as JSON, for people and programs alike.
pub fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::while_doing("JSON", error))?;
    data(text + "\n")
}

/// Writes a table to standard output: a heading, and columns that are as wide as they must be.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
    data(format_table(heading, rows))
}

fn format_table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heading[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut heading.iter().copied());
    rows.iter().for_each(|row| text += &line(&mut row.iter().map(String::as_str)));
    text
}

/// Tells something on standard error that is no data and no error.
pub fn note(text: impl AsRef<str>) {
    // Nobody is left to hear it when standard error is closed.
    let _ = writeln!(io::stderr(), "{}", text.as_ref());
}

/// Tells of something that may turn out badly.
pub fn warn(text: impl AsRef<str>) {
    note(format!("{} {}", paint("33;1", "warning:"), text.as_ref()));
}

/// Tells what failed and what to try.
pub fn failure(failure: &Failure) {
    note(format!("{} {}", paint("31;1", "error:"), failure.error));
    if let Some(hint) = &failure.hint {
        note(format!("{} {hint}", paint("36;1", "try:")));
    }
}

/// Asks on standard error, and reads the answer. Refused when nobody could give one.
pub fn confirm(question: &str) -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::new(Code::Refused, format!("{question} Nobody is there to be asked")).hint("--yes"));
    }
    let _ = write!(io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    let answered = Patient::new(&io::stdin()).and_then(|stdin| BufReader::new(stdin).read_line(&mut answer));
    answered.map_err(|error| Failure::while_doing("standard input", error))?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

/// Colours text when standard error is a terminal and the user likes colours (`NO_COLOR`).
fn paint(colour: &str, text: &str) -> String {
    paint_if(io::stderr().is_terminal(), colour, text)
}

/// The same for text that is data, and goes to standard output.
pub fn paint_data(colour: &str, text: &str) -> String {
    paint_if(io::stdout().is_terminal(), colour, text)
}

fn paint_if(terminal: bool, colour: &str, text: &str) -> String {
    let wanted = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if wanted { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
}

/// A line on standard error that shows that something goes on; nothing when that is not a terminal.
pub struct Progress(ProgressBar);

impl Progress {
    /// Shows `what` with the time that it takes.
    pub fn begin(what: impl Into<String>) -> Progress {
        // Draws to standard error, and by itself only when that is a terminal.
        let bar = ProgressBar::new_spinner().with_message(what.into());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Progress(bar)
    }

    /// Shows something else.
    pub fn say(&self, what: impl Into<String>) {
        self.0.set_message(what.into());
    }

    /// Shows how much of something is done; when the whole is known, also how fast it goes and what time is left.
    pub fn count(&self, what: impl Into<String>, done: u64, total: Option<u64>) {
        if let Some(total) = total
            && self.0.length() != Some(total)
        {
            let template = "{spinner} {msg} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.0.set_style(style);
            }
            self.0.set_length(total);
        }
        self.0.set_position(done);
        // Messages cost more than numbers, and nobody reads them that fast.
        let what = what.into();
        if self.0.message() != what {
            self.0.set_message(what);
        }
    }

    /// Lets something else write to standard error.
    pub fn aside(&self, act: impl FnOnce()) {
        self.0.suspend(act);
    }

    /// Whether someone watches.
    pub fn is_seen(&self) -> bool {
        !self.0.is_hidden()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A guest's or file's text made harmless for a terminal: control characters other than line ends are dropped.
pub fn harmless(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// An amount of space as people say it, with two digits at least and rounded up: `0`, `4K`, `1.5M`, `340M`.
pub fn amount(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    let (unit, shift) = UNITS.into_iter().find(|(_, shift)| bytes >> shift > 0).unwrap_or(("", 0));
    let tenths = (u128::from(bytes) * 10).div_ceil(1 << shift);
    match (shift, tenths % 10, tenths) {
        (0, ..) => bytes.to_string(),
        (_, 0, _) | (_, _, 100..) => format!("{}{unit}", tenths.div_ceil(10)),
        _ => format!("{}.{}{unit}", tenths / 10, tenths % 10),
    }
}

/// A span of time as people say it, with its two largest units at most.
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_and_times_are_short() {
        let rows = vec![vec!["anna".into(), "running".into()], vec!["b".into(), "".into()]];
        assert_eq!(format_table(&["NAME", "STATE"], &rows), "NAME  STATE\nanna  running\nb\n");
        let spans = [0, 59, 60, 3600, 90_061, 86400 * 40].map(|s| span(Duration::from_secs(s)));
        let amounts = [0, 1, 1024, 4096, 1536, 1537, 12 << 20, (12 << 20) + 1, 3 << 29, u64::MAX].map(amount);
        assert_eq!(amounts, ["0", "1", "1K", "4K", "1.5K", "1.6K", "12M", "13M", "1.5G", "16777216T"]);
        assert_eq!(spans, ["0s", "59s", "1m0s", "1h0m", "1d1h", "40d0h"]);
    }

    #[test]
    fn a_guests_text_cannot_steer_the_terminal() {
        assert_eq!(harmless(b"ok\x1b[2J\x07\r\n\xffx\ty"), "ok[2J\n\u{fffd}x\ty");
    }
}
