//! What every device does with a split virtqueue (virtio 1.2 section 2.7), on top of the `virtio-queue`
//! crate: take whole chains, serve them for a limited time, and find out whether to interrupt.
//!
//! A chain that is not well formed, or not wholly in guest memory, is an error before any of it is served.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::disk::Buffer;
use crate::mem::GuestMemory;

/// How long a device works on one queue before it lets others have its lock, and how long a request that
/// is done may wait for its interrupt: short against what a person or a timer in the guest notices.
const TURN: Duration = Duration::from_millis(1);

/// A chain of descriptors, mapped: first what the driver wrote for the device, then room for the answer.
pub struct Chain<'m> {
    /// The number by which the driver knows the chain.
    pub head: u16,
    /// The device-readable part.
    pub readable: Slices<'m>,
    /// The device-writable part.
    pub writable: Slices<'m>,
}

/// What came of one turn at a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// The driver wants to be interrupted.
    pub interrupt: bool,
    /// There is more to do, but others come first.
    pub unfinished: bool,
}

/// Takes chain after chain from `queue` for one turn and gives each back with as many bytes written as
/// `serve` says.
pub fn work_off<'m>(
    queue: &mut Queue,
    mem: &'m GuestMemory,
    mut serve: impl FnMut(Chain<'m>) -> Result<u32, Error>,
) -> Result<Turn, Error> {
    let began = Instant::now();
    let mut served = false;
    let mut unfinished = false;
    queue.disable_notification(mem)?;
    loop {
        if let Some(chain) = next_chain(queue, mem)? {
            let head = chain.head;
            let written = serve(chain)?;
            queue.add_used(mem, head, written)?;
            served = true;
        } else if !queue.enable_notification(mem)? {
            break;
        } else {
            queue.disable_notification(mem)?;
        }
        // Notifications stay off: whoever called rings the doorbell in the driver's place.
        if began.elapsed() >= TURN {
            unfinished = true;
            break;
        }
    }
    Ok(Turn { interrupt: served && needs_interrupt(queue, mem)?, unfinished })
}

/// Takes the next chain that the driver made available, if there is one.
pub fn next_chain<'m>(queue: &mut Queue, mem: &'m GuestMemory) -> Result<Option<Chain<'m>>, Error> {
    // A chain in an indirect table may be longer than a queue that the driver chose small, but not longer
    // than the largest queue: devices size their own limits by that.
    let longest = usize::from(queue.max_size());
    let Some(descriptors) = queue.iter(mem)?.next() else {
        return Ok(None);
    };
    let head = descriptors.head_index();
    map(descriptors, longest, mem).map(|(readable, writable)| Some(Chain { head, readable, writable }))
}

/// Whether the driver wants to be told of what was added to the used ring since the last call.
pub fn needs_interrupt(queue: &mut Queue, mem: &GuestMemory) -> Result<bool, Error> {
    // Compares event indices if there are any, and otherwise leaves the decision to the driver's flag.
    let wanted = queue.needs_notification(mem)?;
    if queue.event_idx_enabled() {
        return Ok(wanted);
    }
    let flags: u16 = mem.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed).map_err(Error::GuestMemory)?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

fn map<'m>(
    descriptors: impl Iterator<Item = Descriptor>,
    longest: usize,
    mem: &'m GuestMemory,
) -> Result<(Slices<'m>, Slices<'m>), Error> {
    let (mut readable, mut writable) = (Slices::default(), Slices::default());
    let mut writing = false;
    // The crate's iterator ends without a word at a loop, at a link out of the table, and at an indirect
    // table that is nested, odd or out of memory. Only the last descriptor of a whole chain has no next.
    let mut whole = false;
    for (index, descriptor) in descriptors.enumerate() {
        // Section 2.7.4.2: everything that the device reads comes before anything that it writes.
        if index >= longest || (writing && !descriptor.is_write_only()) {
            return Err(Error::InvalidChain);
        }
        writing = descriptor.is_write_only();
        whole = !descriptor.has_next();
        let (side, access) =
            if writing { (&mut writable, Permissions::Write) } else { (&mut readable, Permissions::Read) };
        let length = descriptor.len() as usize;
        for slice in mem.get_slices(descriptor.addr(), length, access).map_err(Error::GuestMemory)? {
            side.0.push(slice.map_err(Error::GuestMemory)?);
        }
    }
    if whole { Ok((readable, writable)) } else { Err(Error::InvalidChain) }
}

/// Pieces of guest memory, one after the other, read and written as if they were one: section 2.7.4 lets
/// the driver cut its buffers wherever it likes.
#[derive(Default)]
pub struct Slices<'m>(Vec<Buffer<'m>>);

