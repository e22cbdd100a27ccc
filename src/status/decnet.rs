//! DECNET's status, from its state file, Docker and `topology.db`. Each of them may fail alone.
//! Runs on the status thread.

use std::path::{Path, PathBuf};

use super::docker::{Containers, Docker, DockerState, Networks};
use super::place::StateFilePath;
#[cfg(feature = "cli")]
use super::place::{LocateError, StateFileLocation};
use super::state::{DeckyStates, State, StateFile};
use super::topology::TopologyFile;
use super::wire::Status;
use super::{AppliedTopology, Observed, Snapshot, StatusSource, Topology};
use crate::files::absolute;
use crate::log_throttle::LogThrottle;
use crate::panics::quietly;
use crate::text::sanitize;

/// The default socket of the Docker Engine.
pub(crate) const DOCKER_SOCKET: &str = "/var/run/docker.sock";

/// The file in the agent dir with the applied topology.
pub(crate) const TOPOLOGY: &str = "topology.db";

/// The status that DECNET's own agent reports: the deckies of its state file, the states of their
/// containers, and the topology.
///
/// The state file and `topology.db` are only read. Each snapshot queries Docker twice: for its
/// networks, then for its containers. If the containers are unknown, or the state file cannot be
/// found or read, the status names no decky and `status.error` gives the reason, because the master
/// stores a decky without states as degraded. If only the states of some containers are unknown,
/// their deckies are left out. If only the networks are unknown, only `observed` is unknown.
///
/// ```
/// use decnet_heartbeat::{DecnetStatus, Observed, StatusSource};
///
/// # let dir = tempfile::tempdir()?;
///
/// let mut source = DecnetStatus::new(dir.path())
///     .state_file(dir.path().join("decnet-state.json"))
///     .docker_socket(dir.path().join("docker.sock"));
/// // There is no state file, so nothing is deployed. There is no topology.db, so none is applied.
/// let snapshot = source.snapshot();
/// assert_eq!(snapshot.status(), r#"{"deployed":false,"deckies":[]}"#);
/// let topology = snapshot.topology().ok_or("no topology")?;
/// assert_eq!(topology.applied, None);
/// // Docker is not running, so the containers are unknown.
/// assert!(matches!(&topology.observed, Observed::Unknown(why) if why.contains("No such file")));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DecnetStatus {
    state_file: StateFile,
    docker: Docker,
    topology: TopologyFile,
    throttle: LogThrottle,
}

