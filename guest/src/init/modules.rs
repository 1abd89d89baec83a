//! Kernel modules of a distribution's kernel, from the initramfs. A kernel that has everything built in comes
//! without any.

use std::fs::{self, File};
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};

use super::console::say;

const FOLDER: &str = "/lib/modules";
/// include/uapi/linux/magic.h; an initramfs is one of the two.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// A module's name and its open file.
pub(super) type Module = (String, File);

/// Loads the modules that `/lib/modules/load` names, one a line, in that order. Those in
/// `/lib/modules/load.later` are returned, for when nobody waits any more.
pub(super) fn load() -> Vec<Module> {
    load_each(open("load"));
    let later = open("load.later");
    // The files are in RAM and have done their work. Never on a real disk.
    if statfs("/").is_ok_and(|fs| [RAMFS_MAGIC, TMPFS_MAGIC].contains(&fs.filesystem_type())) {
        let _ = fs::remove_dir_all(FOLDER);
    }
    later
}

fn open(list: &str) -> Vec<Module> {
    let list = fs::read_to_string(Path::new(FOLDER).join(list)).unwrap_or_default();
    let names = list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let module = |name: &str| {
        // An absolute path replaces the folder.
        let file = File::open(Path::new(FOLDER).join(name));
        file.map_err(|error| say(&format!("module {name}: {error}"))).ok().map(|file| (name.to_string(), file))
    };
    names.filter_map(module).collect()
}

/// Loads modules in their order. Whether one that fails was needed shows later, in what is missing.
pub(super) fn load_each(modules: Vec<Module>) {
    for (name, file) in modules {
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(Errno::ENOENT) => say(&format!("module {name}: it needs one that is not loaded yet")),
            Err(error) => say(&format!("module {name}: {error}")),
        }
    }
}
