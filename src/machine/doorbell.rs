//! The doorbell: a program in the guest says that it has come to a certain place, and goes on when it is answered.
//! A snapshot that was asked for at the doorbell is taken in between, so that everybody can say what it must hold.
//!
//! ```text
//!            arm                   a ring
//! unarmed ─────────▶ armed ─────────────────▶ Visitor ── drop ──▶ answered, unarmed
//!    │ a ring: answered at once
//! ```

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use catnap_guest::protocol::{Ring, Rung, read_line, write_line};

use super::lock;
use crate::devices::virtio::vsock::Handle;
use crate::sys::thread::small;

/// How long the guest may take from connecting to the end of its line.
const PATIENCE: Duration = Duration::from_secs(5);

/// Hears rings.
#[derive(Default)]
pub struct Doorbell {
    /// Whether somebody waits for a ring, and the ring once it has come.
    armed: Mutex<Option<Option<Visitor>>>,
    rang: Condvar,
    /// One ring is listened to at a time, so that a hostile guest cannot have us start many threads. Others are
    /// closed, which is an answer too.
    listening: AtomicBool,
}

/// The bell while somebody waits for it. Dropped, rings are answered at once again.
pub struct Armed(Arc<Doorbell>);

/// A guest that stands at the door. It is answered when this is dropped.
pub struct Visitor {
    /// What it said of where it is.
    pub at: String,
    stream: UnixStream,
}

impl Doorbell {
    /// Listens on the host's vsock `port`.
    pub(super) fn listen(vsock: &Handle, port: u32) -> Arc<Doorbell> {
        let doorbell = Arc::new(Doorbell::default());
        let at_connect = doorbell.clone();
        vsock.listen(port, Box::new(move |stream| at_connect.clone().hear(stream)));
        doorbell
    }

    /// Waits for the next ring from now on; `None` when somebody else does already.
    pub fn arm(self: &Arc<Doorbell>) -> Option<Armed> {
        let mut armed = lock(&self.armed);
        if armed.is_some() {
            return None;
        }
        *armed = Some(None);
        Some(Armed(self.clone()))
    }

    fn hear(self: Arc<Doorbell>, stream: UnixStream) {
        if self.listening.swap(true, Ordering::AcqRel) {
            return;
        }
        let listener = self.clone();
        let heard = small("doorbell").spawn(move || {
            let timeouts =
                stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
            match timeouts.and_then(|()| read_line::<Ring>(&mut &stream)) {
                Ok(ring) => listener.ring(ring, stream),
                Err(error) => tracing::debug!("the guest rang and said nothing proper: {error}"),
            }
            listener.listening.store(false, Ordering::Release);
        });
        if heard.is_err() {
            self.listening.store(false, Ordering::Release);
        }
    }

    fn ring(&self, ring: Ring, mut stream: UnixStream) {
        // There is one visitor at a time: whoever comes after the one that was awaited was not.
        if let Some(awaited @ None) = &mut *lock(&self.armed) {
            *awaited = Some(Visitor { at: ring.at, stream });
            return self.rang.notify_all();
        }
        // Who does not read the answer has gone.
        let _ = write_line(&mut stream, &Rung { awaited: false });
    }
}

impl Armed {
    /// The guest at the door, if one comes within `time`.
    pub fn visitor(&self, time: Duration) -> Option<Visitor> {
        let nobody = |armed: &mut Option<Option<Visitor>>| !matches!(armed, Some(Some(_)));
        let waiting = self.0.rang.wait_timeout_while(lock(&self.0.armed), time, nobody);
        waiting.unwrap_or_else(PoisonError::into_inner).0.as_mut().and_then(Option::take)
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        *lock(&self.0.armed) = None;
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        // Who does not read the answer has gone.
        let _ = write_line(&mut self.stream, &Rung { awaited: true });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit(doorbell: &Doorbell) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        doorbell.ring(Ring { at: "the door".into() }, theirs);
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours
    }

    fn answer(stream: &UnixStream) -> bool {
        read_line::<Rung>(&mut &*stream).unwrap().awaited
    }

    #[test]
    fn a_ring_that_nobody_awaits_is_answered_at_once() {
        let doorbell = Arc::new(Doorbell::default());
        assert!(!answer(&visit(&doorbell)));
        drop(doorbell.arm().unwrap());
        assert!(!answer(&visit(&doorbell)));
    }

    #[test]
    fn the_awaited_one_is_answered_when_all_is_done_and_others_are_not_kept() {
        let doorbell = Arc::new(Doorbell::default());
        let armed = doorbell.arm().unwrap();
        assert!(doorbell.arm().is_none(), "one waits at a time");
        assert!(armed.visitor(Duration::ZERO).is_none());
        let first = visit(&doorbell);
        assert!(!answer(&visit(&doorbell)));
        let visitor = armed.visitor(Duration::ZERO).unwrap();
        assert_eq!(visitor.at, "the door");
        first.set_nonblocking(true).unwrap();
        assert!(read_line::<Rung>(&mut &first).is_err(), "it waits");
        first.set_nonblocking(false).unwrap();
        drop(visitor);
        assert!(answer(&first));
    }

    #[test]
    fn nobody_is_left_at_the_door_when_the_waiting_is_given_up() {
        let doorbell = Arc::new(Doorbell::default());
        let armed = doorbell.arm().unwrap();
        let ours = visit(&doorbell);
        drop(armed);
        assert!(answer(&ours));
    }
}
