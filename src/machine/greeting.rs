//! Waiting for the guest's agent to say that it is up.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use catnap_guest::protocol::{Hello, read_line};

use crate::devices::virtio::vsock::Handle;
use crate::sys::thread::small;

/// How long the guest may take from connecting to the end of its line.
const PATIENCE: Duration = Duration::from_secs(5);

/// The agent's hello, once it has come.
#[derive(Default)]
pub struct Greeting {
    hello: Mutex<Option<Hello>>,
    came: Condvar,
    /// One connection is listened to at a time, so that a hostile guest cannot have us start many threads.
    listening: AtomicBool,
}

impl Greeting {
    /// Listens on the host's vsock `port`.
    pub fn expect(vsock: &Handle, port: u32) -> Arc<Greeting> {
        let greeting = Arc::new(Greeting::default());
        let at_connect = greeting.clone();
        vsock.listen(port, Box::new(move |stream| at_connect.clone().hear(stream)));
        greeting
    }

    fn hear(self: Arc<Greeting>, stream: UnixStream) {
        if self.listening.swap(true, Ordering::AcqRel) {
            return;
        }
        let listener = self.clone();
        let heard = small("greeting").spawn(move || {
            let hello = stream.set_read_timeout(Some(PATIENCE)).and_then(|()| read_line(&mut &stream));
            match hello {
                Ok(hello) => listener.take(hello),
                Err(error) => tracing::warn!("the guest said no proper hello: {error}"),
            }
            listener.listening.store(false, Ordering::Release);
        });
        if heard.is_err() {
            self.listening.store(false, Ordering::Release);
        }
    }

    /// The agent is up, and has said this.
    pub fn take(&self, hello: Hello) {
        *self.hello.lock().unwrap_or_else(PoisonError::into_inner) = Some(hello);
        self.came.notify_all();
    }

    /// Waits up to `timeout` for the hello.
    pub fn wait(&self, timeout: Duration) -> Option<Hello> {
        let hello = self.hello.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = self.came.wait_timeout_while(hello, timeout, |hello| hello.is_none());
        waiting.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}
