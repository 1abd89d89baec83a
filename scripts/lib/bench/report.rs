//! The figures, for people and for programs.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::Result;

/// One thing that is measured.
pub struct Row {
    key: &'static str,
    title: &'static str,
    goal: Goal,
}

/// What Catnap's figure should be.
#[derive(Clone, Copy)]
pub enum Goal {
    /// Nothing in particular.
    None,
    /// Not more than this.
    AtMost(f64),
    /// Not more than this part of a peer's figure.
    Ratio(f64),
}

impl Row {
    /// A thing by its name for programs and for people.
    pub const fn new(key: &'static str, title: &'static str, goal: Goal) -> Row {
        Row { key, title, goal }
    }
}

/// What was measured of one monitor.
pub struct Column {
    name: String,
    /// One for each run, each with a figure for each row; `None` for what the monitor cannot do.
    pub samples: Vec<Vec<Option<f64>>>,
}

impl Column {
    /// A column that is empty still.
    pub fn new(name: &str) -> Column {
        Column { name: name.into(), samples: Vec::new() }
    }
}

/// One table.
pub struct Section {
    /// The part of the benchmark.
    pub part: &'static str,
    /// What it is about, for people.
    pub title: String,
    /// The guest's memory, in bytes.
    pub memory: u64,
    /// How many guests at a time.
    pub guests: u32,
    /// What was measured.
    pub rows: &'static [Row],
    /// Of whom; Catnap first.
    pub columns: Vec<Column>,
}

/// A time in milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What is said of many figures.
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of(mut figures: Vec<f64>) -> Option<Spread> {
        figures.sort_by(f64::total_cmp);
        let middle = figures.len() / 2;
        let (least, most) = (*figures.first()?, *figures.last()?);
        let median = match figures.len() % 2 {
            0 => (figures[middle - 1] + figures[middle]) / 2.0,
            _ => figures[middle],
        };
        Some(Spread { median, least, most })
    }
}

impl Column {
    fn figures(&self, row: usize) -> Vec<f64> {
        self.samples.iter().filter_map(|sample| sample.get(row).copied().flatten()).collect()
    }
}

/// Tables: a line for each thing that was measured, a column for each monitor; behind those of the peers, what
/// part of the peer's figure Catnap's is.
pub fn tables(command_line: &str, sections: &[Section]) -> Result<()> {
    println!("kernel command line: {command_line}");
    println!("1 vCPU each; medians (least – most)");
    sections.iter().for_each(table);
    Ok(())
}

fn table(section: &Section) {
    println!("\n{}", section.title);
    print!("{:32}", "");
    section.columns.iter().enumerate().for_each(|(i, column)| {
        print!("{:>29}{}", column.name, if i == 0 { "" } else { "   ratio" });
    });
    println!("   goal");
    for (n, row) in section.rows.iter().enumerate() {
        print!("{:32}", row.title);
        let ours = Spread::of(section.columns[0].figures(n)).map(|spread| spread.median);
        for (i, column) in section.columns.iter().enumerate() {
            let theirs = Spread::of(column.figures(n));
            match &theirs {
                Some(Spread { median, least, most }) => {
                    print!("{median:>10.1} {:>18}", format!("({least:.1} – {most:.1})"))
                }
                None => print!("{:>29}", "–"),
            }
            if i > 0 {
                let ratio = ours.zip(theirs).map(|(ours, theirs)| format!("{:.3}", ours / theirs.median));
                print!("{:>8}", ratio.unwrap_or_default());
            }
        }
        println!(
            "{}",
            match row.goal {
                Goal::None => String::new(),
                Goal::AtMost(most) => format!("   ≤ {most}"),
                Goal::Ratio(most) => format!("   ratio ≤ {most}"),
            }
        );
    }
}

/// Everything, down to the single figure.
pub fn json(command_line: &str, sections: &[Section]) -> Result<()> {
    let of_column = |section: &Section, column: &Column| -> Value {
        let rows = section.rows.iter().enumerate().filter_map(|(n, row)| {
            let all = column.figures(n);
            let Spread { median, least, most } = Spread::of(all.clone())?;
            Some((row.key.to_owned(), json!({ "median": median, "min": least, "max": most, "all": all })))
        });
        rows.collect::<Map<_, _>>().into()
    };
    let of_section = |section: &Section| {
        let monitors = section.columns.iter().map(|column| (column.name.clone(), of_column(section, column)));
        json!({
            "part": section.part,
            "cpus": 1,
            "memory_bytes": section.memory,
            "guests": section.guests,
            "monitors": monitors.collect::<Map<_, _>>(),
        })
    };
    let sections: Vec<_> = sections.iter().map(of_section).collect();
    let report = json!({ "command_line": command_line, "parts": sections });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
