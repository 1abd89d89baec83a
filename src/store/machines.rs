//! Machines: their folders.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::run::{Condition, RUN, Run, RunLock};
use super::snapshots::backing_of_path;
use super::transient::{candidates, leave};
use super::{Error, Snapshot, Store};
use crate::disk::own_layers;
use crate::snapshot::Backing;
use crate::spec::{MachineSpec, Name, Size};
use crate::sys::files::{self, At, names_in, private_dir, read_bounded, write_atomically};
use crate::sys::lock::{FileLock, is_locked};

const SPEC: &str = "machine.json";
const DISK: &str = "root.qcow2";
const KERNEL: &str = "kernel";
const LOCK: &str = "lock";
const MONITOR_LOG: &str = "monitor.log";
/// The longest `machine.json`, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// A machine that is in the store.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What it is.
    pub spec: MachineSpec,
    /// Its folder.
    pub dir: PathBuf,
    pub(super) logs: PathBuf,
    pub(super) runtime: PathBuf,
}

/// A machine as it is found: its name, and what its files say.
pub type Listed = (Name, Result<Machine, Error>);

impl Store {
    /// Makes a machine from a snapshot: its own disk over the snapshot's. It appears whole or not at all.
    /// A kernel of the user's own is copied, so that nobody changes it under the machine.
    pub fn create_machine(&self, spec: &MachineSpec, from: &Snapshot) -> Result<Machine, Error> {
        self.create_machine_sized(spec, from, None)
    }

    /// The same with a disk of `disk_size` bytes: what lies beyond the snapshot's disk reads as zeros. It cannot be
    /// smaller.
    pub fn create_machine_sized(
        &self,
        spec: &MachineSpec,
        from: &Snapshot,
        disk_size: Option<u64>,
    ) -> Result<Machine, Error> {
        let dir = self.machine_dir(&spec.name);
        if dir.exists() {
            return Err(Error::MachineTaken(spec.name.clone()));
        }
        let mut spec = MachineSpec { image: from.digest.to_string(), ..spec.clone() };
        let staging = self.stage()?;
        if let Some(kernel) = spec.kernel.replace(dir.join(KERNEL)) {
            fs::copy(&kernel, staging.dir().join(KERNEL)).at("copy", &kernel)?;
        } else {
            spec.kernel = None;
        }
        from.lay_over(&staging.dir().join(DISK), disk_size)?;
        let path = staging.dir().join(SPEC);
        let bytes = serde_json::to_vec_pretty(&spec).map_err(io::Error::from).at("write", &path)?;
        fs::write(&path, bytes).at("write", &path)?;
        fs::write(staging.dir().join(LOCK), "").at("make", &staging.dir().join(LOCK))?;
        let run = staging.dir().join(RUN);
        fs::write(&run, Run::begins()?.bytes(&run)?).at("write", &run)?;
        let _beside = self.beside_others()?;
        if !from.dir.is_dir() {
            return Err(Error::Gone(from.digest));
        }
        match staging.publish(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::MachineTaken(spec.name));
            }
            other => other?,
        }
        Ok(self.machine_of(spec, dir))
    }

    /// The machine of that name.
    pub fn machine(&self, name: &Name) -> Result<Machine, Error> {
        let dir = self.machine_dir(name);
        let path = dir.join(SPEC);
        let bytes = match read_bounded(&path, MAX_FILE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NoMachine(name.clone())),
            other => other?,
        };
        let bad = |why: String| Error::BadMachine { path: path.clone(), why };
        let spec: MachineSpec = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        spec.check().map_err(|error| bad(error.to_string()))?;
        if spec.name != *name {
            return Err(bad(format!("it names the machine {}", spec.name)));
        }
        Ok(self.machine_of(spec, dir))
    }

    /// All machines, in the order of their names. One whose files cannot be read has a name too.
    pub fn machines(&self) -> Result<Vec<Listed>, Error> {
        let names = names_in(&self.folder("machines"))?;
        let names = names.iter().filter_map(|name| name.parse().ok());
        let with_machine = |name: Name| {
            let machine = self.machine(&name);
            (name, machine)
        };
        Ok(names.map(with_machine).collect())
    }

    /// Removes a machine and its logs, also one whose files cannot be read. Refused while it runs.
    pub fn remove_machine(&self, name: &Name) -> Result<(), Error> {
        let dir = self.machine_dir(name);
        if !dir.is_dir() {
            return Err(Error::NoMachine(name.clone()));
        }
        let _held = lock(&dir, name)?;
        // It disappears at once and as a whole; what follows may take its time or be swept later.
        let staging = self.stage()?;
        fs::rename(&dir, staging.dir().join("removed")).at("remove", &dir)?;
        files::sync_dir(&self.folder("machines"))?;
        let media = candidates(&self.runtime_dir(name));
        for folder in media.into_iter().chain([self.logs_dir(name)]) {
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.at("remove", &folder)?,
            }
        }
        leave(&self.runtime_dir(name));
        Ok(())
    }

    fn machine_of(&self, spec: MachineSpec, dir: PathBuf) -> Machine {
        Machine { logs: self.logs_dir(&spec.name), runtime: self.runtime_dir(&spec.name), spec, dir }
    }

    pub(super) fn machine_dir(&self, name: &Name) -> PathBuf {
        self.folder("machines").join(name.as_str())
    }

    pub(super) fn logs_dir(&self, name: &Name) -> PathBuf {
        self.home.state.join("logs").join(name.as_str())
    }

    fn runtime_dir(&self, name: &Name) -> PathBuf {
        self.home.runtime.join(name.as_str())
    }
}

