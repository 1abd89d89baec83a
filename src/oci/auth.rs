//! What a registry asks for when it answers 401 (RFC 9110, section 11; docker's token authentication).

/// What it wants.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A name and a password with every request.
    Basic,
    /// A token, which another server gives.
    Bearer {
        /// The address of that server.
        realm: String,
        /// For whom the token is.
        service: Option<String>,
    },
}

impl Challenge {
    /// The first challenge in the headers that we know.
    pub(super) fn find<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
        headers.filter_map(Challenge::parse).next()
    }

    fn parse(header: &str) -> Option<Challenge> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Challenge::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service) = (None, None);
        for (name, value) in parameters(rest) {
            match name.to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                _ => {}
            }
        }
        Some(Challenge::Bearer { realm: realm?, service })
    }
}

/// `name=value` and `name="value"`, with commas between them. Stops at what is neither.
fn parameters(mut rest: &str) -> Vec<(&str, String)> {
    let mut found = Vec::new();
    while let Some((name, value)) = rest.trim_start_matches([' ', ',', '\t']).split_once('=') {
        let (value, behind) = match value.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let end = value.find([',', ' ']).unwrap_or(value.len());
                (value[..end].to_owned(), &value[end..])
            }
        };
        found.push((name.trim(), value));
        rest = behind;
    }
    found
}

/// The text up to the closing quote, and what is behind that.
fn unquote(text: &str) -> (String, &str) {
    let (mut value, mut escaped) = (String::new(), false);
    for (at, c) in text.char_indices() {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return (value, &text[at + 1..]),
            _ => {
                value.push(c);
                escaped = false;
            }
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_understood_and_strange_ones_harm_nobody() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Challenge::Bearer { realm: realm.into(), service: service.map(Into::into) })
        };
        for (header, expected) in [
            ("Basic realm=\"x\"", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            (
                "Bearer realm=\"https://a.example/token\",service=\"a, b\",scope=\"repository:x:pull\"",
                bearer("https://a.example/token", Some("a, b")),
            ),
            ("bearer service=x, realm=https://b.example", bearer("https://b.example", Some("x"))),
            (r#"Bearer realm="a\"b""#, bearer("a\"b", None)),
            (r#"Bearer realm="open"#, bearer("open", None)),
            ("Bearer", None),
            ("Bearer scope=\"x\"", None),
            ("Negotiate", None),
            ("", None),
            ("Bearer ====,,,\"\"\"é", None),
        ] {
            assert_eq!(Challenge::parse(header), expected, "{header}");
        }
        assert_eq!(Challenge::find(["Negotiate", "Basic"].into_iter()), Some(Challenge::Basic));
    }
}
