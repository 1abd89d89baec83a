//! Asks a machine's page for its counter again and again while something else happens.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Desk, Error, page};

/// How often the page is asked, and how long it may take to answer.
const GLANCE: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it is watched before and after, so that the counter is seen to count.
const MARGIN: Duration = Duration::from_millis(1200);
/// How long the page may take to be there, before and after.
const LATE: Duration = Duration::from_secs(60);

/// An answer of the page, and when it came.
struct Sample {
    at: Duration,
    status: Value,
}

/// Watches `machine` while `act` runs; what `act` gives, and what was seen.
pub fn during<T>(desk: &Desk, machine: &str, act: impl FnOnce() -> T) -> Result<(T, Value), Error> {
    let failed = |why: &str| Error::Page { machine: machine.into(), why: why.into() };
    let port = desk.port(machine).ok_or_else(|| failed("no port of this host leads to it"))?;
    let (over, samples, begun) = (AtomicBool::new(false), Mutex::new(Vec::new()), Instant::now());
    let count = || samples.lock().unwrap_or_else(std::sync::PoisonError::into_inner).len();
    let given = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                // A page that does not answer is what is being looked for, too.
                if let Ok(status) = page::get(port, "/api/status", PATIENCE).and_then(|answer| answer.json()) {
                    let sample = Sample { at: begun.elapsed(), status };
                    samples.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(sample);
                }
                thread::sleep(GLANCE);
            }
        });
        let _end = OnDrop(|| over.store(true, Ordering::SeqCst));
        let until_more_than = |before: usize| {
            let deadline = Instant::now() + LATE;
            while count() <= before && Instant::now() < deadline {
                thread::sleep(GLANCE);
            }
        };
        until_more_than(0);
        thread::sleep(MARGIN);
        let given = act();
        until_more_than(count());
        thread::sleep(MARGIN);
        given
    });
    let samples = samples.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok((given, summary(&samples).ok_or_else(|| failed("nothing was heard of it"))?))
}

/// Runs something at the end, also in a panic, so that nobody waits for a thread that goes on for ever.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// What the answers come to.
fn summary(samples: &[Sample]) -> Option<Value> {
    let (first, last) = (samples.first()?, samples.last()?);
    let ticks = |sample: &Sample| sample.status["ticks"].as_i64().unwrap_or(0);
    let pairs = || samples.windows(2).map(|pair| (&pair[0], &pair[1]));
    let silence = pairs().map(|(one, next)| next.at - one.at).max().unwrap_or_default();
    let mut changed = first.at;
    let mut still = Duration::ZERO;
    for (one, next) in pairs() {
        if ticks(one) != ticks(next) {
            still = still.max(next.at - changed);
            changed = next.at;
        }
    }
    Some(json!({
        "first": first.status,
        "last": last.status,
        "answers": samples.len(),
        "seconds": (last.at - first.at).as_secs_f64(),
        "ticks": ticks(last) - ticks(first),
        // The longest time without an answer, and without a tick.
        "silence_us": silence.as_micros() as u64,
        "still_us": still.as_micros() as u64,
        "setbacks": pairs().filter(|(one, next)| ticks(next) < ticks(one)).count(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_standstill_and_setbacks_are_told_apart() {
        let sample = |ms: u64, ticks: u64| Sample { at: Duration::from_millis(ms), status: json!({"ticks": ticks}) };
        let samples = [sample(0, 7), sample(100, 8), sample(200, 8), sample(900, 8), sample(1000, 9), sample(1100, 2)];
        let seen = summary(&samples).unwrap();
        assert_eq!((&seen["ticks"], &seen["setbacks"], &seen["answers"]), (&json!(-5), &json!(1), &json!(6)));
        assert_eq!((&seen["silence_us"], &seen["still_us"]), (&json!(700_000), &json!(900_000)));
        assert_eq!((&seen["first"]["ticks"], &seen["last"]["ticks"]), (&json!(7), &json!(2)));
        assert!(summary(&[]).is_none());
    }
}