impl Machine {
    /// Takes the right to run the machine; `Running` when another has it.
    pub fn lock(&self) -> Result<RunLock, Error> {
        Ok(RunLock::new(lock(&self.dir, &self.spec.name)?, &self.dir))
    }

    /// Whether its monitor lives.
    pub fn is_running(&self) -> Result<bool, Error> {
        Ok(is_locked(&self.dir.join(LOCK))?)
    }

    /// What it is doing.
    pub fn condition(&self) -> Result<Condition, Error> {
        // The record first: a monitor that ends in between has freed the lock after it wrote the record.
        let run = Run::read(&self.dir.join(RUN));
        if self.is_running()? {
            return Ok(Condition::Running);
        }
        run?.map_or(Ok(Condition::Stopped), |run| run.condition())
    }

    /// Has what [`RunLock::started`] recorded on the disk.
    pub fn settle_run(&self) -> Result<(), Error> {
        Ok(files::settle(&self.dir.join(RUN))?)
    }

    /// Has it boot with another size from now on, within what it can have: for whoever holds its lock.
    pub fn set_size(&self, cpus: u32, memory: u64) -> Result<(), Error> {
        let path = self.dir.join(SPEC);
        let bad = |why: String| Error::BadMachine { path: path.clone(), why };
        let spec = MachineSpec { cpus, memory: Size(memory), ..self.spec.clone() };
        spec.check().map_err(|error| bad(error.to_string()))?;
        let bytes = serde_json::to_vec_pretty(&spec).map_err(io::Error::from).at("write", &path)?;
        Ok(write_atomically(&path, &bytes)?)
    }

    /// Its root disk: the machine's own layer.
    pub fn disk(&self) -> PathBuf {
        self.dir.join(DISK)
    }

    /// The layers that its disk got by being snapshotted, the lowest first and without the top, and the snapshot's
    /// file that they lie over.
    pub fn disk_layers(&self) -> Result<(Vec<PathBuf>, Backing), Error> {
        let own = own_layers(&self.disk())?;
        let base = own.base.as_ref().and_then(|(name, _)| backing_of_path(name));
        let no_base = || Error::BadMachine { path: self.disk(), why: "its disk lies over no snapshot".into() };
        Ok((own.layers, base.ok_or_else(no_base)?))
    }

    /// What the guest says on its serial console. The folder is made.
    pub fn console_log(&self) -> Result<PathBuf, Error> {
        log_in(&self.logs, "console.log")
    }

    /// What the monitor says. The folder is made.
    pub fn monitor_log(&self) -> Result<PathBuf, Error> {
        log_in(&self.logs, MONITOR_LOG)
    }

    /// The socket on which its monitor listens; use `sys::local`, for the path may be long. The folder is made.
    pub fn control_socket(&self) -> Result<PathBuf, Error> {
        private_dir(&self.runtime)?;
        Ok(self.runtime.join("control.sock"))
    }
}

fn log_in(logs: &Path, name: &str) -> Result<PathBuf, Error> {
    private_dir(logs)?;
    Ok(logs.join(name))
}

