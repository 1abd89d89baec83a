//! Running `catnap`, and what came of it.

use std::ffi::OsStr;
use std::fmt;
use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use serde_json::Value;

/// A program that has ended.
pub struct Ran {
    command: String,
    /// Its exit code; 128 and the signal's number when one ended it.
    pub code: i32,
    /// Its standard output.
    pub out: Vec<u8>,
    /// Its standard error.
    pub err: String,
}

/// Runs `catnap`. A first argument such as `rm --force` is two.
pub fn catnap(arguments: &[&str]) -> Ran {
    let words = arguments.first().map_or("", |first| first).split(' ');
    catnap_with(words.chain(arguments.iter().skip(1).copied()))
}

/// Runs `catnap` with any arguments.
pub fn catnap_with(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ran {
    let mut command = command();
    run(command.args(arguments).stdin(Stdio::null()))
}

/// Runs `catnap` with something on its standard input.
pub fn with_input(arguments: &[&str], input: &[u8]) -> Ran {
    let mut command = command();
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("catnap starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    thread::scope(|scope| {
        // A program that does not take all of its input is none of our business here.
        scope.spawn(move || drop(stdin.write_all(input)));
        Ran::new(&command, child.wait_with_output().expect("catnap ends"))
    })
}

/// Starts `catnap` with pipes for its output, and nothing on its input.
pub fn in_background(arguments: &[&str]) -> Child {
    let mut command = command();
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("catnap starts")
}

/// The program under test.
pub fn command() -> Command {
    Command::new(std::env::var_os("CATNAP_BIN").expect("CATNAP_BIN; scripts/test guest sets it"))
}

/// Runs any program to its end.
pub fn run(command: &mut Command) -> Ran {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Ran::new(command, output)
}

impl Ran {
    pub fn new(command: &Command, output: Output) -> Ran {
        use std::os::unix::process::ExitStatusExt;
        let code = output.status.code().or(output.status.signal().map(|signal| 128 + signal));
        Ran {
            command: format!("{command:?}"),
            code: code.expect("an end"),
            out: output.stdout,
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub fn succeeds(self) -> Ran {
        self.exits(0)
    }

    pub fn exits(self, code: i32) -> Ran {
        assert_eq!(self.code, code, "the exit code of {self}");
        self
    }

    /// It failed with this code, said what failed in these words, and what to try next.
    pub fn refuses(self, code: i32, words: &[&str]) -> Ran {
        let ran = self.exits(code).says(words);
        assert!(ran.err.contains("try:"), "no next step from {ran}");
        ran
    }

    /// These words are in its standard error.
    pub fn says(self, words: &[&str]) -> Ran {
        for word in words {
            assert!(self.err.contains(word), "there is no {word:?} in what was said by {self}");
        }
        self
    }

    /// Its standard output, without the space around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).trim().into()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.out).unwrap_or_else(|error| panic!("{error}: {self}"))
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = |text: &str| text.chars().take(8000).collect::<String>();
        write!(f, "{}\n  exit code {}\n{}{}", self.command, self.code, start(&self.text()), start(&self.err))
    }
}
