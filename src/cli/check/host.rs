//! Checks this host: the state file, Docker, the topology, and the stats and metrics files. Runs on
//! the main thread.

use std::path::Path;

use rustix::fs::{Access, access, statvfs};

use super::super::arguments::RunOptions;
use super::super::{STATE_FILE_VARIABLE, state_file_of_environment};
use super::steps::Step;
use crate::error::sanitize_path;
use crate::files;
use crate::files::folder;
use crate::limits;
use crate::status::AppliedTopology;
use crate::status::decnet::StatusProbe;
use crate::status::docker::DockerState;
use crate::status::place::{LocateError, StateFileLocation};
use crate::text::{counted, sanitize};

/// The step of the state file.
pub(super) fn state_file(options: &RunOptions, probe: &StatusProbe) -> Step {
    let named = match (&options.state_file, state_file_of_environment()) {
        (Some(_), _) => Some("--state-file"),
        (None, Some(_)) => Some(STATE_FILE_VARIABLE),
        (None, None) => None,
    };
    match &probe.located {
        Ok(located) => located_step(named, located, probe.status.as_ref().err(), probe.deckies),
        Err(problem) => unlocated_step(problem),
    }
}

/// `named`: the option or variable that names the file. `deckies`: `None` if there is no file, or a
/// problem.
fn located_step(
    named: Option<&str>,
    located: &StateFileLocation,
    problem: Option<&String>,
    deckies: Option<usize>,
) -> Step {
    let file = sanitize_path(&located.file);
    let from = named.map_or_else(|| located.to_string(), str::to_owned);
    let step = match (problem, deckies) {
        (None, Some(deckies)) => Step::good(
            "state-file",
            format!("{file} ({from}): {}", counted(deckies, "decky", "deckies")),
        ),
        (None, None) => {
            let step = Step::good(
                "state-file",
                format!("{file} ({from}): does not exist; nothing is deployed"),
            );
            if named.is_some() {
                step.advise("if something is deployed, correct the path of the state file")
            } else {
                step
            }
        }
        (Some(problem), _) => Step::bad(
            "state-file",
            format!("{problem} ({from})"),
            "correct the path of the file, let this user read it, or let DECNET write it again; \
             until then beats contain no decky",
        ),
    };
    step.fact("file", file).fact("from", from).fact("deckies", deckies)
}

fn unlocated_step(problem: &LocateError) -> Step {
    let advice = match problem {
        LocateError::Absent(_) => {
            "if DECNET is installed elsewhere, name its decnet-state.json with"
        }
        LocateError::Unreadable(_) => {
            "let this user read that folder, or name DECNET's decnet-state.json with"
        }
    };
    let consequence = "until then the status is unknown, and beats contain no decky";
    let advice = format!("{advice} --state-file or {STATE_FILE_VARIABLE}; {consequence}");
    Step::bad("state-file", problem.to_string(), advice)
        .fact("file", None::<String>)
        .fact("deckies", None::<usize>)
}

/// The step of Docker.
pub(super) fn docker(options: &RunOptions, probe: &StatusProbe) -> Step {
    let socket = sanitize_path(options.docker_socket());
    let from = options.docker_socket.as_ref().map_or("default", |_| "--docker-socket");
    docker_step(&socket, from, &probe.docker, probe.states_problem())
}

