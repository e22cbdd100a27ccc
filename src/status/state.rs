//! Reads DECNET's state file, which lists the deployed deckies. Its path is searched each time; its
//! content is cached until the file changes. Runs on the status thread.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};

use super::docker::Containers;
use super::list::{self, BoundedVec, without_place};
use super::place::{LocateError, StateFileLocation, StateFilePath, means_nothing_deployed};
use super::sendable;
use super::wire::Runtime;
use crate::error::sanitize_path;
use crate::files::{self, FileVersion};
use crate::limits;
use crate::text::{quoted, sanitize};

/// Reads the state file and caches its content.
#[derive(Debug)]
pub(super) struct StateFile {
    place: StateFilePath,
    cached: Option<Cached>,
}

#[derive(Debug)]
struct Cached {
    path: PathBuf,
    state: State,
    /// The version of the file. `None`: the file was changed so recently that its times may not
    /// show the next change.
    version: Option<FileVersion>,
}

impl StateFile {
    pub(super) fn new(place: StateFilePath) -> Self {
        Self { place, cached: None }
    }

    /// Finds the path of the file.
    pub(super) fn locate(&self) -> Result<StateFileLocation, LocateError> {
        self.place.locate()
    }

    /// The state. `None`: there is no file, so nothing is deployed. The error is text for people
    /// and names the file.
    pub(super) fn read(&mut self, located: &StateFileLocation) -> Result<Option<&State>, String> {
        let path = located.file.as_path();
        // The version from before the read, so that a change during it is noticed next time.
        let version = FileVersion::of(path);
        let is_current = |cached: &Cached| cached.version == Some(version) && cached.path == path;
        if !self.cached.as_ref().is_some_and(is_current) {
            self.cached = None;
            let content = match files::read(path, limits::STATE_FILE) {
                Ok(content) => content,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return means_nothing_deployed(path)
                        .map(|()| None)
                        .map_err(|problem| with_path(path, &problem));
                }
                Err(error) => return Err(with_path(path, &error.to_string())),
            };
            let state = State::parse(&content).map_err(|problem| with_path(path, &problem))?;
            let version = version.is_stable().then_some(version);
            self.cached = Some(Cached { path: path.to_owned(), state, version });
        }
        Ok(self.cached.as_ref().map(|cached| &cached.state))
    }
}

fn with_path(path: &Path, problem: &str) -> String {
    format!("state file {}: {}", sanitize_path(path), sanitize(problem))
}

/// The parts of the state file that are sent. Their JSON is sent unchanged.
#[derive(Debug)]
pub(crate) struct State {
    pub(super) mode: Box<RawValue>,
    pub(super) compose_path: Box<RawValue>,
    deckies: Box<RawValue>,
    services: Vec<Decky>,
}

/// The keys of a decky that form the names of its containers.
#[derive(Debug)]
struct Decky {
    name: String,
    services: BoundedVec<String, { limits::SERVICES }>,
}

impl Decky {
    fn parse(json: &RawValue) -> Result<Self, String> {
        let [name, services] = list::read_values(json.get().as_bytes(), ["name", "services"])
            .map_err(|error| format!(": {}", without_place(&error)))?;
        Ok(Self { name: read(".name", name)?, services: read(".services", services)? })
    }
}

/// Deserializes the value at `place`.
fn read<'a, T: Deserialize<'a>>(place: &str, json: &'a RawValue) -> Result<T, String> {
    serde_json::from_str(json.get()).map_err(|error| format!("{place}: {}", without_place(&error)))
}

/// The deckies that are sent, and the states of their containers.
pub(super) struct DeckyStates<'a> {
    pub(super) deckies: Cow<'a, RawValue>,
    pub(super) runtime: Runtime<'a>,
    /// Why other deckies are left out.
    pub(super) left_out: Option<String>,
}

impl State {
    pub(crate) fn parse(content: &[u8]) -> Result<Self, String> {
        let [config, compose_path] = list::read_values(content, ["config", "compose_path"])
            .map_err(|error| error.to_string())?;
        let [mode, deckies] = list::read_values(config.get().as_bytes(), ["mode", "deckies"])
            .map_err(|error| format!("config: {}", without_place(&error)))?;
        // Only these parts are sent. The rest of the file is not checked.
        for (what, json) in [("mode", mode), ("compose_path", compose_path), ("deckies", deckies)] {
            if let Some(problem) = sendable::problem(what, json) {
                return Err(problem);
            }
        }
        let entries: Deckies<'_> = read("deckies", deckies)?;
        let decky = |(index, json)| {
            Decky::parse(json).map_err(|problem| format!("deckies[{index}]{problem}"))
        };
        let services = entries.0.into_iter().enumerate().map(decky).collect::<Result<_, _>>()?;
        let mode = mode.to_owned();
        let compose_path = compose_path.to_owned();
        Ok(Self { mode, compose_path, deckies: deckies.to_owned(), services })
    }

