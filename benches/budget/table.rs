//! The printed table: a line for each figure, with its floor, its ratio and its goal.

use std::fmt;
use std::time::Duration;

/// What a part of the bench has measured.
#[derive(Default)]
pub struct Figures {
    pub lines: Vec<Line>,
    pub pairs: Vec<Pair>,
}

impl From<Vec<Line>> for Figures {
    fn from(lines: Vec<Line>) -> Self {
        Self { lines, pairs: Vec::new() }
    }
}

/// The same work, done by the Python module and by this crate.
pub struct Pair {
    pub what: String,
    pub python: Amount,
    pub ours: Amount,
}

/// A figure.
pub struct Line {
    pub what: String,
    /// The least that the same work can cost, measured in the same run.
    pub floor: Option<Amount>,
    pub measured: Amount,
    pub goal: Goal,
}

#[derive(Clone, Copy)]
pub enum Amount {
    Time(Duration),
    Bytes(f64),
    Megabytes(f64),
    Count(f64),
    PerSecond(f64),
}

/// The goal of a figure.
#[derive(Clone, Copy)]
pub enum Goal {
    /// The figure has no goal.
    None,
    AtMost(Amount),
    /// At most this amount above its floor.
    AtMostAbove(Amount),
    /// At most this multiple of its floor.
    AtMostTimes(f64),
    /// At least this multiple of its floor.
    AtLeastTimes(f64),
}

impl Line {
    fn ratio(&self) -> Option<f64> {
        let floor = self.floor?.value();
        (floor > 0.0).then(|| self.measured.value() / floor)
    }

    pub fn is_met(&self) -> bool {
        let measured = self.measured.value();
        let floor = self.floor.map_or(0.0, Amount::value);
        match self.goal {
            Goal::None => true,
            Goal::AtMost(most) => measured <= most.value(),
            Goal::AtMostAbove(most) => measured - floor <= most.value(),
            Goal::AtMostTimes(most) => measured <= most * floor,
            Goal::AtLeastTimes(least) => measured >= least * floor,
        }
    }

    /// `met` or `MISSED`. Empty without a goal.
    fn result(&self) -> &'static str {
        match (self.goal, self.is_met()) {
            (Goal::None, _) => "",
            (_, true) => "met",
            (_, false) => "MISSED",
        }
    }

    /// The line as a sentence. `None`: the figure has no goal.
    pub fn in_words(&self) -> Option<String> {
        if matches!(self.goal, Goal::None) {
            return None;
        }
        let of_floor = self
            .floor
            .zip(self.ratio())
            .map(|(floor, ratio)| format!(", {ratio:.2} × its floor of {floor}"));
        Some(format!(
            "{}: {}: {}{}; the goal is {}",
            self.result(),
            self.what,
            self.measured,
            of_floor.unwrap_or_default(),
            self.goal
        ))
    }

    fn cells(&self) -> [String; 6] {
        [
            self.what.clone(),
            self.floor.map_or_else(String::new, |floor| floor.to_string()),
            self.measured.to_string(),
            self.ratio().map_or_else(String::new, |ratio| format!("{ratio:.2} ×")),
            self.goal.to_string(),
            self.result().to_owned(),
        ]
    }
}

impl Amount {
    fn value(self) -> f64 {
        match self {
            Self::Time(time) => time.as_secs_f64(),
            Self::Bytes(value)
            | Self::Megabytes(value)
            | Self::Count(value)
            | Self::PerSecond(value) => value,
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(time) if *time < Duration::from_micros(10) => {
                write!(f, "{} ns", time.as_nanos())
            }
            Self::Time(time) if *time < Duration::from_millis(1) => {
                write!(f, "{:.0} µs", time.as_secs_f64() * 1e6)
            }
            Self::Time(time) if *time < Duration::from_millis(100) => {
                write!(f, "{:.2} ms", time.as_secs_f64() * 1e3)
            }
            Self::Time(time) => write!(f, "{:.0} ms", time.as_secs_f64() * 1e3),
            Self::Bytes(bytes) => write!(f, "{bytes:.0} B"),
            Self::Megabytes(megabytes) => write!(f, "{megabytes:.1} MB"),
            Self::Count(count) if count.fract() == 0.0 => write!(f, "{count}"),
            Self::Count(count) => write!(f, "{count:.2}"),
            Self::PerSecond(rate) => write!(f, "{rate:.0}/s"),
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::AtMost(most) if most.value() == 0.0 => write!(f, "0"),
            Self::AtMost(most) => write!(f, "at most {most}"),
            Self::AtMostAbove(most) => write!(f, "at most {most} above"),
            Self::AtMostTimes(most) => write!(f, "at most {most} ×"),
            Self::AtLeastTimes(least) => write!(f, "at least {least} ×"),
        }
    }
}

/// Prints the figures as Markdown tables, as in `src/docs/figures.md`.
pub fn print(figures: &Figures) {
    let head = ["what", "floor, same run", "measured", "ratio", "goal", ""];
    print_rows(head, figures.lines.iter().map(Line::cells).collect());
    let ratio = |pair: &Pair| format!("{:.1} ×", pair.python.value() / pair.ours.value());
    let cells = |pair: &Pair| {
        [pair.what.clone(), pair.python.to_string(), pair.ours.to_string(), ratio(pair)]
    };
    let head =
        ["compared with the Python module", "decnet.agent.heartbeat 1.0.0", "this crate", "ratio"];
    print_rows(head, figures.pairs.iter().map(cells).collect());
}

fn print_rows<const COLUMNS: usize>(head: [&str; COLUMNS], mut rows: Vec<[String; COLUMNS]>) {
    if rows.is_empty() {
        return;
    }
    rows.insert(0, head.map(str::to_owned));
    let widths: [usize; COLUMNS] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
    });
    rows.insert(1, widths.map(|width| "-".repeat(width)));
    println!();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("| {} |", cells.join(" | "));
    }
}

/// The time that is longer than this percentage of the times.
pub fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort();
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}
