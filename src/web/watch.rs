//! Looks at everything twice a second, and makes one JSON text of all there is to show.
//!
//! Each machine is followed by a task of its own, so that one whose monitor or guest does not answer holds up nobody
//! but itself. Nothing is looked at while no page is open.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::jobs::{Job, Jobs};
use super::kitten::{self, Figures};
use super::rows::{self, Rows};
use super::share::{self, Share};
use super::{House, MAX_MACHINES, Seen};
use crate::control::Failure;
use crate::control::protocol::{State, Status, Taken};
use crate::spec::Name;
use crate::sys::process::monotonic_us;

/// How often everything is looked at. The kitten's counter counts as often.
const PERIOD: Duration = Duration::from_millis(500);
/// What comes sooner than this after a text waits for the next.
const BREATH: Duration = Duration::from_millis(100);
/// How long a guest may take to give its figures.
const PATIENCE: Duration = Duration::from_millis(1500);
/// So many looks are remembered of each machine: two minutes.
const SAMPLES: usize = 240;
/// So many snapshots are.
const SNAPSHOTS: usize = 6;
/// Memory is counted at every so manieth look: the kernel goes through all of it.
const MEMORY_EVERY: usize = 4;
/// Ports that are offered for new machines.
const PORTS: std::ops::Range<u16> = 8081..8181;
/// The most clones that a button makes, each with a port.
const CLONES: u16 = 3;

/// What is shown, and who looks at it.
pub struct Hub {
    house: Arc<dyn House>,
    rows: PathBuf,
    /// What was run from here.
    pub jobs: Arc<Jobs>,
    machines: Mutex<BTreeMap<Name, Machine>>,
    around: Mutex<Around>,
    text: watch::Sender<Bytes>,
    arrived: Notify,
}

/// A machine as it is shown.
#[derive(Clone, Default, Serialize)]
struct Machine {
    /// What `catnap ps --json` says.
    #[serde(flatten)]
    view: Value,
    /// What its monitor says beyond that.
    #[serde(skip_serializing_if = "Option::is_none")]
    monitor: Option<Value>,
    /// Where its page is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    /// What its page says, unless it does not answer.
    kitten: Option<Figures>,
    /// What its monitor's memory is.
    share: Option<Share>,
    /// Why nothing more is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    samples: VecDeque<Sample>,
    /// The last snapshots that its monitor took, the latest last.
    snapshots: VecDeque<Taken>,
}

/// One look: when (in milliseconds of the host's monotonic clock), the counter, what was answered, vCPUs, memory in
/// bytes. A guest that did not answer has no counter.
#[derive(Clone, Copy, Serialize)]
struct Sample(u64, Option<u64>, Option<u64>, Option<u64>, Option<u64>);

/// What is no machine's.
#[derive(Clone, Default)]
struct Around {
    tree: Arc<Value>,
    version: u64,
    rows: Vec<Rows>,
    free_port: Option<u16>,
    problem: Option<String>,
}

/// The text.
#[derive(Serialize)]
struct Shown {
    now_us: u64,
    machines: Vec<Machine>,
    /// Machines that are not followed, because there are too many.
    more_machines: usize,
    /// Another number when the tree has changed.
    tree: u64,
    jobs: Vec<Job>,
    rows: Vec<Rows>,
    free_port: Option<u16>,
    problem: Option<String>,
}

impl Hub {
    /// Nothing is shown yet.
    pub fn new(house: Arc<dyn House>, rows: PathBuf) -> Arc<Hub> {
        Arc::new(Hub {
            house,
            rows,
            jobs: Arc::default(),
            machines: Mutex::default(),
            around: Mutex::default(),
            text: watch::Sender::default(),
            arrived: Notify::new(),
        })
    }

    /// The house.
    pub fn house(&self) -> &Arc<dyn House> {
        &self.house
    }

    /// The texts from now on: always the latest.
    pub fn subscribe(&self) -> watch::Receiver<Bytes> {
        let receiver = self.text.subscribe();
        self.arrived.notify_one();
        receiver
    }

