//! Tests against the real master, a real Docker Engine and real file systems.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test that cannot continue panics, also if it cannot print"
)]

mod check;
mod container;
mod disk;
mod durability;
mod enrolment;
mod files;
mod frozen;
mod hand_over;
mod heartbeat;
mod metrics;
mod operations;
mod peers;
mod pipe;
mod program;
mod resolver;
mod shim;
mod state_file;
mod support;
mod threads;
