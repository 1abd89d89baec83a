//! The guided lesson: Anna's story, told with real commands and checked on measured figures.
//!
//! What is told lies apart from what tells it: `story` has a file per chapter, made of the words below, and is meant to
//! be read and edited; `Player` plays whatever chapters it is given.
//!
//! ```text
//!            begin: the stage is set          acts run, claims are checked
//!  step i ─────────────────────────► on stage ─────────────────────────────► step i + 1, on stage
//!     ▲        (from golden snapshots)                │
//!     └────────────── back, reset ────────────────────┘
//! ```
//!
//! The first step of a chapter, and every step that is jumped to, begins from a golden state: the stage is cleared, and
//! set anew from snapshots. Only from one step to the next within a chapter is everything left as it is.

mod attend;
mod book;
mod desk;
mod figures;
mod page;
mod play;
mod progress;
mod shell;
mod show;
mod speed;
mod stage;
pub mod story;
#[cfg(test)]
mod tests;
mod watch;

pub use book::{Rows, Visit, look_for, rows, visit};
pub use desk::{Desk, home};
pub use figures::Figures;
pub use play::{Played, Player, Verdict};
pub use show::{Look, Show};
pub use stage::Standing;

/// Why the lesson does not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be used.
    #[error(transparent)]
    File(#[from] crate::sys::files::Error),
    /// No home.
    #[error(transparent)]
    Home(#[from] crate::sys::home::Error),
    /// The store says no.
    #[error(transparent)]
    Store(#[from] crate::store::Error),
    /// No such step.
    #[error("the lesson has no step {0}")]
    NoStep(String),
    /// A command did not end as the step says.
    #[error("`{line}` ended with code {code}, and {wanted} was to be expected")]
    Ended {
        /// What was run.
        line: String,
        /// How it ended.
        code: i32,
        /// How it should have.
        wanted: i32,
    },
    /// A claim is not borne out.
    #[error("{step}: {missed} of its claims do not hold")]
    Claims {
        /// The step.
        step: String,
        /// How many.
        missed: usize,
    },
    /// A text speaks of a figure that was not measured.
    #[error("`{0}` was not measured")]
    NoFigure(String),
    /// The machine's page cannot be asked.
    #[error("the page of {machine} does not answer: {why}")]
    Page {
        /// The machine.
        machine: String,
        /// Why not.
        why: String,
    },
    /// The host was to die, and has not.
    #[error("this host is still in the boot in which it was to die")]
    HostLives,
    /// Something of the terminal or of a command.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried.
        doing: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// A chapter: a few steps on one theme.
pub struct Chapter {
    /// How it is called on the command line.
    pub name: &'static str,
    /// Its heading.
    pub title: &'static str,
    /// What whoever has seen it understands.
    pub aim: &'static str,
    /// Lines of shell that clear away what its commands leave beside machines and snapshots. Each may fail.
    pub strike: &'static [&'static str],
    /// What happens.
    pub steps: &'static [Step],
}

/// A step: a sentence, commands, what they show, and a question.
pub struct Step {
    /// How it is called within its chapter.
    pub name: &'static str,
    /// Its heading.
    pub title: &'static str,
    /// A sentence or two of Anna's story.
    pub story: &'static str,
    /// Lines of shell that set the stage, from the snapshots that `needs` names.
    pub stage: &'static [&'static str],
    /// Snapshots that must be there before it.
    pub needs: &'static [&'static str],
    /// Snapshots that it makes.
    pub makes: &'static [&'static str],
    /// Machines that run when it begins.
    pub cast: &'static [&'static str],
    /// A figure without which it is not played, as `registry`, and what is said then.
    pub only_with: Option<(&'static str, &'static str)>,
    /// What to look at.
    pub watch: &'static str,
    /// What a student types.
    pub acts: &'static [Act],
    /// What is fetched afterwards.
    pub looks: &'static [At],
    /// How often it is played until its claims hold: more than once only where others on the host can spoil a figure.
    pub tries: u32,
    /// What must be true then.
    pub claims: &'static [Claim],
    /// The one figure that everybody should take home.
    pub figure: &'static str,
    /// The question to the class.
    pub ask: Option<Question>,
    /// For whoever presents it.
    pub notes: Notes,
}

impl Step {
    /// A step about nothing, to be filled in with `..Step::EMPTY`.
    pub const EMPTY: Step = Step {
        name: "",
        title: "",
        story: "",
        stage: &[],
        needs: &[],
        makes: &[],
        cast: &[],
        only_with: None,
        watch: "",
        acts: &[],
        looks: &[],
        tries: 1,
        claims: &[],
        figure: "",
        ask: None,
        notes: Notes { minutes: 1, say: "", wrong: "" },
    };
}

impl Step {
    /// Why it is not played here, if it is not: what was measured lacks the figure that it needs.
    pub fn lacking(&self, figures: &Figures) -> Option<&'static str> {
        self.only_with.filter(|(figure, _)| figures.get(figure).is_none()).map(|(_, why)| why)
    }
}

/// A command of a step.
#[derive(Clone, Copy)]
pub struct Act {
    /// A line of shell. `{name}` in it is a figure.
    pub line: &'static str,
    /// The figures of its output, when that is JSON, and `seconds` and `text`, go by this name.
    pub name: &'static str,
    /// The exit code that it must end with.
    pub code: i32,
    /// When it happens.
    pub when: When,
    /// The machine whose page is asked again and again meanwhile: the figures `watch.…`.
    pub counter: Option<&'static str>,
    /// Whether to find out before it how much CPU this host has to spare: the figure `host.speed`.
    pub speed: bool,
}

/// When a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// When the host cannot be killed, because it is the student's own.
    Simulated,
    /// Nothing to run: whoever runs the lesson pulls the plug of its host here.
    Real,
}

/// A command.
pub const fn run(line: &'static str) -> Act {
    Act { line, name: "", code: 0, when: When::Always, counter: None, speed: false }
}

impl Act {
    /// Keeps its figures.
    pub const fn named(self, name: &'static str) -> Act {
        Act { name, ..self }
    }

    /// It must fail with this code.
    pub const fn exits(self, code: i32) -> Act {
        Act { code, ..self }
    }

    /// The machine's counter is watched meanwhile.
    pub const fn watching(self, machine: &'static str) -> Act {
        Act { counter: Some(machine), ..self }
    }

    /// This host's spare CPU is measured before.
    pub const fn minding_the_host(self) -> Act {
        Act { speed: true, ..self }
    }

    /// It is for some hosts only.
    pub const fn when(self, when: When) -> Act {
        Act { when, ..self }
    }
}

/// Something to fetch from a machine's page; its figures go by `name`.
pub struct At {
    /// Of the figures.
    pub name: &'static str,
    /// The port here, a figure such as `port`.
    pub port: &'static str,
    /// The path, such as `/api/status`.
    pub path: &'static str,
}

/// A sentence that figures bear out or not.
pub struct Claim {
    /// The sentence, with figures in it.
    pub says: &'static str,
    /// Whether it holds; `None` when something of it was not measured.
    pub holds: fn(&Figures) -> Option<bool>,
}

/// A question with answers to choose from, by cards of five colours.
pub struct Question {
    /// The question.
    pub text: &'static str,
    /// The answers, A to E.
    pub answers: [&'static str; 5],
    /// The letter of the best one.
    pub best: char,
    /// Why.
    pub because: &'static str,
}

/// What only whoever presents needs to see.
pub struct Notes {
    /// How long it takes with a class.
    pub minutes: u32,
    /// What to say.
    pub say: &'static str,
    /// What goes wrong, and what to do then.
    pub wrong: &'static str,
}
