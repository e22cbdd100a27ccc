//! Measures what the crate costs, and prints each figure with its floor and its goal. The floor is
//! the least that the same work can cost, measured in the same run.
//!
//! `cargo bench` measures everything in about ten minutes. `cargo bench -- post idle` measures some
//! parts. Linux only. Some parts need a Docker Engine (root, Debian's `docker.io` and
//! `busybox-static`) or the Python module (`tests/e2e/setup.sh`). The output ends with the parts
//! that could not be measured and with the number of missed goals.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench that cannot continue panics"
)]

mod body;
mod containers;
mod disk;
mod fleet;
mod floor;
mod hand_over;
mod outbox;
mod peers;
mod pipe;
mod post;
mod process;
mod push;
mod relay;
#[allow(dead_code, unused_imports, reason = "the benches use a part of it")]
#[path = "../../tests/e2e/support/mod.rs"]
mod support;
mod table;

use std::process::ExitCode;
use std::time::Duration;

use table::{Figures, Line};

/// Longer than any step takes. Reaching it is a failure.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A part of the table.
struct Part {
    /// Its name on the command line.
    name: &'static str,
    /// The error names what is missing on this machine.
    measure: fn() -> Result<Figures, String>,
}

const PARTS: [Part; 11] = [
    Part { name: "post", measure: post::measure },
    Part { name: "push", measure: push::measure },
    Part { name: "hung", measure: push::measure_with_hung_docker },
    Part { name: "pipe", measure: pipe::measure },
    Part { name: "hand-over", measure: hand_over::measure },
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
            "--agent" => {
                peers::run_agent(setup);
                return ExitCode::SUCCESS;
            }
            "--embedded" => process::run_idle_agent(setup),
            _ => (),
        }
    }
    // Cargo adds this argument.
    arguments.retain(|argument| argument != "--bench");
    if let Some(unknown) =
        arguments.iter().find(|name| PARTS.iter().all(|part| part.name != **name))
    {
        let names = PARTS.map(|part| part.name).join(", ");
        eprintln!("unknown part {unknown}; the parts are {names}");
        return ExitCode::FAILURE;
    }
    let mut all = Figures::default();
    let mut unmeasured = Vec::new();
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
            Err(needs) => unmeasured.push(format!("{}: not measured: needs {needs}", part.name)),
        }
    }
    table::print(&all);
    unmeasured.iter().for_each(|line| println!("{line}"));
    println!();
    all.lines.iter().filter_map(Line::in_words).for_each(|words| println!("{words}"));
    println!("goals missed: {}", all.lines.iter().filter(|line| !line.is_met()).count());
    ExitCode::SUCCESS
}
