//! What the class sees: calm text, commands that are typed out, and one figure that stands out.

use std::env;
use std::io::{self, BufRead, IsTerminal, Write};
use std::thread;
use std::time::Duration;

use super::{Notes, Question};
use crate::sys::tty;

/// The most of a command's output that is shown; the rest is counted.
const LINES: usize = 24;
/// The longest time between two keys of a command that is typed out.
const KEY: Duration = Duration::from_millis(45);
/// Digits of the projector's large figures, three columns and five rows each.
const DIGITS: [(char, [&str; 5]); 13] = [
    ('0', ["███", "█ █", "█ █", "█ █", "███"]),
    ('1', [" █ ", "██ ", " █ ", " █ ", "███"]),
    ('2', ["███", "  █", "███", "█  ", "███"]),
    ('3', ["███", "  █", "███", "  █", "███"]),
    ('4', ["█ █", "█ █", "███", "  █", "  █"]),
    ('5', ["███", "█  ", "███", "  █", "███"]),
    ('6', ["███", "█  ", "███", "█ █", "███"]),
    ('7', ["███", "  █", " █ ", " █ ", " █ "]),
    ('8', ["███", "█ █", "███", "█ █", "███"]),
    ('9', ["███", "█ █", "███", "  █", "███"]),
    ('.', [" ", " ", " ", " ", "█"]),
    ('/', ["  █", "  █", " █ ", "█  ", "█  "]),
    ('-', ["   ", "   ", "███", "   ", "   "]),
];

/// How it is shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Nobody is asked and nothing is waited for.
    pub unattended: bool,
    /// Seconds to let things sink in: how long a command takes to be typed, and the rest when unattended.
    pub pace: f64,
    /// For the back of the room: short lines, room between them, an empty screen for each step, large figures.
    pub projector: bool,
    /// With what the presenter needs.
    pub notes: bool,
}

/// Where it is shown.
pub struct Show {
    out: Box<dyn Write>,
    look: Look,
    colours: bool,
    width: usize,
    terminal: bool,
}

impl Show {
    /// On standard output, or on standard error when that is for data.
    pub fn new(look: Look, on_stderr: bool) -> Show {
        let terminal = if on_stderr { io::stderr().is_terminal() } else { io::stdout().is_terminal() };
        let columns = tty::size().map_or(100, |(_, columns)| usize::from(columns));
        let wanted = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Show {
            out: if on_stderr { Box::new(io::stderr()) } else { Box::new(io::stdout()) },
            look,
            colours: terminal && wanted,
            width: columns.clamp(30, if look.projector { 64 } else { 96 }),
            terminal,
        }
    }

    /// Into something else, for tests.
    #[cfg(test)]
    pub fn into(out: Box<dyn Write>, look: Look) -> Show {
        Show { out, look, colours: false, width: 80, terminal: false }
    }

    /// How it is shown.
    pub fn look(&self) -> Look {
        self.look
    }

    /// From now on nobody is asked; gives how it was before.
    pub fn unattend(&mut self) -> bool {
        std::mem::replace(&mut self.look.unattended, true)
    }

    /// Back to how it was.
    pub fn attend(&mut self, unattended: bool) {
        self.look.unattended = unattended;
    }

    /// The heading of a chapter or step.
    pub fn heading(&mut self, place: &str, title: &str) {
        if self.look.projector && self.terminal {
            self.put("\x1b[2J\x1b[H");
        }
        let text = if self.look.projector {
            format!("\n\n  {place}\n\n  {title}\n\n")
        } else {
            format!("\n── {place} · {title}\n\n")
        };
        let painted = self.painted("1", &text);
        self.put(&painted);
    }

    /// The story, and other running text.
    pub fn tell(&mut self, text: &str) {
        self.block("", text, "");
    }

    /// What is said beside the story: where to look, what is being done.
    pub fn aside(&mut self, mark: &str, text: &str) {
        self.block(mark, text, "36");
    }

    /// A command, key by key.
    pub fn command(&mut self, line: &str) {
        let prompt = self.painted("32;1", "  $ ");
        self.put(&prompt);
        let keys = line.chars().count().max(1) as f64;
        let pause = Duration::from_secs_f64(self.look.pace / keys).min(KEY);
        if pause.is_zero() {
            let line = self.painted("1", line);
            self.put(&line);
            return;
        }
        for key in line.chars() {
            let key = self.painted("1", &key.to_string());
            self.put(&key);
            thread::sleep(pause);
        }
    }

