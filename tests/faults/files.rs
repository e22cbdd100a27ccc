//! Files that other programs write: DECNET's state file and `topology.db`. The beat is on time
//! whatever is at their paths.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rusqlite::Connection;
use serde_json::json;

use crate::agent::Source;
use crate::fault_case::{Expect, Fault, FaultCase};
use crate::test_bed::Scenario;

/// What is at the state file's path.
#[derive(Clone, Copy, Debug)]
pub enum StateFile {
    Content(&'static str),
    Absent,
    /// A file with this many zero bytes.
    OfSize(u64),
    /// A decky with arrays that are nested this deep.
    Nested(usize),
    Fifo,
    Directory,
    SymlinkToFile,
    SymlinkToItself,
    /// A file that is replaced repeatedly by renaming another one.
    ReplacedRepeatedly,
}

/// One decky, for which one container runs.
const STATE: &str = r#"{"config": {"mode": "swarm", "deckies": [{"name": "d1", "services": ["ssh", "smb_share"]}]},
    "compose_path": "/opt/decnet/compose.yml"}"#;

impl StateFile {
    pub const GOOD: Self = Self::Content(STATE);

    /// An earlier [`FileReplacer`] must be dropped before: it writes to the same path.
    pub fn put(self, path: &Path) -> Option<FileReplacer> {
        let target = path.with_extension("target");
        remove(path);
        match self {
            Self::Content(content) => fs::write(path, content).unwrap(),
            Self::Absent => (),
            Self::OfSize(size) => fs::File::create(path).unwrap().set_len(size).unwrap(),
            Self::Nested(depth) => {
                let decky = format!(
                    r#"{{"name": "d1", "services": [], "x": {}{}}}"#,
                    "[".repeat(depth),
                    "]".repeat(depth)
                );
                fs::write(
                    path,
                    format!(
                        r#"{{"config": {{"mode": 1, "deckies": [{decky}]}}, "compose_path": ""}}"#
                    ),
                )
                .unwrap();
            }
            Self::Fifo => assert!(Command::new("mkfifo").arg(path).status().unwrap().success()),
            Self::Directory => fs::create_dir(path).unwrap(),
            Self::SymlinkToFile => {
                fs::write(&target, STATE).unwrap();
                symlink(target, path).unwrap();
            }
            Self::SymlinkToItself => symlink(path, path).unwrap(),
            Self::ReplacedRepeatedly => return Some(FileReplacer::start(path)),
        }
        None
    }
}

/// Removes what is at this path, if anything.
fn remove(path: &Path) {
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        fs::remove_dir(path).unwrap();
    } else {
        let _ = fs::remove_file(path);
    }
}

/// A thread that replaces a file with a longer one every 10 ms. It ends after 200 times, or when
/// this is dropped.
pub struct FileReplacer {
    thread: Option<JoinHandle<()>>,
    must_end: Arc<AtomicBool>,
}

impl FileReplacer {
    fn start(path: &Path) -> Self {
        let path = path.to_owned();
        let next = path.with_extension("next");
        fs::write(&path, STATE).unwrap();
        let must_end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&must_end);
        let replace = move || {
            for n in (0..200).take_while(|_| !ended.load(Relaxed)) {
                let filler = " ".repeat(n * 1_000);
                fs::write(&next, format!("{filler}{STATE}"))
                    .and_then(|()| fs::rename(&next, &path))
                    .unwrap();
                // The fault is one change every 10 ms, so that reads and changes overlap.
                thread::sleep(Duration::from_millis(10));
            }
        };
        Self { thread: Some(thread::spawn(replace)), must_end }
    }
}

