//! DECNET's state file: what is deployed here. It is looked for each time, read again when it has changed, and remembered
//! otherwise. Runs on the status thread.

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::docker::Containers;
use super::list::AtMost;
use super::place::{Located, Place, Unlocated, means_nothing_deployed};
use super::sendable;
use crate::body::Runtime;
use crate::error::printable_path;
use crate::files::{self, Stamp};
use crate::limits;
use crate::text::{printable, quoted};

/// Reads the state file, and remembers what it says.
#[derive(Debug)]
pub(super) struct StateFile {
    place: Place,
    known: Option<Known>,
}

#[derive(Debug)]
struct Known {
    path: PathBuf,
    state: State,
    /// What the file looked like; `None` while a change might not show.
    stamp: Option<Stamp>,
}

impl StateFile {
    pub(super) fn new(place: Place) -> Self {
        Self { place, known: None }
    }

    /// Where it is.
    pub(super) fn locate(&self) -> Result<Located, Unlocated> {
        self.place.locate()
    }

    /// What it says. `None`: there is no file, so nothing is deployed. The error is for people, and names the file.
    pub(super) fn read(&mut self, located: &Located) -> Result<Option<&State>, String> {
        let path = located.file.as_path();
        // Of before the reading: what changes in between is seen next time.
        let stamp = Stamp::of(path);
        if self.known.as_ref().is_none_or(|known| known.stamp != Some(stamp) || known.path != path) {
            self.known = None;
            let content = match files::read(path, limits::STATE_FILE) {
                Ok(content) => content,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return means_nothing_deployed(path).map(|()| None).map_err(|problem| broken(path, &problem));
                }
                Err(error) => return Err(broken(path, &error.to_string())),
            };
            let state = State::parse(&content).map_err(|problem| broken(path, &problem))?;
            let stamp = stamp.is_settled().then_some(stamp);
            self.known = Some(Known { path: path.to_owned(), state, stamp });
        }
        Ok(self.known.as_ref().map(|known| &known.state))
    }
}

fn broken(path: &Path, problem: &str) -> String {
    format!("state file {}: {}", printable_path(path), printable(problem))
}

/// What the state file says. What is not looked at is passed on as it stands.
#[derive(Debug)]
pub(crate) struct State {
    pub(super) mode: Box<RawValue>,
    pub(super) compose_path: Box<RawValue>,
    pub(super) deckies: Box<RawValue>,
    services: Vec<Decky>,
}

/// The two keys of a decky that its containers' names are made of.
#[derive(Debug, Deserialize)]
struct Decky {
    name: String,
    services: AtMost<String, { limits::SERVICES }>,
}

/// `decnet-state.json`.
#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow)]
    config: Config<'a>,
    #[serde(borrow)]
    compose_path: &'a RawValue,
}

#[derive(Deserialize)]
struct Config<'a> {
    #[serde(borrow)]
    mode: &'a RawValue,
    #[serde(borrow)]
    deckies: &'a RawValue,
}

impl State {
    pub(crate) fn parse(content: &[u8]) -> Result<Self, String> {
        let file: File<'_> = serde_json::from_slice(content).map_err(|error| error.to_string())?;
        let deckies = file.config.deckies;
        // What is sent as it stands; the rest of the file is DECNET's own.
        for (what, json) in [("mode", file.config.mode), ("compose_path", file.compose_path), ("deckies", deckies)] {
            if let Some(problem) = sendable::problem(what, json) {
                return Err(problem);
            }
        }
        let AtMost::<Decky, { limits::DECKIES }>(services) =
            serde_json::from_str(deckies.get()).map_err(|error| format!("deckies: {error}"))?;
        let (mode, compose_path) = (file.config.mode.to_owned(), file.compose_path.to_owned());
        Ok(Self { mode, compose_path, deckies: deckies.to_owned(), services })
    }

    /// How many there are.
    #[cfg(any(test, feature = "cli"))]
    pub(super) fn deckies(&self) -> usize {
        self.services.len()
    }

    /// Whether there is a decky of this name.
    #[cfg(feature = "cli")]
    pub(super) fn names(&self, name: &str) -> bool {
        self.services.iter().any(|decky| decky.name == name)
    }

