//! The thread that works for one device, or for several that have little to do: asleep until a doorbell or the device's own descriptor rings, then
//! through the gate, under the device's lock, for one turn.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use libc::EFD_NONBLOCK;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::gate::Gate;
use super::mmio::Mmio;
use crate::sys::thread::small;

/// A running thread. Dropped, it is stopped and waited for, so nobody may hold the device's lock then.
pub struct Worker {
    thread: Option<JoinHandle<()>>,
    stop: Arc<Stop>,
    gate: Arc<Gate>,
}

struct Stop {
    asked: AtomicBool,
    bell: EventFd,
}

impl Stop {
    fn new() -> io::Result<Arc<Stop>> {
        Ok(Arc::new(Stop { asked: AtomicBool::new(false), bell: EventFd::new(EFD_NONBLOCK)? }))
    }
}

/// What epoll says of a descriptor that is no queue's doorbell; queues have their number.
const HOST: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;

impl Worker {
    /// Starts the worker of `device`.
    pub fn spawn<D>(name: &str, device: Arc<Mutex<Mmio<D>>>, gate: Arc<Gate>) -> io::Result<Worker>
    where
        D: VirtioDevice + 'static,
    {
        let stop = Stop::new()?;
        let mut shift = Shift::new(device, stop.clone())?;
        Worker::start(name, stop, gate, move |gate| {
            while shift.turn(gate, -1)? {}
            Ok(())
        })
    }

    /// Starts one worker for all of `devices`: for those that rest most of the time, and are not worth a thread each.
    pub fn spawn_for_all<D>(name: &str, devices: &[Arc<Mutex<Mmio<D>>>], gate: Arc<Gate>) -> io::Result<Worker>
    where
        D: VirtioDevice + 'static,
    {
        let stop = Stop::new()?;
        let shifts = devices.iter().map(|device| Shift::new(device.clone(), stop.clone()));
        let mut shifts = shifts.collect::<io::Result<Vec<_>>>()?;
        // An epoll descriptor is readable when one of those is that it watches (epoll(7)).
        let all = Epoll::new()?;
        for (shift, number) in shifts.iter().zip(0..) {
            all.ctl(ControlOperation::Add, shift.epoll.as_raw_fd(), EpollEvent::new(EventSet::IN, number))?;
        }
        Worker::start(name, stop, gate, move |gate| {
            loop {
                let mut events = [EpollEvent::default(); 8];
                let count = match all.wait(-1, &mut events) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    other => other?,
                };
                for event in events.iter().take(count) {
                    let shift = usize::try_from(event.data()).ok().and_then(|number| shifts.get_mut(number));
                    if !shift.map_or(Ok(true), |shift| shift.turn(gate, 0))? {
                        return Ok(());
                    }
                }
            }
        })
    }

    fn start(
        name: &str,
        stop: Arc<Stop>,
        gate: Arc<Gate>,
        mut work: impl FnMut(&Gate) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Worker> {
        let thread_gate = gate.clone();
        let body = move || {
            if let Err(error) = work(&thread_gate) {
                tracing::error!(worker = thread::current().name(), "a device stands still: {error}");
            }
        };
        let thread = small(name).spawn(body)?;
        Ok(Worker { thread: Some(thread), stop, gate })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.asked.store(true, Ordering::Release);
        let _ = self.stop.bell.write(1);
        self.gate.nudge();
        if let Some(thread) = self.thread.take() {
            // A panic in it was already reported on stderr, and its device's lock is poisoned.
            let _ = thread.join();
        }
    }
}

/// What the thread has: copies of the doorbells, to drain them without the device's lock.
struct Shift<D> {
    device: Arc<Mutex<Mmio<D>>>,
    stop: Arc<Stop>,
    doorbells: Vec<EventFd>,
    host: Option<RawFd>,
    /// Whether epoll watches `host`. Not while the driver is away: nobody would work off what it announces.
    watching: bool,
    epoll: Epoll,
}

