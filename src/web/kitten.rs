//! A machine's own page, asked for over the forwarded port: a client as small as can be, for answers that are short.
//! What answers is a guest, which may be anything.

use std::net::Ipv4Addr;
use std::time::Duration;

use axum::body::Bytes;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The longest answer, with its head, in bytes.
const LONGEST: u64 = 1 << 20;
/// The longest answer to a look at its figures.
const LONGEST_FIGURES: u64 = 16 << 10;

/// What is asked of a page.
pub struct Ask<'a> {
    /// `GET`, `HEAD` or `POST`.
    pub method: &'a str,
    /// From the slash on, with the query.
    pub path: &'a str,
    /// What the body is.
    pub content_type: Option<&'a str>,
    /// The body.
    pub body: &'a [u8],
}

/// What it answers.
pub struct Answer {
    /// The status.
    pub status: u16,
    /// What the body is.
    pub content_type: Option<String>,
    /// Where to look next.
    pub location: Option<String>,
    /// The body.
    pub body: Bytes,
}

/// The figures of a kitten page, as far as they are shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// Half-seconds that it has been awake.
    pub ticks: u64,
    /// Visits of the page.
    pub visits: u64,
    /// What was answered, the page and everything else that takes work.
    pub answered: Option<u64>,
    /// How often it was woken.
    pub generation: u64,
    /// Entries of the guest book.
    pub guestbook_entries: Option<u64>,
    /// What the guest sees of itself.
    pub cpus: u32,
    pub memory_bytes: u64,
}

/// A page's figures, if it has some and gives them in time.
pub async fn figures(port: u16, time: Duration) -> Option<Figures> {
    let ask = Ask { method: "GET", path: "/api/status", content_type: None, body: b"" };
    let answer = answer_of(port, &ask, LONGEST_FIGURES, time).await.ok()?;
    serde_json::from_slice(&answer.body).ok().filter(|_| answer.status == 200)
}

/// Asks a page.
pub async fn answer(port: u16, ask: &Ask<'_>, time: Duration) -> Result<Answer, String> {
    answer_of(port, ask, LONGEST, time).await
}

async fn answer_of(port: u16, ask: &Ask<'_>, limit: u64, time: Duration) -> Result<Answer, String> {
    match tokio::time::timeout(time, exchange(port, ask, limit)).await {
        Ok(Ok(bytes)) => parse(bytes, limit),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("it does not answer".into()),
    }
}

/// HTTP/1.0, so that the answer ends with the connection and comes in one piece.
async fn exchange(port: u16, ask: &Ask<'_>, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let kind = ask.content_type.map_or(String::new(), |kind| format!("Content-Type: {kind}\r\n"));
    let (method, path, length) = (ask.method, ask.path, ask.body.len());
    let head = format!("{method} {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n{kind}Content-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(ask.body).await?;
    let mut bytes = Vec::new();
    stream.take(limit + 1).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

fn parse(bytes: Vec<u8>, limit: u64) -> Result<Answer, String> {
    if bytes.len() as u64 > limit {
        return Err(format!("its answer is longer than {limit} bytes"));
    }
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut headers);
    let length = match head.parse(&bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        _ => return Err("what answers is no web server".into()),
    };
    let header = |name: &str| {
        let found = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(found.value).ok().map(str::to_owned)
    };
    if header("transfer-encoding").is_some() {
        return Err("its answer is in chunks, which nobody asked for".into());
    }
    let (status, content_type, location) = (head.code.unwrap_or(0), header("content-type"), header("location"));
    Ok(Answer { status, content_type, location, body: Bytes::from(bytes).slice(length..) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_what_is_none_is_said() {
        let parse = |text: &str| parse(text.into(), 200).map(|a| (a.status, a.content_type, a.body.to_vec()));
        let page = parse("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<svg>").unwrap();
        assert_eq!(page, (200, Some("text/html".into()), b"<svg>".to_vec()));
        assert_eq!(parse("HTTP/1.0 404 Not\r\n\r\n").unwrap(), (404, None, Vec::new()));
        for bad in ["", "meow", "HTTP/1.1 200 OK\r\nContent", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse(&format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(200))).is_err());
    }

    #[test]
    fn figures_of_an_older_guest_are_figures_too() {
        let figures: Figures = serde_json::from_str(r#"{"ticks": 7, "visits": 2, "hostname": "anna"}"#).unwrap();
        assert_eq!((figures.ticks, figures.visits, figures.answered), (7, 2, None));
    }
}
