//! The verbs: one file each. Here they are gathered, grouped for the help, and their results become exit codes.

mod checks;
mod clone;
mod completion;
mod console;
mod cpu;
mod dashboard;
mod disk;
mod doctor;
mod errors;
mod exec;
mod fit;
mod home;
mod image;
mod inspect;
mod key;
mod launch;
mod lesson;
mod load;
mod logs;
mod man;
mod monitor;
mod pause;
mod ps;
mod record;
mod resize;
mod restore;
mod rm;
mod run;
mod sizes;
mod snapshot;
mod start;
mod stop;
mod ui;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::control::{Code, Failure};
use crate::spec::Name;
use crate::sys::process;
use home::House;

/// What a verb comes to: the exit code, or what went wrong.
type Outcome = Result<ExitCode, Failure>;

/// A line of this length, in bytes, goes on in the next.
const FULL: usize = 60;

/// The exit code after Ctrl-C (128 + SIGINT), as shells expect it.
const INTERRUPTED: u8 = 130;

/// Small Linux machines on KVM that nap: boot one, look at it, put it to sleep, wake it bigger.
#[derive(Parser)]
#[command(
    name = "catnap",
    version,
    help_template = "{about-with-newline}\n{usage-heading} {usage}\n\n{after-help}\n\nOptions:\n{options}",
    after_help = GROUPS,
    disable_help_subcommand = true,
    subcommand_value_name = "VERB",
    max_term_width = 100
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const GROUPS: &str = "\
Machines:
  run         Make a machine from an image and boot it
  ps          List machines
  inspect     Show all that is known of machines
  start       Boot stopped machines again
  stop        Shut machines down
  rm          Remove machines with their disks
  pause       Hold machines' vCPUs still
  resume      Let paused machines run on
  resize      Give a machine more or fewer vCPUs and memory
  disk        Put disks into running machines and take them out

Inside a machine:
  exec        Run a program in the guest
  console     Join the guest's serial console
  logs        Show what a machine's console has shown
  load        Put a machine's page under load, and count

Snapshots:
  snapshot    Take, list, compare, check, share and remove snapshots
  restore     Wake a machine from a snapshot
  clone       Make new machines from one snapshot
  key         Make the keys that snapshots are signed with, and know those of others

This host:
  image       Make, list and remove base images
  dashboard   Show machines and snapshots on a page, live
  doctor      Find out whether this host can run machines, and what to do if not
  lesson      Learn what a snapshot is, with real machines
  completion  Print a script that teaches a shell to complete
  man         Print the manual page, or write one for each verb

Begin with:
  catnap doctor
  catnap run kitten --name anna -p 8080:80
  catnap exec anna -- sh

`catnap VERB --help` explains each.

Exit codes:
  0 done, 1 failed, 2 usage, 3 not found, 4 refused or wrong state, 5 host unusable,
  6 verification failed";

#[derive(Subcommand)]
enum Verb {
    Run(run::Args),
    Ps(ps::Args),
    Inspect(inspect::Args),
    Start(start::Args),
    Stop(stop::Args),
    Rm(rm::Args),
    Pause(pause::Pause),
    Resume(pause::Resume),
    Resize(resize::Args),
    Disk(disk::Args),
    Exec(exec::Args),
    Console(console::Args),
    Logs(logs::Args),
    Load(load::Args),
    Snapshot(snapshot::Args),
    Restore(restore::Args),
    Clone(clone::Args),
    Key(key::Args),
    Image(image::Args),
    Doctor(doctor::Args),
    Dashboard(dashboard::Args),
    Lesson(lesson::Args),
    Completion(completion::Args),
    Man(man::Args),
}

