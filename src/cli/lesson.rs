//! `catnap lesson`: Anna's story, told with real commands.

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::lesson::{self, Desk, Error, Look, Player, Show, Verdict, story};
use crate::spec::Name;

/// The exit code that asks whoever runs the lesson to cut this host's power, and to run it again afterwards.
const HOST_DIES: u8 = 75;

/// Learn what a snapshot is, with real machines
#[derive(clap::Args)]
#[command(after_help = "\
The lesson has a home of its own and never touches your machines: --home FOLDER, or CATNAP_LESSON_HOME, or `lesson` in
CATNAP_HOME, or the folder catnap-lesson beside the one with your machines (~/.local/share). It remembers where it
was left. Each command in it is typed out and run for real when you press Enter. At any point:

  s or !     a shell with everything as it is       !COMMAND   one command
  b  n  r    back, the next step, this step anew    q          leave; `catnap lesson run` goes on there

A step is called by its chapter and its name or number, as in `catnap lesson list`: backup/rows, or scale/2.
One of them, share/push, is played where CATNAP_LESSON_REGISTRY=HOST:PORT names a registry; scripts/lesson starts one.

Examples:
  catnap lesson run
  catnap lesson run backup --projector --notes
  catnap lesson run --auto                     unattended; fails when anything that is claimed does not hold
  catnap lesson reset --to scale
  catnap lesson list --notes                   what whoever presents it needs to know

`catnap lesson VERB --help` explains each.")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
    /// The lesson's home
    #[arg(long, global = true, value_name = "FOLDER")]
    home: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Verb {
    Run(Run),
    Next(Next),
    Back(Back),
    List(List),
    Check(Check),
    Reset(Reset),
    Shell(Shell),
    Visit(Visit),
    Rows(Rows),
}

/// How it looks.
#[derive(clap::Args)]
struct View {
    /// Seconds in which a command is typed out; unattended, also the rest after it [default: 1; unattended: 0]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pace: Option<f64>,
    /// Show what whoever presents it needs: what to say, how long it takes, what goes wrong
    #[arg(long)]
    notes: bool,
    /// For the back of the room: an empty screen for each step, short lines, large figures
    #[arg(long)]
    projector: bool,
}

/// Play the lesson, from where it was left or from a step
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  catnap lesson run
  catnap lesson run backup --until backup
  catnap lesson run --auto --pace 2            a rehearsal, to look at
  catnap lesson run --auto --json >report.json")]
struct Run {
    #[command(flatten)]
    view: View,
    /// Play it unattended, and fail when a claim does not hold
    #[arg(long)]
    auto: bool,
    /// Print a report as JSON; the lesson itself goes to standard error
    #[arg(long, requires = "auto")]
    json: bool,
    /// The last chapter or step to play
    #[arg(long, value_name = "STEP")]
    until: Option<String>,
    /// The first of the ports of this host by which the machines' pages are reached [default: 8080, or as before]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// This host is emulated, and dies when it is time to: exit code 75 asks for that
    #[arg(long, hide = true)]
    host_is_ours: bool,
    /// It died, and is back: go on where it was, whatever STEP says
    #[arg(long, hide = true)]
    go_on: bool,
    /// Where to begin: a chapter or a step
    #[arg(value_name = "STEP")]
    from: Option<String>,
}

/// Play one step, the next one
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  catnap lesson next
  catnap lesson next --projector")]
struct Next {
    #[command(flatten)]
    view: View,
    /// Play it without asking
    #[arg(long)]
    auto: bool,
}

/// Go back one step, and set the stage for it
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  catnap lesson back && catnap lesson next")]
struct Back {}

/// List the steps
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  catnap lesson list
  catnap lesson list --notes | less")]
struct List {
    /// With what whoever presents it needs, questions and answers included
    #[arg(long)]
    notes: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "notes")]
    json: bool,
}

/// Check that what was claimed holds, and that the next step finds what it needs
#[derive(clap::Args)]
#[command(after_help = "\
Exit code 4: something is missing or does not hold.

Examples:
  catnap lesson check || catnap lesson reset --to scale")]