    /// The number of deckies.
    #[cfg(any(test, feature = "cli"))]
    pub(super) fn deckies(&self) -> usize {
        self.services.len()
    }

    /// Whether there is a decky with this name.
    #[cfg(feature = "cli")]
    pub(super) fn has_decky(&self, name: &str) -> bool {
        self.services.iter().any(|decky| decky.name == name)
    }

    /// The deckies with the states of their containers. A decky is left out if the state of one of
    /// its containers is unknown, because the master would store it as degraded. It is an error if
    /// all deckies are left out.
    pub(super) fn decky_states<'a>(
        &'a self,
        containers: &'a Containers,
    ) -> Result<DeckyStates<'a>, String> {
        let mut name = String::new();
        let states = self
            .services
            .iter()
            .map(|decky| Ok((decky.name.as_str(), states(decky, containers, &mut name)?)));
        let states: Vec<Result<_, String>> = states.collect();
        let left_out = states.iter().filter(|states| states.is_err()).count();
        let Some(problem) = states.iter().find_map(|states| states.as_ref().err()) else {
            let runtime = Runtime(states.into_iter().flatten().collect());
            return Ok(DeckyStates {
                deckies: Cow::Borrowed(&self.deckies),
                runtime,
                left_out: None,
            });
        };
        let problem = match left_out {
            1 => format!("{problem}; 1 decky is left out"),
            count => format!("{problem}; {count} deckies are left out"),
        };
        if left_out == states.len() {
            return Err(problem);
        }
        let entries: Deckies<'_> = read("deckies", &self.deckies)?;
        let known = |(json, states): (_, &Result<_, _>)| states.is_ok().then_some(json);
        let deckies: Vec<&RawValue> =
            entries.0.into_iter().zip(&states).filter_map(known).collect();
        let deckies = to_raw_value(&deckies).map_err(|error| error.to_string())?;
        let runtime = Runtime(states.into_iter().flatten().collect());
        Ok(DeckyStates { deckies: Cow::Owned(deckies), runtime, left_out: Some(problem) })
    }
}

/// The list of deckies, each as raw JSON.
type Deckies<'a> = BoundedVec<&'a RawValue, { limits::DECKIES }>;

