//! Stream sockets, of TCP and of vsock alike: to the agent they are the same thing.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, SockaddrIn, VsockAddr, sockopt,
};
use nix::sys::time::TimeVal;

/// Where to listen or to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// An address and port of TCP.
    Tcp(SocketAddr),
    /// A context and port of vsock.
    Vsock(u32, u32),
}

/// A connected stream socket.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Connects and waits for it.
    pub fn connect(to: Address) -> io::Result<Socket> {
        match to {
            Address::Tcp(address) => Ok(Socket(TcpStream::connect(address)?.into())),
            Address::Vsock(cid, port) => {
                let fd = socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
                socket::connect(fd.as_raw_fd(), &VsockAddr::new(cid, port))?;
                Ok(Socket(fd))
            }
        }
    }

    /// Begins to connect to a TCP port; the socket becomes writable when that has succeeded or failed, and
    /// [`Socket::error`] then says which.
    pub fn begin_connect(to: SocketAddrV4) -> io::Result<Socket> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket::socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        match socket::connect(fd.as_raw_fd(), &SockaddrIn::from(to)) {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(Socket(fd)),
            Err(error) => Err(error.into()),
        }
    }

    /// A pair of sockets joined to each other.
    pub fn pair() -> io::Result<(Socket, Socket)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (a, b) = socket::socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
        Ok((Socket(a), Socket(b)))
    }

    /// Whether reads and writes return `WouldBlock` in place of waiting.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let mut flags = OFlag::from_bits_retain(fcntl(&self.0, FcntlArg::F_GETFL)?);
        flags.set(OFlag::O_NONBLOCK, on);
        fcntl(&self.0, FcntlArg::F_SETFL(flags))?;
        Ok(())
    }

    /// The longest that one blocking read or write waits.
    pub fn set_timeout(&self, time: Duration) -> io::Result<()> {
        let time = TimeVal::new(time.as_secs() as i64, time.subsec_micros().into());
        socket::setsockopt(&self.0, sockopt::ReceiveTimeout, &time)?;
        Ok(socket::setsockopt(&self.0, sockopt::SendTimeout, &time)?)
    }

    /// Small writes go out at once. Only TCP knows this; elsewhere it is nothing.
    pub fn set_nodelay(&self) {
        let _ = socket::setsockopt(&self.0, sockopt::TcpNoDelay, &true);
    }

    /// Tells the peer that nothing more comes.
    pub fn shutdown_write(&self) -> io::Result<()> {
        Ok(socket::shutdown(self.0.as_raw_fd(), Shutdown::Write)?)
    }

    /// The error that the kernel keeps for the socket, taken away by asking.
    pub fn error(&self) -> io::Result<()> {
        match socket::getsockopt(&self.0, sockopt::SocketError)? {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }

    /// Closes so that the peer sees a reset, not an end.
    pub fn reset(self) {
        let now = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        let _ = socket::setsockopt(&self.0, sockopt::Linger, &now);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Socket {
        Socket(stream.into())
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(socket::recv(self.0.as_raw_fd(), buffer, MsgFlags::empty())?)
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(socket::send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket that takes connections. It never blocks.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Connections that the kernel holds until they are accepted.
    const BACKLOG: i32 = 4096;

    /// Takes connections at `address`.
    pub fn bind(address: Address) -> io::Result<Listener> {
        let fd = match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                OwnedFd::from(listener)
            }
            Address::Vsock(cid, port) => {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                let fd = socket::socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
                socket::bind(fd.as_raw_fd(), &VsockAddr::new(cid, port))?;
                fd
            }
        };
        socket::listen(&fd, Backlog::new(Self::BACKLOG)?)?;
        Ok(Listener(fd))
    }

    /// The TCP port that was given out, when 0 was asked for.
    pub fn port(&self) -> io::Result<u16> {
        Ok(socket::getsockname::<SockaddrIn>(self.0.as_raw_fd())?.port())
    }

    /// Takes one connection, itself not blocking; `None` when there is none.
    pub fn accept(&self) -> io::Result<Option<Socket>> {
        match socket::accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
            // SAFETY: accept4 has just made this descriptor and nobody else knows of it.
            Ok(fd) => Ok(Some(Socket(unsafe { OwnedFd::from_raw_fd(fd) }))),
            // A connection that broke before it was taken is as good as none; level-triggered epoll calls again.
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
