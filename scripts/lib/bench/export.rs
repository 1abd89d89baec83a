//! A snapshot as one file, and back; and the same files by `tar` and `zstd`.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;
use crate::look;
use crate::monitor::{Catnap, Monitor};
use crate::report::{Column, Goal, Row, ms};

/// What is measured.
pub const ROWS: [Row; 5] = [
    Row::new("content_mib", "what is in it, MiB", Goal::None),
    Row::new("size_mib", "the file, MiB", Goal::None),
    Row::new("export_ms", "writing it, ms", Goal::None),
    Row::new("import_ms", "taking it in, ms", Goal::None),
    Row::new("export_mib_s", "writing, MiB of content per s", Goal::None),
];

/// What the guest has for itself before its snapshot.
const REST: Duration = Duration::from_secs(1);
/// How `zstd` is asked to do the same: the level of our archives, and as many threads as there are CPUs.
const ZSTD: &str = "zstd -q -3 -T0";

/// Snapshots a guest, hands that on as a file, and packs what has arrived by other means. Catnap's writing includes to
/// gather what a chain of snapshots comes to, and its taking in includes to check every digest; both are on the disk
/// when they are done, so the others sync too.
pub fn measure(catnap: &Catnap, folder: &Path, columns: &mut [Column; 2]) -> Result<()> {
    let mut running = catnap.start(folder)?;
    let nap = look::up(&running).and_then(|()| {
        thread::sleep(REST);
        Ok(catnap.snapshot(&running, folder, "idle")?.ok_or("catnap takes snapshots")?)
    });
    let nap = nap.map_err(|error| running.blame(&*error));
    running.end()?;
    let nap = nap?;
    let there = folder.join("colleague");
    let (file, colleague) = (folder.join("idle.catnap"), catnap.elsewhere(&there)?);
    let export = catnap.export(&nap, &file)?;
    let import = colleague.import(&file)?;
    catnap.forget(&nap)?;
    let arrived = colleague.files_of(&nap)?;
    let content = mib(fs::read_dir(&arrived)?.map(|entry| Ok(entry?.metadata()?.len())).sum::<Result<u64>>()?);

    let (packed, unpacked) = (folder.join("idle.tar.zst"), folder.join("unpacked"));
    fs::create_dir(&unpacked)?;
    let pack = timed(&format!("tar -cf - . | {ZSTD} -c >{0} && sync {0}", packed.display()), &arrived)?;
    let unpack = timed(&format!("{ZSTD} -dc {} | tar -xf - && sync", packed.display()), &unpacked)?;
    let size = |file: &Path| -> Result<f64> { Ok(mib(File::open(file)?.metadata()?.len())) };
    for (column, size, there, back) in [(0, size(&file)?, export, import), (1, size(&packed)?, pack, unpack)] {
        let sample = [content, size, ms(there), ms(back), content / there.as_secs_f64()];
        columns[column].samples.push(sample.map(Some).into());
    }
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1048576.0
}

/// How long a line of shell takes in a folder.
fn timed(line: &str, folder: &Path) -> Result<Duration> {
    let begun = Instant::now();
    let status = Command::new("sh").args(["-ec", line]).current_dir(folder).stdin(Stdio::null()).status()?;
    if status.success() { Ok(begun.elapsed()) } else { Err(format!("failed: {line}").into()) }
}
