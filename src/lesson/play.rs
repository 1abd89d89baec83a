//! Plays steps: types their commands, runs them, measures, and checks what is claimed.

use std::rc::Rc;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use super::attend::Wish;
use super::progress::Progress;
use super::{Act, Chapter, Desk, Error, Figures, Show, Step, When, book, page, shell, speed, watch};
use crate::sys::process::boot_id;

/// The variable that says where a registry is, as HOST:PORT.
const REGISTRY: &str = "CATNAP_LESSON_REGISTRY";
/// How long a page may take to answer when it is looked at.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// How playing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// What was to be played has been.
    Done,
    /// Whoever sat at the keyboard left.
    Left,
    /// The host is to be killed now, and the lesson run again on it afterwards.
    HostDies,
}

/// A step that was played, as a report tells of it.
#[derive(Debug, Serialize)]
pub struct Played {
    /// `chapter/step`.
    pub step: String,
    /// How long it took.
    pub seconds: f64,
    /// What was claimed.
    pub claims: Vec<Claimed>,
}

/// A claim, and what came of it.
#[derive(Debug, Serialize)]
pub struct Claimed {
    /// The sentence, with its figures.
    pub says: String,
    /// Whether it holds.
    pub holds: bool,
}

/// Plays chapters at a desk.
pub struct Player<'a> {
    pub(super) chapters: &'a [Chapter],
    pub(super) desk: Rc<Desk>,
    pub(super) show: Show,
    pub(super) progress: Progress,
    /// Whether the host is one that may be killed.
    host_is_ours: bool,
    /// What was played so far.
    pub report: Vec<Played>,
}

