//! The zero page, `struct boot_params` (Linux, Documentation/arch/x86/zero-page.rst): what Linux's own
//! protocol hands over.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::{Placed, Range};
use crate::mem::{GuestMemory, layout};

const ZERO_PAGE: u64 = 0x7000;

/// "HdrS", the setup header's magic number.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The end of the boot sector, from the days when it was one.
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// `boot_params` as bytes that can be written.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Params(boot_params);

// SAFETY: `boot_params` is a packed C structure of plain integers: every bit pattern is a value, and there
// is no padding.
unsafe impl ByteValued for Params {}

/// Writes the zero page and gives its address. An ELF kernel has no `header` of its own.
pub fn write(
    mem: &GuestMemory,
    header: Option<&setup_header>,
    command_line: Placed,
    initrd: Option<Placed>,
    map: &[Range],
) -> Result<u64, GuestMemoryError> {
    let elf =
        setup_header { header: HEADER_MAGIC, boot_flag: BOOT_FLAG, kernel_alignment: 0x100_0000, ..Default::default() };
    let mut params =
        boot_params { hdr: header.copied().unwrap_or(elf), acpi_rsdp_addr: layout::ACPI_START, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = command_line.start as u32;
    params.hdr.cmdline_size = command_line.len as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    for (entry, &(addr, size, kind)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type: kind as u32 };
    }
    params.e820_entries = map.len() as u8;
    mem.write_obj(Params(params), GuestAddress(ZERO_PAGE))?;
    Ok(ZERO_PAGE)
}
