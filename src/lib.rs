//! The heartbeat client of a DECNET worker: it tells the master, over mTLS, that this host lives, what it runs, and how
//! each deploy or mutate ended. Blocking, on two threads of its own, for agents without an async runtime.
//!
//! ```no_run
//! use std::time::Duration;
//! use decnet_heartbeat::{Heartbeat, LifecycleDelta, Operation};
//!
//! # fn main() -> Result<(), decnet_heartbeat::Error> {
//! let heartbeat = Heartbeat::builder().agent_version("1.4.0").start()?;
//! heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
//! heartbeat.stop(Duration::from_secs(5));
//! # Ok(())
//! # }
//! ```
//!
//! # From the top
//!
//! ```text
//!  agent threads                heartbeat thread                                   the master
//!  ─────────────                ─────────────────────────────                      ──────────
//!  push(delta) ─▶ outbox ─▶ delta channel ─┐
//!                 (SQLite)                 ├─ select! ─▶ Body ─▶ POST (ureq/rustls) ─▶ /swarm/heartbeat
//!             tick every 30 s ─────────────┤               ▲          │
//!             fresh snapshot ──────────────┘          pending deltas  ▼
//!                  ▲                                              Verdict ─▶ outbox: ack, keep or reject
//!  status thread: StatusSource (state file, Docker, topology)
//! ```
//!
//! [`Heartbeat::builder`] gathers the parts and starts the threads `decnet-heartbeat` and `decnet-status`. A tick or a
//! delta asks the status thread for a snapshot; the beat goes out when it arrives, or without it when patience ends:
//! 250 ms for the first beat, a delta and a retry, 10 s for a tick, and never more than half an interval. A snapshot that
//! comes later goes out in a beat of its own. So a delta never waits for Docker, and a source that hangs or panics
//! never stops the beat.
//!
//! The first beat goes out at once, the second after a random part of the interval, then one every interval exactly.
//!
//! # Deltas
//!
//! [`DeltaSender::push`] writes the delta to the outbox, a SQLite file in the agent dir, in the caller's thread, and never
//! waits for the network. `Ok` means that it is on the disk; it stays there until the master has answered 2xx. All that
//! wait go out together, newest first, at most 500 in a beat. A body that the master refuses is halved until the delta at
//! fault stands alone; that one is put aside with the reason, and liveness goes on meanwhile. Where no file can be
//! written, the outbox is in memory, and the log and [`Stats::outbox`] say so.
//!
//! # Status
//!
//! [`DecnetStatus`] reads DECNET's state file, Docker and `topology.db`. An agent that knows better gives a
//! [`StatusSource`] of its own, or a closure that returns a [`Snapshot`]. What cannot be found out is said inside the
//! snapshot, as the master draws conclusions from what is left out.
//!
//! # Enrolment
//!
//! [`Enrolment::from_env`] follows the original agent: variables, then `decnet.ini`, then defaults, each value with its
//! [`Provenance`]. On a host that is not enrolled [`HeartbeatBuilder::start`] returns a dormant handle, so that callers
//! need no guard. The ini and the bundle are looked at before each beat and taken over when they have changed and fit.
//!
//! # Log levels
//!
//! Through the `log` facade, one line a fact, `key=value`:
//!
//! - `error`: what costs something, or what only an operator can mend. A host that the master does not accept (with the
//!   fingerprint that was shown), a delta that it refuses for good, a panic that was caught, an outbox in memory or one
//!   that cannot note what the master has answered.
//! - `warn`: a beat that failed, changed credentials that do not fit, Docker or a file that cannot be read. A failure is
//!   said when it changes; a failed beat also at its second, fourth, eighth … repetition.
//! - `info`: start, first success, recovery, credentials taken over, stop.
//! - `debug`: every beat; a retry on a fresh connection; a name that was not found; a dormant start.
//!
//! Text from the master, Docker or a file is cut to 300 characters, escaped, and kept on its line.
//!
//! # Features
//!
//! - `cli` (default): the program, and what only it needs.
//! - `loopback`: the module of that name, a DECNET master on 127.0.0.1 for tests; and a heartbeat's `ticks` and `beats`.

mod body;
mod bundle;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod collector;
mod delta;
mod enrolment;
mod error;
mod files;
mod heartbeat;
mod identity;
mod limits;
mod link;
#[cfg(feature = "loopback")]
pub mod loopback;
mod master;
mod operation;
mod outbox;
mod resolve;
mod schedule;
mod sender;
mod stats;
mod status;
mod text;
mod tls;
mod worker;

pub use delta::{LifecycleDelta, Operation, Outcome};
pub use enrolment::{Enrolment, EnrolmentSources, Found, Provenance};
pub use error::Error;
pub use heartbeat::{Heartbeat, HeartbeatBuilder, Stopped};
pub use identity::MasterIdentity;
pub use operation::TrackedOperation;
pub use outbox::OutboxLocation;
pub use sender::DeltaSender;
pub use stats::{Failure, Stats};
pub use status::decnet::DecnetStatus;
pub use status::{AppliedTopology, Observed, Snapshot, StatusSource, Topology};

/// The README's example, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
