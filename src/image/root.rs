//! The root disk: an ext4 filesystem, filled without mounting it and without root rights.
//!
//! `debugfs` writes into the filesystem in the order that we give, and everything belongs to root, whoever
//! builds. (`mke2fs -d` would copy the builder's own user id, and the order of the host's folders.)

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Error, command};
use crate::sys::files::At;

/// Made up once; the same in every image, so that the same content makes the same bytes.
const UUID: &str = "ca7ca7ca-7000-4000-8000-ca7ca7ca7000";
const DIRS: [(&str, u32); 19] = [
    ("/bin", 0o755),
    ("/dev", 0o755),
    ("/etc", 0o755),
    ("/mnt", 0o755),
    ("/proc", 0o755),
    ("/root", 0o700),
    ("/root/.ssh", 0o700),
    ("/run", 0o755),
    ("/sbin", 0o755),
    ("/sys", 0o755),
    ("/tmp", 0o1777),
    ("/usr", 0o755),
    ("/usr/bin", 0o755),
    ("/usr/sbin", 0o755),
    ("/var", 0o755),
    ("/var/lib", 0o755),
    ("/var/lib/kitten", 0o755),
    ("/var/log", 0o755),
    ("/var/tmp", 0o1777),
];
const FILES: [(&str, u32, &str); 9] = [
    ("/etc/group", 0o644, include_str!("../../images/kitten/group")),
    ("/etc/hostname", 0o644, include_str!("../../images/kitten/hostname")),
    ("/etc/kitten.conf", 0o644, include_str!("../../images/kitten/kitten.conf")),
    // Empty: each machine gives itself one at its first boot.
    ("/etc/machine-id", 0o444, ""),
    ("/etc/motd", 0o644, include_str!("../../images/kitten/motd")),
    ("/etc/os-release", 0o644, include_str!("../../images/kitten/os-release")),
    ("/etc/passwd", 0o644, include_str!("../../images/kitten/passwd")),
    // Anna left her key in the image. The lesson is about that; see `images/kitten/README.md`.
    ("/root/.ssh/authorized_keys", 0o600, include_str!("../../images/kitten/id_ed25519.pub")),
    ("/root/.ssh/id_ed25519", 0o600, include_str!("../../images/kitten/id_ed25519")),
];
const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;

/// Makes the filesystem in a new sparse file at `raw`. All times in it are `time`.
pub fn make(raw: &Path, size: u64, work: &Path, busybox: Option<&Path>, time: u64) -> Result<(), Error> {
    fs::File::create(raw).and_then(|file| file.set_len(size)).at("make", raw)?;
    // Zeroed by mke2fs, which costs nothing in a sparse file, the tables need not be zeroed by every guest.
    // A small journal keeps what a guest writes, and thus its snapshots, small.
    let format = ["-q", "-F", "-t", "ext4", "-b", "4096", "-i", "65536", "-m", "1", "-J", "size=16", "-L", "kitten"];
    let extended = format!("hash_seed={UUID},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,nodiscard");
    let mut mke2fs = tool("mke2fs", time);
    command::run(mke2fs.args(format).args(["-U", UUID, "-E", &extended]).arg(raw), "e2fsprogs")?;

    let mut script = String::new();
    for (path, mode) in DIRS {
        let _ = writeln!(script, "mkdir {path}\nsif {path} mode 0{:o}", DIRECTORY | mode);
    }
    for (i, (path, mode, content)) in FILES.iter().enumerate() {
        let source = work.join(format!("file{i}"));
        fs::write(&source, content).at("write", &source)?;
        let _ = writeln!(script, "write file{i} {path}\nsif {path} mode 0{:o}", REGULAR | mode);
    }
    if let Some(busybox) = busybox {
        fs::copy(busybox, work.join("busybox.bin")).at("copy", busybox)?;
        let _ = writeln!(script, "write busybox.bin /bin/busybox\nsif /bin/busybox mode 0{:o}", REGULAR | 0o755);
        for applet in applets(busybox)? {
            let _ = writeln!(script, "symlink /{applet} /bin/busybox");
        }
    }
    debugfs(raw, work, &script, time)?;
    command::run(tool("e2fsck", time).args(["-f", "-n"]).arg(raw), "e2fsprogs")?;
    Ok(())
}

