//! Tests against the loopback master: the library as an embedder uses it, and the program as an
//! operator does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot continue panics"
)]

mod api;
mod beats;
mod bundle;
mod check;
mod check_is_read_only;
mod credentials;
mod decommission;
mod delivery_lock;
mod deltas;
mod exit_codes;
mod failure_classes;
mod folder_access;
mod hand_over;
mod identity;
mod non_utf8_paths;
mod operations;
mod output;
mod pipe;
mod pipe_beside;
mod pipe_ends;
mod pipe_load;
mod pipe_take_over;
mod program;
mod program_log;
mod program_signals;
mod program_stats_files;
mod program_systemd;
mod push;
mod push_and_track;
mod readme;
mod retry;
mod sharing;
mod shim;
mod stats;
mod stopping;
mod supervisors;
#[allow(dead_code, unused_imports, reason = "no test program uses all helpers")]
#[path = "../support/mod.rs"]
mod support;
mod threads;
mod track;
mod wire;
mod working_directory;
