//! The parts of the benchmark: which guests, where, and in which order.

use std::path::Path;

use catnap::spec::Size;
use tempfile::TempDir;

use crate::monitor::{Catnap, Guest, Monitor, Nap};
use crate::report::{Column, Row, Section};
use crate::{Args, Part, Result, boot, clones, export, push, resize, restore, snapshot};

/// What all parts begin with.
pub struct Bench<'a> {
    args: &'a Args,
    catnap: Catnap,
    guest: Guest,
    /// Where the guest's files are, and what is measured in the folder for temporary files.
    work: TempDir,
}

/// Monitors of guests of one size.
type Monitors = Vec<Box<dyn Monitor>>;

impl<'a> Bench<'a> {
    /// Boots one guest without a clock.
    pub fn begin(args: &'a Args) -> Result<Bench<'a>> {
        let work = tempfile::tempdir()?;
        let catnap = Catnap::new(&args.catnap, args.kernel.as_deref(), &args.append)?;
        eprintln!("bench: warming up");
        let guest = catnap.warm_up(work.path())?;
        Ok(Bench { args, catnap, guest, work })
    }

    /// The kernel's command line.
    pub fn command_line(&self) -> &str {
        &self.guest.command_line
    }

    /// Measures one part, for all sizes.
    pub fn measure(&self, part: Part, sections: &mut Vec<Section>) -> Result<()> {
        let sizes: &[Size] = match part {
            Part::Boot => &[Size::mib(128)],
            Part::Clones | Part::Export | Part::Push | Part::Resize => &[Size::mib(256)],
            Part::Snapshot | Part::Restore | Part::All => &[Size::mib(256), Size::mib(1024), Size::mib(4096)],
        };
        let sizes = if self.args.memory.is_empty() { sizes } else { &self.args.memory };
        for &memory in sizes {
            match part {
                Part::Boot => sections.push(self.boots(memory)?),
                Part::Snapshot => sections.push(self.snapshots(memory)?),
                Part::Restore => sections.push(self.restores(memory)?),
                Part::Clones => self.clones(memory, sections)?,
                Part::Export => sections.push(self.exports(memory)?),
                Part::Push => sections.push(self.pushes(memory)?),
                Part::Resize => sections.push(self.resizes(memory)?),
                Part::All => {}
            }
        }
        Ok(())
    }

    fn boots(&self, memory: Size) -> Result<Section> {
        let monitors = self.monitors(&self.catnap, memory);
        let columns =
            self.turns(&monitors, "boot", self.work.path(), |_, monitor, folder| boot::measure(monitor, folder))?;
        let title = format!("boot, {memory} of memory, from process start, {} runs", self.args.runs);
        Ok(self.section("boot", title, memory, &boot::ROWS, columns))
    }

    /// In the folder for temporary files, which in the lab is in memory: so no disk's speed is measured, and
    /// whoever writes most is spared most.
    fn snapshots(&self, memory: Size) -> Result<Section> {
        let home = tempfile::tempdir_in(self.work.path())?;
        let monitors = self.monitors(&self.catnap.moved_to(home.path())?, memory);
        let columns =
            self.turns(&monitors, "snapshot", home.path(), |_, monitor, folder| snapshot::measure(monitor, folder))?;
        let place = std::env::temp_dir();
        let runs = self.args.runs;
        let title = format!("snapshots of an idle guest with {memory}, written to {}, {runs} runs", place.display());
        Ok(self.section("snapshot", title, memory, &snapshot::ROWS, columns))
    }

    /// On the filesystem of catnap's home, which is on a disk, so that it can be cold.
    fn restores(&self, memory: Size) -> Result<Section> {
        let work = tempfile::tempdir_in(self.catnap.beside())?;
        let monitors = self.monitors(&self.catnap, memory);
        let naps = self.naps(&monitors, work.path(), restore::prepare)?;
        let columns = self.turns(&monitors, "restore", work.path(), |n, monitor, folder| match &naps[n] {
            Some(nap) => restore::measure(monitor, nap, folder),
            None => Ok(vec![None; restore::ROWS.len()]),
        })?;
        self.forget(&monitors, &naps)?;
        let runs = self.args.runs;
        let title = format!("restore of a busy guest with {memory}, from process start, {runs} runs");
        Ok(self.section("restore", title, memory, &restore::ROWS, columns))
    }

    fn clones(&self, memory: Size, sections: &mut Vec<Section>) -> Result<()> {
        let work = tempfile::tempdir_in(self.catnap.beside())?;
        let monitors = self.monitors(&self.catnap, memory);
        let naps = self.naps(&monitors, work.path(), clones::prepare)?;
        for &count in &self.args.clones {
            let mut columns: Vec<_> = monitors.iter().map(|monitor| Column::new(monitor.name())).collect();
            for ((monitor, nap), column) in monitors.iter().zip(&naps).zip(&mut columns) {
                eprintln!("bench: {count} clones, {memory}: {}", monitor.name());
                let folder = tempfile::tempdir_in(work.path())?;
                let Some(nap) = nap else { continue };
                let sample = clones::measure(monitor.as_ref(), nap, count, folder.path());
                column.samples.push(sample.map_err(|error| format!("{}: {error}", monitor.name()))?);
            }
            let title = format!("{count} idle clones of one snapshot with {memory}");
            sections.push(Section { guests: count, ..self.section("clones", title, memory, &clones::ROWS, columns) });
        }
        self.forget(&monitors, &naps)
    }

    /// Beside what anybody would do with the same files.
    fn exports(&self, memory: Size) -> Result<Section> {
        let catnap = self.catnap.with_memory(memory);
        let work = tempfile::tempdir_in(self.catnap.beside())?;
        let mut columns = ["catnap", "tar | zstd"].map(Column::new);
        let runs = self.args.runs;
        for run in 1..=runs {
            eprintln!("bench: export, {memory}, run {run} of {runs}");
            export::measure(&catnap, tempfile::tempdir_in(work.path())?.path(), &mut columns)?;
        }
        let title = format!("a snapshot of an idle guest with {memory} as one file, and back, {runs} runs");
        Ok(self.section("export", title, memory, &export::ROWS, columns.into()))
    }

    /// Of Catnap alone: nobody else has that.
    fn pushes(&self, memory: Size) -> Result<Section> {
        let catnap = self.catnap.with_memory(memory);
        let work = tempfile::tempdir_in(self.catnap.beside())?;
        let monitors: Monitors = vec![Box::new(catnap.clone())];
        let registry = &self.args.registry;
        let columns =
            self.turns(&monitors, "push", work.path(), |_, _, folder| push::measure(&catnap, registry, folder))?;
        let runs = self.args.runs;
        let title = format!("snapshots of a guest with {memory} in a registry on this host, {runs} runs");
        Ok(self.section("push", title, memory, &push::ROWS, columns))
    }

    /// Of Catnap alone, too.
    fn resizes(&self, memory: Size) -> Result<Section> {
        let catnap = self.catnap.with_memory(memory);
        let work = tempfile::tempdir_in(self.catnap.beside())?;
        let monitors: Monitors = vec![Box::new(catnap.clone())];
        let columns = self.turns(&monitors, "resize", work.path(), |_, _, folder| resize::measure(&catnap, folder))?;
        let (twice, runs) = (Size(memory.bytes() * 2), self.args.runs);
        let title =
            format!("1 vCPU and {memory} become 2 vCPUs and {twice}, and back, until the guest says so, {runs} runs");
        Ok(self.section("resize", title, memory, &resize::ROWS, columns))
    }

    /// Catnap and its peers, for guests with this much RAM.
    fn monitors(&self, catnap: &Catnap, memory: Size) -> Monitors {
        let guest = self.guest.with_memory(memory);
        let mut monitors: Monitors = vec![Box::new(catnap.with_memory(memory))];
        monitors.extend(self.args.peers.iter().map(|peer| peer.monitor(guest.clone())));
        monitors
    }

    /// A guest of each monitor that was put to sleep.
    fn naps(
        &self,
        monitors: &Monitors,
        work: &Path,
        prepare: fn(&dyn Monitor, &Path) -> Result<Option<Nap>>,
    ) -> Result<Vec<Option<Nap>>> {
        let nap = |monitor: &dyn Monitor| {
            eprintln!("bench: a guest of {} goes to sleep", monitor.name());
            let folder = work.join(monitor.name());
            std::fs::create_dir(&folder)?;
            prepare(monitor, &folder).map_err(|error| format!("{}: {error}", monitor.name()).into())
        };
        monitors.iter().map(|monitor| nap(monitor.as_ref())).collect()
    }

    fn forget(&self, monitors: &Monitors, naps: &[Option<Nap>]) -> Result<()> {
        let mut both = monitors.iter().zip(naps).filter_map(|(monitor, nap)| Some((monitor, nap.as_ref()?)));
        both.try_for_each(|(monitor, nap)| monitor.forget(nap))
    }

    /// All runs, the monitors taking turns, each time in a fresh folder in `work`.
    fn turns(
        &self,
        monitors: &Monitors,
        what: &str,
        work: &Path,
        measure: impl Fn(usize, &dyn Monitor, &Path) -> Result<Vec<Option<f64>>>,
    ) -> Result<Vec<Column>> {
        let mut columns: Vec<_> = monitors.iter().map(|monitor| Column::new(monitor.name())).collect();
        for run in 1..=self.args.runs {
            for (n, (monitor, column)) in monitors.iter().zip(&mut columns).enumerate() {
                let (memory, name) = (Size(monitor.guest_memory()), monitor.name());
                eprintln!("bench: {what}, {memory}, run {run} of {}: {name}", self.args.runs);
                let folder = tempfile::tempdir_in(work)?;
                let sample = measure(n, monitor.as_ref(), folder.path());
                column.samples.push(sample.map_err(|error| format!("{name}: {error}"))?);
            }
        }
        Ok(columns)
    }

    fn section(
        &self,
        part: &'static str,
        title: String,
        memory: Size,
        rows: &'static [Row],
        columns: Vec<Column>,
    ) -> Section {
        Section { part, title, memory: memory.bytes(), guests: 1, rows, columns }
    }
}
