//! A stream in frames of one size, which several threads compress or decompress, in order.
//!
//! Frame `n` is worker `n % count`'s, and is taken from there when its turn comes: so the order is kept without
//! sorting, and each worker has no more than three frames in hand. A thread that meets an end or an error goes away,
//! its channels close, and that ends its neighbours.

use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe;

use crate::sys::process;

/// Bytes of content in every frame but the last.
pub const FRAME: usize = 4 << 20;
/// What a skippable frame begins with, and the length of what is in ours (RFC 8878, section 3.1.2; the layout of
/// zstd's `pzstd`).
const SKIPPABLE: [u8; 8] = [0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0];
/// The length of a whole skippable frame.
const SKIP: usize = 12;
pub(super) const LEVEL: i32 = 3;
/// How long to wait before looking whether the user has had enough.
const PATIENCE: Duration = Duration::from_millis(100);

/// A frame, or why there is none.
type Job = io::Result<Vec<u8>>;
/// The ways to each worker, and from each.
type Ways = (Vec<SyncSender<Job>>, Vec<Receiver<Job>>);

/// Starts the workers; gives the ways to each and from each.
fn workers<W>(count: usize, worker: impl Fn() -> io::Result<W>) -> io::Result<Ways>
where
    W: FnMut(Vec<u8>) -> Job + Send + 'static,
{
    let (mut to, mut from) = (Vec::new(), Vec::new());
    for _ in 0..count.max(1) {
        let ((give, jobs), (done, take)) = (sync_channel::<Job>(1), sync_channel::<Job>(1));
        let mut work = worker()?;
        thread::Builder::new().name("frames".into()).spawn(move || {
            for job in jobs {
                if done.send(job.and_then(&mut work)).is_err() {
                    break;
                }
            }
        })?;
        to.push(give);
        from.push(take);
    }
    Ok((to, from))
}

/// Writes a stream in frames.
pub struct FrameWriter<W> {
    piece: Vec<u8>,
    next: usize,
    to: Vec<SyncSender<Job>>,
    collector: Option<JoinHandle<io::Result<(W, u64)>>>,
}

