//! As much of HTTP/1.1 (RFC 9112) as the control protocol needs: one request and one response for each
//! connection, heads and bodies bounded, and the upgrade to a stream of bytes.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::failure::{Code, Failure};
use super::protocol::{MAX_BODY, MAX_HEAD, STREAM};

/// More headers than any client of ours or curl sends.
const MAX_HEADERS: usize = 32;

/// A request that was read whole.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `POST`.
    pub method: String,
    /// The path without its query.
    pub path: String,
    /// What follows the `?`, if anything.
    pub query: String,
    /// Whether the client asks for an upgrade to a stream.
    pub upgrade: bool,
    /// The body.
    pub body: Vec<u8>,
    /// Bytes that came after the body: the beginning of the stream.
    pub early: Vec<u8>,
}

impl Request {
    /// The value of a query's field, as it stands there: our values need no escapes.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name).map(|(_, v)| v)
    }
}

/// Why a request was not read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection failed, ended or was too slow: there is nobody to answer.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The request is refused: the HTTP status and the reason.
    #[error("{1}")]
    Refused(u16, &'static str),
}

/// Reads one request; all of it must be there within `time`.
pub fn read_request(stream: &mut UnixStream, time: Duration) -> Result<Request, Error> {
    let deadline = Instant::now() + time;
    let mut bytes = Vec::with_capacity(1024);
    let (mut request, length, body_at) = loop {
        if let Some(head) = parse_head(&bytes)? {
            break head;
        }
        if bytes.len() >= MAX_HEAD {
            return Err(Error::Refused(431, "the head of the request is too long"));
        }
        read_more(stream, &mut bytes, deadline, MAX_HEAD)?;
    };
    let end = body_at + length;
    while bytes.len() < end {
        read_more(stream, &mut bytes, deadline, end)?;
    }
    request.early = bytes.split_off(end);
    request.body = bytes.split_off(body_at);
    Ok(request)
}

/// Reads some bytes onto `bytes`, up to `limit` altogether.
fn read_more(stream: &mut UnixStream, bytes: &mut Vec<u8>, deadline: Instant, limit: usize) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    stream.set_read_timeout(Some(left))?;
    let mut piece = [0; 2048];
    let wanted = piece.len().min(limit - bytes.len());
    match stream.read(&mut piece[..wanted])? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => {
            bytes.extend_from_slice(&piece[..count]);
            Ok(())
        }
    }
}

/// The request in `bytes` with the length of its body and where that begins; `None` while the head is not whole.
fn parse_head(bytes: &[u8]) -> Result<Option<(Request, usize, usize)>, Error> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let body_at = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Error::Refused(431, "too many headers")),
        Err(_) => return Err(Error::Refused(400, "this is not HTTP/1.1")),
    };
    let (mut length, mut upgrade) = (None, false);
    for header in head.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let value = std::str::from_utf8(header.value).ok().filter(|v| v.bytes().all(|b| b.is_ascii_digit()));
            match value.and_then(|v| v.parse::<usize>().ok()) {
                Some(value) if length.is_none_or(|before| before == value) => length = Some(value),
                _ => return Err(Error::Refused(400, "the content length makes no sense")),
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Error::Refused(411, "a body needs a content length"));
        } else if header.name.eq_ignore_ascii_case("upgrade") {
            upgrade = header.value.eq_ignore_ascii_case(STREAM.as_bytes());
        }
    }
    let length = length.unwrap_or(0);
    if length > MAX_BODY {
        return Err(Error::Refused(413, "the body is too long"));
    }
    let (path, query) = head.path.unwrap_or("").split_once('?').unwrap_or((head.path.unwrap_or(""), ""));
    let request = Request {
        method: head.method.unwrap_or("").into(),
        path: path.into(),
        query: query.into(),
        upgrade,
        body: Vec::new(),
        early: Vec::new(),
    };
    Ok(Some((request, length, body_at)))
}

/// Answers with a status and JSON.
pub fn respond(stream: &mut UnixStream, status: u16, json: &[u8]) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        reason(status),
        json.len() + 1
    );
    stream.write_all(&[head.as_bytes(), json, b"\n"].concat())
}

/// Answers with a failure.
pub fn fail(stream: &mut UnixStream, failure: &Failure) -> io::Result<()> {
    let status = match failure.code {
        Code::Usage => 400,
        Code::NotFound => 404,
        Code::Refused => 409,
        Code::Host => 503,
        Code::Failed | Code::Verify => 500,
    };
    respond(stream, status, &serde_json::to_vec(failure)?)
}

/// Agrees to the upgrade: from now on the connection is a stream of bytes.
pub fn upgrade(stream: &mut UnixStream) -> io::Result<()> {
    let head = format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {STREAM}\r\n\r\n");
    stream.write_all(head.as_bytes())
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(wire: &[u8]) -> Result<Request, Error> {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.write_all(wire).unwrap();
        drop(ours);
        read_request(&mut theirs, Duration::from_secs(5))
    }

    fn refusal(wire: &[u8]) -> u16 {
        match read(wire) {
            Err(Error::Refused(status, _)) => status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_is_read_with_its_body_and_what_follows_it() {
        let request = read(
            b"POST /v1/exec?a=1&b=two HTTP/1.1\r\nHost: x\r\nUpgrade: Catnap-Stream\r\nContent-Length: 2\r\n\r\n{}early",
        )
        .unwrap();
        assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/v1/exec"));
        assert_eq!((request.field("b"), request.field("c")), (Some("two"), None));
        assert_eq!((request.body.as_slice(), request.early.as_slice()), (&b"{}"[..], &b"early"[..]));
        assert!(request.upgrade);
    }

    #[test]
    fn hostile_requests_are_refused() {
        assert_eq!(refusal(b"\x16\x03\x01 hello, I am TLS\r\n\r\n"), 400);
        assert_eq!(refusal(&[b"GET /".as_slice(), &[b'x'; MAX_HEAD]].concat()), 431);
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(refusal(many.as_bytes()), 431);
        for length in ["-1", "x", "1\r\nContent-Length: 2", "99999999999999999999999", "+5"] {
            assert_eq!(refusal(format!("GET / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n").as_bytes()), 400);
        }
        assert_eq!(refusal(b"GET / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n"), 413);
        assert_eq!(refusal(b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 411);
        for half in [&b""[..], b"GET / HT", b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nab"] {
            assert!(matches!(read(half), Err(Error::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof));
        }
    }

    #[test]
    fn a_slow_request_runs_out_of_time_however_lively_it_drips() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let start = Instant::now();
        let dripping = std::thread::spawn(move || {
            while ours.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let result = read_request(&mut theirs, Duration::from_millis(100));
        assert!(matches!(result, Err(Error::Io(_))), "{result:?}");
        assert!((100..2000).contains(&start.elapsed().as_millis()));
        drop(theirs);
        dripping.join().unwrap();
    }
}
