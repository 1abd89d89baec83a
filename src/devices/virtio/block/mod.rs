//! The block device (virtio 1.2 section 5.2): a [`Disk`] for the guest.
//!
//! Requests are served one after the other and are over before the queue's turn ends. The guest's memory is
//! handed to the disk as it is, without a copy.

mod request;

use std::io;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::*;
use virtio_queue::{Error as RingError, Queue};

use self::request::{Limits, Refusal, Request, SECTOR};
use super::mmio::Mmio;
use super::ring::{Chain, work_off};
use super::{Error, VirtioDevice, read_bytes};
use crate::devices::Throttle;
use crate::disk::{self, Disk, Flattened, Prepared};
use crate::mem::GuestMemory;

const QUEUE_SIZE: u16 = 256;
/// Pieces of data in one request: what is left of the queue beside the header and the status byte.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The longest of them, and the most data in all of them together, in bytes. The latter keeps one request,
/// however often it names the same memory, from holding the device's lock for long.
const SEGMENT_BYTES: u32 = 128 * 1024;
const MOST_BYTES: usize = SEGMENTS as usize * SEGMENT_BYTES as usize;
/// Discards are cheap: 16 pieces of 1 GiB. To unmap is what they are, and saying so is refused
/// (section 5.2.6.2).
const DISCARD: Limits = Limits { pieces: 16, sectors: 1 << 21, flags: 0 };
/// Zeros may have to be written out: 32 MiB.
const ZEROES: Limits = Limits { pieces: 1, sectors: 1 << 16, flags: VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
/// In sectors: discards are worth the most in the blocks of the host's filesystems, which have 4 KiB.
const DISCARD_ALIGNMENT: u32 = 1 << PHYSICAL_BLOCK_EXP;
const PHYSICAL_BLOCK_EXP: u8 = 3;
/// The length of the string that identifies a disk (section 5.2.6).
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// A disk drive.
pub struct Block {
    state: BlockState,
    disk: Box<dyn Disk>,
    id: String,
    read_only: bool,
    /// What the driver negotiated; nothing while it is away.
    features: u64,
    unfinished: bool,
    complaints: Throttle,
}

/// What the guest knows of the drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// The capacity in sectors that the guest was told. `None` before the first boot.
    pub sectors: Option<u64>,
}

impl Block {
    /// A drive over `disk`. The first 20 bytes of `id` are what the guest sees as its serial number.
    pub fn new(state: BlockState, disk: Box<dyn Disk>, id: &str, read_only: bool) -> Result<Block, Error> {
        let found = disk.len() / SECTOR;
        let wanted = state.sectors.unwrap_or(found);
        if found < wanted {
            return Err(Error::DiskTooShort { id: id.into(), found, wanted });
        }
        Ok(Block {
            state: BlockState { sectors: Some(wanted) },
            disk,
            id: id.into(),
            read_only,
            features: 0,
            unfinished: false,
            complaints: Throttle::default(),
        })
    }

    /// Puts another disk into the drive, of any size. The driver has to be told
    /// ([`Mmio::config_changed`](super::mmio::Mmio::config_changed)).
    pub fn change_disk(&mut self, disk: Box<dyn Disk>) {
        self.state.sectors = Some(disk.len() / SECTOR);
        self.disk = disk;
    }

    /// The disk, to look at or to replace. With the device's lock held, nothing is on its way to it.
    pub fn disk_mut(&mut self) -> &mut Box<dyn Disk> {
        &mut self.disk
    }

    /// Gives the disk a new top, with the device locked and the machine paused: in no time, for nothing is flushed.
    /// What the guest writes from now on is not in the layer below. When it is refused, nothing has changed.
    pub fn swap_disk(&mut self, prepared: &mut Prepared) -> Result<(), disk::Error> {
        self.disk.swap(prepared)
    }

    /// After a swap, with the device locked and the guest running: makes what was swapped away durable and
    /// immutable. Takes as long as a flush by the guest would; one that came before has done the work already.
    pub fn seal_disk(&mut self) -> Result<(), disk::Error> {
        self.disk.seal()
    }

    /// Lets the disk read through layers that were flattened into one, with the device locked.
    pub fn adopt_flattened(&mut self, flattened: &mut Flattened) -> Result<(), disk::Error> {
        self.disk.adopt(flattened)
    }

    fn sectors(&self) -> u64 {
        self.state.sectors.unwrap_or(0)
    }