/// The states of a decky's services. The container of a service is named `<decky>-<service>`, with
/// `_` in the service replaced by `-`. It is an error if Docker's answer has no valid state of one
/// of them. `container` is a reusable buffer for a name.
fn states<'a>(
    decky: &'a Decky,
    containers: &'a Containers,
    container: &mut String,
) -> Result<Vec<(&'a str, &'a str)>, String> {
    let mut state = |service: &str| {
        container.clear();
        container.extend([&decky.name, "-"]);
        container.extend(service.chars().map(|char| if char == '_' { '-' } else { char }));
        match containers.states.get(container.as_str()) {
            Some(Some(state)) => Ok(state.as_str()),
            // Otherwise it may be a container that was left out because its name is too long.
            None if container.len() <= limits::DOCKER_NAME || containers.left_out.is_none() => {
                Ok("absent")
            }
            None | Some(None) => {
                let name = quoted(container, limits::DOCKER_NAME);
                Err(format!("Docker's answer has no usable state of the container {name}"))
            }
        }
    };
    decky.services.0.iter().map(|service| Ok((service.as_str(), state(service)?))).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::time::{Duration, SystemTime};

    use super::*;

    fn state(deckies: &str) -> String {
        format!(
            r#"{{"config": {{"mode": "swarm", "deckies": {deckies}}}, "compose_path": "/x.yml"}}"#
        )
    }

    fn read(file: &mut StateFile) -> Result<Option<&State>, String> {
        let located = file.locate().unwrap();
        file.read(&located)
    }

    fn deckies(file: &mut StateFile) -> String {
        read(file).unwrap().unwrap().deckies.get().to_owned()
    }

    /// Makes the cached version count as stable, as if some seconds had passed. A program cannot
    /// set a file's change time.
    fn make_stable(file: &mut StateFile) {
        let cached = file.cached.as_mut().unwrap();
        cached.version = Some(FileVersion::of(&cached.path));
    }

    #[test]
    fn state_is_cached_until_the_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut file = StateFile::new(StateFilePath::Named(path.clone()));
        fs::write(&path, state("[]")).unwrap();
        assert_eq!(deckies(&mut file), "[]");
        file.cached.as_mut().unwrap().state.deckies =
            RawValue::from_string("[1]".to_owned()).unwrap();
        make_stable(&mut file);
        assert_eq!(deckies(&mut file), "[1]", "from the cache");
        // The same size and modification time. A program cannot set the change time.
        let changed = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, state("[ ]").replace(", ", ",")).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(changed).unwrap();
        assert_eq!(deckies(&mut file), "[ ]");
        make_stable(&mut file);
        fs::remove_file(&path).unwrap();
        assert!(read(&mut file).unwrap().is_none(), "the file was deleted");
        fs::write(&path, "{").unwrap();
        assert!(read(&mut file).unwrap_err().contains("state.json: EOF while parsing an object"));
    }

    #[test]
    fn recently_changed_file_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut file = StateFile::new(StateFilePath::Named(path.clone()));
        fs::write(&path, state("[]")).unwrap();
        // A program can set the modification time, but not the change time.
        for written in [SystemTime::UNIX_EPOCH, SystemTime::now() + Duration::from_secs(3_600)] {
            File::options().write(true).open(&path).unwrap().set_modified(written).unwrap();
            assert_eq!(deckies(&mut file), "[]");
            assert_eq!(file.cached.as_ref().unwrap().version, None);
        }
    }

    #[test]
    fn list_in_place_of_an_object_is_an_error() {
        for (content, problem) in [
            (
                r#"[{"mode": "s", "deckies": []}, "/x"]"#.to_owned(),
                "invalid type: sequence, expected an object at line 1",
            ),
            (
                r#"{"config": ["s", []], "compose_path": 1}"#.to_owned(),
                "config: invalid type: sequence, expected an object",
            ),
            (
                state(r#"[["d0", ["ssh"]]]"#),
                "deckies[0]: invalid type: sequence, expected an object",
            ),
            (
                state(r#"[{"name": "a", "services": []}, null]"#),
                "deckies[1]: invalid type: null, expected an object",
            ),
        ] {
            let error = State::parse(content.as_bytes()).unwrap_err();
            assert!(error.starts_with(problem), "{content}: {error}");
        }
    }

    #[test]
    fn parts_that_are_not_sent_may_have_lone_surrogates() {
        let content = r#"{"\udcff": "\udcff", "config": {"deckies": [], "x": {"\udcff": "\udcff"}, "\udcff": 1, "mode": 1},
            "compose_path": 1}"#;
        assert_eq!(State::parse(content.as_bytes()).unwrap().deckies(), 0);
    }

    #[test]
    fn value_that_the_master_cannot_process_is_an_error_with_its_place() {
        let surrogate = |place: &str| {
            format!(r"{place} has a lone surrogate, \udcff, which the master cannot process")
        };
        let file = |mode: &str, deckies: &str, path: &str| {
            format!(
                r#"{{"config": {{"mode": {mode}, "deckies": {deckies}}}, "compose_path": {path}}}"#
            )
        };
        let decky = |more: &str| {
            format!(r#"[{{"name": "a", "services": []}}, {{"name": "b", "services": [], {more}}}]"#)
        };
        for (content, problem) in [
            (file(r#""\udcff""#, "[]", "1"), surrogate("mode")),
            (file("1", "[]", r#""/opt/\udcff""#), surrogate("compose_path")),
            (
                file("1", r#"[{"name": "\udcff", "services": []}]"#, "1"),
                surrogate("deckies[0].name"),
            ),
            (
                file("1", r#"[{"name": "a", "services": ["\udcff"]}]"#, "1"),
                surrogate("deckies[0].services[0]"),
            ),
            (
                file("1", &decky(r#""x": {"y": ["", "\udcff"]}"#), "1"),
                surrogate("deckies[1].x.y[1]"),
            ),
            (file("1", &decky(r#""\udcff": 1"#), "1"), surrogate(r"deckies[1].\udcff")),
            (
                file("1", &decky(r#""mtu": 1e999"#), "1"),
                "deckies[1].mtu is a number that is too large: the master reads it as infinity"
                    .to_owned(),
            ),
            (
                file("1", &decky(&format!(r#""x": {}{}"#, "[".repeat(200), "]".repeat(200))), "1"),
                format!("deckies[1].x{}… is nested deeper than 100 levels", "[0]".repeat(6)),
            ),
        ] {
            assert_eq!(State::parse(content.as_bytes()).unwrap_err(), problem, "{content}");
        }
        let pair = file(r#""\ud83d\ude00""#, &decky(r#""\ud83d\ude00": "\\udcff""#), r#""/""#);
        assert_eq!(State::parse(pair.as_bytes()).unwrap().deckies(), 2);
    }
}
