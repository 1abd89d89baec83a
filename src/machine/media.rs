//! The media of a machine's bays. They belong to the monitor's process and not to the machine, which is built anew
//! at every reboot of the guest: so they survive that, and nothing that the process does not survive.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::bays::BayError;
use crate::devices::virtio::bay::{BayState, MediumState};
use crate::disk::{self, Medium};
use crate::spec::{Ephemeral, Size};

/// How many bays a machine has. As many as it may have media: a spare is there for whoever has one.
pub const BAYS: usize = Ephemeral::MOST;
const SECTOR: u64 = 512;

/// What a bay holds, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// The bay: the serial number that the guest sees.
    pub bay: String,
    /// The medium's size in bytes.
    pub size: u64,
    /// Where the guest is to have it.
    pub at: String,
    /// How it stands.
    pub state: Standing,
    /// Why, where there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Its file on this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// How a medium stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It is in its bay, and the agent was not asked to mount it, or could not.
    #[default]
    Attached,
    /// The agent has mounted it.
    Mounted,
    /// What was on it is gone, and every request fails.
    Lost,
}

/// Tells the folders in which media may be made, the best first. Asked only when there is a medium: a machine without
/// one leaves no trace in places that all share.
pub type Folders = Box<dyn Fn() -> Vec<PathBuf> + Send + Sync>;

/// The media of all bays.
pub struct Media {
    folders: Folders,
    /// What the machine is to have after a wake.
    wanted: Vec<Ephemeral>,
    seats: Mutex<[Option<Seat>; BAYS]>,
}

/// A medium in its bay.
#[derive(Clone)]
pub(super) struct Seat {
    pub medium: Arc<Medium>,
    pub at: String,
    pub standing: Standing,
    pub note: Option<String>,
}

impl Seat {
    pub fn new(medium: Arc<Medium>, at: &str) -> Seat {
        Seat { medium, at: at.into(), standing: Standing::default(), note: None }
    }
}

impl Media {
    /// For a machine that boots: blank media, made in one of the `folders`.
    pub fn blank(folders: Folders, wanted: &[Ephemeral]) -> Result<Arc<Media>, BayError> {
        let media = Media { folders, wanted: wanted.to_vec(), seats: Mutex::default() };
        for (bay, one) in wanted.iter().take(BAYS).enumerate() {
            let medium = media.make(bay, one.size)?;
            media.seats()[bay] = Some(Seat::new(medium, &one.at));
        }
        Ok(Arc::new(media))
    }

    /// For a machine that wakes: those of its media that another process gave away as they were at the snapshot.
    /// All others are lost.
    pub fn woken(
        folders: Folders,
        saved: &[Option<MediumState>],
        wanted: &[Ephemeral],
    ) -> Result<Arc<Media>, BayError> {
        let media = Media { folders, wanted: wanted.to_vec(), seats: Mutex::default() };
        for (bay, state) in saved.iter().take(BAYS).enumerate() {
            let Some(state) = state else { continue };
            let Some(length) = state.sectors.checked_mul(SECTOR) else { continue };
            if !wanted.contains(&Ephemeral { size: Size(length), at: state.at.clone() }) {
                continue;
            }
            for folder in (media.folders)() {
                let Some(above) = folder.parent() else { continue };
                if let Some(medium) = Medium::adopt(above, &folder.join(file(bay)), length, &state.mark)? {
                    let seat = Seat { standing: Standing::Mounted, ..Seat::new(medium, &state.at) };
                    media.seats()[bay] = Some(seat);
                    break;
                }
            }
        }
        Ok(Arc::new(media))
    }

    /// A blank medium for a bay, in the first folder whose filesystem is a tmpfs with room for it.
    pub(super) fn make(&self, bay: usize, size: Size) -> Result<Arc<Medium>, BayError> {
        let mut refusal = None;
        for folder in (self.folders)() {
            match Medium::blank(&folder.join(file(bay)), size.bytes()) {
                Ok(medium) => return Ok(medium),
                // One that is too small says more than one that is none.
                Err(error @ disk::Error::NoRoom { .. }) => refusal = Some(error),
                Err(error @ disk::Error::Refused { .. }) => refusal = refusal.or(Some(error)),
                Err(error) => return Err(error.into()),
            }
        }
        Err(refusal.map_or(BayError::NoTmpfs, BayError::from))
    }

    /// What the machine was started to have.
    pub(super) fn wanted(&self) -> &[Ephemeral] {
        &self.wanted
    }

    /// What is in the bays.
    pub(super) fn seats(&self) -> MutexGuard<'_, [Option<Seat>; BAYS]> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The medium for a bay of a machine that is being built.
    pub(super) fn for_bay(&self, bay: usize) -> Option<(Arc<Medium>, String)> {
        self.seats().get(bay)?.as_ref().map(|seat| (seat.medium.clone(), seat.at.clone()))
    }

