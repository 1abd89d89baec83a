//! The agent's protocol, spoken over vsock between the monitor and the guest's PID 1.
//!
//! The monitor connects to [`AGENT_PORT`] once per request. A connection begins with one line of JSON, a
//! [`Request`]; what follows depends on the request:
//!
//! - `status`, `freeze`, `thaw`, `wake`, `mount`, `unmount`, `sync_bays`, `scrub`, `shutdown`: one line of JSON, a [`Reply`], and the end.
//! - `forward`: raw bytes both ways, joined to a TCP connection inside the guest. When the guest refuses,
//!   the connection is reset.
//! - `exec`: frames both ways, see [`Frame`]. A host that closes its side, or only its sending half, kills
//!   the program and its process group.
//!
//! The guest connects once to [`HOST_PORT`] of the host when it is ready, says [`Hello`] as one line of
//! JSON, and closes.
//!
//! A program in the guest may connect to [`DOORBELL_PORT`] and say a [`Ring`]. The host answers with a [`Rung`] when
//! the guest may go on: at once, or, when somebody has asked for a snapshot at this very place, once that is taken.
//! A connection that ends without an answer is one too: in a guest that woke from that snapshot nobody remembers it.
//!
//! Both sides treat the other as hostile: lines are at most [`MAX_LINE`] bytes, frames at most [`MAX_FRAME`].

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The vsock port on which the guest's agent listens.
pub const AGENT_PORT: u32 = 1024;
/// The vsock port of the host (CID 2) to which the agent says [`Hello`].
pub const HOST_PORT: u32 = 1024;
/// The vsock port of the host on which a guest rings: see [`Ring`].
pub const DOORBELL_PORT: u32 = 1025;
/// The longest request, reply or hello, in bytes, with its newline.
pub const MAX_LINE: usize = 64 * 1024;
/// The longest payload of one exec frame, in bytes.
pub const MAX_FRAME: usize = 64 * 1024;
/// Raised when the two sides could misunderstand each other.
pub const VERSION: u32 = 2;

/// Coats that the kitten can wear; each is a class of the page.
pub const COLOURS: [&str; 6] = ["ginger", "grey", "black", "cream", "brown", "blue"];
/// The longest title of a site, in characters.
pub const MAX_TITLE: usize = 60;

/// What tells one site from another, each as [`setting`] gives it.
pub type Settings = BTreeMap<String, String>;

/// A setting as it is kept, or why it is none.
pub fn setting(key: &str, value: &str) -> Result<(String, String), String> {
    let (key, value) = (key.trim().to_ascii_lowercase(), value.trim());
    match key.as_str() {
        "colour" | "color" => match COLOURS.iter().find(|colour| colour.eq_ignore_ascii_case(value)) {
            Some(colour) => Ok(("colour".into(), (*colour).into())),
            None => Err(format!("no kitten is of the colour `{}`: choose {}", shown(value), COLOURS.join(", "))),
        },
        "title" if value.is_empty() || value.chars().count() > MAX_TITLE || value.contains(char::is_control) => {
            Err(format!("a title has 1 to {MAX_TITLE} characters"))
        }
        "title" => Ok((key, value.into())),
        _ => Err(format!("there is no setting `{}`: choose colour or title", shown(&key))),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(40).flat_map(char::escape_debug).collect()
}

/// Whether each of these is as [`setting`] would have given it.
pub fn check_settings(settings: &Settings) -> Result<(), String> {
    settings.iter().try_for_each(|(key, value)| match setting(key, value)? {
        kept if (&kept.0, &kept.1) == (key, value) => Ok(()),
        (key, value) => Err(format!("`{key}={value}` is another setting than it seems")),
    })
}

/// What the agent says when the guest is up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The protocol that the agent speaks, [`VERSION`].
    pub version: u32,
    /// The kernel's `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// What a guest says at the doorbell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Where it is just now, for people.
    pub at: String,
}

/// The host's answer to a [`Ring`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rung {
    /// Whether somebody had waited for it.
    pub awaited: bool,
}