    /// The tree of snapshots, as it was last seen.
    pub async fn tree(self: &Arc<Hub>) -> Arc<Value> {
        if lock(&self.around).version == 0 {
            self.look_around().await;
        }
        lock(&self.around).tree.clone()
    }

    /// The port of this host that leads to a machine's page.
    pub async fn port(&self, name: &Name) -> Result<u16, Failure> {
        let known = lock(&self.machines).get(name).and_then(|machine| machine.port);
        if let Some(port) = known {
            return Ok(port);
        }
        let (house, wanted) = (self.house.clone(), name.clone());
        let seen = run_blocking(move || house.look(&wanted)).await?;
        seen.port.ok_or_else(|| Failure::new(crate::control::Code::NotFound, format!("{name} has no page to show")))
    }

    /// Looks for ever.
    pub async fn watch(self: Arc<Hub>) {
        let mut followed = HashMap::<Name, AbortHandle>::new();
        let mut around = None::<AbortHandle>;
        loop {
            if self.text.receiver_count() == 0 {
                followed.drain().map(|(_, task)| task).chain(around.take()).for_each(|task| task.abort());
                self.arrived.notified().await;
            }
            around.get_or_insert_with(|| tokio::spawn(self.clone().follow_around()).abort_handle());
            let house = self.house.clone();
            let (mut names, problem) = match run_blocking(move || house.names()).await {
                Ok(names) => (names, None),
                Err(failure) => (Vec::new(), Some(failure.to_string())),
            };
            let more_machines = names.len().saturating_sub(MAX_MACHINES);
            names.truncate(MAX_MACHINES);
            followed.retain(|name, task| names.contains(name) || (task.abort(), false).1);
            lock(&self.machines).retain(|name, _| names.contains(name));
            for name in &names {
                followed
                    .entry(name.clone())
                    .or_insert_with(|| tokio::spawn(self.clone().follow(name.clone())).abort_handle());
            }
            self.publish(more_machines, problem);
            tokio::select! {
                () = sleep(PERIOD) => {}
                () = self.jobs.changed.notified() => sleep(BREATH).await,
            }
        }
    }

    fn publish(&self, more_machines: usize, problem: Option<String>) {
        let around = lock(&self.around).clone();
        let shown = Shown {
            now_us: monotonic_us(),
            machines: lock(&self.machines).values().cloned().collect(),
            more_machines,
            tree: around.version,
            jobs: self.jobs.list(),
            rows: around.rows,
            free_port: around.free_port,
            problem: problem.or(around.problem),
        };
        // Plain fields of our own: this cannot fail.
        let text = serde_json::to_string(&shown).unwrap_or_default();
        self.text.send_replace(Bytes::from(format!("data: {text}\n\n")));
    }

    /// Looks at what is no machine's, for ever. It may take long: a family can be large.
    async fn follow_around(self: Arc<Hub>) {
        loop {
            self.look_around().await;
            sleep(2 * PERIOD).await;
        }
    }

    async fn look_around(&self) {
        let (house, rows) = (self.house.clone(), self.rows.clone());
        let taken: Vec<u16> = lock(&self.machines).values().flat_map(ports).collect();
        let (tree, rows, free_port) = run_blocking(move || (house.tree(), rows::read(&rows), free_port(&taken))).await;
        let mut around = lock(&self.around);
        (around.rows, around.free_port) = (rows, free_port);
        match tree {
            Ok(tree) => {
                let mut hasher = DefaultHasher::new();
                tree.to_string().hash(&mut hasher);
                // The page keeps numbers of 53 bits.
                (around.version, around.tree) = ((hasher.finish() >> 11) | 1, Arc::new(tree));
                around.problem = None;
            }
            Err(failure) => around.problem = Some(failure.to_string()),
        }
    }