impl<D: VirtioDevice> Shift<D> {
    fn new(device: Arc<Mutex<Mmio<D>>>, stop: Arc<Stop>) -> io::Result<Shift<D>> {
        let epoll = Epoll::new()?;
        let watch = |fd: RawFd, data| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data));
        watch(stop.bell.as_raw_fd(), STOP)?;
        let locked = device.lock().map_err(|_| poisoned())?;
        let doorbells = locked.doorbells().iter().map(EventFd::try_clone).collect::<io::Result<Vec<_>>>()?;
        for (doorbell, index) in doorbells.iter().zip(0..) {
            watch(doorbell.as_raw_fd(), index)?;
        }
        let host = locked.device().host_fd();
        drop(locked);
        let mut shift = Shift { device, stop, doorbells, host, watching: false, epoll };
        shift.watch_host()?;
        Ok(shift)
    }

    /// Waits up to `patience` milliseconds (-1: for ever) and serves what rang. Says whether to go on.
    fn turn(&mut self, gate: &Gate, patience: i32) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 8];
        let count = match self.epoll.wait(patience, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) => return Err(error),
        };
        let Some(_stay) = gate.enter(|| self.stop.asked.load(Ordering::Acquire)) else {
            return Ok(false);
        };
        for event in events.iter().take(count) {
            self.serve(event.data())?;
        }
        self.watch_host()?;
        Ok(true)
    }

    fn serve(&self, what: u64) -> io::Result<()> {
        if what == HOST {
            self.device.lock().map_err(|_| poisoned())?.host_ready();
        } else if let Some(doorbell) = usize::try_from(what).ok().and_then(|index| self.doorbells.get(index)) {
            // Silenced before the queue is looked at: whoever rings from now on is heard again.
            let _ = doorbell.read();
            self.device.lock().map_err(|_| poisoned())?.queue_ready(what as usize);
        }
        Ok(())
    }

    fn watch_host(&mut self) -> io::Result<()> {
        let Some(host) = self.host else { return Ok(()) };
        let wanted = self.device.lock().map_err(|_| poisoned())?.is_active();
        if wanted != self.watching {
            let operation = if wanted { ControlOperation::Add } else { ControlOperation::Delete };
            self.epoll.ctl(operation, host, EpollEvent::new(EventSet::IN, HOST))?;
            self.watching = wanted;
        }
        Ok(())
    }
}