/// The first line of a connection to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Asks for [`Status`].
    Status,
    /// Runs a program.
    Exec(Exec),
    /// Joins this connection to a TCP port on the guest's loopback.
    Forward {
        /// The guest's TCP port.
        port: u16,
    },
    /// Runs the quiesce hooks, syncs and freezes (FIFREEZE) every writable filesystem on a disk. It thaws by
    /// itself after `seconds`, whatever becomes of the host.
    Freeze {
        /// The longest time to stay frozen, in seconds (1 to 60).
        seconds: u32,
    },
    /// Ends a freeze.
    Thaw,
    /// The machine was restored from a snapshot.
    Wake(Wake),
    /// Mounts the disk in the bay with this serial number, after making a filesystem on it if it is blank.
    Mount {
        /// The bay: `bay0` or `bay1`.
        bay: String,
        /// The folder; it is made if it is missing.
        at: String,
        /// The size in bytes, by which a medium that was put in just now is known.
        size: u64,
    },
    /// Unmounts whatever is mounted of a bay's disk.
    Unmount {
        /// The bay.
        bay: String,
        /// Also when it is in use or broken. Whoever still has files of it open gets errors; [`Reply::Held`] says
        /// that there is somebody.
        force: bool,
    },
    /// Writes to the disks in all bays what is still held back.
    SyncBays,
    /// Removes files from the disk `/dev/vda`, on which this machine does not run, so that nothing is left of them or
    /// of what was removed earlier. Each pattern is `PATH` (goes, with all that is in it), `PATH/` (files in it go, its
    /// folders stay) or `empty PATH` (stays, without what is in it); `*` stands for any part of a name, `**` for any
    /// folders.
    Scrub {
        /// What goes.
        patterns: Vec<String>,
    },
    /// Stops every process, unmounts, and turns the machine off (or reboots it).
    Shutdown {
        /// Reboot in place of turning off.
        reboot: bool,
    },
}

/// A program to run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program, looked up in PATH, and its arguments.
    pub argv: Vec<String>,
    /// Variables added to the agent's environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// The working directory, `/root` when not given.
    #[serde(default)]
    pub cwd: Option<String>,
    /// A terminal for the program, with its size: rows, columns.
    #[serde(default)]
    pub tty: Option<(u16, u16)>,
}

/// What the guest is told after a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// Counts the wakes of this machine; higher than at any earlier wake. 0 stands for one more than it was.
    pub generation: u64,
    /// Wall clock, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Fresh entropy in hexadecimal, 32 bytes or more.
    pub entropy: String,
    /// A new identity: machine id, and with it host name, when this is a copy.
    #[serde(default)]
    pub identity: Option<Identity>,
    /// Settings of the site that change.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: Settings,
    /// The disks in the bays, as the guest knows them.
    #[serde(default)]
    pub ephemeral: Vec<WakeDisk>,
}

/// What came of a wake.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Woken {
    /// The kernel's `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// What could not be done, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

/// What became of a disk that lives in the host's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WakeDisk {
    /// Its bay.
    pub bay: String,
    /// Where it was mounted.
    pub at: String,
    /// Whether it is the very disk that it was when the snapshot was taken. Otherwise it fails, and is to be let go.
    pub kept: bool,
}

/// Who a machine is, for a copy that must differ from its original.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// 32 hexadecimal digits, for `/etc/machine-id`.
    pub machine_id: String,
    /// The host name.
    pub hostname: String,
}

/// The agent's answer to a request that has one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Ok,
    /// It is unmounted, but somebody still has files of it open.
    Held,
    /// The answer to `status`.
    Status(Status),
    /// The answer to `scrub`.
    Scrubbed(Scrubbed),
    /// The answer to `wake`.
    Woken(Woken),
    /// What failed, for people.
    Error(String),
}

/// What becomes of what a pattern of [`Request::Scrub`] matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes, with all that is in it.
    Goes,
    /// Files in it go.
    FilesGo,
    /// It stays, without what is in it.
    Emptied,
}