impl DecnetStatus {
    /// A source with the state file that DECNET uses on this host, Docker at
    /// `/var/run/docker.sock`, and `topology.db` in the agent dir.
    ///
    /// DECNET's state file is in the same folder as its Python package. Each snapshot searches for
    /// the package in this order:
    ///
    /// 1. In the virtual environment of `/usr/local/bin/decnet`. On a worker that the master's
    ///    installer set up, this is a symlink to `<environment>/bin/decnet`, and the package is
    ///    `lib/python3.X/site-packages/decnet`. If several versions of Python have it, the version
    ///    in `pyvenv.cfg` is used, otherwise the newest.
    /// 2. In `/opt/decnet/venv`, in the same way.
    /// 3. `/opt/decnet/decnet`, for an editable install.
    ///
    /// If the package exists and the state file does not, nothing is deployed. If the package is
    /// not found, it is unknown what is deployed, and `status.error` names the places that were
    /// searched. A place that cannot be accessed (no permission, a loop of symlinks) ends the
    /// search.
    ///
    /// A relative path, here and in the other methods, is resolved against the current directory of
    /// the process.
    ///
    /// ```
    /// use decnet_heartbeat::{DecnetStatus, Enrolment, Heartbeat};
    ///
    /// let enrolment = Enrolment::new("0c4f9a52", "master.lan", "/etc/decnet/agent")?;
    /// // This is the default source of a heartbeat.
    /// let source = DecnetStatus::new(enrolment.agent_dir().value());
    /// let builder = Heartbeat::builder().enrolment(enrolment).status_source(source);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(agent_dir: &Path) -> Self {
        Self {
            state_file: StateFile::new(StateFilePath::Searched { root: PathBuf::from("/") }),
            docker: Docker::new(DOCKER_SOCKET.into()),
            topology: TopologyFile::new(absolute(&agent_dir.join(TOPOLOGY))),
            throttle: LogThrottle::default(),
        }
    }

    /// Sets the state file. The places of DECNET's package are then not searched.
    ///
    /// If the file does not exist, nothing is deployed. If its folder does not exist or cannot be
    /// accessed, or the file is a dangling symlink, it is unknown what is deployed.
    ///
    /// ```
    /// use decnet_heartbeat::{DecnetStatus, StatusSource};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let path = dir.path().join("decnet-state.json");
    /// let state = r#"{"config": {"mode": "swarm", "deckies": []}, "compose_path": "/srv/c.yml"}"#;
    /// std::fs::write(&path, state)?;
    /// let source = DecnetStatus::new(dir.path()).state_file(&path);
    /// let mut source = source.docker_socket("/no/such/socket");
    /// let status: serde_json::Value = serde_json::from_str(source.snapshot().status())?;
    /// assert_eq!(status["deployed"], true);
    /// assert!(status["error"].is_string()); // Docker does not answer
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn state_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.state_file = StateFile::new(StateFilePath::Named(absolute(&path.into())));
        self
    }

    /// Searches for the state file in this folder instead of `/`.
    #[cfg(test)]
    fn search_under(mut self, root: &Path) -> Self {
        self.state_file = StateFile::new(StateFilePath::Searched { root: root.to_owned() });
        self
    }

    /// Sets the Docker socket.
    pub fn docker_socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.docker = Docker::new(absolute(&path.into()));
        self
    }

    /// The status, or why it is unknown. `other` is another problem to report.
    #[cfg(any(test, feature = "loopback"))]
    pub(crate) fn status(
        &mut self,
        docker: &DockerState,
        other: Option<&str>,
    ) -> Result<Snapshot, String> {
        let located = self.state_file.locate().map_err(|problem| problem.to_string())?;
        report(self.state_file.read(&located)?, docker, other)
    }

    /// The state file, and those of these deckies that it does not list. `None`: there is no state
    /// file, or it cannot be found or read.
    #[cfg(feature = "cli")]
    pub(crate) fn unlisted<'a>(
        &mut self,
        deckies: impl IntoIterator<Item = &'a str>,
    ) -> Option<(PathBuf, Vec<&'a str>)> {
        let located = self.state_file.locate().ok()?;
        let state = self.state_file.read(&located).ok()??;
        let unlisted = deckies.into_iter().filter(|decky| !state.has_decky(decky)).collect();
        Some((located.file, unlisted))
    }

    /// The topology alone, for an agent that reports its own status. `None`: it was never read.
    #[cfg(feature = "cli")]
    pub(crate) fn topology(&mut self) -> Option<Topology> {
        let docker = self.docker.query();
        let (applied, read) = self.topology.read();
        let problem = docker.containers.as_ref().err().map(String::as_str);
        log_problem(&mut self.throttle, "Docker's containers", problem);
        log_problem(&mut self.throttle, "topology.db", read.as_ref().err().map(String::as_str));
        Some(Topology { applied: applied?, observed: observe(&docker) })
    }

    /// Reads everything. Docker comes first, as it may be slow. `topology.db` comes last, because
    /// an open that blocks in SQLite blocks every other open in this process.
    pub(crate) fn probe(&mut self) -> StatusProbe {
        let docker = self.docker.query();
        let located = self.state_file.locate();
        let state = located
            .as_ref()
            .map_err(ToString::to_string)
            .and_then(|located| self.state_file.read(located));
        let (applied, topology) = self.topology.read();
        let other = topology.as_ref().err().map(String::as_str);
        #[cfg(feature = "cli")]
        let deckies = state.as_ref().ok().and_then(|state| state.map(State::deckies));
        let status = state.and_then(|state| report(state, &docker, other));
        StatusProbe {
            docker,
            #[cfg(feature = "cli")]
            located,
            status,
            #[cfg(feature = "cli")]
            deckies,
            applied,
            topology,
        }
    }
}

