//! How the base image `kitten` is made: a kernel of the distribution, an initramfs with our guest program in
//! it, and a small ext4 root disk. No root rights are needed, and nothing is installed.
//!
//! The same packages and the same Catnap give the same image, byte by byte, so its digest says what it is.

mod command;
mod cpio;
mod initrd;
mod kernel;
mod modules;
mod packages;
mod root;
mod vmlinux;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use initrd::{with_this_guest, without_modules};

use crate::disk;
use crate::snapshot::{Disk, Kind, Manifest, Role, describe};
use crate::store::{self, Snapshot, Store};
use crate::sys::files::{self, At};
use crate::sys::lock::FileLock;

/// The base image's name.
pub const NAME: &str = "kitten";
/// The root disk's size. Most of it is never written, and costs nothing.
const ROOT_SIZE: u64 = 2 << 30;
/// Where the manifest says which guest program the image carries.
const GUEST: &str = "catnap_guest";

const KERNEL_FILE: &str = "kernel";
const INITRD_FILE: &str = "initrd";
const ROOT_FILE: &str = "root.qcow2";

/// Why the image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be used.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The disk could not be made.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// A program that is needed is not installed.
    #[error("`{program}` is missing: install the package {package}")]
    Missing {
        /// The program.
        program: String,
        /// The package that has it, as Debian calls it.
        package: &'static str,
    },
    /// A program failed.
    #[error("`{command}` failed: {said}")]
    Failed {
        /// What was run.
        command: String,
        /// The end of what it said.
        said: String,
    },
    /// The kernel cannot be used.
    #[error("{path} cannot be used as a kernel: {why}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A module cannot be used.
    #[error("the kernel module {name} cannot be used: {why}")]
    Module {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
}

/// Told what is being done, for people who wait.
pub trait Progress {
    /// A step goes on; `total` is 0 when its length is not known.
    fn step(&mut self, what: &str, done: u64, total: u64);
    /// Something is less good than it could be.
    fn warn(&mut self, what: &str);
}

/// Gives the image, its files checked; makes it when it is missing, or when it carries another guest program
/// than this Catnap. One maker at a time; whoever waited finds it made.
pub fn ensure(store: &Store, progress: &mut dyn Progress) -> Result<Snapshot, Error> {
    if let Some(there) = find(store)? {
        return Ok(there);
    }
    let _lock = FileLock::exclusive(&store.home().cache.join("image.lock"))?;
    match find(store)? {
        Some(there) => Ok(there),
        None => build(store, progress),
    }
}

fn find(store: &Store) -> Result<Option<Snapshot>, Error> {
    let snapshot = match store.resolve(NAME) {
        Err(store::Error::NoSnapshot(_)) => return Ok(None),
        other => other?,
    };
    if snapshot.manifest.host.get(GUEST).and_then(|guest| guest.as_str()) != Some(initrd::GUEST_DIGEST) {
        return Ok(None);
    }
    store.verify_quickly(&snapshot)?;
    Ok(Some(snapshot))
}

/// Makes the image, whether it is there or not.
pub fn build(store: &Store, progress: &mut dyn Progress) -> Result<Snapshot, Error> {
    store.sweep()?;
    let work = store.stage()?;
    let out = store.stage()?;
    let kernel = kernel::obtain(work.dir(), &store.home().cache, progress)?;

    progress.step("unpacking the kernel", 0, 0);
    let image = fs::read(&kernel.file).at("read", &kernel.file)?;
    let image = vmlinux::unpack(image).map_err(|why| Error::Kernel { path: kernel.file.clone(), why })?;
    write(&out.dir().join(KERNEL_FILE), &image)?;

    progress.step("making the initramfs", 0, 0);
    let modules = modules::gather(&kernel.modules)?;
    write(&out.dir().join(INITRD_FILE), &initrd::with_modules(&modules))?;

    let busybox = packages::busybox(work.dir(), &store.home().cache, progress)?;
    progress.step("making the root disk", 0, 0);
    let raw = work.dir().join("root.raw");
    root::make(&raw, ROOT_SIZE, work.dir(), busybox.as_deref(), kernel.made)?;
    disk::create_from_raw(&raw, &out.dir().join(ROOT_FILE))?;

    progress.step("computing digests", 0, 0);
    let manifest = manifest(out.dir(), &kernel)?;
    Ok(store.publish(out, &manifest, NAME)?)
}

fn manifest(dir: &Path, kernel: &kernel::Kernel) -> Result<Manifest, Error> {
    // The time of the kernel's making in place of now: the same content shall have the same digest.
    let mut manifest = Manifest::new(Kind::Clean, NAME, kernel.made);
    manifest.note = format!("Linux {}", kernel.release);
    for (file, role) in [(KERNEL_FILE, Role::Kernel), (INITRD_FILE, Role::Initrd), (ROOT_FILE, Role::Disk)] {
        manifest.files.push(describe(dir, file, role)?);
    }
    manifest.disks.push(Disk {
        device: "root".into(),
        file: ROOT_FILE.into(),
        format: disk::Format::Qcow2.name().into(),
        virtual_size: ROOT_SIZE,
        backing: None,
    });
    manifest.host.insert(GUEST.into(), initrd::GUEST_DIGEST.into());
    Ok(manifest)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    Ok(fs::write(path, bytes).at("write", path)?)
}

/// Whether a failure to read means that there is nothing.
fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}
