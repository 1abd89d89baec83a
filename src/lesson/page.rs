//! As much of HTTP as it takes to ask a machine's page.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// The longest answer, in bytes.
const MAX_ANSWER: u64 = 1 << 20;
const MAX_FIELDS: usize = 64;

/// An answer: its status, and its body.
pub struct Answer {
    /// Such as 200.
    pub status: u16,
    /// As it came.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body, of an answer that is well.
    pub fn json(&self) -> io::Result<Value> {
        match self.status {
            200..300 => serde_json::from_slice(&self.body).map_err(io::Error::from),
            status => Err(io::Error::other(format!("the answer is {status}"))),
        }
    }
}

/// Fetches something.
pub fn get(port: u16, path: &str, patience: Duration) -> io::Result<Answer> {
    ask(port, &format!("GET {path} HTTP/1.1\r\nHost: kitten\r\nConnection: close\r\n\r\n"), patience)
}

/// Sends JSON.
pub fn post(port: u16, path: &str, body: &Value, patience: Duration) -> io::Result<Answer> {
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: kitten\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    ask(port, &(head + &body), patience)
}

fn ask(port: u16, request: &str, patience: Duration) -> io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut bytes)?;
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut head = httparse::Response::new(&mut fields);
    match head.parse(&bytes) {
        Ok(httparse::Status::Complete(length)) => {
            Ok(Answer { status: head.code.unwrap_or(0), body: bytes[length..].to_vec() })
        }
        Ok(httparse::Status::Partial) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
    }
}

#[cfg(test)]
pub mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// A page that gives one answer after the other, each to a connection of its own, and the requests that it got.
    pub fn serve(answers: Vec<String>) -> (u16, thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = thread::spawn(move || {
            let one = |answer: String| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
                String::from_utf8(request[..length].to_vec()).unwrap()
            };
            answers.into_iter().map(one).collect()
        });
        (port, served)
    }

    #[test]
    fn answers_are_read_and_nonsense_is_an_error() {
        let answers =
            ["HTTP/1.1 201 Made\r\n\r\n{\"id\": 7}", "HTTP/1.1 503 No\r\n\r\n{}", "HTTP/1.1 2", "hello\r\n\r\n"];
        let (port, served) = serve(answers.map(String::from).to_vec());
        let get = || get(port, "/x", Duration::from_secs(5));
        assert_eq!(get().unwrap().json().unwrap()["id"], 7);
        assert!(get().unwrap().json().unwrap_err().to_string().contains("503"));
        assert!(get().is_err() && get().is_err());
        assert!(served.join().unwrap()[0].starts_with("GET /x HTTP/1.1\r\n"));
        assert!(get().is_err(), "nobody is there");
    }
}
