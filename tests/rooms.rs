//! The house rule: a room uses only rooms on lower floors, and rooms on one floor do not know each other.
//!
//! Reads every source file, blanks what the compiler does not read as code, and looks at each path that
//! begins at the crate's root.

use std::fs;
use std::path::{Path, PathBuf};

/// The rooms of each floor, the ground floor first. `docs/architecture.md` tells what they are for.
const FLOORS: [&[&str]; 8] = [
    &["spec", "sys"],
    &["acpi", "disk", "mem", "snapshot"],
    &["devices", "kvm", "oci", "store"],
    &["archive", "boot", "image"],
    &["machine"],
    &["control"],
    &["lesson", "web"],
    &["cli"],
];

/// A longer file holds two things that want a file each.
const LONGEST_FILE: usize = 500;

#[test]
fn every_room_uses_only_rooms_on_lower_floors() {
    let broken: Vec<String> = sources("src").iter().flat_map(|(file, text)| broken_rules(file, text)).collect();
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn no_file_is_too_long() {
    let files = ["src", "guest/src", "tests"].map(sources).concat();
    let long: Vec<String> = files
        .iter()
        .map(|(file, text)| (file, text.lines().count()))
        .filter(|&(_, lines)| lines > LONGEST_FILE)
        .map(|(file, lines)| format!("{}: {lines} lines, more than {LONGEST_FILE}", file.display()))
        .collect();
    assert!(long.is_empty(), "\n{}\n", long.join("\n"));
}

#[test]
fn the_tour_shows_each_room_on_its_floor() {
    let tour = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let mut shown = Vec::new();
    for row in tour.lines().filter(|line| line.starts_with("| ")) {
        let mut cells = row.trim_matches('|').split('|').map(str::trim);
        let Some(Ok(floor)) = cells.next().map(str::parse::<usize>) else { continue };
        let rooms = cells.next().unwrap_or_default().split('·').filter_map(|room| room.split('`').nth(1));
        shown.extend(rooms.map(|room| (room.to_owned(), floor)));
    }
    for (room, floor) in &shown {
        assert_eq!(floor_of(room), Some(*floor), "the tour has `{room}` on floor {floor}");
    }
    for line in fs::read_to_string(root().join("src/lib.rs")).unwrap().lines() {
        let Some(room) = line.strip_prefix("pub mod ").and_then(|rest| rest.strip_suffix(';')) else { continue };
        assert!(shown.iter().any(|(name, _)| name == room), "the tour does not show `{room}`");
    }
}

/// Every Rust file below a folder of the project, with its path relative to `folder`'s parent.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    assert!(!found.is_empty(), "{folder} holds no source files");
    found.sort();
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn floor_of(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

/// The modules that lead to a file: `src/devices/virtio/mod.rs` is `devices`, `virtio`. None for the crate's
/// own root files, which stand outside the rooms.
fn modules(file: &Path) -> Vec<String> {
    let file = file.strip_prefix("src").unwrap_or(file).with_extension("");
    let mut modules: Vec<String> = file.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    modules.pop_if(|last| last == "mod");
    if modules == ["lib"] || modules == ["main"] { Vec::new() } else { modules }
}

/// What a file does that its room may not do, one sentence with file and line for each.
fn broken_rules(file: &Path, text: &str) -> Vec<String> {
    let modules = modules(file);
    let Some(room) = modules.first() else { return Vec::new() };
    let Some(floor) = floor_of(room) else {
        return vec![format!("{}: `{room}` is a room without a floor; give it one in tests/rooms.rs", file.display())];
    };
    let code = blank_prose(text);
    let mut broken = Vec::new();
    for (at, used) in rooms_used(&code, modules.len()) {
        let why = match floor_of(&used) {
            _ if used == *room => continue,
            Some(other) if other < floor => continue,
            Some(other) if other == floor => format!("`{room}` and `{used}` share floor {floor}"),
            Some(other) => format!("`{room}` on floor {floor} reaches up to `{used}` on floor {other}"),
            None => format!("`{room}` uses `{used}`, which is no room"),
        };
        let line = 1 + code[..at].matches('\n').count();
        broken.push(format!("{}:{line}: {why}", file.display()));
    }
    broken
}

/// The first names of all paths that begin at the crate's root, with where they stand. The root is written
/// `crate::`, or as a `super::` for each of the file's `depth` modules (one more in an inline module).
fn rooms_used(code: &str, depth: usize) -> Vec<(usize, String)> {
    let mut used = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if !code[..at].ends_with(|before: char| before.is_alphanumeric() || "_$".contains(before)) {
            names(code, at + "crate::".len(), &mut used);
        }
    }
    for (at, _) in code.match_indices("super::") {
        if code[..at].ends_with("super::") {
            continue;
        }
        let path = code[at..].trim_start_matches("super::");
        let up = (code.len() - at - path.len()) / "super::".len();
        let inline = usize::from(code[..at].lines().any(|line| line.starts_with("mod ") && line.ends_with('{')));
        if up >= depth + inline {
            names(code, code.len() - path.len(), &mut used);
        }
    }
    used
}

/// The name at `at`, or the first name of each path when a group in braces stands there.
fn names(code: &str, at: usize, used: &mut Vec<(usize, String)>) {
    let name_at = |at: usize| {
        let name = code[at..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        (at, name)
    };
    if !code[at..].starts_with('{') {
        used.push(name_at(at));
        return;
    }
    let mut depth = 0;
    let mut expected = false;
    for (offset, c) in code[at..].char_indices() {
        match c {
            '{' => (depth, expected) = (depth + 1, depth == 0),
            '}' => depth -= 1,
            ',' => expected = depth == 1,
            _ if expected && !c.is_whitespace() => {
                used.push(name_at(at + offset));
                expected = false;
            }
            _ => {}
        }
        if depth == 0 {
            return;
        }
    }
}

/// The same text with comments, strings and characters turned into blanks; lines stay where they are.
fn blank_prose(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = prose(rest, code.chars().last());
        if length == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[length..];
        }
    }
    code
}

