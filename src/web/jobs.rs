//! Command lines that the page had run: this very program, with the words that the button showed.

use std::collections::VecDeque;
use std::io;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};
use tokio::sync::Notify;

use super::commands;

/// So many run at one time, and so many are remembered.
const AT_ONCE: usize = 6;
const REMEMBERED: usize = 12;
/// What is kept of the output of one, in bytes: the beginning.
const OUTPUT: usize = 4 << 10;
/// How long those that run have to end when the dashboard does.
const PATIENCE: Duration = Duration::from_secs(5);

/// A command line that was run.
#[derive(Clone, Debug, Serialize)]
pub struct Job {
    /// Its number, counted from 1.
    pub id: u64,
    /// Its words, without the program's name.
    pub words: Vec<String>,
    /// When it began and ended, on the host's monotonic clock in microseconds.
    pub begun_us: u64,
    pub ended_us: Option<u64>,
    /// Its exit code, once it has ended; -1 when a signal ended it.
    pub code: Option<i32>,
    /// What it said.
    pub output: String,
    #[serde(skip)]
    pid: Option<u32>,
}

/// All of them.
#[derive(Default)]
pub struct Jobs {
    list: Mutex<List>,
    /// One has begun or ended.
    pub changed: Notify,
}

#[derive(Default)]
struct List {
    jobs: VecDeque<Job>,
    last: u64,
}

impl Jobs {
    /// Begins to run a command line; gives its number, or why not.
    pub fn begin(self: &Arc<Jobs>, words: Vec<String>) -> Result<u64, String> {
        commands::check(&words)?;
        let mut list = self.lock();
        if list.jobs.iter().filter(|job| job.code.is_none()).count() >= AT_ONCE {
            return Err(format!("{AT_ONCE} command lines run already: wait for one of them"));
        }
        let (child, output) = spawn(&words).map_err(|error| format!("it cannot be run: {error}"))?;
        list.last += 1;
        let (id, begun_us, pid) = (list.last, crate::sys::process::monotonic_us(), child.id());
        list.jobs.push_back(Job { id, words, begun_us, ended_us: None, code: None, output: String::new(), pid });
        while list.jobs.len() > REMEMBERED {
            // One that runs is not forgotten; there are fewer of them than are remembered.
            let Some(oldest) = list.jobs.iter().position(|job| job.code.is_some()) else { break };
            list.jobs.remove(oldest);
        }
        drop(list);
        tokio::spawn(follow(self.clone(), id, child, output));
        self.changed.notify_waiters();
        Ok(id)
    }

    /// Interrupts one, as Ctrl-C does. Whether it still runs.
    pub fn interrupt(&self, id: u64) -> bool {
        let list = self.lock();
        list.jobs.iter().find(|job| job.id == id).is_some_and(interrupt)
    }

    /// Those that are remembered, the latest first.
    pub fn list(&self) -> Vec<Job> {
        self.lock().jobs.iter().rev().cloned().collect()
    }

    /// Interrupts all that run, and waits a while for their ends.
    pub async fn end(&self) {
        for job in &self.lock().jobs {
            interrupt(job);
        }
        let all_ended = async {
            while self.lock().jobs.iter().any(|job| job.code.is_none()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = tokio::time::timeout(PATIENCE, all_ended).await;
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut Job)) {
        if let Some(job) = self.lock().jobs.iter_mut().find(|job| job.id == id) {
            change(job);
        }
        self.changed.notify_waiters();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether it was still there to be interrupted.
fn interrupt(job: &Job) -> bool {
    let Some(pid) = job.pid.filter(|_| job.code.is_none()).and_then(|pid| i32::try_from(pid).ok()) else {
        return false;
    };
    // SAFETY: kill takes plain numbers. The process is our child and its end has not been noted, so that its number
    // is most likely its own still; what ended this very instant would at worst get a signal for nothing.
    unsafe { libc::kill(pid, libc::SIGINT) == 0 }
}

/// Stays with one until it has ended. What it says is shown as it comes.
async fn follow(jobs: Arc<Jobs>, id: u64, mut child: Child, output: Receiver) {
    read(&jobs, id, output).await;
    let code = child.wait().await.ok().and_then(|status| status.code()).unwrap_or(-1);
    jobs.change(id, |job| {
        job.code = Some(code);
        job.ended_us = Some(crate::sys::process::monotonic_us());
    });
}

/// Data and words come through one pipe, so that they are shown in their order.
fn spawn(words: &[String]) -> io::Result<(Child, Receiver)> {
    let (output, input) = io::pipe()?;
    let mut command = Command::new("/proc/self/exe");
    command.args(words).env("NO_COLOR", "1").stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
    Ok((command.spawn()?, Receiver::from_owned_fd(output.into())?))
}

async fn read(jobs: &Jobs, id: u64, mut from: Receiver) {
    let mut bytes = [0; 1024];
    // Also what is not kept is read, or the program would wait for ever.
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        jobs.change(id, |job| {
            let room = OUTPUT.saturating_sub(job.output.len());
            let text = String::from_utf8_lossy(&bytes[..count.min(room)]).into_owned();
            job.output.extend(text.chars().filter(|c| !c.is_control() || *c == '\n'));
        });
    }
}
