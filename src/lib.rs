// Most examples of the documentation start a master, which needs this feature.
#![cfg(any(feature = "loopback", not(doctest)))]
//! The heartbeat client of a DECNET worker. It reports to the master, over mTLS, that the host is
//! up, which deckies (decoys) it runs, and how each deploy or mutate ended. It is blocking and
//! thread-based, for agents without an async runtime.
//!
//! ```no_run
//! use decnet_heartbeat::{Heartbeat, LifecycleDelta, Operation};
//!
//! let heartbeat = Heartbeat::builder().agent_version("1.4.0").start()?;
//! heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
//! heartbeat.stop(std::time::Duration::from_secs(5));
//! # Ok::<(), decnet_heartbeat::Error>(())
//! ```
//!
//! - [`Heartbeat::builder`] starts a heartbeat. On a host that is not enrolled it is dormant.
//! - [`DeltaSender`] reports operations: [`push`](DeltaSender::push) one that has ended,
//!   [`run`](DeltaSender::run) or [`begin`](DeltaSender::begin) one that is reported when it ends,
//!   even if the process is killed.
//! - [`StatusSource`] makes the status of a beat. The default, [`DecnetStatus`], reads DECNET's
//!   state file, Docker and `topology.db`.
//! - [`Enrolment`] has the identity of this host and the address of its master. It is read from
//!   the environment and `decnet.ini`.
//! - [`Stats`] has the state and the counters of a heartbeat.
//!
//! # Threads
//!
//! A heartbeat has three threads: one for the network, one for the disk, one for the status.
//! `decnet-heartbeat` owns the connection to the master and decides when a beat is sent. `decnet-outbox` owns the agent dir: it
//! commits deltas to the outbox, a SQLite file, before `push` returns `Ok`. `decnet-status` calls
//! the status source. No thread waits without a limit for another one, so a beat waits at most 250
//! ms for the status if there are new deltas, and at most 10 s at a tick. While it delivers from a
//! file, a small fourth thread, `decnet-wake`, waits for other processes that add deltas to it.
//! [`design`] has the details, and what a host program must not do.
//!
//! # Pages
//!
//! | page | what is in it |
//! | --- | --- |
//! | [`embedding`] | complete agents in Rust, C, Python and sh, and how to test one |
//! | [`guarantees`] | what `Ok` means, delivery, what happens in each fault, and the tests of it |
//! | [`design`] | threads, requests, deltas, locks, files, fork |
//! | [`protocol`] | what is sent to the master, and what its answers mean |
//! | [`operations`] | the systemd unit, log, stats, metrics, alerts, troubleshooting |
//! | [`security`] | who is trusted with what |
//! | [`figures`] | measured costs |
//! | [`differences`] | from DECNET's Python heartbeat |
//! | [`changes`] | versions and compatibility |
//!
//! # Log levels
//!
//! The crate logs through the `log` facade, one line for each fact, as
//! `what happened: key=value …`. The keys `host`, `master`, `class` and `fingerprint` come first.
//! Text from outside is truncated to 300 characters, escaped and quoted.
//!
//! - `error`: something is lost, or needs an operator. The master does not accept this host, a
//!   delta is rejected or dropped, the outbox is degraded, the certificate has expired, a panic was
//!   caught.
//! - `warn`: a beat failed, Docker or a file cannot be read, new credentials are invalid, the
//!   certificate expires within 30 days, the process of an operation has ended, a delta is
//!   suspended.
//! - `info`: start, first accepted beat, recovery, new credentials, stop.
//! - `debug`: every beat, a retry on a new connection, a dormant start.
//!
//! A repeated failure is logged the first, second, fourth, eighth … time.
//!
//! # Features
//!
//! - `cli` (default): the program, and the crates that only it needs.
//! - `loopback`: [`loopback`], a DECNET master on 127.0.0.1 for tests; and `ticks` and `beats` of a
//!   heartbeat.

// Imports run downwards: cli and loopback, heartbeat, deltas, threads, credentials, master, outbox,
// status, sqlite, stats, transport, and then the small helpers. No folder imports from one above it.

#[cfg(feature = "loopback")]
#[doc(hidden)]
pub mod benching;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
/// The part of the program that a fuzz target needs.
#[cfg(all(fuzzing, not(feature = "cli")))]
#[allow(dead_code, reason = "the target only parses")]
mod cli {
    mod json_delta;
    mod rfc3339;
    pub(crate) mod pipe {
        #[path = "../../../tests/fuzz/targets/pipe.rs"]
        pub(crate) mod fuzz;
        mod messages;
    }
}
mod credentials;
mod delta;
mod deltas;
mod error;
mod files;
mod folder_access;
mod forked;
#[cfg(fuzzing)]
#[doc(hidden)]
#[path = "../tests/fuzz/targets/mod.rs"]
pub mod fuzzing;
mod heartbeat;
mod limits;
mod log_throttle;
#[cfg(feature = "loopback")]
pub mod loopback;
mod master;
mod outbox;
mod panics;
mod sqlite;
mod stats;
mod status;
mod text;
mod threads;
mod transport;

pub use credentials::enrolment::{Enrolment, EnrolmentSources, Provenance, Sourced};
pub use delta::{LifecycleDelta, Operation, Outcome};
pub use deltas::DeltaSender;
pub use deltas::operation::{IntoDeckies, IntoOutcome, TrackedOperation};
pub use error::Error;
pub use heartbeat::{Heartbeat, HeartbeatBuilder, Stopped};
pub use master::identity::MasterIdentity;
pub use outbox::OutboxLocation;
pub use stats::{Failure, Stats};
pub use status::decnet::DecnetStatus;
pub use status::{AppliedTopology, Observed, Snapshot, StatusSource, Topology};

// The pages. Each ends with the definitions of its links, for readers of the repository.
// `rustdoc-links.md` defines the same links for rustdoc; it comes first, because the first
// definition of a link counts.

#[doc = include_str!("docs/rustdoc-links.md")]
#[doc = include_str!("docs/changes.md")]
pub mod changes {}
#[doc = include_str!("docs/rustdoc-links.md")]
#[doc = include_str!("docs/design.md")]
pub mod design {}
#[doc = include_str!("docs/rustdoc-links.md")]
#[doc = include_str!("docs/differences.md")]
pub mod differences {}
// Its examples run as tests, with the feature that they need.
#[cfg(any(not(doctest), feature = "loopback"))]
#[doc = include_str!("docs/rustdoc-links.md")]
#[doc = include_str!("docs/embedding.md")]
pub mod embedding {}
#[doc = include_str!("docs/rustdoc-links.md")]
#[doc = include_str!("docs/figures.md")]
pub mod figures {}
#[doc = include_str!("docs/rustdoc-links.md")]
#[doc = include_str!("docs/guarantees.md")]
pub mod guarantees {}
#[doc = include_str!("docs/rustdoc-links.md")]
#[doc = include_str!("docs/operations.md")]
pub mod operations {}
#[doc = include_str!("docs/rustdoc-links.md")]
#[doc = include_str!("docs/protocol.md")]
pub mod protocol {}
#[doc = include_str!("docs/rustdoc-links.md")]
#[doc = include_str!("docs/security.md")]
pub mod security {}

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
