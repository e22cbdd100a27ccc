//! DECNET's own status: the state file, Docker and the topology, each of which may fail by itself. Runs on the status
//! thread.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::docker::{Containers, Docker, DockerState, Networks};
use super::place::StateFilePath;
#[cfg(feature = "cli")]
use super::place::{Located, NotLocated};
use super::state::{Seen, State, StateFile};
use super::topology::TopologyFile;
use super::wire::Status;
use super::{AppliedTopology, Observed, Snapshot, StatusSource, Topology};
use crate::files::absolute;
use crate::log_throttle::LogThrottle;
use crate::panics::quietly;
use crate::text::sanitize;

/// Where a Docker Engine listens.
pub(crate) const DOCKER_SOCKET: &str = "/var/run/docker.sock";

/// What the agent has applied of a topology, in the agent dir.
pub(crate) const TOPOLOGY: &str = "topology.db";

/// What DECNET's own agent reports: the deckies of its state file, the state of their containers, and the topology.
///
/// The state file and `topology.db` are only ever read. Docker is asked two things a snapshot: for its networks, then for
/// its containers. Where the containers are not known, or the state file cannot be found or read, no decky is named and
/// `status.error` says why: the master would take a decky without states for degraded. Where only the state of some
/// containers is not known, their deckies are left out, and the others are named. Where the networks are not known, only
/// `observed` is unknown.
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
/// let topology = snapshot.topology().ok_or("it knows that there is none")?;
/// assert_eq!(topology.applied, None);
/// // There is no Docker either, which is not the same as no containers.
/// assert!(matches!(&topology.observed, Observed::Unknown(why) if why.contains("No such file")));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DecnetStatus {
    state_file: StateFile,
    docker: Docker,
    topology: TopologyFile,
    said: Said,
}

