//! The kernel modules that a guest needs, with what they need themselves, in the order to load them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, command, is_missing};
use crate::sys::files::At;

/// Without these a guest has no disk or no way to speak to its host.
const NEEDED: [&str; 5] = ["virtio_mmio", "virtio_blk", "vsock", "vmw_vsock_virtio_transport", "ext4"];
/// These make a guest better: entropy, resizing, the power button. `crc32c_generic` is what ext4 asks for by
/// the name of an algorithm, where it is not built in.
const WANTED: [&str; 5] = ["crc32c_generic", "virtio_rng", "virtio_mem", "button", "evdev"];
/// The largest module, unpacked. The largest of all in use are below 10 MiB.
const MAX_MODULE: usize = 64 << 20;

/// A module, unpacked.
pub struct Module {
    name: String,
    /// The ELF file.
    pub content: Vec<u8>,
}

impl Module {
    /// What it is called in the initramfs.
    pub fn file_name(&self) -> String {
        format!("{}.ko", self.name)
    }
}

/// Gathers the modules from a tree as below `/lib/modules/RELEASE`.
pub fn gather(tree: &Path) -> Result<Vec<Module>, Error> {
    let mut gatherer = Gatherer { files: HashMap::new(), builtin: builtin(tree)?, seen: HashSet::new(), found: vec![] };
    index(tree, &mut gatherer.files)?;
    for name in WANTED {
        gatherer.add(name, false)?;
    }
    for name in NEEDED {
        gatherer.add(name, true)?;
    }
    Ok(gatherer.found)
}

struct Gatherer {
    /// Where the module of each name is.
    files: HashMap<String, PathBuf>,
    builtin: HashSet<String>,
    seen: HashSet<String>,
    found: Vec<Module>,
}

impl Gatherer {
    /// Adds a module behind everything that it needs.
    fn add(&mut self, name: &str, needed: bool) -> Result<(), Error> {
        if self.builtin.contains(name) || !self.seen.insert(name.into()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            let missing = Error::Module { name: name.into(), why: "the kernel's package does not have it".into() };
            return if needed { Err(missing) } else { Ok(()) };
        };
        let content = read(path, name)?;
        for needs in depends(&content) {
            self.add(&needs, true)?;
        }
        self.found.push(Module { name: name.into(), content });
        Ok(())
    }
}

/// A module's name, out of the name of its file: `-` and `_` are the same to the kernel.
fn module_name(file: &str) -> Option<String> {
    let stem = ["", ".zst", ".xz", ".gz"].iter().find_map(|end| file.strip_suffix(&format!(".ko{end}")))?;
    Some(stem.replace('-', "_"))
}

fn index(dir: &Path, files: &mut HashMap<String, PathBuf>) -> Result<(), Error> {
    for entry in fs::read_dir(dir).at("read", dir)? {
        let entry = entry.at("read", dir)?;
        // Links (`build`, `source`) lead out of the tree.
        let kind = entry.file_type().at("read", &entry.path())?;
        if kind.is_dir() {
            index(&entry.path(), files)?;
        } else if let Some(name) = entry.file_name().to_str().and_then(module_name).filter(|_| kind.is_file()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

fn builtin(tree: &Path) -> Result<HashSet<String>, Error> {
    let path = tree.join("modules.builtin");
    let text = match fs::read_to_string(&path) {
        Err(error) if is_missing(&error) => String::new(),
        other => other.at("read", &path)?,
    };
    Ok(text.lines().filter_map(|line| module_name(line.rsplit('/').next()?)).collect())
}

fn read(path: &Path, name: &str) -> Result<Vec<u8>, Error> {
    let bad = |why: String| Error::Module { name: name.into(), why };
    let packed = fs::read(path).at("read", path)?;
    let content = match path.extension().and_then(|end| end.to_str()) {
        Some("ko") => packed,
        Some("zst") => zstd::bulk::decompress(&packed, MAX_MODULE).map_err(|error| bad(error.to_string()))?,
        Some("xz") => command::run(Command::new("xz").arg("-dc").arg(path), "xz-utils")?,
        _ => return Err(bad("it is compressed with a method that we do not know".into())),
    };
    if content.starts_with(b"\x7fELF") { Ok(content) } else { Err(bad("it is not an ELF file".into())) }
}

/// What a module says that it needs: `depends=a,b` among the zero-ended strings of its section `.modinfo`.
/// The package has no `modules.dep`, which only comes to be when it is installed.
fn depends(content: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = content.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let list = content[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let list = String::from_utf8_lossy(list);
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(dir: &Path, name: &str, depends: &str) {
        fs::write(dir.join(name), format!("\x7fELF…\0license=GPL\0depends={depends}\0name=x\0")).unwrap();
    }

    #[test]
    fn what_a_module_needs_is_loaded_before_it_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("kernel");
        fs::create_dir(&tree).unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\nkernel/x/vsock.ko\n").unwrap();
        module(&tree, "virtio.ko", "");
        module(&tree, "virtio_ring.ko", "");
        module(&tree, "virtio_mmio.ko", "virtio,virtio_ring");
        module(&tree, "virtio-rng.ko", "virtio");
        module(&tree, "vmw_vsock_virtio_transport.ko", "vsock,virtio");
        // Round in a circle: no kernel is like that, but it must end.
        module(&tree, "virtio_blk.ko", "virtio_blk,virtio");
        let names = |modules: Vec<Module>| modules.iter().map(Module::file_name).collect::<Vec<_>>().join(" ");
        assert_eq!(
            names(gather(dir.path()).unwrap()),
            "virtio.ko virtio_rng.ko virtio_ring.ko virtio_mmio.ko virtio_blk.ko vmw_vsock_virtio_transport.ko"
        );
        let packed = zstd::bulk::compress(&fs::read(tree.join("virtio.ko")).unwrap(), 1).unwrap();
        fs::write(tree.join("virtio.ko.zst"), packed).unwrap();
        fs::remove_file(tree.join("virtio.ko")).unwrap();
        assert!(names(gather(dir.path()).unwrap()).starts_with("virtio.ko "));
        fs::rename(tree.join("virtio_ring.ko"), tree.join("virtio_ring.ko.gz")).unwrap();
        assert!(gather(dir.path()).is_err_and(|error| error.to_string().contains("virtio_ring")));
        fs::remove_file(tree.join("virtio_ring.ko.gz")).unwrap();
        assert!(gather(dir.path()).is_err_and(|error| error.to_string().contains("virtio_ring")));
    }
}
