//! Tests against the loopback master: the library as an embedder uses it, and the program as an operator does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails there and then"
)]

mod beats;
mod bundle;
mod check;
mod classes;
mod credentials;
mod delivery;
mod deltas;
mod identity;
mod operations;
mod program;
mod push;
mod readme;
mod reporting;
mod retry;
mod stats;
mod stopping;
mod support;
mod track;
mod wire;
