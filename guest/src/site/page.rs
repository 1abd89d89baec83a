//! The page: a template from `images/site`, filled with what is true just now.

use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::book::{Entry, MAX_MESSAGE, MAX_NAME};
use super::notes::{self, Notes};
use super::settings::Settings;
use super::{Site, date};
use crate::facts;

const PAGE: &str = include_str!("../../../images/site/page.html");
const SORRY: &str = include_str!("../../../images/site/sorry.html");
const KITTEN: &str = include_str!("../../../images/site/kitten.svg");

/// The page as the `visits`th visitor sees it.
pub(super) fn render(site: &Site, visits: u64) -> String {
    let settings = Settings::read(&site.settings);
    let entries = match site.book.latest() {
        Ok(entries) => list(&entries),
        Err(why) => format!("<li class=\"empty\">{}</li>\n", escape(&why.to_string())),
    };
    let values: [(&str, String); 14] = [
        ("title", escape(&settings.title)),
        ("colour", settings.colour),
        ("kitten", KITTEN.into()),
        ("visits", visits.to_string()),
        ("ticks", site.ticks.load(Ordering::Relaxed).to_string()),
        ("hostname", escape(&facts::hostname())),
        ("cpus", facts::cpus().to_string()),
        ("memory", memory(facts::memory_bytes())),
        ("generation", site.generation.load(Ordering::Relaxed).to_string()),
        ("max_name", MAX_NAME.to_string()),
        ("max_message", MAX_MESSAGE.to_string()),
        ("count", site.book.entries().to_string()),
        ("entries", entries),
        ("notes", show(&notes::read(&site.notes, Path::new(crate::machine::LOST)))),
    ];
    fill(PAGE, &values)
}

/// A small page for what went wrong.
pub(super) fn sorry(why: &str) -> String {
    fill(SORRY, &[("why", escape(why))])
}

/// Puts each value in the place of its `{{name}}`. What is put in is not looked at again.
fn fill(template: &str, values: &[(&str, String)]) -> String {
    let mut page = String::with_capacity(template.len() + 4096);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let Some((name, after)) = after.split_once("}}") else { break };
        page.push_str(before);
        if let Some((_, value)) = values.iter().find(|(key, _)| *key == name) {
            page.push_str(value);
        }
        rest = after;
    }
    page + rest
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(c),
        }
    }
    escaped
}

fn list(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "<li class=\"empty\">Nobody has written yet. Be the first!</li>".into();
    }
    let mut items = String::new();
    for entry in entries {
        let (name, message, time) = (escape(&entry.name), escape(&entry.message), date::iso(entry.written));
        // Writing to a string cannot fail.
        let _ = writeln!(
            items,
            "<li><p>{message}</p><footer><b>{name}</b> <time datetime=\"{time}\">{}</time></footer></li>",
            time.replace('T', " ").replace('Z', " UTC"),
        );
    }
    items
}

fn show(notes: &Notes) -> String {
    match notes {
        Notes::NoDisk => {
            "<p class=\"empty\">No transient disk is here: nothing is mounted on <code>/mnt</code>.</p>".into()
        }
        Notes::None => {
            "<p class=\"empty\">The disk is here, and blank: there is no <code>/mnt/notes.txt</code>.</p>".into()
        }
        Notes::Lost => {
            "<p class=\"lost\"><b>Anna’s notes are lost.</b> They were on transient storage, which no snapshot \
                        keeps: when this machine woke, they were gone, and a blank disk took their place.</p>"
                .into()
        }
        Notes::Some(text) => format!("<pre>{}</pre>", escape(text)),
        Notes::Unreadable(why) => format!("<p class=\"empty\">The disk cannot be read: {}.</p>", escape(why)),
    }
}

/// MemTotal is what the kernel has left for us, so it is shown as it is: `233 MiB`.
fn memory(bytes: u64) -> String {
    match bytes >> 20 {
        mib @ 0..10_000 => format!("{mib} MiB"),
        mib => format!("{:.1} GiB", mib as f64 / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_visitor_writes_is_text() {
        let evil = "<script>alert('x')</script> & \"{{visits}}\"";
        let entry = Entry { id: 1, written: 0, name: evil.into(), message: evil.into() };
        let shown = list(&[entry]) + &show(&Notes::Some(evil.into())) + &sorry(evil);
        assert!(!shown.contains("<script>") && !shown.contains("alert('"));
        assert_eq!(shown.matches("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &quot;").count(), 4);
        assert!(shown.contains("{{visits}}"), "what is filled in is not filled in itself");
    }

    #[test]
    fn every_place_in_the_template_is_filled() {
        let site = Site::with_files(Default::default(), Default::default(), "/none".into(), "/none".into());
        let folder = std::env::temp_dir().join(format!("catnap-page-{}", std::process::id()));
        site.book.open(&folder, &site.generation).unwrap();
        let page = render(&site, 7);
        site.book.close();
        std::fs::remove_dir_all(folder).unwrap();
        assert!(!page.contains("{{") && !page.contains("}}"));
        for needed in ["<svg", ">7<", "Nobody has written yet", "class=\"ginger\""] {
            assert!(page.contains(needed), "{needed}");
        }
        // Everything on the page comes from the page's own machine. (The namespace is only a name.)
        let page = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script>"));
    }
}
