//! What is on this host: the state file, Docker, the topology, the outbox, and where reports go. Runs on the program's main
//! thread.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{Access, access, statvfs};

use super::super::RunOptions;
use super::steps::Step;
use crate::delta::from_micros;
use crate::error::{chain, printable_path};
use crate::limits;
use crate::outbox::{Counts, Outbox, OutboxLocation, Role, deliverer, folder};
use crate::status::AppliedTopology;
use crate::status::decnet::Findings;
use crate::text::printable;

/// How many deckies DECNET says there are. `None`: there is no state file.
pub(super) fn state_file(options: &RunOptions, deckies: &Result<Option<usize>, String>) -> Step {
    let file = printable_path(options.state_file());
    let from = options.state_file.as_ref().map_or("default", |_| "--state-file");
    let step = match deckies {
        Ok(Some(1)) => Step::good("state-file", format!("{file} ({from}): 1 decky")),
        Ok(Some(deckies)) => Step::good("state-file", format!("{file} ({from}): {deckies} deckies")),
        Ok(None) => Step::good("state-file", format!("{file} ({from}): there is none, so nothing is deployed"))
            .advise("if something is, name DECNET's decnet-state.json with --state-file"),
        Err(problem) => Step::bad(
            "state-file",
            format!("{problem} ({from})"),
            "let DECNET write it anew, or let this user read it; until then the beats name no decky",
        ),
    };
    step.fact("file", file).fact("from", from).fact("deckies", deckies.as_ref().ok().copied().flatten())
}

pub(super) fn docker(options: &RunOptions, found: &Findings) -> Step {
    let socket = printable_path(options.docker_socket());
    let from = options.docker_socket.as_ref().map_or("default", |_| "--docker-socket");
    let step = match &found.engine {
        Ok(engine) => {
            let (containers, bridges) = (engine.containers.len(), engine.bridges.len());
            Step::good("docker", format!("{socket} ({from}): {containers} containers, {bridges} bridge networks"))
                .fact("containers", containers)
                .fact("bridges", bridges)
        }
        Err(problem) => Step::bad(
            "docker",
            format!("{problem} ({from})"),
            "start the Docker Engine, let this user use its socket, or name another with --docker-socket; until then \
             the beats name no decky",
        ),
    };
    step.fact("socket", socket).fact("from", from)
}

/// `agent_dir`: `None` where it is not known.
pub(super) fn topology(agent_dir: Option<&Path>, found: &Findings) -> Step {
    let Some(agent_dir) = agent_dir else { return Step::not_tried("topology", "it takes the agent dir") };
    let file = printable_path(&agent_dir.join("topology.db"));
    let step = match (&found.topology, &found.applied) {
        (Err(problem), _) => Step::bad(
            "topology",
            problem.clone(),
            "let this user read it, or let DECNET's agent write it anew if it is damaged; until then the beats leave the \
             topology out, and the master may order it anew",
        ),
        (Ok(()), Some(Some(AppliedTopology { topology_id, applied_version_hash, .. }))) => {
            let (id, hash) = (printable(topology_id), printable(applied_version_hash));
            let step = Step::good("topology", format!("{file}: {id}, version {hash}"));
            step.fact("topology_id", id).fact("applied_version_hash", hash)
        }
        (Ok(()), _) => Step::good("topology", format!("{file}: none is applied")),
    };
    step.fact("file", file)
}

/// Where deltas are kept, what of them waits, and who delivers from it. A file that is not there is not made: that would be
/// this user's then, and not that of `run`.
pub(super) fn outbox(location: &OutboxLocation, agent_dir: Option<&Path>) -> Step {
    let known = agent_dir.is_some() || *location != OutboxLocation::AgentDir;
    let Some(path) = location.path(agent_dir.unwrap_or(Path::new(""))).filter(|_| known) else {
        return Step::not_tried("outbox", "it takes the agent dir");
    };
    let file = printable_path(&path);
    let step = match (path.symlink_metadata(), room(folder(&path))) {
        (_, Err(problem)) => lost(format!("{file}: {problem}")),
        (Err(error), _) if error.kind() == io::ErrorKind::NotFound => {
            Step::good("outbox", format!("{file}: run makes it, there is none yet"))
        }
        (Err(error), _) => lost(format!("{file}: {error}")),
        (Ok(_), Ok(())) => opened(&path),
    };
    step.fact("file", file)
}

fn lost(says: impl Into<String>) -> Step {
    let advice = "let this user write there, make room, or name another file with --outbox (a damaged file is replaced by \
                  run); until then deltas are in memory and do not survive a restart";
    Step::bad("outbox", says, advice)
}

fn opened(path: &Path) -> Step {
    let (outbox, problem) = match Outbox::open(&OutboxLocation::File(path.to_owned()), Path::new(""), Role::Contribute)
    {
        Ok((outbox, problem)) => (outbox, problem),
        Err(error) => return lost(chain(&error)),
    };
    if let Some(problem) = problem {
        return lost(chain(&problem));
    }
    let Counts { waiting, held, operations, rejected, oldest } = outbox.books().counts;
    let age = oldest.and_then(|at| SystemTime::now().duration_since(from_micros(at)).ok());
    let age = age.map(|age| Duration::from_secs(age.as_secs()));
    let for_how_long =
        age.map_or_else(String::new, |age| format!(" (the oldest for {})", humantime::format_duration(age)));
    let who = deliverer(path);
    let by = who.map_or_else(|| "nobody delivers from it".to_owned(), |pid| format!("process {pid} delivers from it"));
    let file = printable_path(path);
    let says =
        format!("{file}: {waiting} waiting{for_how_long}, {operations} in flight, {rejected} refused for good; {by}");
    let step = Step::good("outbox", says)
        .fact("waiting", waiting)
        .fact("held", held)
        .fact("operations", operations)
        .fact("rejected", rejected)
        .fact("oldest_seconds", age.map(|age| age.as_secs()))
        .fact("delivered_by", who);
    match (waiting, who, rejected) {
        (1.., None, _) => step.advise("start decnet-heartbeat run, which delivers what waits"),
        (_, _, 1..) => step.advise("see in the file what was refused, and why: the README has the query"),
        _ => step,
    }
}

/// `--stats-file` or `--metrics-file`.
pub(super) fn report(name: &'static str, path: &Path) -> Step {
    let file = printable_path(path);
    match room(folder(path)) {
        Ok(()) => Step::good(name, format!("{file} can be written")),
        Err(problem) => Step::bad(
            name,
            format!("{file}: {problem}"),
            "make its folder, let this user write into it, or make room there",
        ),
    }
    .fact("file", file)
}

/// Whether this user can make and replace files here, and there is room for them.
fn room(folder: &Path) -> Result<(), String> {
    let shown = printable_path(folder);
    access(folder, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| format!("{shown} cannot be written: {error}"))?;
    let disk = statvfs(folder).map_err(|error| format!("{shown}: {error}"))?;
    let room = disk.f_bavail.saturating_mul(disk.f_frsize);
    if room < limits::ROOM { Err(format!("the disk of {shown} has {} KiB left", room / 1024)) } else { Ok(()) }
}
