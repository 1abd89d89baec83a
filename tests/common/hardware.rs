//! In the guest, as root: the bare hardware, for those who mean it harm.

use std::arch::asm;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::{self, null_mut};

const PAGE: usize = 4096;

/// The right to use I/O ports (iopl(2)).
pub struct Ports(());

impl Ports {
    pub fn all() -> Ports {
        // SAFETY: iopl touches no memory.
        assert_eq!(unsafe { libc::syscall(libc::SYS_iopl, 3) }, 0, "no right to the ports");
        Ports(())
    }

    /// Reads one, two and four bytes.
    pub fn read(&self, port: u16) -> u32 {
        let (one, two, four): (u8, u16, u32);
        // SAFETY: we have the right to; what a read does to this throw-away machine is what we are here for.
        unsafe {
            asm!("in al, dx", in("dx") port, out("al") one, options(nomem, nostack));
            asm!("in ax, dx", in("dx") port, out("ax") two, options(nomem, nostack));
            asm!("in eax, dx", in("dx") port, out("eax") four, options(nomem, nostack));
        }
        u32::from(one) ^ u32::from(two) ^ four
    }

    /// Writes one, two and four bytes.
    pub fn write(&self, port: u16, value: u32) {
        // SAFETY: as in `read`.
        unsafe {
            asm!("out dx, al", in("dx") port, in("al") value as u8, options(nomem, nostack));
            asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nomem, nostack));
            asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack));
        }
    }

    /// Writes many bytes with one instruction.
    pub fn write_string(&self, port: u16, bytes: &[u8]) {
        // SAFETY: as in `read`; the instruction reads `bytes` and moves the two registers.
        unsafe {
            asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _, options(readonly, nostack));
        }
    }
}

/// A page of physical addresses that is no RAM.
pub struct Registers(*mut u8);

impl Registers {
    /// Maps the page at `address`.
    pub fn at(address: u64) -> Registers {
        let memory = File::options().read(true).write(true).open("/dev/mem").expect("/dev/mem");
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let page = unsafe {
            libc::mmap(null_mut(), PAGE, rights, libc::MAP_SHARED, memory.as_raw_fd(), address as libc::off_t)
        };
        assert_ne!(page, libc::MAP_FAILED, "{address:#x}: {}", std::io::Error::last_os_error());
        Registers(page.cast())
    }

    /// Reads `T` from `offset`.
    pub fn read<T>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= PAGE);
        // SAFETY: within the mapped page, which is no memory of Rust's; x86 takes unaligned addresses.
        unsafe { ptr::read_unaligned(self.0.add(offset).cast()) }
    }

    /// Writes `value` at `offset`.
    pub fn write<T>(&self, offset: usize, value: T) {
        assert!(offset + size_of::<T>() <= PAGE);
        // SAFETY: as in `read`.
        unsafe { ptr::write_unaligned(self.0.add(offset).cast(), value) }
    }
}

/// A page of RAM whose physical address is known.
pub struct Page {
    pub words: &'static mut [u64],
    pub address: u64,
}

impl Page {
    /// A page that stays where it is, and is never given back.
    pub fn new() -> Page {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing; as it is never
        // unmapped, the slice is valid for ever, and nobody else has it.
        let words: &'static mut [u64] = unsafe {
            let page = libc::mmap(null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            std::slice::from_raw_parts_mut(page.cast(), PAGE / 8)
        };
        let frames = super::inside::frames(words);
        Page { address: frames[0] * PAGE as u64, words }
    }
}
