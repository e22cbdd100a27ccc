//! The trait [`StatusSource`], which returns the [`Snapshot`]s that are sent. Sources run on the
//! status thread. No other thread runs foreign code or slow reads.

pub(crate) mod decnet;
pub(crate) mod docker;
mod list;
pub(crate) mod place;
mod sendable;
pub(crate) mod state;
mod topology;
mod wire;

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use crate::limits;
use crate::text::{cut, sanitize};

/// The source of a beat's `status` and `topology`.
///
/// It runs on a thread of its own, so it may be slow, block or panic. The beat is then sent without
/// a status, and `status.error` gives the reason. The next beat requests a snapshot again. A closure is a
/// source:
///
/// ```
/// use decnet_heartbeat::{Snapshot, StatusSource};
///
/// let mut source = || Snapshot::new(&serde_json::json!({"deckies": [], "deployed": false}));
/// assert_eq!(source.snapshot().status(), r#"{"deckies":[],"deployed":false}"#);
/// ```
pub trait StatusSource: Send {
    /// The current state of this host. It must name everything that could not be determined.
    fn snapshot(&mut self) -> Snapshot;

    /// The applied topology, if it is known without waiting.
    ///
    /// Called once, before the first snapshot. If the first beat must be sent without a snapshot,
    /// it contains this topology; otherwise the master would order it to be built again. The
    /// default is `None`.
    ///
    /// ```
    /// use decnet_heartbeat::{Observed, Snapshot, StatusSource, Topology};
    ///
    /// struct Agent;
    ///
    /// impl StatusSource for Agent {
    ///     fn snapshot(&mut self) -> Snapshot {
    ///         Snapshot::unknown("the hypervisor does not answer")
    ///     }
    ///
    ///     fn applied_topology(&mut self) -> Option<Topology> {
    ///         Some(Topology { applied: None, observed: Observed::Unknown("not asked yet".into()) })
    ///     }
    /// }
    ///
    /// assert_eq!(Agent.applied_topology().and_then(|topology| topology.applied), None);
    /// ```
    fn applied_topology(&mut self) -> Option<Topology> {
        None
    }
}

impl<F: FnMut() -> Snapshot + Send> StatusSource for F {
    fn snapshot(&mut self) -> Snapshot {
        self()
    }
}

/// The result of a source: the object `status` and, if known, the object `topology` of a beat.
///
/// ```
/// use decnet_heartbeat::Snapshot;
///
/// let known = Snapshot::new(&serde_json::json!({"deckies": [], "deployed": false}));
/// assert_eq!(known.status(), r#"{"deckies":[],"deployed":false}"#);
/// // Not `{"deckies": []}`, which means that there are no deckies.
/// let unknown = Snapshot::unknown("the hypervisor does not answer");
/// assert_eq!(unknown.status(), r#"{"error":"the hypervisor does not answer"}"#);
/// assert!(unknown.topology().is_none());
/// ```
#[derive(Clone, Debug)]
pub struct Snapshot {
    status: Box<RawValue>,
    topology: Option<Topology>,
    /// What could not be determined, safe to log.
    fault: Option<String>,
    /// Whether the status contains only the fault.
    is_unknown: bool,
}

