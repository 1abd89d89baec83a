//! `catnap run`: makes a machine from an image and boots it.

use std::io;
use std::path::{Path, PathBuf};

use super::fit::new_machine_id;
use super::home::House;
use super::sizes::{self, host_cpus};
use super::{Outcome, checks, console, cpu, disk, image, launch, start, ui};
use crate::archive;
use crate::boot;
use crate::control::{Code, Failure};
use crate::oci::Reference;
use crate::spec::{
    Baseline, Ephemeral, Flavor, Forward, MachineSpec, Name, Setting, Size, default_max_cpus, default_max_memory,
};
use crate::store::{self, Machine, Snapshot};
use crate::sys::process;

/// Make a machine from an image and boot it
#[derive(clap::Args)]
#[command(after_help = "\
Returns when the guest's agent answers, and prints the machine's name and where its ports are to be found.
When that fails or is interrupted, nothing stays behind. The image `kitten` is made on first use.

Sizes are written 512M or 2G (binary). --cpus and --memory are where the machine begins; --max-cpus and
--max-memory bound every size that it can wake with or be resized to, until it is made anew.

Examples:
  catnap run kitten
  catnap run kitten --name anna --cpus 2 --memory 512M -p 8080:80
  catnap run kitten --name anna --ephemeral 64M:/mnt
  catnap run kitten --name ben --set colour=grey --set title='Ben’s kitten' --cpu-baseline x86-64-v2
  catnap run kitten --kernel ./bzImage --append 'loglevel=7' --attach")]
pub struct Args {
    /// The image: a name, sha256: and some digits (`catnap image ls`), or a FILE.catnap or REGISTRY/REPO:TAG, which is
    /// brought here
    #[arg(value_name = "IMAGE")]
    image: String,
    /// The machine's name [default: a free one, such as kitten-1]
    #[arg(short, long)]
    name: Option<Name>,
    /// A size by name: kitten (1 vCPU, 256M), cat (2, 512M) or tiger (4, 1G)
    #[arg(long, value_name = "NAME", value_parser = sizes::flavors(), hide_possible_values = true, conflicts_with_all = ["cpus", "memory"])]
    flavor: Option<Flavor>,
    /// How many vCPUs [default: 1]
    #[arg(short, long, value_name = "N")]
    cpus: Option<u32>,
    /// How much memory [default: 256M]
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<Size>,
    /// The most vCPUs that it can ever wake with [default: this host's, 4 to 16]
    #[arg(long, value_name = "N")]
    max_cpus: Option<u32>,
    /// The most memory that it can ever wake with [default: half of this host's, 16G at most]
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<Size>,
    /// Bring a TCP port of the guest to a port of this host's loopback; can be given several times
    #[arg(short = 'p', long = "publish", value_name = "HOST:GUEST")]
    forwards: Vec<Forward>,
    /// A blank disk in this host's memory, mounted on PATH [default: /mnt]: in no snapshot, and gone when the machine
    /// stops or the host restarts; can be given twice
    #[arg(long, value_name = "SIZE[:PATH]")]
    ephemeral: Vec<Ephemeral>,
    /// Set something of its site: colour (ginger, grey, black, cream, brown, blue) or title; can be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<Setting>,
    /// Show the guest no more of this host's CPU than all CPUs of a level have, so that its snapshots wake on others:
    /// x86-64-v2, x86-64-v3, or host
    #[arg(long, value_name = "LEVEL", default_value_t = Baseline::Host)]
    cpu_baseline: Baseline,
    /// A kernel of your own (bzImage or ELF) in place of the image's; it is copied
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    append: String,
    /// Join the console once it has booted
    #[arg(short, long)]
    attach: bool,
    /// Print what the machine is then as JSON
    #[arg(long, conflicts_with = "attach")]
    json: bool,
    #[command(flatten)]
    patience: launch::Patience,
    /// Speak to a registry elsewhere without encryption
    #[arg(long)]
    plain_http: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    process::catch_interrupts();
    let house = House::open()?;
    let first = match &args.name {
        Some(name) => name.clone(),
        None => numbered(&args.image, 1)?,
    };
    let flavor = args.flavor.unwrap_or(Flavor::Kitten);
    let (cpus, memory) = (args.cpus.unwrap_or(flavor.cpus()), args.memory.unwrap_or(flavor.memory()));
    let (host_memory, _) = checks::host_memory().map_err(|error| Failure::while_doing("/proc/meminfo", error))?;
    let mut spec = MachineSpec {
        max_cpus: args.max_cpus.unwrap_or_else(|| default_max_cpus(host_cpus(), cpus)),
        max_memory: args.max_memory.unwrap_or_else(|| default_max_memory(host_memory, memory)),
        append: args.append,
        kernel: args.kernel,
        forwards: args.forwards,
        ephemeral: args.ephemeral,
        settings: Setting::gather(&args.settings),
        cpu_baseline: args.cpu_baseline,
        ..MachineSpec::new(first, "", cpus, memory)
    };
    // What can be refused is refused before anything is made.
    spec.check().map_err(|error| Failure::new(Code::Usage, error.to_string()).hint("catnap run --help"))?;
    if args.name.is_some() && house.store().machine(&spec.name).is_ok() {
        return Err(store::Error::MachineTaken(spec.name).into());
    }
    spec.kernel.as_deref().map_or(Ok(()), check_kernel)?;
    cpu::reaches(spec.cpu_baseline)?;
    sizes::warn_of_many(spec.cpus);
    launch::check(&house, &spec)?;