struct Check {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Set the stage anew: for a step, or for the very beginning
#[derive(clap::Args)]
#[command(after_help = "\
Without --to, all of the lesson's machines and snapshots are removed, and what was measured is forgotten. With it, the
machines are those that the step begins with, from golden snapshots.

Examples:
  catnap lesson reset
  catnap lesson reset --to backup/rows")]
struct Reset {
    /// The chapter or step to be at
    #[arg(long, value_name = "STEP")]
    to: Option<String>,
}

/// Open a shell in the lesson's home, with everything as it is
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  catnap lesson shell")]
struct Shell {}

/// Have visitors write into a machine's guest book
#[derive(clap::Args)]
#[command(after_help = "\
Ben is thanked when his row is on the disk, Cleo while hers is in the guest's memory only. With --ring, Dora writes and
rings in the middle of it, again and again until `snapshot create --at-doorbell` takes a snapshot just there. What they
were told is kept for `catnap lesson rows`.

Examples:
  catnap lesson visit anna
  catnap snapshot create anna@crash --mode crash --at-doorbell & catnap lesson visit anna --ring crash")]
struct Visit {
    /// Ring for a snapshot, whose tag is this
    #[arg(long, value_name = "TAG")]
    ring: Option<Name>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The machine
    #[arg(value_name = "MACHINE")]
    machine: Name,
}

/// Compare the guest books of machines with what visitors were told
#[derive(clap::Args)]
#[command(after_help = "\
Acknowledged are rows for which a visitor had been thanked before the snapshot, found are those of them that are there,
torn those that were being written and are not. Each machine is named as the tag that was rung for.

Examples:
  catnap lesson rows crash quiesced live")]
struct Rows {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The machines
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<Name>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let is = |code| Failure::new(code, error.to_string());
        match error {
            Error::NoStep(_) => is(Code::NotFound).hint("catnap lesson list"),
            Error::Store(error) => error.into(),
            Error::HostLives => is(Code::Refused).hint("catnap lesson reset --to transient"),
            Error::Page { .. } => is(Code::Failed).hint("catnap ps, with CATNAP_HOME set to the lesson's home"),
            Error::Ended { .. } | Error::Claims { .. } | Error::NoFigure(_) => {
                is(Code::Failed).hint("catnap lesson check, and catnap lesson reset --to the step")
            }
            Error::File(_) | Error::Home(_) | Error::Io { .. } => is(Code::Failed),
        }
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    match &args.verb {
        Verb::Visit(visit) => return visited(visit),
        Verb::Rows(rows) => return compared(rows),
        _ => {}
    }
    let desk = Desk::at(&lesson::home(args.home)?)?;
    match args.verb {
        Verb::Run(run) => play(desk, run),
        Verb::Next(next) => {
            let look = next.view.look(next.auto);
            play_some(desk, look, |player| Ok(player.next().map(|place| (place, place))), false, false)
        }
        Verb::Back(_) => {
            let mut player = player(desk, Look { unattended: true, ..Look::default() }, false, false)?;
            let place = player.next().unwrap_or(player.steps().len()).saturating_sub(1);
            player.stage(place)?;
            ui::note(format!("catnap lesson next plays {}", player.name(place)));
            Ok(ExitCode::SUCCESS)
        }
        Verb::List(list) => listed(desk, &list),
        Verb::Check(check) => checked(desk, &check),
        Verb::Reset(reset) => {
            let mut player = player(desk, Look { unattended: true, ..Look::default() }, false, false)?;
            match reset.to {
                None => player.forget()?,
                Some(step) => {
                    let place = player.find(&step)?;
                    player.stage(place)?;
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            player(desk, Look::default(), false, false)?.shell()?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

impl View {
    fn look(&self, unattended: bool) -> Look {
        let pace = self.pace.unwrap_or(if unattended { 0.0 } else { 1.0 });
        Look { unattended, pace, projector: self.projector, notes: self.notes }
    }
}

fn player(desk: Desk, look: Look, on_stderr: bool, host_is_ours: bool) -> Result<Player<'static>, Error> {
    Player::new(story::CHAPTERS, desk, Show::new(look, on_stderr), host_is_ours)
}

fn play(desk: Desk, args: Run) -> Outcome {
    let look = args.view.look(args.auto);
    let (port, from, until) = (args.port, args.from, args.until);
    let stretch = |player: &mut Player<'_>| {
        player.choose_ports(port)?;
        let last = until.as_deref().map_or(Ok(player.steps().len() - 1), |until| player.find_last(until))?;
        let first = match &from {
            // The first time, this is where it began.
            Some(step) if !args.go_on => {
                let first = player.find(step)?;
                player.stage(first)?;
                first
            }
            _ => match player.next() {
                Some(next) => next,
                // It was played to its end, and begins anew.
                None => {
                    player.forget()?;
                    0
                }
            },
        };
        Ok(Some((first, last)))
    };
    play_some(desk, look, stretch, args.json, args.host_is_ours)
}

/// Plays a stretch of the lesson. Nobody can be asked without a terminal.
fn play_some(
    desk: Desk,
    look: Look,
    stretch: impl FnOnce(&mut Player<'_>) -> Result<Option<(usize, usize)>, Error>,
    json: bool,
    host_is_ours: bool,
) -> Outcome {
    use std::io::IsTerminal;
    if !look.unattended && !std::io::stdin().is_terminal() {
        return Err(Failure::new(Code::Refused, "nobody is there to press Enter").hint("--auto"));
    }
    let mut player = player(desk, look, json, host_is_ours)?;
    let Some((first, last)) = stretch(&mut player)? else {
        return Err(Failure::new(Code::Refused, "the lesson is over").hint("catnap lesson reset"));
    };
    let played = player.play(first, last);
    if json {
        ui::json(&player.report)?;
    }
    Ok(match played? {
        Verdict::HostDies => ExitCode::from(HOST_DIES),
        Verdict::Done | Verdict::Left => ExitCode::SUCCESS,
    })
}

/// A step as it is listed.
#[derive(Serialize)]
struct Listed {
    step: String,
    title: &'static str,
    minutes: u32,
    played: bool,
    next: bool,
}

fn listed(desk: Desk, args: &List) -> Outcome {
    let look = Look { notes: true, ..Look::default() };
    let mut player = player(desk, look, false, false)?;
    if args.notes {
        player.present();
        return Ok(ExitCode::SUCCESS);
    }
    let next = player.next();
    let view = |(place, (_, step)): (usize, &(_, &'static lesson::Step))| Listed {
        step: player.name(place),
        title: step.title,
        minutes: step.notes.minutes,
        played: player.is_played(place),
        next: next == Some(place),
    };
    let all: Vec<Listed> = player.steps().iter().enumerate().map(view).collect();
    if args.json {
        ui::json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |step: &Listed| {
        let mark = if step.next {
            "→"
        } else if step.played {
            "✓"
        } else {
            ""
        };
        vec![mark.into(), step.step.clone(), step.title.into(), step.minutes.to_string()]
    };
    ui::table(&["", "STEP", "TITLE", "MINUTES"], &all.iter().map(row).collect::<Vec<_>>())?;
    Ok(ExitCode::SUCCESS)
}

fn checked(desk: Desk, args: &Check) -> Outcome {
    let home = desk.home.clone();
    let standing = player(desk, Look::default(), false, false)?.standing();
    if args.json {
        ui::json(&standing)?;
    } else {
        let step = |step: &Option<String>| step.clone().unwrap_or_else(|| "-".into());
        ui::data(format!(
            "home: {}\nlast: {}\nnext: {}\n",
            home.display(),
            step(&standing.last),
            step(&standing.next)
        ))?;
        standing.missed.iter().for_each(|claim| ui::note(format!("does not hold: {claim}")));
        standing.missing.iter().for_each(|what| ui::note(format!("missing: {what}")));
    }
    let well = standing.missed.is_empty() && standing.missing.is_empty();
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::from(Code::Refused as u8) })
}

/// A desk in the home of whoever asks, as for any other verb.
fn own_desk() -> Result<Desk, Error> {
    let home = std::env::var_os("CATNAP_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    Desk::at(&home.map_or_else(|| lesson::home(None), Ok)?)
}

fn visited(args: &Visit) -> Outcome {
    let visit = lesson::visit(&own_desk()?, args.machine.as_str(), args.ring.as_ref().map(Name::as_str))?;
    if args.json {
        ui::json(&visit)?;
        return Ok(ExitCode::SUCCESS);
    }
    let open = visit.open.map_or_else(String::new, |open| format!("; open at the moment of the snapshot: {open}"));
    ui::data(format!("{} rows were acknowledged{open}\n", visit.acknowledged))?;
    Ok(ExitCode::SUCCESS)
}

fn compared(args: &Rows) -> Outcome {
    let names: Vec<String> = args.machines.iter().map(ToString::to_string).collect();
    let rows = lesson::rows(&own_desk()?, &names)?;
    if args.json {
        ui::json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    let cells = |row: &lesson::Rows| {
        let counts = [row.acknowledged, row.found, row.torn].map(|count| count.to_string());
        [vec![row.kind.clone()], counts.to_vec(), vec![row.integrity.clone()]].concat()
    };
    let rows: Vec<_> = rows.iter().map(cells).collect();
    ui::table(&["KIND", "ACKNOWLEDGED", "FOUND", "TORN", "SQLITE SAYS"], &rows)?;
    Ok(ExitCode::SUCCESS)
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.0..=60.0).contains(seconds));
    seconds.ok_or_else(|| "a number of seconds from 0 to 60".into())
}