impl<'m> Slices<'m> {
    /// All bytes together.
    pub fn len(&self) -> usize {
        // Cannot overflow: the crate ends a chain at 2^32 bytes.
        self.0.iter().map(|slice| slice.len()).sum()
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces.
    pub fn as_buffers(&self) -> &[Buffer<'m>] {
        &self.0
    }

    /// Cuts after `middle` bytes. `None` when there are not so many.
    pub fn split_at(self, middle: usize) -> Option<(Slices<'m>, Slices<'m>)> {
        let (mut front, mut back) = (Slices::default(), Slices::default());
        let mut wanted = middle;
        for slice in self.0 {
            let (left, right) = slice.split_at(wanted.min(slice.len())).ok()?;
            wanted -= left.len();
            front.0.extend((!left.is_empty()).then_some(left));
            back.0.extend((!right.is_empty()).then_some(right));
        }
        (wanted == 0).then_some((front, back))
    }

    /// Copies the first bytes into `data` and returns how many.
    pub fn read(&self, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            done += slice.copy_to(&mut data[done..]);
        }
        done
    }

    /// Copies `data` into the first bytes and returns how many fitted.
    pub fn write(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            let fits = slice.len().min(data.len() - done);
            slice.copy_from(&data[done..done + fits]);
            done += fits;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;
    use crate::devices::virtio::testing::{AVAIL, DESC, USED, WRITE, memory};

    const SIZE: u16 = 16;

    /// A queue with `count` chains of one byte each.
    fn queue(mem: &GuestMemory, event_idx: bool, count: u16) -> Queue {
        for index in 0..count {
            let at = GuestAddress(DESC + 16 * u64::from(index));
            mem.write_obj(Descriptor::new(0x8000, 1, WRITE, 0), at).unwrap();
            mem.write_obj(index, GuestAddress(AVAIL + 4 + 2 * u64::from(index))).unwrap();
        }
        mem.write_obj(count, GuestAddress(AVAIL + 2)).unwrap();
        let state = virtio_queue::QueueState {
            max_size: SIZE,
            size: SIZE,
            ready: true,
            event_idx_enabled: event_idx,
            desc_table: DESC,
            avail_ring: AVAIL,
            used_ring: USED,
            ..Default::default()
        };
        Queue::try_from(state).unwrap()
    }

    #[test]
    fn drivers_are_interrupted_as_they_wish() {
        let interrupt = |event_idx, flags: u16, used_event: u16, count| {
            let mem = memory();
            mem.write_obj(flags, GuestAddress(AVAIL)).unwrap();
            mem.write_obj(used_event, GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE))).unwrap();
            let mut queue = queue(&mem, event_idx, count);
            work_off(&mut queue, &mem, |_| Ok(1)).unwrap().interrupt
        };
        assert!(interrupt(false, 0, 0, 3));
        assert!(!interrupt(false, 1, 0, 3), "VRING_AVAIL_F_NO_INTERRUPT");
        assert!(!interrupt(false, 0, 0, 0), "nothing was done");
        assert!(interrupt(true, 1, 2, 3), "the third chain is the one, and the flag means nothing now");
        assert!(!interrupt(true, 0, 3, 3), "the fourth chain is the one");
        assert!(!interrupt(true, 0, 0, 0), "nothing was done");
    }

    #[test]
    fn a_turn_ends_after_a_while_and_the_next_one_goes_on() {
        let mem = memory();
        let mut queue = queue(&mem, false, 3);
        let mut heads = Vec::new();
        let mut turns = 0;
        while turns == 0 || work_off_slowly(&mut queue, &mem, &mut heads) {
            turns += 1;
        }
        assert_eq!(heads, [0, 1, 2]);
        assert!(turns >= 3, "{turns}");
        assert_eq!(mem.read_obj::<u16>(GuestAddress(USED)).unwrap(), 0, "the driver shall ring again");
    }

    fn work_off_slowly(queue: &mut Queue, mem: &GuestMemory, heads: &mut Vec<u16>) -> bool {
        let turn = work_off(queue, mem, |chain| {
            heads.push(chain.head);
            sleep(TURN);
            Ok(1)
        });
        turn.unwrap().unfinished
    }

    #[test]
    fn what_devices_write_is_marked_dirty() {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

        let mem = memory();
        let mut queue = queue(&mem, true, 1);
        let region = mem.find_region(GuestAddress(0)).unwrap();
        let dirty = || (0..16).filter(|page| region.bitmap().dirty_at(page << 12)).collect::<Vec<_>>();
        assert_eq!(dirty(), [1, 3], "what the driver wrote");
        work_off(&mut queue, &mem, |chain| Ok(chain.writable.write(b"x") as u32)).unwrap();
        assert_eq!(dirty(), [1, 3, 4, 8], "and the used ring and the buffer");
    }
}
