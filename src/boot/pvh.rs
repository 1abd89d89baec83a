//! PVH's start info (Xen, public/arch-x86/hvm/start_info.h): where command line, initramfs, memory map and
//! RSDP are.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Placed, Range};
use crate::mem::{GuestMemory, layout};

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6100;
const MEMORY_MAP: u64 = 0x6200;

/// "xEn3" with the highest bit of the first letter set: XEN_HVM_START_MAGIC_VALUE.
const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;

/// Writes the start info and all that it points to, and gives its address.
pub fn write(
    mem: &GuestMemory,
    command_line: Placed,
    initrd: Option<Placed>,
    map: &[Range],
) -> Result<u64, GuestMemoryError> {
    for (index, &(addr, size, kind)) in map.iter().enumerate() {
        let entry = hvm_memmap_table_entry { addr, size, type_: kind as u32, reserved: 0 };
        mem.write_obj(entry, GuestAddress(MEMORY_MAP + (index * size_of_val(&entry)) as u64))?;
    }
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.len, ..Default::default() };
        mem.write_obj(module, GuestAddress(MODULES))?;
    }
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: command_line.start,
        rsdp_paddr: layout::ACPI_START,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: MODULES,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    mem.write_obj(start_info, GuestAddress(START_INFO))?;
    Ok(START_INFO)
}