impl Snapshot {
    /// A snapshot with this `status`, which must serialize to a JSON object (see [the protocol](crate::protocol#status)).
    ///
    /// # How the master interprets it
    ///
    /// | status | meaning |
    /// | --- | --- |
    /// | `{}`, or `{"error": "…"}` | the host is up, and the state of its deckies is unknown; the master changes no decky |
    /// | `"deployed": false`, or no `deckies` | nothing is deployed; the master changes no decky |
    /// | `"deployed": true`, `deckies` and `runtime` | the master stores each decky with its state |
    ///
    /// - `deckies` is a list. Each entry is a decky as in DECNET's state file. The master's model
    ///   is strict: it drops a decky with an unknown key, or without a required one, and reports
    ///   that only in its own log.
    /// - `runtime` is an object of objects: `{decky: {"running": bool, "services": {service:
    ///   state}}}`. The master stores a decky in `deckies` that is missing or null in `runtime` as
    ///   degraded. So if states are unknown, leave out `deckies`, or those deckies, and give the
    ///   reason in `error`.
    /// - Strings and keys have no lone surrogate (`"\udcff"`), which JSON allows and the master
    ///   answers with 500. Integers have at most 4,300 digits, other numbers are finite, and
    ///   nothing is nested deeper than 100 levels.
    /// - The whole status has at most 16 MiB.
    ///
    /// A status that is not an object, has `deckies` or `runtime` of another type, or breaks one of
    /// the last two rules is replaced by `{"error": …}` with the reason, so a faulty source does
    /// not stop the beats. The entries of `deckies` are not checked.
    ///
    /// ```
    /// use decnet_heartbeat::Snapshot;
    ///
    /// #[derive(serde::Serialize)]
    /// struct Status {
    ///     deployed: bool,
    ///     deckies: Vec<String>,
    /// }
    ///
    /// let status = Status { deployed: false, deckies: Vec::new() };
    /// assert_eq!(Snapshot::new(&status).status(), r#"{"deployed":false,"deckies":[]}"#);
    /// // Not an object, so the beat reports an error of the source.
    /// let wrong = Snapshot::new(&["decky-01"]);
    /// assert_eq!(wrong.status(), r#"{"error":"the status source did not return a JSON object"}"#);
    /// ```
    pub fn new(status: &impl Serialize) -> Self {
        let snapshot = match Self::of_parts(status) {
            Ok(snapshot) => snapshot,
            Err(problem) => return Self::unknown(&problem),
        };
        let problem = sendable::problem("status", &snapshot.status);
        match problem.or_else(|| sendable::problem_of_shape(&snapshot.status)) {
            Some(problem) => {
                Self::unknown(&format!("the status of this source cannot be sent: {problem}"))
            }
            None => snapshot,
        }
    }

    /// As [`new`](Self::new), with parts that were checked before. The error is text for people.
    pub(crate) fn of_parts(status: &impl Serialize) -> Result<Self, String> {
        match to_raw_value(status) {
            Ok(status) if status.get().len() > limits::STATUS => {
                Err(format!("the status is larger than {} bytes", limits::STATUS))
            }
            Ok(status) if status.get().starts_with('{') => {
                Ok(Self { status, topology: None, fault: None, is_unknown: false })
            }
            Ok(_) => Err("the status source did not return a JSON object".to_owned()),
            Err(error) => Err(format!("the status of this source cannot be serialized: {error}")),
        }
    }

    /// A snapshot without states, with the reason why they are unknown. The master changes no
    /// decky; the host counts as up. The reason is truncated to 2,000 characters.
    ///
    /// ```
    /// use decnet_heartbeat::Snapshot;
    ///
    /// fn snapshot(listed: Result<Vec<String>, std::io::Error>) -> Snapshot {
    ///     match listed {
    ///         Ok(deckies) => Snapshot::new(&serde_json::json!({"deployed": true, "deckies": deckies})),
    ///         Err(error) => Snapshot::unknown(&format!("libvirt: {error}")),
    ///     }
    /// }
    ///
    /// let refused = std::io::ErrorKind::ConnectionRefused.into();
    /// assert_eq!(snapshot(Err(refused)).status(), r#"{"error":"libvirt: connection refused"}"#);
    /// ```
    pub fn unknown(reason: &str) -> Self {
        let reason = cut(reason, limits::STATUS_ERROR);
        // Serializing a string cannot fail.
        let status = to_raw_value(&wire::Status::Unknown { error: reason })
            .unwrap_or_else(|_| RawValue::NULL.to_owned());
        Self { status, topology: None, fault: Some(sanitize(reason)), is_unknown: true }
    }

    /// Sets the topology.
    ///
    /// If the master expects a topology on this host, and a beat has none, the master orders it to
    /// be built again.
    ///
    /// ```
    /// use decnet_heartbeat::{Observed, Snapshot, Topology};
    ///
    /// // No topology is applied on this host, and Docker lists no container of one.
    /// let nothing = Observed::Seen { bridges: Vec::new(), containers: Vec::new() };
    /// let topology = Topology { applied: None, observed: nothing };
    /// let snapshot = Snapshot::unknown("libvirt does not answer").with_topology(topology.clone());
    /// assert_eq!(snapshot.topology(), Some(&topology));
    /// ```
    pub fn with_topology(mut self, topology: Topology) -> Self {
        self.topology = Some(topology);
        self
    }

    /// Sets what could not be determined. The status must already contain it.
    pub(crate) fn with_fault(mut self, fault: Option<&str>) -> Self {
        self.fault = fault.map(sanitize);
        self
    }

    /// Whether it has no states, only the reason why they are unknown.
    pub(crate) fn is_unknown(&self) -> bool {
        self.is_unknown
    }