/// Names the request that failed, and the consequence. `states`: why the states of containers, or
/// of some deckies' containers, are unknown, as of [`StatusProbe::states_problem`]. It is set
/// whenever the containers are unknown.
fn docker_step(socket: &str, from: &str, docker: &DockerState, states: Option<&str>) -> Step {
    let containers = docker.containers.as_ref().map(|containers| containers.states.len());
    let bridges = docker.networks.as_ref().map(|networks| networks.bridges.len());
    let container_count = counted(containers.unwrap_or(0), "container", "containers");
    let bridge_count = bridges.map(|count| counted(count, "bridge network", "bridge networks"));
    let step = match (states, bridge_count) {
        (None, Ok(bridges)) => {
            let step =
                Step::good("docker", format!("{socket} ({from}): {container_count}, {bridges}"));
            match docker.left_out() {
                Some(left_out) => step.advise(left_out),
                None => step,
            }
        }
        (None, Err(problem)) => Step::bad(
            "docker",
            format!("{problem} (socket: {from}); {container_count}"),
            "Docker, or the proxy of its socket, must answer /networks with a list; until then \
             beats contain the deckies, but not the observed topology",
        ),
        (Some(problem), _) if containers.is_ok() => Step::bad(
            "docker",
            format!("{socket} ({from}): {problem}"),
            "remove this container, or let DECNET deploy its decky again; until then beats do \
             not contain what depends on it",
        ),
        (Some(problem), Ok(bridges)) => Step::bad(
            "docker",
            format!("{problem} (socket: {from}); {bridges}"),
            "Docker, or the proxy of its socket, must answer /containers/json with a list; until \
             then beats contain no decky",
        ),
        (Some(problem), Err(_)) => Step::bad(
            "docker",
            format!("{problem} (socket: {from})"),
            "start Docker, let this user use its socket, or name another socket with \
             --docker-socket; until then beats contain no decky",
        ),
    };
    step.fact("socket", socket)
        .fact("from", from)
        .fact("containers", containers.ok())
        .fact("bridges", bridges.ok())
}

/// The step of `topology.db`. `agent_dir`: `None` if it is unknown.
pub(super) fn topology(agent_dir: Option<&Path>, probe: &StatusProbe) -> Step {
    let Some(agent_dir) = agent_dir else {
        return Step::not_tried("topology", "needs the agent dir");
    };
    let file = sanitize_path(&agent_dir.join("topology.db"));
    let step = match (&probe.topology, &probe.applied) {
        (Err(problem), _) => Step::bad(
            "topology",
            problem.clone(),
            "let this user read it, or let DECNET's agent write it again if it is corrupt; until \
             then run does not report the topology, and the master may order a rebuild",
        ),
        (Ok(()), Some(Some(AppliedTopology { topology_id, applied_version_hash, .. }))) => {
            let id = sanitize(topology_id);
            let hash = sanitize(applied_version_hash);
            let step = Step::good("topology", format!("{file}: {id}, version {hash}"));
            step.fact("topology_id", id).fact("applied_version_hash", hash)
        }
        (Ok(()), _) => Step::good("topology", format!("{file}: no topology is applied")),
    };
    step.fact("file", file)
}

/// The step of `--stats-file` or `--metrics-file`. `own`: which of the heartbeat's own files this
/// is.
pub(super) fn output_file(name: &'static str, path: &Path, own: Option<&str>) -> Step {
    let file = sanitize_path(path);
    if let Some(what) = own {
        let problem = format!("{file} is {what}, which would be replaced");
        return Step::bad(name, problem, "name another file").fact("file", file);
    }
    let advice = "create its folder, let this user write into it, or free disk space";
    match (files::check_replaceable(path), check_room(folder(path))) {
        (Ok(()), Ok(())) => Step::good(name, format!("{file} can be written")),
        (_, Err(problem)) => Step::bad(name, format!("{file}: {problem}"), advice),
        (Err(error), Ok(())) => Step::bad(
            name,
            format!("{file}: {error}"),
            "name another file, or remove the existing one: run replaces only regular files",
        ),
    }
    .fact("file", file)
}

