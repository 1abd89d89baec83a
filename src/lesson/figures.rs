//! What was measured, by name, and texts that speak of it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Error;

/// Figures, as a tree: `taken.pause_us` is the field `pause_us` of what is called `taken`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures(Map<String, Value>);

impl Figures {
    /// Puts something under a name, in place of what was there.
    pub fn put(&mut self, name: &str, value: Value) {
        self.0.insert(name.into(), value);
    }

    /// Takes all of another's, which count for more.
    pub fn extend(&mut self, other: &Figures) {
        self.0.extend(other.0.clone());
    }

    /// What `path` leads to.
    pub fn get(&self, path: &str) -> Option<&Value> {
        let mut names = path.split('.');
        let first = self.0.get(names.next()?)?;
        names.try_fold(first, |value, name| match value {
            Value::Array(list) => list.get(name.parse::<usize>().ok()?),
            other => other.get(name),
        })
    }

    /// A number.
    pub fn number(&self, path: &str) -> Option<f64> {
        self.get(path)?.as_f64()
    }

    /// A text.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.get(path)?.as_str()
    }

    /// Whether two figures are the same.
    pub fn same(&self, one: &str, other: &str) -> Option<bool> {
        Some(self.get(one)? == self.get(other)?)
    }

    /// `text` with figures in the place of their names: `{taken.pause_us}`, or with a unit `{taken.pause_us:ms}`.
    /// Other braces stay as they are.
    pub fn fill(&self, text: &str) -> Result<String, Error> {
        let mut filled = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('{') {
            filled += &rest[..at];
            rest = &rest[at..];
            match rest.find('}').map(|end| &rest[1..end]).filter(|name| is_name(name)) {
                Some(name) => {
                    let (path, unit) = name.split_once(':').unwrap_or((name, ""));
                    let value = self.get(path).ok_or_else(|| Error::NoFigure(path.into()))?;
                    filled += &written(value, unit);
                    rest = &rest[name.len() + 2..];
                }
                None => {
                    filled.push('{');
                    rest = &rest[1..];
                }
            }
        }
        Ok(filled + rest)
    }
}

fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_lowercase())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._:".contains(&byte))
}

/// A figure as people read it. Microseconds can be written as `ms` (or as seconds when they are that many), bytes as
/// `mib`, seconds as `s`.
fn written(value: &Value, unit: &str) -> String {
    let Some(number) = value.as_f64() else {
        return value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    };
    match unit {
        "ms" if number >= 1e6 => format!("{} s", short(number / 1e6)),
        "ms" => format!("{} ms", short(number / 1000.0)),
        "mib" => format!("{} MiB", short(number / f64::from(1 << 20))),
        "s" => format!("{} s", short(number)),
        _ if value.is_u64() || value.is_i64() => value.to_string(),
        _ => short(number),
    }
}

/// One digit behind the point for small numbers, none for others.
fn short(number: f64) -> String {
    if number < 100.0 { format!("{number:.1}") } else { format!("{number:.0}") }
}

/// The JSON in what a command has printed, among other lines.
pub fn json_in(text: &str) -> Option<Value> {
    let begins = |line: &str| line.starts_with('{') || line.starts_with('[');
    let ends = |line: &str| line.starts_with('}') || line.starts_with(']');
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.iter().position(|line| begins(line))?;
    let whole = serde_json::from_str(&lines[first..].join("\n")).ok();
    whole.or_else(|| {
        let last = lines.iter().rposition(|line| ends(line)).filter(|last| *last >= first)?;
        serde_json::from_str(&lines[first..=last].join("\n")).ok()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn figures() -> Figures {
        let mut figures = Figures::default();
        figures.put("taken", json!({"pause_us": 7_449, "name": "anna@a", "list": [{"x": 1}]}));
        figures.put("bytes", json!(201_326_592));
        figures
    }

    #[test]
    fn texts_are_filled_and_other_braces_left_alone() {
        let fill = |text: &str| figures().fill(text);
        assert_eq!(fill("{taken.pause_us:ms} of {bytes:mib}, {taken.name}").unwrap(), "7.4 ms of 192 MiB, anna@a");
        assert_eq!(fill("{taken.list.0.x} {taken.pause_us} {bytes:ms}").unwrap(), "1 7449 201 s");
        assert_eq!(fill(r#"curl -d '{"name": "Ben"}' { } ${X} {"#).unwrap(), r#"curl -d '{"name": "Ben"}' { } ${X} {"#);
        assert!(matches!(fill("{nothing.here}"), Err(Error::NoFigure(name)) if name == "nothing.here"));
    }

    #[test]
    fn what_was_not_measured_is_neither_true_nor_false() {
        assert_eq!(figures().number("taken.pause_us"), Some(7449.0));
        assert_eq!(figures().number("taken.name"), None);
        assert_eq!(figures().same("taken.pause_us", "taken.other"), None);
        assert_eq!(figures().same("taken.pause_us", "taken.pause_us"), Some(true));
    }

    #[test]
    fn json_is_found_among_other_lines() {
        assert_eq!(json_in("{\"a\": 1}"), Some(json!({"a": 1})));
        assert_eq!(json_in("anna@x\n[\n  1\n]\ndone\n"), Some(json!([1])));
        assert_eq!(json_in("nothing\n{ of the kind\n"), None);
        assert_eq!(json_in("}\n{"), None);
    }
}
