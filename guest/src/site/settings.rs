//! `/etc/kitten.conf`: what tells one kitten site from another.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Coats that the kitten can wear; each is a class of the page.
const COLOURS: [&str; 6] = ["ginger", "grey", "black", "cream", "brown", "blue"];
/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 4096;
/// The longest title, in characters.
const MAX_TITLE: usize = 60;

/// The settings, all of them sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub colour: &'static str,
    pub title: String,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { colour: COLOURS[0], title: "Anna’s kitten".into() }
    }
}

impl Settings {
    /// Reads the file anew for each page, so that a change shows at once. What is missing or makes no sense
    /// is as if it were not there.
    pub(super) fn read(path: &Path) -> Settings {
        let mut text = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
        if read.is_err() {
            return Settings::default();
        }
        Settings::parse(&String::from_utf8_lossy(&text))
    }

    fn parse(text: &str) -> Settings {
        let mut settings = Settings::default();
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            match (key.trim(), value.trim()) {
                ("colour" | "color", value) => {
                    if let Some(colour) = COLOURS.iter().find(|colour| colour.eq_ignore_ascii_case(value)) {
                        settings.colour = colour;
                    }
                }
                ("title", value) if !value.is_empty() => settings.title = value.chars().take(MAX_TITLE).collect(),
                _ => {}
            }
        }
        settings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_nonsense_is_not() {
        let settings = Settings::parse("# ours\ncolour = Grey\ntitle=Ben's = kitten\nx=y\nnonsense\n");
        assert_eq!(settings, Settings { colour: "grey", title: "Ben's = kitten".into() });
        assert_eq!(Settings::parse("colour=\"><script>\ntitle=\n"), Settings::default());
        assert_eq!(Settings::read(Path::new("/no/such/file")), Settings::default());
        assert_eq!(Settings::parse(&format!("title={}", "x".repeat(500))).title.len(), MAX_TITLE);
    }
}