    /// Each service's container is named `<decky>-<service>`, with `_` in the service turned into `-`. `Err`: Docker's
    /// answer does not have the state of one of them.
    pub(super) fn runtime<'a>(&'a self, containers: &'a Containers) -> Result<Runtime<'a>, String> {
        let mut container = String::new();
        let mut state = |decky: &str, service: &str| {
            container.clear();
            container.extend([decky, "-"]);
            container.extend(service.chars().map(|char| if char == '_' { '-' } else { char }));
            match containers.states.get(&container) {
                Some(Some(state)) => Ok(state.as_str()),
                // It may be one whose name was too long to be kept.
                None if container.len() <= limits::DOCKER_NAME || containers.left_out.is_none() => Ok("absent"),
                None | Some(None) => {
                    let name = quoted(&container, limits::DOCKER_NAME);
                    Err(format!("Docker's answer has no usable state of the container {name}"))
                }
            }
        };
        let mut of = |decky: &'a Decky| {
            let states = decky.services.0.iter().map(|service| Ok((service.as_str(), state(&decky.name, service)?)));
            Ok((decky.name.as_str(), states.collect::<Result<_, String>>()?))
        };
        self.services.iter().map(&mut of).collect::<Result<_, String>>().map(Runtime)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::time::{Duration, SystemTime};

    use super::*;

    fn state(deckies: &str) -> String {
        format!(r#"{{"config": {{"mode": "swarm", "deckies": {deckies}}}, "compose_path": "/x.yml"}}"#)
    }

    fn read(file: &mut StateFile) -> Result<Option<&State>, String> {
        let located = file.locate().unwrap();
        file.read(&located)
    }

    fn deckies(file: &mut StateFile) -> String {
        read(file).unwrap().unwrap().deckies.get().to_owned()
    }

    /// As if it had been left alone for a while; a change time cannot be set, so it is a test's own matter.
    fn settle(file: &mut StateFile) {
        let known = file.known.as_mut().unwrap();
        known.stamp = Some(Stamp::of(&known.path));
    }

    #[test]
    fn what_is_known_is_not_read_again_until_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut file = StateFile::new(Place::Named(path.clone()));
        fs::write(&path, state("[]")).unwrap();
        assert_eq!(deckies(&mut file), "[]");
        file.known.as_mut().unwrap().state.deckies = RawValue::from_string("[1]".to_owned()).unwrap();
        settle(&mut file);
        assert_eq!(deckies(&mut file), "[1]", "remembered");
        // The same size, and the same time of the last change as far as a program can set it.
        let changed = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, state("[ ]").replace(", ", ",")).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(changed).unwrap();
        assert_eq!(deckies(&mut file), "[ ]");
        settle(&mut file);
        fs::remove_file(&path).unwrap();
        assert!(read(&mut file).unwrap().is_none(), "and gone with its file");
        fs::write(&path, "{").unwrap();
        assert!(read(&mut file).unwrap_err().contains("state.json: EOF while parsing an object"));
    }

    #[test]
    fn a_file_that_has_just_changed_is_read_again_whatever_it_looks_like() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut file = StateFile::new(Place::Named(path.clone()));
        fs::write(&path, state("[]")).unwrap();
        // Its own time may be what somebody likes. When it was really changed is the system's matter.
        for written in [SystemTime::UNIX_EPOCH, SystemTime::now() + Duration::from_secs(3_600)] {
            File::options().write(true).open(&path).unwrap().set_modified(written).unwrap();
            assert_eq!(deckies(&mut file), "[]");
            assert_eq!(file.known.as_ref().unwrap().stamp, None);
        }
    }

    #[test]
    fn what_the_master_cannot_read_is_refused_with_its_place() {
        let surrogate = |place: &str| format!(r"{place} has a lone surrogate, \udcff, on which the master fails");
        let file = |mode: &str, deckies: &str, path: &str| {
            format!(r#"{{"config": {{"mode": {mode}, "deckies": {deckies}}}, "compose_path": {path}}}"#)
        };
        let decky =
            |more: &str| format!(r#"[{{"name": "a", "services": []}}, {{"name": "b", "services": [], {more}}}]"#);
        for (content, problem) in [
            (file(r#""\udcff""#, "[]", "1"), surrogate("mode")),
            (file("1", "[]", r#""/opt/\udcff""#), surrogate("compose_path")),
            (file("1", r#"[{"name": "\udcff", "services": []}]"#, "1"), surrogate("deckies[0].name")),
            (file("1", r#"[{"name": "a", "services": ["\udcff"]}]"#, "1"), surrogate("deckies[0].services[0]")),
            (file("1", &decky(r#""x": {"y": ["", "\udcff"]}"#), "1"), surrogate("deckies[1].x.y[1]")),
            (file("1", &decky(r#""\udcff": 1"#), "1"), surrogate(r"deckies[1].\udcff")),
            (file("1", &decky(r#""mtu": 1e999"#), "1"), "deckies[1].mtu is a number that is too large".to_owned()),
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
