//! The parts of a wake: entropy, clock, identity, settings. A copy that boots gets its identity and settings by the
//! kernel's command line, and goes through the same doors.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use nix::libc;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use super::hooks;
use crate::protocol::{Identity, Settings, Wake, check_settings};
use crate::site::settings;

// include/uapi/linux/random.h: _IOW('R', 3, int[2]) and _IO('R', 7).
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
const MACHINE_ID: &str = "/etc/machine-id";
/// What tells one kitten site from another.
const SETTINGS: &str = "/etc/kitten.conf";
/// By what an SSH server is known, for whoever has one.
const HOST_KEYS: [(&str, &str); 2] = [("/etc/ssh", "ssh_host_"), ("/etc/dropbear", "dropbear_")];
/// Makes those of OpenSSH that are missing.
const KEYGEN: &str = "/usr/bin/ssh-keygen";

/// Entropy in one wake, in bytes. The protocol asks for 32 at least.
const ENTROPY: std::ops::RangeInclusive<usize> = 32..=4096;

/// Refuses a wake that makes no sense, before anything is done.
pub(super) fn check(wake: &Wake) -> Result<(), String> {
    let bytes = decode_hex(&wake.entropy).ok_or("the entropy is not hexadecimal")?;
    if !ENTROPY.contains(&bytes.len()) {
        return Err("the entropy is not 32 to 4096 bytes".into());
    }
    if i64::try_from(wake.realtime_ns).is_err() || i64::try_from(wake.generation).is_err() {
        return Err("the time or the generation is out of range".into());
    }
    check_settings(&wake.settings)?;
    wake.identity.as_ref().map_or(Ok(()), check_identity)
}

fn check_identity(identity: &Identity) -> Result<(), String> {
    let id = identity.machine_id.as_bytes();
    if id.len() != 32 || !id.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b)) {
        return Err("the machine id is not 32 lower-case hexadecimal digits".into());
    }
    let name = identity.hostname.as_bytes();
    let sound = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    // HOST_NAME_MAX of Linux is 64.
    if !(1..=64).contains(&name.len()) || !name.iter().all(sound) {
        return Err("the host name is not 1 to 64 letters, digits, `-`, `_` or `.`".into());
    }
    Ok(())
}

/// Feeds the kernel's generator, and has it use what it was fed at once.
pub(super) fn add_entropy(hex: &str) -> Result<(), String> {
    let bytes = decode_hex(hex).ok_or("not hexadecimal")?;
    // struct rand_pool_info: entropy in bits, length in bytes, the bytes in whole words.
    let mut words = vec![bytes.len() as u32 * 8, bytes.len().next_multiple_of(4) as u32];
    words.extend(bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_ne_bytes(word)
    }));
    let random = File::options().write(true).open("/dev/urandom").map_err(|error| error.to_string())?;
    // SAFETY: the kernel reads a rand_pool_info: two words and as many bytes as the second of them says, all
    // of which `words` holds.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, words.as_ptr()) };
    // SAFETY: this ioctl has no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG, 0) };
    if added == 0 && reseeded == 0 { Ok(()) } else { Err(io::Error::last_os_error().to_string()) }
}

/// Sets the wall clock.
pub(super) fn set_clock(realtime_ns: u64) -> Result<(), String> {
    const SECOND: u64 = 1_000_000_000;
    let time = TimeSpec::new((realtime_ns / SECOND) as i64, (realtime_ns % SECOND) as i64);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|error| error.to_string())
}

/// Makes the machine somebody else: host name and machine id, now and for the next boots.
pub(super) fn set_identity(identity: &Identity) -> Result<(), String> {
    let name = nix::unistd::sethostname(&identity.hostname).map_err(|error| format!("host name: {error}"));
    let kept = replace(Path::new("/etc/hostname"), &format!("{}\n", identity.hostname));
    let id = replace(Path::new(MACHINE_ID), &format!("{}\n", identity.machine_id));
    let keys = new_host_keys(&HOST_KEYS.map(|(folder, start)| (Path::new(folder), start)));
    name.and(kept).and(id).and(keys)
}

