//! Boots a machine that exists: starts its monitor and waits until the guest's agent answers.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::home::{self, House};
use super::{checks, logs, ui};
use crate::control::protocol::{Ended, Status, Stop, Wait};
use crate::control::{Client, Code, Failure};
use crate::spec::{MachineSpec, Name};
use crate::store::Machine;
use crate::sys::process::{self, Detached};

/// How many lines of a log an error shows.
pub const TAIL: usize = 15;
/// A guest that has shown nothing for so long makes KVM itself suspicious.
const SILENCE: Duration = Duration::from_secs(2);
/// How long a monitor that was told to end may take before it is killed.
const ENDING: Duration = Duration::from_secs(5);

/// How long whoever starts a machine waits for its guest.
#[derive(clap::Args)]
pub struct Patience {
    /// How many seconds a guest has until its agent answers; 0 does not wait for one
    #[arg(long = "timeout", value_name = "SECONDS", env = "CATNAP_TIMEOUT", default_value_t = 60, value_parser = clap::value_parser!(u32).range(0..=3600))]
    seconds: u32,
}

impl Patience {
    /// So many seconds.
    #[cfg(test)]
    pub fn of(seconds: u32) -> Patience {
        Patience { seconds }
    }

    /// That time.
    pub fn time(&self) -> Duration {
        Duration::from_secs(self.seconds.into())
    }
}

/// What a monitor says through its readiness pipe.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Report {
    /// The machine could not be started.
    Failed(Failure),
    /// The control socket answers and the vCPUs run.
    Ready {
        /// The monitor's process id.
        pid: u32,
    },
}

/// What a machine is started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// Its disk: it boots.
    Disk,
    /// The memory of the snapshot that it was made from: it wakes.
    Nap,
}

/// What must hold before a machine is started.
pub fn check(house: &House, spec: &MachineSpec) -> Result<(), Failure> {
    checks::memory(spec.memory)?;
    checks::ports(house, spec)?;
    checks::kvm_quickly()
}

/// The monitor of a machine that may still have to be made. It has a VM of KVM made for it meanwhile, and reads what the
/// machine wakes from; the one takes milliseconds of waiting for the kernel, and the other of waiting for the disk.
/// Dropped, for want of a machine, it ends.
pub struct Begun {
    monitor: Detached,
    from: From,
    /// Whether it has its machine, and stays.
    goes_on: bool,
}

impl Begun {
    /// Starts the monitor of the machine `name`, which is to wake from `snapshot` if that is given.
    pub fn new(name: &Name, snapshot: Option<&str>) -> Result<Begun, Failure> {
        let program = std::env::current_exe().map_err(|error| Failure::while_doing("this program's path", error))?;
        let (words, from) = match snapshot {
            None => (vec!["monitor", name.as_str()], From::Disk),
            Some(snapshot) => (vec!["monitor", name.as_str(), snapshot], From::Nap),
        };
        // Asked before the monitor asks KVM, for the answer would wait for that.
        let alone = process::cpus() == 1;
        let mut monitor = process::spawn_detached(&program, &words)
            .map_err(|error| Failure::while_doing("the monitor cannot be started", error))?;
        // A lone CPU would stay with this process. There is more for it to do while the monitor waits for KVM.
        if alone {
            monitor.wait_until_busy();
        }
        Ok(Begun { monitor, from, goes_on: false })
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if !self.goes_on {
            let _ = self.monitor.kill();
        }
    }
}

/// Starts a machine and waits until its agent answers, or with a `timeout` of zero until its vCPUs run. When that
/// fails, nothing of it runs any more.
pub fn launch(house: &House, machine: &Machine, timeout: Duration) -> Result<Status, Failure> {
    check(house, &machine.spec)?;
    go_on(house, machine, Begun::new(&machine.spec.name, None)?, timeout)
}

