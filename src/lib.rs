//! The heartbeat client of a DECNET worker.

mod enrolment;
mod error;
mod identity;
mod limits;
#[cfg(feature = "loopback")]
pub mod loopback;
mod text;

pub use enrolment::{Enrolment, EnrolmentSources, Found, Provenance};
pub use error::Error;
pub use identity::MasterIdentity;
