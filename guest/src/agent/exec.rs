//! One exec connection: frames on one side, a program's streams on the other.
//!
//! One thread, asleep in poll. Whoever is slow is waited for, so that nothing piles up: while the program
//! does not read, no frames are taken; while the monitor does not read, no output is. The connection's end
//! is seen at all times, and kills the program's group.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::program::{self, Program};
use crate::poll::{GONE, PEER_ENDED, Poll, READ, WRITE};
use crate::protocol::{Exec, Frame, MAX_FRAME};
use crate::socket::Socket;

/// What one read of the program's output takes.
const CHUNK: usize = 16 << 10;
/// Output that is kept while the monitor does not read.
const OUTBOX: usize = 64 << 10;
/// Output that is still passed on after the program's end: more than pipes and terminals hold.
const DRAIN: usize = 1 << 20;
/// How long the monitor has to close after the last frame.
const LINGER: Duration = Duration::from_secs(5);

/// Runs the program until it ends or the connection does. `rest` came after the request's line.
pub(super) fn run(socket: Socket, rest: Vec<u8>, exec: &Exec) {
    let last = match program::start(exec) {
        Ok(program) => match Session::new(&socket, rest, program).carry() {
            Ok(last) => last,
            // The connection broke; dropping the program has killed it.
            Err(_) => return,
        },
        Err((code, why)) => Frame::Failed(code, why),
    };
    let _ = finish(&socket, &last);
}

/// Sends the last frame and waits for the peer to close. Closing with bytes unread would reset the
/// connection, and the peer could lose what it has not read yet.
fn finish(socket: &Socket, last: &Frame) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_timeout(LINGER)?;
    last.write(&mut &*socket)?;
    socket.shutdown_write()?;
    let (end, mut chunk) = (Instant::now() + LINGER, [0; 4096]);
    let mut reader = socket;
    while reader.read(&mut chunk)? > 0 && Instant::now() < end {}
    Ok(())
}

struct Session<'a> {
    socket: &'a Socket,
    program: Program,
    /// Bytes from the monitor that are no whole frame yet.
    inbox: Vec<u8>,
    /// Frames for the monitor.
    outbox: Vec<u8>,
    /// Bytes for the program's standard input, and how many of them it has taken.
    input: Vec<u8>,
    input_taken: usize,
    /// The program's code, and how much output may still follow.
    ended: Option<(u8, usize)>,
}

/// What poll has found.
#[derive(Default)]
struct Ready {
    socket: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
    ended: bool,
}

