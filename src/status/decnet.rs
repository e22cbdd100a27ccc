//! DECNET's own status: the state file, Docker and the topology, each of which may fail by itself. Runs on the status
//! thread.

use std::path::{Path, PathBuf};

use super::docker::{Docker, Engine};
use super::state::{State, StateFile};
use super::topology::TopologyFile;
use super::{AppliedTopology, Observed, Snapshot, StatusSource, Topology};
use crate::body::Status;

/// Where DECNET's agent keeps its state when it is installed under `/opt/decnet`.
pub(crate) const STATE_FILE: &str = "/opt/decnet/decnet-state.json";

/// Where a Docker Engine listens.
pub(crate) const DOCKER_SOCKET: &str = "/var/run/docker.sock";

/// What DECNET's own agent reports: the deckies of its state file, the state of their containers, and the topology.
///
/// The state file and `topology.db` are only ever read. Docker is asked two things a snapshot. Where Docker does not
/// answer, or the state file cannot be read, no decky is named and `status.error` says why: the master would take a
/// decky without states for degraded.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// use decnet_heartbeat::{DecnetStatus, Observed, StatusSource};
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
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DecnetStatus {
    state_file: StateFile,
    docker: Docker,
    topology: TopologyFile,
    /// What was wrong with each, the last time.
    said: [Said; 3],
}

impl DecnetStatus {
    /// With the state file at `/opt/decnet/decnet-state.json`, Docker at `/var/run/docker.sock`, and the topology in
    /// `topology.db` of the agent dir.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::{DecnetStatus, Enrolment, Heartbeat};
    /// # let enrolment = Enrolment::new("0c4f9a52", "master.lan", "/etc/decnet/agent")?;
    /// let source = DecnetStatus::new(enrolment.agent_dir().value());
    /// // What a heartbeat does by itself, unless it is given another.
    /// let builder = Heartbeat::builder().enrolment(enrolment).status_source(source);
    /// # let _ = builder;
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(agent_dir: &Path) -> Self {
        Self {
            state_file: StateFile::new(STATE_FILE.into()),
            docker: Docker::new(DOCKER_SOCKET.into()),
            topology: TopologyFile::new(agent_dir.join("topology.db")),
            said: Default::default(),
        }
    }

    /// With another state file.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::{DecnetStatus, StatusSource};
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("decnet-state.json");
    /// std::fs::write(&path, r#"{"config": {"mode": "swarm", "deckies": []}, "compose_path": "/srv/compose.yml"}"#)?;
    /// let mut source = DecnetStatus::new(dir.path()).state_file(&path).docker_socket("/no/such/socket");
    /// // Docker does not answer: no decky is named, and why is said.
    /// let status: serde_json::Value = serde_json::from_str(source.snapshot().status())?;
    /// assert_eq!((&status["deployed"], &status["deckies"]), (&true.into(), &serde_json::Value::Null));
    /// assert!(status["error"].as_str().is_some_and(|why| why.starts_with("Docker at /no/such/socket: ")));
    /// # Ok(())
    /// # }
    /// ```
    pub fn state_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.state_file = StateFile::new(path.into());
        self
    }

    /// With another Docker socket.
    pub fn docker_socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.docker = Docker::new(path.into());
        self
    }

    /// The status, or why it is not known. `aside` is what else is wrong.
    pub(crate) fn status(&mut self, engine: &Result<Engine, String>, aside: Option<&str>) -> Result<Snapshot, String> {
        let state = self.state_file.read()?;
        Ok(state.map_or_else(|| Snapshot::new(&Status::nothing(aside)), |state| report(state, engine, aside)))
    }

    /// How many deckies the state file has; `None`: there is no such file.
    #[cfg(feature = "cli")]
    pub(crate) fn deckies(&mut self) -> Result<Option<usize>, String> {
        Ok(self.state_file.read()?.map(State::deckies))
    }

    /// Looks at everything.
    pub(crate) fn look(&mut self) -> Findings {
        let engine = self.docker.engine();
        let (applied, topology) = self.topology.read();
        let status = self.status(&engine, topology.as_ref().err().map(String::as_str));
        Findings { engine, status, applied, topology }
    }
}

/// What was found, part by part, each with its fault.
#[derive(Debug)]
pub(crate) struct Findings {
    pub(crate) engine: Result<Engine, String>,
    /// An error is the state file's.
    pub(crate) status: Result<Snapshot, String>,
    /// As [`TopologyFile::read`] has it.
    pub(crate) applied: Option<Option<AppliedTopology>>,
    pub(crate) topology: Result<(), String>,
}

impl Findings {
    /// All of it together.
    pub(crate) fn into_snapshot(self) -> Snapshot {
        let faults = [self.engine.as_ref().err(), self.status.as_ref().err(), self.topology.as_ref().err()];
        let fault = faults.into_iter().flatten().cloned().reduce(|some, more| both(&some, Some(&more)));
        let aside = self.topology.err();
        let snapshot = self.status.unwrap_or_else(|error| Snapshot::unknown(&both(&error, aside.as_deref())));
        let snapshot = snapshot.with_fault(fault.as_deref());
        match self.applied {
            Some(applied) => snapshot.with_topology(Topology { applied, observed: observe(&self.engine) }),
            None => snapshot,
        }
    }
}

impl StatusSource for DecnetStatus {
    fn snapshot(&mut self) -> Snapshot {
        let found = self.look();
        let [docker_said, state_said, topology_said] = &mut self.said;
        docker_said.note("Docker", found.engine.as_ref().err());
        state_said.note("the state file", found.status.as_ref().err());
        topology_said.note("topology.db", found.topology.as_ref().err());
        found.into_snapshot()
    }

