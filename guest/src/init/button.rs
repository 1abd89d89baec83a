//! The power button: an input device that may appear at any time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::libc;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Devices that are listened to at one time.
const MAX_DEVICES: usize = 32;
/// struct input_event on 64 bits: two words of time, type, code, value.
const EVENT: usize = 24;

// include/uapi/linux/input-event-codes.h
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// All input devices, kept up to date.
pub(super) struct Buttons {
    pub watch: Inotify,
    pub devices: BTreeMap<PathBuf, File>,
}

impl Buttons {
    pub(super) fn find() -> nix::Result<Buttons> {
        let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        watch.add_watch("/dev", AddWatchFlags::IN_CREATE)?;
        let mut buttons = Buttons { watch, devices: BTreeMap::new() };
        buttons.look();
        Ok(buttons)
    }

    /// Something was made in `/dev` or `/dev/input`: opens what is new.
    pub(super) fn look(&mut self) {
        while self.watch.read_events().is_ok_and(|events| !events.is_empty()) {}
        // The folder comes with the first device. A second watch of it is the same one.
        let _ = self.watch.add_watch("/dev/input", AddWatchFlags::IN_CREATE);
        let Ok(entries) = fs::read_dir("/dev/input") else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_event = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"event"));
            if !is_event || self.devices.contains_key(&path) || self.devices.len() >= MAX_DEVICES {
                continue;
            }
            if let Ok(device) = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path) {
                self.devices.insert(path, device);
            }
        }
    }

    /// Reads what a device has to say; true when the power button was pressed. A device that is gone is dropped.
    pub(super) fn pressed(&mut self, path: &PathBuf) -> bool {
        let Some(device) = self.devices.get_mut(path) else { return false };
        let mut events = [0; EVENT * 16];
        match device.read(&mut events) {
            Ok(n) if n > 0 => events[..n].chunks_exact(EVENT).any(is_power),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => false,
            _ => {
                self.devices.remove(path);
                false
            }
        }
    }
}

fn is_power(event: &[u8]) -> bool {
    let [.., a, b, c, d, e, f, g, h] = event else { return false };
    u16::from_ne_bytes([*a, *b]) == EV_KEY
        && u16::from_ne_bytes([*c, *d]) == KEY_POWER
        && i32::from_ne_bytes([*e, *f, *g, *h]) == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_press_of_the_power_button_counts() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut bytes = vec![0; 16];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(code.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
            bytes
        };
        assert!(is_power(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_power(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_power(&event(EV_KEY, 30, 1)));
        assert!(!is_power(&event(0, 0, 0)));
    }
}
