//! The workers: threads for what takes time. Their number follows the vCPUs, which may change at any time.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::http::{Request, Response};
use super::{Site, routes, spawn};
use crate::facts;

/// Workers for each vCPU: one to compute, the others to wait for a disk.
const PER_CPU: usize = 4;

/// Requests that wait, and answers that nobody has fetched yet.
pub(super) struct Pool {
    site: Arc<Site>,
    state: Mutex<State>,
    work: Condvar,
    /// Readable when there are answers.
    pub rung: EventFd,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(u64, Request)>,
    done: Vec<(u64, Response)>,
    threads: usize,
    idle: usize,
}

impl Pool {
    pub(super) fn new(site: Arc<Site>) -> nix::Result<Arc<Pool>> {
        let rung = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Pool { site, state: Mutex::default(), work: Condvar::new(), rung }))
    }

    /// Has a request answered. Connection `id` asks for one at a time, so connections bound the queue.
    pub(super) fn submit(self: &Arc<Pool>, id: u64, request: Request) {
        let mut state = self.lock();
        state.waiting.push_back((id, request));
        if state.idle >= state.waiting.len() || state.threads >= PER_CPU * facts::cpus() as usize {
            drop(state);
            return self.work.notify_one();
        }
        state.threads += 1;
        drop(state);
        let pool = self.clone();
        spawn("worker", move || pool.serve());
    }

    /// The answers since the last time.
    pub(super) fn fetch(&self) -> Vec<(u64, Response)> {
        let _ = self.rung.read();
        std::mem::take(&mut self.lock().done)
    }

    fn serve(&self) {
        loop {
            let mut state = self.lock();
            state.idle += 1;
            let mut state =
                self.work.wait_while(state, |state| state.waiting.is_empty()).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
            let next = state.waiting.pop_front();
            drop(state);
            let Some((id, request)) = next else { continue };
            let response = routes::answer(&self.site, &request);
            self.lock().done.push((id, response));
            let _ = self.rung.write(1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
