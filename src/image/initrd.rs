//! The initramfs: our guest program as `/init`, and the modules that the kernel needs to reach its disk and
//! its host. It is not compressed: unpacking would cost the guest more than reading costs the host.

use super::cpio::Archive;
use super::modules::Module;

/// The guest's program, built for this Catnap by `build.rs`.
pub const GUEST: &[u8] = include_bytes!(env!("CATNAP_GUEST"));
/// Its digest, as the snapshot room writes digests.
pub const GUEST_DIGEST: &str = concat!("sha256:", env!("CATNAP_GUEST_DIGEST"));

/// An initramfs for a kernel that has everything built in.
pub fn without_modules() -> Vec<u8> {
    with_modules(&[])
}

/// Another Catnap's initramfs, or one of the user's, with this guest program as its `/init`: the kernel unpacks one
/// archive after the other, and what comes later stays.
pub fn with_this_guest(mut initrd: Vec<u8>) -> Vec<u8> {
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    let mut archive = Archive::default();
    archive.file("init", 0o755, GUEST);
    initrd.extend(archive.finish());
    initrd
}

/// An initramfs that loads `modules` in this order.
pub fn with_modules(modules: &[Module]) -> Vec<u8> {
    let mut archive = Archive::default();
    ["dev", "proc", "sys", "run", "sysroot"].iter().for_each(|name| archive.dir(name));
    // The kernel opens it for init's standard streams, before anyone could mount a devtmpfs.
    archive.character_device("dev/console", 0o600, 5, 1);
    if !modules.is_empty() {
        archive.dir("lib");
        archive.dir("lib/modules");
        let names = modules.iter().map(|module| module.file_name() + "\n").collect::<String>();
        archive.file("lib/modules/load", 0o644, names.as_bytes());
        for module in modules {
            archive.file(&format!("lib/modules/{}", module.file_name()), 0o644, &module.content);
        }
    }
    archive.file("init", 0o755, GUEST);
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Digest;

    #[test]
    fn the_digest_is_that_of_the_program() {
        assert_eq!(Digest::of(GUEST).to_string(), GUEST_DIGEST);
    }
}
