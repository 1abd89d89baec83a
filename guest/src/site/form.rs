//! What visitors send: forms, queries and JSON.

use serde::Deserialize;

use super::book::Place;
use super::http::Request;

/// A new entry for the guest book.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct NewEntry {
    pub name: String,
    pub message: String,
    /// Where to ring the doorbell on the way; only JSON has it.
    #[serde(default)]
    pub ring: Option<Place>,
}

/// How an entry was sent, and so how it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    Form,
    Json,
}

/// Reads an entry from a body; on failure the status to answer with.
pub(super) fn entry(request: &Request) -> Result<(NewEntry, Sent), u16> {
    match request.content_type.split(';').next().unwrap_or_default().trim() {
        "application/json" => serde_json::from_slice(&request.body).map(|entry| (entry, Sent::Json)).map_err(|_| 400),
        "application/x-www-form-urlencoded" => {
            let text = std::str::from_utf8(&request.body).map_err(|_| 400u16)?;
            let field = |name| value(text, name).unwrap_or_default();
            Ok((NewEntry { name: field("name"), message: field("message"), ring: None }, Sent::Form))
        }
        _ => Err(415),
    }
}

/// The first value of `name` in `a=b&c=d`, decoded.
pub(super) fn value(text: &str, name: &str) -> Option<String> {
    let pairs = text.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.into_iter().find(|(key, _)| decode(key) == name).map(|(_, value)| decode(value))
}

/// Undoes `%41` and `+`. A `%` that begins nothing stays; what is no UTF-8 is replaced.
fn decode(text: &str) -> String {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| (*byte as char).to_digit(16)).map(|digit| digit as u8);
    let bytes = text.as_bytes();
    let (mut decoded, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        at += 1;
        match (byte, digit(bytes.get(at)), digit(bytes.get(at + 1))) {
            (b'%', Some(high), Some(low)) => {
                decoded.push(high << 4 | low);
                at += 2;
            }
            (b'+', _, _) => decoded.push(b' '),
            _ => decoded.push(*byte),
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_decoded_whatever_they_hold() {
        assert_eq!(value("a=1&name=K%C3%A4tzchen+%26+co&name=2", "name").unwrap(), "Kätzchen & co");
        assert_eq!(value("na%6De=x", "name").unwrap(), "x");
        assert_eq!(value("name", "name").unwrap(), "");
        assert_eq!(value("name=100%&x", "name").unwrap(), "100%");
        assert_eq!(value("name=%zz%4", "name").unwrap(), "%zz%4");
        assert_eq!(value("name=%ff", "name").unwrap(), "\u{fffd}");
        assert_eq!(value("", "name"), None);
    }

    #[test]
    fn an_entry_comes_as_a_form_or_as_json() {
        let request = |kind: &str, body: &str| Request {
            content_type: kind.into(),
            body: body.as_bytes().to_vec(),
            ..Request::default()
        };
        let anna = || NewEntry { name: "Anna".into(), message: "purr".into(), ring: None };
        let form = request("application/x-www-form-urlencoded; charset=utf-8", "name=Anna&message=purr");
        assert_eq!(entry(&form), Ok((anna(), Sent::Form)));
        let json = request("application/json", r#"{"name":"Anna","message":"purr"}"#);
        assert_eq!(entry(&json), Ok((anna(), Sent::Json)));
        let ring = request("application/json", r#"{"name":"Anna","message":"purr","ring":"before-commit"}"#);
        assert_eq!(entry(&ring), Ok((NewEntry { ring: Some(Place::BeforeCommit), ..anna() }, Sent::Json)));
        let nowhere = request("application/json", r#"{"name":"Anna","message":"purr","ring":"at-home"}"#);
        assert_eq!(entry(&nowhere), Err(400));
        assert_eq!(entry(&request("application/json", "{")), Err(400));
        assert_eq!(entry(&request("multipart/form-data", "")), Err(415));
    }
}
