//! The seam between the heartbeat and what it reports: a [`StatusSource`] makes [`Snapshot`]s. Runs on the status
//! thread, the only place where foreign code and slow reads run.

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

/// Where a beat's `status` and `topology` come from.
///
/// It is asked on a thread of its own, so it may be slow, hang or panic: the beat goes out without it, says so, and
/// asks again. Closures are sources too:
///
/// ```
/// use decnet_heartbeat::{Snapshot, StatusSource};
///
/// let mut source = || Snapshot::new(&serde_json::json!({"deckies": [], "deployed": false}));
/// assert_eq!(source.snapshot().status(), r#"{"deckies":[],"deployed":false}"#);
/// ```
pub trait StatusSource: Send {
    /// What runs on this host now. What cannot be found out is said inside, not hidden.
    fn snapshot(&mut self) -> Snapshot;

    /// What can be said of the applied topology at once, without waiting for anything.
    ///
    /// Asked once, before the first snapshot: a first beat that must go out without its snapshot still names the
    /// topology, as the master would otherwise order it to be built again. `None`, the default, where none is kept.
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

/// What a source found: the wire's `status` object and, where it knows one, its `topology`.
///
/// ```
/// use decnet_heartbeat::Snapshot;
///
/// let known = Snapshot::new(&serde_json::json!({"deckies": [], "deployed": false}));
/// assert_eq!(known.status(), r#"{"deckies":[],"deployed":false}"#);
/// // Not `{"deckies": []}`: that would say that there are none.
/// let unknown = Snapshot::unknown("the hypervisor does not answer");
/// assert_eq!(unknown.status(), r#"{"error":"the hypervisor does not answer"}"#);
/// assert!(unknown.topology().is_none());
/// ```
#[derive(Clone, Debug)]
pub struct Snapshot {
    status: Box<RawValue>,
    topology: Option<Topology>,
    /// What could not be found out, safe to log.
    fault: Option<String>,
    /// The status says nothing but that.
    is_unknown: bool,
}

impl Snapshot {
    /// A snapshot with this `status`, which must serialize to a JSON object (see [the protocol](crate::protocol#status)).
    ///
    /// # What the master makes of it
    ///
    /// | status | meaning |
    /// | --- | --- |
    /// | `{}`, or `{"error": "…"}` | the host lives, and nothing is known of its deckies; the master changes none |
    /// | `"deployed": false`, or no `deckies` | nothing is deployed; the master changes no decky |
    /// | `"deployed": true`, `deckies` and `runtime` | the master writes down each decky, with its state |
    ///
    /// - `deckies` is a list. Each entry is a decky as it stands in DECNET's state file. The master's model is strict: it
    ///   drops a decky with an unknown key, or without a required one, and writes that to its own log only.
    /// - `runtime` is an object of objects: `{decky: {"running": bool, "services": {service: state}}}`. A decky in
    ///   `deckies` that is not in `runtime`, or is null there, is written down as degraded. So where states are not known,
    ///   leave out `deckies`, or those deckies, and say why in `error`.
    /// - Strings and keys are text: no lone surrogate (`"\udcff"`), which JSON allows and the master answers 500 for.
    ///   Integers have at most 4,300 digits, other numbers a finite value, and nothing is nested deeper than 100 levels.
    /// - All of it is at most 16 MiB.
    ///
    /// A status that is no object, has a `deckies` or a `runtime` of another shape, or breaks one of the last two rules is
    /// replaced by `{"error": …}` with the reason: no fault of a source stops a beat. The entries of `deckies` are not
    /// looked at.
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
    /// // No object, so the beat says what is wrong with the source.
    /// let wrong = Snapshot::new(&["decky-01"]);
    /// assert_eq!(wrong.status(), r#"{"error":"the status source did not give a JSON object"}"#);
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

    /// As [`new`](Self::new), of parts that have been looked at already. The error is for people.
    pub(crate) fn of_parts(status: &impl Serialize) -> Result<Self, String> {
        match to_raw_value(status) {
            Ok(status) if status.get().len() > limits::STATUS => {
                Err(format!("the status is larger than {} bytes", limits::STATUS))
            }
            Ok(status) if status.get().starts_with('{') => {
                Ok(Self { status, topology: None, fault: None, is_unknown: false })
            }
            Ok(_) => Err("the status source did not give a JSON object".to_owned()),
            Err(error) => Err(format!("the status source's answer cannot be serialized: {error}")),
        }
    }

