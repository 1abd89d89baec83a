//! `catnap completion`: what a shell needs to complete verbs, options, and the names of machines.

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, Outcome, ui};

/// Print a script that teaches a shell to complete
#[derive(clap::Args)]
#[command(after_help = "\
Completes verbs, options and the names of machines.

Examples:
  bash:  source <(catnap completion bash)                         in ~/.bashrc
  zsh:   catnap completion zsh > ~/.zfunc/_catnap                 with ~/.zfunc in fpath
  fish:  catnap completion fish > ~/.config/fish/completions/catnap.fish")]
pub struct Args {
    /// The shell
    #[arg(value_parser = clap::value_parser!(Shell))]
    shell: Shell,
}

/// Bash: where the generated function has nothing to offer for a verb that takes machines, their names.
const BASH: &str = r#"
_catnap_with_machines() {
    _catnap "$@"
    case "${COMP_WORDS[1]}" in
        inspect|start|stop|rm|logs|console|exec|pause|resume)
            if [[ "${COMP_WORDS[COMP_CWORD]}" != -* ]]; then
                COMPREPLY=($(compgen -W "$(catnap ps -q 2>/dev/null)" -- "${COMP_WORDS[COMP_CWORD]}"))
            fi ;;
    esac
}
complete -F _catnap_with_machines -o nosort -o bashdefault -o default catnap
"#;

/// Fish: a rule beside the generated ones.
const FISH: &str = r#"
complete -c catnap -f -n "__fish_seen_subcommand_from inspect start stop rm logs console exec pause resume" -a "(catnap ps -q 2>/dev/null)"
"#;

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "catnap", &mut script);
    let mut script = String::from_utf8_lossy(&script).into_owned();
    match args.shell {
        Shell::Bash => script += BASH,
        Shell::Fish => script += FISH,
        Shell::Zsh => script = with_machines_for_zsh(&script),
        _ => {}
    }
    ui::data(script)?;
    Ok(ExitCode::SUCCESS)
}

/// Zsh: the generated script completes machines like files; it is told to ask for their names.
fn with_machines_for_zsh(script: &str) -> String {
    let script = script.lines().map(|line| match line.contains(":name -- ") || line.contains("::names -- ") {
        true => line.replace(":_default'", ":_catnap_machines'") + "\n",
        false => line.to_owned() + "\n",
    });
    let (head, body): (Vec<_>, Vec<_>) = script.enumerate().partition(|(number, _)| *number < 2);
    let lines = |part: Vec<(usize, String)>| part.into_iter().map(|(_, line)| line).collect::<String>();
    let helper = "_catnap_machines() { compadd -- ${(f)\"$(catnap ps -q 2>/dev/null)\"} }\n";
    lines(head) + helper + &lines(body)
}