    /// Serves one request. An error means that there is not even a place for a status.
    fn serve(&mut self, chain: Chain<'_>) -> Result<u32, RingError> {
        let request = Request::parse(chain)?;
        let (status, written) = match self.carry_out(&request) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::Failed(error)) => {
                if let Some(withheld) = self.complaints.pass() {
                    let Request { kind, sector, .. } = request;
                    tracing::warn!(disk = self.id, kind, sector, withheld, "disk request failed: {error}");
                }
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        request.status.write(&[status as u8]);
        // The used length counts bytes from the beginning on, so the status only if all before it is written.
        Ok(if written == request.into.len() { written as u32 + 1 } else { written as u32 })
    }

    /// Returns how many bytes of `into` were written.
    fn carry_out(&mut self, request: &Request<'_>) -> Result<usize, Refusal> {
        let Request { kind, from, into, .. } = request;
        let capacity = self.sectors();
        if self.read_only && matches!(*kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) {
            return Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem).into());
        }
        match *kind {
            VIRTIO_BLK_T_IN => {
                self.disk.read(into.as_buffers(), request.offset(into.len(), MOST_BYTES, capacity)?)?;
                return Ok(into.len());
            }
            VIRTIO_BLK_T_OUT => {
                self.disk.write(from.as_buffers(), request.offset(from.len(), MOST_BYTES, capacity)?)?;
            }
            VIRTIO_BLK_T_DISCARD => {
                for piece in request.pieces(&DISCARD, capacity)? {
                    self.disk.discard(piece.offset, piece.length)?;
                }
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                for piece in request.pieces(&ZEROES, capacity)? {
                    self.disk.write_zeroes(piece.offset, piece.length, piece.unmap)?;
                }
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk.flush()?;
                return Ok(0);
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; ID_BYTES];
                id.iter_mut().zip(self.id.bytes()).for_each(|(to, byte)| *to = byte);
                return Ok(into.write(&id));
            }
            _ => return Err(Refusal::Unsupported),
        }
        // A driver that did not take the flush command relies on changes that are durable at once
        // (section 5.2.6.2).
        if self.features & 1 << VIRTIO_BLK_F_FLUSH == 0 {
            self.disk.flush()?;
        }
        Ok(0)
    }

    /// `struct virtio_blk_config` of section 5.2.4.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors().to_le_bytes());
        put(8, &SEGMENT_BYTES.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXP]);
        put(36, &DISCARD.sectors.to_le_bytes());
        put(40, &(DISCARD.pieces as u32).to_le_bytes());
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        put(48, &ZEROES.sectors.to_le_bytes());
        put(52, &(ZEROES.pieces as u32).to_le_bytes());
        put(56, &[1]); // write_zeroes_may_unmap
        config
    }
}

impl Mmio<Block> {
    /// Tells the guest of a disk that has become larger than it knows, and gives the new size in bytes. `None` when
    /// there is nothing to tell.
    pub fn grow(&mut self) -> Option<u64> {
        let block = self.device_mut();
        let found = block.disk.len() / SECTOR;
        if found <= block.sectors() {
            return None;
        }
        block.state.sectors = Some(found);
        self.config_changed();
        Some(found * SECTOR)
    }
}

impl VirtioDevice for Block {
    type State = BlockState;

