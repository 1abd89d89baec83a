//! Showing which secrets are in a snapshot.

use crate::archive::secrets::{self, Report, WANTED};
use crate::cli::home::House;
use crate::cli::ui;
use crate::control::Failure;
use crate::store::Snapshot;

/// The heading of a table of [`rows`].
pub const HEADING: [&str; 5] = ["SNAPSHOT", "KIND", "WHAT", "TIMES", "WHERE"];

/// A string to search for, of a length that makes sense.
pub fn wanted(text: &str) -> Result<String, String> {
    match WANTED.contains(&text.len()) {
        true => Ok(text.into()),
        false => {
            Err(format!("it has {} bytes, and {} to {} can be searched for", text.len(), WANTED.start(), WANTED.end()))
        }
    }
}

/// Searches a snapshot, and shows how far that is.
pub fn scan(house: &House, name: &str, snapshot: &Snapshot, wanted: &[String]) -> Result<Report, Failure> {
    let progress = ui::Progress::begin(format!("Searching {name} for secrets"));
    let report = secrets::scan(house.store(), snapshot, wanted, &mut |now| {
        progress.count(format!("Searching {name} for secrets: {}", now.what), now.done, now.total);
    })?;
    Ok(report)
}

/// A row for each secret.
pub fn rows(name: &str, report: &Report) -> Vec<Vec<String>> {
    let plain = |text: &str| ui::harmless(text.as_bytes()).replace(['\n', '\t'], " ");
    let row = |finding: &secrets::Finding| {
        let mut places: Vec<String> = finding.places.iter().map(|place| plain(&place.to_string())).collect();
        if finding.count > finding.places.len() as u64 {
            places.push("…".into());
        }
        vec![name.into(), finding.kind.into(), plain(&finding.shown), finding.count.to_string(), places.join(", ")]
    };
    let mut rows: Vec<_> = report.findings.iter().map(row).collect();
    if report.more > 0 {
        rows.push(vec![name.into(), "more".into(), "too many to tell".into(), report.more.to_string(), "-".into()]);
    }
    rows
}
