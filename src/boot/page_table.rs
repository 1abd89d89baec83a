//! The page tables with which a 64-bit entry begins: the first 4 GiB, one to one, in 2 MiB pages (not every
//! CPU has larger ones).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::mem::GuestMemory;

const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000; // four pages, one for each GiB

// Bits of an entry, Intel SDM volume 3, section 4.5.4.
const PRESENT_WRITABLE: u64 = 0b11;
const PAGE_SIZE: u64 = 1 << 7;

/// Writes the tables and gives the address of the first.
pub fn write(mem: &GuestMemory) -> Result<u64, GuestMemoryError> {
    mem.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    for gib in 0..4 {
        mem.write_obj((PD + gib * 0x1000) | PRESENT_WRITABLE, GuestAddress(PDPT + gib * 8))?;
    }
    for page in 0..4 * 512 {
        mem.write_obj(page << 21 | PAGE_SIZE | PRESENT_WRITABLE, GuestAddress(PD + page * 8))?;
    }
    Ok(PML4)
}