/// The same with a monitor that was begun before.
pub fn go_on(house: &House, machine: &Machine, mut begun: Begun, timeout: Duration) -> Result<Status, Failure> {
    // The monitor asks for the same files. Whatever must be made for that is made here, by a process that
    // does not stay, so that it does not count among the monitor's memory.
    house.files(machine)?;
    let name = &machine.spec.name;
    let console = machine.console_log()?;
    let boot = Boot {
        machine,
        client: Client::new(machine.control_socket()?),
        timeout,
        console_before: logs::length(&console),
        console,
        monitor_log: machine.monitor_log()?,
        progress: ui::Progress::begin(format!("{} {name}", begun.from.verb())),
        verb: begun.from.verb(),
    };
    begun.goes_on = true;
    begun.monitor.go_on();
    let booted = boot.ready(&mut begun.monitor).and_then(|()| match timeout {
        Duration::ZERO => Ok(boot.client.status()?),
        _ => boot.answering(),
    });
    if booted.is_err() {
        boot.end(&mut begun.monitor);
    }
    booted
}

impl From {
    fn verb(self) -> &'static str {
        match self {
            From::Disk => "Booting",
            From::Nap => "Waking",
        }
    }
}

/// A boot that is under way.
struct Boot<'a> {
    machine: &'a Machine,
    client: Client,
    timeout: Duration,
    console: PathBuf,
    console_before: u64,
    monitor_log: PathBuf,
    progress: ui::Progress,
    verb: &'static str,
}

impl Boot<'_> {
    /// Waits for the monitor's report.
    fn ready(&self, monitor: &mut Detached) -> Result<(), Failure> {
        let report = monitor.report().map_err(|error| Failure::while_doing("the monitor does not report", error))?;
        match serde_json::from_slice(&report) {
            Ok(Report::Ready { .. }) => Ok(()),
            Ok(Report::Failed(failure)) => Err(failure),
            Err(_) if process::interrupted() => Err(Failure::new(Code::Failed, "interrupted")),
            Err(_) => {
                let tail = logs::tail(&self.monitor_log, TAIL);
                let why = format!("the monitor of {} died at its start\n{}", self.machine.spec.name, tail.trim_end());
                Err(Failure::new(Code::Failed, why).hint("catnap doctor"))
            }
        }
    }

    /// Waits for the guest's agent.
    fn answering(&self) -> Result<Status, Failure> {
        let (name, begun) = (&self.machine.spec.name, Instant::now());
        let mut suspicious = true;
        loop {
            // In slices of a second, so that Ctrl-C is heard and the progress shows what the guest is at.
            let status = self.client.wait(Wait::Agent, Duration::from_secs(1));
            if process::interrupted() {
                return Err(Failure::new(Code::Failed, "interrupted"));
            }
            let status = status.map_err(|error| self.with_tail(format!("the monitor of {name} is gone ({error})")))?;
            if status.agent.is_some() {
                return Ok(status);
            }
            match status.ended {
                Some(Ended::Crash { why }) => return Err(self.with_tail(format!("{name} crashed: {why}"))),
                Some(_) => return Err(self.with_tail(format!("{name} turned itself off before its agent answered"))),
                None if begun.elapsed() >= self.timeout => {
                    let why = format!("the agent of {name} did not answer within {} seconds", self.timeout.as_secs());
                    return Err(self.with_tail(why).hint(
                        "--timeout SECONDS gives a slow host more time, and 0 does not wait: for a guest without our agent",
                    ));
                }
                None => {}
            }
            if suspicious && begun.elapsed() >= SILENCE {
                suspicious = false;
                if logs::length(&self.console) == self.console_before {
                    checks::kvm()?;
                }
            }
            self.show();
        }
    }

    /// Shows the line that the guest showed last.
    fn show(&self) {
        if self.progress.is_seen() {
            let line = logs::tail(&self.console, 1);
            let line: String = line.trim().chars().take(60).collect();
            self.progress.say(format!("{} {}: {line}", self.verb, self.machine.spec.name));
        }
    }

    fn with_tail(&self, why: String) -> Failure {
        let tail = match logs::length(&self.console) == self.console_before {
            true => String::new(),
            false => logs::tail(&self.console, TAIL),
        };
        Failure::new(
            Code::Failed,
            match tail.trim_end() {
                "" => format!("{why}; its console showed nothing"),
                tail => format!("{why}; the end of its console:\n{tail}"),
            },
        )
    }

    /// Sees to it that the monitor is gone.
    fn end(&self, monitor: &mut Detached) {
        let hasty = self.client.clone().with_patience(ENDING);
        // A monitor that failed by itself is gone already, and then neither finds anyone to speak to.
        let _ = hasty.stop(Stop { seconds: 0, force: true });
        if home::wait_until_free(self.machine, ENDING).is_err() {
            let _ = monitor.kill();
        }
    }
}