/// A copy boots: makes it who it is to be, unless it is that already.
pub(crate) fn settle(identity: Option<&Identity>, settings: &Settings) -> Result<(), String> {
    let now = fs::read_to_string(MACHINE_ID).unwrap_or_default();
    let becomes = identity.filter(|identity| identity.machine_id != now.trim()).map_or(Ok(()), |identity| {
        check_identity(identity)?;
        set_identity(identity)
    });
    check_settings(settings)?;
    becomes.and(set(settings))
}

/// Changes the site's settings.
pub(super) fn set(settings: &Settings) -> Result<(), String> {
    let path = Path::new(SETTINGS);
    match settings.is_empty() || fs::read_to_string(path).is_ok_and(|text| text == settings::changed(path, settings)) {
        true => Ok(()),
        false => replace(path, &settings::changed(path, settings)),
    }
}

/// Removes the keys by which an SSH server is known, and has OpenSSH's made anew where it can be. Others are made anew
/// by their servers or by a wake hook.
fn new_host_keys(places: &[(&Path, &str)]) -> Result<(), String> {
    let mut removed = false;
    for (folder, start) in places {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(start) && (name.ends_with("_key") || name.ends_with("_key.pub")) {
                fs::remove_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
                removed = true;
            }
        }
    }
    if !removed || !Path::new(KEYGEN).exists() {
        return Ok(());
    }
    hooks::finish(Command::new(KEYGEN).arg("-A"), Instant::now() + hooks::WAKE_TIME)
        .map_err(|why| format!("{KEYGEN} -A: {why}"))
}

/// Replaces a file: the old one or the new one is there, never half of it.
fn replace(path: &Path, content: &str) -> Result<(), String> {
    let beside = path.with_extension("new");
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(content.as_bytes())?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&beside, path)).map_err(|error| format!("{}: {error}", path.display()))
}

fn decode_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_that_makes_no_sense_is_refused() {
        let identity = Identity { machine_id: "0123456789abcdef".repeat(2), hostname: "anna-2".into() };
        let good = Wake {
            generation: 1,
            realtime_ns: 1,
            entropy: "5a".repeat(32),
            identity: Some(identity.clone()),
            settings: Settings::default(),
            ephemeral: Vec::new(),
        };
        assert_eq!(check(&good), Ok(()));
        let with = |identity| Wake { identity: Some(identity), ..good.clone() };
        for bad in [
            Wake { entropy: "5a".repeat(31), ..good.clone() },
            Wake { entropy: "5a".repeat(4097), ..good.clone() },
            Wake { entropy: "5".repeat(65), ..good.clone() },
            Wake { entropy: "zz".repeat(32), ..good.clone() },
            Wake { realtime_ns: u64::MAX, ..good.clone() },
            Wake { generation: u64::MAX, ..good.clone() },
            with(Identity { machine_id: "../../x".into(), ..identity.clone() }),
            with(Identity { machine_id: "A".repeat(32), ..identity.clone() }),
            with(Identity { hostname: "a\nb".into(), ..identity.clone() }),
            with(Identity { hostname: "a".repeat(65), ..identity.clone() }),
            with(Identity { hostname: String::new(), ..identity.clone() }),
            Wake { settings: Settings::from([("colour".into(), "pink".into())]), ..good.clone() },
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_line_is_replaced_whole() {
        let path = std::env::temp_dir().join(format!("catnap-line-{}", std::process::id()));
        replace(&path, "one\n").unwrap();
        replace(&path, "two\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
        fs::remove_file(&path).unwrap();
        assert!(replace(Path::new("/no/such/folder/file"), "x").is_err());
    }

    #[test]
    fn only_host_keys_are_removed() {
        let folder = std::env::temp_dir().join(format!("catnap-keys-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for name in ["own_host_rsa_key", "own_host_rsa_key.pub", "own_host_config", "config"] {
            fs::write(folder.join(name), name).unwrap();
        }
        new_host_keys(&[(&folder, "own_host_"), (Path::new("/no/such/folder"), "x")]).unwrap();
        let mut left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["config", "own_host_config"]);
        fs::remove_dir_all(folder).unwrap();
    }
}
