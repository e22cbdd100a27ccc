//! The table of faults: what can go wrong around a heartbeat, and what is expected then. Each row
//! is a test. Its name consists of the place of the fault and the fault.
//!
//! `cargo test --test faults` runs the rows that need only Rust and the `openssl` command.
//! `-- --include-ignored` runs all of them, `-- tls/` a part, and `-- --list` shows their names.
//! Each row starts a process that embeds the library (`agent`), a loopback master, a TCP proxy
//! between them and a Docker socket. One driver (`fault_case`) runs the rows that are data. The
//! program has a `main` of its own because it starts itself: with `--agent` it is the process under
//! test.
//!
//! `-- soak --ignored` injects faults in random order for two minutes, and with `--hours 2` for two
//! hours of simulated time. `--seed N` repeats an order.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test that cannot continue panics, also if it cannot print"
)]

mod agent;
mod agent_process;
mod answer;
mod connection;
mod credentials;
mod docker;
mod fault_case;
mod files;
mod hardening;
mod log;
mod network;
mod process;
mod soak;
mod source;
#[allow(dead_code, unused_imports, reason = "no test program uses all helpers")]
#[path = "../support/mod.rs"]
mod support;
mod tcp_proxy;
mod test_bed;
mod tls;

use std::process::ExitCode;

use fault_case::FaultCase;
use libtest_mimic::{Arguments, Trial};

/// The number of rows that run at the same time. It is larger than the number of cores, because
/// rows spend most of their time waiting.
const CONCURRENT_ROWS: usize = 12;

/// The rows that are data.
const TABLES: [fn() -> Vec<FaultCase>; 8] = [
    network::cases,
    answer::cases,
    connection::cases,
    tls::cases,
    credentials::cases,
    docker::cases,
    files::cases,
    process::cases,
];

/// The rows that are functions.
const FUNCTIONS: [(&str, fn()); 23] = [
    (
        "hardening/unit_restarts_except_for_exit_code_78",
        hardening::unit_restarts_except_for_exit_code_78,
    ),
    (
        "answer/extra_bytes_are_not_read_as_next_answer",
        answer::extra_bytes_are_not_read_as_next_answer,
    ),
    (
        "credentials/renewed_certificate_is_used_for_next_beat",
        credentials::renewed_certificate_is_used_for_next_beat,
    ),
    ("credentials/new_uuid_is_read_with_new_bundle", credentials::new_uuid_is_read_with_new_bundle),
    ("network/ticks_do_not_pile_up", network::ticks_do_not_pile_up),
    ("source/panics_do_not_stop_beats", source::panics_do_not_stop_beats),
    ("source/snapshots_between_panics_are_sent", source::snapshots_between_panics_are_sent),
    (
        "source/panic_payload_that_panics_on_drop_is_contained",
        source::panic_payload_that_panics_on_drop_is_contained,
    ),
    ("source/blocked_source_is_not_called_again", source::blocked_source_is_not_called_again),
    (
        "source/status_of_50_mb_is_replaced_by_an_error",
        source::status_of_50_mb_is_replaced_by_an_error,
    ),
    (
        "source/snapshot_that_aged_during_a_post_is_not_sent",
        source::snapshot_that_aged_during_a_post_is_not_sent,
    ),
    ("process/suspension_causes_no_burst", process::suspension_causes_no_burst),
    ("process/dropped_senders_cause_no_wakeups", process::dropped_senders_cause_no_wakeups),
    ("process/failed_thread_start_is_an_error", process::failed_thread_start_is_an_error),
    (
        "process/stop_is_bounded_while_outbox_is_locked",
        process::stop_is_bounded_while_outbox_is_locked,
    ),
    ("process/drop_is_bounded_and_loses_no_delta", process::drop_is_bounded_and_loses_no_delta),
    (
        "process/second_heartbeat_in_same_process_is_refused",
        process::second_heartbeat_in_same_process_is_refused,
    ),
    (
        "process/second_heartbeat_in_other_process_is_refused",
        process::second_heartbeat_in_other_process_is_refused,
    ),
    ("hardening/environment_variables_are_ignored", hardening::environment_variables_are_ignored),
    (
        "log/repeated_failures_are_logged_at_a_decreasing_rate",
        log::repeated_failures_are_logged_at_a_decreasing_rate,
    ),
    ("log/panicking_logger_loses_only_its_lines", log::panicking_logger_loses_only_its_lines),
    ("log/hostile_text_is_escaped", log::hostile_text_is_escaped),
    ("log/debug_output_contains_no_key", log::debug_output_contains_no_key),
];

/// The rows that take a minute, or need a Debian package.
const IGNORED: [(&str, fn()); 6] = [
    ("source/late_snapshot_is_sent_in_its_own_beat", source::late_snapshot_is_sent_in_its_own_beat),
    (
        "process/clock_jump_affects_only_certificate_checks",
        process::clock_jump_affects_only_certificate_checks,
    ),
    ("hardening/unit_passes_systemd_analyze", hardening::unit_passes_systemd_analyze),
    ("hardening/drop_in_binds_unit_to_agent", hardening::drop_in_binds_unit_to_agent),
    (
        "hardening/drop_ins_for_another_user_pass_systemd_analyze",
        hardening::drop_ins_for_another_user_pass_systemd_analyze,
    ),
    ("soak", soak::soak),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, option, settings] = arguments.as_slice()
        && option == "--agent"
    {
        agent::run(settings);
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_iter(soak::take_options(arguments));
    arguments.test_threads = arguments.test_threads.or(Some(CONCURRENT_ROWS));
    libtest_mimic::run(&arguments, trials()).exit_code()
}

fn trials() -> Vec<Trial> {
    let trial = |name: String, run: Box<dyn FnOnce() + Send>| {
        Trial::test(name, move || {
            run();
            Ok(())
        })
    };
    let cases = TABLES.into_iter().flat_map(|cases| cases());
    let cases = cases.map(|case| trial(case.name.clone(), Box::new(move || case.run())));
    let function = |(name, test): (&str, fn())| trial(name.to_owned(), Box::new(test));
    cases
        .chain(FUNCTIONS.into_iter().map(function))
        .chain(IGNORED.into_iter().map(|row| function(row).with_ignored_flag(true)))
        .collect()
}
