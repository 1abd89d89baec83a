//! TCP ports of the host's loopback that lead into the guest (`-p 8080:80`).
//!
//! One thread accepts for all ports of a machine and hands each connection, together with a request for the
//! guest's agent, to the vsock device, which does the rest.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use catnap_guest::protocol::{AGENT_PORT, Request, write_line};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::virtio::vsock::Handle;
use crate::spec::Forward;
use crate::sys::thread::small;

/// How long to wait before accepting again when the process is out of descriptors or memory, in ms.
const RETRY_MS: i32 = 100;
/// Connections that wait to be accepted; the kernel lowers it to `net.core.somaxconn`.
const BACKLOG: libc::c_int = 4096;
/// Connections accepted from one port before the others get their turn.
const TURN: usize = 64;
/// Epoll's token for the wish to stop; a port's is its index.
const STOP: u64 = u64::MAX;

/// Ports cannot be forwarded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another program has the port.
    #[error("port {0} of the host is in use: choose another with -p HOST:GUEST")]
    Taken(u16),
    /// The port is not allowed to us, or the like.
    #[error("port {0} of the host cannot be used")]
    Port(u16, #[source] io::Error),
    /// No descriptors or threads are left.
    #[error("port forwarding cannot be started")]
    Host(#[from] io::Error),
}

/// The forwarded ports of one machine, for as long as it lives.
pub struct Forwarder {
    stop: Arc<EventFd>,
    work: Mutex<Work>,
}

/// ```text
///          open                 drop
/// Closed ───────> Open(thread) ──────> (none)
/// ```
enum Work {
    /// Visitors wait in the kernel's queue.
    Closed(Epoll, Vec<Port>, Handle),
    /// A thread takes them in; `None` when it could not be had.
    Open(Option<JoinHandle<()>>),
}

/// A port that is listened on.
struct Port {
    listener: TcpListener,
    /// What the guest's agent is told first.
    request: Vec<u8>,
    /// Connections may wait to be accepted.
    waiting: bool,
}

impl Forwarder {
    /// Listens on all ports, or on none if one cannot be had. Nobody is let in before [`Forwarder::open`].
    pub fn listen(forwards: &[Forward], handle: Handle) -> Result<Forwarder, Error> {
        let ports = forwards.iter().map(Port::listen).collect::<Result<Vec<_>, _>>()?;
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        for (index, port) in ports.iter().enumerate() {
            // Edges, so that a port that we cannot accept from does not keep waking us.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, index as u64);
            epoll.ctl(ControlOperation::Add, port.listener.as_raw_fd(), event)?;
        }
        Ok(Forwarder { stop, work: Mutex::new(Work::Closed(epoll, ports, handle)) })
    }

    /// Lets those in who wait, and who come. Does nothing twice.
    pub fn open(&self) -> io::Result<()> {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let (epoll, mut ports, handle) = match std::mem::replace(&mut *work, Work::Open(None)) {
            Work::Closed(epoll, ports, handle) => (epoll, ports, handle),
            open => {
                *work = open;
                return Ok(());
            }
        };
        // The thread's own reference keeps the number that epoll watches from being given to another file.
        let watched = self.stop.clone();
        let thread = small("forward").spawn(move || {
            let _watched = watched;
            accept_until_stopped(&epoll, &mut ports, &handle);
        })?;
        *work = Work::Open(Some(thread));
        Ok(())
    }
}

impl Drop for Forwarder {
    /// Closes the ports. Connections that were accepted live on.
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        let work = self.work.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Work::Open(thread @ Some(_)) = work
            && let Some(thread) = thread.take()
        {
            let _ = thread.join();
        }
    }
}

fn accept_until_stopped(epoll: &Epoll, ports: &mut [Port], handle: &Handle) {
    let mut events = [EpollEvent::default(); 16];
    let mut timeout = -1;
    loop {
        // Interrupted by a signal is the same as nothing.
        let count = epoll.wait(timeout, &mut events).unwrap_or(0);
        for event in &events[..count] {
            match ports.get_mut(event.data() as usize) {
                Some(port) => port.waiting = true,
                None => return,
            }
        }
        timeout = ports.iter_mut().map(|port| port.accept(handle)).fold(-1, sooner);
    }
}

/// The sooner of two timeouts as epoll understands them: -1 is never.
fn sooner(one: i32, other: i32) -> i32 {
    if one < 0 || other < 0 { one.max(other) } else { one.min(other) }
}

impl Port {
    fn listen(forward: &Forward) -> Result<Port, Error> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => Error::Taken(forward.host),
            _ => Error::Port(forward.host, error),
        };
        // The standard library sets SO_REUSEADDR, so that a port is free as soon as its machine is gone.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, forward.host)).map_err(failed)?;
        listener.set_nonblocking(true)?;
        // SAFETY: no memory is involved. Listening again on a listening socket only changes its backlog.
        if unsafe { libc::listen(listener.as_raw_fd(), BACKLOG) } != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        let mut request = Vec::new();
        write_line(&mut request, &Request::Forward { port: forward.guest })?;
        Ok(Port { listener, request, waiting: true })
    }

    /// Accepts what waits, and returns when to come back: -1 is when epoll says so.
    fn accept(&mut self, handle: &Handle) -> i32 {
        if !self.waiting {
            return -1;
        }
        for _ in 0..TURN {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    // Without it answers come late, but they come.
                    let _ = stream.set_nodelay(true);
                    handle.connect(AGENT_PORT, self.request.clone(), stream.into());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.waiting = false;
                    return -1;
                }
                Err(error) if is_out_of_something(&error) => return RETRY_MS,
                // This one connection broke while it waited; the next may be well.
                Err(_) => {}
            }
        }
        0
    }
}

