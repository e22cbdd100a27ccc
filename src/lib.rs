//! The heartbeat client of a DECNET worker.

mod body;
mod bundle;
mod delta;
mod enrolment;
mod error;
mod files;
mod identity;
mod limits;
#[cfg(feature = "loopback")]
pub mod loopback;
mod master;
mod resolve;
mod status;
mod text;
mod tls;

pub use delta::{LifecycleDelta, Operation, Outcome};
pub use enrolment::{Enrolment, EnrolmentSources, Found, Provenance};
pub use error::Error;
pub use identity::MasterIdentity;
pub use status::decnet::DecnetStatus;
pub use status::{AppliedTopology, Observed, Snapshot, StatusSource, Topology};
