//! The outbox thread and what passes between it and the others.

pub(crate) mod batches;
pub(crate) mod client;
mod desk;
mod holds;
mod outbox;
mod requests;
pub(crate) mod start;
