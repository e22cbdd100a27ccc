//! Reads the applied topology from `topology.db`, a file of DECNET's agent. The file is never
//! changed. Runs on the status thread.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Instant;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, Row};

use super::AppliedTopology;
use crate::error::{chain, sanitize_path};
use crate::limits;
use crate::sqlite::files::{DatabaseFile, with_real_folder};
use crate::sqlite::read_only::ReadMode;

/// Reads `topology.db` and caches its last row. If a beat leaves the topology out, the master
/// orders it to be built again.
#[derive(Debug)]
pub(crate) struct TopologyFile {
    path: PathBuf,
    /// The last row that was read. The inner `None`: there was no row. The outer `None`: the file
    /// was never read.
    last: Option<Option<AppliedTopology>>,
}

impl TopologyFile {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, last: None }
    }

    /// Reads the row. If that fails, or the file was deleted, returns the last row, and the error.
    pub(crate) fn read(&mut self) -> (Option<Option<AppliedTopology>>, Result<(), String>) {
        match self.row() {
            Ok(row) => (self.last.insert(row).clone().into(), Ok(())),
            Err(error) => (
                self.last.clone(),
                Err(format!("{}: {}", sanitize_path(&self.path), chain(error.as_ref()))),
            ),
        }
    }

    fn row(&self) -> Result<Option<AppliedTopology>, Box<dyn Error>> {
        // A file that cannot be accessed is an error. If it counted as absent, the master would
        // order the topology again.
        let path = match with_real_folder(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            path => Some(path?),
        };
        let place = path.as_deref().map_or(Ok(None), DatabaseFile::open)?;
        let Some(path) = path.filter(|_| place.is_some()) else {
            // When a topology is torn down, its row is deleted and the file stays.
            return if matches!(self.last, Some(Some(_))) {
                Err("was deleted".into())
            } else {
                Ok(None)
            };
        };
        let end = Instant::now() + limits::TOPOLOGY_BUSY;
        loop {
            let mode = ReadMode::of(&path)?;
            let row = Self::row_of(&mode.open(&path, limits::TOPOLOGY_BUSY)?);
            // If the mode has changed, DECNET's agent has written during the read.
            if ReadMode::of(&path).is_ok_and(|now| now == mode) || Instant::now() >= end {
                return row;
            }
        }
    }

    fn row_of(database: &Connection) -> Result<Option<AppliedTopology>, Box<dyn Error>> {
        let sql = "SELECT topology_id, applied_version_hash, applied_at, last_error FROM applied_topology LIMIT 1";
        let mut select = database.prepare(sql)?;
        select.query([])?.next()?.map(applied).transpose()
    }
}

fn applied(row: &Row<'_>) -> Result<AppliedTopology, Box<dyn Error>> {
    Ok(AppliedTopology {
        topology_id: required(row, "topology_id")?,
        applied_version_hash: required(row, "applied_version_hash")?,
        applied_at: row.get("applied_at")?,
        last_error: text(row, "last_error")?,
    })
}

fn required(row: &Row<'_>, column: &str) -> Result<String, Box<dyn Error>> {
    Ok(text(row, column)?.ok_or_else(|| format!("{column} is null"))?)
}

