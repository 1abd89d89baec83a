//! What the guest tests are written in: machines that clean up after themselves, and what people do with them.
//!
//! The machines are real: `catnap` (CATNAP_BIN) boots Linux on KVM from the image in CATNAP_HOME. A test makes
//! one with `machine("anna").cpus(4).boot()`, and when it goes out of scope, also in a panic, it is removed.
#![allow(dead_code, unused_imports)] // Each test program has its own copy of this and uses a part of it.

pub mod colleague;
pub mod disk;
pub mod hardware;
pub mod http;
pub mod inside;
pub mod monitor;
pub mod namespace;
pub mod naps;
pub mod net;
pub mod ran;
pub mod registry;
pub mod terminal;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use ran::{Ran, catnap, in_background, with_input};

/// How long anything may take that is not measured, on the slowest host.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A machine to be.
pub struct Builder {
    name: String,
    options: Vec<OsString>,
    ports: Vec<(u16, u16)>,
    stock: bool,
}

/// A machine of the test's own.
pub struct Machine {
    /// Its name.
    pub name: String,
    ports: Vec<(u16, u16)>,
}

/// Where the recipe in `images/` has put a minimal kernel: a folder with `bzImage` and `vmlinux`.
pub fn minimal_kernel() -> Option<PathBuf> {
    std::env::var_os("CATNAP_TEST_MINIMAL_KERNEL").map(PathBuf::from)
}

/// A machine with one vCPU and 256 MiB, if nothing else is said.
pub fn machine(name: &str) -> Builder {
    Builder { name: name.into(), options: Vec::new(), ports: Vec::new(), stock: false }
}

impl Builder {
    /// With the image's kernel in any case: the test asks for what the minimal one was built without.
    pub fn stock_kernel(self) -> Builder {
        Builder { stock: true, ..self }
    }

    pub fn cpus(self, count: u32) -> Builder {
        self.with(["--cpus".into(), count.to_string()])
    }

    pub fn memory(self, size: &str) -> Builder {
        self.with(["--memory", size])
    }

    pub fn kernel(self, path: &Path) -> Builder {
        self.with([Path::new("--kernel"), path])
    }

    /// Brings a port of the guest to a free port of this host.
    pub fn publish(mut self, guest: u16) -> Builder {
        let host = net::free_port();
        self.ports.push((host, guest));
        self.with(["--publish".into(), format!("{host}:{guest}")])
    }

    pub fn with(mut self, options: impl IntoIterator<Item = impl Into<OsString>>) -> Builder {
        self.options.extend(options.into_iter().map(Into::into));
        self
    }

    /// Boots it. The test ends here when that fails.
    pub fn boot(self) -> Machine {
        let (machine, ran) = self.try_to_boot();
        ran.succeeds();
        machine
    }

    /// Boots it or not; what it left behind is removed with the machine. Its kernel is the minimal one, when the tests
    /// are run with that and it asks for none itself.
    pub fn try_to_boot(self) -> (Machine, Ran) {
        let asks = self.stock || self.options.iter().any(|option| option == "--kernel");
        let minimal =
            minimal_kernel().filter(|_| !asks).map(|folder| ["--kernel".into(), folder.join("vmlinux").into()]);
        let machine = Machine { name: self.name, ports: self.ports };
        // A test that was killed has left its machines behind.
        drop(machine.catnap("rm --force"));
        let first: [OsString; 4] = ["run".into(), "kitten".into(), "--name".into(), (&machine.name).into()];
        let ran = ran::catnap_with(first.into_iter().chain(self.options).chain(minimal.into_iter().flatten()));
        (machine, ran)
    }
}

impl Machine {
    /// A machine that the test makes in its own way.
    pub fn named(name: &str) -> Machine {
        let machine = Machine { name: name.into(), ports: Vec::new() };
        drop(machine.catnap("rm --force"));
        machine
    }

    /// A machine that something else has started or will.
    pub fn booting(name: &str) -> Machine {
        Machine { name: name.into(), ports: Vec::new() }
    }

    /// `catnap VERB NAME`.
    pub fn catnap(&self, verb: &str) -> Ran {
        catnap(&[verb, &self.name])
    }

    pub fn start(&self) {
        self.catnap("start").succeeds();
    }

    pub fn stop(&self) {
        self.catnap("stop").succeeds();
    }