/// The parts of a snapshot, each with its error.
#[derive(Debug)]
pub(crate) struct StatusProbe {
    pub(crate) docker: DockerState,
    #[cfg(feature = "cli")]
    pub(crate) located: Result<StateFileLocation, LocateError>,
    /// The error is about the state file.
    pub(crate) status: Result<Snapshot, String>,
    /// The number of deckies in the state file, if it can be read.
    #[cfg(feature = "cli")]
    pub(crate) deckies: Option<usize>,
    /// As returned by [`TopologyFile::read`].
    pub(crate) applied: Option<Option<AppliedTopology>>,
    pub(crate) topology: Result<(), String>,
}

impl StatusProbe {
    /// Why states of containers are unknown.
    pub(crate) fn states_problem(&self) -> Option<&str> {
        let of_deckies = || self.status.as_ref().ok().and_then(Snapshot::fault);
        self.docker.containers.as_ref().err().map(String::as_str).or_else(of_deckies)
    }

    /// Why the networks are unknown. If both requests fail, only the error of the containers is
    /// reported.
    fn networks_problem(&self) -> Option<&str> {
        self.docker
            .networks
            .as_ref()
            .err()
            .filter(|_| self.docker.containers.is_ok())
            .map(String::as_str)
    }

    /// The snapshot of all parts.
    pub(crate) fn into_snapshot(self) -> Snapshot {
        // Entries of Docker's answers that were left out are not reported: none of them belongs to
        // a decky.
        let faults = [
            self.states_problem(),
            self.networks_problem(),
            self.status.as_ref().err().map(String::as_str),
            self.topology.as_ref().err().map(String::as_str),
        ];
        let fault = faults
            .into_iter()
            .flatten()
            .map(str::to_owned)
            .reduce(|some, more| both(&some, Some(&more)));
        let other = self.topology.err();
        let snapshot =
            self.status.unwrap_or_else(|error| Snapshot::unknown(&both(&error, other.as_deref())));
        let snapshot = snapshot.with_fault(fault.as_deref());
        match self.applied {
            Some(applied) => {
                snapshot.with_topology(Topology { applied, observed: observe(&self.docker) })
            }
            None => snapshot,
        }
    }
}

impl StatusSource for DecnetStatus {
    fn snapshot(&mut self) -> Snapshot {
        let probe = self.probe();
        let mut log = |source: &'static str, problem: Option<&str>| {
            log_problem(&mut self.throttle, source, problem);
        };
        log("Docker's containers", probe.states_problem());
        if probe.docker.containers.is_ok() {
            log("Docker's networks", probe.networks_problem());
            log("a part of Docker's answer", probe.docker.left_out().as_deref());
        }
        log("the state file", probe.status.as_ref().err().map(String::as_str));
        log("topology.db", probe.topology.as_ref().err().map(String::as_str));
        probe.into_snapshot()
    }

    fn applied_topology(&mut self) -> Option<Topology> {
        let applied = self.topology.read().0?;
        Some(Topology {
            applied,
            observed: Observed::Unknown("Docker has not been queried yet".to_owned()),
        })
    }
}

/// Logs a problem when it begins, changes or ends, but not with each snapshot.
fn log_problem(throttle: &mut LogThrottle, source: &'static str, problem: Option<&str>) {
    if let Some(problem) = problem {
        throttle.log_lasting(source, problem, |_| {
            log::warn!("{source} cannot be read: error={problem:?}");
        });
    } else if throttle.end(source) {
        quietly(|| log::info!("{source} can be read again"));
    }
}

