//! Two snapshots of a guest that has nothing to do: the first, of all its memory, and the second, of what changed.

use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::Result;
use crate::look;
use crate::monitor::{Monitor, Nap, Running};
use crate::report::{Goal, Row, ms};

/// What is measured.
pub const ROWS: [Row; 6] = [
    Row::new("first_pause_ms", "pause, first snapshot, ms", Goal::Ratio(0.02)),
    Row::new("second_pause_ms", "pause, second snapshot, ms", Goal::Ratio(0.02)),
    Row::new("first_total_ms", "first snapshot, all of it, ms", Goal::None),
    Row::new("second_total_ms", "second snapshot, ms", Goal::None),
    Row::new("first_written_percent", "first wrote, % of RAM", Goal::None),
    Row::new("second_written_percent", "second wrote, % of RAM", Goal::AtMost(5.0)),
];

/// What the guest has for itself before each snapshot.
const REST: Duration = Duration::from_secs(2);

/// Boots a guest, lets it come to rest and takes two snapshots of it.
pub fn measure(monitor: &dyn Monitor, folder: &Path) -> Result<Vec<Option<f64>>> {
    let mut running = monitor.start(folder)?;
    let naps = take_two(monitor, &running, folder).map_err(|error| running.blame(&*error));
    running.end()?;
    let Some([first, second]) = naps? else { return Ok(vec![None; ROWS.len()]) };
    let percent = |bytes: u64| bytes as f64 * 100.0 / monitor.guest_memory() as f64;
    let [of_first, of_second] = [&first, &second].map(|nap| [ms(nap.pause), ms(nap.total), percent(nap.written)]);
    monitor.forget(&second)?;
    monitor.forget(&first)?;
    let pairs = of_first.into_iter().zip(of_second);
    Ok(pairs.flat_map(|(first, second)| [Some(first), Some(second)]).collect())
}

fn take_two(monitor: &dyn Monitor, running: &Running, folder: &Path) -> Result<Option<[Nap; 2]>> {
    look::up(running)?;
    thread::sleep(REST);
    let Some(first) = monitor.snapshot(running, folder, "first")? else { return Ok(None) };
    thread::sleep(REST);
    let second = monitor.snapshot(running, folder, "second")?.ok_or("it took one snapshot and not another")?;
    Ok(Some([first, second]))
}