/// Locks the machine in `dir`, and makes sure that it was not removed or replaced in the meantime.
pub(super) fn lock(dir: &Path, name: &Name) -> Result<FileLock, Error> {
    let path = dir.join(LOCK);
    if !dir.is_dir() {
        return Err(Error::NoMachine(name.clone()));
    }
    let held = FileLock::try_exclusive(&path)?.ok_or_else(|| Error::Running(name.clone()))?;
    let mine = held.file().metadata().at("lock", &path)?;
    match fs::metadata(&path) {
        Ok(there) if (there.dev(), there.ino()) == (mine.dev(), mine.ino()) => Ok(held),
        _ => Err(Error::NoMachine(name.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Access, Format, create_from_raw, create_overlay, open};
    use crate::snapshot::{Disk, Kind, Manifest, Role, describe};
    use crate::store::snapshots::backing_path;
    use crate::store::testing::spec;
    use crate::sys::home::Home;

    fn store() -> (tempfile::TempDir, Store, Snapshot) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path()).unwrap()).unwrap();
        let raw = dir.path().join("raw");
        fs::write(&raw, [7; 4096]).unwrap();
        let staging = store.stage().unwrap();
        create_from_raw(&raw, &staging.dir().join(DISK)).unwrap();
        let mut manifest = Manifest::new(Kind::Clean, "kitten", 1);
        manifest.files.push(describe(staging.dir(), DISK, Role::Disk).unwrap());
        manifest.disks.push(Disk {
            device: "root".into(),
            file: DISK.into(),
            format: "qcow2".into(),
            virtual_size: 4096,
            backing: None,
        });
        let snapshot = store.publish(staging, &manifest, "kitten").unwrap();
        (dir, store, snapshot)
    }

    #[test]
    fn a_machine_has_a_disk_of_its_own_and_a_name_that_nobody_else_gets() {
        let (dir, store, snapshot) = store();
        let kernel = dir.path().join("my-kernel");
        fs::write(&kernel, "kernel").unwrap();
        let made = store.create_machine(&MachineSpec { kernel: Some(kernel), ..spec("anna") }, &snapshot).unwrap();
        assert!(matches!(store.create_machine(&spec("anna"), &snapshot), Err(Error::MachineTaken(_))));
        let machine = store.machine(&"anna".parse().unwrap()).unwrap();
        assert_eq!(machine.spec, made.spec);
        assert_eq!(machine.spec.image, snapshot.digest.to_string());
        assert_eq!(fs::read(machine.spec.kernel.as_ref().unwrap()).unwrap(), b"kernel");
        open(&machine.disk(), Format::Qcow2, Access::ReadWrite, store.root()).unwrap();
        let names: Vec<_> = store.machines().unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["anna".parse().unwrap()]);
        assert!(matches!(store.machine(&"ben".parse().unwrap()), Err(Error::NoMachine(_))));
    }

    #[test]
    fn a_size_is_kept_for_the_next_boot_and_only_one_that_can_be() {
        let (_dir, store, snapshot) = store();
        let envelope = MachineSpec { max_cpus: 4, max_memory: Size::mib(512), ..spec("anna") };
        let machine = store.create_machine(&envelope, &snapshot).unwrap();
        machine.set_size(3, 256 << 20).unwrap();
        let read = store.machine(&envelope.name).unwrap().spec;
        assert_eq!(read, MachineSpec { cpus: 3, memory: Size::mib(256), ..machine.spec.clone() });
        for (cpus, memory) in [(5, 256), (0, 256), (1, 1024), (1, 255)] {
            assert!(matches!(machine.set_size(cpus, memory << 20), Err(Error::BadMachine { .. })));
        }
        assert_eq!(store.machine(&envelope.name).unwrap().spec, read);
    }

    /// A disk of one snapshot over that of another, in two layers of its own.
    fn over(store: &Store, below: &Snapshot) -> Snapshot {
        let staging = store.stage().unwrap();
        let mut manifest = Manifest::new(Kind::Live, "anna@monday", 2);
        let base = backing_path(below, DISK);
        for (file, backing) in [("root-3.qcow2", &base[..]), ("root-4.qcow2", "root-3.qcow2")] {
            create_overlay(&staging.dir().join(file), backing, Format::Qcow2, 4096).unwrap();
            manifest.files.push(describe(staging.dir(), file, Role::Disk).unwrap());
        }
        manifest.disks.push(Disk {
            device: "root".into(),
            file: "root-4.qcow2".into(),
            format: "qcow2".into(),
            virtual_size: 4096,
            backing: Some(Backing { snapshot: below.digest, file: DISK.into() }),
        });
        store.publish(staging, &manifest, "anna@monday").unwrap()
    }

    #[test]
    fn a_machine_over_a_snapshot_of_layers_has_none_of_its_own_and_may_have_a_larger_disk() {
        let (_dir, store, kitten) = store();
        let monday = over(&store, &kitten);
        let machine = store.create_machine_sized(&spec("anna"), &monday, Some(1 << 20)).unwrap();
        let (own, base) = machine.disk_layers().unwrap();
        assert!(own.is_empty());
        assert_eq!(base, Backing { snapshot: monday.digest, file: "root-4.qcow2".into() });

        let disk = open(&machine.disk(), Format::Qcow2, Access::ReadWrite, store.root()).unwrap();
        assert_eq!(disk.len(), 1 << 20);
        let smaller = store.create_machine_sized(&spec("ben"), &monday, Some(2048));
        assert!(matches!(smaller, Err(Error::DiskTooSmall { wanted: 2048, least: 4096 })));
    }

    #[test]
    fn layers_over_anything_but_a_snapshot_are_refused() {
        let (_dir, store, kitten) = store();
        let machine = store.create_machine(&spec("anna"), &kitten).unwrap();
        let hex = kitten.digest.hex();
        for name in [
            "other.qcow2".into(),
            format!("../../snapshots/{hex}"),
            format!("../../snapshots/{hex}/"),
            format!("../../snapshots/{hex}/.."),
            format!("../../snapshots/{hex}/../x"),
            format!("../../snapshots/{}/root.qcow2", &hex[1..]),
            format!("../snapshots/{hex}/root.qcow2"),
            format!("../../machines/{hex}/root.qcow2"),
        ] {
            fs::remove_file(machine.disk()).unwrap();
            create_overlay(&machine.disk(), &name, Format::Qcow2, 4096).unwrap();
            assert!(matches!(machine.disk_layers(), Err(Error::BadMachine { .. })), "{name}");
        }
    }

    /// A lock lingers with programs that other tests start at the same time.
    fn soon(machine: &Machine, expected: Condition) -> bool {
        (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(2));
            machine.condition().unwrap() == expected
        })
    }

    #[test]
    fn what_became_of_a_monitor_is_told_truthfully() {
        let (_dir, store, snapshot) = store();
        let machine = store.create_machine(&spec("anna"), &snapshot).unwrap();
        assert_eq!(machine.condition().unwrap(), Condition::Stopped);
        // The host may go down before its first run is on the disk.
        let elsewhere = Run { boot_id: "another".into(), ..Run::read(&machine.dir.join(RUN)).unwrap().unwrap() };
        let text = fs::read(machine.dir.join(RUN)).unwrap();
        fs::write(machine.dir.join(RUN), elsewhere.bytes(Path::new("")).unwrap()).unwrap();
        assert_eq!(machine.condition().unwrap(), Condition::Lost);
        fs::write(machine.dir.join(RUN), text).unwrap();
        let held = machine.lock().unwrap();
        held.started().unwrap();
        assert_eq!(machine.condition().unwrap(), Condition::Running);
        assert!(matches!(machine.lock(), Err(Error::Running(_))));
        assert!(matches!(store.remove_machine(&machine.spec.name), Err(Error::Running(_))));
        drop(held); // as a kill does
        assert!(soon(&machine, Condition::Died));
        let run = Run { boot_id: "another".into(), pid: 1, ended: false };
        fs::write(machine.dir.join(RUN), serde_json::to_vec(&run).unwrap()).unwrap();
        assert!(soon(&machine, Condition::Lost));
        // A power cut can leave the name without what was in the file.
        fs::write(machine.dir.join(RUN), "").unwrap();
        assert!(soon(&machine, Condition::Lost));
        let held = machine.lock().unwrap();
        held.started().unwrap();
        held.ended().unwrap();
        drop(held);
        assert!(soon(&machine, Condition::Stopped));
    }

    #[test]
    fn a_removed_machine_leaves_nothing_behind() {
        let (dir, store, snapshot) = store();
        let machine = store.create_machine(&spec("anna"), &snapshot).unwrap();
        fs::write(machine.console_log().unwrap(), "hello").unwrap();
        fs::write(machine.control_socket().unwrap(), "").unwrap();
        fs::write(machine.dir.join(SPEC), "damaged").unwrap();
        assert!(matches!(store.machine(&machine.spec.name), Err(Error::BadMachine { .. })));
        store.remove_machine(&machine.spec.name).unwrap();
        assert!(matches!(machine.lock(), Err(Error::NoMachine(_))));
        assert!(matches!(store.remove_machine(&machine.spec.name), Err(Error::NoMachine(_))));
        for folder in ["data/machines", "data/staging", "state/logs", "run"] {
            assert_eq!(names_in(&dir.path().join(folder)).unwrap(), [""; 0], "{folder}");
        }
    }
}
