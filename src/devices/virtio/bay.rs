//! A drive bay: a block device whose medium comes and goes while the guest runs.
//!
//! ```text
//!            insert                      eject
//!  empty ──────────────> holds a medium ───────> empty
//!                                                  ^
//!  a saved state whose medium nobody has: lost ────┘ eject; insert puts another in its place
//! ```
//!
//! An empty bay has no sectors at all. One whose medium is lost has as many as the guest was told, and each of
//! them fails at once: a guest that has it mounted sees a disk that died, not one that became another.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::{Error as RingError, Queue};

use super::block::{Block, BlockState};
use super::{Error, VirtioDevice};
use crate::disk::{Gone, Mark, Medium};
use crate::mem::GuestMemory;

/// More sectors than any medium has: 16 TiB of them.
const MOST_SECTORS: u64 = 1 << 35;
/// The longest place that a medium is for, in bytes.
const MAX_PLACE: usize = 255;
const SECTOR: u64 = 512;

/// A drive bay.
pub struct Bay {
    block: Block,
    content: Content,
}

enum Content {
    Empty,
    Lost(MediumState),
    Holds { medium: Arc<Medium>, at: String },
}

/// What is saved of a bay: that a medium was there, and nothing of what was on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BayState {
    /// The medium.
    pub medium: Option<MediumState>,
}

/// A medium that the guest knows of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MediumState {
    /// The capacity that the guest was told.
    pub sectors: u64,
    /// What it held.
    pub mark: Mark,
    /// Where the guest was to mount it.
    pub at: String,
}

impl Bay {
    /// The bay whose serial number is `id`. A state that names a medium, for which none is given, is that of a bay
    /// whose medium is lost; a medium that is given is in the bay, whatever the state says.
    pub fn new(state: BayState, given: Option<(Arc<Medium>, String)>, id: &str) -> Result<Bay, Error> {
        let content = match (given, state.medium) {
            (Some((medium, at)), _) => Content::Holds { medium, at },
            (None, Some(lost)) if lost.sectors > MOST_SECTORS || lost.at.len() > MAX_PLACE || !lost.mark.is_sound() => {
                return Err(Error::Medium(id.into()));
            }
            (None, Some(lost)) => Content::Lost(lost),
            (None, None) => Content::Empty,
        };
        let mut block = Block::new(BlockState::default(), Box::new(Gone(0)), id, false)?;
        content.put_into(&mut block);
        Ok(Bay { block, content })
    }

    /// Puts a medium in, for the guest to mount at `at`, in the place of whatever was there.
    pub fn insert(&mut self, medium: Arc<Medium>, at: String) {
        self.change(Content::Holds { medium, at });
    }

    /// Takes the medium out, or what is left of one that was lost.
    pub fn eject(&mut self) {
        self.change(Content::Empty);
    }

    /// Whether there is neither a medium nor the memory of one.
    pub fn is_empty(&self) -> bool {
        matches!(self.content, Content::Empty)
    }

    fn change(&mut self, content: Content) {
        content.put_into(&mut self.block);
        self.content = content;
    }
}

impl Content {
    fn put_into(&self, block: &mut Block) {
        block.change_disk(match self {
            Content::Empty => Box::new(Gone(0)),
            Content::Lost(lost) => Box::new(Gone(lost.sectors * SECTOR)),
            Content::Holds { medium, .. } => Box::new(medium.clone()),
        });
    }
}

impl VirtioDevice for Bay {
    type State = BayState;

    const KIND: u32 = Block::KIND;