impl Drop for FileReplacer {
    fn drop(&mut self) {
        self.must_end.store(true, Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// What is at the path of `topology.db`.
#[derive(Clone, Copy, Debug)]
pub enum TopologyFile {
    Good,
    Locked,
    Corrupt,
    OtherSchema,
    Deleted,
}

impl TopologyFile {
    /// Returns a connection that keeps the file locked, if it is to be locked.
    pub fn put(self, path: &Path) -> Option<Connection> {
        match self {
            Self::Good => {
                remove(path);
                let database = Connection::open(path).unwrap();
                let table = "CREATE TABLE applied_topology (topology_id TEXT PRIMARY KEY, applied_version_hash TEXT, \
                             hydrated_blob_json TEXT, applied_at INTEGER, last_error TEXT)";
                database.execute_batch(table).unwrap();
                database
                    .execute("INSERT INTO applied_topology VALUES ('t', 'h', '{}', 5, NULL)", [])
                    .unwrap();
                None
            }
            Self::Locked => {
                let database = Connection::open(path).unwrap();
                // A database that is locked but not changed could still be read.
                database
                    .execute_batch("BEGIN EXCLUSIVE; UPDATE applied_topology SET applied_at = 6")
                    .unwrap();
                Some(database)
            }
            Self::Corrupt => {
                let size = fs::metadata(path).unwrap().len() as usize;
                fs::write(path, vec![0xa5; size]).unwrap();
                None
            }
            Self::OtherSchema => {
                let database = Connection::open(path).unwrap();
                database.execute_batch("ALTER TABLE applied_topology RENAME TO renamed").unwrap();
                None
            }
            Self::Deleted => {
                remove(path);
                None
            }
        }
    }
}

const LONE_SURROGATE: &str = concat!(
    r#"{"config": {"mode": "swarm", "deckies": [{"name": "d1", "services": ["ssh"], "banner": ["", "\udcff"]}]},"#,
    r#""compose_path": "/x"}"#
);

const WRONG_TYPES: &str =
    r#"{"config": {"mode": "swarm", "deckies": {"name": 1}}, "compose_path": 7}"#;

pub fn cases() -> Vec<FaultCase> {
    let scenario = Scenario { source: Source::Decnet, ..Scenario::default() };
    let state = |name: &str, file, expect| {
        FaultCase::new(format!("files/state_{name}"), Fault::StateFile(file), expect)
            .in_scenario(scenario)
    };
    let error = |name, file, errors| state(name, file, Expect::StatusError(errors));
    let content = StateFile::Content;
    let topology = |name: &str, file, expect| {
        FaultCase::new(format!("files/topology_{name}"), Fault::TopologyFile(file), expect)
            .in_scenario(scenario)
    };
    let nothing_deployed = || Expect::Field("/status", json!({"deployed": false, "deckies": []}));
    let running = || Expect::Field("/status/runtime/d1/services/ssh", json!("running"));
    // The last known row is still sent.
    let last_topology = || Expect::Field("/topology/applied_version_hash", json!("h"));
    vec![
        state("absent", StateFile::Absent, nothing_deployed()),
        error("empty", content(""), &["EOF while parsing"]),
        error("truncated", content(&STATE[..70]), &["EOF while parsing"]),
        error("of_100_mb", StateFile::OfSize(100_000_000), &["larger than"]),
        error(
            "with_wrong_types",
            content(WRONG_TYPES),
            &["deckies: invalid type: map, expected a list"],
        ),
        error(
            "with_lone_surrogate",
            content(LONE_SURROGATE),
            &["deckies[0].banner[1] has a lone surrogate"],
        ),
        error("nested_too_deep", StateFile::Nested(100_000), &["nested deeper than"]),
        error("is_fifo", StateFile::Fifo, &["not a regular file"]),
        error("is_directory", StateFile::Directory, &["not a regular file"]),
        state("is_symlink", StateFile::SymlinkToFile, running()),
        error(
            "is_symlink_to_itself",
            StateFile::SymlinkToItself,
            &["Too many levels of symbolic links"],
        ),
        state("replaced_repeatedly", StateFile::ReplacedRepeatedly, running()),
        topology("locked", TopologyFile::Locked, last_topology()),
        topology(
            "locked_is_logged",
            TopologyFile::Locked,
            Expect::Warns("topology.db: database is locked"),
        ),
        topology("corrupt", TopologyFile::Corrupt, last_topology()),
        topology(
            "corrupt_is_logged",
            TopologyFile::Corrupt,
            Expect::Warns("topology.db: file is not a database"),
        ),
        topology("with_other_schema", TopologyFile::OtherSchema, last_topology()),
        topology(
            "with_other_schema_is_logged",
            TopologyFile::OtherSchema,
            Expect::Warns("no such table"),
        ),
        topology("deleted", TopologyFile::Deleted, last_topology()),
        topology(
            "deleted_is_logged",
            TopologyFile::Deleted,
            Expect::Warns("topology.db: was deleted"),
        ),
    ]
}