    /// A snapshot that says why nothing is known. It changes nothing at the master but the host's liveness. The reason is
    /// cut to 2,000 characters.
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
        // Serializing one string cannot fail; were it to, an empty status says nothing either.
        let status = to_raw_value(&wire::Status::Unknown { error: reason })
            .unwrap_or_else(|_| empty_object());
        Self { status, topology: None, fault: Some(sanitize(reason)), is_unknown: true }
    }

    /// The same snapshot with a topology.
    ///
    /// Leaving it out is not neutral: where the master expects a topology on this host, it orders it to be built again.
    ///
    /// ```
    /// use decnet_heartbeat::{Observed, Snapshot, Topology};
    ///
    /// // Nothing is applied on this host, and the containers have been looked at.
    /// let nothing = Observed::Seen { bridges: Vec::new(), containers: Vec::new() };
    /// let topology = Topology { applied: None, observed: nothing };
    /// let snapshot = Snapshot::unknown("libvirt is away").with_topology(topology.clone());
    /// assert_eq!(snapshot.topology(), Some(&topology));
    /// ```
    pub fn with_topology(mut self, topology: Topology) -> Self {
        self.topology = Some(topology);
        self
    }

    /// The same snapshot, which says inside what could not be found out.
    pub(crate) fn with_fault(mut self, fault: Option<&str>) -> Self {
        self.fault = fault.map(sanitize);
        self
    }

    /// It has no states, only the reason for that.
    pub(crate) fn is_unknown(&self) -> bool {
        self.is_unknown
    }

    /// What could not be found out.
    pub(crate) fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// `status` as JSON.
    pub fn status(&self) -> &str {
        self.status.get()
    }

    /// The topology, where the source knows one.
    pub fn topology(&self) -> Option<&Topology> {
        self.topology.as_ref()
    }

    pub(crate) fn raw_status(&self) -> &RawValue {
        &self.status
    }
}

fn empty_object() -> Box<RawValue> {
    to_raw_value(&serde_json::Map::new()).unwrap_or_else(|_| RawValue::NULL.to_owned())
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
    /// The applied topology; `None` when there is none.
    pub applied: Option<AppliedTopology>,
    /// What is there of it.
    pub observed: Observed,
}

/// A row of `topology.db`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppliedTopology {
    /// The master's id of the topology.
    pub topology_id: String,
    /// The hash of what was applied, by which the master sees whether it is what it expects.
    pub applied_version_hash: String,
    /// When it was applied, in seconds since 1970.
    pub applied_at: i64,
    /// What went wrong when it was applied.
    pub last_error: Option<String>,
}

/// What Docker shows of topologies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// It answered.
    Seen {
        /// Bridge networks named `decnet-topology-*`, in order.
        bridges: Vec<String>,
        /// Running containers named `decnet-*`, in order.
        containers: Vec<String>,
    },
    /// It did not, and why; at most 200 characters go out.
    Unknown(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_that_is_no_object_is_said_as_unknown() {
        for wrong in [serde_json::json!([1]), serde_json::json!("x"), serde_json::json!(null)] {
            assert_eq!(
                Snapshot::new(&wrong).status(),
                r#"{"error":"the status source did not give a JSON object"}"#
            );
        }
    }

    #[test]
    fn a_status_that_cannot_be_serialized_is_said_as_unknown() {
        let wrong = std::collections::BTreeMap::from([((1, 2), 3)]);
        assert_eq!(
            Snapshot::new(&wrong).status(),
            r#"{"error":"the status source's answer cannot be serialized: key must be a string"}"#
        );
    }

    #[test]
    fn a_status_that_the_master_fails_on_is_said_as_unknown() {
        let raw = |json: &str| RawValue::from_string(json.to_owned()).unwrap();
        let said = "the status of this source cannot be sent: ";
        for (json, problem) in [
            (
                r#"{"deckies": [{"name": "\udcff"}]}"#,
                r"status.deckies[0].name has a lone surrogate, \udcff, on which the master fails",
            ),
            (r#"{"deployed": true, "deckies": {"d1": 1}}"#, "deckies is not a list"),
            (
                r#"{"runtime": {"d1": "running"}}"#,
                "a decky in runtime is not an object at line 1 column 29",
            ),
            (
                r#"{"x": 1e999}"#,
                "status.x is a number that is too large: the master takes it for infinity",
            ),
        ] {
            let expected = serde_json::json!({"error": format!("{said}{problem}")});
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
    fn a_reason_is_cut_before_it_is_copied() {
        let snapshot = Snapshot::unknown(&"x".repeat(10_000_000));
        assert_eq!(
            snapshot.status(),
            format!(r#"{{"error":"{}"}}"#, "x".repeat(limits::STATUS_ERROR))
        );
        assert!(snapshot.fault().unwrap().len() < 2 * limits::LOG_TEXT);
    }
}
