//! `/etc/kitten.conf`: what tells one kitten site from another.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::protocol::{self, COLOURS};

/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 4096;

/// The settings, all of them sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub colour: String,
    pub title: String,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { colour: COLOURS[0].into(), title: "Anna’s kitten".into() }
    }
}

impl Settings {
    /// Reads the file anew for each page, so that a change shows at once. What is missing or makes no sense
    /// is as if it were not there.
    pub(super) fn read(path: &Path) -> Settings {
        Settings::parse(&text(path))
    }

    fn parse(text: &str) -> Settings {
        let mut settings = Settings::default();
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            match protocol::setting(key, value) {
                Ok((key, value)) if key == "colour" => settings.colour = value,
                Ok((_, value)) => settings.title = value,
                Err(_) => {}
            }
        }
        settings
    }
}

/// What is in the file; nothing when it cannot be read.
fn text(path: &Path) -> String {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
    if read.is_ok() { String::from_utf8_lossy(&text).into_owned() } else { String::new() }
}

/// The file at `path` as it is with these settings in place of the ones in it.
pub(crate) fn changed(path: &Path, settings: &protocol::Settings) -> String {
    let text = text(path);
    let other = |line: &&str| {
        let known = line.split_once('=').and_then(|(key, value)| protocol::setting(key, value).ok());
        known.is_none_or(|(key, _)| !settings.contains_key(&key))
    };
    let kept = text.lines().filter(other).map(str::to_owned);
    let new = settings.iter().map(|(key, value)| format!("{key} = {value}"));
    kept.chain(new).map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_nonsense_is_not() {
        let settings = Settings::parse("# ours\ncolour = Grey\ntitle=Ben's = kitten\nx=y\nnonsense\n");
        assert_eq!(settings, Settings { colour: "grey".into(), title: "Ben's = kitten".into() });
        assert_eq!(Settings::parse("colour=\"><script>\ntitle=\n"), Settings::default());
        assert_eq!(Settings::read(Path::new("/no/such/file")), Settings::default());
        assert_eq!(Settings::parse(&format!("title={}", "x".repeat(500))), Settings::default());
    }

    #[test]
    fn what_is_set_takes_the_place_of_what_was() {
        let path = std::env::temp_dir().join(format!("catnap-settings-{}", std::process::id()));
        std::fs::write(&path, "# ours\nColor = black\ntitle = Ben\nx = y").unwrap();
        let set = |key: &str, value: &str| changed(&path, &protocol::Settings::from([(key.into(), value.into())]));
        assert_eq!(set("colour", "grey"), "# ours\ntitle = Ben\nx = y\ncolour = grey\n");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(set("title", "Carla"), "title = Carla\n");
    }
}
