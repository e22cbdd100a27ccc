//! Reads the state of an outbox file without changing it. Runs on the calling thread.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

use super::file::{CORRUPT, is_content_error};
use super::rows;
use super::schema;
use crate::error::Error;
use crate::files::{beside, folder};
use crate::limits;
use crate::outbox::queued::{QueueCounts, StuckRow};
use crate::sqlite::files::{DatabaseFile, with_real_folder};
use crate::sqlite::read_only::{ReadMode, owner};

/// The state of an outbox.
#[derive(Debug, Default)]
pub(crate) struct OutboxSummary {
    pub(crate) counts: QueueCounts,
    pub(crate) stuck: Vec<StuckRow>,
}

/// Reads the state of an outbox. `None`: the file has an older version, which `run` migrates.
pub(crate) fn summarize(path: &Path) -> Result<Option<OutboxSummary>, Error> {
    let error = |problem: &str| Error::outbox(Some(path), problem);
    let unreadable = |source| error("cannot be read").with_source(source);
    let path = &with_real_folder(path).map_err(unreadable)?;
    let file = DatabaseFile::open(path)
        .and_then(|file| file.ok_or_else(|| io::ErrorKind::NotFound.into()));
    let folder = fs::metadata(folder(path)).map_err(unreadable)?;
    file.and_then(|file| file.check_owner(&folder)).map_err(unreadable)?;
    if owner(&beside(path, "-wal")).is_some_and(|of_wal| owner(path) != Some(of_wal)) {
        return Err(error(
            "has another owner than the -wal beside it; run it as the owner of both",
        ));
    }
    let deadline = Instant::now() + limits::OUTBOX_BUSY;
    loop {
        let mode = ReadMode::of(path).map_err(unreadable)?;
        let summary = read(path, mode);
        // Another process has just opened or closed the file, and created or deleted the files
        // beside it.
        if ReadMode::of(path).is_ok_and(|now| now != mode) && Instant::now() < deadline {
            continue;
        }
        return summary.map_err(|source| {
            let problem = if is_content_error(&source) { CORRUPT } else { "cannot be read" };
            error(problem).with_source(source)
        });
    }
}

fn read(path: &Path, mode: ReadMode) -> rusqlite::Result<Option<OutboxSummary>> {
    let database = mode.open(path, limits::OUTBOX_BUSY)?;
    schema::check(&database)?;
    match schema::version(&database)? {
        // The file was created, but nothing was written yet.
        Some(0) => Ok(Some(OutboxSummary::default())),
        Some(schema::VERSION) => Ok(Some(OutboxSummary {
            counts: rows::counts(&database)?,
            stuck: rows::stuck(&database)?,
        })),
        _ => Ok(None),
    }
}