    /// Looks at one machine for ever.
    async fn follow(self: Arc<Hub>, name: Name) {
        let mut ticking = interval(PERIOD);
        ticking.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for round in 0usize.. {
            ticking.tick().await;
            let (house, wanted) = (self.house.clone(), name.clone());
            let seen = run_blocking(move || house.look(&wanted)).await;
            let pid = seen.as_ref().ok().and_then(|seen| Some(seen.status.as_ref()?.pid));
            let share = match pid.filter(|_| round.is_multiple_of(MEMORY_EVERY)) {
                Some(pid) => Some(run_blocking(move || share::of(pid)).await),
                None => None,
            };
            // One that stands still does not answer.
            let runs = |seen: &&Seen| seen.status.as_ref().is_some_and(|status| status.state == State::Running);
            let port = seen.as_ref().ok().filter(runs).and_then(|seen| seen.port);
            let figures = match port {
                Some(port) => kitten::figures(port, PATIENCE).await,
                None => None,
            };
            let mut machines = lock(&self.machines);
            let machine = machines.entry(name.clone()).or_default();
            machine.see(&name, seen, figures);
            match share {
                Some(share) => machine.share = share,
                None if pid.is_none() => machine.share = None,
                None => {}
            }
        }
    }
}

impl Machine {
    fn see(&mut self, name: &Name, seen: Result<Seen, Failure>, figures: Option<Figures>) {
        match seen {
            Ok(seen) => {
                self.problem = None;
                self.port = seen.port;
                self.monitor = seen.status.as_ref().map(monitor);
                let taken = seen.status.and_then(|status| status.taken);
                if let Some(taken) = taken.filter(|taken| self.snapshots.back() != Some(taken)) {
                    push(&mut self.snapshots, taken, SNAPSHOTS);
                }
                self.view = seen.view;
            }
            Err(failure) => {
                (self.port, self.monitor, self.problem) = (None, None, Some(failure.to_string()));
                self.view = json!({ "name": name, "state": "unknown" });
            }
        }
        let number = |field: &str| self.view.get(field).and_then(Value::as_u64);
        let answered = figures.as_ref().map(|figures| figures.answered.unwrap_or(figures.visits));
        let ticks = figures.as_ref().map(|figures| figures.ticks);
        let sample = Sample(monotonic_us() / 1000, ticks, answered, number("cpus"), number("memory_bytes"));
        self.kitten = figures;
        push(&mut self.samples, sample, SAMPLES);
    }
}

/// Remembers one more, and at most so many.
fn push<T>(list: &mut VecDeque<T>, next: T, most: usize) {
    if list.len() == most {
        list.pop_front();
    }
    list.push_back(next);
}

/// What a monitor says beyond what is listed.
fn monitor(status: &Status) -> Value {
    json!({
        "shape": status.shape,
        "boots": status.boots,
        "uptime_ms": status.uptime_ms,
        "taking": status.taking,
        "drives": status.ephemeral.iter().map(|drive| json!({
            "bay": drive.bay, "size": drive.size, "at": drive.at, "state": drive.state,
        })).collect::<Vec<_>>(),
    })
}

/// The ports of this host that a machine has, whether it runs or not.
fn ports(machine: &Machine) -> Vec<u16> {
    let forwards = machine.view.get("forwards").and_then(Value::as_array).into_iter().flatten();
    forwards.filter_map(|forward| u16::try_from(forward.get("host")?.as_u64()?).ok()).collect()
}

/// The first of some ports in a row that nobody has.
fn free_port(taken: &[u16]) -> Option<u16> {
    let free = |port: u16| !taken.contains(&port) && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    PORTS.into_iter().find(|first| (*first..first + CLONES).all(free))
}

/// Runs in a thread what may wait. What panics there goes on here.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The dashboard ends, and with it whoever waits here.
            Err(_) => std::future::pending().await,
        },
    }
}

/// The same, for so long.
pub async fn run_bounded<T: Send + 'static>(time: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    timeout(time, run_blocking(work)).await.ok()
}

/// Each change is one assignment, so that a thread that panicked leaves nothing half made.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