/// Whether accepting can succeed later without anything happening to the port.
fn is_out_of_something(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::devices::virtio::vsock::testing::{Guest, op};

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn a_port_that_is_taken_is_named_and_no_other_is_kept() {
        let guest = Guest::new();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let (free, host) = (free_port(), taken.local_addr().unwrap().port());
        let forwards = [Forward { host: free, guest: 80 }, Forward { host, guest: 81 }];
        let error = Forwarder::listen(&forwards, guest.device.handle()).err().unwrap();
        assert!(matches!(error, Error::Taken(port) if port == host));
        assert!(error.to_string().contains(&host.to_string()));
        drop(TcpListener::bind(("127.0.0.1", free)).unwrap());
    }

    #[test]
    fn nobody_is_let_in_before_it_is_open_and_all_are_then() {
        let mut guest = Guest::new();
        let host = free_port();
        let forwarder = Forwarder::listen(&[Forward { host, guest: 80 }], guest.device.handle()).unwrap();
        let _clients = [(); 2].map(|()| TcpStream::connect(("127.0.0.1", host)).unwrap());
        assert!(guest.packet_within(Duration::from_millis(100)).is_none());
        forwarder.open().unwrap();
        forwarder.open().unwrap();
        assert_eq!([guest.packet().0.op, guest.packet().0.op], [op::REQUEST; 2]);
        drop(forwarder);
        drop(Forwarder::listen(&[Forward { host, guest: 80 }], guest.device.handle()).unwrap());
        drop(TcpListener::bind(("127.0.0.1", host)).unwrap());
    }

    #[test]
    fn thousands_of_connections_reach_the_agent_with_their_request() {
        const COUNT: usize = 2000;
        crate::sys::limits::raise_open_files().unwrap();
        let mut guest = Guest::new();
        let host = free_port();
        let forwarder = Forwarder::listen(&[Forward { host, guest: 80 }], guest.device.handle()).unwrap();
        forwarder.open().unwrap();
        let client = move |index: usize| {
            let mut stream = TcpStream::connect(("127.0.0.1", host)).unwrap();
            write!(stream, "{index}!").unwrap();
            stream
        };
        let clients = std::thread::spawn(move || (0..COUNT).map(client).collect::<Vec<_>>());

        let mut peers = HashMap::new();
        let mut answered = 0;
        while answered < COUNT {
            let (header, payload) = guest.packet();
            if header.op == op::REQUEST {
                assert_eq!(header.dst_port, AGENT_PORT);
                peers.insert(header.src_port, (guest.answer(&header, 65536), Vec::new()));
                continue;
            }
            assert_eq!(header.op, op::RW);
            let (peer, heard) = peers.get_mut(&header.src_port).unwrap();
            heard.extend(payload);
            if let Some(index) = heard.strip_prefix(b"{\"op\":\"forward\",\"port\":80}\n")
                && index.ends_with(b"!")
            {
                peer.write(&mut guest, index);
                answered += 1;
            }
        }
        for (index, mut client) in clients.join().unwrap().into_iter().enumerate() {
            let mut answer = vec![0; format!("{index}!").len()];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(answer, format!("{index}!").as_bytes());
        }
        drop(forwarder);
        assert!(TcpStream::connect(("127.0.0.1", host)).is_err());
    }

    /// In a process of its own, because it uses up all descriptors.
    #[test]
    fn a_process_without_descriptors_waits_calmly_for_some() {
        const CHILD: &str = "CATNAP_TEST_WITHOUT_DESCRIPTORS";
        if std::env::var_os(CHILD).is_some() {
            return without_descriptors();
        }
        let name = "machine::forward::tests::a_process_without_descriptors_waits_calmly_for_some";
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    }

    fn without_descriptors() {
        let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
        // SAFETY: the pointer is to a live `rlimit`.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
        let mut guest = Guest::new();
        let host = free_port();
        let forwarder = Forwarder::listen(&[Forward { host, guest: 80 }], guest.device.handle()).unwrap();
        forwarder.open().unwrap();
        let mut hoard: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
        hoard.pop();
        let _client = TcpStream::connect(("127.0.0.1", host)).unwrap();
        let (began, before) = (Instant::now(), cpu_time());
        assert!(guest.packet_within(Duration::from_secs(1)).is_none());
        let used = cpu_time() - before;
        assert!(used < began.elapsed() / 5, "{used:?} of processor time went into waiting");
        drop(hoard);
        assert_eq!(guest.packet().0.op, op::REQUEST);
    }

    fn cpu_time() -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is to a live `timespec`.
        assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) }, 0);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }
}
