//! Setting the stage: machines and snapshots as a step needs them, from golden snapshots.

use std::net::{Ipv4Addr, TcpListener};

use super::progress::Progress;
use super::{Error, Player, shell};

/// How many ports the lesson wants, and where it begins to look for them.
const PORTS: usize = 4;
const FIRST_PORT: u16 = 8080;

/// How it stands with the lesson.
#[derive(Debug, serde::Serialize)]
pub struct Standing {
    /// The step that was played last, and whether what it claimed holds by what was measured.
    pub last: Option<String>,
    /// Claims of that step which do not hold.
    pub missed: Vec<String>,
    /// The step that comes next.
    pub next: Option<String>,
    /// What it needs and is not there.
    pub missing: Vec<String>,
}

impl Player<'_> {
    /// Whether everything is as a step needs it because nothing has happened since the one before.
    pub(super) fn is_on_stage(&self, place: usize) -> bool {
        self.progress.staged && self.next() == Some(place) && self.missing(place).is_empty()
    }

    /// What a step needs and is not there.
    fn missing(&self, place: usize) -> Vec<String> {
        let step = self.steps()[place].1;
        let snapshots = step.needs.iter().filter(|name| !self.desk.has(name)).map(|name| format!("snapshot {name}"));
        let machines = step.cast.iter().filter(|name| !self.desk.runs(name)).map(|name| format!("{name}, running"));
        snapshots.chain(machines).collect()
    }

    /// Clears the stage and sets it for a step. What it needs and nobody has made yet is made by playing the steps that
    /// make it.
    pub fn stage(&mut self, place: usize) -> Result<(), Error> {
        self.choose_ports(None)?;
        let (first, step) = (self.first(place), self.steps()[place].1);
        for need in step.needs {
            let maker = self.steps().iter().position(|(_, step)| step.makes.contains(need));
            if let Some(maker) = maker.filter(|maker| !self.desk.has(need) && self.first(*maker) != first) {
                self.catch_up(self.first(maker), maker)?;
            }
        }
        self.show.aside("  ⟲ ", &format!("Setting the stage for {}", self.name(place)));
        self.clear(place)?;
        let played = (first..place).all(|earlier| self.is_played(earlier));
        if place > first && (!played || step.needs.iter().any(|need| !self.desk.has(need))) {
            self.catch_up(first, place - 1)?;
        } else {
            let figures = self.figures_before(place);
            for line in step.stage {
                let line = figures.fill(line)?;
                self.show.command(&line);
                self.show.line_end();
                let ran = shell::run(&self.desk, &line, &mut self.show)?;
                if ran.code != 0 {
                    return Err(Error::Ended { line, code: ran.code, wanted: 0 });
                }
            }
        }
        self.arrive(place, true)
    }

    /// Plays steps with nobody being asked.
    fn catch_up(&mut self, from: usize, last: usize) -> Result<(), Error> {
        self.show.aside("  ⟲ ", &format!("Catching up from {}", self.name(from)));
        let attended = self.show.unattend();
        let played = self.play(from, last);
        self.show.attend(attended);
        match played? {
            super::Verdict::HostDies => Err(Error::HostLives),
            _ => Ok(()),
        }
    }

    /// Removes all machines, and what the steps of this chapter from `place` on have made.
    fn clear(&mut self, place: usize) -> Result<(), Error> {
        let (chapter, first) = (self.steps()[place].0, self.first(place));
        let later: Vec<_> = chapter.steps[place - first..].iter().flat_map(|step| step.makes).copied().collect();
        self.progress.dies_in = None;
        for place in place..first + chapter.steps.len() {
            let name = self.name(place);
            self.progress.figures.remove(&name);
        }
        self.strike(|name| later.contains(&name))
    }

    /// Removes all machines, what chapters leave beside them, and some snapshots.
    fn strike(&mut self, unwanted: impl Fn(&str) -> bool) -> Result<(), Error> {
        for line in self.chapters.iter().flat_map(|chapter| chapter.strike) {
            shell::run(&self.desk, line, &mut self.show)?;
        }
        let machines: Vec<_> = self.desk.machines()?.iter().map(ToString::to_string).collect();
        self.remove("catnap rm --force", &machines)?;
        let snapshots: Vec<_> = self.desk.snapshots()?.into_iter().filter(|name| unwanted(name)).collect();
        self.remove("catnap snapshot rm --merge", &snapshots)
    }

    fn remove(&mut self, verb: &str, names: &[String]) -> Result<(), Error> {
        if names.is_empty() {
            return Ok(());
        }
        let line = format!("{verb} {}", names.join(" "));
        self.show.command(&line);
        self.show.line_end();
        let ran = shell::run(&self.desk, &line, &mut self.show)?;
        if ran.code == 0 { Ok(()) } else { Err(Error::Ended { line, code: ran.code, wanted: 0 }) }
    }

    /// Back to the very beginning: no machines, no snapshots but images, nothing measured.
    pub fn forget(&mut self) -> Result<(), Error> {
        self.strike(|_| true)?;
        for file in ["visits.json", "rows.json"] {
            let _ = std::fs::remove_file(self.desk.state.join(file));
        }
        self.progress = Progress::default();
        self.progress.write(&self.desk.state)
    }

    /// All that whoever presents the lesson needs to know, with nothing being run.
    pub fn present(&mut self) {
        for chapter in self.chapters {
            self.show.heading(chapter.name, chapter.title);
            self.show.tell(chapter.aim);
            for (number, step) in chapter.steps.iter().enumerate() {
                self.show.heading(&format!("{} {}/{}", chapter.name, number + 1, chapter.steps.len()), step.title);
                self.show.notes(&step.notes);
                if let Some(question) = &step.ask {
                    self.show.question(question);
                    self.show.answer(question);
                }
            }
        }
    }

    /// How it stands.
    pub fn standing(&self) -> Standing {
        let next = self.next();
        let last = next.unwrap_or(self.steps().len()).checked_sub(1).filter(|last| self.is_played(*last));
        let missed = last.map_or_else(Vec::new, |last| {
            let figures = self.progress.figures.get(&self.name(last)).cloned().unwrap_or_default();
            let step = self.steps()[last].1;
            if step.lacking(&figures).is_none() { Self::claims(step, &figures) } else { Vec::new() }
        });
        Standing {
            last: last.map(|last| self.name(last)),
            missed: missed.into_iter().filter(|claim| !claim.holds).map(|claim| claim.says).collect(),
            next: next.map(|next| self.name(next)),
            // A chapter's first step sets its own stage.
            missing: next.filter(|next| self.first(*next) != *next).map_or_else(Vec::new, |next| self.missing(next)),
        }
    }

    /// Ports for the machines' pages, from `wanted` on those that are free. Those that were chosen before stay, unless
    /// somebody wants others: then the stage is set anew.
    pub fn choose_ports(&mut self, wanted: Option<u16>) -> Result<(), Error> {
        let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
        let chosen = self.progress.ports.first().copied();
        if self.progress.ports.len() < PORTS || (wanted.is_some() && wanted != chosen) {
            let first = wanted.unwrap_or(FIRST_PORT);
            self.progress.ports = (first..=u16::MAX).filter(is_free).take(PORTS).collect();
            self.progress.staged = false;
            self.progress.write(&self.desk.state)?;
        }
        Ok(())
    }
}
