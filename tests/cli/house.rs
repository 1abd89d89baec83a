//! A folder of its own for each test, and the program that works in it.

use std::fs;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use catnap::disk::create_from_raw;
use catnap::snapshot::{Disk, Kind, Manifest, Role, describe};
use catnap::spec::{Forward, MachineSpec, Size};
use catnap::store::{Machine, Store};
use catnap::sys::home::Home;

/// The folder, removed at the end.
pub struct House(tempfile::TempDir);

/// What the program said and how it ended.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

/// A machine of one size, with the kernel of its image.
pub fn spec(name: &str) -> MachineSpec {
    MachineSpec::new(name.parse().unwrap(), "", 1, Size::mib(64))
}

impl House {
    pub fn new() -> House {
        House(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &std::path::Path {
        self.0.path()
    }

    /// The program, ready to be given arguments.
    pub fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_catnap"));
        command.env("CATNAP_HOME", self.0.path()).env_remove("NO_COLOR").stdin(Stdio::null());
        command
    }

    /// Runs the program with the words of `line`.
    pub fn catnap(&self, line: &str) -> Said {
        said(self.program().args(line.split_whitespace()).output().unwrap())
    }

    pub fn store(&self) -> Store {
        Store::open(&Home::at(self.0.path()).unwrap()).unwrap()
    }

    /// A machine of an image with an empty disk, that runs `kernel`.
    pub fn machine(&self, name: &str, kernel: &[u8]) -> Machine {
        let store = self.store();
        let kernel_file = self.0.path().join("kernel");
        fs::write(&kernel_file, kernel).unwrap();
        let raw = self.0.path().join("raw");
        fs::write(&raw, [0; 4096]).unwrap();
        let staging = store.stage().unwrap();
        create_from_raw(&raw, &staging.dir().join("root.qcow2")).unwrap();
        let mut manifest = Manifest::new(Kind::Clean, "empty", 1_700_000_000);
        manifest.files.push(describe(staging.dir(), "root.qcow2", Role::Disk).unwrap());
        manifest.disks.push(Disk {
            device: "root".into(),
            file: "root.qcow2".into(),
            format: "qcow2".into(),
            virtual_size: 4096,
            backing: None,
        });
        let image = store.publish(staging, &manifest, "empty").unwrap();
        let forwards = vec![Forward { host: free_port(), guest: 80 }];
        let spec = MachineSpec { kernel: Some(kernel_file), forwards, ..spec(name) };
        store.create_machine(&spec, &image).unwrap()
    }

    /// What `ps --json` has for the only machine.
    pub fn only_view(&self) -> serde_json::Value {
        let views: serde_json::Value = serde_json::from_str(&self.catnap("ps --json").out).unwrap();
        assert_eq!(views.as_array().map(Vec::len), Some(1), "{views}");
        views[0].clone()
    }
}

/// A port that nobody had a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub fn said(output: Output) -> Said {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

impl Said {
    /// Checks that it failed like this, with a next step, and with nothing on standard output.
    #[track_caller]
    pub fn refuses(&self, code: i32, words: &str) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.err.starts_with("error: ") && self.err.contains(words), "{self:?}");
        assert!(self.err.contains("\ntry: "), "{self:?}");
        assert_eq!(self.out, "", "{self:?}");
    }

    /// Checks that it went well, with nothing but data.
    #[track_caller]
    pub fn gives(&self, out: &str) {
        assert_eq!((self.code, self.out.as_str(), self.err.as_str()), (Some(0), out, ""));
    }
}

/// Waits for something that should come soon.
#[track_caller]
pub fn soon(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(20));
    }
}
