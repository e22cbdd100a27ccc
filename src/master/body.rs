//! The JSON body of a POST. All field names of the protocol are defined here. Values only, for any
//! thread.
//!
//! The JSON of a status source is sent unchanged ([`RawValue`]), so unknown keys and number formats
//! are preserved.

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use crate::delta::{LifecycleDelta, Outcome};
use crate::limits;
use crate::status;
use crate::text::cut;

/// The body of one POST.
#[derive(Serialize)]
pub(crate) struct Body<'a> {
    pub(crate) host_uuid: &'a str,
    pub(crate) agent_version: &'a str,
    pub(crate) status: &'a RawValue,
    /// Left out only if the source has never returned a topology, because to the master no topology
    /// means that none is applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) topology: Option<Topology<'a>>,
    #[serde(skip_serializing_if = "<[_]>::is_empty", serialize_with = "lifecycle")]
    pub(crate) lifecycle: &'a [&'a LifecycleDelta],
}

impl<'a> Body<'a> {
    /// A body with a snapshot.
    pub(crate) fn of(
        host_uuid: &'a str,
        snapshot: &'a status::Snapshot,
        lifecycle: &'a [&'a LifecycleDelta],
    ) -> Self {
        Self {
            host_uuid,
            agent_version: env!("CARGO_PKG_VERSION"),
            status: snapshot.raw_status(),
            topology: snapshot.topology().map(Topology::from),
            lifecycle,
        }
    }
}

/// `topology`: the applied topology, or four nulls, and what Docker shows.
#[derive(Serialize)]
pub(crate) struct Topology<'a> {
    pub(crate) topology_id: Option<&'a str>,
    pub(crate) applied_version_hash: Option<&'a str>,
    pub(crate) applied_at: Option<i64>,
    pub(crate) last_error: Option<&'a str>,
    pub(crate) observed: Observed<'a>,
}

impl<'a> Topology<'a> {
    fn of(applied: Option<&'a status::AppliedTopology>, observed: Observed<'a>) -> Self {
        Self {
            topology_id: applied.map(|row| row.topology_id.as_str()),
            applied_version_hash: applied.map(|row| row.applied_version_hash.as_str()),
            applied_at: applied.map(|row| row.applied_at),
            last_error: applied.and_then(|row| row.last_error.as_deref()),
            observed,
        }
    }

    /// A topology of which nothing was observed, for this reason.
    pub(crate) fn unobserved(
        applied: Option<&'a status::AppliedTopology>,
        reason: &'a str,
    ) -> Self {
        Self::of(applied, Observed::Unknown { error: cut(reason, limits::OBSERVED_ERROR) })
    }
}

impl<'a> From<&'a status::Topology> for Topology<'a> {
    fn from(topology: &'a status::Topology) -> Self {
        let applied = topology.applied.as_ref();
        match &topology.observed {
            status::Observed::Seen { bridges, containers } => {
                Self::of(applied, Observed::Seen { bridges, containers })
            }
            status::Observed::Unknown(error) => Self::unobserved(applied, error),
        }
    }
}

/// `observed`: the names in order, or the reason why they are unknown.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Observed<'a> {
    Seen { bridges: &'a [String], containers: &'a [String] },
    Unknown { error: &'a str },
}

/// A delta in `lifecycle`.
#[derive(Serialize)]
struct Delta<'a> {
    decky_name: &'a str,
    operation: &'static str,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    completed_at: String,
}

impl<'a> From<&'a LifecycleDelta> for Delta<'a> {
    fn from(delta: &'a LifecycleDelta) -> Self {
        let (status, error) = match delta.outcome() {
            Outcome::Succeeded => ("succeeded", None),
            Outcome::Failed(error) => ("failed", Some(error.as_str())),
        };
        Self {
            decky_name: delta.decky(),
            operation: delta.operation().as_str(),
            status,
            error,
            completed_at: humantime::format_rfc3339_micros(delta.when()).to_string(),
        }
    }
}

fn lifecycle<S: Serializer>(deltas: &[&LifecycleDelta], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(deltas.iter().map(|delta| Delta::from(*delta)))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::delta::Operation;

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn body_without_deltas_and_topology_leaves_them_out() {
        let status = RawValue::from_string("{}".to_owned()).unwrap();
        let body = Body {
            host_uuid: "u",
            agent_version: "1",
            status: &status,
            topology: None,
            lifecycle: &[],
        };
        assert_eq!(json(&body), r#"{"host_uuid":"u","agent_version":"1","status":{}}"#);
    }

    #[test]
    fn only_failed_delta_has_an_error() {
        let at = UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_001);
        let good = LifecycleDelta::succeeded("a", Operation::Deploy).completed_at(at);
        let bad = LifecycleDelta::failed("b", Operation::Mutate, "no").completed_at(at);
        assert_eq!(
            json(&Delta::from(&good)),
            r#"{"decky_name":"a","operation":"deploy","status":"succeeded","completed_at":"2023-11-14T22:13:20.000001Z"}"#
        );
        assert_eq!(
            json(&Delta::from(&bad)),
            r#"{"decky_name":"b","operation":"mutate","status":"failed","error":"no","completed_at":"2023-11-14T22:13:20.000001Z"}"#
        );
    }

    #[test]
    fn observed_error_is_cut_to_200_characters() {
        let topology = status::Topology {
            applied: None,
            observed: status::Observed::Unknown("x".repeat(300)),
        };
        let expected = format!(
            r#"{{"topology_id":null,"applied_version_hash":null,"applied_at":null,"last_error":null,"observed":{{"error":"{}"}}}}"#,
            "x".repeat(200)
        );
        assert_eq!(json(&Topology::from(&topology)), expected);
    }
}