/// A pattern of [`Request::Scrub`]: what becomes of what it matches, and the names from the root on. `None` when it
/// is none.
pub fn pattern(text: &str) -> Option<(Fate, Vec<String>)> {
    const DEEPEST: usize = 128;
    let (path, fate) = match (text.strip_prefix("empty "), text.strip_suffix('/')) {
        (Some(path), _) => (path, Fate::Emptied),
        (None, Some(path)) => (path, Fate::FilesGo),
        (None, None) => (text, Fate::Goes),
    };
    let names: Vec<String> = path.strip_prefix('/')?.split('/').map(str::to_owned).collect();
    let sound = |name: &String| !name.is_empty() && name != "." && name != "..";
    (names.len() <= DEEPEST && names.iter().all(sound)).then_some((fate, names))
}

/// What came of a scrub.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrubbed {
    /// Files and other things that are not folders, removed or emptied.
    pub files: u64,
    /// The bytes in them.
    pub bytes: u64,
    /// Bytes of the filesystem that are free, and were wiped.
    pub wiped: u64,
    /// Some of their names.
    pub names: Vec<String>,
    /// What could not be done and does no harm to what was.
    pub notes: Vec<String>,
}

/// What the guest says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// vCPUs that are online.
    pub cpus: u32,
    /// MemTotal in bytes.
    pub memory_bytes: u64,
    /// MemTotal in bytes when the agent was started: the difference is what was plugged in since, or taken away.
    /// 0 when unknown.
    #[serde(default)]
    pub boot_memory_bytes: u64,
    /// The memory that the kernel has in bytes, in use or not: what it gives back counts until the last trace of it is
    /// gone. 0 when unknown.
    #[serde(default)]
    pub present_bytes: u64,
    /// `present_bytes` when the agent was started. 0 when unknown.
    #[serde(default)]
    pub boot_present_bytes: u64,
    /// MemAvailable in bytes: what programs could still have. 0 when unknown.
    #[serde(default)]
    pub available_bytes: u64,
    /// The size of the disk below the root filesystem in bytes, 0 when unknown.
    #[serde(default)]
    pub disk_bytes: u64,
    /// The size of the root filesystem in bytes, 0 when unknown.
    #[serde(default)]
    pub root_bytes: u64,
    /// Seconds since boot, as the guest's monotonic clock (with sleep) counts them.
    pub uptime_seconds: u64,
    /// The kernel's boot id.
    pub boot_id: String,
    /// How often the machine was woken, 0 when never.
    pub generation: u64,
    /// The guest's wall clock, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Whether filesystems are frozen now.
    pub frozen: bool,
}

/// One frame of an exec connection: a kind (1 byte), a length (4 bytes, little endian), the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// To the guest: bytes for standard input; none at all means end of file.
    Stdin(Vec<u8>),
    /// To the guest: the terminal's new size, rows and columns.
    Resize(u16, u16),
    /// To the guest: deliver this signal to the program's process group.
    Signal(u8),
    /// To the host: bytes of standard output.
    Stdout(Vec<u8>),
    /// To the host: bytes of standard error.
    Stderr(Vec<u8>),
    /// To the host: the program ended with this code (128 + n when signal n killed it). The last frame.
    Exit(u8),
    /// To the host: it could not be started: the code to exit with (126 or 127, as docker does) and why.
    /// The last frame.
    Failed(u8, String),
}

impl Frame {
    /// Writes the frame. Payloads longer than [`MAX_FRAME`] are refused with `InvalidInput`.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, payload): (u8, Vec<u8>) = match self {
            Frame::Stdin(bytes) => (0, bytes.clone()),
            Frame::Resize(rows, cols) => (1, [rows.to_le_bytes(), cols.to_le_bytes()].concat()),
            Frame::Signal(number) => (2, vec![*number]),
            Frame::Stdout(bytes) => (3, bytes.clone()),
            Frame::Stderr(bytes) => (4, bytes.clone()),
            Frame::Exit(code) => (5, vec![*code]),
            Frame::Failed(code, why) => (6, [&[*code], why.as_bytes()].concat()),
        };
        if payload.len() > MAX_FRAME {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "frame too long"));
        }
        let mut bytes = Vec::with_capacity(5 + payload.len());
        bytes.push(kind);
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(payload);
        to.write_all(&bytes)
    }

    /// Reads one frame; `None` at a clean end of the stream. A frame that breaks the rules is `InvalidData`.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
        let mut kind = [0];
        if from.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_FRAME {
            return Err(invalid("frame too long"));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(Some(match (kind[0], payload.as_slice()) {
            (0, _) => Frame::Stdin(payload),
            (1, &[a, b, c, d]) => Frame::Resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])),
            (2, &[number]) => Frame::Signal(number),
            (3, _) => Frame::Stdout(payload),
            (4, _) => Frame::Stderr(payload),
            (5, &[code]) => Frame::Exit(code),
            (6, [code, why @ ..]) => Frame::Failed(*code, String::from_utf8_lossy(why).into_owned()),
            _ => return Err(invalid("no such frame")),
        }))
    }
}