fn poisoned() -> io::Error {
    io::Error::other("its lock is poisoned by a panic")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::thread::sleep;
    use std::time::{Duration, Instant};

    use virtio_queue::Queue;

    use super::*;
    use crate::devices::virtio::ring::work_off;
    use crate::devices::virtio::testing::{DESC, Driver, WRITE};
    use crate::mem::GuestMemory;

    /// A chip that works slowly, has a descriptor of its own, and counts.
    struct Chip {
        bell: EventFd,
        served: Arc<AtomicU32>,
        called: Arc<AtomicU32>,
        faulty: bool,
        unfinished: bool,
    }

    impl VirtioDevice for Chip {
        type State = ();
        const KIND: u32 = 42;

        fn queue_sizes(&self) -> &'static [u16] {
            &[16]
        }
        fn features(&self) -> u64 {
            0
        }
        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
        fn activate(&mut self, _features: u64) {}
        fn reset(&mut self) {}

        fn queue_ready(
            &mut self,
            _queue: usize,
            queues: &mut [Queue],
            mem: &GuestMemory,
        ) -> Result<bool, virtio_queue::Error> {
            assert!(!self.faulty, "a fault in a chip, on purpose");
            let turn = work_off(&mut queues[0], mem, |_| {
                sleep(Duration::from_millis(2));
                self.served.fetch_add(1, Ordering::SeqCst);
                Ok(0)
            })?;
            self.unfinished = turn.unfinished;
            Ok(turn.interrupt)
        }

        fn host_fd(&self) -> Option<RawFd> {
            Some(self.bell.as_raw_fd())
        }

        // Leaves the bell ringing, as a device under constant load from outside would.
        fn host_ready(&mut self, _queues: &mut [Queue], _mem: &GuestMemory) -> Result<bool, virtio_queue::Error> {
            self.called.fetch_add(1, Ordering::SeqCst);
            Ok(false)
        }

        fn unfinished(&self) -> bool {
            self.unfinished
        }
        fn state(&self) {}
    }

    struct Bench {
        driver: Arc<Mutex<Mmio<Chip>>>,
        served: Arc<AtomicU32>,
        called: Arc<AtomicU32>,
        host: EventFd,
        gate: Arc<Gate>,
        worker: Worker,
    }

    /// A chip with five chains in its queue, and its worker.
    fn bench(active: bool, faulty: bool) -> Bench {
        let (served, called) = <(Arc<AtomicU32>, Arc<AtomicU32>)>::default();
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let host = bell.try_clone().unwrap();
        let chip = Chip { bell, served: served.clone(), called: called.clone(), faulty, unfinished: false };
        let mut driver = if active { Driver::started(chip, 0) } else { Driver::cold(chip) };
        for head in 0..5 {
            driver.descriptor(DESC, head, 0x8000, 1, WRITE, 0);
            driver.submit(head);
        }
        driver.mmio.doorbells()[0].read().ok();
        let driver = Arc::new(Mutex::new(driver.mmio));
        let gate = Arc::new(Gate::default());
        let worker = Worker::spawn("chip", driver.clone(), gate.clone()).unwrap();
        Bench { driver, served, called, host, gate, worker }
    }

    fn wait_for(what: &str, condition: impl Fn() -> bool) {
        let began = Instant::now();
        while !condition() {
            assert!(began.elapsed() < Duration::from_secs(10), "{what}");
            sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn one_ring_gets_everything_served_in_several_turns() {
        let bench = bench(true, false);
        assert_eq!(bench.served.load(Ordering::SeqCst), 0);
        bench.driver.lock().unwrap().doorbells()[0].write(1).unwrap();
        wait_for("all five", || bench.served.load(Ordering::SeqCst) == 5);
    }

    #[test]
    fn a_closed_gate_stops_a_busy_worker_and_an_open_one_lets_it_go_on() {
        let bench = bench(true, false);
        bench.host.write(1).unwrap();
        wait_for("a busy worker", || bench.called.load(Ordering::SeqCst) > 100);
        bench.gate.close();
        let still = bench.called.load(Ordering::SeqCst);
        let device = bench.driver.try_lock().expect("nobody has the lock");
        device.doorbells()[0].write(1).unwrap();
        sleep(Duration::from_millis(20));
        assert_eq!((bench.called.load(Ordering::SeqCst), bench.served.load(Ordering::SeqCst)), (still, 0));
        drop(device);
        bench.gate.open();
        wait_for("all five", || bench.served.load(Ordering::SeqCst) == 5);
    }

    #[test]
    fn a_worker_stops_also_before_a_closed_gate() {
        let bench = bench(true, false);
        bench.gate.close();
        bench.driver.lock().unwrap().doorbells()[0].write(1).unwrap();
        drop(bench.worker);
        assert_eq!(bench.served.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn one_worker_serves_several_devices() {
        let [one, two] = [bench(true, false), bench(true, false)];
        // Their own workers go; the doorbells stay.
        let (devices, counts) = ([one.driver.clone(), two.driver.clone()], [one.served.clone(), two.served.clone()]);
        drop((one.worker, two.worker));
        let gate = Arc::new(Gate::default());
        let worker = Worker::spawn_for_all("both", &devices, gate.clone()).unwrap();
        for (device, served) in devices.iter().zip(&counts) {
            device.lock().unwrap().doorbells()[0].write(1).unwrap();
            wait_for("all five", || served.load(Ordering::SeqCst) == 5);
        }
        gate.close();
        drop(worker);
    }

    #[test]
    fn a_panic_in_a_worker_does_not_hang_a_pause() {
        let bench = bench(true, true);
        bench.driver.lock().unwrap().doorbells()[0].write(1).unwrap();
        wait_for("the panic", || bench.driver.is_poisoned());
        bench.gate.close();
        bench.gate.open();
        drop(bench.worker);
    }

    #[test]
    fn the_chips_own_descriptor_is_heard_only_while_there_is_a_driver() {
        use crate::devices::BusDevice;

        let bench = bench(false, false);
        bench.host.write(1).unwrap();
        sleep(Duration::from_millis(20));
        assert_eq!(bench.called.load(Ordering::SeqCst), 0);
        let set_status = |status: u32| bench.driver.lock().unwrap().write(0x70, &status.to_le_bytes());
        bench.driver.lock().unwrap().write(0x24, &1u32.to_le_bytes());
        for status in [1, 3] {
            set_status(status);
        }
        bench.driver.lock().unwrap().write(0x20, &1u32.to_le_bytes());
        for status in [11, 15] {
            set_status(status);
        }
        wait_for("the chip's descriptor", || bench.called.load(Ordering::SeqCst) > 0);
        set_status(0);
        let after = bench.called.load(Ordering::SeqCst);
        sleep(Duration::from_millis(20));
        assert_eq!(bench.called.load(Ordering::SeqCst), after);
    }
}
