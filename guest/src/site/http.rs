//! HTTP/1.1, as much as a small site needs: bytes to requests and responses to bytes (RFC 9112).

use std::borrow::Cow;
use std::fmt::Write;

use super::date;
use crate::facts;

/// The longest request line with its headers, in bytes.
pub(super) const MAX_HEAD: usize = 16 << 10;
/// The longest body, in bytes.
pub(super) const MAX_BODY: usize = 64 << 10;
const MAX_HEADERS: usize = 64;

/// A request, whole.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    pub method: String,
    pub path: String,
    pub query: String,
    pub content_type: String,
    pub body: Vec<u8>,
    /// The browser says that another site's page sent it.
    pub cross_site: bool,
    pub keep_alive: bool,
}

/// What a connection's bytes amount to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// More must come. When `expecting`, the client waits for `100 Continue` before it sends the body.
    Partial { expecting: bool },
    /// A request, and how many bytes it was.
    Whole(Box<Request>, usize),
    /// Not one that we take: the status to answer with, and then to close.
    Refused(u16),
}

/// Looks for a request at the beginning of `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length <= MAX_HEAD => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Parsed::Partial { expecting: false },
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return Parsed::Refused(431),
        Err(_) => return Parsed::Refused(400),
    };
    // Browsers keep what follows a `#` to themselves; other clients may not.
    let target = head.path.unwrap_or("/").split('#').next().unwrap_or("/");
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut request = Request {
        method: head.method.unwrap_or_default().into(),
        path: path.into(),
        query: query.into(),
        keep_alive: head.version == Some(1),
        ..Request::default()
    };
    let (mut body, mut expecting) = (None, false);
    for header in head.headers.iter() {
        let Ok(value) = std::str::from_utf8(header.value) else { continue };
        let value = value.trim();
        let has = |token: &str| value.split(',').any(|word| word.trim().eq_ignore_ascii_case(token));
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => match value.parse::<usize>() {
                // Two lengths that differ are how requests are smuggled past somebody.
                Ok(length) if body.is_none_or(|other| other == length) && !value.starts_with('+') => {
                    body = Some(length)
                }
                _ => return Parsed::Refused(400),
            },
            "transfer-encoding" => return Parsed::Refused(501),
            "connection" if has("close") => request.keep_alive = false,
            "connection" if has("keep-alive") => request.keep_alive = true,
            "content-type" => request.content_type = value.to_ascii_lowercase(),
            "expect" => expecting = has("100-continue"),
            "sec-fetch-site" => request.cross_site = value == "cross-site",
            _ => {}
        }
    }
    let body = body.unwrap_or(0);
    if body > MAX_BODY {
        return Parsed::Refused(413);
    }
    match bytes.get(length..length + body) {
        Some(bytes) => {
            request.body = bytes.to_vec();
            Parsed::Whole(Box::new(request), length + body)
        }
        None => Parsed::Partial { expecting: expecting && bytes.len() == length },
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Response {
    pub status: u16,
    pub kind: &'static str,
    pub body: Cow<'static, [u8]>,
    /// Headers beside those that every answer has.
    pub extra: Vec<(&'static str, String)>,
}

pub(super) const HTML: &str = "text/html; charset=utf-8";
pub(super) const JSON: &str = "application/json";
pub(super) const TEXT: &str = "text/plain; charset=utf-8";

/// Nothing from elsewhere, no inline scripts. The dashboard on the host's loopback may show the page in a frame.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; \
    form-action 'self'; base-uri 'none'; frame-ancestors 'self' http://127.0.0.1:* http://localhost:*";

impl Response {
    pub(super) fn new(status: u16, kind: &'static str, body: impl Into<Cow<'static, [u8]>>) -> Response {
        Response { status, kind, body: body.into(), extra: Vec::new() }
    }

    /// A line of text under a status.
    pub(super) fn text(status: u16, text: impl Into<String>) -> Response {
        Response::new(status, TEXT, (text.into() + "\n").into_bytes())
    }

    /// The same with one more header.
    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Response {
        self.extra.push((name, value.into()));
        self
    }

    /// The bytes to send; without the body when that was asked for (HEAD).
    pub(super) fn bytes(&self, keep_alive: bool, head_only: bool) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        let date = date::http((facts::realtime_ns() / 1_000_000_000) as i64);
        let connection = if keep_alive { "keep-alive" } else { "close" };
        // Writing to a string cannot fail.
        let _ = write!(head, "Date: {date}\r\nContent-Type: {}\r\nContent-Length: {}\r\n", self.kind, self.body.len());
        let _ = write!(head, "Connection: {connection}\r\nContent-Security-Policy: {POLICY}\r\n");
        head += "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n";
        if !self.extra.iter().any(|(name, _)| *name == "Cache-Control") {
            head += "Cache-Control: no-store\r\n";
        }
        for (name, value) in &self.extra {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        head += "\r\n";
        let mut bytes = head.into_bytes();
        if !head_only {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        303 => "See Other",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        507 => "Insufficient Storage",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(text: &str) -> (Request, usize) {
        match parse(text.as_bytes()) {
            Parsed::Whole(request, length) => (*request, length),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_are_taken_one_by_one() {
        let text = "POST /a?b=c HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Type: Text/Plain\r\n\r\nmeowGET / HTTP/1.0\r\n\r\n";
        let (first, length) = whole(text);
        assert_eq!((first.method.as_str(), first.path.as_str(), first.query.as_str()), ("POST", "/a", "b=c"));
        assert_eq!((first.body.as_slice(), first.content_type.as_str()), (&b"meow"[..], "text/plain"));
        assert!(first.keep_alive);
        let (second, _) = whole(&text[length..]);
        assert!(second.path == "/" && !second.keep_alive);
        assert!(!whole("GET / HTTP/1.1\r\nConnection: foo, Close\r\n\r\n").0.keep_alive);
        for cut in 0..length {
            assert!(matches!(parse(&text.as_bytes()[..cut]), Parsed::Partial { .. }), "{cut}");
        }
    }

    #[test]
    fn what_is_too_long_or_ambiguous_is_refused() {
        let refused = |text: &str| match parse(text.as_bytes()) {
            Parsed::Refused(status) => status,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_HEAD))), 431);
        assert_eq!(refused(&format!("GET /{}", "x".repeat(MAX_HEAD))), 431);
        assert_eq!(refused(&format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1))), 431);
        assert_eq!(refused("GET / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n"), 413);
        assert_eq!(refused("GET / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n"), 400);
        for length in ["-1", "+1", "1, 1", "0x1", ""] {
            assert_eq!(refused(&format!("GET / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n")), 400, "{length}");
        }
        assert_eq!(refused("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"), 400);
        assert_eq!(refused("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 501);
        assert_eq!(refused("nonsense\r\n\r\n"), 400);
        assert_eq!(refused("\x16\x03\x01\x02"), 400);
    }

    #[test]
    fn a_client_that_waits_is_told_to_go_on() {
        let head = "POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(parse(head.as_bytes()), Parsed::Partial { expecting: true });
        assert_eq!(parse(format!("{head}a").as_bytes()), Parsed::Partial { expecting: false });
    }
}