impl<'a> Player<'a> {
    /// Goes on where the desk was left.
    pub fn new(chapters: &'a [Chapter], desk: Desk, show: Show, host_is_ours: bool) -> Result<Player<'a>, Error> {
        let progress = Progress::read(&desk.state)?;
        Ok(Player { chapters, desk: Rc::new(desk), show, progress, host_is_ours, report: Vec::new() })
    }

    /// All steps, in their order.
    pub fn steps(&self) -> Vec<(&'a Chapter, &'a Step)> {
        self.chapters.iter().flat_map(|chapter| chapter.steps.iter().map(move |step| (chapter, step))).collect()
    }

    /// The number of a step that is called `chapter`, `chapter/step` or `chapter/2`.
    pub fn find(&self, text: &str) -> Result<usize, Error> {
        let (chapter, step) = text.split_once('/').unwrap_or((text, "1"));
        let mut steps = self.steps().into_iter();
        let number = step.parse::<usize>().unwrap_or(0);
        let in_chapter = |place: usize, of: &Chapter| self.first(place) + number == place + 1 && of.name == chapter;
        steps
            .by_ref()
            .enumerate()
            .find(|(place, (of, it))| of.name == chapter && (it.name == step || in_chapter(*place, of)))
            .map(|(place, _)| place)
            .ok_or_else(|| Error::NoStep(text.into()))
    }

    /// The number of the last step of what `text` names: a chapter, or a step.
    pub fn find_last(&self, text: &str) -> Result<usize, Error> {
        let first = self.find(text)?;
        let chapter = self.steps()[first].0;
        Ok(if text.contains('/') { first } else { first + chapter.steps.len() - 1 })
    }

    /// `chapter/step` of a step.
    pub fn name(&self, place: usize) -> String {
        let (chapter, step) = self.steps()[place];
        format!("{}/{}", chapter.name, step.name)
    }

    /// The number of its chapter's first step.
    pub(super) fn first(&self, place: usize) -> usize {
        let mut first = 0;
        for chapter in self.chapters {
            if place < first + chapter.steps.len() {
                break;
            }
            first += chapter.steps.len();
        }
        first
    }

    /// The step that comes next; `None` when the lesson is over.
    pub fn next(&self) -> Option<usize> {
        if self.progress.over {
            return None;
        }
        Some(self.progress.next.as_deref().and_then(|name| self.find(name).ok()).unwrap_or(0))
    }

    /// Whether a step has been played, since its chapter was last begun.
    pub fn is_played(&self, place: usize) -> bool {
        self.progress.figures.contains_key(&self.name(place))
    }

    /// Plays from one step to another, or to where whoever sits at the keyboard wants.
    pub fn play(&mut self, from: usize, last: usize) -> Result<Verdict, Error> {
        let mut place = from;
        while place <= last {
            let wish = match self.play_one(place) {
                Err(error) if !self.show.look().unattended => {
                    self.show.claim(&error.to_string(), false);
                    self.ask("r: once more · n: go on · s: a shell · q: leave")
                }
                other => other?,
            };
            match wish {
                Wish::Go => place += 1,
                Wish::Skip => place = self.skip(place)?,
                Wish::Again => self.stage(place)?,
                Wish::Back => {
                    place = place.saturating_sub(1);
                    self.stage(place)?;
                }
                Wish::Leave => return Ok(Verdict::Left),
                Wish::HostDies => return Ok(Verdict::HostDies),
            }
        }
        Ok(Verdict::Done)
    }

    /// A step that is not played leaves its successor without a stage.
    fn skip(&mut self, place: usize) -> Result<usize, Error> {
        self.arrive(place + 1, false)?;
        Ok(place + 1)
    }

    fn play_one(&mut self, place: usize) -> Result<Wish, Error> {
        let (chapter, step) = self.steps()[place];
        let dying = self.progress.dies_in.is_some() && self.next() == Some(place);
        if !dying && !self.is_on_stage(place) {
            self.stage(place)?;
        }
        self.arrive_for(place)?;
        let number = place - self.first(place) + 1;
        let where_ = format!("{} {number}/{}", chapter.name, chapter.steps.len());
        self.show.heading(&where_, step.title);
        let mut figures = self.figures_before(place);
        self.show.tell(&figures.fill(step.story)?);
        if !step.watch.is_empty() {
            self.show.aside("  ◉ ", &figures.fill(step.watch)?);
        }
        self.show.notes(&step.notes);
        self.show.line_end();
        if let Some(why) = step.lacking(&figures) {
            self.show.aside("  ∅ ", why);
            self.keep(place, &figures)?;
            return Ok(self.pause());
        }
        for left in (0..step.tries).rev() {
            let begun = Instant::now();
            match self.measure(step, &mut figures)? {
                Wish::Go => {}
                other => return Ok(other),
            }
            match self.judge(place, &figures, begun) {
                Err(Error::Claims { .. }) if left > 0 => {
                    self.show.aside("  ⟲ ", "Somebody else may be busy: once more.")
                }
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        self.discuss(step)
    }

    /// All that a step does, and what is seen of it.
    fn measure(&mut self, step: &Step, figures: &mut Figures) -> Result<Wish, Error> {
        for act in step.acts {
            match self.act(act, figures)? {
                Wish::Go => {}
                other => return Ok(other),
            }
        }
        for look in step.looks {
            let answer = self.look(look, figures)?;
            figures.put(look.name, answer);
        }
        figures.put("rows", book::look_for(&self.desk));
        Ok(Wish::Go)
    }

    /// One command.
    fn act(&mut self, act: &Act, figures: &mut Figures) -> Result<Wish, Error> {
        match act.when {
            When::Real if !self.host_is_ours => return Ok(Wish::Go),
            When::Real => return self.die(act, figures),
            When::Simulated if self.host_is_ours => return Ok(Wish::Go),
            _ => {}
        }
        let line = figures.fill(act.line)?;
        self.show.command(&line);
        let wish = if self.show.look().unattended { Wish::Go } else { self.ask("") };
        if self.show.look().unattended {
            self.show.line_end();
        }
        if wish != Wish::Go {
            return Ok(wish);
        }
        if act.speed {
            figures.put("host", json!({"speed": speed::of_two()}));
        }
        let desk = Rc::clone(&self.desk);
        let ran = match act.counter {
            None => shell::run(&desk, &line, &mut self.show)?,
            Some(machine) => {
                let (ran, seen) = watch::during(&desk, machine, || shell::run(&desk, &line, &mut self.show))?;
                figures.put("watch", seen);
                ran?
            }
        };
        if !act.name.is_empty() {
            figures.put(act.name, ran.figures());
        }
        if act.when == When::Simulated {
            let how =
                "only simulated: the machine's monitor was killed and its file in memory removed; the host lives on";
            figures.put("host", json!({"real": false, "how": how}));
        }
        if ran.code != act.code {
            return Err(Error::Ended { line, code: ran.code, wanted: act.code });
        }
        self.show.rest();
        Ok(Wish::Go)
    }

    /// The host dies for real: once this was said, and kept, whoever runs the lesson pulls the plug.
    fn die(&mut self, act: &Act, figures: &mut Figures) -> Result<Wish, Error> {
        let boot = boot_id().map_err(|source| Error::Io { doing: "the host's boot id".into(), source })?;
        match self.progress.dies_in.take() {
            None => {
                self.show.aside("  ⚡ ", "On the machine outside, the power of this host is cut now:");
                self.show.command(act.line);
                self.show.line_end();
                self.progress.dies_in = Some(boot);
                self.progress.write(&self.desk.state)?;
                Ok(Wish::HostDies)
            }
            Some(before) if before == boot => Err(Error::HostLives),
            Some(before) => {
                let how = "real: its power was cut, and it has booted anew";
                figures.put("host", json!({"real": true, "how": how, "before": before, "now": boot}));
                Ok(Wish::Go)
            }
        }
    }

    fn look(&self, look: &super::At, figures: &Figures) -> Result<serde_json::Value, Error> {
        let failed = |why: String| Error::Page { machine: look.name.into(), why };
        let port = figures.number(look.port).ok_or_else(|| Error::NoFigure(look.port.into()))? as u16;
        let answer = page::get(port, look.path, PATIENCE).map_err(|error| failed(error.to_string()))?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        Ok(answer.json().unwrap_or_else(|_| json!({"status": answer.status, "text": text})))
    }

    /// Checks the claims, and keeps what was measured when all of them hold.
    fn judge(&mut self, place: usize, figures: &Figures, begun: Instant) -> Result<(), Error> {
        let step = self.steps()[place].1;
        self.show.line_end();
        let claims = Self::claims(step, figures);
        claims.iter().for_each(|claim| self.show.claim(&claim.says, claim.holds));
        let missed = claims.iter().filter(|claim| !claim.holds).count();
        self.report.push(Played { step: self.name(place), seconds: begun.elapsed().as_secs_f64(), claims });
        if missed > 0 {
            return Err(Error::Claims { step: self.name(place), missed });
        }
        if !step.figure.is_empty() {
            let text = figures.fill(step.figure)?;
            self.show.figure(&text);
        }
        self.keep(place, figures)
    }

    /// A step is over: keeps its figures, and comes to the next.
    fn keep(&mut self, place: usize, figures: &Figures) -> Result<(), Error> {
        self.progress.figures.insert(self.name(place), figures.clone());
        let goes_on = place + 1 < self.steps().len() && self.first(place + 1) == self.first(place);
        self.arrive(place + 1, goes_on)
    }

    /// What is claimed, and whether the figures bear it out.
    pub(super) fn claims(step: &Step, figures: &Figures) -> Vec<Claimed> {
        let judge = |claim: &super::Claim| match figures.fill(claim.says) {
            Ok(says) => Claimed { says, holds: (claim.holds)(figures) == Some(true) },
            Err(error) => Claimed { says: format!("{} ({error})", claim.says), holds: false },
        };
        step.claims.iter().map(judge).collect()
    }

    fn discuss(&mut self, step: &Step) -> Result<Wish, Error> {
        let Some(question) = &step.ask else { return Ok(self.pause()) };
        self.show.question(question);
        let wish = self.pause();
        if wish == Wish::Go {
            self.show.answer(question);
            return Ok(self.pause());
        }
        Ok(wish)
    }

    /// All figures that a step may speak of: those of its chapter, and where the machines are to be found.
    pub(super) fn figures_before(&self, place: usize) -> Figures {
        let mut figures = Figures::default();
        for earlier in self.first(place)..place {
            if let Some(found) = self.progress.figures.get(&self.name(earlier)) {
                figures.extend(found);
            }
        }
        for (number, port) in self.progress.ports.iter().enumerate() {
            let name = if number == 0 { "port".into() } else { format!("port{}", number + 1) };
            figures.put(&name, json!(port));
        }
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        if let Some(registry) = set(REGISTRY) {
            figures.put("registry", json!(registry));
        }
        let outside = set("CATNAP_LESSON_PAGE");
        let here = || format!("http://127.0.0.1:{}/", self.progress.ports.first().unwrap_or(&0));
        figures.put("page", json!(outside.unwrap_or_else(here)));
        figures
    }

    /// Comes to a step, and keeps that.
    pub(super) fn arrive(&mut self, place: usize, staged: bool) -> Result<(), Error> {
        self.progress.over = place >= self.steps().len();
        self.progress.next = (!self.progress.over).then(|| self.name(place));
        self.progress.staged = staged;
        self.progress.write(&self.desk.state)
    }

    /// The stage is in use: should this process end now, it has to be set anew.
    fn arrive_for(&mut self, place: usize) -> Result<(), Error> {
        self.arrive(place, false)
    }
}
