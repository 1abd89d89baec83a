//! As much of HTTP as it takes to look at the kitten.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use serde_json::Value;

use super::net::connect;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The lines before the body.
    pub head: String,
    /// The body.
    pub body: String,
}

pub fn get(port: u16, path: &str) -> Answer {
    let mut stream = connect(port);
    ask(&mut stream, path);
    answer(stream)
}

/// Sends a form, as the page does, or JSON.
pub fn post(port: u16, path: &str, body: &str) -> Answer {
    let mut stream = connect(port);
    stream.write_all(form(path, body).as_bytes()).expect("the request is sent");
    answer(stream)
}

/// Whether something was sent, and was thanked for. Nobody may be there to answer.
pub fn thanks(port: u16, path: &str, body: &str) -> bool {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { return false };
    let mut answer = String::new();
    stream.write_all(form(path, body).as_bytes()).is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.starts_with("HTTP/1.1 201 ")
}

fn form(path: &str, body: &str) -> String {
    let kind = if body.starts_with('{') { "application/json" } else { "application/x-www-form-urlencoded" };
    format!(
        "POST {path} HTTP/1.1\r\nHost: kitten\r\nConnection: close\r\n\
         Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Asks for a page, as the last request of this connection.
pub fn ask(stream: &mut TcpStream, path: &str) {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: kitten\r\nConnection: close\r\n\r\n").expect("the request is sent");
}

/// Reads the answer to the last request of a connection.
pub fn answer(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("an answer");
    let text = String::from_utf8(bytes).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a status");
    Answer { status, head: head.into(), body: body.into() }
}

impl Answer {
    /// The body, of an answer that is well.
    pub fn text(&self) -> &str {
        assert_eq!(self.status, 200, "{self:?}");
        &self.body
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(self.text()).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}
