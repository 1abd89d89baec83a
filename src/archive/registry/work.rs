//! Many small jobs, most of which wait for a registry, on a few threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use crate::archive::Error;
use crate::sys::process;

/// Jobs at a time. Each has a chunk in hand, twice.
const THREADS: usize = 8;
/// How long to wait before looking whether the user has had enough.
const PATIENCE: Duration = Duration::from_millis(100);

/// The results of the jobs, as they come. The first error, or the user, ends it; jobs that wait for a silent registry
/// then are left to themselves.
pub(super) struct Work<T> {
    results: Receiver<Result<T, Error>>,
    left: usize,
    over: Arc<AtomicBool>,
}

impl<T: Send + 'static> Work<T> {
    /// Has `job` done with every number below `count`.
    pub(super) fn begin<F>(count: usize, job: F) -> Result<Work<T>, Error>
    where
        F: Fn(usize) -> Result<T, Error> + Send + Sync + 'static,
    {
        let (give, results) = sync_channel(THREADS);
        let (next, over, job) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)), Arc::new(job));
        for _ in 0..THREADS.min(count) {
            let (give, next, over, job) = (give.clone(), next.clone(), over.clone(), job.clone());
            let work = move || {
                while !over.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count || give.send(job(number)).is_err() {
                        break;
                    }
                }
            };
            thread::Builder::new().name("registry".into()).spawn(work).map_err(Error::Read)?;
        }
        Ok(Work { results, left: count, over })
    }
}

impl<T> Iterator for Work<T> {
    type Item = Result<T, Error>;

    fn next(&mut self) -> Option<Result<T, Error>> {
        if self.left == 0 {
            return None;
        }
        loop {
            let result = match self.results.recv_timeout(PATIENCE) {
                Ok(result) => result,
                Err(RecvTimeoutError::Timeout) if process::interrupted() => Err(Error::Interrupted),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => Err(Error::Read(std::io::Error::other("a thread is gone"))),
            };
            self.left = if result.is_ok() { self.left - 1 } else { 0 };
            return Some(result);
        }
    }
}

impl<T> Drop for Work<T> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn every_job_is_done_once_and_an_error_ends_it() {
        let mut done: Vec<usize> = Work::begin(1000, Ok).unwrap().map(Result::unwrap).collect();
        done.sort_unstable();
        assert_eq!(done, (0..1000).collect::<Vec<_>>());
        assert_eq!(Work::begin(0, |_| Ok(())).unwrap().count(), 0);

        // Beyond the one that fails all stand still until the test is over, as before a silent registry.
        let still = Arc::new(Mutex::new(()));
        let held = still.lock().unwrap();
        let waiting = still.clone();
        let fails = move |number| match number {
            ..20 => Ok(number),
            20 => Err(Error::Interrupted),
            _ => {
                drop(waiting.lock());
                Ok(number)
            }
        };
        let results: Vec<_> = Work::begin(1000, fails).unwrap().collect();
        assert!(results.len() <= 21 && results.iter().filter(|result| result.is_err()).count() == 1);
        assert!(results.last().unwrap().is_err());
        drop(held);
    }
}
