//! Who may come in.
//!
//! Every page in the user's browser can send requests to loopback, and a name of an attacker's can come to mean
//! 127.0.0.1 (DNS rebinding). So a request must name a loopback host, know the token, and, where the browser says
//! from where it comes, come from the dashboard's own page.

use std::io;

use axum::http::{HeaderMap, StatusCode};

use crate::snapshot::Digest;
use crate::sys::{hex, random};

/// Why a request is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It names a host that is not this one's loopback.
    Host,
    /// It comes from another page.
    Origin,
    /// It does not know the token.
    Token,
}

impl Refusal {
    /// What is said to whoever sent it: enough for an honest person, and nothing of what is here.
    pub fn text(self) -> &'static str {
        match self {
            Refusal::Host => "This page answers under 127.0.0.1 only.",
            Refusal::Origin => "This page answers to itself only, not to other pages.",
            Refusal::Token => "The address is not complete: `catnap dashboard` prints all of it.",
        }
    }

    /// The status.
    pub fn status(self) -> StatusCode {
        StatusCode::FORBIDDEN
    }
}

/// Sixteen random bytes, in hexadecimal.
pub fn secret() -> io::Result<String> {
    Ok(hex::encode(&random::bytes::<16>()?))
}

/// What opens the page of one machine and nothing else, derived from a secret: no page can tell that of another.
pub fn key_of(secret: &str, machine: &str) -> String {
    let mut key = Digest::of(format!("{secret}/{machine}").as_bytes()).hex();
    key.truncate(32);
    key
}

/// Whether two secrets are one. Takes equally long wherever they differ.
pub fn same(given: &str, secret: &str) -> bool {
    given.len() == secret.len() && given.bytes().zip(secret.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

/// Whether the request names a loopback host. The port may be any: a forwarded one leads here too.
pub fn check_host(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut hosts = headers.get_all("host").iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return Err(Refusal::Host) };
    let host = host.to_str().map_err(|_| Refusal::Host)?;
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) => name,
        Some((_, port)) if !port.ends_with(']') => return Err(Refusal::Host),
        _ => host,
    };
    let loopback = ["127.0.0.1", "localhost", "[::1]"];
    if loopback.iter().any(|known| name.eq_ignore_ascii_case(known)) { Ok(host) } else { Err(Refusal::Host) }
}

/// Whether the request comes from the dashboard's own page, or from no page: a person who typed the address, or a
/// program. `host` is what it names.
pub fn check_origin(headers: &HeaderMap, host: &str) -> Result<(), Refusal> {
    let own = format!("http://{host}");
    let foreign_origin =
        headers.get_all("origin").iter().any(|origin| !origin.as_bytes().eq_ignore_ascii_case(own.as_bytes()));
    // `same-site` is another port of loopback: a guest's page, say.
    let foreign_site =
        headers.get_all("sec-fetch-site").iter().any(|site| !matches!(site.as_bytes(), b"same-origin" | b"none"));
    if foreign_origin || foreign_site { Err(Refusal::Origin) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| {
            (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap())
        };
        let mut map = HeaderMap::new();
        for (name, value) in pairs.iter().map(pair) {
            map.append(name, value);
        }
        map
    }

    #[test]
    fn only_loopback_is_a_host_whatever_its_port() {
        for good in ["127.0.0.1", "127.0.0.1:80", "localhost:54321", "LOCALHOST", "[::1]", "[::1]:8080"] {
            assert_eq!(check_host(&headers(&[("host", good)])), Ok(good));
        }
        for bad in [
            "",
            "evil.example",
            "evil.example:80",
            "127.0.0.1.evil.example",
            "127.0.0.1:",
            "127.0.0.1:80:80",
            "127.0.0.1:8o",
            "localhost.",
            "127.0.0.2",
            "0.0.0.0",
            "[::1]:",
            "[::1",
            "::1",
            "127.0.0.1:123456",
            "user@127.0.0.1",
            "127.0.0.1 ",
            "[::ffff:127.0.0.1]",
        ] {
            assert_eq!(check_host(&headers(&[("host", bad)])), Err(Refusal::Host), "{bad}");
        }
        assert_eq!(check_host(&headers(&[])), Err(Refusal::Host));
        assert_eq!(check_host(&headers(&[("host", "localhost"), ("host", "localhost")])), Err(Refusal::Host));
    }

    #[test]
    fn what_another_page_sends_is_turned_away() {
        let check = |pairs: &[(&str, &str)]| check_origin(&headers(pairs), "127.0.0.1:7000");
        for good in [
            &[][..],
            &[("origin", "http://127.0.0.1:7000")],
            &[("sec-fetch-site", "same-origin")],
            &[("sec-fetch-site", "none")],
            &[("origin", "http://127.0.0.1:7000"), ("sec-fetch-site", "same-origin")],
        ] {
            assert_eq!(check(good), Ok(()), "{good:?}");
        }
        for bad in [
            &[("origin", "null")][..],
            &[("origin", "http://127.0.0.1:8080")],
            &[("origin", "https://127.0.0.1:7000")],
            &[("origin", "http://evil.example")],
            &[("origin", "")],
            &[("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "same-site")],
            &[("sec-fetch-site", "")],
            &[("origin", "http://127.0.0.1:7000"), ("origin", "http://evil.example")],
            &[("origin", "http://127.0.0.1:7000"), ("sec-fetch-site", "cross-site")],
        ] {
            assert_eq!(check(bad), Err(Refusal::Origin), "{bad:?}");
        }
    }

    #[test]
    fn secrets_are_long_and_never_the_same() {
        let (one, two) = (secret().unwrap(), secret().unwrap());
        assert_eq!((one.len(), one == two, same(&one, &one), same(&one, &two)), (32, false, true, false));
        assert!(!same("", &one) && !same(&one[..31], &one) && !same(&format!("{one}0"), &one));
    }
}
