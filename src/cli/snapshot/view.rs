//! A snapshot as it is listed and drawn.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::cli::ui;
use crate::control::{Code, Failure};
use crate::snapshot::{Digest, Kind};
use crate::spec::Name;
use crate::store::{Family, Listed, Sizes, Usage};

/// What is known of a snapshot without looking at its dependents.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    /// The names that stand for it.
    pub names: Vec<String>,
    /// Its identity.
    pub digest: Digest,
    /// Whether it is a base image.
    pub image: bool,
    /// What it captures; none when its manifest cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// When it was taken, in seconds since 1970; 0 when its manifest cannot be read.
    pub created: u64,
    /// A note by who took it.
    pub note: String,
    /// The snapshot that it comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<Digest>,
    /// The space that it takes.
    #[serde(flatten)]
    pub sizes: Sizes,
    /// vCPUs of its machine; an image has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// RAM of its machine in bytes; an image has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
    /// The name that it was given at first.
    #[serde(skip)]
    first_name: String,
}

impl View {
    /// The view of a snapshot that was listed.
    pub fn of(listed: &Listed, usage: &Usage) -> View {
        let mut view = View {
            names: listed.names.clone(),
            digest: listed.digest,
            image: listed.is_image(),
            kind: None,
            created: 0,
            note: String::new(),
            parent: None,
            sizes: usage.of(&listed.digest),
            cpus: None,
            memory_bytes: None,
            damaged: None,
            first_name: String::new(),
        };
        match &listed.snapshot {
            Err(error) => view.damaged = Some(error.to_string()),
            Ok(snapshot) => {
                let manifest = &snapshot.manifest;
                view.kind = Some(manifest.kind);
                view.created = manifest.created;
                view.note = manifest.note.clone();
                view.parent = manifest.parent;
                view.cpus = manifest.machine.as_ref().map(|machine| machine.cpus);
                view.memory_bytes = manifest.machine.as_ref().map(|machine| machine.memory);
                view.first_name = manifest.name.clone();
            }
        }
        view
    }

    /// What a person calls it.
    pub fn name(&self) -> String {
        if self.names.is_empty() { self.digest.short() } else { self.names.join(",") }
    }

    /// What a program calls it: one name, or the whole digest.
    pub fn reference(&self) -> String {
        self.names.first().cloned().unwrap_or_else(|| self.digest.to_string())
    }

    /// Whether it is one of the machine's: by a name that it has, or by its first when it has none any more.
    pub fn is_of(&self, machine: &Name) -> bool {
        let of = |name: &str| name.split_once('@').is_some_and(|(name, _)| name == machine.as_str());
        self.names.iter().any(|name| of(name)) || self.names.is_empty() && of(&self.first_name)
    }

    /// The machine that it is counted with, as text; an image has none.
    pub fn machine(&self) -> Option<&str> {
        let name = self.names.iter().find(|name| name.contains('@')).unwrap_or(&self.first_name);
        name.split_once('@').map(|(machine, _)| machine)
    }

    /// Its kind in one word.
    pub fn kind(&self) -> &'static str {
        self.kind.map_or("damaged", Kind::name)
    }

    /// How old it is.
    pub fn age(&self) -> String {
        if self.damaged.is_some() { "-".into() } else { ui::span(since(self.created)) }
    }

    /// Its note on one line, harmless for a terminal, and no longer than `longest` characters.
    pub fn note(&self, longest: usize) -> String {
        let words = ui::harmless(self.note.as_bytes());
        let line = words.split_whitespace().collect::<Vec<_>>().join(" ");
        if line.chars().count() <= longest {
            return line;
        }
        line.chars().take(longest.saturating_sub(1)).chain(['…']).collect()
    }
}

/// The time since a moment in seconds since 1970; none when it lies in the future.
pub fn since(created: u64) -> Duration {
    let then = UNIX_EPOCH.checked_add(Duration::from_secs(created));
    then.and_then(|then| SystemTime::now().duration_since(then).ok()).unwrap_or_default()
}

/// All snapshots, the oldest first.
pub fn views(family: &Family, usage: &Usage) -> Vec<View> {
    let mut views: Vec<_> = family.snapshots.iter().map(|listed| View::of(listed, usage)).collect();
    views.sort_by_key(|view| (view.created, view.name()));
    views
}

/// Refuses the name of a machine that is not there and has left no snapshots.
pub fn check_machine(machine: &Name, family: &Family, views: &[View]) -> Result<(), Failure> {
    let there = family.machines.iter().any(|(name, _)| name == machine);
    if there || views.iter().any(|view| view.is_of(machine)) {
        return Ok(());
    }
    let failure = Failure::new(Code::NotFound, format!("there is no machine {machine}, and no snapshot of one"));
    Err(failure.hint("catnap snapshot ls"))
}