impl DecnetStatus {
    /// With the state file where DECNET keeps it, Docker at `/var/run/docker.sock`, and the topology in `topology.db` of
    /// the agent dir.
    ///
    /// DECNET keeps its state file beside its Python package. The package is looked for at each snapshot, in this order:
    ///
    /// 1. In the virtual environment of `/usr/local/bin/decnet`, which is a symlink to `<environment>/bin/decnet` on a
    ///    worker that the master's installer made. The package is `lib/python3.X/site-packages/decnet`. Of several
    ///    versions it is the environment's own (`pyvenv.cfg`), otherwise the newest that has the package.
    /// 2. In `/opt/decnet/venv`, likewise.
    /// 3. `/opt/decnet/decnet`, where DECNET was installed editable.
    ///
    /// Beside the package "there is no state file" means that nothing is deployed. Where the package is not found, it is
    /// not known what is deployed, and `status.error` says where it was looked for. A place that cannot be looked at (no
    /// permission, a loop of symlinks) ends the search: it is not known whether the package is there.
    ///
    /// A relative path, here and in the other methods, begins at the folder in which this process is now, wherever it goes
    /// later.
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
            state_file: StateFile::new(StateFilePath::searched()),
            docker: Docker::new(DOCKER_SOCKET.into()),
            topology: TopologyFile::new(absolute(&agent_dir.join(TOPOLOGY))),
            said: Said::default(),
        }
    }

    /// With this state file, which is not looked for.
    ///
    /// That it is not there means that nothing is deployed, as long as its folder is there. Where the folder is missing or
    /// cannot be looked at, or the file is a symlink to nothing, it is not known what is deployed.
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

    /// Looks for the state file under this folder instead of `/`.
    #[cfg(test)]
    fn search_under(mut self, root: &Path) -> Self {
        self.state_file = StateFile::new(StateFilePath::Searched { root: root.to_owned() });
        self
    }

    /// With another Docker socket.
    pub fn docker_socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.docker = Docker::new(absolute(&path.into()));
        self
    }

    /// The status, or why it is not known. `aside` is what else is wrong.
    #[cfg(any(test, feature = "loopback"))]
    pub(crate) fn status(
        &mut self,
        engine: &DockerState,
        aside: Option<&str>,
    ) -> Result<Snapshot, String> {
        let located = self.state_file.locate().map_err(|problem| problem.to_string())?;
        report(self.state_file.read(&located)?, engine, aside)
    }

    /// The state file, and which of these deckies it does not list. `None` where there is no state file, or it cannot be
    /// found or read: then that is not known.
    #[cfg(feature = "cli")]
    pub(crate) fn unlisted<'a>(
        &mut self,
        deckies: impl IntoIterator<Item = &'a str>,
    ) -> Option<(PathBuf, Vec<&'a str>)> {
        let located = self.state_file.locate().ok()?;
        let state = self.state_file.read(&located).ok()??;
        let unlisted = deckies.into_iter().filter(|decky| !state.names(decky)).collect();
        Some((located.file, unlisted))
    }

    /// Looks at everything: first at what may take long, so that the states of containers are as fresh as possible, and
    /// last at `topology.db`, since an open that hangs in SQLite blocks every other open of this process.
    pub(crate) fn look(&mut self) -> StatusProbe {
        let engine = self.docker.engine();
        let located = self.state_file.locate();
        let state = located
            .as_ref()
            .map_err(ToString::to_string)
            .and_then(|located| self.state_file.read(located));
        let (applied, topology) = self.topology.read();
        let aside = topology.as_ref().err().map(String::as_str);
        #[cfg(feature = "cli")]
        let deckies = state.as_ref().ok().and_then(|state| state.map(State::deckies));
        let status = state.and_then(|state| report(state, &engine, aside));
        StatusProbe {
            engine,
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

/// What was found, part by part, each with its fault.
#[derive(Debug)]
pub(crate) struct StatusProbe {
    pub(crate) engine: DockerState,
    #[cfg(feature = "cli")]
    pub(crate) located: Result<Located, NotLocated>,
    /// An error is the state file's.
    pub(crate) status: Result<Snapshot, String>,
    /// How many the state file has, if there is one that can be read.
    #[cfg(feature = "cli")]
    pub(crate) deckies: Option<usize>,
    /// As [`TopologyFile::read`] has it.
    pub(crate) applied: Option<Option<AppliedTopology>>,
    pub(crate) topology: Result<(), String>,
}

impl StatusProbe {
    /// Why the states of containers are not known.
    pub(crate) fn states_problem(&self) -> Option<&str> {
        let of_ours = || self.status.as_ref().ok().and_then(Snapshot::fault);
        self.engine.containers.as_ref().err().map(String::as_str).or_else(of_ours)
    }

    /// Why the networks are not known. If Docker does not answer at all, only the containers' problem is reported.
    fn networks_problem(&self) -> Option<&str> {
        self.engine
            .networks
            .as_ref()
            .err()
            .filter(|_| self.engine.containers.is_ok())
            .map(String::as_str)
    }

    /// All of it together.
    pub(crate) fn into_snapshot(self) -> Snapshot {
        // Entries that were left out of Docker's answers are no fault: none of them belongs to a decky.
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
        let aside = self.topology.err();
        let snapshot =
            self.status.unwrap_or_else(|error| Snapshot::unknown(&both(&error, aside.as_deref())));
        let snapshot = snapshot.with_fault(fault.as_deref());
        match self.applied {
            Some(applied) => {
                snapshot.with_topology(Topology { applied, observed: observe(&self.engine) })
            }
            None => snapshot,
        }
    }
}

impl StatusSource for DecnetStatus {
    fn snapshot(&mut self) -> Snapshot {
        let (found, now) = (self.look(), Instant::now());
        self.said.note("Docker", found.states_problem(), now);
        if found.engine.containers.is_ok() {
            self.said.note("Docker's networks", found.networks_problem(), now);
            self.said.note("a part of Docker's answer", found.engine.left_out().as_deref(), now);
        }
        self.said.note("the state file", found.status.as_ref().err().map(String::as_str), now);
        self.said.note("topology.db", found.topology.as_ref().err().map(String::as_str), now);
        found.into_snapshot()
    }

    fn applied_topology(&mut self) -> Option<Topology> {
        let applied = self.topology.read().0?;
        Some(Topology {
            applied,
            observed: Observed::Unknown("Docker has not been asked yet".to_owned()),
        })
    }
}

/// Logs a problem when it comes, changes or goes, and not every 30 s. What comes again after it was gone, or alternates
/// with another one, is logged less and less often. The end of a problem is logged if the problem was.
#[derive(Debug, Default)]
struct Said {
    repeats: LogThrottle,
    /// What was wrong with each, the last time.
    last: BTreeMap<&'static str, String>,
    /// What was logged to be wrong, and not yet to be right again.
    open: BTreeSet<&'static str>,
}

/// A line of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Failed,
    Recovered,
}

impl Said {
    fn note(&mut self, whose: &'static str, problem: Option<&str>, now: Instant) {
        match self.line(whose, problem, now) {
            Some(Line::Failed) => {
                quietly(|| {
                    log::warn!("{whose} cannot be read: error={:?}", problem.unwrap_or_default())
                });
            }
            Some(Line::Recovered) => quietly(|| log::info!("{whose} can be read again")),
            None => (),
        }
    }

    fn line(&mut self, whose: &'static str, problem: Option<&str>, now: Instant) -> Option<Line> {
        let Some(problem) = problem else {
            self.last.remove(whose);
            return self.open.remove(whose).then_some(Line::Recovered);
        };
        let last = self.last.insert(whose, problem.to_owned());
        if last.is_some_and(|last| last == problem) {
            return None;
        }
        self.repeats.count(whose, problem, now)?;
        self.open.insert(whose);
        Some(Line::Failed)
    }
}

/// What is deployed, and what of it runs. No state: nothing is deployed. The error is the state file's: it is too large.
pub(crate) fn report(
    state: Option<&State>,
    engine: &DockerState,
    aside: Option<&str>,
) -> Result<Snapshot, String> {
    let Some(state) = state else { return Snapshot::of_parts(&Status::nothing(aside)) };
    let State { mode, compose_path, .. } = state;
    let containers = engine.containers.as_ref().map_err(String::clone);
    match containers.and_then(|containers| state.seen(containers)) {
        Ok(Seen { deckies, runtime, left_out }) => {
            let said = left_out.as_deref().map(|left_out| both(left_out, aside));
            let (deckies, error) = (&*deckies, said.as_deref().or(aside));
            let status =
                Status::Deployed { deployed: true, mode, compose_path, deckies, runtime, error };
            Ok(Snapshot::of_parts(&status)?.with_fault(left_out.as_deref()))
        }
        Err(error) => {
            let said = both(&error, aside);
            let status = Status::Unseen { deployed: true, mode, compose_path, error: &said };
            Ok(Snapshot::of_parts(&status)?.with_fault(Some(&error)))
        }
    }
}

/// Two problems as one, if there are two.
fn both(error: &str, aside: Option<&str>) -> String {
    aside.map_or_else(|| error.to_owned(), |aside| format!("{error}; {aside}"))
}

/// What Docker shows of topologies. It takes both answers: one without the other would look like a part that is missing.
fn observe(engine: &DockerState) -> Observed {
    let (containers, networks) = match (&engine.containers, &engine.networks) {
        (Ok(containers), Ok(networks)) => (containers, networks),
        (Err(problem), _) | (_, Err(problem)) => return Observed::Unknown(problem.clone()),
    };
    let mut bridges: Vec<_> =
        networks.bridges.iter().filter(|name| name.starts_with(Networks::OURS)).cloned().collect();
    bridges.sort();
    let mut running = Vec::new();
    // In the map's order, which is the names'.
    for (name, state) in
        containers.states.iter().filter(|(name, _)| name.starts_with(Containers::OURS))
    {
        match state {
            Some(state) if runs(state) => running.push(name.clone()),
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

/// Docker lists a container as running while it is paused or about to be restarted, too.
fn runs(state: &str) -> bool {
    matches!(state, "running" | "paused" | "restarting")
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

    /// An engine that answers neither request.
    fn away(why: &str) -> DockerState {
        DockerState { containers: Err(why.to_owned()), networks: Err(why.to_owned()) }
    }

    const STATE: &str = r#"{"config": {"mode": "swarm", "unknown": 1, "deckies": [
        {"name": "d1", "services": ["ssh", "smb_share"], "weird": 1.50e2, "deep": {"a": [1, null]}},
        {"services": ["ftp"], "name": "d2"}]}, "compose_path": "/x.yml"}"#;

    #[test]
    fn deckies_pass_through_untouched() {
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
    fn without_docker_no_decky_is_named() {
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
    fn a_state_file_that_cannot_be_read_is_said() {
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
    fn a_topology_that_cannot_be_read_is_said_beside_whatever_else_is_said() {
        let dir = "DIR/topology.db: ";
        let state = r#"{"config": {"mode": 1, "deckies": []}, "compose_path": ""}"#;
        let said = |state: Option<&str>, engine: DockerState| {
            let (_dir, mut source) = source(state);
            let snapshot = source.status(&engine, Some(dir)).unwrap();
            serde_json::from_str::<serde_json::Value>(snapshot.status()).unwrap()["error"].take()
        };
        assert_eq!(said(None, engine(&[])), dir);
        assert_eq!(said(Some(state), engine(&[])), dir);
        assert_eq!(said(Some(state), away("Docker")), format!("Docker; {dir}"));
    }

    #[test]
    fn observed_is_sorted_and_only_of_topologies() {
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
        assert_eq!(observe(&away("away")), Observed::Unknown("away".to_owned()));
    }

    #[test]
    fn networks_that_are_not_known_cost_observed_alone() {
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
    fn a_container_without_a_state_costs_its_decky_alone() {
        let (_dir, mut source) = source(Some(STATE));
        let mut engine = engine(&[("d1-ssh", "running"), ("d2-ftp", "running")]);
        let insert = |engine: &mut DockerState, name: &str| {
            engine.containers.as_mut().unwrap().states.insert(name.to_owned(), None);
        };
        insert(&mut engine, "somebody-elses");
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
    fn a_container_whose_name_was_too_long_is_not_taken_for_absent() {
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
    fn a_status_that_is_too_large_is_a_problem_of_the_state_file_and_not_of_docker() {
        let services = vec![format!("\"{}\"", "s".repeat(1_000)); 90].join(",");
        let deckies: Vec<_> =
            (0..120).map(|n| format!(r#"{{"name": "d{n}", "services": [{services}]}}"#)).collect();
        let state = format!(
            r#"{{"config": {{"mode": 1, "deckies": [{}]}}, "compose_path": 1}}"#,
            deckies.join(",")
        );
        let (_dir, mut source) = source(Some(&state));
        // Each service counts twice: as it stands, and in the runtime.
        let problem = source.status(&engine(&[]), None).unwrap_err();
        assert_eq!(problem, format!("the status is larger than {} bytes", crate::limits::STATUS));
    }

    #[test]
    fn networks_are_asked_for_first_and_files_are_read_after_the_containers() {
        let dir = tempfile::tempdir().unwrap();
        let (state, topology) = (dir.path().join("state.json"), dir.path().join("topology.db"));
        let listener = UnixListener::bind(dir.path().join("docker.sock")).unwrap();
        let mut source = DecnetStatus::new(dir.path())
            .state_file(&state)
            .docker_socket(dir.path().join("docker.sock"));
        let engine = std::thread::spawn(move || {
            let (mut stream, mut request, mut asked) =
                (listener.accept().unwrap().0, [0; 1024], Vec::new());
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
                asked.push(line);
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]").unwrap();
            }
            asked
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
    fn the_state_file_is_looked_for_at_each_snapshot() {
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
            "nothing is said of what is not known"
        );
        let editable = root.path().join("opt/decnet");
        std::fs::create_dir_all(editable.join("decnet")).unwrap();
        assert_eq!(status(), serde_json::json!({"deployed": false, "deckies": []}));
        std::fs::write(editable.join("decnet-state.json"), STATE).unwrap();
        assert_eq!(status()["compose_path"], "/x.yml");
        // A virtual environment comes first.
        let packages = editable.join("venv/lib/python3.11/site-packages");
        std::fs::create_dir_all(packages.join("decnet")).unwrap();
        std::fs::write(packages.join("decnet-state.json"), STATE.replace("/x.yml", "/y.yml"))
            .unwrap();
        assert_eq!(status()["compose_path"], "/y.yml");
        std::fs::remove_dir_all(root.path().join("opt")).unwrap();
        assert!(status()["error"].as_str().unwrap().starts_with("the state file was not found: "));
    }

    #[test]
    fn a_named_state_file_is_unknown_where_its_folder_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let mut source =
            DecnetStatus::new(dir.path()).state_file(dir.path().join("none/state.json"));
        let problem = source.status(&engine(&[]), None).unwrap_err();
        assert!(
            problem.contains("none/state.json: its folder ") && problem.contains("No such file"),
            "{problem}"
        );
    }

    #[test]
    fn flapping_and_alternating_problems_are_logged_less_and_less_often() {
        let now = Instant::now();
        let lines = |problems: &mut dyn FnMut(usize) -> Option<String>| {
            let mut said = Said::default();
            let lines = (0..4_096).filter_map(|n| said.line("Docker", problems(n).as_deref(), now));
            let (failed, recovered): (Vec<_>, Vec<_>) =
                lines.partition(|line| *line != Line::Recovered);
            (failed.len(), recovered.len())
        };
        let flapping = |n: usize| n.is_multiple_of(2).then(|| "refused".to_owned());
        assert_eq!(lines(&mut { flapping }), (12, 12));
        let alternating = |n: usize| Some(["refused", "timeout"][n % 2].to_owned());
        assert_eq!(lines(&mut { alternating }), (24, 0));
        let with_an_id = |n: usize| Some(format!("request {n:08x} took {n} ms"));
        assert_eq!(lines(&mut { with_an_id }), (13, 0));
        let steady = |_: usize| Some("refused".to_owned());
        assert_eq!(lines(&mut { steady }), (1, 0));
        let mut said = Said::default();
        for _ in 0..3 {
            said.line("Docker", Some("refused"), now);
        }
        assert_eq!(
            said.line("Docker", None, now),
            Some(Line::Recovered),
            "it was logged as failed"
        );
        assert_eq!(said.line("Docker", None, now), None);
        assert_eq!(said.line("topology.db", None, now), None, "it never failed");
    }
}