/// Writes `message` as one line of JSON.
pub fn write_line(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "line too long"));
    }
    to.write_all(&line)
}

/// Reads one line of JSON, byte by byte so that nothing after it is taken.
pub fn read_line<T: for<'de> Deserialize<'de>>(from: &mut impl Read) -> io::Result<T> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        from.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            return Ok(serde_json::from_slice(&line)?);
        }
        if line.len() == MAX_LINE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"));
        }
        line.push(byte[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire_and_bad_ones_are_refused() {
        let frames = [
            Frame::Stdin(vec![]),
            Frame::Resize(24, 80),
            Frame::Signal(2),
            Frame::Stdout(vec![7; MAX_FRAME]),
            Frame::Stderr(b"x".to_vec()),
            Frame::Exit(3),
            Frame::Failed(127, "no such file".into()),
        ];
        let mut wire = Vec::new();
        for frame in &frames {
            frame.write(&mut wire).unwrap();
        }
        let mut reader = wire.as_slice();
        for frame in &frames {
            assert_eq!(Frame::read(&mut reader).unwrap().as_ref(), Some(frame));
        }
        assert_eq!(Frame::read(&mut reader).unwrap(), None);
        assert!(Frame::read(&mut [3, 255, 255, 255, 255].as_slice()).is_err());
        assert!(Frame::read(&mut [9, 0, 0, 0, 0].as_slice()).is_err());
        assert!(Frame::read(&mut [5, 0, 0, 0, 0].as_slice()).is_err());
    }

    #[test]
    fn a_pattern_is_a_path_below_the_root() {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        assert_eq!(pattern("/var/log/"), Some((Fate::FilesGo, names(&["var", "log"]))));
        assert_eq!(pattern("empty /etc/machine-id"), Some((Fate::Emptied, names(&["etc", "machine-id"]))));
        assert_eq!(pattern("/**/a b*"), Some((Fate::Goes, names(&["**", "a b*"]))));
        for bad in ["", "/", "x", "/a//b", "/a/../b", "/./a", "empty x", "//", &"/a".repeat(129)] {
            assert_eq!(pattern(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_settings_that_there_are_are_taken() {
        let kept = |key: &str, value: &str| setting(key, value).ok().map(|(key, value)| format!("{key}={value}"));
        assert_eq!(kept("color", " Grey ").unwrap(), "colour=grey");
        assert_eq!(kept("title", "Ben's = kitten").unwrap(), "title=Ben's = kitten");
        let long = "x".repeat(MAX_TITLE + 1);
        for (key, value) in
            [("colour", "pink"), ("colour", ""), ("title", ""), ("title", "a\nb"), ("title", &long), ("x", "y")]
        {
            assert_eq!(kept(key, value), None, "{key}");
        }
        let one = |key: &str, value: &str| Settings::from([(key.into(), value.into())]);
        assert_eq!(check_settings(&one("colour", "grey")), Ok(()));
        assert!(check_settings(&one("color", "grey")).is_err() && check_settings(&one("title", " x")).is_err());
    }

    #[test]
    fn a_line_takes_nothing_that_follows_it() {
        let mut wire = Vec::new();
        write_line(&mut wire, &Request::Forward { port: 80 }).unwrap();
        wire.extend(b"GET / HTTP/1.1");
        let mut reader = wire.as_slice();
        assert_eq!(read_line::<Request>(&mut reader).unwrap(), Request::Forward { port: 80 });
        assert_eq!(reader, b"GET / HTTP/1.1");
        assert!(read_line::<Request>(&mut vec![b' '; MAX_LINE + 1].as_slice()).is_err());
    }
}
