//! Client, server and everything between, over a real socket. The guest is a paper one: this room's duties
//! begin where a machine's end, and the guest tests boot real ones.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use catnap_guest::protocol::{self as agent, Frame, Hello};

use super::api::Api;
use super::client::{Client, Error};
use super::failure::{Code, Failure};
use super::host::{Guest, Host};
use super::protocol::{Ended, Resize, State, Stop, Wait};
use super::server::{Limits, Server};
use super::snapshots::Watch;
use crate::disk::{Mark, Reach};
use crate::machine::{self, Armed, Captured, Drive, End, MemoryMap, Resized, Shape};
use crate::snapshot::Digest;
use crate::spec::{Ephemeral, MachineSpec, Size};

const SOON: Duration = Duration::from_secs(5);

/// A guest that obeys at once, and whose agent answers `exec` by repeating its input.
struct Paper {
    state: Mutex<machine::State>,
    changed: Condvar,
    screens: Mutex<Vec<Sender<Vec<u8>>>>,
    deaf: bool,
    size: Mutex<machine::Size>,
}

impl Paper {
    fn new(deaf: bool) -> Arc<Paper> {
        let state = Mutex::new(machine::State::Paused);
        let size = Mutex::new(machine::Size { cpus: 1, memory: 256 << 20 });
        Arc::new(Paper { state, changed: Condvar::new(), screens: Mutex::default(), deaf, size })
    }

    fn become_(&self, state: machine::State) {
        *self.state.lock().unwrap() = state;
        self.changed.notify_all();
    }

    fn end(&self, end: End) {
        self.become_(machine::State::Ended(end));
    }
}

