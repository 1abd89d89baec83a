//! How much CPU this host has to give just now: whoever shares it cannot win what others have.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

/// How long is counted.
const TIME: Duration = Duration::from_millis(400);

/// How many times the work of one thread two threads do in the same time: 2 on a host with two CPUs to spare, 1 on one
/// with a single one.
pub fn of_two() -> f64 {
    let one = together(1);
    together(2) as f64 / one.max(1) as f64
}

/// The work that so many threads do in the time.
fn together(threads: usize) -> u64 {
    let end = Instant::now() + TIME;
    let work = move || {
        let mut rounds = 0;
        while Instant::now() < end {
            black_box((0..20_000u64).fold(0, |sum, number| black_box(sum ^ number.wrapping_mul(sum | 1))));
            rounds += 1;
        }
        rounds
    };
    let threads: Vec<_> = (0..threads).map(|_| thread::spawn(work)).collect();
    threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_threads_do_some_work_each() {
        let factor = super::of_two();
        assert!(factor.is_finite() && factor > 0.0, "{factor}");
    }
}
