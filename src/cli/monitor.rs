//! `catnap monitor MACHINE [SNAPSHOT]`, not for people: the process that is a machine. `run`, `start`
//! and `restore` start it, detached; it reports through its standard output when the machine runs, and lives
//! until the guest has ended.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use catnap_guest::protocol::Identity;

use super::home::House;
use super::launch::Report;
use super::record::Record;
use crate::control::api::Api;
use crate::control::host::Host;
use crate::control::protocol::{Ended, Stop, Wait};
use crate::control::server::{Limits, Server};
use crate::control::{Code, Failure, Keeper};
use crate::disk;
use crate::machine::{self, Bare, Files, Folders, Machine, Media, Origin, Size, Wakeup};
use crate::spec::Name;
use crate::store::{self, RunLock, Store};
use crate::sys::limits;
use crate::sys::process::{self, Signals};
use crate::sys::program;

/// How long a guest may take to shut down when the monitor is told to end (SIGTERM).
const SHUTDOWN: u32 = 30;
/// How long the notes of the start may take to be on the disk, for the guest's sake.
const NOTES: Duration = Duration::from_secs(1);
/// How long a guest may take until the monitor lets go of what the start needed.
const START_UP: Duration = Duration::from_secs(300);
/// How long those take who have waited for the guest.
const FIRST_VISITS: Duration = Duration::from_secs(1);
/// How long answers that are under way may take to get out at the end.
const FAREWELL: Duration = Duration::from_secs(2);

/// Is the monitor of the machine `name` until its guest has ended; gives the process's exit code. With `nap`, a
/// snapshot's digest, the machine wakes in place of booting.
pub fn main(name: &str, nap: Option<&str>) -> ExitCode {
    let detached = process::detach().map_err(|error| Failure::while_doing("the root folder", error));
    // Before any thread starts: all of them leave these signals to the one that waits for them.
    let signals = Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP]);
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_target(false).init();
    let signals = signals.map_err(|error| Failure::while_doing("signals", error));
    match detached.and(signals).and_then(|signals| be(name, nap, signals)) {
        Ok(Ended::Crash { why }) => {
            tracing::error!("the guest crashed: {why}");
            ExitCode::from(Code::Failed as u8)
        }
        Ok(ended) => {
            tracing::info!("the guest has ended: {ended:?}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            tracing::error!("{failure}");
            ExitCode::from(failure.code as u8)
        }
    }
}

fn be(name: &str, nap: Option<&str>, signals: Signals) -> Result<Ended, Failure> {
    let name = name.parse::<Name>().map_err(|error| Failure::new(Code::Usage, error.to_string()));
    let started = name.and_then(|name| start(&name, nap));
    let reported = report(match &started {
        Ok(_) => Report::Ready { pid: std::process::id() },
        Err(failure) => Report::Failed(failure.clone()),
    });
    // Why it did not start comes before that nobody was there to hear it.
    let started = started?;
    reported?;
    Ok(started.attend(signals))
}

fn report(report: Report) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::while_doing("the readiness report", error);
    let line = serde_json::to_string(&report).map_err(|error| failed(error.into()))? + "\n";
    process::end_report(line.as_bytes()).map_err(failed)
}

/// A machine that runs, with all that belongs to it.
struct Monitor {
    store: Store,
    stored: store::Machine,
    files: Files,
    host: Arc<Host>,
    machine: Arc<Machine>,
    media: Arc<Media>,
    server: Server,
    record: Record,
    /// Held for as long as this process lives: that is how others know.
    lock: RunLock,
}

/// What a machine is built from, with all that must be there before.
struct Prepared {
    store: Store,
    stored: store::Machine,
    lock: RunLock,
    files: Files,
    host: Arc<Host>,
    server: Server,
    origin: Result<(Origin, Arc<Media>), Failure>,
}

/// Builds and starts everything.
fn start(name: &Name, nap: Option<&str>) -> Result<Monitor, Failure> {
    limits::one_heap();
    let (bare, prepared) = Bare::new_while(|| prepare(name, nap)).map_err(machine::Error::from)?;
    let Prepared { store, stored, lock, files, host, server, origin } = prepared?;
    let built = origin.and_then(|(origin, media)| {
        let bare = bare.map_err(machine::Error::from)?;
        let machine = Machine::new(&stored.spec, &files, &media, origin, bare)?;
        // A woken machine is told its size before it runs, so that it has that before it serves anybody.
        let size = Size { cpus: stored.spec.cpus, memory: stored.spec.memory.bytes() };
        let asked = nap.map(|_| machine.ask_at_wake(size)).transpose()?;
        host.start(&machine)?;
        Ok((asked, machine, media))
    });
    let (asked, machine, media) = match built {
        Ok(built) => built,
        Err(failure) => {
            server.close(Duration::ZERO);
            return Err(failure);
        }
    };
    if nap.is_some() {
        let hostname = name.to_string();
        let identity = stored.spec.machine_id.clone().map(|machine_id| Identity { machine_id, hostname });
        let wakeup = Wakeup { identity, settings: stored.spec.settings.clone(), asked };
        machine.tell_agent(wakeup).map_err(|error| Failure::while_doing("the waker", error))?;
    }
    lock.started()?;
    let record = Record::begin();
    record.write_soon(&stored.dir).map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
    tracing::info!("{name} runs with {} vCPUs and {} of memory", stored.spec.cpus, stored.spec.memory);
    Ok(Monitor { store, stored, files, host, machine, media, server, record, lock })
}

