//! No delta is ever lost: processes that are killed at random moments, a master that is taken away or fails in the middle
//! of requests, two users, files that are replaced, and a million pushes that nobody hears.
//!
//! `cargo test --test crash` runs a tenth of each, `-- --include-ignored` the whole: 300 kills and a million pushes. `-- NAME`
//! runs those whose name contains it. A longer run, and the same one again: `-- kill --kills 5000 --seed 42`. It is a
//! program of its own since it kills itself: started with `--child`, it is the process that dies.
//!
//! `users` takes root, and is passed over without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test that cannot go on fails there and then, also one that cannot print"
)]

mod child;
mod crash;
mod million;
mod programs;
mod rewritten;
mod told;
mod users;
mod verdict;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::Instant;

struct Scenario {
    name: &'static str,
    /// Gives its figures, and panics where a promise is broken.
    run: fn(&Options) -> String,
}

/// In this order: the first one looks at its memory, which the others fill.
const SCENARIOS: [Scenario; 6] = [
    Scenario { name: "million", run: million::million },
    Scenario { name: "kill", run: crash::kill },
    Scenario { name: "faults", run: crash::faults },
    Scenario { name: "programs", run: programs::programs },
    Scenario { name: "users", run: users::users },
    Scenario { name: "rewritten", run: rewritten::rewritten },
];

/// The command line, as far as it is not libtest's.
struct Options {
    /// SIGKILLs of `kill`; `faults` has a fifth of them, and `programs` and `users` that many rounds.
    kills: u32,
    /// Rounds of `rewritten`.
    rounds: u32,
    /// Pushes of `million`.
    pushes: u32,
    seed: u64,
    names: Vec<String>,
    list: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--child") {
        child::run(&arguments[1..]);
        return ExitCode::SUCCESS;
    }
    let options = Options::parse(&arguments);
    let names = &options.names;
    let wanted = |scenario: &Scenario| {
        names.is_empty() || names.iter().any(|part| scenario.name.contains(part.as_str()))
    };
    let mut code = ExitCode::SUCCESS;
    for Scenario { name, run, .. } in SCENARIOS.into_iter().filter(wanted) {
        if options.list {
            println!("{name}: test");
            continue;
        }
        fastrand::seed(options.seed);
        let since = Instant::now();
        match catch_unwind(|| run(&options)) {
            Ok(figures) => {
                println!("loss {name} ... ok: {figures}, {:.1} s", since.elapsed().as_secs_f64())
            }
            Err(_) => {
                println!("loss {name} ... FAILED, again with: --seed {}", options.seed);
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

impl Options {
    /// What libtest would understand and we do not (`--include-ignored`, `--nocapture`, …) is passed over.
    fn parse(arguments: &[String]) -> Self {
        let whole = arguments
            .iter()
            .any(|argument| argument == "--include-ignored" || argument == "--ignored");
        let (kills, rounds, pushes) = if whole { (300, 300, 1_000_000) } else { (30, 30, 100_000) };
        let mut options =
            Self { kills, rounds, pushes, seed: fastrand::u64(..), names: Vec::new(), list: false };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut number = || {
                arguments
                    .next()
                    .and_then(|text| text.parse().ok())
                    .expect("a number after the option")
            };
            match argument.as_str() {
                "--kills" => options.kills = u32::try_from(number()).unwrap(),
                "--rounds" => options.rounds = u32::try_from(number()).unwrap(),
                "--pushes" => options.pushes = u32::try_from(number()).unwrap(),
                "--seed" => options.seed = number(),
                "--test-threads" | "--format" | "--color" | "--skip" => drop(arguments.next()),
                "--list" => options.list = true,
                option if option.starts_with('-') => (),
                name => options.names.push(name.to_owned()),
            }
        }
        options
    }
}
