//! The vCPUs of one machine and their threads.
//!
//! ```text
//!            Team::resume           Team::pause
//!   Paused ─────────────► Running ─────────────► Paused
//!      │   Team::resume      │
//!      └────────► Ended ◄────┘   Switch::end, or a vCPU that cannot go on
//! ```
//!
//! Invariants: every thread is either in guest mode with its vCPU's lock held, or parked without it; once
//! `Ended`, nothing runs again. A thread counts itself `parked` under the same mutex that holds the order,
//! so that `pause` returns only when all of them stand still.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::vcpu::Left;
use super::{Error, Io, Vcpu};
use crate::sys::kick;
use crate::sys::thread::small;

/// How a machine came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest turned itself off.
    PowerOff,
    /// The guest wants to start again.
    Reboot,
    /// It was stopped from outside.
    Stopped,
    /// It cannot go on, and why.
    Crash(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Order {
    Pause,
    Run,
    End(End),
}

struct Orders {
    order: Order,
    /// How many threads are parked, or have left.
    parked: usize,
}

/// What the threads of a team share with those who give the orders.
struct Shared {
    orders: Mutex<Orders>,
    changed: Condvar,
    /// Filled once, before any thread is let out of `Pause`.
    threads: Mutex<Vec<(Arc<Vcpu>, JoinHandle<()>)>>,
}

/// Ends a machine from wherever its end is noticed: a device, a signal, a request. Made before the team, so
/// that devices can be wired to it.
#[derive(Clone)]
pub struct Switch(Arc<Shared>);

/// All vCPUs of a machine.
pub struct Team {
    vcpus: Vec<Arc<Vcpu>>,
    shared: Arc<Shared>,
}

impl Switch {
    /// A switch for one machine, which is paused.
    #[allow(clippy::new_without_default, reason = "a default switch would hide that it belongs to one machine")]
    pub fn new() -> Switch {
        Switch(Arc::new(Shared {
            orders: Mutex::new(Orders { order: Order::Pause, parked: 0 }),
            changed: Condvar::new(),
            threads: Mutex::default(),
        }))
    }

    /// Ends the machine: no vCPU runs again. The first end stands; those that follow from it do not cover it.
    pub fn end(&self, end: End) {
        self.0.end(end);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, orders: MutexGuard<'a, Orders>) -> MutexGuard<'a, Orders> {
        self.changed.wait(orders).unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<(Arc<Vcpu>, JoinHandle<()>)>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> bool {
        self.lock().order == Order::Run
    }

    fn end(&self, end: End) {
        let mut orders = self.lock();
        if !matches!(orders.order, Order::End(_)) {
            orders.order = Order::End(end);
        }
        drop(orders);
        self.changed.notify_all();
        self.kick();
    }

    /// Brings every vCPU out of guest mode, to look at its orders.
    fn kick(&self) {
        for (vcpu, _) in self.threads().iter() {
            vcpu.kick();
        }
    }
}

impl Team {
    /// Gives every vCPU a thread; all of them are paused.
    pub fn new(vcpus: Vec<Vcpu>, io: Arc<dyn Io>, switch: Switch) -> Result<Team, Error> {
        kick::install().map_err(Error::Thread)?;
        let team = Team { vcpus: vcpus.into_iter().map(Arc::new).collect(), shared: switch.0 };
        for vcpu in &team.vcpus {
            let (mine, shared, io) = (vcpu.clone(), team.shared.clone(), io.clone());
            let thread = small(&format!("vcpu {}", vcpu.id()))
                .spawn(move || work(&mine, &shared, &*io))
                .map_err(Error::Thread)?;
            team.shared.threads().push((vcpu.clone(), thread));
        }
        Ok(team)
    }

    /// The vCPUs, in the order of their numbers.
    pub fn vcpus(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    /// Lets the vCPUs run. `false` when the machine has ended.
    pub fn resume(&self) -> bool {
        self.vcpus.iter().for_each(|vcpu| vcpu.excuse_pause());
        self.order(Order::Run)
    }

    /// Stops the vCPUs and returns when all of them stand still. `false` when the machine has ended.
    pub fn pause(&self) -> bool {
        let going_on = self.order(Order::Pause);
        self.shared.kick();
        let mut orders = self.shared.lock();
        while orders.parked < self.vcpus.len() {
            orders = self.shared.wait(orders);
        }
        going_on && !matches!(orders.order, Order::End(_))
    }

    /// How the machine ended, if it has.
    pub fn ended(&self) -> Option<End> {
        match &self.shared.lock().order {
            Order::End(end) => Some(end.clone()),
            _ => None,
        }
    }

    /// Whether the vCPUs are running.
    pub fn running(&self) -> bool {
        self.shared.running()
    }

    /// Blocks until the machine has ended and no vCPU runs any more.
    pub fn wait(&self) -> End {
        let mut orders = self.shared.lock();
        loop {
            match &orders.order {
                Order::End(end) if orders.parked == self.vcpus.len() => return end.clone(),
                _ => orders = self.shared.wait(orders),
            }
        }
    }

    fn order(&self, order: Order) -> bool {
        let mut orders = self.shared.lock();
        if matches!(orders.order, Order::End(_)) {
            return false;
        }
        orders.order = order;
        self.shared.changed.notify_all();
        true
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.end(End::Stopped);
        let threads: Vec<_> = self.shared.threads().drain(..).collect();
        for (_, thread) in threads {
            // A vCPU thread that panicked has nothing left to tell; the panic itself is in the log.
            let _ = thread.join();
        }
    }
}

/// A vCPU thread's whole life.
fn work(vcpu: &Vcpu, shared: &Shared, io: &dyn Io) {
    /// Counts the thread as parked even if it panics, so that nobody waits for it for ever.
    struct Leave<'a>(&'a Shared);
    impl Drop for Leave<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.end(End::Crash("a vCPU's thread panicked: see the monitor's log".into()));
            }
            self.0.lock().parked += 1;
            self.0.changed.notify_all();
        }
    }
    let _leave = Leave(shared);
    vcpu.belongs_to_this_thread();
    loop {
        let mut orders = shared.lock();
        orders.parked += 1;
        shared.changed.notify_all();
        while orders.order == Order::Pause {
            orders = shared.wait(orders);
        }
        orders.parked -= 1;
        if matches!(orders.order, Order::End(_)) {
            return;
        }
        drop(orders);
        match vcpu.run(io, || !shared.running()) {
            Left::Kicked => {}
            Left::Ended(end) => return shared.end(end),
        }
    }
}