impl<W: Write + Send + 'static> FrameWriter<W> {
    /// Writes to `out`, compressing on so many threads.
    pub fn new(out: W, threads: usize) -> io::Result<FrameWriter<W>> {
        let (to, from) = workers(threads, || {
            let mut compressor = Compressor::new(LEVEL)?;
            compressor.set_parameter(zstd_safe::CParameter::ChecksumFlag(true))?;
            Ok(move |piece: Vec<u8>| compressor.compress(&piece))
        })?;
        let collector = thread::Builder::new().name("archive".into()).spawn(move || collect(out, &from))?;
        Ok(FrameWriter { piece: Vec::with_capacity(FRAME), next: 0, to, collector: Some(collector) })
    }

    /// Writes what is left. Gives what was written to, and how many bytes that were.
    pub fn finish(mut self) -> io::Result<(W, u64)> {
        if !self.piece.is_empty() {
            self.send()?;
        }
        self.end()
    }

    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(FRAME));
        let worker = self.next % self.to.len().max(1);
        self.next += 1;
        match self.to.get(worker).map(|to| to.send(Ok(piece))) {
            Some(Ok(())) => Ok(()),
            // Whoever writes went away, and knows why.
            _ => self.end().map(drop).and(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn end(&mut self) -> io::Result<(W, u64)> {
        self.to.clear();
        let gone = || io::Error::other("the writing thread is gone");
        self.collector.take().ok_or_else(gone)?.join().map_err(|_| gone())?
    }
}

impl<W: Write + Send + 'static> Write for FrameWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(FRAME - self.piece.len());
        self.piece.extend_from_slice(&bytes[..count]);
        if self.piece.len() == FRAME {
            self.send()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes frames as they are ready.
fn collect<W: Write>(mut out: W, from: &[Receiver<Job>]) -> io::Result<(W, u64)> {
    let mut written = 0;
    for worker in from.iter().cycle() {
        let Ok(frame) = worker.recv() else { break };
        let frame = frame?;
        out.write_all(&SKIPPABLE)?;
        out.write_all(&(frame.len() as u32).to_le_bytes())?;
        out.write_all(&frame)?;
        written += (SKIP + frame.len()) as u64;
    }
    out.flush()?;
    Ok((out, written))
}

/// Reads a stream in frames. What is not as [`FrameWriter`] writes it is `InvalidData`.
pub struct FrameReader {
    from: Vec<Receiver<Job>>,
    next: usize,
    frame: Vec<u8>,
    at: usize,
    /// A frame was shorter than the others, and so must be the last.
    last: bool,
}

impl FrameReader {
    /// Reads from `input`, decompressing on so many threads.
    pub fn new(input: impl Read + Send + 'static, threads: usize) -> io::Result<FrameReader> {
        let (to, from) = workers(threads, || {
            let mut decompressor = Decompressor::new()?;
            Ok(move |frame: Vec<u8>| decompress(&mut decompressor, &frame))
        })?;
        thread::Builder::new().name("archive".into()).spawn(move || split(input, &to))?;
        Ok(FrameReader { from, next: 0, frame: Vec::new(), at: 0, last: false })
    }

    /// Waits for the next frame; whether there is one.
    fn next(&mut self) -> io::Result<bool> {
        let worker = self.next % self.from.len().max(1);
        self.next += 1;
        let frame = loop {
            match self.from.get(worker).map(|from| from.recv_timeout(PATIENCE)) {
                Some(Ok(frame)) => break frame?,
                Some(Err(RecvTimeoutError::Timeout)) if process::interrupted() => {
                    return Err(io::Error::other(Stopped));
                }
                Some(Err(RecvTimeoutError::Timeout)) => {}
                Some(Err(RecvTimeoutError::Disconnected)) | None => return Ok(false),
            }
        };
        if self.last {
            return Err(strange("a frame in its middle is shorter than the others"));
        }
        self.last = frame.len() < FRAME;
        (self.frame, self.at) = (frame, 0);
        Ok(true)
    }
}

/// The user has had enough. (`ErrorKind::Interrupted` would make readers try again.)
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Stopped;

impl Read for FrameReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == self.frame.len() && !self.next()? {
            return Ok(0);
        }
        let count = into.len().min(self.frame.len() - self.at);
        into[..count].copy_from_slice(&self.frame[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// Hands out frames to the workers until the end. An error goes where the next frame would.
fn split(mut input: impl Read, to: &[SyncSender<Job>]) {
    for worker in to.iter().cycle() {
        let frame = match read_frame(&mut input) {
            Ok(None) => break,
            Ok(Some(frame)) => Ok(frame),
            Err(error) => Err(error),
        };
        let ends = frame.is_err();
        if worker.send(frame).is_err() || ends {
            break;
        }
    }
}

/// The next frame as it is, or none at the end.
fn read_frame(input: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::with_capacity(SKIP);
    input.take(SKIP as u64).read_to_end(&mut head)?;
    if head.is_empty() {
        return Ok(None);
    }
    let known = SKIPPABLE.len().min(head.len());
    if !head.starts_with(&SKIPPABLE[..known]) {
        return Err(strange("it is not an archive of Catnap's, or something strange follows it"));
    }
    let Some(size) = head.last_chunk().filter(|_| head.len() == SKIP) else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let size = u32::from_le_bytes(*size) as usize;
    if size > zstd_safe::compress_bound(FRAME) {
        return Err(strange("a frame is too long"));
    }
    let mut frame = Vec::new();
    match input.take(size as u64).read_to_end(&mut frame)? {
        read if read < size => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(Some(frame)),
    }
}

/// Decompresses exactly one frame of up to [`FRAME`] bytes of content, which says how much is in it before anything is allocated for that.
pub(super) fn decompress(decompressor: &mut Decompressor<'_>, frame: &[u8]) -> Job {
    let size = zstd_safe::get_frame_content_size(frame).ok().flatten();
    let size = size.and_then(|size| usize::try_from(size).ok()).filter(|size| (1..=FRAME).contains(size));
    let size = size.ok_or_else(|| strange("a frame does not say its length, or a wrong one"))?;
    if zstd_safe::find_frame_compressed_size(frame) != Ok(frame.len()) {
        return Err(strange("a frame is damaged"));
    }
    match decompressor.decompress(frame, size) {
        Ok(content) if content.len() == size => Ok(content),
        _ => Err(strange("a frame is damaged")),
    }
}

fn strange(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(content: &[u8], threads: usize) -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new(), threads).unwrap();
        writer.write_all(content).unwrap();
        let (out, length) = writer.finish().unwrap();
        assert_eq!(out.len() as u64, length);
        out
    }

    fn read(bytes: Vec<u8>, threads: usize) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        FrameReader::new(io::Cursor::new(bytes), threads)?.read_to_end(&mut content).map(|_| content)
    }

    #[test]
    fn what_is_written_is_read_whoever_does_it() {
        let content: Vec<u8> = (0..FRAME * 2 + 77).map(|n| (n / 1000) as u8).collect();
        for length in [0, 1, FRAME - 1, FRAME, FRAME + 1, content.len()] {
            let one = written(&content[..length], 1);
            assert!(written(&content[..length], 3) == one, "the threads cannot be told by what they wrote");
            assert!(read(one.clone(), 1).unwrap() == content[..length]);
            assert!(read(one.clone(), 5).unwrap() == content[..length]);
            // Nothing at all is no frame.
            assert!(length == 0 || zstd::decode_all(&one[..]).unwrap() == content[..length], "zstd reads it too");
        }
    }

    #[test]
    fn what_is_strange_is_refused() {
        let whole = written(&[7; 1000], 2);
        let refuse = |bytes: Vec<u8>| read(bytes, 2).unwrap_err().kind();
        for cut in (1..whole.len()).step_by(3) {
            assert_eq!(refuse(whole[..cut].to_vec()), io::ErrorKind::UnexpectedEof, "{cut}");
        }
        assert_eq!(refuse([&whole[..], &whole[..]].concat()), io::ErrorKind::InvalidData, "a short one in the middle");
        assert_eq!(refuse([&whole[..], b"x"].concat()), io::ErrorKind::InvalidData);
        assert_eq!(refuse(b"PK\x03\x04".to_vec()), io::ErrorKind::InvalidData);
        let framed = |frame: &[u8]| [&SKIPPABLE[..], &(frame.len() as u32).to_le_bytes(), frame].concat();
        // Frames that say nothing of their length, or of which there are two, and one that grows a lot.
        let two = [&whole[SKIP..], &whole[SKIP..]].concat();
        for frame in [zstd::encode_all(&b"x"[..], 3).unwrap(), two, Vec::new(), vec![0; 100]] {
            assert_eq!(refuse(framed(&frame)), io::ErrorKind::InvalidData, "{} bytes", frame.len());
        }
        let bomb = zstd::bulk::compress(&vec![0; FRAME + 1], 3).unwrap();
        assert!(bomb.len() < 1000);
        assert_eq!(refuse(framed(&bomb)), io::ErrorKind::InvalidData);
        assert_eq!(refuse([&SKIPPABLE[..], &[0xff; 4]].concat()), io::ErrorKind::InvalidData);
    }

    #[test]
    fn whoever_cannot_write_says_why_and_nobody_waits() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut writer = FrameWriter::new(Full, 2).unwrap();
        let failed = (0..20).find_map(|_| writer.write_all(&vec![1; FRAME]).err()).unwrap();
        assert_eq!(failed.kind(), io::ErrorKind::StorageFull);
        let mut writer = FrameWriter::new(Full, 2).unwrap();
        writer.write_all(b"x").unwrap();
        assert_eq!(writer.finish().err().unwrap().kind(), io::ErrorKind::StorageFull);
        // A reader that goes away early leaves nobody blocked for ever.
        drop(FrameReader::new(io::Cursor::new(written(&vec![1; FRAME * 4], 2)), 2).unwrap());
    }
}
