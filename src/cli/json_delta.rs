//! How an operation ended, as JSON with the names of the protocol: in the requests of `pipe` and in
//! the lines of `push --lines`. Values only.

use std::str::FromStr;
use std::time::SystemTime;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::rfc3339;
use crate::delta::{LifecycleDelta, Operation, Outcome};
use crate::error::chain;
use crate::limits;
use crate::text::cut;

/// The error of a failed operation that was reported without one.
pub(super) const NO_REASON: &str = "no reason given";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JsonDelta {
    decky_name: String,
    #[serde(deserialize_with = "from_text")]
    operation: Operation,
    status: JsonStatus,
    error: Option<String>,
    completed_at: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum JsonStatus {
    Succeeded,
    Failed,
}

/// How and when an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    /// `None`: now.
    pub(super) completed_at: Option<SystemTime>,
}

pub(super) fn from_text<'de, D, T>(json: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    String::deserialize(json)?.parse().map_err(D::Error::custom)
}

impl JsonDelta {
    /// The error names the key.
    pub(super) fn into_delta(self) -> Result<LifecycleDelta, String> {
        let Self { decky_name, operation, status, error, completed_at } = self;
        let delta = Ended::new(status, error, completed_at)?.delta(decky_name, operation);
        delta.check().map_err(|error| chain(&error))?;
        Ok(delta)
    }
}

impl Ended {
    /// The error names the key.
    pub(super) fn new(
        status: JsonStatus,
        error: Option<String>,
        completed_at: Option<String>,
    ) -> Result<Self, String> {
        let outcome = match (status, error) {
            (JsonStatus::Succeeded, None) => Outcome::Succeeded,
            (JsonStatus::Succeeded, Some(_)) => {
                return Err("error: says why it failed, and goes with the status failed".to_owned());
            }
            // It is truncated here, once, and not again for each decky of the operation.
            (JsonStatus::Failed, error) => {
                let error = error.as_deref().unwrap_or(NO_REASON);
                Outcome::Failed(cut(error, limits::DELTA_ERROR).to_owned())
            }
        };
        let completed_at = completed_at
            .map(|text| rfc3339::parse(&text).map_err(|problem| format!("completed_at: {problem}")))
            .transpose()?;
        Ok(Self { outcome, completed_at })
    }

    pub(super) fn delta(self, decky: String, operation: Operation) -> LifecycleDelta {
        let delta = LifecycleDelta::new(decky, operation, self.outcome);
        match self.completed_at {
            Some(at) => delta.completed_at(at),
            None => delta,
        }
    }
}
