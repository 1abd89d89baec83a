//! What must be in guest memory before the first instruction: kernel, initramfs, command line, the memory
//! map in the form that the boot protocol wants, and the ACPI tables.
//!
//! ```text
//! 0x0_6000  PVH start info, modules, memory map      0x0_9000  page tables (7 pages)
//! 0x0_7000  zero page                                0x2_0000  command line
//! 0xe_0000  ACPI tables                             0x10_0000  kernel …        … initramfs, at the top of RAM below 3 GiB
//! ```

mod kernel;
mod page_table;
mod pvh;
mod zero_page;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::acpi;
use crate::kvm::Entry;
use crate::mem::{GuestMemory, layout};

use kernel::Kernel;
pub use kernel::check as check_kernel;

const COMMAND_LINE: u64 = 0x2_0000;
/// COMMAND_LINE_SIZE of Linux on x86, with the closing zero.
const COMMAND_LINE_LIMIT: usize = 2048;

/// What to boot.
pub struct Sources<'a> {
    /// A bzImage, or an ELF file with a PVH note or a 64-bit entry.
    pub kernel: &'a Path,
    /// The initramfs, if any.
    pub initrd: Option<&'a Path>,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// RAM that is there at the boot, in bytes; what can be plugged in later is no part of the memory map.
    pub memory: u64,
    /// What the ACPI tables say.
    pub acpi: acpi::Description,
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("{path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no kernel that Catnap can boot.
    #[error("{path} is not a kernel that can be booted here: {why}")]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// Kernel and initramfs do not fit into RAM.
    #[error("the kernel and its initramfs need more memory than the machine's {ram} bytes")]
    TooLittleMemory {
        /// The machine's RAM.
        ram: u64,
    },
    /// The command line is too long, or has a zero byte.
    #[error("the kernel's command line must be shorter than {limit} bytes and have no zero byte")]
    CommandLine {
        /// The limit that this kernel has.
        limit: usize,
    },
    /// Boot structures do not fit, which only a bug of ours or a very small RAM can bring about.
    #[error("guest memory cannot be written: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Fills guest memory and says where the first vCPU begins.
pub fn load(mem: &GuestMemory, sources: &Sources<'_>) -> Result<Entry, Error> {
    let kernel = Kernel::load(mem, sources.kernel)?;
    let initrd = match sources.initrd {
        Some(path) => Some(load_initrd(mem, path, &kernel)?),
        None => None,
    };
    let command_line = Placed { start: COMMAND_LINE, len: sources.command_line.len() as u64 };
    let limit = kernel.command_line_limit().min(COMMAND_LINE_LIMIT);
    if sources.command_line.len() >= limit || sources.command_line.contains('\0') {
        return Err(Error::CommandLine { limit });
    }
    mem.write_slice(sources.command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    mem.write_obj(0u8, GuestAddress(COMMAND_LINE + command_line.len))?;

    let tables = acpi::build(&sources.acpi, layout::ACPI_START);
    assert!(tables.len() as u64 <= layout::ACPI_TABLES_LIMIT, "64 vCPUs and their devices take a few KiB");
    mem.write_slice(&tables, GuestAddress(layout::ACPI_START))?;

    let map = memory_map(sources.memory);
    match kernel {
        Kernel::Linux64 { ip, header, .. } => {
            let zero_page = zero_page::write(mem, header.as_ref(), command_line, initrd, &map)?;
            Ok(Entry::Linux64 { ip, zero_page, page_table: page_table::write(mem)? })
        }
        Kernel::Pvh { ip, .. } => Ok(Entry::Pvh { ip, start_info: pvh::write(mem, command_line, initrd, &map)? }),
    }
}

/// Something that lies in guest memory.
#[derive(Clone, Copy, Debug)]
struct Placed {
    start: u64,
    len: u64,
}

/// Puts the initramfs as high as kernel and RAM below the hole allow, out of the way of a kernel that grows.
fn load_initrd(mem: &GuestMemory, path: &Path, kernel: &Kernel) -> Result<Placed, Error> {
    let read = |source| Error::Read { path: path.into(), source };
    let ram: u64 = mem.iter().map(GuestMemoryRegion::len).sum();
    let mut file = File::open(path).map_err(read)?;
    let len = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.rewind().map_err(read)?;
    let low_ram_end = mem.iter().next().map_or(0, GuestMemoryRegion::len);
    let end = low_ram_end.min(kernel.initrd_limit());
    let start = end.checked_sub(len).map(|start| start & !0xfff).filter(|start| *start >= kernel.end());
    let start = start.ok_or(Error::TooLittleMemory { ram })?;
    mem.read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)?;
    Ok(Placed { start, len })
}

/// What kind of range an entry of the memory map is; the numbers are the same in the zero page's E820 map
/// (ACPI 6.5, table 15.3) and in PVH's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

/// A range of the memory map: address, length, kind.
type Range = (u64, u64, RangeKind);

/// The memory map: RAM less what a BIOS would keep, and the ACPI tables.
fn memory_map(memory: u64) -> Vec<Range> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, RangeKind::Ram),
        (layout::ACPI_START, layout::ACPI_END - layout::ACPI_START, RangeKind::Reserved),
    ];
    for (start, length) in layout::ram(memory) {
        let (start, end) = (start.0.max(layout::HIGH_RAM_START), start.0 + length);
        if end > start {
            map.push((start, end - start, RangeKind::Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::mem;

    fn sources(kernel: &Path) -> Sources<'_> {
        let acpi = acpi::Description {
            cpus: 1,
            max_cpus: 1,
            local_apic: 0xfee0_0000,
            io_apic: 0xfec0_0000,
            sleep_control: 0x600,
            sleep_status: 0x601,
            reset: 0x602,
            devices: vec![],
        };
        Sources { kernel, initrd: None, command_line: "console=ttyS0", memory: 64 << 20, acpi }
    }

    fn refused(bytes: &[u8]) -> String {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        load(&mem::from_ranges(&layout::ram(64 << 20)).unwrap(), &sources(file.path())).unwrap_err().to_string()
    }

    /// An ELF header with one loadable segment of `size` bytes at `address`, and nothing behind.
    fn elf(address: u64, size: u64) -> Vec<u8> {
        let mut elf = vec![0; 64 + 56];
        elf[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
        elf[16..24].copy_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64
        elf[24..32].copy_from_slice(&address.to_le_bytes()); // entry
        elf[32..40].copy_from_slice(&64u64.to_le_bytes()); // program headers
        elf[54..58].copy_from_slice(&[56, 0, 1, 0]); // of 56 bytes, one
        elf[64..68].copy_from_slice(&1u32.to_le_bytes()); // PT_LOAD
        elf[64 + 24..64 + 32].copy_from_slice(&address.to_le_bytes()); // physical address
        elf[64 + 32..64 + 40].copy_from_slice(&size.to_le_bytes()); // size in the file
        elf[64 + 40..64 + 48].copy_from_slice(&size.to_le_bytes()); // size in memory
        elf
    }

    #[test]
    fn what_is_not_a_kernel_is_refused_by_name() {
        assert!(refused(b"").contains("neither a bzImage nor an ELF file"));
        assert!(refused(&[0x5a; 4096]).contains("not a kernel"));
        assert!(refused(&elf(0x10_0000, 4096)).contains("its end is missing"));
        assert!(refused(&elf(1 << 40, 120)).contains("not a kernel"), "outside of RAM");
        assert!(refused(&elf(0x10_0000, u64::MAX)).contains("not a kernel"), "endless");
        let mut bzimage = vec![0; 0x400];
        bzimage[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        bzimage[0x1f1] = 0xff;
        assert!(refused(&bzimage).contains("its end is missing"));
        bzimage[0x1f1] = 1;
        bzimage[0x1f4] = 1;
        assert!(refused(&bzimage).contains("its end is missing"), "one paragraph short");
    }

    #[test]
    fn the_map_leaves_out_what_is_not_ram() {
        assert_eq!(
            memory_map((3 << 30) + (1 << 20)),
            [
                (0, 0x9_fc00, RangeKind::Ram),
                (0xe_0000, 0x2_0000, RangeKind::Reserved),
                (0x10_0000, (3 << 30) - 0x10_0000, RangeKind::Ram),
                (4 << 30, 1 << 20, RangeKind::Ram),
            ]
        );
    }

    #[test]
    fn an_elf_without_a_note_is_entered_in_64_bit_mode_with_a_zero_page() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&elf(0x100_0000, 120)).unwrap();
        let mem = mem::from_ranges(&layout::ram(64 << 20)).unwrap();
        let entry = load(&mem, &sources(file.path())).unwrap();
        let Entry::Linux64 { ip: 0x100_0000, zero_page, page_table } = entry else { panic!("{entry:?}") };
        assert_eq!(mem.read_obj::<u32>(GuestAddress(zero_page + 0x202)).unwrap(), 0x5372_6448, "HdrS");
        assert_eq!(mem.read_obj::<u8>(GuestAddress(zero_page + 0x1e8)).unwrap(), 3, "entries of the memory map");
        let pdpt = mem.read_obj::<u64>(GuestAddress(page_table)).unwrap() & !0xfff;
        let pd = mem.read_obj::<u64>(GuestAddress(pdpt + 3 * 8)).unwrap() & !0xfff;
        assert_eq!(mem.read_obj::<u64>(GuestAddress(pd + 511 * 8)).unwrap() & !0xfff, (4 << 30) - (2 << 20));
    }
}