    /// What a command prints, line by line.
    pub fn output(&mut self) -> Output<'_> {
        Output { show: self, lines: 0 }
    }

    /// A claim, and whether it holds.
    pub fn claim(&mut self, text: &str, holds: bool) {
        let (mark, colour) = if holds { ("  ✓ ", "32") } else { ("  ✗ ", "31;1") };
        self.block(mark, text, colour);
    }

    /// The figure to take home; large on a projector when it begins with a number.
    pub fn figure(&mut self, text: &str) {
        let number: String = text.chars().take_while(|c| DIGITS.iter().any(|(digit, _)| digit == c)).collect();
        if !self.look.projector || number.is_empty() {
            let text = self.painted("1;33", text);
            self.put(&format!("\n  {text}\n"));
            return;
        }
        let mut large = String::from("\n");
        for row in 0..5 {
            let glyph = |c: char| DIGITS.iter().find(|(digit, _)| *digit == c).map_or("", |(_, rows)| rows[row]);
            let cells: Vec<&str> = number.chars().map(glyph).collect();
            large += &format!("    {}\n", cells.join(" "));
        }
        let large = self.painted("1;33", &large);
        self.put(&large);
        let rest = text[number.len()..].trim().to_owned();
        self.put(&format!("\n    {rest}\n\n"));
    }

    /// A question with its answers.
    pub fn question(&mut self, question: &Question) {
        self.put("\n");
        self.block("  ? ", question.text, "35;1");
        for (letter, answer) in ('A'..).zip(question.answers) {
            self.block(&format!("    {letter}  "), answer, "");
        }
    }

    /// The answer to it.
    pub fn answer(&mut self, question: &Question) {
        self.block("  → ", &format!("{}. {}", question.best, question.because), "35");
    }

    /// What only the presenter needs.
    pub fn notes(&mut self, notes: &Notes) {
        if !self.look.notes {
            return;
        }
        self.block("  │ ", &format!("{} min", notes.minutes), "34");
        self.block("  │ say: ", notes.say, "34");
        self.block("  │ goes wrong: ", notes.wrong, "34");
    }

    /// Something for whoever holds the keyboard.
    pub fn hint(&mut self, text: &str) {
        let text = self.painted("2", text);
        self.put(&format!("{text} "));
    }

    /// The end of a line.
    pub fn line_end(&mut self) {
        self.put("\n");
    }

    /// Waits for a line from the keyboard; `None` when there will be no more. An Enter from before, when something else
    /// was shown, counts for nothing: nobody wants a command run that the class has not read.
    pub fn wait(&mut self) -> Option<String> {
        tty::forget_typed();
        let mut line = String::new();
        match io::stdin().lock().read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(line.trim().into()),
        }
    }

    /// Lets things sink in when nobody presses Enter.
    pub fn rest(&self) {
        if self.look.unattended && self.look.pace > 0.0 {
            thread::sleep(Duration::from_secs_f64(self.look.pace));
        }
    }

    /// Text with a mark before its first line, wrapped and with its lines below one another.
    fn block(&mut self, mark: &str, text: &str, colour: &str) {
        let mark = if mark.is_empty() { "  " } else { mark };
        let indent = mark.chars().count();
        let lines = wrap(text, self.width.saturating_sub(indent).max(20));
        let mut block = String::new();
        for (number, line) in lines.iter().enumerate() {
            let head = if number == 0 { mark.to_owned() } else { " ".repeat(indent) };
            block += &format!("{head}{line}\n");
        }
        if self.look.projector {
            block.push('\n');
        }
        let block = if colour.is_empty() { block } else { self.painted(colour, &block) };
        self.put(&block);
    }

    fn painted(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.into() }
    }

    /// Whoever does not listen any more (`| head`) is no reason to leave machines half made.
    fn put(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
    }
}

/// The lines of one command.
pub struct Output<'a> {
    show: &'a mut Show,
    lines: usize,
}

impl Output<'_> {
    /// One line of it.
    pub fn line(&mut self, text: &str) {
        self.lines += 1;
        if self.lines <= LINES {
            let cut: String = text.chars().take(self.show.width.max(80) * 2).collect();
            let text = self.show.painted("2", &format!("    {cut}"));
            self.show.put(&format!("{text}\n"));
        }
    }
}

impl Drop for Output<'_> {
    fn drop(&mut self) {
        if self.lines > LINES {
            let more = self.lines - LINES;
            self.show.put(&format!("    … and {more} lines more\n"));
        }
    }
}

/// Breaks text between words; its own line ends stay.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split(' ') {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line += word;
        }
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_between_words() {
        assert_eq!(wrap("a kitten on a mat\nand  two", 8), ["a kitten", "on a mat", "and  two"]);
        assert_eq!(wrap("incomprehensibilities", 5), ["incomprehensibilities"]);
        assert!(wrap("", 5).is_empty());
    }

    #[test]
    fn every_digit_is_as_wide_in_each_row() {
        for (digit, rows) in DIGITS {
            let widths = rows.map(|row| row.chars().count());
            assert!(widths.iter().all(|width| *width == widths[0]), "{digit}");
        }
    }
}