/// Checks that this user can create and replace files in the folder, and that its disk has space.
pub(super) fn check_room(folder: &Path) -> Result<(), String> {
    let shown = sanitize_path(folder);
    access(folder, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| format!("{shown} cannot be written: {error}"))?;
    let disk = statvfs(folder).map_err(|error| format!("{shown}: {error}"))?;
    let available = disk.f_bavail.saturating_mul(disk.f_frsize);
    if available < limits::MIN_DISK_SPACE {
        Err(format!("the disk of {shown} has only {} KiB left", available / 1024))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::log_line::Style;
    use crate::status::docker::{Containers, Networks};

    fn shown(step: Step) -> String {
        step.text(Style::Plain, None)
    }

    #[test]
    fn state_file_is_shown_with_the_way_it_was_found() {
        let folder = "/opt/decnet/venv/lib/python3.11/site-packages";
        let located = StateFileLocation {
            file: format!("{folder}/decnet-state.json").into(),
            package: Some(format!("{folder}/decnet").into()),
        };
        let line =
            format!("✓ state-file    {folder}/decnet-state.json (found beside {folder}/decnet): ");
        let shown = |deckies| shown(located_step(None, &located, None, deckies));
        assert_eq!(shown(Some(1)), format!("{line}1 decky\n"));
        assert_eq!(shown(Some(2)), format!("{line}2 deckies\n"));
        assert_eq!(shown(None), format!("{line}does not exist; nothing is deployed\n"));
    }

    #[test]
    fn missing_state_file_fails_with_advice() {
        let text = shown(unlocated_step(&LocateError::Absent("/opt/decnet".to_owned())));
        let not_found = "✗ state-file    the state file was not found: DECNET's Python package is \
            not in /opt/decnet\n";
        assert!(
            text.starts_with(not_found) && text.contains("→ if DECNET is installed elsewhere"),
            "{text}"
        );
        let text =
            shown(unlocated_step(&LocateError::Unreadable("/opt: Permission denied".to_owned())));
        let unknown = "✗ state-file    cannot locate the state file: /opt: Permission denied\n";
        assert!(
            text.starts_with(unknown) && text.contains("→ let this user read that folder"),
            "{text}"
        );
    }

    #[test]
    fn named_state_file_is_shown_with_its_option_or_variable() {
        let located = StateFileLocation { file: "/x".into(), package: None };
        let text = shown(located_step(Some(STATE_FILE_VARIABLE), &located, None, Some(1)));
        assert_eq!(text, "✓ state-file    /x (DECNET_HEARTBEAT_STATE_FILE): 1 decky\n");
        let problem = "state file /x: EOF".to_owned();
        let text = shown(located_step(Some("--state-file"), &located, Some(&problem), None));
        assert!(text.starts_with("✗ state-file    state file /x: EOF (--state-file)\n"), "{text}");
    }

    #[test]
    fn docker_is_shown_with_the_failed_request_and_its_consequence() {
        let states = |count: usize| (0..count).map(|n| (n.to_string(), None)).collect();
        let containers = |count| Ok(Containers { states: states(count), left_out: None });
        let networks = |count| Ok(Networks { bridges: vec![String::new(); count], left_out: None });
        let refused = |what: &str| format!("Docker at /s: {what}: answered 403");
        let shown = |engine: DockerState| {
            let problem = engine.containers.as_ref().err().cloned();
            self::shown(docker_step("/s", "default", &engine, problem.as_deref()))
        };
        let text = shown(DockerState { containers: containers(1), networks: networks(1) });
        assert_eq!(text, "✓ docker        /s (default): 1 container, 1 bridge network\n");
        let text = shown(DockerState { containers: containers(2), networks: networks(0) });
        assert_eq!(text, "✓ docker        /s (default): 2 containers, 0 bridge networks\n");
        let text =
            shown(DockerState { containers: containers(2), networks: Err(refused("/networks")) });
        assert!(
            text.starts_with(
                "✗ docker        Docker at /s: /networks: answered 403 (socket: default); 2 containers\n"
            ),
            "{text}"
        );
        assert!(
            text.contains(
                "must answer /networks with a list; until then beats contain the deckies"
            ),
            "{text}"
        );
        let text =
            shown(DockerState { containers: Err(refused("/containers")), networks: networks(1) });
        assert!(
            text.starts_with(
                "✗ docker        Docker at /s: /containers: answered 403 (socket: default); \
                1 bridge network\n"
            ),
            "{text}"
        );
        assert!(text.contains("beats contain no decky"), "{text}");
        let engine = DockerState { containers: containers(2), networks: networks(1) };
        let text = self::shown(docker_step(
            "/s",
            "default",
            &engine,
            Some("no state; 1 decky is left out"),
        ));
        assert!(
            text.starts_with("✗ docker        /s (default): no state; 1 decky is left out\n"),
            "{text}"
        );
        assert!(!text.contains("/containers/json") && !text.contains("no decky"), "{text}");
    }
}
