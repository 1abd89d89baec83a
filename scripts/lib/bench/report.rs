//! The figures, for people and for programs.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::Result;
use crate::boot::Sample;
use crate::monitor::Guest;

/// What was measured of one monitor.
pub struct Column {
    name: String,
    /// One for each run.
    pub samples: Vec<Sample>,
}

impl Column {
    /// A column that is empty still.
    pub fn new(name: &str) -> Column {
        Column { name: name.into(), samples: Vec::new() }
    }
}

/// One thing that is measured.
struct Row {
    key: &'static str,
    title: &'static str,
    /// The largest figure that Catnap's own goal allows; for times, on a host with real KVM.
    goal: Option<f64>,
    of: fn(&Sample) -> f64,
}

const ROWS: [Row; 5] = [
    Row { key: "first_line_ms", title: "guest's first line, ms", goal: None, of: |s| ms(s.first_line) },
    Row { key: "page_ms", title: "first page (HTTP 200), ms", goal: None, of: |s| ms(s.page) },
    Row { key: "control_ms", title: "control socket answers, ms", goal: None, of: |s| ms(s.control) },
    Row { key: "control_cpu_ms", title: "CPU time until then, ms", goal: Some(8.0), of: |s| ms(s.cpu) },
    Row { key: "memory_mib", title: "monitor's own memory, MiB", goal: Some(5.0), of: |s| s.memory as f64 / 1048576.0 },
];

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What is said of many figures.
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of(mut figures: Vec<f64>) -> Spread {
        figures.sort_by(f64::total_cmp);
        let middle = figures.len() / 2;
        let median = match figures.len() % 2 {
            0 => (figures[middle - 1] + figures[middle]) / 2.0,
            _ => figures[middle],
        };
        Spread { median, least: figures[0], most: figures[figures.len() - 1] }
    }
}

fn spread(row: &Row, column: &Column) -> Spread {
    Spread::of(column.samples.iter().map(row.of).collect())
}

/// A table: a line for each thing that was measured, a column for each monitor; behind those of the peers,
/// what part of the peer's figure Catnap's is.
pub fn table(guest: &Guest, columns: &[Column]) -> Result<()> {
    println!("1 vCPU, {} of memory, medians of {} runs (least – most)", guest.memory, columns[0].samples.len());
    println!("kernel command line: {}\n", guest.command_line);
    print!("{:28}", "");
    columns.iter().enumerate().for_each(|(i, column)| {
        print!("{:>27}{}", column.name, if i == 0 { "" } else { "  ratio" });
    });
    println!("   goal");
    for row in &ROWS {
        print!("{:28}", row.title);
        let ours = spread(row, &columns[0]).median;
        for (i, column) in columns.iter().enumerate() {
            let Spread { median, least, most } = spread(row, column);
            print!("{median:>9.1} {:>17}", format!("({least:.1} – {most:.1})"));
            if i > 0 {
                print!("{:>7.2}", ours / median);
            }
        }
        println!("{}", row.goal.map_or(String::new(), |goal| format!("{:>7}", format!("≤ {goal}"))));
    }
    Ok(())
}

/// Everything, down to the single figure.
pub fn json(guest: &Guest, columns: &[Column]) -> Result<()> {
    let of_column = |column: &Column| -> Value {
        let rows = ROWS.iter().map(|row| {
            let Spread { median, least, most } = spread(row, column);
            let all: Vec<_> = column.samples.iter().map(row.of).collect();
            (row.key.to_owned(), json!({ "median": median, "min": least, "max": most, "all": all }))
        });
        rows.collect::<Map<_, _>>().into()
    };
    let monitors: Map<_, _> = columns.iter().map(|column| (column.name.clone(), of_column(column))).collect();
    let report = json!({
        "cpus": 1,
        "memory_bytes": guest.memory.bytes(),
        "command_line": guest.command_line,
        "monitors": monitors,
    });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
