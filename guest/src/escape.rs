//! Text on the kernel's command line, which knows words and nothing else.

/// Text as a word of the kernel's command line: all but letters, digits, `-`, `.` and `_` as `%` and two hexadecimal
/// digits for each byte.
pub fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    text.bytes().map(|byte| if plain(byte) { (byte as char).to_string() } else { format!("%{byte:02x}") }).collect()
}

/// What [`escape`] made a word of; `None` for what it never makes.
pub fn unescape(word: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::new(), word.as_bytes());
    while let Some((first, more)) = rest.split_first() {
        (bytes, rest) = match (first, more) {
            (b'%', [high, low, more @ ..]) => {
                let digit = |byte: &u8| (*byte as char).to_digit(16);
                bytes.push((digit(high)? << 4 | digit(low)?) as u8);
                (bytes, more)
            }
            (b'%', _) => return None,
            _ => {
                bytes.push(*first);
                (bytes, more)
            }
        };
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_becomes_a_word_and_text_again() {
        for text in ["", "plain-1.2_3", "Anna’s = kitten \"x\" 100%", "%41"] {
            let word = escape(text);
            assert!(word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._%".contains(&byte)), "{word}");
            assert_eq!(unescape(&word).as_deref(), Some(text));
        }
        assert_eq!([unescape("%"), unescape("%4"), unescape("%zz"), unescape("%ff")], [const { None }; 4]);
    }
}