/// The paths, without the leading slash, by which busybox wants to be called.
fn applets(busybox: &Path) -> Result<Vec<String>, Error> {
    let listed = command::run(Command::new(busybox).arg("--list-full"), "busybox-static")?;
    let listed = String::from_utf8_lossy(&listed);
    let known = |path: &&str| {
        let folder = path.rsplit_once('/').map(|(folder, _)| folder);
        matches!(folder, Some("bin" | "sbin" | "usr/bin" | "usr/sbin"))
            && path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+[".contains(&b))
    };
    // Our own program is init; busybox's must not be found in its place.
    let unwanted = ["bin/busybox", "sbin/init"];
    let mut applets: Vec<_> = listed.lines().filter(known).filter(|path| !unwanted.contains(path)).collect();
    applets.sort_unstable();
    applets.dedup();
    Ok(applets.into_iter().map(str::to_owned).collect())
}

/// Runs a script. debugfs goes on after an error and ends well all the same, so whatever it says on its
/// standard error besides its name and version is taken for one.
fn debugfs(raw: &Path, work: &Path, script: &str, time: u64) -> Result<(), Error> {
    let path = work.join("script");
    fs::write(&path, script).at("write", &path)?;
    let mut command = tool("debugfs", time);
    command.args(["-w", "-f"]).arg("script").arg(raw).current_dir(work);
    let output = command::output(&mut command, "e2fsprogs")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<_> = said.lines().filter(|line| !line.starts_with("debugfs ")).collect();
    if output.status.success() && complaints.is_empty() {
        return Ok(());
    }
    Err(command::failed(&command, complaints.join("; ").as_bytes(), &output.status.to_string()))
}

/// A program of e2fsprogs, which lie where ordinary users' PATH does not lead, with its clock stopped.
fn tool(name: &str, time: u64) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command.env("E2FSPROGS_FAKE_TIME", time.to_string()).env("SOURCE_DATE_EPOCH", time.to_string());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(raw: &Path, question: &str) -> String {
        let output = tool("debugfs", 1).args(["-R", question]).arg(raw).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn everything_belongs_to_root_and_the_same_content_makes_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = Vec::new();
        for name in ["one", "two"] {
            let (raw, work) = (dir.path().join(name), dir.path().join(format!("{name}.work")));
            fs::create_dir(&work).unwrap();
            make(&raw, 64 << 20, &work, None, 1_700_000_000).unwrap();
            images.push(fs::read(raw).unwrap());
            std::thread::sleep(std::time::Duration::from_millis(1100));
        }
        assert!(images[0] == images[1]);
        let raw = dir.path().join("one");
        for (path, mode, _) in FILES {
            let said = ask(&raw, &format!("stat {path}"));
            assert!(said.contains(&format!("Mode:  {mode:04o}")), "{said}");
            assert!(said.contains("User:     0   Group:     0"), "{said}");
        }
        assert!(ask(&raw, "cat /root/.ssh/id_ed25519").contains("OPENSSH PRIVATE KEY"));
        assert!(ask(&raw, "stat /tmp").contains("Mode:  01777"));
    }

    #[test]
    fn a_step_that_fails_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        make(&raw, 64 << 20, dir.path(), None, 1).unwrap();
        let error = debugfs(&raw, dir.path(), "write no-such-file /x\n", 1).unwrap_err();
        assert!(error.to_string().contains("no-such-file"), "{error}");
        assert!(make(&raw, 1 << 10, dir.path(), None, 1).is_err());
    }
}
