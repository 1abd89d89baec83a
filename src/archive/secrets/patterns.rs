//! The forms that secrets usually have.
//!
//! Programs hold the words by which secrets begin as well, so each form wants more than that: base64 behind the head
//! of a key, a value behind `password=`.

/// A form of secret.
pub struct Pattern {
    /// What it is.
    pub kind: &'static str,
    /// The words by which it begins, of at least three bytes.
    pub anchors: Vec<Vec<u8>>,
    /// Whether upper and lower case are the same in these.
    pub any_case: bool,
    /// Whether it is there, and how many bytes it has: from the text that begins with an anchor, the byte before it,
    /// and the anchor's length.
    pub check: Check,
    /// Enough of it to know it by.
    pub show: fn(&[u8]) -> String,
}

type Check = fn(&[u8], Option<u8>, usize) -> Option<usize>;

/// How much of a key's text is taken for it: enough to tell keys apart.
const KEY: usize = 400;
/// The longest value of an assignment.
const VALUE: usize = 128;

/// All forms, and the user's own strings.
pub fn all(wanted: &[String]) -> Vec<Pattern> {
    let words = |words: &[&str]| words.iter().map(|word| word.as_bytes().to_vec()).collect();
    let pattern = |kind, anchors: &[&str], check: Check, show| Pattern {
        kind,
        anchors: words(anchors),
        any_case: false,
        check,
        show,
    };
    let mut all = vec![
        pattern("private key", &["-----BEGIN "], pem, first_line),
        pattern("private key (binary)", &["openssh-key-v1\0"], openssh, |_| "openssh-key-v1 …".into()),
        pattern("public key", &["ssh-ed25519 AAAA", "ssh-rsa AAAA", "ecdsa-sha2-nistp"], public_key, comment),
        pattern("AWS key", &["AKIA", "ASIA"], aws, few),
        pattern("GitHub token", &["ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"], github, few),
        pattern("Slack token", &["xoxb-", "xoxp-", "xoxa-", "xoxr-", "xoxs-"], slack, few),
        pattern("JWT", &["eyJ"], jwt, few),
        pattern("password hash", &[":$1$", ":$5$", ":$6$", ":$y$", ":$2a$", ":$2b$", ":$2y$"], hash, few),
        pattern("password in a URL", &["://"], url, |_| "://…:…@".into()),
    ];
    all.push(Pattern {
        any_case: true,
        ..pattern("password", &["password", "passwd", "passphrase"], password, assigned)
    });
    all.push(Pattern {
        any_case: true,
        ..pattern("secret", &["api_key", "apikey", "secret", "access_token", "auth_token"], secret, assigned)
    });
    let of_user = wanted.iter().map(|text| text.as_bytes().to_vec()).collect();
    all.push(Pattern {
        kind: "wanted",
        anchors: of_user,
        any_case: false,
        check: |_, _, length| Some(length),
        show: whole,
    });
    all
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')
}