    fn queue_sizes(&self) -> &'static [u16] {
        self.block.queue_sizes()
    }

    fn features(&self) -> u64 {
        self.block.features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.block.read_config(offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.block.activate(features);
    }

    fn reset(&mut self) {
        self.block.reset();
    }

    fn queue_ready(&mut self, queue: usize, queues: &mut [Queue], mem: &GuestMemory) -> Result<bool, RingError> {
        self.block.queue_ready(queue, queues, mem)
    }

    fn unfinished(&self) -> bool {
        self.block.unfinished()
    }

    fn state(&self) -> BayState {
        let medium = match &self.content {
            Content::Empty => None,
            Content::Lost(lost) => Some(lost.clone()),
            Content::Holds { medium, at } => {
                Some(MediumState { sectors: medium.length() / SECTOR, mark: medium.mark(), at: at.clone() })
            }
        };
        BayState { medium }
    }
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_blk::*;

    use super::*;
    use crate::devices::virtio::testing::Driver;

    fn status(driver: &mut Driver<Bay>, kind: u32, sector: u64, data: &[u8]) -> u32 {
        let out = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), data].concat();
        driver.exchange(&out, &[out.len()], &[1]).0[0].into()
    }

    fn read(driver: &mut Driver<Bay>, sector: u64) -> (u32, u8) {
        let out = [&VIRTIO_BLK_T_IN.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let (answer, _) = driver.exchange(&out, &[16], &[512, 1]);
        (answer[512].into(), answer[511])
    }

    /// The low half of the capacity, as the driver reads it.
    fn capacity(driver: &mut Driver<Bay>) -> u32 {
        driver.get(0x100)
    }

    fn medium(dir: &std::path::Path, name: &str) -> Arc<Medium> {
        Medium::blank(&dir.join(name), 1 << 20).unwrap()
    }

    #[test]
    fn a_medium_comes_and_goes_and_an_empty_bay_fails_at_once() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut driver = Driver::started(Bay::new(BayState::default(), None, "bay0").unwrap(), 0);
        assert_eq!((capacity(&mut driver), read(&mut driver, 0).0), (0, VIRTIO_BLK_S_IOERR));
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), VIRTIO_BLK_S_IOERR);
        let (serial, _) =
            driver.exchange(&[&VIRTIO_BLK_T_GET_ID.to_le_bytes()[..], &[0; 12]].concat(), &[16], &[20, 1]);
        assert_eq!((&serial[..5], serial[20]), (&b"bay0\0"[..], 0));

        driver.mmio.device_mut().insert(medium(dir.path(), "a"), "/mnt".into());
        driver.mmio.config_changed();
        assert_eq!((capacity(&mut driver), driver.get(0x60) & 2), (2048, 2), "the driver is told");
        assert_eq!(status(&mut driver, VIRTIO_BLK_T_OUT, 2047, &[7; 512]), VIRTIO_BLK_S_OK);
        assert_eq!(read(&mut driver, 2047), (VIRTIO_BLK_S_OK, 7));
        driver.mmio.device_mut().eject();
        assert_eq!((capacity(&mut driver), read(&mut driver, 2047).0), (0, VIRTIO_BLK_S_IOERR));
        assert!(driver.mmio.device().is_empty());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "what is given up is wiped");
    }

    #[test]
    fn a_state_without_its_medium_is_a_disk_that_died() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut bay = Bay::new(BayState::default(), None, "bay0").unwrap();
        bay.insert(medium(dir.path(), "a"), "/mnt".into());
        let state = bay.state();
        assert_eq!(state.medium.as_ref().map(|medium| (medium.sectors, medium.mark.writes)), Some((2048, 0)));
        let mut driver = Driver::started(Bay::new(state.clone(), None, "bay0").unwrap(), 0);
        assert_eq!((capacity(&mut driver), read(&mut driver, 0).0), (2048, VIRTIO_BLK_S_IOERR));
        assert_eq!(driver.mmio.device().state(), state, "also for the next snapshot");
        driver.mmio.device_mut().insert(medium(dir.path(), "b"), "/mnt".into());
        assert_eq!(read(&mut driver, 0), (VIRTIO_BLK_S_OK, 0));
    }

    #[test]
    fn states_that_cannot_be_are_refused() {
        let mark = Mark { id: "0123456789abcdef".repeat(2), writes: 1 };
        let good = MediumState { sectors: 2048, mark, at: "/mnt".into() };
        let try_it = |medium: MediumState| Bay::new(BayState { medium: Some(medium) }, None, "bay0").map(|_| ());
        assert!(try_it(good.clone()).is_ok());
        for bad in [
            MediumState { sectors: u64::MAX, ..good.clone() },
            MediumState { at: "x".repeat(256), ..good.clone() },
            MediumState { mark: Mark { id: "../../../../../../../etc/passwd1".into(), writes: 0 }, ..good.clone() },
        ] {
            assert!(matches!(try_it(bad), Err(Error::Medium(_))));
        }
    }
}