    let image = image::find_or_make(&house, &args.image, args.plain_http)?;
    if process::interrupted() {
        return Err(Failure::new(Code::Failed, "interrupted"));
    }
    // The disk was a machine's, and this is another one. That of a base image has no identity yet.
    spec.machine_id = image.manifest.machine.is_some().then(new_machine_id).transpose()?;
    let machine = match &args.name {
        Some(_) => house.store().create_machine(&spec, &image)?,
        None => create_numbered(&house, spec, &args.image, &image)?,
    };
    let launched = launch::launch(&house, &machine, args.patience.time());
    let status = launched.inspect_err(|_| {
        if let Err(error) = house.store().remove_machine(&machine.spec.name) {
            ui::warn(format!("{} could not be removed: {error}", machine.spec.name));
        }
    })?;
    disk::tell(&machine.spec.name, &status);
    match args.json {
        true => ui::json(&house.view(&machine)?)?,
        false => ui::data(start::announcement(&machine.spec))?,
    }
    match args.attach {
        true => console::attach(&house, &machine.spec.name),
        false => Ok(std::process::ExitCode::SUCCESS),
    }
}

/// A friendly name for a machine of this image.
fn numbered(image: &str, number: u32) -> Result<Name, Failure> {
    let file = image.strip_suffix(archive::SUFFIX).map(|path| path.rsplit('/').next().unwrap_or_default().to_owned());
    let repository = || Some(image.parse::<Reference>().ok()?.repository.rsplit('/').next()?.to_owned());
    let base = file.or_else(repository).unwrap_or(image.into());
    let base = base.split('@').next().filter(|base| base.parse::<Name>().is_ok() && base.len() < 50);
    let base = base.unwrap_or("machine");
    format!("{base}-{number}").parse::<Name>().map_err(|error| Failure::new(Code::Usage, error.to_string()))
}

/// Makes a machine with the first number that is free, also when others are making some at the same time.
fn create_numbered(
    house: &House,
    mut spec: MachineSpec,
    reference: &str,
    image: &Snapshot,
) -> Result<Machine, Failure> {
    for number in 1.. {
        spec.name = numbered(reference, number)?;
        match house.store().create_machine(&spec, image) {
            Err(store::Error::MachineTaken(_)) => {}
            other => return Ok(other?),
        }
    }
    Err(Failure::new(Code::Failed, "there are too many machines"))
}

/// Whether a file is a kernel, so that a mistake costs nothing.
fn check_kernel(path: &Path) -> Result<(), Failure> {
    boot::check_kernel(path).map_err(|error| {
        let code = match &error {
            boot::Error::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Code::NotFound,
            boot::Error::NotAKernel { .. } => Code::Usage,
            _ => Code::Failed,
        };
        Failure::new(code, error.to_string()).hint("--kernel takes a bzImage or an ELF vmlinux")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_without_a_name_are_called_after_their_image() {
        let names = [
            "kitten",
            "anna@monday",
            "sha256:abcd",
            "../x",
            "../anna@x.catnap",
            ".catnap",
            "localhost:5000/cats/anna:monday",
        ]
        .map(|image| numbered(image, 2).unwrap().to_string());
        assert_eq!(names, ["kitten-2", "anna-2", "machine-2", "machine-2", "anna-2", "machine-2", "anna-2"]);
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        assert_eq!(check_kernel(&path).unwrap_err().code, Code::NotFound);
        std::fs::write(&path, "#!/bin/sh").unwrap();
        assert_eq!(check_kernel(&path).unwrap_err().code, Code::Usage);
        let failure = check_kernel(folder.path()).unwrap_err();
        assert!(failure.error.contains(folder.path().to_str().unwrap()), "{failure}");
    }
}
