//! Which kernel goes into the image: the distribution's for virtual machines, or the host's own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Error, Progress, packages};
use crate::sys::files::{At, names_in, private_dir};

/// The packages that stand for the newest kernel for virtual machines: Debian's and Ubuntu's.
const PACKAGES: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];

/// A kernel and its modules.
pub struct Kernel {
    /// The kernel as it is shipped.
    pub file: PathBuf,
    /// The folder of its modules.
    pub modules: PathBuf,
    /// Its release, as `uname -r` shows it.
    pub release: String,
    /// When it was made, in seconds since 1970.
    pub made: u64,
}

/// Gets a kernel. What is unpacked goes below `work`.
pub fn obtain(work: &Path, cache: &Path, progress: &mut dyn Progress) -> Result<Kernel, Error> {
    progress.step("looking for a kernel", 0, 0);
    if packages::available() {
        for package in PACKAGES {
            if let Some(needed) = packages::dependencies(package)? {
                return packaged(&needed, &work.join("kernel"), cache, progress);
            }
        }
    }
    hosts_own(progress)
}

/// Unpacks the kernel and, where they are a package of their own, its modules.
fn packaged(needed: &[String], into: &Path, cache: &Path, progress: &mut dyn Progress) -> Result<Kernel, Error> {
    private_dir(into)?;
    let image = needed.iter().find(|name| name.starts_with("linux-image-"));
    let image = image.ok_or_else(|| Error::Failed {
        command: "apt-cache depends".into(),
        said: "the distribution's package depends on no kernel".into(),
    })?;
    packages::unpack(image, into, cache, progress)?;
    let release = image.trim_start_matches("linux-image-").trim_start_matches("unsigned-");
    let modules = format!("linux-modules-{release}");
    if packages::dependencies(&modules)?.is_some() {
        packages::unpack(&modules, into, cache, progress)?;
    }
    let release = names_in(&into.join("boot"))?
        .iter()
        .find_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
        .ok_or_else(|| Error::Kernel { path: into.join("boot"), why: "the package has none".into() })?;
    found(into, release)
}

fn hosts_own(progress: &mut dyn Progress) -> Result<Kernel, Error> {
    let path = Path::new("/proc/sys/kernel/osrelease");
    let release = fs::read_to_string(path).at("read", path)?.trim().to_owned();
    progress.warn(&format!("no packaged kernel for virtual machines: taking this host's own, {release}"));
    found(Path::new("/"), release)
}

fn found(root: &Path, release: String) -> Result<Kernel, Error> {
    let file = root.join("boot").join(format!("vmlinuz-{release}"));
    let made = fs::metadata(&file).at("find", &file)?.mtime().unsigned_abs();
    // `/lib` is `/usr/lib` on the newest systems, and packages follow.
    let modules = ["lib/modules", "usr/lib/modules"].map(|folder| root.join(folder).join(&release));
    let [first, second] = modules;
    let modules = if first.is_dir() { first } else { second };
    Ok(Kernel { file, modules, release, made })
}
