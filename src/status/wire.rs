//! The status of a beat as JSON, in the words of DECNET's own agent. Values only, for any thread.

use serde::ser::{SerializeMap, SerializeStruct};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

/// What runs on this host, as DECNET's own agent says it.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Status<'a> {
    /// No state file: nothing is deployed.
    Nothing {
        deployed: bool,
        deckies: [(); 0],
        /// What else is wrong.
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
        /// What else is wrong.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a str>,
    },
    /// Something is deployed, but Docker does not tell what runs. A decky without states would count as degraded, so
    /// none is named.
    Unseen { deployed: bool, mode: &'a RawValue, compose_path: &'a RawValue, error: &'a str },
    /// It is not known what is deployed. No decky is named, so the master touches no shard row.
    Unknown { error: &'a str },
}

impl<'a> Status<'a> {
    /// Nothing is deployed.
    pub(crate) fn nothing(error: Option<&'a str>) -> Self {
        Self::Nothing { deployed: false, deckies: [], error }
    }
}

/// `runtime`: for each decky, in the state file's order, its services and their containers' states.
pub(crate) struct Runtime<'a>(pub(crate) Vec<(&'a str, Vec<(&'a str, &'a str)>)>);

impl Serialize for Runtime<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (decky, services) in &self.0 {
            map.serialize_entry(decky, &DeckyRuntime(services))?;
        }
        map.end()
    }
}

/// `running` is true when there is at least one service and all run.
struct DeckyRuntime<'a>(&'a [(&'a str, &'a str)]);

impl Serialize for DeckyRuntime<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let running = !self.0.is_empty() && self.0.iter().all(|(_, state)| *state == "running");
        let mut decky = serializer.serialize_struct("DeckyRuntime", 2)?;
        decky.serialize_field("running", &running)?;
        decky.serialize_field("services", &Services(self.0))?;
        decky.end()
    }
}

struct Services<'a>(&'a [(&'a str, &'a str)]);

impl Serialize for Services<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn a_decky_runs_when_it_has_services_and_all_run() {
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
    fn unknown_is_said_as_unknown() {
        assert_eq!(json(&Status::nothing(None)), r#"{"deployed":false,"deckies":[]}"#);
        assert_eq!(json(&Status::Unknown { error: "Docker" }), r#"{"error":"Docker"}"#);
    }
}