impl<'a> Session<'a> {
    fn new(socket: &'a Socket, rest: Vec<u8>, program: Program) -> Session<'a> {
        let (outbox, input) = (Vec::new(), Vec::new());
        Session { socket, program, inbox: rest, outbox, input, input_taken: 0, ended: None }
    }

    /// Carries until the program has ended and all of its output is out; its last frame.
    fn carry(mut self) -> io::Result<Frame> {
        loop {
            self.take_frames()?;
            let ready = self.wait()?;
            if ready.stdin {
                self.feed();
            }
            if ready.socket {
                self.receive()?;
            }
            let mut output = false;
            if ready.stdout {
                output |= self.collect(false)?;
            }
            if ready.stderr {
                output |= self.collect(true)?;
            }
            if ready.ended {
                self.ended = Some((self.program.process.wait()?, DRAIN));
            }
            self.send()?;
            if let Some((code, left)) = self.ended
                && self.outbox.is_empty()
                && !ready.ended
                && (!output || left == 0)
            {
                return Ok(Frame::Exit(code));
            }
        }
    }

    /// Sleeps until something can be done; once the program has ended, only looks.
    fn wait(&self) -> io::Result<Ready> {
        let (fits, hungry) = (self.outbox.len() < OUTBOX, self.input.is_empty());
        let mut poll = Poll::default();
        let read = if hungry { READ } else { 0 };
        let write = if self.outbox.is_empty() { 0 } else { WRITE };
        let socket = poll.add(self.socket, read | write | PEER_ENDED);
        // What is not waited for is left out: poll would report its end again and again.
        let stdin = self.program.stdin.as_ref().filter(|_| !hungry).map(|fd| poll.add(fd, WRITE));
        let stdout = self.program.stdout.as_ref().filter(|_| fits).map(|fd| poll.add(fd, READ));
        let stderr = self.program.stderr.as_ref().filter(|_| fits).map(|fd| poll.add(fd, READ));
        let running = self.ended.is_none().then(|| poll.add(&self.program.process, READ));
        let look = self.ended.is_some() && self.outbox.is_empty();
        poll.wait(look.then_some(Duration::ZERO))?;

        let flags = poll.found(socket);
        if flags & (PEER_ENDED | GONE) != 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let any = |at: Option<usize>| at.is_some_and(|at| poll.found(at) != 0);
        let socket = flags & READ != 0;
        Ok(Ready { socket, stdin: any(stdin), stdout: any(stdout), stderr: any(stderr), ended: any(running) })
    }

    /// Reads what the monitor has sent.
    fn receive(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        let mut socket = self.socket;
        match socket.read(&mut chunk) {
            Ok(0) => Err(io::ErrorKind::ConnectionReset.into()),
            Ok(n) => {
                self.inbox.extend_from_slice(&chunk[..n]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Acts on the whole frames in the inbox, as long as the program takes its input.
    fn take_frames(&mut self) -> io::Result<()> {
        while self.input.is_empty() && self.inbox.len() >= 5 {
            let length = u32::from_le_bytes([self.inbox[1], self.inbox[2], self.inbox[3], self.inbox[4]]) as usize;
            if length <= MAX_FRAME && self.inbox.len() < 5 + length {
                return Ok(());
            }
            // A frame that is too long is refused here.
            let mut reader = self.inbox.as_slice();
            let frame = Frame::read(&mut reader)?;
            let taken = self.inbox.len() - reader.len();
            self.inbox.drain(..taken);
            match frame {
                Some(Frame::Stdin(bytes)) if bytes.is_empty() => self.end_input(),
                Some(Frame::Stdin(bytes)) if self.program.stdin.is_some() => self.input = bytes,
                // The program has closed its input.
                Some(Frame::Stdin(_)) => {}
                Some(Frame::Resize(rows, cols)) => self.program.resize((rows, cols)),
                Some(Frame::Signal(number)) => self.program.process.signal(number),
                _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame of the guest's own kind")),
            }
        }
        Ok(())
    }

    fn end_input(&mut self) {
        if self.program.has_terminal() {
            // Closing one of a terminal's descriptors means nothing to the program; this character does.
            self.input = vec![4];
        } else {
            self.program.stdin = None;
        }
    }

    /// Gives the program what it will take. A program that has closed its input loses the rest, as in a pipe.
    fn feed(&mut self) {
        let Some(stdin) = &mut self.program.stdin else { return self.input.clear() };
        match stdin.write(&self.input[self.input_taken..]) {
            Ok(n) => self.input_taken += n,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => {
                self.program.stdin = None;
                self.input_taken = self.input.len();
            }
        }
        if self.input_taken == self.input.len() {
            (self.input, self.input_taken) = (Vec::new(), 0);
        }
    }

    /// Turns output into a frame; false when there was none.
    fn collect(&mut self, stderr: bool) -> io::Result<bool> {
        let stream = if stderr { &mut self.program.stderr } else { &mut self.program.stdout };
        let Some(file) = stream else { return Ok(false) };
        let mut chunk = [0; CHUNK];
        match file.read(&mut chunk) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            // A terminal without a user reads as EIO.
            Ok(0) | Err(_) => {
                *stream = None;
                Ok(false)
            }
            Ok(n) => {
                if let Some((_, left)) = &mut self.ended {
                    *left = left.saturating_sub(n);
                }
                let bytes = chunk[..n].to_vec();
                let frame = if stderr { Frame::Stderr(bytes) } else { Frame::Stdout(bytes) };
                frame.write(&mut self.outbox)?;
                Ok(true)
            }
        }
    }

    /// Sends what the monitor will take.
    fn send(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            let mut socket = self.socket;
            match socket.write(&self.outbox) {
                Ok(n) => drop(self.outbox.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
