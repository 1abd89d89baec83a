//! Threads that take little memory.

use std::thread::Builder;

/// Enough for a disk request through a chain of images, and far less than a huge page: a stack of the usual
/// 2 MiB is one huge page as soon as it is touched, and a monitor has eight threads.
const STACK: usize = 256 << 10;

/// A builder for a thread of that name, with a small stack.
pub fn small(name: &str) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}