/// The status of the deployed deckies. No state: nothing is deployed. The error is about the state
/// file, which is too large.
pub(crate) fn report(
    state: Option<&State>,
    docker: &DockerState,
    other: Option<&str>,
) -> Result<Snapshot, String> {
    let Some(state) = state else { return Snapshot::of_parts(&Status::nothing(other)) };
    let State { mode, compose_path, .. } = state;
    let containers = docker.containers.as_ref().map_err(String::clone);
    match containers.and_then(|containers| state.decky_states(containers)) {
        Ok(DeckyStates { deckies, runtime, left_out }) => {
            let problem = left_out.as_deref().map(|left_out| both(left_out, other));
            let error = problem.as_deref().or(other);
            let deckies = &*deckies;
            let status =
                Status::Deployed { deployed: true, mode, compose_path, deckies, runtime, error };
            Ok(Snapshot::of_parts(&status)?.with_fault(left_out.as_deref()))
        }
        Err(error) => {
            let problem = both(&error, other);
            let status =
                Status::StatesUnknown { deployed: true, mode, compose_path, error: &problem };
            Ok(Snapshot::of_parts(&status)?.with_fault(Some(&error)))
        }
    }
}

/// Joins two problems.
fn both(error: &str, other: Option<&str>) -> String {
    other.map_or_else(|| error.to_owned(), |other| format!("{error}; {other}"))
}

