//! The table of faults: what can go wrong around a heartbeat, and what is right then. A row is a test and has a name:
//! where it happens, and what.
//!
//! `cargo test --test faults` runs those that need nothing but Rust and OpenSSL's command line, `-- --include-ignored` all
//! of them, `-- tls/` a part, `-- --list` none. Each row has a process of its own that embeds the library (`subject`), a
//! loopback master, the network between them (`gate`) and a Docker socket; one driver (`row`) plays the rows that are
//! data. It is a program of its own since it starts itself: with `--subject` it is the process under test.
//!
//! `-- soak --ignored` plays them at random for two minutes, `-- soak --ignored --hours 2` for two hours of simulated time,
//! with `--seed N` in the same order again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test that cannot go on fails there and then, also one that cannot print"
)]

mod answer;
mod connection;
mod credentials;
mod docker;
mod files;
mod gate;
mod hardening;
mod log;
mod network;
mod process;
mod row;
mod soak;
mod source;
mod stage;
mod subject;
mod tls;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use row::Row;

/// Rows spend their time waiting, so many more go on at once than there are cores.
const AT_ONCE: usize = 12;

/// Rows that are no data.
const OTHERS: [(&str, fn()); 23] = [
    ("hardening/the_unit_keeps_trying", hardening::the_unit_keeps_trying),
    ("answer/extra_bytes_are_not_the_next_answer", answer::extra_bytes_are_not_the_next_answer),
    ("credentials/rotated", credentials::rotated),
    ("credentials/a_new_uuid", credentials::a_new_uuid),
    ("network/ticks_do_not_pile_up", network::ticks_do_not_pile_up),
    ("source/panics", source::panics),
    ("source/panics_every_second_time", source::panics_every_second_time),
    (
        "source/panics_with_a_payload_that_panics_when_it_is_dropped",
        source::panics_with_a_stubborn_payload,
    ),
    ("source/never_returns", source::never_returns),
    ("source/returns_50_mb", source::returns_50_mb),
    ("source/answers_while_a_post_takes_its_time", source::answers_while_a_post_takes_its_time),
    ("process/suspended_and_resumed", process::suspended_and_resumed),
    ("process/all_senders_dropped", process::all_senders_dropped),
    ("process/a_thread_cannot_be_spawned", process::a_thread_cannot_be_spawned),
    ("process/stop_while_the_outbox_is_locked", process::stop_while_the_outbox_is_locked),
    ("process/drop_without_stop", process::drop_without_stop),
    ("process/two_heartbeats_in_one_process", process::two_heartbeats_in_one_process),
    ("process/two_heartbeats_in_two_processes", process::two_heartbeats_in_two_processes),
    (
        "hardening/no_variable_of_the_environment_is_obeyed",
        hardening::no_variable_of_the_environment_is_obeyed,
    ),
    (
        "log/repeated_failures_are_said_ever_more_rarely",
        log::repeated_failures_are_said_ever_more_rarely,
    ),
    ("log/a_logger_that_panics_costs_nothing_but_its_lines", log::a_logger_that_panics),
    ("log/hostile_text_stays_text", log::hostile_text_stays_text),
    ("log/no_key_is_in_any_debug_text", log::no_key_is_in_any_debug_text),
];

/// Rows that take a minute, or a Debian package.
const IGNORED: [(&str, fn()); 6] = [
    ("source/returns_after_a_minute", source::returns_after_a_minute),
    ("process/wall_clock_jumps_ten_years", process::wall_clock_jumps_ten_years),
    ("hardening/the_unit_is_sound_and_tight", hardening::the_unit_is_sound_and_tight),
    ("hardening/the_drop_in_binds_it_to_the_agent", hardening::the_drop_in_binds_it_to_the_agent),
    (
        "hardening/the_drop_ins_for_another_users_folder_are_sound_and_tight",
        hardening::the_drop_ins_for_another_users_folder_are_sound_and_tight,
    ),
    ("soak", soak::soak),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, option, setup] = arguments.as_slice()
        && option == "--subject"
    {
        subject::run(setup);
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_iter(soak::take_options(arguments));
    arguments.test_threads = arguments.test_threads.or(Some(AT_ONCE));
    libtest_mimic::run(&arguments, trials()).exit_code()
}

/// The rows that are data.
const TABLES: [fn() -> Vec<Row>; 8] = [
    network::rows,
    answer::rows,
    connection::rows,
    tls::rows,
    credentials::rows,
    docker::rows,
    files::rows,
    process::rows,
];

fn trials() -> Vec<Trial> {
    let rows = TABLES.into_iter().flat_map(|table| table());
    let named = |name: String, play: Box<dyn FnOnce() + Send>| {
        Trial::test(name, move || {
            play();
            Ok(())
        })
    };
    let played = rows.map(|row| named(row.name.clone(), Box::new(move || row.play())));
    let other = |(name, test): (&str, fn())| named(name.to_owned(), Box::new(test));
    played
        .chain(OTHERS.into_iter().map(other))
        .chain(IGNORED.into_iter().map(|it| other(it).with_ignored_flag(true)))
        .collect()
}