    const KIND: u32 = 2;

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ];
        let more: &[u32] =
            if self.read_only { &[VIRTIO_BLK_F_RO] } else { &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] };
        always.iter().chain(more).fold(0, |all, bit| all | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    fn reset(&mut self) {
        self.features = 0;
        self.unfinished = false;
    }

    fn queue_ready(&mut self, queue: usize, queues: &mut [Queue], mem: &GuestMemory) -> Result<bool, RingError> {
        self.unfinished = false;
        let Some(queue) = queues.get_mut(queue) else { return Ok(false) };
        let turn = work_off(queue, mem, |chain| self.serve(chain))?;
        self.unfinished = turn.unfinished;
        Ok(turn.interrupt)
    }

    fn unfinished(&self) -> bool {
        self.unfinished
    }

    fn state(&self) -> BlockState {
        self.state.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::devices::virtio::testing::{Driver, RawDisk};

    const SECTORS: u64 = 200;

    fn drive(read_only: bool, without: u64) -> (Driver<Block>, File, Arc<AtomicU32>) {
        let (disk, file) = RawDisk::new(SECTORS);
        let flushes = disk.flushes.clone();
        let block = Block::new(BlockState::default(), Box::new(disk), "anna-root", read_only).unwrap();
        (Driver::started(block, without), file, flushes)
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    fn piece(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    /// A request without room for data: its status.
    fn status(driver: &mut Driver<Block>, kind: u32, sector: u64, data: &[u8]) -> u32 {
        let out = [header(kind, sector), data.to_vec()].concat();
        let (answer, written) = driver.exchange(&out, &[out.len()], &[1]);
        assert_eq!(written, 1);
        answer[0].into()
    }

    fn at(file: &File, sector: u64) -> [u8; 512] {
        let mut data = [0; 512];
        file.read_exact_at(&mut data, sector * 512).unwrap();
        data
    }

    #[test]
    fn sectors_are_read_however_the_driver_cuts_its_buffers() {
        let (mut driver, ..) = drive(false, 0);
        let cuts: [(&[usize], &[usize]); 4] =
            [(&[16], &[1024, 1]), (&[1, 15], &[1025]), (&[7, 0, 9], &[1, 1000, 23, 1]), (&[16], &[0, 513, 512, 0])];
        for (out, room) in cuts {
            let (answer, written) = driver.exchange(&header(VIRTIO_BLK_T_IN, 5), out, room);
            assert_eq!(written, 1025);
            assert_eq!(answer, [&[5; 512][..], &[6; 512], &[0]].concat(), "{out:?} {room:?}");
        }
    }

    #[test]
    fn what_is_written_is_in_the_file_and_in_its_own_place() {
        let (mut driver, file, _) = drive(false, 0);
        let out = [header(VIRTIO_BLK_T_OUT, 7), vec![0x77; 1024]].concat();
        let (answer, written) = driver.exchange(&out, &[3, 14, 1000, 23], &[1]);
        assert_eq!((answer, written), (vec![0], 1));
        assert_eq!([6, 7, 8, 9].map(|sector| at(&file, sector)[511]), [6, 0x77, 0x77, 9]);
    }

    #[test]
    fn a_flush_reaches_the_disk_and_without_it_every_write_is_durable() {
        let (mut driver, _, flushes) = drive(false, 0);
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_OUT, 0, &[1; 512]), VIRTIO_BLK_S_OK);
        assert_eq!(flushes.load(Ordering::Relaxed), 0);
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), VIRTIO_BLK_S_OK);
        assert_eq!(flushes.load(Ordering::Relaxed), 1);

        let (mut driver, _, flushes) = drive(false, 1 << VIRTIO_BLK_F_FLUSH);
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_OUT, 0, &[1; 512]), VIRTIO_BLK_S_OK);
        assert_eq!(flushes.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn discarded_and_zeroed_sectors_are_the_ones_that_were_named() {
        let (mut driver, file, _) = drive(false, 0);
        let two = [piece(10, 2, 0), piece(20, 1, 0)].concat();
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &two), VIRTIO_BLK_S_OK);
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &piece(30, 2, 1)), VIRTIO_BLK_S_OK);
        let firsts = [9, 10, 11, 12, 19, 20, 21, 29, 30, 31, 32].map(|sector| at(&file, sector)[0]);
        assert_eq!(firsts, [9, 0, 0, 12, 19, 0, 21, 29, 0, 0, 32]);
    }

    #[test]
    fn requests_out_of_bounds_are_refused_and_touch_nothing() {
        let (mut driver, file, _) = drive(false, 0);
        let zeroes = |sector, count, flags| (VIRTIO_BLK_T_WRITE_ZEROES, 0, piece(sector, count, flags));
        let many = piece(1, 1, 0).repeat(DISCARD.pieces + 1);
        // The good piece before the bad one is not discarded either.
        let mixed = [piece(1, 1, 0), piece(SECTORS, 1, 0)].concat();
        for (kind, sector, data) in [
            (VIRTIO_BLK_T_OUT, SECTORS, vec![9; 512]),
            (VIRTIO_BLK_T_OUT, SECTORS - 1, vec![9; 1024]),
            (VIRTIO_BLK_T_OUT, u64::MAX, vec![9; 512]),
            (VIRTIO_BLK_T_OUT, u64::MAX / 512 + 1, vec![9; 512]),
            (VIRTIO_BLK_T_OUT, 1, vec![9; 511]),
            zeroes(SECTORS, 1, 0),
            zeroes(u64::MAX, 1, 0),
            zeroes(0, u32::MAX, 0),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0, piece(1, 1, 0).repeat(2)),
            (VIRTIO_BLK_T_DISCARD, 0, many),
            (VIRTIO_BLK_T_DISCARD, 0, mixed),
            (VIRTIO_BLK_T_DISCARD, 0, vec![0; 15]),
            (VIRTIO_BLK_T_DISCARD, 0, vec![]),
        ] {
            assert_eq!(status(&mut driver, kind, sector, &data), VIRTIO_BLK_S_IOERR, "{kind} {sector} {data:?}");
        }
        for (kind, data) in [
            (VIRTIO_BLK_T_DISCARD, piece(1, 1, 1)),
            (VIRTIO_BLK_T_WRITE_ZEROES, piece(1, 1, 2)),
            (VIRTIO_BLK_T_SCSI_CMD, vec![0; 512]),
            (VIRTIO_BLK_T_SECURE_ERASE, piece(1, 1, 0)),
            (u32::MAX, vec![]),
        ] {
            assert_eq!(status(&mut driver, kind, 1, &data), VIRTIO_BLK_S_UNSUPP, "{kind}");
        }
        let (answer, written) = driver.exchange(&header(VIRTIO_BLK_T_IN, SECTORS - 1), &[16], &[1024, 1]);
        assert_eq!((answer[1024].into(), written), (VIRTIO_BLK_S_IOERR, 0));
        assert!((0..SECTORS).all(|sector| at(&file, sector) == [sector as u8; 512]));
    }

    #[test]
    fn a_read_only_disk_says_so_and_refuses_writes() {
        let (mut driver, file, _) = drive(true, 0);
        assert_eq!(driver.mmio.device().features() & 1 << VIRTIO_BLK_F_RO, 1 << VIRTIO_BLK_F_RO);
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_OUT, 1, &[9; 512]), VIRTIO_BLK_S_IOERR);
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &piece(1, 1, 0)), VIRTIO_BLK_S_IOERR);
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &piece(1, 1, 0)), VIRTIO_BLK_S_IOERR);
        assert_eq!(at(&file, 1), [1; 512]);
        let (answer, _) = driver.exchange(&header(VIRTIO_BLK_T_IN, 1), &[16], &[512, 1]);
        assert_eq!(answer, [&[1; 512][..], &[0]].concat());
    }

    #[test]
    fn the_disk_tells_its_serial_number_and_size() {
        let (mut driver, ..) = drive(false, 0);
        let (answer, written) = driver.exchange(&header(VIRTIO_BLK_T_GET_ID, 0), &[16], &[20, 1]);
        assert_eq!((&answer, written), (&b"anna-root\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(), 21));
        assert_eq!((driver.get(0x100), driver.get(0x104), driver.get(0x108)), (SECTORS as u32, 0, SEGMENT_BYTES));
        assert_eq!((driver.get(0x10c), driver.get(0x114), driver.get(0x1fc)), (SEGMENTS, 512, 0));
    }

    #[test]
    fn a_disk_gets_a_new_top_and_a_raw_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base"), dir.path().join("root.qcow2"));
        std::fs::write(&base, [3; 4096]).unwrap();
        disk::create_overlay(&top, "base", disk::Format::Raw, 4096).unwrap();
        let qcow2 = disk::open(&top, disk::Format::Qcow2, disk::Access::ReadWrite, dir.path()).unwrap();
        let block = Block::new(BlockState::default(), qcow2, "root", false).unwrap();
        let mut driver = Driver::started(block, 0);
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_OUT, 1, &[1; 512]), VIRTIO_BLK_S_OK);
        let mut prepared = disk::prepare(&top, dir.path()).unwrap();
        assert!(drive(false, 0).0.mmio.device_mut().swap_disk(&mut prepared).is_err());
        driver.mmio.device_mut().swap_disk(&mut prepared).unwrap();
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_OUT, 2, &[2; 512]), VIRTIO_BLK_S_OK);
        driver.mmio.device_mut().seal_disk().unwrap();
        let (answer, _) = driver.exchange(&header(VIRTIO_BLK_T_IN, 0), &[16], &[2048, 1]);
        assert_eq!([0, 512, 1024, 1536, 2048].map(|at| answer[at]), [3, 1, 2, 3, 0]);
        assert_eq!(disk::own_layers(&top).unwrap().layers, [prepared.layer()]);
    }

    #[test]
    fn a_disk_shorter_than_the_guest_was_told_is_refused() {
        let state = BlockState { sectors: Some(SECTORS + 1) };
        let refused = Block::new(state, Box::new(RawDisk::new(SECTORS).0), "root", false);
        assert!(matches!(refused, Err(Error::DiskTooShort { found: 200, wanted: 201, .. })));
    }
}