/// The networks and containers of topologies. Unknown if either request failed, because the master
/// would take one without the other as a missing part.
fn observe(docker: &DockerState) -> Observed {
    let (containers, networks) = match (&docker.containers, &docker.networks) {
        (Ok(containers), Ok(networks)) => (containers, networks),
        (Err(problem), _) | (_, Err(problem)) => return Observed::Unknown(problem.clone()),
    };
    let mut bridges: Vec<_> =
        networks.bridges.iter().filter(|name| name.starts_with(Networks::OURS)).cloned().collect();
    bridges.sort();
    let mut running = Vec::new();
    // The map is ordered by name.
    for (name, state) in
        containers.states.iter().filter(|(name, _)| name.starts_with(Containers::OURS))
    {
        match state.as_deref() {
            // Docker also lists a paused or restarting container as running.
            Some("running" | "paused" | "restarting") => running.push(name.clone()),
            Some(_) => (),
            None => {
                return Observed::Unknown(format!(
                    "Docker's answer has no usable state of {}",
                    sanitize(name)
                ));
            }
        }
    }
    Observed::Seen { bridges, containers: running }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn source(state: Option<&str>) -> (tempfile::TempDir, DecnetStatus) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("decnet-state.json");
        if let Some(state) = state {
            std::fs::write(&path, state).unwrap();
        }
        let source = DecnetStatus::new(dir.path())
            .state_file(path)
            .docker_socket(dir.path().join("docker.sock"));
        (dir, source)
    }

    fn engine(containers: &[(&str, &str)]) -> DockerState {
        let states = containers
            .iter()
            .map(|(name, state)| ((*name).to_owned(), Some((*state).to_owned())))
            .collect();
        let bridges = vec!["decnet-topology-b".into(), "decnet-topology-a".into(), "other".into()];
        let containers = Ok(Containers { states, left_out: None });
        DockerState { containers, networks: Ok(Networks { bridges, left_out: None }) }
    }

    /// An engine for which both requests failed.
    fn failed(why: &str) -> DockerState {
        DockerState { containers: Err(why.to_owned()), networks: Err(why.to_owned()) }
    }

    const STATE: &str = r#"{"config": {"mode": "swarm", "unknown": 1, "deckies": [
        {"name": "d1", "services": ["ssh", "smb_share"], "weird": 1.50e2, "deep": {"a": [1, null]}},
        {"services": ["ftp"], "name": "d2"}]}, "compose_path": "/x.yml"}"#;

    #[test]
    fn deckies_are_sent_unchanged() {
        let (_dir, mut source) = source(Some(STATE));
        let containers =
            [("d1-ssh", "running"), ("d1-smb-share", "exited"), ("d1-smb_share", "running")];
        assert_eq!(
            source.status(&engine(&containers), None).unwrap().status(),
            concat!(
                r#"{"deployed":true,"mode":"swarm","compose_path":"/x.yml","deckies":["#,
                "\n        ",
                r#"{"name": "d1", "services": ["ssh", "smb_share"], "weird": 1.50e2, "deep": {"a": [1, null]}},"#,
                "\n        ",
                r#"{"services": ["ftp"], "name": "d2"}],"#,
                r#""runtime":{"d1":{"running":false,"services":{"ssh":"running","smb_share":"exited"}},"#,
                r#""d2":{"running":false,"services":{"ftp":"absent"}}}}"#
            )
        );
    }

    #[test]
    fn no_decky_is_named_without_docker() {
        let (dir, mut source) = source(Some(STATE));
        let expected = format!(
            r#"{{"deployed":true,"mode":"swarm","compose_path":"/x.yml","error":"Docker at {}: {}"}}"#,
            dir.path().join("docker.sock").display(),
            "/containers/json?all=true: No such file or directory (os error 2)"
        );
        assert_eq!(source.snapshot().status(), expected);
    }

    #[test]
    fn no_state_file_means_nothing_deployed() {
        let (_dir, mut source) = source(None);
        assert_eq!(source.snapshot().status(), r#"{"deployed":false,"deckies":[]}"#);
    }

    #[test]
    fn unreadable_state_file_is_reported() {
        for (state, problem) in [
            ("", "EOF while parsing a value at line 1 column 0"),
            ("{", "EOF while parsing an object at line 1 column 1"),
            ("[]", "invalid type: sequence, expected an object at line 1 column 0"),
            ("{}", "no key `config` at line 1 column 2"),
            (r#"{"config": {}, "compose_path": ""}"#, "config: no key `mode`"),
            (
                r#"{"config": {"mode": 1, "deckies": {}}, "compose_path": ""}"#,
                "deckies: invalid type: map, expected a list of at most 20000",
            ),
            (
                r#"{"config": {"mode": 1, "deckies": [{"name": "x"}]}, "compose_path": ""}"#,
                "deckies[0]: no key `services`",
            ),
            (
                r#"{"config": {"mode": 1, "deckies": [{"name": "x", "services": [1]}]}, "compose_path": ""}"#,
                "deckies[0].services: invalid type: integer `1`, expected a string",
            ),
        ] {
            let (dir, mut source) = source(Some(state));
            let expected =
                format!("state file {}: {problem}", dir.path().join("decnet-state.json").display());
            assert_eq!(source.status(&engine(&[]), None).unwrap_err(), expected, "{state}");
        }
    }

    #[test]
    fn unreadable_topology_is_reported_with_other_problems() {
        let dir = "DIR/topology.db: ";
        let state = r#"{"config": {"mode": 1, "deckies": []}, "compose_path": ""}"#;
        let error = |state: Option<&str>, engine: DockerState| {
            let (_dir, mut source) = source(state);
            let snapshot = source.status(&engine, Some(dir)).unwrap();
            serde_json::from_str::<serde_json::Value>(snapshot.status()).unwrap()["error"].take()
        };
        assert_eq!(error(None, engine(&[])), dir);
        assert_eq!(error(Some(state), engine(&[])), dir);
        assert_eq!(error(Some(state), failed("Docker")), format!("Docker; {dir}"));
    }

    #[test]
    fn observed_is_sorted_and_contains_only_topologies() {
        let engine = engine(&[
            ("decnet-b", "running"),
            ("decnet-a", "paused"),
            ("decnet-c", "exited"),
            ("x", "running"),
        ]);
        assert_eq!(
            observe(&engine),
            Observed::Seen {
                bridges: vec!["decnet-topology-a".into(), "decnet-topology-b".into()],
                containers: vec!["decnet-a".into(), "decnet-b".into()],
            }
        );
        assert_eq!(observe(&failed("Docker")), Observed::Unknown("Docker".to_owned()));
    }

    #[test]
    fn unknown_networks_affect_only_observed() {
        let (_dir, mut source) = source(Some(STATE));
        let engine = DockerState {
            networks: Err("403".to_owned()),
            ..engine(&[("d1-ssh", "running"), ("decnet-a", "running")])
        };
        let snapshot = source.status(&engine, None).unwrap();
        assert!(snapshot.status().contains(r#""d1":{"running":false,"services":{"ssh":"running""#));
        assert!(
            !snapshot.status().contains("error") && snapshot.fault().is_none(),
            "{}",
            snapshot.status()
        );
        assert_eq!(observe(&engine), Observed::Unknown("403".to_owned()));
    }

    #[test]
    fn container_without_state_affects_only_its_decky() {
        let (_dir, mut source) = source(Some(STATE));
        let mut engine = engine(&[("d1-ssh", "running"), ("d2-ftp", "running")]);
        let insert = |engine: &mut DockerState, name: &str| {
            engine.containers.as_mut().unwrap().states.insert(name.to_owned(), None);
        };
        insert(&mut engine, "other");
        assert!(source.status(&engine, None).unwrap().fault().is_none());
        assert!(matches!(observe(&engine), Observed::Seen { .. }));
        insert(&mut engine, "decnet-gateway");
        assert!(source.status(&engine, None).unwrap().fault().is_none());
        assert!(
            matches!(observe(&engine), Observed::Unknown(why) if why.ends_with("of decnet-gateway"))
        );
        insert(&mut engine, "d1-smb-share");
        let snapshot = source.status(&engine, Some("aside")).unwrap();
        let why = r#"Docker's answer has no usable state of the container "d1-smb-share"; 1 decky is left out"#;
        assert_eq!(snapshot.fault(), Some(why));
        let expected = concat!(
            r#"{"deployed":true,"mode":"swarm","compose_path":"/x.yml","deckies":[{"services": ["ftp"], "name": "d2"}],"#,
            r#""runtime":{"d2":{"running":true,"services":{"ftp":"running"}}},"#,
            r#""error":"Docker's answer has no usable state of the container \"d1-smb-share\"; 1 decky is left out; aside"}"#,
        );
        assert_eq!(snapshot.status(), expected);
        insert(&mut engine, "d2-ftp");
        let snapshot = source.status(&engine, None).unwrap();
        let why = r#"Docker's answer has no usable state of the container "d1-smb-share"; 2 deckies are left out"#;
        let status: serde_json::Value = serde_json::from_str(snapshot.status()).unwrap();
        assert_eq!(
            (snapshot.fault(), &status["error"], status.get("deckies")),
            (Some(why), &why.into(), None)
        );
    }

    #[test]
    fn container_with_too_long_name_is_not_absent() {
        let service = "s".repeat(300);
        let state = format!(
            r#"{{"config": {{"mode": 1, "deckies": [{{"name": "d", "services": ["{service}"]}}]}}, "compose_path": 1}}"#
        );
        let (_dir, mut source) = source(Some(&state));
        let mut engine = engine(&[]);
        assert!(source.status(&engine, None).unwrap().status().contains(r#""absent""#));
        engine.containers.as_mut().unwrap().left_out = Some(("d-s".to_owned(), 1));
        assert!(source.status(&engine, None).unwrap().fault().unwrap().contains("no usable state"));
    }

    #[test]
    fn too_large_status_is_a_problem_of_the_state_file() {
        let services = vec![format!("\"{}\"", "s".repeat(1_000)); 90].join(",");
        let deckies: Vec<_> =
            (0..120).map(|n| format!(r#"{{"name": "d{n}", "services": [{services}]}}"#)).collect();
        let state = format!(
            r#"{{"config": {{"mode": 1, "deckies": [{}]}}, "compose_path": 1}}"#,
            deckies.join(",")
        );
        let (_dir, mut source) = source(Some(&state));
        // Each service counts twice: in the deckies, and in the runtime.
        let problem = source.status(&engine(&[]), None).unwrap_err();
        assert_eq!(problem, format!("the status is larger than {} bytes", crate::limits::STATUS));
    }

    #[test]
    fn networks_containers_and_files_are_read_in_this_order() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state.json");
        let topology = dir.path().join("topology.db");
        let listener = UnixListener::bind(dir.path().join("docker.sock")).unwrap();
        let mut source = DecnetStatus::new(dir.path())
            .state_file(&state)
            .docker_socket(dir.path().join("docker.sock"));
        let engine = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut request = [0; 1024];
            let mut requests = Vec::new();
            for _ in 0..2 {
                let read = stream.read(&mut request).unwrap();
                let line =
                    String::from_utf8_lossy(&request[..read]).lines().next().unwrap().to_owned();
                if line.starts_with("GET /containers") {
                    std::fs::write(&state, STATE).unwrap();
                    let owner = rusqlite::Connection::open(&topology).unwrap();
                    let table = "CREATE TABLE applied_topology (topology_id TEXT, applied_version_hash TEXT, \
                                 applied_at INTEGER, last_error TEXT); \
                                 INSERT INTO applied_topology VALUES ('t', 'h', 5, NULL)";
                    owner.execute_batch(table).unwrap();
                }
                requests.push(line);
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]").unwrap();
            }
            requests
        });
        let snapshot = source.snapshot();
        assert_eq!(
            engine.join().unwrap(),
            ["GET /networks HTTP/1.1", "GET /containers/json?all=true HTTP/1.1"]
        );
        assert!(snapshot.status().contains(r#""d1":{"running":false"#), "{}", snapshot.status());
        assert_eq!(snapshot.topology().unwrap().applied.as_ref().unwrap().topology_id, "t");
    }

    #[test]
    fn state_file_is_searched_at_each_snapshot() {
        let root = tempfile::tempdir().unwrap();
        let mut source = DecnetStatus::new(root.path())
            .search_under(root.path())
            .docker_socket(root.path().join("docker.sock"));
        let mut status =
            || serde_json::from_str::<serde_json::Value>(source.snapshot().status()).unwrap();
        let unknown = status();
        let why = unknown["error"].as_str().unwrap();
        assert!(
            why.starts_with("the state file was not found: ") && why.contains("/opt/decnet/venv"),
            "{why}"
        );
        assert_eq!(
            (unknown.get("deckies"), unknown.get("deployed")),
            (None, None),
            "nothing is claimed"
        );
        let editable = root.path().join("opt/decnet");
        std::fs::create_dir_all(editable.join("decnet")).unwrap();
        assert_eq!(status(), serde_json::json!({"deployed": false, "deckies": []}));
        std::fs::write(editable.join("decnet-state.json"), STATE).unwrap();
        assert_eq!(status()["compose_path"], "/x.yml");
        // A virtual environment takes precedence.
        let packages = editable.join("venv/lib/python3.11/site-packages");
        std::fs::create_dir_all(packages.join("decnet")).unwrap();
        std::fs::write(packages.join("decnet-state.json"), STATE.replace("/x.yml", "/y.yml"))
            .unwrap();
        assert_eq!(status()["compose_path"], "/y.yml");
        std::fs::remove_dir_all(root.path().join("opt")).unwrap();
        assert!(status()["error"].as_str().unwrap().starts_with("the state file was not found: "));
    }

    #[test]
    fn deployment_is_unknown_without_the_folder_of_the_state_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut source =
            DecnetStatus::new(dir.path()).state_file(dir.path().join("none/state.json"));
        let problem = source.status(&engine(&[]), None).unwrap_err();
        assert!(
            problem.contains("none/state.json: its folder ") && problem.contains("No such file"),
            "{problem}"
        );
    }
}
