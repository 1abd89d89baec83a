//! A disk of which nothing is left that its user discards.

use std::io;

use super::{Buffer, Disk, Error, Flattened, Prepared};

/// Puts zeros in the place of all that is discarded. Other disks keep what is left of a cluster.
pub struct Wiping(pub Box<dyn Disk>);

impl Disk for Wiping {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read(&mut self, into: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        self.0.read(into, offset)
    }
    fn write(&mut self, from: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        self.0.write(from, offset)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.0.write_zeroes(offset, length, true)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, length, unmap)
    }
    fn swap(&mut self, prepared: &mut Prepared) -> Result<(), Error> {
        self.0.swap(prepared)
    }
    fn seal(&mut self) -> Result<(), Error> {
        self.0.seal()
    }
    fn adopt(&mut self, flattened: &mut Flattened) -> Result<(), Error> {
        self.0.adopt(flattened)
    }
}
