//! The heartbeat client of a DECNET worker: it tells the master, over mTLS, that this host lives, what it runs, and how
//! each deploy or mutate ended. Blocking, on three threads of its own, for agents without an async runtime.
//!
//! ```no_run
//! use std::time::Duration;
//! use decnet_heartbeat::{Heartbeat, LifecycleDelta, Operation};
//!
//! # fn main() -> Result<(), decnet_heartbeat::Error> {
//! # fn compose_up() -> Result<(), std::io::Error> { Ok(()) }
//! let heartbeat = Heartbeat::builder().agent_version("1.4.0").start()?;
//! heartbeat.run(Operation::Deploy, ["decky-01"], compose_up)?; // on a thread of its own; reported when it ends
//! heartbeat.deltas().push(LifecycleDelta::failed("decky-02", Operation::Mutate, "no such image"))?;
//! heartbeat.stop(Duration::from_secs(5));
//! # Ok(())
//! # }
//! ```
//!
//! # From the top
//!
//! ```text
//!  agent's threads               outbox thread: the disk                heartbeat thread: the network       the master
//!  ───────────────               ───────────────────────                ─────────────────────────────       ──────────
//!  push, begin, end ──request──▶ one commit for all queued ──deltas───▶ ┐
//!         ◀──── Ok, within 1 s ─┘      ▲        ▲                       ├ select! ─▶ body ─▶ POST ────────▶ /swarm/heartbeat
//!                                      │        └── batch? ◀───────────▶│   ▲                 │
//!                                      │                tick, 30 s ─────┤   │                 ▼
//!  status thread: the host             │                stop ───────────┘   │              verdict
//!  StatusSource ◀── snapshot? ─────────┼────────────────────────────────────┘                 │
//!  (state file, Docker, topology.db)   └──────────── acknowledge, reject ◀────────────────────┘
//! ```
//!
//! Whatever can hang has a thread of its own; [`design`] has their rules, and what a host program must not do.
//!
//! [`Heartbeat::builder`] gathers the parts; `start` starts the threads `decnet-heartbeat`, `decnet-outbox` and `decnet-status`. A tick or a
//! delta asks the status thread for a snapshot; the beat goes out when it arrives, or without it when patience ends:
//! 250 ms for the first beat, a delta and a retry, 10 s for a tick, and never more than half an interval. A snapshot that
//! comes later goes out in a beat of its own. So a delta never waits for Docker, and a source that hangs or panics
//! never stops the beat.
//!
//! The first beat is sent at once, the second after a random part of the interval, then one every interval exactly. The
//! first beat waits up to 1 s for the topology, since the master orders a topology that is left out to be built again.
//!
//! # What a beat carries
//!
//! A POST carries states (`status`, and what is `observed` of the topology) only if they are at most 5 s old when it
//! starts. The applied topology is in every POST.
//!
//! The master can fail on a body after it has applied the deltas in it, and a proxy can fail on a body that is too large
//! for it. Such a body is not sent again unchanged. A POST is *in doubt* if part of its body was sent and the answer is 5xx
//! or missing.
//!
//! - *Whole*, the start: states and deltas in one body. In doubt: the beats after it send them apart.
//! - *Apart*: the *light* POST comes first: the deltas, and a `status.error` that says why. Once it is accepted, the
//!   states follow alone. If these are accepted, the next beat is whole again. If they are in doubt or refused, they rest.
//! - If a light POST with deltas is in doubt, the next beat starts without deltas. If that is accepted, the deltas are sent
//!   one to a body, the newest first, at most 50 in a beat. A delta that is in doubt alone rests, and so do older ones of
//!   its decky and operation. It is never rejected for that ([`Stats::suspended`]).
//! - What rests is left out of 10 beats, then of 20, and so on up to a day. [`Stats::status_fault`], the log and
//!   `status.error` say what is left out.
//!
//! A connection is closed when bytes are left on it, after 10 minutes, and after three answers in a row that are not 2xx;
//! then the name of the master is looked up again. After a failed handshake the next attempt starts with the next address.
//!
//! # Operations
//!
//! An agent that is told to deploy answers at once and reports later: [`DeltaSender::run`] does the work on a thread of its
//! own and tells the master how it ended, a panic included. [`DeltaSender::begin`] is for work that has a thread already:
//! the guard that it returns turns into the report, and dropping it unsettled reports a failure. An operation is on the
//! disk from its beginning: if the process dies, the next start reports it failed with its first beat. For what is not
//! tracked there is [`DeltaSender::push`]. The [`guide`] has three agents that do this, and how to test one.
//!
//! # The life of a delta
//!
//! 1. *Pushed*, or written down as in flight when its operation begins: a row in the outbox, a SQLite file in the agent
//!    dir, written by the outbox thread. The network is never waited for, and the disk a second at most.
//! 2. *Waiting*, or *held* while a newer operation of the same decky and operation is in flight: the master gives a delta
//!    to the newest open row, and that would be the other's ([`Stats::waiting`], [`Stats::held`]).
//! 3. *Sent*, with all others that wait, newest first, at most 500 in a beat. Without an answer, or with one that says
//!    "later", it waits on, and is sent again after a backoff.
//! 4. *Delivered* when the master answers 2xx: the row is deleted ([`Stats::delivered`]). A page of HTML is a gateway's
//!    answer and delivers nothing. Or *rejected*: a body that the master refuses (400, 413, 422) is sent without its states,
//!    and its deltas are halved until the delta at fault is alone. That one stays in the outbox with the reason, never to
//!    be sent again ([`Stats::rejected`]). Liveness goes on meanwhile.
//! 5. Or *dropped*: beyond 10,000 rows the oldest fall out, the rejected ones first, and after 7 days of waiting every one.
//!    That is counted and logged ([`Stats::dropped`]).
//!
//! **What `Ok` means.** The delta is in the file and the file's log is synced to the disk: it survives a crash of the
//! process and of the machine, an outage of the master of up to 7 days, and a restart. Two cases are weaker, and both are
//! said in the log and by [`Stats::outbox`] being `None`: the file cannot be written (a full disk, a read-only file
//! system), so the delta is in memory until it can; or the outbox is meant to be in memory. `Err` means that nobody will
//! hear of it unless the caller tries again, with one exception: if [`Error::is_in_doubt`], a disk that hangs has not answered
//! within a second, and the delta will be sent when it does.
//!
//! **What at-least-once means for the master.** A delta whose answer got lost on the way is sent again, as nobody can know
//! whether it arrived. The master closes the newest open row with the first of the two and finds none for the second,
//! unless the same operation of the same decky was begun again in between; then the new row is closed with the old verdict.
//! The same may happen to a delta that is on its way in the moment in which a newer operation begins, and to an older
//! delta of a row whose own newest delta was rejected. Nothing is sent again after a 2xx was read, unless the process
//! dies before it has written that down.
//!
//! **One file, many processes.** One process delivers from an outbox; a second start is an error that names the
//! first. Any process may add to it, as the program's `push` and `track` do beside a `run`, and what a process that has
//! died was at work on is taken over with the next beat. A file that is none of ours, or broken, is moved aside
//! and named in the log.
//!
//! # Status
//!
//! [`DecnetStatus`] finds and reads DECNET's state file, and reads Docker and `topology.db`. An agent that knows better gives a
//! [`StatusSource`] of its own, or a closure that returns a [`Snapshot`]. What cannot be found out is said inside the
//! snapshot, as the master draws conclusions from what is left out. A status is at most 16 MiB, and goes out at most five
//! seconds after it was made.
//!
//! # Enrolment
//!
//! [`Enrolment::from_env`] follows the original agent: variables, then `decnet.ini`, then defaults, each value with its
//! [`Provenance`]. On a host that is not enrolled [`HeartbeatBuilder::start`] returns a dormant handle, so that callers
//! need no guard. The ini and the bundle are looked at for each beat and taken over when they have changed and fit.
//!
//! # Log levels
//!
//! Through the `log` facade, one line a fact: what happened, and `key=value` in a fixed order. A line that concerns them
//! begins with `host` (the uuid), `master` (the URL), `class` (of an answer or a failure, in a word) and `fingerprint` (of
//! this host's certificate); free text is quoted and comes last. The thread's name is the logger's to add.
//!
//! - `error`: what costs something, or what only an operator can mend. A host that the master does not accept (with the
//!   fingerprint that was shown), a certificate that has expired, a delta that the master refuses for good or that fell
//!   out of the outbox, a status that it refuses, a panic that was caught, an outbox in memory, one that was moved aside,
//!   or one that cannot note what the master has answered.
//! - `warn`: a beat that failed, changed credentials that do not fit, a certificate that expires within 30 days, a key that
//!   others can read, a folder of the heartbeat's files into which others may write, Docker or a file that cannot be read,
//!   operations whose process has died. A failure is logged when it changes. A failed beat, what else comes again with each beat, and what alternates or comes and goes, is logged the
//!   first, second, fourth, eighth … time. Numbers and ids in a text do not make it another failure. A delta that rests.
//! - `info`: start, first success, recovery from a failure that was logged, credentials taken over, an outbox that is on
//!   the disk again, stop.
//! - `debug`: every beat; a retry on a fresh connection; a name that was not found; a dormant start.
//!
//! Text from the master, Docker or a file is cut to 300 characters, escaped, and kept on its line.
//!
//! # Features
//!
//! - `cli` (default): the program, and what only it needs.
//! - `loopback`: the module of that name, a DECNET master on 127.0.0.1 for tests; and a heartbeat's `ticks` and `beats`.
//!
//! # Semver
//!
//! Before 1.0 a new minor number may break what is public, and a new patch number never does. Public are:
//!
//! - the items that these docs show, `loopback`'s too. A type that is `#[non_exhaustive]` may grow with any version, and
//!   so may the list of a [`Failure`]'s classes. The texts of an [`Error`] are for people. Items that are
//!   `#[doc(hidden)]` are nobody's;
//! - the program's options, environment variables and exit codes, the keys in the JSON of `--stats-file` and of `check
//!   --json`, and the names of metrics. New ones may come with any version;
//! - of the log the keys `host`, `master`, `class` and `fingerprint` with what they mean. Its texts, its other keys and
//!   their order are for people and may change;
//! - the outbox' file in one direction, see below;
//! - the oldest Rust that compiles it: 1.89, `rust-version` in Cargo.toml. A newer one is asked for with a new minor
//!   number only.
//!
//! **The outbox and versions.** A newer version takes over an older one's file as it opens it, in one transaction:
//! every delta in it is still delivered. There is no way back. An older version does not read a newer one's file. If it
//! is to deliver from it, it moves the file aside, as one that is not its own, begins a new one and says so at `error`.
//! What was in there is not lost and not delivered either: that takes the newer version, with the file at its old place
//! again. If it only adds to it, as `push` and `track` do, it leaves the file alone and has its outbox in memory. So
//! before an agent goes back to an older version, let it end and deliver what it has ([`Stats::operations`] and
//! [`Stats::waiting`] are 0).

#[cfg(feature = "loopback")]
#[doc(hidden)]
pub mod benching;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod credentials;
mod delta;
mod deltas;
mod folder_access;
mod log_throttle;
mod sqlite;
mod transport;
#[doc = include_str!("docs/design.md")]
pub mod design {}
mod error;
mod files;
mod forked;
#[cfg(fuzzing)]
#[doc(hidden)]
#[path = "../tests/fuzz/targets/mod.rs"]
pub mod fuzzing;
pub mod guide;
mod heartbeat;
mod limits;
#[cfg(feature = "loopback")]
pub mod loopback;
mod master;
mod outbox;
mod panics;
mod stats;
mod status;
mod text;
mod threads;

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

/// The README's examples; the second one runs.
#[cfg(all(doctest, feature = "loopback"))]
#[doc = include_str!("../README.md")]
mod readme {}
