//! Bytes as hexadecimal text. No formatter is asked: guests stand still while their registers are written down, and wait
//! while they are read.

const DIGITS: &[u8; 16] = b"0123456789abcdef";
/// What is no digit, in [`VALUES`].
const NONE: u8 = 0xff;
/// What each character stands for.
const VALUES: [u8; 256] = {
    let mut values = [NONE; 256];
    let mut value = 0;
    while value < DIGITS.len() {
        values[DIGITS[value] as usize] = value as u8;
        value += 1;
    }
    values
};

/// Two lower-case digits for each byte.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)] as char);
        text.push(DIGITS[usize::from(byte & 15)] as char);
    }
    text
}

/// The bytes that lower-case digits stand for: with two spellings, one key or digest would have two names.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = vec![0; text.len() / 2];
    decode_into(text, &mut bytes).map(|()| bytes)
}

/// The same for a known number of bytes. `None` when it has others.
pub fn decode_array<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    decode_into(text, &mut bytes).map(|()| bytes)
}

fn decode_into(text: &str, bytes: &mut [u8]) -> Option<()> {
    if text.len() != bytes.len() * 2 {
        return None;
    }
    // Digits are below 16, so that whatever is none shows in the end.
    let mut seen = 0;
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
        let [high, low] = pair.map(|digit| VALUES[usize::from(digit)]);
        seen |= high | low;
        *byte = high << 4 | low;
    }
    (seen < 16).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_come_back_and_what_is_no_digit_is_refused() {
        let all: Vec<u8> = (0..=255).collect();
        let text = encode(&all);
        assert_eq!((&text[..6], &text[508..]), ("000102", "feff"));
        assert_eq!(decode(&text), Some(all));
        assert_eq!(decode(&text.to_uppercase()), None);
        assert_eq!((decode(""), decode("0")), (Some(vec![]), None));
        assert_eq!(
            (decode_array("0af0"), decode_array::<2>("0a"), decode_array::<1>("0af0")),
            (Some([10, 240]), None, None)
        );
        for byte in 0..=255_u8 {
            for text in [[byte, b'0'], [b'0', byte]] {
                let known = byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase();
                assert_eq!(std::str::from_utf8(&text).is_ok_and(|text| decode(text).is_some()), known, "{byte}");
            }
        }
    }
}
