//! Packages of Debian and Ubuntu, fetched and unpacked without being installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, Progress, command, is_missing};
use crate::sys::files::{At, names_in, private_dir};

/// Whether this system has packages of this kind at all.
pub fn available() -> bool {
    Command::new("apt-cache").arg("--version").output().is_ok_and(|output| output.status.success())
}

/// The packages that `package` depends on, if it is known.
pub fn dependencies(package: &str) -> Result<Option<Vec<String>>, Error> {
    let output = match command::run(Command::new("apt-cache").args(["depends", package]), "apt") {
        // It says no more than that there is nothing of that name.
        Err(Error::Failed { .. }) => return Ok(None),
        other => other?,
    };
    let output = String::from_utf8_lossy(&output);
    let needed = output.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(Some(needed.filter(|name| !name.starts_with('<')).map(str::to_owned).collect()))
}

/// Fetches a package into the cache, unless it is there, and unpacks it below `into`.
pub fn unpack(package: &str, into: &Path, cache: &Path, progress: &mut dyn Progress) -> Result<(), Error> {
    let archive = fetch(package, into, cache, progress)?;
    progress.step(&format!("unpacking {package}"), 0, 0);
    // It unpacks as whoever we are, and sets no owners then.
    command::run(Command::new("dpkg-deb").arg("-x").args([&archive, into]), "dpkg")?;
    Ok(())
}

fn fetch(package: &str, work: &Path, cache: &Path, progress: &mut dyn Progress) -> Result<PathBuf, Error> {
    let packages = cache.join("packages");
    private_dir(&packages)?;
    let is_it = |file: &String| file.strip_prefix(package).is_some_and(|rest| rest.starts_with('_'));
    if let Some(there) = names_in(&packages)?.into_iter().rfind(is_it) {
        return Ok(packages.join(there));
    }
    progress.step(&format!("fetching {package}"), 0, 0);
    // Into a folder of its own, so that what is in the cache is always whole: apt checks what it fetched.
    let arriving = work.join("fetch");
    private_dir(&arriving)?;
    command::run(Command::new("apt-get").args(["download", "-q", package]).current_dir(&arriving), "apt")?;
    let file = names_in(&arriving)?.into_iter().find(is_it).ok_or_else(|| Error::Failed {
        command: format!("apt-get download {package}"),
        said: "it fetched nothing; `apt-get update` may help".into(),
    })?;
    let kept = packages.join(&file);
    // The cache may be on another filesystem: copy beside the destination, then rename.
    let copy = packages.join(format!(".{file}"));
    fs::copy(arriving.join(&file), &copy).at("copy", &copy)?;
    fs::rename(&copy, &kept).at("make", &kept)?;
    fs::remove_dir_all(&arriving).at("remove", &arriving)?;
    Ok(kept)
}

/// A busybox that needs no libraries: the distribution's, or the host's own. Without one the image works,
/// and has no shell.
pub fn busybox(work: &Path, cache: &Path, progress: &mut dyn Progress) -> Result<Option<PathBuf>, Error> {
    let package = "busybox-static";
    if available() && dependencies(package)?.is_some() {
        let into = work.join("busybox");
        private_dir(&into)?;
        unpack(package, &into, cache, progress)?;
        return Ok(["bin/busybox", "usr/bin/busybox"].iter().map(|name| into.join(name)).find(|path| path.is_file()));
    }
    let own = ["/bin/busybox", "/usr/bin/busybox", "/sbin/busybox"].map(PathBuf::from).into_iter();
    let own = own.filter_map(|path| match is_static(&path) {
        Ok(true) => Some(Ok(path)),
        Ok(false) => None,
        Err(error) => Some(Err(error)),
    });
    let own = own.collect::<Result<Vec<_>, Error>>()?.into_iter().next();
    if own.is_none() {
        progress.warn("no static busybox was found: the guest will have no shell (install busybox-static)");
    }
    Ok(own)
}

/// A program that needs a loader names it; a static one has no need to.
fn is_static(path: &Path) -> Result<bool, Error> {
    match fs::read(path) {
        Err(error) if is_missing(&error) => Ok(false),
        other => {
            let program = other.at("read", path)?;
            let loader = b"/ld-linux";
            Ok(!program[..program.len().min(4096)].windows(loader.len()).any(|window| window == loader))
        }
    }
}