/// How many bytes at the beginning of `text` are a comment, a string or a character; 0 when it is code.
fn prose(text: &str, before: Option<char>) -> usize {
    let until = |start: usize, end: &str| text[start..].find(end).map_or(text.len(), |at| start + at + end.len());
    let hashes = text.bytes().skip(1).take_while(|&byte| byte == b'#').count();
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    match text.as_bytes() {
        [b'/', b'/', ..] => text.find('\n').unwrap_or(text.len()),
        [b'/', b'*', ..] => until(2, "*/"),
        [b'r', ..] if !in_word && text[1 + hashes..].starts_with('"') => {
            until(2 + hashes, &format!("\"{}", "#".repeat(hashes)))
        }
        [b'"', ..] => quoted(text, '"'),
        // A lifetime has no closing quote behind its first character.
        [b'\'', b'\\', ..] => quoted(text, '\''),
        [b'\'', ..] if text[1..].chars().nth(1) == Some('\'') => quoted(text, '\''),
        _ => 0,
    }
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = true; // the opening quote does not close
    for (at, c) in text.char_indices() {
        if c == quote && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}

#[test]
fn the_rule_catches_those_who_break_it() {
    let broken = |file: &str, text: &str| broken_rules(Path::new(file), text).join("\n");

    assert_eq!(broken("src/mem/mod.rs", "use crate::spec::Size;\nuse crate::mem::Region;"), "");
    assert!(broken("src/mem/mod.rs", "\nuse crate::kvm::Vm;").starts_with("src/mem/mod.rs:2: `mem` on floor 1"));
    assert!(
        broken("src/kvm/vcpu.rs", "use crate::{\n    mem::{a, b},\n    devices,\n};")
            .contains(":3: `kvm` and `devices`")
    );
    assert!(broken("src/disk/mod.rs", "fn f(_: &mut crate::acpi::Table) {}").contains("share floor 1"));
    assert!(broken("src/boot/mod.rs", "use crate::attic::Box;").contains("no room"));
    assert!(broken("src/attic/mod.rs", "").contains("without a floor"));
    assert!(broken("src/kvm/vcpu.rs", "use super::super::cli;").contains("reaches up to `cli`"));
    assert!(broken("src/acpi.rs", "mod tests {\n    use super::super::disk;\n}").contains("share floor 1"));

    assert_eq!(broken("src/kvm/vcpu.rs", "use super::cpuid;\nmod tests {\n    use super::super::clock;\n}"), "");
    assert_eq!(broken("src/mem/mod.rs", "// crate::cli\nlet s = \"\\\"crate::cli\"; /* crate::cli */"), "");
    assert_eq!(
        broken("src/mem/mod.rs", "let s = r#\"\" crate::cli\"#; let c = '\"'; fn f<'a>() {} // \" crate::cli"),
        ""
    );
    assert!(broken("src/mem/mod.rs", "let c = '\\''; fn f<'a>(_: crate::cli::Verb) {}").contains("reaches up"));
    assert_eq!(broken("src/main.rs", "use crate::cli;"), "");
}
