//! Checks whether a running agent uses another outbox than `push` would: then nothing delivers what
//! `push` stores. Runs on the main thread.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::arguments::RunOptions;
use super::steps::Step;
use crate::cli::enrolment::outbox_of_environment;
use crate::error::sanitize_path;
use crate::files;
use crate::limits;
use crate::outbox::{OutboxLocation, deliverer};

/// Adds to the step `outbox` which other file a running agent delivers from, if no process delivers
/// from the file of these options. The stats file names the outbox of the agent that writes it.
pub(super) fn advise(
    step: Step,
    location: &OutboxLocation,
    options: &RunOptions,
    agent_dir: Option<&Path>,
) -> Step {
    let dir = agent_dir.unwrap_or(Path::new(""));
    let Some(ours) = location.path(dir) else { return step };
    if deliverer(&ours).is_some() {
        return step;
    }
    let of_agent_dir = agent_dir.and_then(|dir| OutboxLocation::AgentDir.path(dir));
    let of_stats = options.stats_file.as_deref().and_then(outbox_of_stats);
    let others = [of_stats, outbox_of_environment(), of_agent_dir].into_iter().flatten();
    let mut used = others.filter(|other| *other != ours);
    let Some((other, pid)) = used.find_map(|other| deliverer(&other).map(|pid| (other, pid)))
    else {
        return step;
    };
    let used = sanitize_path(&other);
    let ours = sanitize_path(&ours);
    step.fact("running_outbox", used.clone()).advise_first(format!(
        "the running agent (process {pid}) delivers from {used}, but push and track with these \
         settings would use {ours}: give all of them the same --outbox or DECNET_HEARTBEAT_OUTBOX"
    ))
}

/// The outbox that a stats file names.
fn outbox_of_stats(path: &Path) -> Option<PathBuf> {
    let stats: Value = serde_json::from_slice(&files::read(path, limits::STATS_FILE).ok()?).ok()?;
    stats.get("outbox")?.as_str().map(PathBuf::from)
}
