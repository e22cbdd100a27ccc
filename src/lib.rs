//! The heartbeat client of a DECNET worker.

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
mod outbox;
mod resolve;
mod schedule;
mod stats;
mod status;
mod text;
mod tls;
mod worker;

pub use delta::{LifecycleDelta, Operation, Outcome};
pub use enrolment::{Enrolment, EnrolmentSources, Found, Provenance};
pub use error::Error;
pub use heartbeat::{DeltaSender, Heartbeat, HeartbeatBuilder, Stopped};
pub use identity::MasterIdentity;
pub use outbox::OutboxLocation;
pub use stats::{Failure, Stats};
pub use status::decnet::DecnetStatus;
pub use status::{AppliedTopology, Observed, Snapshot, StatusSource, Topology};
