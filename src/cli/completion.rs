//! `catnap completion`: what a shell needs to complete verbs, options, and the names of machines and snapshots.

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::{Arg, Command, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Outcome, ui};

/// Print a script that teaches a shell to complete
#[derive(clap::Args)]
#[command(after_help = "\
Completes verbs, options and the names of machines and snapshots.

Examples:
  bash:  source <(catnap completion bash)                         in ~/.bashrc
  zsh:   catnap completion zsh > ~/.zfunc/_catnap                 with ~/.zfunc in fpath
  fish:  catnap completion fish > ~/.config/fish/completions/catnap.fish")]
pub struct Args {
    /// The shell
    #[arg(value_parser = clap::value_parser!(Shell))]
    shell: Shell,
}

/// The verbs, each with an option behind which a value comes, as a pattern of the shell.
fn options_with_values() -> String {
    fn gather(verb: &str, command: &Command, found: &mut BTreeSet<String>) {
        let takes_value = |arg: &&Arg| !arg.is_positional() && arg.get_action().takes_values();
        for arg in command.get_arguments().filter(takes_value) {
            found.extend(arg.get_long().map(|long| format!("{verb}\\ --{long}")));
            found.extend(arg.get_short().map(|short| format!("{verb}\\ -{short}")));
        }
        command.get_subcommands().for_each(|nested| gather(verb, nested, found));
    }
    let mut found = BTreeSet::new();
    Cli::command().get_subcommands().for_each(|verb| gather(verb.get_name(), verb, &mut found));
    found.into_iter().collect::<Vec<_>>().join("|")
}

/// Bash: where the generated function has nothing to offer for a verb that takes machines or snapshots, their names.
const BASH: &str = r#"
_catnap_with_machines() {
    _catnap "$@"
    local before=${COMP_WORDS[COMP_CWORD-1]}
    [[ $before != = ]] || before=${COMP_WORDS[COMP_CWORD-2]}
    case "${COMP_WORDS[1]} $before" in
        OPTIONS_WITH_VALUES) return ;;
    esac
    case "${COMP_WORDS[1]}" in
        inspect|start|stop|rm|logs|console|exec|pause|resume|resize|load)
            if [[ "${COMP_WORDS[COMP_CWORD]}" != -* ]]; then
                COMPREPLY=($(compgen -W "$(catnap ps -q 2>/dev/null)" -- "${COMP_WORDS[COMP_CWORD]}"))
            fi ;;
        disk)
            if [[ $COMP_CWORD -gt 2 && "${COMP_WORDS[COMP_CWORD]}" != -* ]]; then
                COMPREPLY=($(compgen -W "$(catnap ps -q 2>/dev/null)" -- "${COMP_WORDS[COMP_CWORD]}"))
            fi ;;
        restore|clone)
            if [[ "${COMP_WORDS[COMP_CWORD]}" != -* ]]; then
                COMPREPLY=($(compgen -W "$(catnap snapshot ls -q 2>/dev/null)" -- "${COMP_WORDS[COMP_CWORD]}"))
            fi ;;
        snapshot)
            if [[ $COMP_CWORD -gt 2 && "${COMP_WORDS[COMP_CWORD]}" != -* ]]; then
                case "${COMP_WORDS[2]}" in
                    ls) COMPREPLY=($(compgen -W "$(catnap ps -q 2>/dev/null)" -- "${COMP_WORDS[COMP_CWORD]}")) ;;
                    tree|inspect|diff|verify|rm|export|push|scrub)
                        COMPREPLY=($(compgen -W "$(catnap snapshot ls --all -q 2>/dev/null)" -- \
                            "${COMP_WORDS[COMP_CWORD]}")) ;;
                esac
            fi ;;
    esac
}
complete -F _catnap_with_machines -o nosort -o bashdefault -o default catnap
"#;

/// Fish: rules beside the generated ones.
const FISH: &str = r#"
complete -c catnap -f -n "__fish_seen_subcommand_from inspect start stop rm logs console exec pause resume resize load attach detach; and not __fish_seen_subcommand_from snapshot image" -a "(catnap ps -q 2>/dev/null)"
complete -c catnap -f -n "__fish_seen_subcommand_from restore clone" -a "(catnap snapshot ls -q 2>/dev/null)"
complete -c catnap -f -n "__fish_seen_subcommand_from snapshot; and __fish_seen_subcommand_from ls" -a "(catnap ps -q 2>/dev/null)"
complete -c catnap -f -n "__fish_seen_subcommand_from snapshot; and __fish_seen_subcommand_from tree inspect diff verify rm export push scrub" -a "(catnap snapshot ls --all -q 2>/dev/null)"
"#;

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "catnap", &mut script);
    let mut script = String::from_utf8_lossy(&script).into_owned();
    match args.shell {
        Shell::Bash => script += &BASH.replace("OPTIONS_WITH_VALUES", &options_with_values()),
        Shell::Fish => script += FISH,
        Shell::Zsh => script = with_machines_for_zsh(&script),
        _ => {}
    }
    ui::data(script)?;
    Ok(ExitCode::SUCCESS)
}

/// Zsh: the generated script completes machines and snapshots like files; it is told to ask for their names.
fn with_machines_for_zsh(script: &str) -> String {
    let has = |line: &str, arguments: &[&str]| arguments.iter().any(|name| line.contains(&format!(":{name} -- ")));
    let script = script.lines().map(|line| {
        let helper = match line {
            line if has(line, &["name", ":names", ":machine"]) => ":_catnap_machines'",
            line if has(line, &[":reference", ":references", "reference_a", "reference_b", ":snapshot"]) => {
                ":_catnap_snapshots'"
            }
            _ => ":_default'",
        };
        line.replace(":_default'", helper) + "\n"
    });
    let (head, body): (Vec<_>, Vec<_>) = script.enumerate().partition(|(number, _)| *number < 2);
    let lines = |part: Vec<(usize, String)>| part.into_iter().map(|(_, line)| line).collect::<String>();
    let helpers = "_catnap_machines() { compadd -- ${(f)\"$(catnap ps -q 2>/dev/null)\"} }\n\
                   _catnap_snapshots() { compadd -- ${(f)\"$(catnap snapshot ls --all -q 2>/dev/null)\"} }\n";
    lines(head) + helpers + &lines(body)
}
