//! Whoever sits at the keyboard: what may be wished for at any point.

use super::{Error, Player};

/// What is wished for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// On with it.
    Go,
    /// The next step, without this one.
    Skip,
    /// This step once more, from its golden state.
    Again,
    /// The step before.
    Back,
    /// The end for now.
    Leave,
    /// Not wished for by anybody: the host is to be killed.
    HostDies,
}

const HELP: &str = "Enter: run it, go on · s or !: a shell, everything as it is · !COMMAND: one command · \
                    b: back · n: next step · r: this step from its beginning · q: leave (the state stays)";

impl Player<'_> {
    /// Waits for whoever presses Enter or wishes for something else. When there is nobody any more, it is left.
    pub(super) fn ask(&mut self, hint: &str) -> Wish {
        if !hint.is_empty() {
            self.show.hint(&format!("  {hint} ▸"));
        }
        loop {
            let Some(said) = self.show.wait() else { return Wish::Leave };
            match said.as_str() {
                "" => return Wish::Go,
                "b" | "back" => return Wish::Back,
                "n" | "next" => return Wish::Skip,
                "r" | "reset" => return Wish::Again,
                "q" | "quit" => return Wish::Leave,
                "s" | "!" => self.say_how_it_went(Self::shell),
                command if command.starts_with('!') => {
                    let command = command[1..].to_owned();
                    self.say_how_it_went(|player| player.one_command(&command));
                }
                // An answer to the question: the right one is told next.
                letter if letter.len() == 1 && "ABCDEabcde".contains(letter) => return Wish::Go,
                _ => self.show.tell(HELP),
            }
            self.show.hint("  (Enter goes on) ▸");
        }
    }

    /// The same at the end of something, where nothing waits to be run.
    pub(super) fn pause(&mut self) -> Wish {
        if self.show.look().unattended {
            self.show.rest();
            return Wish::Go;
        }
        self.ask("Enter: go on · ?: help")
    }

    /// A shell of the student's own in the lesson's home.
    pub fn shell(&mut self) -> Result<(), Error> {
        let shell = std::env::var("SHELL").ok().filter(|shell| !shell.is_empty()).unwrap_or_else(|| "/bin/sh".into());
        self.show.tell("Everything is as it is: look around, break things. `exit` comes back, `r` repairs.");
        self.desk.command(&shell).status().map(drop).map_err(|source| Error::Io { doing: shell, source })
    }

    fn one_command(&mut self, line: &str) -> Result<(), Error> {
        let status = self.desk.command("sh").args(["-c", line]).status();
        status.map(drop).map_err(|source| Error::Io { doing: line.into(), source })
    }

    fn say_how_it_went(&mut self, act: impl FnOnce(&mut Self) -> Result<(), Error>) {
        if let Err(error) = act(self) {
            self.show.claim(&error.to_string(), false);
        }
    }
}
