//! The machine that scrubs: made for one disk, in this process, and gone with it.
//!
//! It boots the snapshot's own kernel with this Catnap's guest program, has the disk in it and does not run on it. So
//! a filesystem that may come from a stranger is changed by a kernel in a machine and by nothing of this host, its
//! journal is played back, and its blocks are freed by who knows best how.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use catnap_guest::protocol::{Reply, Request, Scrubbed, read_line, write_line};

use crate::cli::home::{COMMAND_LINE, House};
use crate::cli::{launch, logs};
use crate::control::{Code, Failure};
use crate::image;
use crate::machine::{self, Bare, Files, Machine, Media, Origin, State};
use crate::snapshot::Role;
use crate::spec::{MachineSpec, Size};
use crate::store::{Snapshot, Staging};
use crate::sys::files::read_bounded;
use crate::sys::process;

/// How long it may take until its agent answers.
const BOOT: Duration = Duration::from_secs(120);
/// How often it is seen whether anybody still wants it.
const GLANCE: Duration = Duration::from_millis(200);
/// The largest initramfs, in bytes.
const MAX_INITRD: u64 = 512 << 20;
/// The file of the disk, in the staging folder.
const DISK: &str = "root.qcow2";

/// Removes from a snapshot's disk what `patterns` match. The disk that is left lies over the snapshot's, in `staging`.
pub fn scrub(
    house: &House,
    snapshot: &Snapshot,
    staging: &Staging,
    patterns: Vec<String>,
) -> Result<(PathBuf, Scrubbed), Failure> {
    let disk = staging.dir().join(DISK);
    snapshot.lay_over(&disk, None)?;
    let (spec, files) = parts(house, snapshot, staging, &disk)?;
    let log = files.console_log.clone();
    let bare = Bare::new().map_err(machine::Error::from)?;
    let media = Media::blank(Box::new(Vec::new), &[]).map_err(machine::Error::from)?;
    let machine = Machine::new(&spec, &files, &media, Origin::Boot, bare)?;
    let done = machine.start().map_err(Failure::from).and_then(|()| work(&machine, Request::Scrub { patterns }));
    machine.stop();
    machine.wait();
    let scrubbed = done.map_err(|failure| with_tail(failure, &log))?;
    Ok((disk, scrubbed))
}

/// What the machine is made from.
fn parts(
    house: &House,
    snapshot: &Snapshot,
    staging: &Staging,
    disk: &std::path::Path,
) -> Result<(MachineSpec, Files), Failure> {
    let failed = |error: crate::sys::files::Error| Failure::new(Code::Failed, error.to_string());
    let no_kernel = || Failure::new(Code::Verify, format!("{} has no kernel to boot with", snapshot.manifest.name));
    let initrd = match snapshot.file(Role::Initrd) {
        Some(path) => image::with_this_guest(read_bounded(&path, MAX_INITRD).map_err(failed)?),
        None => image::without_modules(),
    };
    // The kernel has it twice while it unpacks it.
    let memory = Size((256 << 20) + (initrd.len() as u64 * 3).next_multiple_of(2 << 20));
    let path = staging.dir().join("initrd");
    std::fs::write(&path, initrd).map_err(|error| Failure::while_doing(path.display(), error))?;
    let name = "scrub".parse().map_err(|error| Failure::while_doing("a name", error))?;
    let spec = MachineSpec::new(name, &snapshot.digest.to_string(), 1, memory);
    let files = Files {
        kernel: snapshot.file(Role::Kernel).ok_or_else(no_kernel)?,
        initrd: Some(path),
        disk: disk.into(),
        disk_root: house.store().root().into(),
        cmdline: format!("{COMMAND_LINE} catnap.root=none"),
        console_log: staging.dir().join("console.log"),
        wipe: true,
    };
    Ok((spec, files))
}

/// Waits for the agent, asks it, and waits for its answer; ends early when nobody wants it any more.
fn work(machine: &Arc<Machine>, request: Request) -> Result<Scrubbed, Failure> {
    let begun = Instant::now();
    while machine.hello(GLANCE).is_none() {
        go_on(machine)?;
        if begun.elapsed() >= BOOT {
            return Err(Failure::new(Code::Failed, "the machine that scrubs did not boot"));
        }
    }
    let unheard = |error| Failure::while_doing("the machine that scrubs does not answer", error);
    let mut stream = machine.agent().map_err(unheard)?;
    write_line(&mut stream, &request).map_err(unheard)?;
    // However long it takes: whether the machine still runs is seen meanwhile.
    let answer = thread::Builder::new().name("answer".into()).spawn(move || read(stream)).map_err(unheard)?;
    while !answer.is_finished() {
        go_on(machine)?;
        thread::sleep(Duration::from_millis(10));
    }
    match answer.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())).map_err(unheard)? {
        Reply::Scrubbed(scrubbed) => Ok(scrubbed),
        Reply::Error(why) => Err(Failure::new(Code::Failed, format!("not all could be removed: {why}"))
            .hint("boot it with catnap restore --cold, and see to it there")),
        other => Err(Failure::new(Code::Failed, format!("the machine that scrubs says {other:?}"))),
    }
}

fn read(mut stream: UnixStream) -> io::Result<Reply> {
    read_line(&mut stream)
}

/// Whether there is any sense in going on.
fn go_on(machine: &Machine) -> Result<(), Failure> {
    match machine.state() {
        _ if process::interrupted() => Err(Failure::new(Code::Failed, "interrupted")),
        State::Ended(end) => Err(Failure::new(Code::Failed, format!("the machine that scrubs ended: {end:?}"))),
        State::Running | State::Paused => Ok(()),
    }
}

fn with_tail(failure: Failure, console: &std::path::Path) -> Failure {
    match logs::tail(console, launch::TAIL).trim_end() {
        "" => failure,
        tail => Failure { error: format!("{}; the end of its console:\n{tail}", failure.error), ..failure },
    }
}