/// Reads what the machine wakes from; when that machine is there, takes it and opens its control socket.
fn prepare(name: &Name, nap: Option<&str>) -> Result<Prepared, Failure> {
    // By now another thread asks KVM for a VM, or is about to.
    process::busy();
    let house = House::open()?;
    let origin = match nap {
        None => Ok(Origin::Boot),
        Some(snapshot) => house.saved(snapshot).map(|saved| Origin::Wake(Box::new(saved))),
    };
    if !process::wait_for_word() {
        return Err(Failure::new(Code::Failed, "whoever started this monitor has gone away"));
    }
    let stored = house.machine(name)?;
    process::log_to(&stored.monitor_log()?).map_err(|error| Failure::while_doing("the monitor's log", error))?;
    let lock = stored.lock()?;
    // What an earlier monitor left half done when it was killed.
    disk::tidy(&stored.disk()).map_err(Failure::from)?;
    limits::raise_open_files().map_err(|error| Failure::while_doing("the limit of open files", error))?;
    let files = house.files(&stored)?;
    let keeper = Keeper { store: house.store().clone(), machine: stored.clone(), files: files.clone() };
    let host = Arc::new(Host::new(stored.spec.clone(), Some(keeper)));
    // Before the machine is built, so that those who ask meanwhile hear that it is starting.
    let path = stored.control_socket()?;
    let socket = |error| Failure::while_doing(format!("the control socket {}", path.display()), error);
    let (server, listener) = Server::bind(&path).map_err(socket)?;
    server.serve(listener, Limits::default(), Arc::new(Api(Arc::clone(&host)))).map_err(socket)?;
    let origin = origin.and_then(|origin| {
        if let Origin::Wake(saved) = &origin {
            saved.check_files()?;
        }
        // What a killed monitor left behind.
        stored.sweep_media()?;
        let (asked, wanted) = (stored.clone(), &stored.spec.ephemeral);
        let folders: Folders = Box::new(move || asked.media_folders());
        let media = match &origin {
            Origin::Boot => Media::blank(folders, wanted),
            Origin::Wake(saved) => Media::woken(folders, &saved.media(), wanted),
        };
        Ok((origin, media.map_err(machine::Error::from)?))
    });
    Ok(Prepared { store: house.store().clone(), stored, lock, files, host, server, origin })
}

impl Monitor {
    /// Stays until the guest has ended.
    fn attend(self, signals: Signals) -> Ended {
        let host = Arc::clone(&self.host);
        // When no thread can be had, signals stay unheard; `catnap stop` works all the same.
        let _ = thread::Builder::new().name("signals".into()).stack_size(64 * 1024).spawn(move || {
            heed(&signals, &host);
        });
        // Nobody waits for it.
        let (store, stored, host) = (self.store.clone(), self.stored.clone(), Arc::clone(&self.host));
        let tidy = move || tidy(&store, &stored, &host);
        let _ = thread::Builder::new().name("tidy".into()).stack_size(64 * 1024).spawn(tidy);
        let ended = self.host.run(self.machine, || {
            tracing::info!("the guest reboots");
            // It may have been resized since.
            let spec = House::open()?.machine(&self.stored.spec.name)?.spec;
            let bare = Bare::new().map_err(machine::Error::from)?;
            Ok(Machine::new(&spec, &self.files, &self.media, Origin::Boot, bare)?)
        });
        self.media.wipe();
        self.stored.leave_media_folders();
        // First the truth is noted, then those who wait for the end are let go. Without the first half nothing is said to
        // have ended well: then it counts as killed.
        let noted = self.record.end(ended.clone()).write(&self.stored.dir).map_err(Into::into);
        if let Err(error) = noted.and_then(|()| self.lock.ended()) {
            tracing::error!("{error}");
        }
        // What was taken while it ran is not given up because it runs no more.
        self.host.end_work();
        self.server.close(FAREWELL);
        ended
    }
}

/// Has the notes of the start on the disk; once the guest is up, removes what killed monitors have left half done in the
/// store, and lets go of the memory that only the start needed.
fn tidy(store: &Store, stored: &store::Machine, host: &Host) {
    // On a host with few CPUs the guest would have to wait for it.
    host.wait(Wait::Agent, NOTES);
    if let Err(error) = stored.settle_run().and_then(|()| Ok(Record::settle(&stored.dir)?)) {
        tracing::warn!("that this machine runs is perhaps not known after a power cut: {error}");
    }
    host.wait(Wait::Agent, START_UP);
    match store.sweep() {
        Ok(0) => {}
        Ok(swept) => tracing::info!("{swept} half-made things were left in the store, and are removed"),
        Err(error) => tracing::warn!("what is left half made in the store stays: {error}"),
    }
    // Once for what the start needed, and once for what the first to come needed, who wait for the agent too.
    for pause in [Duration::ZERO, FIRST_VISITS] {
        thread::sleep(pause);
        if let Err(error) = program::give_back_text() {
            tracing::debug!("the program's pages stay in memory: {error}");
        }
    }
}

/// The first signal presses the power button and gives the guest time; the next pulls the plug.
fn heed(signals: &Signals, host: &Arc<Host>) {
    let mut seconds = SHUTDOWN;
    loop {
        let signal = signals.wait();
        tracing::info!("signal {signal}: the guest has {seconds} seconds to shut down");
        let (host, stop) = (Arc::clone(host), Stop { seconds, force: true });
        let _ = thread::Builder::new().name("shutdown".into()).spawn(move || {
            if let Err(failure) = host.stop(stop) {
                tracing::error!("{failure}");
            }
        });
        seconds = 0;
    }
}
