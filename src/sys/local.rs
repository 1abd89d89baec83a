//! Unix sockets at paths of any length.
//!
//! A socket's address holds at most 108 bytes (unix(7)), and a class's folder may lie deep. A longer path is
//! reached through its folder's descriptor: `/proc/self/fd/N/NAME` is short and means the same file.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The longest path that fits a socket's address with its closing zero byte.
const LONGEST: usize = 107;

/// Listens at `path`. A socket that is left there is removed: the caller knows that nobody listens on it any
/// more, because it holds the machine's lock.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => with_short_path(path, |short| UnixListener::bind(short)),
    }
}

/// Connects to the socket at `path`.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    with_short_path(path, |short| UnixStream::connect(short))
}

fn with_short_path<T>(path: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if path.as_os_str().len() <= LONGEST {
        return act(path);
    }
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(folder)?;
    act(&PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_socket_works_however_deep_it_lies_and_a_dead_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        for depth in [0, 3] {
            let folder = (0..depth).fold(dir.path().to_path_buf(), |path, _| path.join("a-folder-".repeat(10)));
            fs::create_dir_all(&folder).unwrap();
            let path = folder.join("control.sock");
            drop(bind(&path).unwrap());
            assert!(connect(&path).is_err());
            let listener = bind(&path).unwrap();
            connect(&path).unwrap().write_all(b"hello").unwrap();
            let mut heard = String::new();
            listener.accept().unwrap().0.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, "hello");
        }
    }
}
