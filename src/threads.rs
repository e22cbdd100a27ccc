//! The three threads, and the values that they exchange.

pub(crate) mod batches;
pub(crate) mod content;
pub(crate) mod decommission;
pub(crate) mod heartbeat;
mod held;
mod outbox;
pub(crate) mod outbox_client;
pub(crate) mod request_queue;
mod requests;
pub(crate) mod schedule;
pub(crate) mod start;
pub(crate) mod status;