    /// Runs a line of shell in the guest; what it prints. It must succeed.
    pub fn sh(&self, line: &str) -> String {
        catnap(&["exec", &self.name, "--", "sh", "-c", line]).succeeds().text()
    }

    /// What `ps` says that it does.
    pub fn state(&self) -> String {
        self.view()["state"].as_str().unwrap_or_default().into()
    }

    /// Waits until `ps` says so.
    pub fn comes_to_be(&self, state: &str) {
        within(PATIENCE, &format!("{} is {state}", self.name), || self.state() == state);
    }

    /// Its line in `ps`.
    pub fn view(&self) -> Value {
        let all = catnap(&["ps", "--json"]).succeeds().json();
        let views = all.as_array().expect("a list").iter();
        views.clone().find(|view| view["name"] == self.name.as_str()).expect("a machine in the list").clone()
    }

    /// All that `inspect` knows.
    pub fn everything(&self) -> Value {
        self.catnap("inspect").succeeds().json()[0].clone()
    }

    /// One of its files, as `inspect` names it.
    pub fn file(&self, what: &str) -> PathBuf {
        self.everything()["files"][what].as_str().expect("a path").into()
    }

    pub fn console_log(&self) -> String {
        self.catnap("logs").succeeds().text()
    }

    /// The port of this host that leads to the guest's `port`.
    pub fn port(&self, port: u16) -> u16 {
        self.ports.iter().find(|(_, guest)| *guest == port).expect("a published port").0
    }

    /// Fetches a page from the guest's port 80.
    pub fn get(&self, path: &str) -> http::Answer {
        http::get(self.port(80), path)
    }

    /// What the kitten site says of its machine.
    pub fn status(&self) -> Value {
        self.get("/api/status").json()
    }

    /// A number that the kitten site says.
    pub fn status_of(&self, field: &str) -> u64 {
        self.status()[field].as_u64().expect("a number")
    }

    /// The name that the guest's kernel has for this boot, when its agent answers.
    pub fn boot_id(&self) -> String {
        catnap(&["exec", &self.name, "--", "cat", "/proc/sys/kernel/random/boot_id"]).text()
    }

    /// Waits until another boot answers than `old`.
    pub fn boots_anew(&self, old: &str) {
        within(PATIENCE, "another boot answers", || {
            // Asked once: between two questions the old boot may go, and no answer is another one too.
            let now = self.boot_id();
            now.len() == old.len() && now != old
        });
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            for options in [["logs", "--tail=30"], ["logs", "--monitor"]] {
                eprintln!("{}", ran::catnap_with(options.iter().chain([&self.name.as_str()])));
            }
        }
        let removed = self.catnap("rm --force");
        if removed.code != 0 && removed.code != 3 {
            eprintln!("{removed}");
        }
    }
}

/// Waits for a condition.
pub fn within(time: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + time;
    while !condition() {
        assert!(Instant::now() < end, "not within {time:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A check of something, and its name.
pub type Check<T> = (&'static str, fn(&T));

/// The checks of a test that share a machine, each with its name and the time it took.
pub fn each<T>(machine: &T, checks: &[Check<T>]) {
    for (name, check) in checks {
        println!("  {name} …");
        let begin = Instant::now();
        check(machine);
        println!("  {name}: {:.1} s", begin.elapsed().as_secs_f64());
    }
}

/// The checks by their own names, for [`each`].
#[macro_export]
macro_rules! each {
    ($machine:expr; $($check:ident),+ $(,)?) => {
        $crate::common::each(&$machine, &[$((stringify!($check), $check)),+])
    };
}

/// Where everything is kept.
pub fn home() -> PathBuf {
    std::env::var_os("CATNAP_HOME").expect("CATNAP_HOME; scripts/test guest sets it").into()
}

/// A folder of a machine with its files, for whoever looks behind the curtain.
pub fn machine_folder(name: &str) -> PathBuf {
    home().join("data/machines").join(name)
}

/// Whether anything is left of a machine of this name.
pub fn traces_of(name: &str) -> Vec<PathBuf> {
    let places = ["data/machines", "state/logs", "run"].map(|place| home().join(place).join(name));
    let staging = fs::read_dir(home().join("data/staging")).expect("a staging folder");
    let half_made = staging.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_dir());
    places.into_iter().filter(|path| path.exists()).chain(half_made).collect()
}
