//! What it costs, beside what it cannot cost less than: each figure of the promise "it is hardly there" stands in one
//! table with its floor, measured in the same run, and its goal.
//!
//! `cargo bench` measures all of it, in about ten minutes; `cargo bench -- post idle` measures some. Linux only. What needs
//! a Docker Engine of its own (root, Debian's `docker.io` and `busybox-static`) or the Python module (`tests/e2e/setup.sh`)
//! is named at the end where it could not be measured, and so is the number of goals that were missed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench that cannot go on fails there and then, also one that cannot print"
)]

mod body;
mod containers;
mod disk;
mod fleet;
mod floor;
mod outbox;
mod peers;
mod pipe;
mod post;
mod process;
mod push;
mod relay;
#[allow(dead_code, unused_imports, reason = "the tests against real peers use all of it")]
#[path = "../../tests/e2e/support/mod.rs"]
mod support;
mod table;

use std::process::ExitCode;
use std::time::Duration;

use table::{Figures, Line};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A part of the table, by the name that asks for it.
struct Part {
    name: &'static str,
    /// An error says what it needs that is not there.
    measure: fn() -> Result<Figures, String>,
}

const PARTS: [Part; 10] = [
    Part { name: "post", measure: post::measure },
    Part { name: "push", measure: push::measure },
    Part { name: "hung", measure: push::measure_hung },
    Part { name: "pipe", measure: pipe::measure },
    Part { name: "outbox", measure: outbox::measure },
    Part { name: "body", measure: body::measure },
    Part { name: "idle", measure: process::measure },
    Part { name: "threads", measure: process::measure_threads },
    Part { name: "fleet", measure: fleet::measure },
    Part { name: "containers", measure: containers::measure },
];

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [option, setup] = arguments.as_slice() {
        match option.as_str() {
            "--subject" => {
                peers::obey(setup);
                return ExitCode::SUCCESS;
            }
            "--embedded" => process::embed(setup),
            _ => (),
        }
    }
    // Cargo's own.
    arguments.retain(|argument| argument != "--bench");
    if let Some(unknown) =
        arguments.iter().find(|name| PARTS.iter().all(|part| part.name != **name))
    {
        eprintln!("there is no part {unknown}: {}", PARTS.map(|part| part.name).join(", "));
        return ExitCode::FAILURE;
    }
    let (mut all, mut unmeasured) = (Figures::default(), Vec::new());
    for part in PARTS
        .iter()
        .filter(|part| arguments.is_empty() || arguments.iter().any(|name| name == part.name))
    {
        eprintln!("measuring: {}", part.name);
        match (part.measure)() {
            Ok(figures) => {
                all.lines.extend(figures.lines);
                all.pairs.extend(figures.pairs);
            }
            Err(needs) => unmeasured.push(format!("{}: not measured, it needs {needs}", part.name)),
        }
    }
    table::print(&all);
    unmeasured.iter().for_each(|line| println!("{line}"));
    println!();
    all.lines.iter().filter_map(Line::in_words).for_each(|words| println!("{words}"));
    println!("goals missed: {}", all.lines.iter().filter(|line| !line.is_met()).count());
    ExitCode::SUCCESS
}
