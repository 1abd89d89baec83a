//! The agent's client, for the lab: runs a program over there as if it were here.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{self, SetArg, Termios};

use crate::protocol::{Exec, Frame, Reply, Request, read_line, write_line};
use crate::socket::{Address, Socket};

/// How long a one-line request may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// Sends a request that has a one-line reply.
pub fn ask(agent: Address, request: &Request) -> io::Result<Reply> {
    let socket = Socket::connect(agent)?;
    socket.set_timeout(PATIENCE)?;
    write_line(&mut &socket, request)?;
    read_line(&mut &socket)
}

/// Runs a program on the agent's side with our standard streams, and returns its code. Signals that would
/// end us go to the program. To be called before any other thread is started.
pub fn exec(agent: Address, argv: Vec<String>, tty: bool) -> io::Result<u8> {
    let signals = [Signal::SIGWINCH, Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
    let signals: SigSet = signals.into_iter().collect();
    signals.thread_block()?;
    let socket = Socket::connect(agent)?;
    socket.set_nodelay();
    let terminal = std::env::var("TERM").ok().filter(|_| tty);
    let env = terminal.map(|name| ("TERM".into(), name)).into_iter().collect();
    let exec = Exec { argv, env, cwd: None, tty: tty.then(window_size) };
    write_line(&mut &socket, &Request::Exec(exec))?;
    let _raw = (tty && io::stdin().is_terminal()).then(RawMode::enter).transpose()?;

    // Two threads write frames. Both end with the process: one that reads a terminal cannot be asked to.
    let sender = Sender(Arc::new((socket, Mutex::new(()))));
    let (input, keys) = (sender.clone(), sender.clone());
    std::thread::spawn(move || send_input(&input));
    std::thread::spawn(move || send_signals(&keys, &signals, tty));
    receive(&sender.0.0)
}

#[derive(Clone)]
struct Sender(Arc<(Socket, Mutex<()>)>);

impl Sender {
    fn send(&self, frame: Frame) -> io::Result<()> {
        let _whole = self.0.1.lock().unwrap_or_else(PoisonError::into_inner);
        frame.write(&mut &self.0.0)
    }
}

fn send_input(sender: &Sender) -> io::Result<()> {
    let mut chunk = vec![0; 32 << 10];
    loop {
        // An input that cannot be read is an empty one.
        let n = io::stdin().read(&mut chunk).unwrap_or(0);
        sender.send(Frame::Stdin(chunk[..n].to_vec()))?;
        if n == 0 {
            return Ok(());
        }
    }
}

fn send_signals(sender: &Sender, signals: &SigSet, tty: bool) -> io::Result<()> {
    loop {
        match signals.wait()? {
            Signal::SIGWINCH if tty => {
                let (rows, cols) = window_size();
                sender.send(Frame::Resize(rows, cols))?;
            }
            Signal::SIGWINCH => {}
            signal => sender.send(Frame::Signal(signal as u8))?,
        }
    }
}

fn receive(socket: &Socket) -> io::Result<u8> {
    let mut reader = io::BufReader::new(socket);
    loop {
        match Frame::read(&mut reader)? {
            Some(Frame::Stdout(bytes)) => pass_on(io::stdout().lock(), &bytes),
            Some(Frame::Stderr(bytes)) => pass_on(io::stderr().lock(), &bytes),
            Some(Frame::Exit(code)) => return Ok(code),
            Some(Frame::Failed(code, why)) => {
                eprintln!("catnap-guest: {why}");
                return Ok(code);
            }
            Some(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame of the host's own kind")),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// A reader of ours that is gone is no reason to end the program; it learns nothing of it in docker either.
fn pass_on(mut to: impl Write, bytes: &[u8]) {
    let _ = to.write_all(bytes).and_then(|()| to.flush());
}

fn window_size() -> (u16, u16) {
    let mut size = libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    for fd in 0..3 {
        // SAFETY: the ioctl writes one winsize through the pointer, which is valid for that.
        if unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &mut size) } == 0 {
            break;
        }
    }
    (size.ws_row, size.ws_col)
}

/// Our terminal passes every key on, until this is dropped.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> io::Result<RawMode> {
        let stdin = io::stdin();
        let before = termios::tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(RawMode(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &self.0);
    }
}