/// A string or null. Its length is limited, because it is sent with every beat.
fn text(row: &Row<'_>, column: &str) -> Result<Option<String>, Box<dyn Error>> {
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        ValueRef::Text(text) if text.len() > limits::TOPOLOGY_TEXT => {
            Err(format!("{column} is longer than {} bytes", limits::TOPOLOGY_TEXT).into())
        }
        ValueRef::Text(text) => match str::from_utf8(text) {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(error) => Err(format!("{column} is not a string: {error}").into()),
        },
        other => Err(format!("{column} is not a string: {}", other.data_type()).into()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::files::beside;
    use crate::sqlite::files::PARTS;

    const TABLE: &str = "CREATE TABLE applied_topology (topology_id TEXT PRIMARY KEY, applied_version_hash TEXT, \
                         hydrated_blob_json TEXT, applied_at INTEGER, last_error TEXT)";

    fn file() -> (tempfile::TempDir, TopologyFile) {
        let dir = tempfile::tempdir().unwrap();
        let file = TopologyFile::new(dir.path().join("topology.db"));
        (dir, file)
    }

    /// A file with a row that was read once, and a connection of its owner.
    fn file_with_row() -> (tempfile::TempDir, TopologyFile, Connection) {
        let (dir, mut file) = file();
        let owner = Connection::open(&file.path).unwrap();
        owner.execute(TABLE, []).unwrap();
        owner.execute("INSERT INTO applied_topology VALUES ('t', 'h', '{}', 5, NULL)", []).unwrap();
        file.read().1.unwrap();
        (dir, file, owner)
    }

    fn row() -> AppliedTopology {
        let topology_id = "t".to_owned();
        let applied_version_hash = "h".to_owned();
        AppliedTopology { topology_id, applied_version_hash, applied_at: 5, last_error: None }
    }

    #[test]
    fn missing_file_means_no_topology_and_is_not_created() {
        let (_dir, mut file) = file();
        assert_eq!(file.read(), (Some(None), Ok(())));
        assert!(!file.path.exists());
    }

    #[test]
    fn row_is_read_without_creating_files() {
        let (dir, mut file) = file();
        let owner = Connection::open(&file.path).unwrap();
        owner.execute(TABLE, []).unwrap();
        assert_eq!(file.read(), (Some(None), Ok(())));
        owner.execute("INSERT INTO applied_topology VALUES ('t', 'h', '{}', 5, NULL)", []).unwrap();
        assert_eq!(file.read(), (Some(Some(row())), Ok(())));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn last_row_is_returned_while_the_file_is_locked() {
        let (_dir, mut file, owner) = file_with_row();
        owner.execute_batch("BEGIN EXCLUSIVE; UPDATE applied_topology SET applied_at = 6").unwrap();
        let (last, problem) = file.read();
        assert_eq!(last, Some(Some(row())));
        assert!(problem.unwrap_err().contains("topology.db: database is locked"));
    }

    #[test]
    fn file_in_wal_mode_is_read_without_creating_files() {
        let (dir, mut file, owner) = file_with_row();
        owner.pragma_update(None, "journal_mode", "wal").unwrap();
        owner.execute("UPDATE applied_topology SET applied_at = 6", []).unwrap();
        let applied = |at| Some(Some(AppliedTopology { applied_at: at, ..row() }));
        assert_eq!(file.read(), (applied(6), Ok(())), "the owner has the file open");
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files(), 3);
        owner.close().unwrap();
        assert_eq!((file.read(), files()), ((applied(6), Ok(())), 1));
    }

    #[test]
    fn inaccessible_file_is_an_error_and_not_no_topology() {
        let (dir, mut file) = file();
        // A loop of symlinks fails in the same way as a folder without permission.
        let folder = dir.path().join("folder");
        std::os::unix::fs::symlink(&folder, &folder).unwrap();
        file.path = folder.join("topology.db");
        let (last, problem) = file.read();
        assert_eq!(last, None);
        assert!(problem.unwrap_err().contains("Too many levels of symbolic links"));
        let mut fifo = TopologyFile::new(dir.path().join("fifo"));
        assert!(std::process::Command::new("mkfifo").arg(&fifo.path).status().unwrap().success());
        assert!(
            fifo.read()
                .1
                .unwrap_err()
                .ends_with("fifo is a FIFO, not a regular file; rename or remove it"),
            "opening it would block"
        );
    }

    #[test]
    fn fifo_in_place_of_the_journal_is_not_opened() {
        let (dir, mut file, _owner) = file_with_row();
        assert!(
            std::process::Command::new("mkfifo")
                .arg(dir.path().join("topology.db-journal"))
                .status()
                .unwrap()
                .success()
        );
        let (last, problem) = file.read();
        assert_eq!(last, Some(Some(row())));
        assert!(
            problem.unwrap_err().ends_with(
                "topology.db-journal is a FIFO, not a regular file; rename or remove it"
            ),
            "opening it would block"
        );
    }

    #[test]
    fn symlinks_hard_links_and_fifos_are_rejected_without_opening_them() {
        for part in PARTS {
            type Make = fn(&Path, &Path);
            let makes: [(Make, &str); 3] = [
                (
                    |path, other| std::os::unix::fs::symlink(other, path).unwrap(),
                    "is a symlink, not a regular file",
                ),
                (|path, other| std::fs::hard_link(other, path).unwrap(), "has 2 hard links"),
                (
                    |path, _| {
                        assert!(
                            std::process::Command::new("mkfifo")
                                .arg(path)
                                .status()
                                .unwrap()
                                .success()
                        )
                    },
                    "is a FIFO, not a regular file",
                ),
            ];
            for (make, problem) in makes {
                let (dir, mut file, owner) = file_with_row();
                owner.close().unwrap();
                let place = beside(&file.path, part);
                let other = dir.path().join("other");
                std::fs::write(&other, "theirs").unwrap();
                let _ = std::fs::remove_file(&place);
                make(&place, &other);
                let (last, result) = file.read();
                assert_eq!(last, Some(Some(row())));
                let error = result.unwrap_err();
                assert!(error.contains(&format!("topology.db{part} {problem}")), "{error}");
                assert_eq!(std::fs::read(&other).unwrap(), b"theirs");
            }
        }
    }

    #[test]
    fn file_in_a_symlinked_folder_is_read() {
        let (dir, file, _owner) = file_with_row();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let path = TopologyFile::new(link.join("topology.db"));
        assert_eq!((path.row().unwrap(), file.row().unwrap()), (Some(row()), Some(row())));
    }

    #[test]
    fn last_row_is_returned_after_the_file_was_deleted() {
        let (_dir, mut file, _owner) = file_with_row();
        std::fs::remove_file(&file.path).unwrap();
        let (last, problem) = file.read();
        assert_eq!(last, Some(Some(row())));
        assert!(problem.unwrap_err().ends_with("topology.db: was deleted"));
    }

    #[test]
    fn too_long_string_is_an_error() {
        let (_dir, mut file, owner) = file_with_row();
        owner
            .execute(
                "UPDATE applied_topology SET last_error = ?1",
                ["x".repeat(limits::TOPOLOGY_TEXT)],
            )
            .unwrap();
        assert_eq!(
            file.read().0.unwrap().unwrap().last_error.unwrap().len(),
            limits::TOPOLOGY_TEXT
        );
        for column in ["topology_id", "applied_version_hash", "last_error"] {
            let sql = format!("UPDATE applied_topology SET {column} = ?1");
            owner.execute(&sql, ["x".repeat(limits::TOPOLOGY_TEXT + 1)]).unwrap();
            let problem = file.read().1.unwrap_err();
            assert!(
                problem.ends_with(&format!("topology.db: {column} is longer than 65536 bytes")),
                "{problem}"
            );
            owner.execute(&format!("UPDATE applied_topology SET {column} = 'x'"), []).unwrap();
        }
    }

    #[test]
    fn invalid_value_is_an_error_with_its_column() {
        for (change, problem) in [
            ("topology_id = NULL", "topology_id is null"),
            ("applied_version_hash = 7", "applied_version_hash is not a string: Integer"),
            ("last_error = x'00ff'", "last_error is not a string: Blob"),
            (
                "last_error = CAST(x'61ff' AS TEXT)",
                "last_error is not a string: invalid utf-8 sequence of 1 bytes from index 1",
            ),
            ("applied_at = 'now'", "Invalid column type Text at index: 2, name: applied_at"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let mut file = TopologyFile::new(dir.path().join("topology.db"));
            let owner = Connection::open(&file.path).unwrap();
            let table = "CREATE TABLE applied_topology (topology_id, applied_version_hash, applied_at, last_error)";
            owner.execute(table, []).unwrap();
            owner.execute("INSERT INTO applied_topology VALUES ('t', 'h', 5, NULL)", []).unwrap();
            owner.execute(&format!("UPDATE applied_topology SET {change}"), []).unwrap();
            let expected = format!("{}: {problem}", file.path.display());
            assert_eq!(file.read(), (None, Err(expected)));
        }
    }

    #[test]
    fn topology_is_unknown_if_the_file_was_never_readable() {
        let (_dir, mut file) = file();
        std::fs::write(&file.path, "this is no database, and long enough to be looked at as one")
            .unwrap();
        let (last, problem) = file.read();
        assert_eq!(last, None);
        assert!(problem.unwrap_err().contains("file is not a database"));
    }
}