    /// What the bays hold, where `states` says what the guest knows of them.
    pub(super) fn drives(&self, states: &[BayState]) -> Vec<Drive> {
        let seats = self.seats();
        let drive = |(bay, state): (usize, &BayState)| {
            let state = state.medium.as_ref()?;
            let seat = seats.get(bay).and_then(Option::as_ref);
            let lost = seat.map_or(Some("what was on it is not on this host"), |seat| seat.medium.lost());
            Some(Drive {
                bay: name(bay),
                size: state.sectors.saturating_mul(SECTOR),
                at: state.at.clone(),
                state: seat.filter(|_| lost.is_none()).map_or(Standing::Lost, |seat| seat.standing),
                note: lost.map(str::to_owned).or_else(|| seat?.note.clone()),
                file: seat.map(|seat| seat.medium.path()),
            })
        };
        let mut drives: Vec<Drive> = states.iter().enumerate().filter_map(drive).collect();
        // One that is lost may be there still beside the one that took its place.
        drives.sort_by_key(|drive| drive.state == Standing::Lost);
        drives
    }

    /// Wipes all of them: the machine has ended.
    pub fn wipe(&self) {
        self.seats().iter_mut().filter_map(Option::take).for_each(|seat| seat.medium.wipe());
    }
}

/// The serial number of a bay.
pub(super) fn name(bay: usize) -> String {
    format!("bay{bay}")
}

fn file(bay: usize) -> String {
    format!("bay{bay}.disk")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;

    fn these(folders: &[PathBuf]) -> Folders {
        let folders = folders.to_vec();
        Box::new(move || folders.clone())
    }

    fn folders() -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let folder = dir.path().join("anna");
        std::fs::create_dir(&folder).unwrap();
        (dir, vec![env!("CARGO_MANIFEST_DIR").into(), folder])
    }

    fn wanted(texts: &[&str]) -> Vec<Ephemeral> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn states(media: &Media) -> Vec<BayState> {
        let state = |(medium, at): (Arc<Medium>, String)| MediumState {
            sectors: medium.length() / SECTOR,
            mark: medium.mark(),
            at,
        };
        (0..BAYS).map(|bay| BayState { medium: media.for_bay(bay).map(state) }).collect()
    }

    #[test]
    fn media_are_made_where_there_is_a_tmpfs_and_go_with_their_owner() {
        let (dir, folders) = folders();
        let media = Media::blank(these(&folders), &wanted(&["1M", "2M:/data"])).unwrap();
        let drives = media.drives(&states(&media));
        let told: Vec<_> = drives.iter().map(|it| (it.bay.as_str(), it.size >> 20, it.at.as_str(), it.state)).collect();
        assert_eq!(told, [("bay0", 1, "/mnt", Standing::Attached), ("bay1", 2, "/data", Standing::Attached)]);
        assert!(drives[0].file.as_ref().unwrap().starts_with(dir.path()));
        let lost = media.drives(&[states(&media)[0].clone(), BayState::default()]);
        assert_eq!(lost.len(), 1);
        drop(media);
        assert_eq!(std::fs::read_dir(&folders[1]).unwrap().count(), 0);
        let none = Media::blank(these(&folders[..1]), &wanted(&["1M"]));
        assert!(matches!(none, Err(BayError::Disk(disk::Error::Refused { .. }))));
        let large = Media::blank(these(&folders), &wanted(&["8T"]));
        assert!(matches!(large, Err(BayError::Disk(disk::Error::NoRoom { .. }))));
    }

    #[test]
    fn a_wake_keeps_only_what_is_provably_the_same_and_still_wanted() {
        let (dir, folders) = folders();
        let wanted = wanted(&["1M"]);
        let saved = |media: &Media| states(media).into_iter().map(|state| state.medium).collect::<Vec<_>>();
        for (write_after, others, kept) in [(false, false, true), (true, false, false), (false, true, false)] {
            let media = Media::blank(these(&folders), &wanted).unwrap();
            let at_snapshot = saved(&media);
            let (mut medium, _) = media.for_bay(0).unwrap();
            if write_after {
                medium.write_zeroes(0, 512, true).unwrap();
            }
            let given = medium.give(dir.path(), &at_snapshot[0].as_ref().unwrap().mark).unwrap();
            assert_eq!(given, !write_after);
            drop((media, medium));
            let asked = if others { vec!["1M:/data".parse().unwrap()] } else { wanted.clone() };
            let woken = Media::woken(these(&folders), &at_snapshot, &asked).unwrap();
            assert_eq!(woken.for_bay(0).is_some(), kept);
            let drives = woken.drives(&[BayState { medium: at_snapshot[0].clone() }]);
            assert_eq!(drives[0].state, if kept { Standing::Mounted } else { Standing::Lost });
        }
    }
}