    /// What could not be determined.
    pub(crate) fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// `status` as JSON.
    pub fn status(&self) -> &str {
        self.status.get()
    }

    /// The topology, if the source knows it.
    pub fn topology(&self) -> Option<&Topology> {
        self.topology.as_ref()
    }

    pub(crate) fn raw_status(&self) -> &RawValue {
        &self.status
    }
}

/// The topology that this host has applied, and what Docker shows of it.
///
/// ```
/// use decnet_heartbeat::{AppliedTopology, Observed, Snapshot, Topology};
///
/// let topology = Topology {
///     applied: Some(AppliedTopology {
///         topology_id: "t-1".to_owned(),
///         applied_version_hash: "9b1c".to_owned(),
///         applied_at: 1_700_000_000,
///         last_error: None,
///     }),
///     observed: Observed::Seen {
///         bridges: vec!["decnet-topology-dmz".to_owned()],
///         containers: vec!["decnet-gateway".to_owned()],
///     },
/// };
/// let snapshot = Snapshot::unknown("the hypervisor does not answer").with_topology(topology);
/// assert!(snapshot.topology().is_some());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The applied topology. `None`: no topology is applied.
    pub applied: Option<AppliedTopology>,
    /// The bridges and containers that exist.
    pub observed: Observed,
}

/// An applied topology: the row in `topology.db`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppliedTopology {
    /// The master's id of the topology.
    pub topology_id: String,
    /// The hash of the applied version. The master compares it with the version that it expects.
    pub applied_version_hash: String,
    /// When it was applied, in seconds since 1970.
    pub applied_at: i64,
    /// The error of the last attempt to apply it.
    pub last_error: Option<String>,
}

/// The networks and containers of topologies in Docker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// Docker listed them.
    Seen {
        /// Bridge networks named `decnet-topology-*`, sorted.
        bridges: Vec<String>,
        /// Running containers named `decnet-*`, sorted.
        containers: Vec<String>,
    },
    /// They are unknown, with the reason. At most 200 characters of it are sent.
    Unknown(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_that_is_not_an_object_becomes_unknown() {
        for wrong in [serde_json::json!([1]), serde_json::json!("x"), serde_json::json!(null)] {
            assert_eq!(
                Snapshot::new(&wrong).status(),
                r#"{"error":"the status source did not return a JSON object"}"#
            );
        }
    }

    #[test]
    fn status_that_cannot_be_serialized_becomes_unknown() {
        let wrong = std::collections::BTreeMap::from([((1, 2), 3)]);
        assert_eq!(
            Snapshot::new(&wrong).status(),
            r#"{"error":"the status of this source cannot be serialized: key must be a string"}"#
        );
    }

    #[test]
    fn status_that_the_master_cannot_process_becomes_unknown() {
        let raw = |json: &str| RawValue::from_string(json.to_owned()).unwrap();
        let prefix = "the status of this source cannot be sent: ";
        for (json, problem) in [
            (
                r#"{"deckies": [{"name": "\udcff"}]}"#,
                r"status.deckies[0].name has a lone surrogate, \udcff, which the master cannot process",
            ),
            (r#"{"deployed": true, "deckies": {"d1": 1}}"#, "deckies is not a list"),
            (
                r#"{"runtime": {"d1": "running"}}"#,
                "a decky in runtime is not an object at line 1 column 29",
            ),
            (
                r#"{"x": 1e999}"#,
                "status.x is a number that is too large: the master reads it as infinity",
            ),
        ] {
            let expected = serde_json::json!({"error": format!("{prefix}{problem}")});
            assert_eq!(Snapshot::new(&raw(json)).status(), expected.to_string());
        }
        let inside = std::collections::BTreeMap::from([("x", raw(r#"{"y": "\udcff"}"#))]);
        assert!(Snapshot::new(&inside).status().contains("status.x.y has a lone surrogate"));
        for good in
            [r#"{"deckies": [{"name": "\ud83d\ude00"}], "deployed": true, "runtime": {}}"#, "{}"]
        {
            assert_eq!(Snapshot::new(&raw(good)).status(), good);
        }
    }

    #[test]
    fn reason_is_truncated_before_it_is_copied() {
        let snapshot = Snapshot::unknown(&"x".repeat(10_000_000));
        assert_eq!(
            snapshot.status(),
            format!(r#"{{"error":"{}"}}"#, "x".repeat(limits::STATUS_ERROR))
        );
        assert!(snapshot.fault().unwrap().len() < 2 * limits::LOG_TEXT);
    }
}
