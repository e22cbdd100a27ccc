//! DECNET's state file: what is deployed here. It is read again when it has changed, and remembered otherwise. Runs on
//! the status thread.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::list::AtMost;
use crate::body::Runtime;
use crate::error::printable_path;
use crate::files::{self, Stamp};
use crate::limits;
use crate::text::printable;

/// Reads the state file, and remembers what it says.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    known: Option<Known>,
}

#[derive(Debug)]
struct Known {
    state: State,
    /// What the file looked like; `None` while a change might not show.
    stamp: Option<Stamp>,
}

impl StateFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, known: None }
    }

    /// What it says. `None`: there is no file, so nothing is deployed. The error is for people, and names the file.
    pub(super) fn read(&mut self) -> Result<Option<&State>, String> {
        // Of before the reading: what changes in between is seen next time.
        let stamp = Stamp::of(&self.path);
        if self.known.as_ref().is_none_or(|known| known.stamp != Some(stamp)) {
            self.known = None;
            let content = match files::read(&self.path, limits::STATE_FILE) {
                Ok(content) => content,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(self.broken(&error.to_string())),
            };
            let state = State::parse(&content).map_err(|problem| self.broken(&problem))?;
            self.known = Some(Known { state, stamp: stamp.is_settled().then_some(stamp) });
        }
        Ok(self.known.as_ref().map(|known| &known.state))
    }

    fn broken(&self, problem: &str) -> String {
        format!("state file {}: {}", printable_path(&self.path), printable(problem))
    }
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
        if is_nested_deeper(content, limits::NESTING) {
            return Err(format!("nested deeper than {} levels", limits::NESTING));
        }
        let deckies = file.config.deckies;
        let AtMost::<Decky, { limits::DECKIES }>(services) =
            serde_json::from_str(deckies.get()).map_err(|error| format!("deckies: {error}"))?;
        let (mode, compose_path) = (file.config.mode.to_owned(), file.compose_path.to_owned());
        Ok(Self { mode, compose_path, deckies: deckies.to_owned(), services })
    }

    /// How many there are.
    #[cfg(feature = "cli")]
    pub(super) fn deckies(&self) -> usize {
        self.services.len()
    }

    /// Each service's container is named `<decky>-<service>`, with `_` in the service turned into `-`.
    pub(super) fn runtime<'a>(&'a self, containers: &'a BTreeMap<String, String>) -> Runtime<'a> {
        let mut container = String::new();
        let mut state = |decky: &str, service: &str| {
            container.clear();
            container.extend([decky, "-"]);
            container.extend(service.chars().map(|char| if char == '_' { '-' } else { char }));
            containers.get(&container).map_or("absent", String::as_str)
        };
        let mut of = |decky: &'a Decky| {
            decky.services.0.iter().map(|service| (service.as_str(), state(&decky.name, service))).collect()
        };
        Runtime(self.services.iter().map(|decky| (decky.name.as_str(), of(decky))).collect())
    }
}

/// Whether valid JSON is nested deeper than so many levels. This is passed on as it stands, and a reader that recurses, as
/// the master's does, refuses all of the beat for it.
fn is_nested_deeper(json: &[u8], most: usize) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    json.iter().any(|byte| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => depth += 1,
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => (),
        }
        depth > most
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::time::{Duration, SystemTime};

    use super::*;

    fn state(deckies: &str) -> String {
        format!(r#"{{"config": {{"mode": "swarm", "deckies": {deckies}}}, "compose_path": "/x.yml"}}"#)
    }

    fn deckies(file: &mut StateFile) -> String {
        file.read().unwrap().unwrap().deckies.get().to_owned()
    }

    /// As if it had been left alone for a while; a change time cannot be set, so it is a test's own matter.
    fn settle(file: &mut StateFile) {
        file.known.as_mut().unwrap().stamp = Some(Stamp::of(&file.path));
    }

    #[test]
    fn what_is_known_is_not_read_again_until_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = StateFile::new(dir.path().join("state.json"));
        fs::write(&file.path, state("[]")).unwrap();
        assert_eq!(deckies(&mut file), "[]");
        file.known.as_mut().unwrap().state.deckies = RawValue::from_string("[1]".to_owned()).unwrap();
        settle(&mut file);
        assert_eq!(deckies(&mut file), "[1]", "remembered");
        // The same size, and the same time of the last change as far as a program can set it.
        let changed = fs::metadata(&file.path).unwrap().modified().unwrap();
        fs::write(&file.path, state("[ ]").replace(", ", ",")).unwrap();
        File::options().write(true).open(&file.path).unwrap().set_modified(changed).unwrap();
        assert_eq!(deckies(&mut file), "[ ]");
        settle(&mut file);
        fs::remove_file(&file.path).unwrap();
        assert!(file.read().unwrap().is_none(), "and gone with its file");
        fs::write(&file.path, "{").unwrap();
        assert!(file.read().unwrap_err().contains("state.json: EOF while parsing an object"));
    }

    #[test]
    fn a_file_that_has_just_changed_is_read_again_whatever_it_looks_like() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = StateFile::new(dir.path().join("state.json"));
        fs::write(&file.path, state("[]")).unwrap();
        // Its own time may be what somebody likes. When it was really changed is the system's matter.
        for written in [SystemTime::UNIX_EPOCH, SystemTime::now() + Duration::from_secs(3_600)] {
            File::options().write(true).open(&file.path).unwrap().set_modified(written).unwrap();
            assert_eq!(deckies(&mut file), "[]");
            assert_eq!(file.known.as_ref().unwrap().stamp, None);
        }
    }

    #[test]
    fn what_is_nested_too_deep_for_the_master_is_not_passed_on() {
        for (json, depth) in [("[{}]", 2), (r#"{"[[[": "\"[[["}"#, 1), (r#"["\\", [[]]]"#, 3), ("1", 0)] {
            assert!(!is_nested_deeper(json.as_bytes(), depth), "{json}");
            assert!(depth == 0 || is_nested_deeper(json.as_bytes(), depth - 1), "{json}");
        }
    }
}
