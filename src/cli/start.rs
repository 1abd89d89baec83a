//! `catnap start`: boots machines that exist and do not run.

use super::home::House;
use super::{Outcome, console, disk, launch};
use crate::control::{Code, Failure};
use crate::spec::{MachineSpec, Name};
use crate::sys::process;

/// Boot stopped machines again
#[derive(clap::Args)]
#[command(after_help = "\
A machine boots from its own disk, with the kernel, size and ports that it was made with.

Examples:
  catnap start anna
  catnap start --attach anna")]
pub struct Args {
    /// Join the console once it has booted
    #[arg(short, long)]
    attach: bool,
    /// Print what the machines are then as JSON
    #[arg(long, conflicts_with = "attach")]
    json: bool,
    #[command(flatten)]
    patience: launch::Patience,
    /// The machines
    #[arg(value_name = "MACHINE", required = true)]
    names: Vec<Name>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    if args.attach && args.names.len() > 1 {
        return Err(Failure::new(Code::Usage, "only one console can be joined").hint("name one machine with --attach"));
    }
    let house = House::open()?;
    process::catch_interrupts();
    let outcome = super::each_machine(&house, &args.names, args.json, |name| {
        let machine = house.machine(name)?;
        if machine.is_running()? {
            return Err(Failure::new(Code::Refused, format!("{name} runs already")).hint("catnap ps"));
        }
        house.image(&machine.spec.image)?;
        let status = launch::launch(&house, &machine, args.patience.time())?;
        disk::tell(name, &status);
        Ok(announcement(&machine.spec))
    })?;
    match args.names.as_slice() {
        [name] if args.attach && outcome == std::process::ExitCode::SUCCESS => console::attach(&house, name),
        _ => Ok(outcome),
    }
}

/// A machine's name, and where its ports are to be found.
pub fn announcement(spec: &MachineSpec) -> String {
    let urls = spec.forwards.iter().map(|forward| format!("http://127.0.0.1:{}/\n", forward.host));
    format!("{}\n{}", spec.name, urls.collect::<String>())
}
