//! Tests against the loopback master: the library as an embedder uses it, and the program as an operator does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails there and then"
)]

mod api;
mod beats;
mod bundle;
mod check;
mod check_only_looks;
mod classes;
mod credentials;
mod decommission;
mod delivery;
mod deltas;
mod exit_codes;
mod folder;
mod identity;
mod operations;
mod paths;
mod printing;
mod program;
mod program_log;
mod program_signals;
mod program_stats_files;
mod program_systemd;
mod push;
mod readme;
mod reporting;
mod retry;
mod sharing;
mod shim;
mod stats;
mod stopping;
mod supervisors;
mod support;
mod threads;
mod track;
mod wire;
mod writers;
