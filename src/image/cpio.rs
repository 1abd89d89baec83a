//! The archive format of an initramfs: cpio, "newc" (the kernel's `early-userspace/buffer-format`).

/// An archive being written. Times are zero and inode numbers count up, so that the same content makes the
/// same bytes.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

// File types of `st_mode` (inode(7)).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    /// Adds a folder. Parents must come before what is in them.
    pub fn dir(&mut self, name: &str) {
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, REGULAR | permissions, (0, 0), content);
    }

    /// Adds a character device, which root owns.
    pub fn character_device(&mut self, name: &str, permissions: u32, major: u32, minor: u32) {
        self.entry(name, CHARACTER | permissions, (major, minor), &[]);
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inodes += 1;
        let fields = [
            self.inodes,
            mode,
            0, // owner
            0, // group
            1, // links
            0, // time of change
            content.len() as u32,
            0, // the device that it is on,
            0, // minor
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // checksum, unused in this variant
        ];
        self.bytes.extend(b"070701");
        fields.iter().for_each(|field| self.bytes.extend(format!("{field:08x}").as_bytes()));
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Names and contents end at multiples of 4.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn other_programs_read_what_we_write() {
        let mut archive = Archive::default();
        archive.dir("dev");
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.file("init", 0o755, b"odd");
        archive.file("empty", 0o644, b"");
        let bytes = archive.finish();
        let mut command = Command::new("cpio");
        command.arg("-itv").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("cpio; scripts/test installs it");
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listed = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        for line in ["drwxr-xr-x", "crw-------", "-rwxr-xr-x", "-rw-r--r--"] {
            assert!(listed.contains(line), "{listed}");
        }
        for name in ["dev/console", "init", "empty"] {
            assert!(listed.contains(name), "{listed}");
        }
        assert!(listed.contains("5,") && bytes.len() % 4 == 0, "{listed}");
    }
}
