//! The entropy device (virtio 1.2 section 5.4): the kernel's random numbers, handed on.

use std::io;

use serde::{Deserialize, Serialize};
use virtio_queue::{Error, Queue};

use super::VirtioDevice;
use super::ring::{Slices, work_off};
use crate::mem::GuestMemory;

/// The most that one request gets. The driver asks again if it wants more.
const MOST: usize = 64 * 1024;

/// A random number generator.
#[derive(Default)]
pub struct Rng {
    state: RngState,
    unfinished: bool,
}

/// What is kept of one: nothing, as no random number is used twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}

impl Rng {
    /// A generator.
    pub fn new(state: RngState) -> Rng {
        Rng { state, unfinished: false }
    }
}

/// Fills the chain's writable part, up to [`MOST`]. Returns how many bytes were written.
fn fill(room: &Slices<'_>) -> io::Result<usize> {
    let mut random = [0; 4096];
    let mut done = 0;
    for slice in room.as_buffers() {
        let mut offset = 0;
        while offset < slice.len() && done < MOST {
            let some = (slice.len() - offset).min(random.len()).min(MOST - done);
            get_random(&mut random[..some])?;
            if let Ok(piece) = slice.subslice(offset, some) {
                piece.copy_from(&random[..some]);
            }
            offset += some;
            done += some;
        }
    }
    Ok(done)
}

fn get_random(data: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        let rest = &mut data[done..];
        // SAFETY: `rest` is writable for its whole length, and getrandom writes no further.
        match unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) } {
            got if got >= 0 => done += got as usize,
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

impl VirtioDevice for Rng {
    type State = RngState;

    const KIND: u32 = 4;

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.unfinished = false;
    }

    fn queue_ready(&mut self, queue: usize, queues: &mut [Queue], mem: &GuestMemory) -> Result<bool, Error> {
        self.unfinished = false;
        let Some(queue) = queues.get_mut(queue) else { return Ok(false) };
        let turn = work_off(queue, mem, |chain| {
            // Without the kernel's random numbers, the driver gets none: never anything less random.
            Ok(fill(&chain.writable).unwrap_or(0) as u32)
        })?;
        self.unfinished = turn.unfinished;
        Ok(turn.interrupt)
    }

    fn unfinished(&self) -> bool {
        self.unfinished
    }

    fn state(&self) -> RngState {
        self.state.clone()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::virtio::testing::{DESC, Driver, SEAM, WRITE};

    #[test]
    fn requests_get_random_bytes_but_not_without_bound() {
        let mut driver = Driver::started(Rng::new(RngState::default()), 0);
        let (one, _) = driver.exchange(&[], &[], &[20, 0, 44]);
        let (two, written) = driver.exchange(&[], &[], &[64]);
        assert_eq!(written, 64);
        assert_ne!(one, two);
        // 64 bytes of one value: that happens once in 2^504.
        assert!(![one, two].iter().any(|bytes| bytes.iter().all(|byte| *byte == bytes[0])));

        driver.mem.write_slice(&[0; 64], GuestAddress(SEAM + MOST as u64)).unwrap();
        driver.descriptor(DESC, 0, SEAM, 1 << 20, WRITE, 0);
        driver.submit(0);
        driver.notify();
        assert_eq!(driver.used(), Some((0, MOST as u32)));
        assert_eq!(driver.mem.read_obj::<[u64; 8]>(GuestAddress(SEAM + MOST as u64)).unwrap(), [0; 8]);
    }
}
