//! A registry, and a wire to it that can be cut.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;

use super::house::{House, Said, free_port, soon};

/// A registry with its own folder. It ends with this value.
pub struct Registry {
    pub port: u16,
    dir: tempfile::TempDir,
    settings: String,
    process: Arc<Mutex<Option<Child>>>,
}

impl Registry {
    pub fn start() -> Registry {
        Registry::with("")
    }

    /// One with more settings, in YAML; `DIR` in them is its folder.
    pub fn with(settings: &str) -> Registry {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings.replace("DIR", dir.path().to_str().unwrap());
        let registry = Registry { port: free_port(), dir, settings, process: Arc::default() };
        registry.restart();
        registry
    }

    pub fn restart(&self) {
        let (port, dir) = (self.port, self.dir());
        let config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}/storage}}}}\n\
             http: {{addr: \"127.0.0.1:{port}\"}}\n{}\n",
            dir.display(),
            self.settings
        );
        // Settings of the same part of the file are merged by whoever writes them.
        let config = if self.settings.starts_with("http:") {
            config
                .replacen(&format!("http: {{addr: \"127.0.0.1:{port}\"}}\n"), "", 1)
                .replace("PORT", &port.to_string())
        } else {
            config
        };
        let path = dir.join("config.yml");
        fs::write(&path, config).unwrap();
        let log = fs::File::create(dir.join("log")).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&path).env("OTEL_TRACES_EXPORTER", "none").stdout(Stdio::null()).stderr(log);
        *self.process.lock().unwrap() = Some(command.spawn().expect("docker-registry; scripts/test installs it"));
        soon(|| TcpStream::connect(("127.0.0.1", port)).is_ok());
    }

    pub fn kill(&self) {
        kill(&self.process);
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `localhost:PORT/cats/anna:TAG`.
    pub fn at(&self, tag: &str) -> String {
        format!("localhost:{}/cats/anna:{tag}", self.port)
    }

    /// The file with a blob.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        self.dir().join("storage/docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }

    /// The file that says that the repository has this blob.
    pub fn note(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        self.dir().join("storage/docker/registry/v2/repositories/cats/anna/_layers/sha256").join(hex).join("link")
    }

    /// How many blobs there are, manifests among them.
    pub fn blobs(&self) -> usize {
        let entries = |path: PathBuf| fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().path());
        let all = entries(self.dir().join("storage/docker/registry/v2/blobs/sha256")).flat_map(entries);
        all.filter(|blob| blob.join("data").exists()).count()
    }

    /// A manifest, by the digest that a push has told.
    pub fn artifact(&self, pushed: &Value) -> Value {
        serde_json::from_slice(&fs::read(self.blob(pushed["artifact"].as_str().unwrap())).unwrap()).unwrap()
    }

    /// A wire to it that breaks, and with it the registry, when so many bytes have gone through it either way; once.
    pub fn dies_after(&self, bytes: u64) -> u16 {
        let process = self.process.clone();
        let mut died = Some(());
        let once = Arc::new(Mutex::new(move || died.take().map(|()| kill(&process)).is_some()));
        self.wire(bytes, move || (once.lock().unwrap())())
    }

    /// A wire to it through which nothing goes any more after so many bytes, though it does not break.
    pub fn silent_after(&self, bytes: u64) -> u16 {
        self.wire(bytes, || {
            loop {
                thread::park();
            }
        })
    }

    /// A wire. From the limit on `end` is asked, for every piece that comes, whether the connection ends there.
    fn wire(&self, limit: u64, end: impl Fn() -> bool + Clone + Send + 'static) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, there, gone) = (listener.local_addr().unwrap().port(), self.port, Arc::new(AtomicU64::new(0)));
        thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                let Ok(far) = TcpStream::connect(("127.0.0.1", there)) else { continue };
                for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    let (gone, end) = (gone.clone(), end.clone());
                    thread::spawn(move || {
                        let mut buffer = [0; 16384];
                        while let Ok(count @ 1..) = from.read(&mut buffer) {
                            let past = gone.fetch_add(count as u64, Ordering::SeqCst) > limit;
                            if past && end() || to.write_all(&buffer[..count]).is_err() {
                                break;
                            }
                        }
                        for end in [from, to] {
                            let _ = end.shutdown(Shutdown::Both);
                        }
                    });
                }
            }
        });
        port
    }
}

fn kill(process: &Mutex<Option<Child>>) {
    if let Some(mut child) = process.lock().unwrap().take() {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        kill(&self.process);
    }
}

pub fn json(said: &Said) -> Value {
    serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

/// Pushes, and gives what came of it.
#[track_caller]
pub fn push(house: &House, snapshot: &str, target: &str) -> Value {
    let said = house.catnap(&format!("snapshot push {snapshot} {target} --yes --json"));
    assert_eq!(said.code, Some(0), "{said:?}");
    json(&said)
}

#[track_caller]
pub fn pull(house: &House, source: &str) -> Value {
    let said = house.catnap(&format!("snapshot pull {source} --json"));
    assert_eq!(said.code, Some(0), "{said:?}");
    json(&said)
}

/// Nothing has appeared in a store; what has arrived in part may be there.
#[track_caller]
pub fn nothing_has_come(house: &House) {
    for folder in ["snapshots", "names", "arrived", "staging"] {
        let left = fs::read_dir(house.store().root().join(folder)).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = left.filter(|name| name != ".lock" && name != ".guard").collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
}

/// How many snapshots have arrived in part.
pub fn parts(house: &House) -> usize {
    let arriving = fs::read_dir(house.store().root().join("arriving")).unwrap();
    arriving.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
}