/// Runs the program and gives its exit code.
pub fn main() -> ExitCode {
    // Whoever tells how long something took counts from here.
    process::begun_us();
    // Not for people, and in no help: the process that is a machine. It goes by clap, which takes longer than
    // all that a monitor does before its guest runs.
    let words: Vec<String> = std::env::args().skip(1).take(4).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["monitor", name] => return monitor::main(name, None),
        ["monitor", name, snapshot] => return monitor::main(name, Some(snapshot)),
        _ => {}
    }
    let verb = quickly(&std::env::args_os().skip(1).collect::<Vec<_>>()).unwrap_or_else(parse);
    let outcome = match verb {
        Verb::Run(args) => run::run(args),
        Verb::Ps(args) => ps::run(args),
        Verb::Inspect(args) => inspect::run(args),
        Verb::Start(args) => start::run(args),
        Verb::Stop(args) => stop::run(args),
        Verb::Rm(args) => rm::run(args),
        Verb::Pause(args) => pause::pause(args),
        Verb::Resume(args) => pause::resume(args),
        Verb::Resize(args) => resize::run(args),
        Verb::Disk(args) => disk::run(args),
        Verb::Exec(args) => exec::run(args),
        Verb::Console(args) => console::run(args),
        Verb::Logs(args) => logs::run(args),
        Verb::Load(args) => load::run(args),
        Verb::Snapshot(args) => snapshot::run(args),
        Verb::Restore(args) => restore::run(args),
        Verb::Clone(args) => clone::run(args),
        Verb::Key(args) => key::run(args),
        Verb::Image(args) => image::run(args),
        Verb::Doctor(args) => doctor::run(args),
        Verb::Dashboard(args) => dashboard::run(args),
        Verb::Lesson(args) => lesson::run(args),
        Verb::Completion(args) => completion::run(args),
        Verb::Man(args) => man::run(args),
    };
    outcome.unwrap_or_else(|failure| {
        ui::failure(&failure);
        if process::interrupted() { ExitCode::from(INTERRUPTED) } else { ExitCode::from(failure.code as u8) }
    })
}

/// Reads those verbs that people wait for without the others: to make the whole tree of verbs takes longer than all that
/// a wake does before it comes to KVM. Whatever is not understood this way, a question for help or a mistake, the whole
/// tree answers.
fn quickly(words: &[OsString]) -> Option<Verb> {
    fn alone<A: clap::Args>(words: &[OsString]) -> Option<A> {
        let matches = A::augment_args(Command::new("catnap")).try_get_matches_from(words).ok()?;
        A::from_arg_matches(&matches).ok()
    }
    match words.first()?.to_str()? {
        "run" => alone(words).map(Verb::Run),
        "start" => alone(words).map(Verb::Start),
        "exec" => alone(words).map(Verb::Exec),
        "restore" => alone(words).map(Verb::Restore),
        "clone" => alone(words).map(Verb::Clone),
        _ => None,
    }
}

/// Reads the words of the command line as clap does, and lets it explain.
fn parse() -> Verb {
    let matches = flowing(Cli::command()).get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()).verb
}

/// What is said behind the options has the lines of our source. Here its paragraphs become a line each, which clap breaks
/// where the terminal ends.
fn flowing(command: Command) -> Command {
    let text = command.get_after_help().map(|text| flow(&text.to_string()));
    let command = command.mut_subcommands(flowing);
    match text {
        Some(text) => command.after_help(text),
        None => command,
    }
}

/// Joins lines of text; what is indented, or begins behind a short line, stands for itself.
fn flow(text: &str) -> String {
    let mut flowing: Vec<String> = Vec::new();
    let mut goes_on = false;
    for line in text.lines() {
        let is_text = !line.is_empty() && !line.starts_with(' ');
        match flowing.last_mut().filter(|_| goes_on && is_text) {
            Some(paragraph) => *paragraph += &format!(" {line}"),
            None => flowing.push(line.into()),
        }
        goes_on = is_text && line.len() >= FULL;
    }
    flowing.join("\n")
}

