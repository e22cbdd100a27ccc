//! No delta is ever lost: processes that are killed at random moments, a master that is stopped or
//! fails during requests, two users, files that are replaced, and a million pushes without a
//! master.
//!
//! `cargo test --test crash` runs a tenth of each test, and `-- --include-ignored` all of it: 300
//! kills and a million pushes. `-- NAME` runs the tests whose name contains it. A longer run, which
//! can be repeated: `-- kill --kills 5000 --seed 42`. The program has a `main` of its own because
//! it starts itself: with `--child` it is the process that is killed.
//!
//! `users` needs root and is skipped without it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test that cannot continue panics, also if it cannot print"
)]

mod child;
mod child_reports;
mod crash_test;
mod kill;
mod million;
mod programs;
mod received_deltas;
mod rewritten;
#[allow(dead_code, unused_imports, reason = "no test program uses all helpers")]
#[path = "../support/mod.rs"]
mod support;
mod users;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::Instant;

struct Test {
    name: &'static str,
    /// Returns figures. Panics if a delta is lost.
    run: fn(&Options) -> String,
}

/// In this order, because `million` measures its memory, and the other tests use some.
const TESTS: [Test; 6] = [
    Test { name: "million", run: million::million },
    Test { name: "kill", run: kill::kill },
    Test { name: "faults", run: kill::faults },
    Test { name: "programs", run: programs::programs },
    Test { name: "users", run: users::users },
    Test { name: "rewritten", run: rewritten::rewritten },
];

/// The options on the command line, except for those of libtest.
struct Options {
    /// The number of kills in `kill`. `faults` has a fifth of it, and `programs` and `users` have
    /// as many rounds as `faults` has kills.
    kills: u32,
    /// The number of rounds in `rewritten`.
    rounds: u32,
    /// The number of pushes in `million`.
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
    let mut code = ExitCode::SUCCESS;
    for Test { name, run } in TESTS.into_iter().filter(|test| options.includes(test)) {
        if options.list {
            println!("{name}: test");
            continue;
        }
        fastrand::seed(options.seed);
        let since = Instant::now();
        match catch_unwind(|| run(&options)) {
            Ok(figures) => {
                println!("crash {name} ... ok: {figures}, {:.1} s", since.elapsed().as_secs_f64());
            }
            Err(_) => {
                println!("crash {name} ... FAILED, repeat it with --seed {}", options.seed);
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

impl Options {
    /// Ignores the options that libtest has and this program has not, such as `--include-ignored`
    /// and `--nocapture`.
    fn parse(arguments: &[String]) -> Self {
        let is_full = arguments
            .iter()
            .any(|argument| argument == "--include-ignored" || argument == "--ignored");
        let mut options = Self {
            kills: if is_full { 300 } else { 30 },
            rounds: if is_full { 300 } else { 30 },
            pushes: if is_full { 1_000_000 } else { 100_000 },
            seed: fastrand::u64(..),
            names: Vec::new(),
            list: false,
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut number = || {
                let text = arguments.next();
                text.and_then(|text| text.parse().ok()).expect("a number after the option")
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

    fn includes(&self, test: &Test) -> bool {
        self.names.is_empty() || self.names.iter().any(|part| test.name.contains(part.as_str()))
    }

    /// A fifth of the kills, and at least one.
    fn fifth_of_kills(&self) -> u32 {
        (self.kills / 5).max(1)
    }
}
