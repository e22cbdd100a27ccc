//! The status of a beat as JSON, with the keys of DECNET's own agent. Values only, for any thread.

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

/// `status`, as DECNET's own agent sends it.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Status<'a> {
    /// There is no state file, so nothing is deployed.
    Nothing {
        deployed: bool,
        deckies: [(); 0],
        /// A problem with another part.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a str>,
    },
    /// Deckies, and the state of their containers.
    Deployed {
        deployed: bool,
        mode: &'a RawValue,
        compose_path: &'a RawValue,
        deckies: &'a RawValue,
        runtime: Runtime<'a>,
        /// A problem with another part, or why deckies are left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a str>,
    },
    /// Deckies are deployed, but the states of their containers are unknown. No decky is named,
    /// because the master would store a decky without states as degraded.
    StatesUnknown { deployed: bool, mode: &'a RawValue, compose_path: &'a RawValue, error: &'a str },
    /// It is unknown what is deployed. No decky is named, so the master changes none.
    Unknown { error: &'a str },
}

impl<'a> Status<'a> {
    /// Nothing is deployed.
    pub(crate) fn nothing(error: Option<&'a str>) -> Self {
        Self::Nothing { deployed: false, deckies: [], error }
    }
}

/// `runtime`: for each decky, in the order of the state file, its services and the states of their
/// containers.
pub(crate) struct Runtime<'a>(pub(crate) Vec<(&'a str, Vec<(&'a str, &'a str)>)>);

impl Serialize for Runtime<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let deckies = self.0.iter();
        serializer.collect_map(deckies.map(|(decky, services)| (decky, DeckyRuntime::of(services))))
    }
}

#[derive(Serialize)]
struct DeckyRuntime<'a> {
    /// The decky has a service, and all its services are running.
    running: bool,
    #[serde(serialize_with = "as_map")]
    services: &'a [(&'a str, &'a str)],
}

impl<'a> DeckyRuntime<'a> {
    fn of(services: &'a [(&'a str, &'a str)]) -> Self {
        let running = !services.is_empty() && services.iter().all(|(_, state)| *state == "running");
        Self { running, services }
    }
}

fn as_map<S: Serializer>(pairs: &[(&str, &str)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn decky_is_running_if_all_its_services_are() {
        let runtime = Runtime(vec![
            ("up", vec![("ssh", "running"), ("ftp", "running")]),
            ("half", vec![("ssh", "running"), ("ftp", "exited")]),
            ("none", vec![]),
        ]);
        assert_eq!(
            json(&runtime),
            concat!(
                r#"{"up":{"running":true,"services":{"ssh":"running","ftp":"running"}},"#,
                r#""half":{"running":false,"services":{"ssh":"running","ftp":"exited"}},"#,
                r#""none":{"running":false,"services":{}}}"#
            )
        );
    }

    #[test]
    fn unknown_status_has_only_an_error() {
        assert_eq!(json(&Status::nothing(None)), r#"{"deployed":false,"deckies":[]}"#);
        assert_eq!(json(&Status::Unknown { error: "Docker" }), r#"{"error":"Docker"}"#);
    }
}