/// Does something to several machines, one after the other; those that fail do not keep the others from it.
/// The exit code is that of the first failure.
fn each<T>(names: &[T], mut act: impl FnMut(&T) -> Result<(), Failure>) -> Outcome {
    let mut first: Option<Code> = None;
    for name in names {
        if let Err(failure) = act(name) {
            ui::failure(&failure);
            first.get_or_insert(failure.code);
        }
        if process::interrupted() {
            return Ok(ExitCode::from(INTERRUPTED));
        }
    }
    Ok(first.map_or(ExitCode::SUCCESS, |code| ExitCode::from(code as u8)))
}

/// As [`each`], for machines that are there afterwards. What `act` gives is printed, or with `json` what all the
/// machines with which it went well are then, as `catnap ps` does.
fn each_machine(
    house: &House,
    names: &[Name],
    json: bool,
    mut act: impl FnMut(&Name) -> Result<String, Failure>,
) -> Outcome {
    let mut views = Vec::new();
    let outcome = each(names, |name| {
        let said = act(name)?;
        match json {
            true => views.push(house.view(&house.machine(name)?)?),
            false => ui::data(said)?,
        }
        Ok(())
    })?;
    if json {
        ui::json(&views)?;
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn help_flows_into_the_terminal_that_there_is() {
        let long = "x".repeat(FULL);
        let text = format!("{long}\nends.\n\nExamples:\n  {long}\n  catnap ps\nshort\nx");
        assert_eq!(flow(&text), format!("{long} ends.\n\nExamples:\n  {long}\n  catnap ps\nshort\nx"));
        let shown =
            flowing(Cli::command()).try_get_matches_from(["catnap", "resize", "--help"]).unwrap_err().to_string();
        assert!(
            shown.contains("asked to take or to give back vCPUs and\nmemory, and this command returns when"),
            "{shown}"
        );
    }

    #[test]
    fn the_grouped_help_has_every_verb_with_its_own_words_and_no_other() {
        let command = Cli::command();
        command.clone().debug_assert();
        let verbs: Vec<_> = command.get_subcommands().filter(|verb| !verb.is_hide_set()).collect();
        for verb in &verbs {
            let line = format!("\n  {:10}  {}\n", verb.get_name(), verb.get_about().unwrap());
            assert!(GROUPS.contains(&line), "{line}");
            let nested = verb.get_subcommands().filter(|verb| !verb.is_hide_set());
            for verb in [*verb].into_iter().chain(nested) {
                let help = verb.get_after_help().map(|text| text.to_string()).unwrap_or_default();
                assert!(help.contains("Examples:\n"), "{}", verb.get_name());
                assert!(verb.get_about().is_some(), "{}", verb.get_name());
            }
        }
        let listed = GROUPS.split("Begin with").next().unwrap().lines().filter(|line| line.starts_with("  "));
        assert_eq!(listed.count(), verbs.len());
    }

    #[test]
    fn a_verb_that_is_read_alone_is_read_as_by_the_whole_tree() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        let alone = |line: &str| quickly(&words(line)).is_some();
        for line in [
            "run kitten --name anna",
            "start anna",
            "exec anna -- sh -c x",
            "restore anna@a --cpus 2 -p 8080:80 --json",
            "clone anna@a bella --count 3",
        ] {
            assert!(alone(line), "{line}");
            assert!(Cli::try_parse_from(words(&format!("catnap {line}"))).is_ok(), "{line}");
        }
        for line in
            ["restore --help", "restore", "restore anna@a --replace --name b", "run kitten --cpus x", "ps", "help"]
        {
            assert!(!alone(line), "{line}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_is_done() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(|_| ()).map_err(|error| error.exit_code());
        for good in [
            "catnap ps -q",
            "catnap exec anna ls -l --color",
            "catnap exec -it anna -- sh",
            "catnap stop -f a b c",
            "catnap resize anna --cpus 4 --memory 1G",
            "catnap load anna --seconds 2 --connections 8 --path /work?n=7",
            "catnap restore anna@a --flavor tiger --disk-size 4G",
            "catnap logs -f -n 5 anna",
            "catnap dashboard --port 7000 --open",
            "catnap disk attach anna --ephemeral 64M:/data",
            "catnap disk detach anna -f",
            "catnap run kitten --ephemeral 64M --ephemeral 1G:/b",
            "catnap run kitten --set colour=Grey --set title=Ben's --cpu-baseline x86-64-v2",
            "catnap clone anna@a ben --set colour=black",
            "catnap snapshot scrub anna@a anna@b --also /x --also-from y",
            "catnap snapshot scrub --show-list",
            "catnap key new anna",
            "catnap snapshot export --sign anna anna@a x.catnap",
            "catnap snapshot import --require-signature x.catnap",
            "catnap snapshot export --scrub anna@a x.catnap --also /x",
            "catnap snapshot ls anna -q",
            "catnap snapshot rm --merge anna@a kitten sha256:0123",
            "catnap snapshot prune --keep 3 --older-than 7d --machine anna -y",
            "catnap snapshot export --disk-only anna@a - --yes",
            "catnap snapshot inspect --secrets --find meow --find purr anna@a",
            "catnap snapshot push --scrub --also /root/x anna@a localhost:5000/anna:a",
            "catnap snapshot push --disk-only --dry-run --sign anna -y anna@a localhost:5000/anna:a",
            "catnap snapshot pull --name b@c --plain-http --require-signature host.example/anna:a",
            "catnap lesson run backup --until backup/rows --auto --json --home /tmp/class",
            "catnap lesson --home /tmp/class reset --to scale",
            "catnap lesson visit anna --ring crash",
            "catnap man",
        ] {
            assert_eq!(parse(good), Ok(()), "{good}");
        }
        for bad in [
            "catnap",
            "catnap fly",
            "catnap stop",
            "catnap stop ../etc",
            "catnap stop --time -1 anna",
            "catnap exec anna",
            "catnap exec -t -T anna -- sh",
            "catnap exec -e X anna -- sh",
            "catnap completion tcsh",
            "catnap resize --cpus 4",
            "catnap load anna --connections 0",
            "catnap load anna --seconds 1000000",
            "catnap load anna --path work",
            "catnap resize anna --cpus 2 --flavor tiger",
            "catnap resize anna --memory lots",
            "catnap dashboard --port 70000",
            "catnap ps --json --quiet",
            "catnap disk attach anna",
            "catnap disk attach anna --ephemeral 0",
            "catnap run kitten --ephemeral 100K",
            "catnap run kitten --set colour=pink",
            "catnap run kitten --set purr",
            "catnap run kitten --cpu-baseline pentium",
            "catnap snapshot scrub",
            "catnap key trust ben ed25519:12",
            "catnap key new ../x",
            "catnap snapshot scrub --show-list anna@a",
            "catnap snapshot export --scrub --with-memory anna@a x.catnap",
            "catnap run kitten --ephemeral 64M:etc",
            "catnap snapshot",
            "catnap snapshot rm",
            "catnap snapshot diff a@b",
            "catnap snapshot ls ../etc",
            "catnap snapshot verify --all anna@a",
            "catnap snapshot prune --keep -1",
            "catnap snapshot export anna@a",
            "catnap snapshot export --disk-only --with-memory anna@a x.catnap",
            "catnap snapshot import",
            "catnap snapshot push --scrub --dry-run anna@a localhost:5000/anna:a",
            "catnap snapshot push anna@a",
            "catnap snapshot pull",
            "catnap snapshot push --find abc anna@a localhost:5000/anna:a",
            "catnap snapshot inspect --find meow anna@a",
            "catnap snapshot inspect --secrets --find abc anna@a",
            "catnap snapshot prune --older-than 7",
            "catnap snapshot prune --images --machine anna",
            "catnap lesson",
            "catnap lesson run --json",
            "catnap lesson run --pace -1",
            "catnap lesson run --port 99999",
            "catnap lesson rows",
        ] {
            assert_eq!(parse(bad), Err(2), "{bad}");
        }
    }
}