fn is_base64url(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// How many of the first bytes are like that.
fn run(text: &[u8], like: impl Fn(u8) -> bool) -> usize {
    text.iter().take_while(|byte| like(**byte)).count()
}

/// Behind the anchor there are `least` to `most` such bytes and then none, and no word goes on into it.
fn token(
    text: &[u8],
    before: Option<u8>,
    anchor: usize,
    (least, most): (usize, usize),
    like: fn(u8) -> bool,
) -> Option<usize> {
    let length = run(&text[anchor..], like);
    let whole = before.is_none_or(|byte| !is_word(byte)) && (least..=most).contains(&length);
    whole.then_some(anchor + length)
}

/// RFC 7468, and the headers of RFC 1421 that encrypted keys have.
fn pem(text: &[u8], _: Option<u8>, anchor: usize) -> Option<usize> {
    let label = run(&text[anchor..], |byte| byte.is_ascii_uppercase() || byte == b' ');
    let rest =
        text[anchor..][..label].ends_with(b"PRIVATE KEY").then(|| text[anchor + label..].strip_prefix(b"-----"))??;
    let rest = rest.strip_prefix(b"\r").or(rest.strip_prefix(b"\\n")).unwrap_or(rest);
    let rest = rest.strip_prefix(b"\n").unwrap_or(rest);
    let body = run(rest, is_base64) >= 16 || rest.starts_with(b"Proc-Type:");
    let end = text.len() - rest.len() + run(rest, |byte| byte != b'-').min(KEY);
    body.then_some(end)
}

/// OpenSSH's PROTOCOL.key: behind the magic the name of a cipher, with its length before it.
fn openssh(text: &[u8], _: Option<u8>, anchor: usize) -> Option<usize> {
    let length = u32::from_be_bytes(text.get(anchor..anchor + 4)?.try_into().ok()?);
    (4..=32).contains(&length).then(|| text.len().min(KEY))
}

fn public_key(text: &[u8], before: Option<u8>, _: usize) -> Option<usize> {
    let kind = run(text, |byte| byte.is_ascii_alphanumeric() || byte == b'-');
    let key = text.get(kind..)?.strip_prefix(b" ")?;
    let length = run(key, is_base64);
    if before.is_some_and(is_word) || !key.starts_with(b"AAAA") || length < 60 {
        return None;
    }
    let comment = match key.get(length) {
        Some(b' ') => 1 + run(&key[length + 1..], |byte| byte.is_ascii_graphic()).min(60),
        _ => 0,
    };
    Some(kind + 1 + length + comment)
}

fn aws(text: &[u8], before: Option<u8>, anchor: usize) -> Option<usize> {
    let upper = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit();
    let length = token(text, before, anchor, (16, 16), is_word)?;
    text[..length].iter().all(|byte| upper(*byte)).then_some(length)
}

fn github(text: &[u8], before: Option<u8>, anchor: usize) -> Option<usize> {
    token(text, before, anchor, (22, 255), is_word)
}

fn slack(text: &[u8], before: Option<u8>, anchor: usize) -> Option<usize> {
    token(text, before, anchor, (10, 255), |byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// RFC 7519: three parts in base64url, of which the first two are JSON objects.
fn jwt(text: &[u8], before: Option<u8>, _: usize) -> Option<usize> {
    let head = run(text, is_base64url);
    let claims = text.get(head..)?.strip_prefix(b".").filter(|rest| rest.starts_with(b"eyJ"))?;
    let signature = claims.get(run(claims, is_base64url)..)?.strip_prefix(b".")?;
    let length = run(signature, is_base64url);
    let good = head >= 10 && length >= 10 && before.is_none_or(|byte| !is_base64url(byte));
    good.then(|| text.len() - signature.len() + length)
}

/// crypt(5), in a line of /etc/shadow.
fn hash(text: &[u8], before: Option<u8>, anchor: usize) -> Option<usize> {
    let length =
        run(&text[anchor..], |byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'/' | b'$' | b'=' | b','));
    (before.is_some_and(is_word) && length >= 22).then_some(anchor + length)
}

/// RFC 3986: user, colon and password before an `@`.
fn url(text: &[u8], before: Option<u8>, anchor: usize) -> Option<usize> {
    let part = |text: &[u8]| {
        run(text, |byte| {
            byte.is_ascii_graphic() && !matches!(byte, b':' | b'/' | b'@' | b'"' | b'\'' | b'%' | b'<' | b'{' | b'$')
        })
    };
    let user = part(&text[anchor..]);
    let rest = text.get(anchor + user..)?.strip_prefix(b":")?;
    let password = part(rest);
    let host = rest.get(password..)?.strip_prefix(b"@")?;
    let good = before.is_some_and(|byte| byte.is_ascii_lowercase()) && user > 0 && password >= 3;
    (good && host.first().is_some_and(u8::is_ascii_alphanumeric)).then(|| text.len() - host.len())
}

fn password(text: &[u8], _: Option<u8>, anchor: usize) -> Option<usize> {
    assignment(text, anchor, 4)
}

/// These words are more common, so the value has to look like one.
fn secret(text: &[u8], _: Option<u8>, anchor: usize) -> Option<usize> {
    let length = assignment(text, anchor, 10)?;
    text[anchor..length].iter().any(u8::is_ascii_digit).then_some(length)
}

/// `word=value`, `word: "value"`, `"word": "value"`, and `word: value` if there is a digit in it.
fn assignment(text: &[u8], anchor: usize, least: usize) -> Option<usize> {
    let skip =
        |text: &[u8], of: &[u8], most: usize| text.iter().take(most).take_while(|byte| of.contains(byte)).count();
    let mut at = anchor;
    at += skip(&text[at..], b"\"'", 1);
    at += skip(&text[at..], b" \t", 2);
    let sign = *text.get(at).filter(|sign| matches!(sign, b'=' | b':'))?;
    at += 1;
    at += skip(&text[at..], b" \t", 2);
    let quoted = skip(&text[at..], b"\"'", 1);
    let value = &text[at + quoted..];
    let length = run(value, |byte| byte.is_ascii_graphic() && !b"\"'`;,&<>()[]{}\\".contains(&byte)).min(VALUE);
    let sane = length >= least && value.first().is_some_and(|first| !b"%$*=:/-.".contains(first));
    let closed = quoted == 0 || value.get(length).is_some_and(|end| b"\"'".contains(end));
    let certain = sign == b'=' || quoted > 0 || value[..length].iter().any(u8::is_ascii_digit);
    (sane && closed && certain).then_some(at + quoted + length)
}

/// The first line of a key.
fn first_line(secret: &[u8]) -> String {
    let line = run(secret, |byte| byte.is_ascii_uppercase() || matches!(byte, b'-' | b' '));
    format!("{} …", String::from_utf8_lossy(&secret[..line]))
}

/// A public key's kind and comment, which is no secret and tells whose it is.
fn comment(key: &[u8]) -> String {
    let text = String::from_utf8_lossy(key);
    let mut words = text.split(' ');
    let (kind, comment) = (words.next().unwrap_or_default(), words.nth(1).unwrap_or_default());
    format!("{kind} … {comment}").trim_end().into()
}

/// The first four characters.
fn few(secret: &[u8]) -> String {
    let start = secret.strip_prefix(b":").unwrap_or(secret);
    format!("{}… ({} characters)", String::from_utf8_lossy(&start[..start.len().min(4)]), start.len())
}

/// What an assignment assigns to, and how long the value is.
fn assigned(secret: &[u8]) -> String {
    let name = run(secret, is_word);
    format!("{}… ({} characters)", String::from_utf8_lossy(&secret[..name]), secret.len() - name)
}

fn whole(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::search::Search;
    use super::*;

    fn found(text: &str) -> Vec<(&'static str, String)> {
        let mut search = Search::new(all(&[]));
        let mut found = Vec::new();
        let mut sink = |pattern: &Pattern, _, secret: &[u8]| found.push((pattern.kind, (pattern.show)(secret)));
        search.feed(0, text.as_bytes(), &mut sink);
        search.end(&mut sink);
        found
    }

    #[test]
    fn the_usual_forms_are_found_and_masked() {
        let body = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW";
        let kitten = concat!(env!("CARGO_MANIFEST_DIR"), "/images/kitten/id_ed25519");
        let anna = std::fs::read_to_string(kitten).unwrap();
        let public = format!("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{} anna@kitten\n", "x".repeat(35));
        for (text, kind, shown) in [
            (format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END"), "private key", "PRIVATE KEY"),
            (format!("-----BEGIN RSA PRIVATE KEY-----\r\n{body}"), "private key", "RSA"),
            (format!("-----BEGIN PRIVATE KEY-----\\n{body}"), "private key", "PRIVATE KEY"),
            ("-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n".into(), "private key", "EC"),
            (anna, "private key", "OPENSSH"),
            ("openssh-key-v1\0\0\0\0\x04none".into(), "private key (binary)", "openssh"),
            (public, "public key", "anna@kitten"),
            ("key = AKIAIOSFODNN7EXAMPLE\n".into(), "AWS key", "AKIA"),
            (format!("export T=ghp_{}", "aB3".repeat(12)), "GitHub token", "ghp_"),
            ("xoxb-123456789012-abcdef".into(), "Slack token", "xoxb"),
            ("Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJlIQ".into(), "JWT", "eyJh"),
            (format!("root:$6$salt${}:19000:0", "h".repeat(86)), "password hash", "$6$s"),
            ("postgres://anna:meow@db.example/x".into(), "password in a URL", "…"),
            ("DB_PASSWORD=hunter2\n".into(), "password", "PASSWORD"),
            ("password: \"purr-purr\"".into(), "password", "password"),
            ("{\"passwd\": \"meow\"}".into(), "password", "passwd"),
            ("password: tr0ub4dor".into(), "password", "password"),
            ("client_secret=0123456789abcdef".into(), "secret", "secret"),
        ] {
            let found = found(&text);
            assert!(found.len() == 1 && found[0].0 == kind && found[0].1.contains(shown), "{text:?}: {found:?}");
            for secret in ["b3Blb", "IOSFODNN", "hunter2", "meow", "abcdef", "salt", "c2ln"] {
                assert!(!found[0].1.contains(secret), "{found:?}");
            }
        }
    }

    #[test]
    fn words_of_programs_are_no_secrets() {
        for text in [
            "-----BEGIN OPENSSH PRIVATE KEY-----\0-----END OPENSSH PRIVATE KEY-----\0",
            "-----BEGIN CERTIFICATE-----\nMIIDdzCCAl+gAwIBAgIEAgAAuTANBgkqhkiG9w0BAQUFADBaMQswCQYDVQQGEwJJRTES",
            "openssh-key-v1\0ssh-rsa\0ssh-ed25519 \0",
            "XAKIAIOSFODNN7EXAMPLE AKIAIOSFODNN7EXAMPLEX AKIA",
            "Enter your password: \0password=%s\0password = ${PASS}\0passwords\0password required\0",
            "http://example.org:80/x@y ://a:b@ https://user@host",
            "root:*:19000:0 root:$6$",
            "eyJ.eyJ.x token secret: none",
        ] {
            assert_eq!(found(text), [], "{text:?}");
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        let anchors: Vec<Vec<u8>> = all(&["wanted".into()]).into_iter().flat_map(|pattern| pattern.anchors).collect();
        let words: [&[u8]; 12] =
            [b"=", b":", b"\"", b" ", b"\n", b"\0", b"AAAA", b"a1B2c3D4e5F6g7H8", b".", b"@", b"-----", b"PRIVATE KEY"];
        let mut search = Search::new(all(&["wanted".into()]));
        for round in 0..3000 {
            let mut text = Vec::new();
            for _ in 0..next() % 20 {
                match next() % 3 {
                    0 => text.extend(&anchors[next() % anchors.len()]),
                    1 => text.extend(words[next() % words.len()]),
                    _ => text.push(next() as u8),
                }
            }
            let mut sink = |pattern: &Pattern, _, secret: &[u8]| drop((pattern.show)(secret));
            search.feed(round * 1_000_000, &text, &mut sink);
            search.end(&mut sink);
        }
    }
}
