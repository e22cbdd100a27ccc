//! Files that others write: DECNET's state file and `topology.db`. The beat is on time whatever is at their place.

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

use crate::row::{Fault, Right, Row};
use crate::stage::World;
use crate::subject::Source;

/// What is at the state file's place.
#[derive(Clone, Copy, Debug)]
pub enum StateFile {
    Holds(&'static str),
    Absent,
    /// So many bytes of it.
    OfSize(u64),
    /// A decky with arrays in arrays, so deep.
    Deep(usize),
    Fifo,
    Directory,
    SymlinkToIt,
    SymlinkToItself,
    /// A file that is put at its place again and again, each time another one.
    Replaced,
}

/// The decky of the state file; one container of it runs.
const STATE: &str = r#"{"config": {"mode": "swarm", "deckies": [{"name": "d1", "services": ["ssh", "smb_share"]}]},
    "compose_path": "/opt/decnet/compose.yml"}"#;

impl StateFile {
    pub const GOOD: Self = Self::Holds(STATE);

    /// Drop an earlier [`Replacing`] first: it writes to the same path.
    pub fn put(self, path: &Path) -> Option<Replacing> {
        let beside = path.with_extension("beside");
        clear(path);
        match self {
            Self::Holds(content) => fs::write(path, content).unwrap(),
            Self::Absent => (),
            Self::OfSize(size) => fs::File::create(path).unwrap().set_len(size).unwrap(),
            Self::Deep(depth) => {
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
            Self::SymlinkToIt => {
                fs::write(&beside, STATE).unwrap();
                symlink(beside, path).unwrap();
            }
            Self::SymlinkToItself => symlink(path, path).unwrap(),
            Self::Replaced => return Some(Replacing::start(path)),
        }
        None
    }
}

/// Whatever is there.
fn clear(path: &Path) {
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        fs::remove_dir(path).unwrap();
    } else {
        let _ = fs::remove_file(path);
    }
}

/// A thread that replaces a file with a longer one every 10 ms, by renaming. It ends after 2 s, or when this is dropped.
pub struct Replacing {
    thread: Option<JoinHandle<()>>,
    is_over: Arc<AtomicBool>,
}

impl Replacing {
    fn start(path: &Path) -> Self {
        let (path, beside) = (path.to_owned(), path.with_extension("next"));
        fs::write(&path, STATE).unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let must_end = Arc::clone(&is_over);
        let replace = move || {
            for n in (0..200).take_while(|_| !must_end.load(Relaxed)) {
                let filler = " ".repeat(n * 1_000);
                fs::write(&beside, format!("{filler}{STATE}"))
                    .and_then(|()| fs::rename(&beside, &path))
                    .unwrap();
                thread::sleep(Duration::from_millis(10));
            }
        };
        Self { thread: Some(thread::spawn(replace)), is_over }
    }
}

impl Drop for Replacing {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// What is at the place of `topology.db`.
#[derive(Clone, Copy, Debug)]
pub enum TopologyFile {
    Good,
    Locked,
    Corrupt,
    OfAnotherSchema,
    Gone,
}

impl TopologyFile {
    /// The connection keeps it locked.
    pub fn put(self, path: &Path) -> Option<Connection> {
        match self {
            Self::Good => {
                clear(path);
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
                // What is locked and not written can be read all the same.
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
            Self::OfAnotherSchema => {
                let database = Connection::open(path).unwrap();
                database.execute_batch("ALTER TABLE applied_topology RENAME TO renamed").unwrap();
                None
            }
            Self::Gone => {
                clear(path);
                None
            }
        }
    }
}

pub fn rows() -> Vec<Row> {
    let decnet = World { source: Source::Decnet, ..World::default() };
    let state = |name: &str, file, right| {
        Row::new(format!("files/{name}"), Fault::State(file), right).with(decnet)
    };
    let topology = |name: &str, file, right| {
        Row::new(format!("files/topology_{name}"), Fault::Topology(file), right).with(decnet)
    };
    let deployed = || Right::Tells("/status/runtime/d1/services/ssh", json!("running"));
    let kept = || Right::Tells("/topology/applied_version_hash", json!("h"));
    let surrogate = concat!(
        r#"{"config": {"mode": "swarm", "deckies": [{"name": "d1", "services": ["ssh"], "banner": ["", "\udcff"]}]},"#,
        r#""compose_path": "/x"}"#
    );
    let of_types = r#"{"config": {"mode": "swarm", "deckies": {"name": 1}}, "compose_path": 7}"#;
    vec![
        state(
            "absent",
            StateFile::Absent,
            Right::Tells("/status", json!({"deployed": false, "deckies": []})),
        ),
        state("empty", StateFile::Holds(""), Right::Says("EOF while parsing")),
        state("truncated", StateFile::Holds(&STATE[..70]), Right::Says("EOF while parsing")),
        state("of_100_mb", StateFile::OfSize(100_000_000), Right::Says("larger than")),
        state(
            "of_wrong_types",
            StateFile::Holds(of_types),
            Right::Says("deckies: invalid type: map, expected a list"),
        ),
        state(
            "with_a_lone_surrogate",
            StateFile::Holds(surrogate),
            Right::Says("deckies[0].banner[1] has a lone surrogate"),
        ),
        state("deeply_nested", StateFile::Deep(100_000), Right::Says("nested deeper than")),
        state("a_fifo", StateFile::Fifo, Right::Says("not a regular file")),
        state("a_directory", StateFile::Directory, Right::Says("not a regular file")),
        state("a_symlink", StateFile::SymlinkToIt, deployed()),
        state(
            "a_symlink_to_itself",
            StateFile::SymlinkToItself,
            Right::Says("Too many levels of symbolic links"),
        ),
        state("replaced_while_read", StateFile::Replaced, deployed()),
        topology("locked", TopologyFile::Locked, kept()),
        topology(
            "locked_is_said",
            TopologyFile::Locked,
            Right::Warns("topology.db: database is locked"),
        ),
        topology("corrupt", TopologyFile::Corrupt, kept()),
        topology(
            "corrupt_is_said",
            TopologyFile::Corrupt,
            Right::Warns("topology.db: file is not a database"),
        ),
        topology("of_another_schema", TopologyFile::OfAnotherSchema, kept()),
        topology(
            "of_another_schema_is_said",
            TopologyFile::OfAnotherSchema,
            Right::Warns("no such table"),
        ),
        topology("gone", TopologyFile::Gone, kept()),
        topology("gone_is_said", TopologyFile::Gone, Right::Warns("topology.db: was deleted")),
    ]
}
