use std::fs::File;
use std::io::Read;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::GuestAddress;

use super::Error;
use crate::mem::{GuestMemory, layout};

/// A kernel in guest memory, by how it wants to be entered.
pub enum Kernel {
    /// The 64-bit Linux boot protocol.
    Linux64 {
        /// The first instruction.
        ip: u64,
        /// One byte past everything that the kernel touches before it knows the memory map.
        end: u64,
        /// The setup header of a bzImage.
        header: Option<setup_header>,
    },
    /// The PVH boot protocol.
    Pvh {
        /// The first instruction.
        ip: u64,
        /// One byte past the kernel.
        end: u64,
    },
}

/// The 64-bit entry lies so far behind the start of the protected-mode code (boot.rst, "64-bit boot protocol").
const ENTRY_64: u64 = 0x200;
/// Bit of `xloadflags`: the kernel has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// Boot protocol 2.12, the first with `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x020c;

/// Looks whether a file is a whole kernel, without loading it. linux-loader would take a bzImage that has
/// lost its end, and the guest would fall over it in silence.
pub fn check(path: &Path) -> Result<(), Error> {
    let read = |source| Error::Read { path: path.into(), source };
    let refuse = |why: &str| Err(Error::NotAKernel { path: path.into(), why: why.into() });
    let mut file = File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    let mut head = Vec::new();
    Read::by_ref(&mut file).take(HEAD).read_to_end(&mut head).map_err(read)?;
    let end = if head.starts_with(ELF_MAGIC) {
        end_of_elf(&head)
    } else if head.get(0x202..0x206) == Some(BZIMAGE_MAGIC) {
        end_of_bzimage(&head)
    } else {
        return refuse("it is neither a bzImage nor an ELF file");
    };
    match end {
        Some(end) if end <= length => Ok(()),
        Some(_) => refuse("its end is missing"),
        None => refuse("its header makes no sense"),
    }
}

/// How much of a kernel's beginning is looked at: a setup header, or an ELF header and its program headers.
const HEAD: u64 = 4096;
const ELF_MAGIC: &[u8] = b"\x7fELF";
const BZIMAGE_MAGIC: &[u8] = b"HdrS";

/// `N` bytes of a header, if it has them.
fn field<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..)?.first_chunk().copied()
}

/// The setup code's length in sectors (0 stands for 4) at 0x1f1, and the rest's in units of 16 bytes at 0x1f4.
fn end_of_bzimage(head: &[u8]) -> Option<u64> {
    let [sectors] = field(head, 0x1f1)?;
    let setup = (u64::from(if sectors == 0 { 4 } else { sectors }) + 1) * 512;
    Some(setup + u64::from(u32::from_le_bytes(field(head, 0x1f4)?)) * 16)
}

/// The furthest end of what the program headers (System V ABI, ELF-64) say is in the file.
fn end_of_elf(head: &[u8]) -> Option<u64> {
    let offset = usize::try_from(u64::from_le_bytes(field(head, 32)?)).ok()?;
    let (size, count) = (u16::from_le_bytes(field(head, 54)?), u16::from_le_bytes(field(head, 56)?));
    let mut furthest = 0;
    for index in 0..usize::from(count) {
        let header = offset.checked_add(index * usize::from(size))?;
        let start = u64::from_le_bytes(field(head, header.checked_add(8)?)?);
        let length = u64::from_le_bytes(field(head, header.checked_add(32)?)?);
        furthest = furthest.max(start.checked_add(length)?);
    }
    Some(furthest)
}

impl Kernel {
    /// Loads a bzImage or an ELF file, whatever its name is.
    pub fn load(mem: &GuestMemory, path: &Path) -> Result<Kernel, Error> {
        check(path)?;
        let refuse = |why: String| Error::NotAKernel { path: path.into(), why };
        let mut file = File::open(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let high = Some(GuestAddress(layout::HIGH_RAM_START));
        match Elf::load(mem, None, &mut file, high) {
            Ok(loaded) => return Ok(Self::from_elf(&loaded)),
            Err(linux_loader::loader::Error::Elf(
                linux_loader::loader::elf::Error::InvalidElfMagicNumber
                | linux_loader::loader::elf::Error::ReadElfHeader,
            )) => {}
            Err(error) => return Err(refuse(error.to_string())),
        }
        let loaded = BzImage::load(mem, None, &mut file, high)
            .map_err(|error| refuse(format!("no ELF file, and as a bzImage: {error}")))?;
        Self::from_bzimage(&loaded).ok_or_else(|| refuse("it has no 64-bit entry (boot protocol 2.12)".into()))
    }

    fn from_elf(loaded: &KernelLoaderResult) -> Kernel {
        let end = loaded.kernel_end;
        match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(ip) => Kernel::Pvh { ip: ip.0, end },
            _ => Kernel::Linux64 { ip: loaded.kernel_load.0, end, header: None },
        }
    }

    fn from_bzimage(loaded: &KernelLoaderResult) -> Option<Kernel> {
        let header = loaded.setup_header.filter(|header| {
            let (version, flags) = (header.version, header.xloadflags);
            version >= VERSION_XLOADFLAGS && flags & XLF_KERNEL_64 != 0
        })?;
        // It unpacks itself to its preferred address and needs `init_size` bytes there; or it stays.
        let (preferred, init_size) = (header.pref_address, u64::from(header.init_size));
        let end = preferred.max(loaded.kernel_load.0).checked_add(init_size)?.max(loaded.kernel_end);
        Some(Kernel::Linux64 { ip: loaded.kernel_load.0 + ENTRY_64, end, header: Some(header) })
    }

    /// One byte past the memory that the kernel needs for itself at first.
    pub fn end(&self) -> u64 {
        match self {
            Kernel::Linux64 { end, .. } | Kernel::Pvh { end, .. } => *end,
        }
    }

    /// One byte past the highest address that an initramfs may have.
    pub fn initrd_limit(&self) -> u64 {
        match self {
            Kernel::Linux64 { header: Some(header), .. } => u64::from(header.initrd_addr_max) + 1,
            _ => layout::HOLE_START,
        }
    }

    /// The longest command line with its closing zero.
    pub fn command_line_limit(&self) -> usize {
        match self {
            Kernel::Linux64 { header: Some(header), .. } => header.cmdline_size as usize + 1,
            _ => usize::MAX,
        }
    }
}