impl Guest for Paper {
    fn capture(&self, _: &Path, _: bool, _: &dyn Fn(&Digest) -> bool, _: Watch<'_>) -> Result<Captured<'_>, Failure> {
        Err(Failure::new(Code::Failed, "paper has no memory"))
    }
    fn flatten_disk(&self, _: Reach) -> Result<(), Failure> {
        Ok(())
    }
    fn memory_map(&self, cells: u32) -> Result<MemoryMap, Failure> {
        Ok(MemoryMap {
            page: 4096,
            cell_pages: 64,
            since_snapshot: false,
            cells: vec![[1, 2, 3, 4, 5].into(); cells as usize],
        })
    }
    fn size(&self) -> machine::Size {
        *self.size.lock().unwrap()
    }
    fn shape(&self) -> Shape {
        Shape { cpus: 1, max_cpus: 4, boot_memory: 256 << 20, max_memory: 1 << 30 }
    }
    fn resize(&self, wanted: machine::Size, _: Duration) -> Result<Resized, Failure> {
        self.shape().check(wanted)?;
        let before = std::mem::replace(&mut *self.size.lock().unwrap(), wanted);
        Ok(Resized { before, wanted, reached: wanted, guest: None, unconfirmed: false, duration_ms: 1 })
    }
    fn resized(&self) -> Option<Resized> {
        None
    }
    fn drives(&self) -> Vec<Drive> {
        Vec::new()
    }
    fn attach(&self, _: &Ephemeral) -> Result<(), Failure> {
        Err(Failure::new(Code::Refused, "paper has no bays"))
    }
    fn detach(&self, _: &str, _: bool) -> Result<(), Failure> {
        Err(Failure::new(Code::Refused, "paper has no bays"))
    }
    fn give(&self, _: &[Mark]) -> Result<(), Failure> {
        Ok(())
    }
    fn arm_doorbell(&self) -> Option<Armed> {
        None
    }
    fn start(&self) -> Result<(), Failure> {
        self.resume()
    }
    fn state(&self) -> machine::State {
        self.state.lock().unwrap().clone()
    }
    fn wait(&self) -> End {
        let mut state = self.state.lock().unwrap();
        loop {
            if let machine::State::Ended(end) = &*state {
                return end.clone();
            }
            state = self.changed.wait(state).unwrap();
        }
    }
    fn pause(&self) -> Result<(), Failure> {
        self.become_(machine::State::Paused);
        Ok(())
    }
    fn resume(&self) -> Result<(), Failure> {
        self.become_(machine::State::Running);
        Ok(())
    }
    fn power_button(&self) -> Result<(), Failure> {
        if !self.deaf {
            self.end(End::PowerOff);
        }
        Ok(())
    }
    fn stop(&self) {
        self.end(End::Stopped);
    }
    fn attach_console(&self) -> (Vec<u8>, Receiver<Vec<u8>>) {
        let (sender, receiver) = channel();
        self.screens.lock().unwrap().push(sender);
        (b"boot\n".to_vec(), receiver)
    }
    fn console_input(&self, bytes: &[u8]) -> usize {
        if bytes == b"reboot\n" {
            self.end(End::Reboot);
            return bytes.len();
        }
        // Like a serial port, it takes no more than fits.
        let taken = &bytes[..bytes.len().min(3)];
        self.screens.lock().unwrap().iter().for_each(|screen| drop(screen.send(taken.to_ascii_uppercase())));
        taken.len()
    }
    fn agent(&self) -> io::Result<UnixStream> {
        let (ours, mut theirs) = UnixStream::pair()?;
        thread::spawn(move || {
            let Ok(agent::Request::Exec(exec)) = agent::read_line(&mut theirs) else {
                return agent::write_line(&mut theirs, &agent::Reply::Ok).unwrap();
            };
            Frame::Stdout(exec.argv.join(" ").into_bytes()).write(&mut theirs).unwrap();
            while let Ok(Some(Frame::Stdin(bytes))) = Frame::read(&mut theirs) {
                if bytes.is_empty() {
                    Frame::Exit(7).write(&mut theirs).unwrap();
                }
                Frame::Stdout(bytes).write(&mut theirs).unwrap();
            }
        });
        Ok(ours)
    }
    fn hello(&self, _: Duration) -> Option<Hello> {
        (!self.deaf).then(|| Hello { version: agent::VERSION, boot_id: "paper".into() })
    }
}

/// A monitor process in small: the socket, the host, and its loop on a thread.
struct House {
    client: Client,
    guest: Arc<Paper>,
    ended: JoinHandle<Ended>,
    server: Server,
    _folder: tempfile::TempDir,
}

fn house(deaf: bool) -> House {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("control.sock");
    let host = Arc::new(Host::new(MachineSpec::new("anna".parse().unwrap(), "sha256:00", 1, Size::mib(256)), None));
    let (server, listener) = Server::bind(&path).unwrap();
    server.serve(listener, Limits::default(), Arc::new(Api(Arc::clone(&host)))).unwrap();
    let guest = Paper::new(deaf);
    host.start(&guest).unwrap();
    let first = Arc::clone(&guest);
    let ended = thread::spawn(move || host.run(first, move || Ok(Paper::new(deaf))));
    House { client: Client::new(path), guest, ended, server, _folder: folder }
}

#[test]
fn a_resize_keeps_what_was_not_given_and_stays_in_the_envelope() {
    let house = house(false);
    let resized = house.client.resize(Resize { cpus: Some(4), memory: None }).unwrap();
    assert_eq!((resized.before.cpus, resized.reached), (1, machine::Size { cpus: 4, memory: 256 << 20 }));
    assert_eq!(house.client.status().unwrap().size, Some(resized.reached));
    for (wanted, code, hint) in [
        (Resize { cpus: Some(5), memory: None }, Code::Refused, "--cold --cpus 5 --memory 256M"),
        (Resize { cpus: None, memory: Some(128 << 20) }, Code::Refused, "catnap start anna"),
        (Resize { cpus: None, memory: Some(257 << 20) }, Code::Usage, "--memory 258M"),
    ] {
        let Err(Error::Failure(failure)) = house.client.resize(wanted) else { panic!("{wanted:?} was not refused") };
        assert_eq!(failure.code, code);
        assert!(failure.hint.as_ref().is_some_and(|it| it.contains(hint)), "{failure:?}");
    }
    assert_eq!(house.client.status().unwrap().size, Some(resized.reached));
}

#[test]
fn a_machine_is_asked_paused_resumed_and_stopped() {
    let House { client, ended, server, _folder, .. } = house(false);
    let status = client.status().unwrap();
    assert_eq!((status.state, status.boots, status.machine.name.as_str()), (State::Running, 1, "anna"));
    assert_eq!(status.agent.unwrap().boot_id, "paper");
    assert_eq!(client.pause().unwrap().state, State::Paused);
    assert_eq!(client.pause().unwrap().state, State::Paused);
    assert!(matches!(client.exec(&agent::Exec::default()), Err(Error::Failure(f)) if f.code == Code::Refused));
    assert_eq!(client.resume().unwrap().state, State::Running);
    client.pause().unwrap();

    // A paused guest is woken for its shutdown.
    let stopped = client.stop(Stop { seconds: 5, force: false }).unwrap();
    assert_eq!((stopped.state, stopped.ended), (State::Ended, Some(Ended::PowerOff)));
    assert_eq!(ended.join().unwrap(), Ended::PowerOff);
    assert!(matches!(client.pause(), Err(Error::Failure(failure)) if failure.code == Code::Refused));
    server.close(SOON);
    assert!(matches!(client.status(), Err(Error::Gone { .. })));
}

#[test]
fn a_guest_that_does_not_hear_its_power_button_goes_by_force_only() {
    let House { client, ended, _folder, .. } = house(true);
    let refused = client.stop(Stop { seconds: 1, force: false });
    assert!(matches!(refused, Err(Error::Failure(failure)) if failure.code == Code::Refused));
    assert_eq!(client.status().unwrap().state, State::Running);
    assert_eq!(client.stop(Stop { seconds: 0, force: true }).unwrap().ended, Some(Ended::Forced));
    assert_eq!(ended.join().unwrap(), Ended::Forced);
}

#[test]
fn waiting_ends_with_what_was_waited_for_or_with_the_time() {
    let House { client, guest, ended, _folder, .. } = house(false);
    let start = Instant::now();
    assert!(client.wait(Wait::Agent, Duration::from_secs(60)).unwrap().agent.is_some());
    assert_eq!(client.wait(Wait::End, Duration::from_secs(1)).unwrap().state, State::Running);
    assert!(start.elapsed() >= Duration::from_secs(1) && start.elapsed() < SOON);

    let waiting = client.clone();
    let waiting = thread::spawn(move || waiting.wait(Wait::End, Duration::from_secs(60)).unwrap());
    guest.end(End::Crash("triple fault".into()));
    let crash = Ended::Crash { why: "triple fault".into() };
    assert_eq!(ended.join().unwrap(), crash);
    assert_eq!(waiting.join().unwrap().ended, Some(crash));
}

#[test]
fn the_console_goes_on_over_a_reboot_and_ends_with_the_guest() {
    let House { client, guest, ended, _folder, .. } = house(false);
    let mut console = client.console().unwrap();
    let mut expect = |wire: &[u8], answer: &[u8]| {
        console.write_all(wire).unwrap();
        let mut seen = vec![0; answer.len()];
        console.read_exact(&mut seen).unwrap();
        assert_eq!(seen, answer);
    };
    expect(b"", b"boot\n");
    expect(b"hello", b"HELLO");
    drop(guest);
    expect(b"reboot\n", b"boot\n");
    expect(b"again", b"AGAIN");
    assert_eq!(client.status().unwrap().boots, 2);
    client.stop(Stop { seconds: 5, force: false }).unwrap();
    assert_eq!(console.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(ended.join().unwrap(), Ended::PowerOff);
}

#[test]
fn a_program_gets_its_input_and_gives_its_output_and_code() {
    let House { client, _folder, .. } = house(false);
    let mut stream =
        client.exec(&agent::Exec { argv: vec!["echo".into(), "hi".into()], ..Default::default() }).unwrap();
    assert_eq!(Frame::read(&mut stream).unwrap(), Some(Frame::Stdout(b"echo hi".to_vec())));
    let much = vec![9; agent::MAX_FRAME];
    for _ in 0..20 {
        Frame::Stdin(much.clone()).write(&mut stream).unwrap();
        assert_eq!(Frame::read(&mut stream).unwrap(), Some(Frame::Stdout(much.clone())));
    }
    Frame::Stdin(Vec::new()).write(&mut stream).unwrap();
    assert_eq!(Frame::read(&mut stream).unwrap(), Some(Frame::Exit(7)));

    let mut reply = client.agent(&agent::Request::Thaw).unwrap();
    assert_eq!(agent::read_line::<agent::Reply>(&mut reply).unwrap(), agent::Reply::Ok);
}

#[test]
fn requests_that_make_no_sense_are_refused_with_a_reason() {
    let House { client, _folder, .. } = house(false);
    let ask = |head: &str, body: &str| {
        let mut stream = UnixStream::connect(client.path()).unwrap();
        write!(stream, "{head} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let failure: Failure = serde_json::from_str(body).unwrap();
        (head[9..12].parse::<u16>().unwrap(), failure.code)
    };
    assert_eq!(ask("GET /v2/machine", ""), (404, Code::NotFound));
    assert_eq!(ask("DELETE /v1/machine", ""), (404, Code::NotFound));
    assert_eq!(ask("GET /v1/machine?wait=godot", ""), (400, Code::Usage));
    assert_eq!(ask("GET /v1/machine?wait=end&seconds=99999", ""), (400, Code::Usage));
    assert_eq!(ask("POST /v1/stop", "{\"seconds\":-1}"), (400, Code::Usage));
    assert_eq!(ask("POST /v1/stop", "{\"now\":true}"), (400, Code::Usage));
    assert_eq!(ask("POST /v1/stop", "[[[["), (400, Code::Usage));
    assert_eq!(ask("GET /v1/console", ""), (400, Code::Usage));
    assert_eq!(ask("POST /v1/exec", "{\"argv\":[\"ls\"]}"), (400, Code::Usage));
}