    fn applied_topology(&mut self) -> Option<Topology> {
        let applied = self.topology.read().0?;
        Some(Topology { applied, observed: Observed::Unknown("Docker has not been asked yet".to_owned()) })
    }
}

/// Logs a problem when it comes, changes or goes, and not every 30 s.
#[derive(Debug, Default)]
struct Said(Option<String>);

impl Said {
    fn note(&mut self, whose: &str, problem: Option<&String>) {
        if self.0.as_ref() == problem {
            return;
        }
        match problem {
            Some(problem) => log::warn!("{whose} cannot be read: error={problem:?}"),
            None => log::info!("{whose} can be read again"),
        }
        self.0 = problem.cloned();
    }
}

/// What is deployed, and what of it runs.
pub(crate) fn report(state: &State, engine: &Result<Engine, String>, aside: Option<&str>) -> Snapshot {
    let State { mode, compose_path, deckies, .. } = state;
    match engine {
        Ok(engine) => {
            let runtime = state.runtime(&engine.containers);
            Snapshot::new(&Status::Deployed { deployed: true, mode, compose_path, deckies, runtime, error: aside })
        }
        Err(error) => Snapshot::new(&Status::Unseen { deployed: true, mode, compose_path, error: &both(error, aside) }),
    }
}

/// Two problems as one, if there are two.
fn both(error: &str, aside: Option<&str>) -> String {
    aside.map_or_else(|| error.to_owned(), |aside| format!("{error}; {aside}"))
}

fn observe(engine: &Result<Engine, String>) -> Observed {
    match engine {
        Ok(engine) => {
            let mut bridges: Vec<_> =
                engine.bridges.iter().filter(|name| name.starts_with("decnet-topology-")).cloned().collect();
            bridges.sort();
            // In the map's order, which is the names'.
            let containers =
                engine.containers.iter().filter(|(name, state)| name.starts_with("decnet-") && runs(state));
            Observed::Seen { bridges, containers: containers.map(|(name, _)| name.clone()).collect() }
        }
        Err(error) => Observed::Unknown(error.clone()),
    }
}

/// Docker lists a container as running while it is paused or about to be restarted, too.
fn runs(state: &str) -> bool {
    matches!(state, "running" | "paused" | "restarting")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(state: Option<&str>) -> (tempfile::TempDir, DecnetStatus) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("decnet-state.json");
        if let Some(state) = state {
            std::fs::write(&path, state).unwrap();
        }
        let source = DecnetStatus::new(dir.path()).state_file(path).docker_socket(dir.path().join("docker.sock"));
        (dir, source)
    }

    fn engine(containers: &[(&str, &str)]) -> Result<Engine, String> {
        let containers = containers.iter().map(|(name, state)| ((*name).to_owned(), (*state).to_owned())).collect();
        Ok(Engine { containers, bridges: vec!["decnet-topology-b".into(), "decnet-topology-a".into(), "other".into()] })
    }

    const STATE: &str = r#"{"config": {"mode": "swarm", "unknown": 1, "deckies": [
        {"name": "d1", "services": ["ssh", "smb_share"], "weird": 1.50e2, "deep": {"a": [1, null]}},
        {"services": ["ftp"], "name": "d2"}]}, "compose_path": "/x.yml"}"#;

    #[test]
    fn deckies_pass_through_untouched() {
        let (_dir, mut source) = source(Some(STATE));
        let containers = [("d1-ssh", "running"), ("d1-smb-share", "exited"), ("d1-smb_share", "running")];
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
            ("[]", "invalid length 0, expected struct File with 2 elements at line 1 column 2"),
            ("{}", "missing field `config` at line 1 column 2"),
            (
                r#"{"config": {"mode": 1, "deckies": {}}, "compose_path": ""}"#,
                "deckies: invalid type: map, expected a sequence of at most 20000 at line 1 column 0",
            ),
            (
                r#"{"config": {"mode": 1, "deckies": [{"name": "x"}]}, "compose_path": ""}"#,
                "deckies: missing field `services` at line 1 column 14",
            ),
        ] {
            let (dir, mut source) = source(Some(state));
            let expected = format!("state file {}: {problem}", dir.path().join("decnet-state.json").display());
            assert_eq!(source.status(&engine(&[]), None).unwrap_err(), expected, "{state}");
        }
    }

    #[test]
    fn a_topology_that_cannot_be_read_is_said_beside_whatever_else_is_said() {
        let dir = "DIR/topology.db: ";
        let state = r#"{"config": {"mode": 1, "deckies": []}, "compose_path": ""}"#;
        let said = |state: Option<&str>, engine: Result<Engine, String>| {
            let (_dir, mut source) = source(state);
            let snapshot = source.status(&engine, Some(dir)).unwrap();
            serde_json::from_str::<serde_json::Value>(snapshot.status()).unwrap()["error"].take()
        };
        assert_eq!(said(None, engine(&[])), dir);
        assert_eq!(said(Some(state), engine(&[])), dir);
        assert_eq!(said(Some(state), Err("Docker".to_owned())), format!("Docker; {dir}"));
    }

    #[test]
    fn observed_is_sorted_and_only_of_topologies() {
        let engine =
            engine(&[("decnet-b", "running"), ("decnet-a", "paused"), ("decnet-c", "exited"), ("x", "running")]);
        assert_eq!(
            observe(&engine),
            Observed::Seen {
                bridges: vec!["decnet-topology-a".into(), "decnet-topology-b".into()],
                containers: vec!["decnet-a".into(), "decnet-b".into()],
            }
        );
        assert_eq!(observe(&Err("away".to_owned())), Observed::Unknown("away".to_owned()));
    }
}
