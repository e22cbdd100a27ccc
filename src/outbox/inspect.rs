//! A look at the outbox' file that changes nothing. Runs on the thread that asks.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

use super::file::is_of_the_content;
use super::rows;
use super::schema;
use crate::error::Error;
use crate::files::{beside, folder};
use crate::limits;
use crate::outbox::queued::{QueueCounts, UnjudgedRow};
use crate::sqlite::files::{DatabaseFile, with_real_folder};
use crate::sqlite::read_only::{ReadMode, owner};

/// What is in an outbox.
#[derive(Debug, Default)]
pub(crate) struct OutboxSummary {
    pub(crate) counts: QueueCounts,
    /// Rows of which nobody could tell for a day whether their owners run.
    pub(crate) stuck: Vec<UnjudgedRow>,
}

/// What is in the file. `None`: it is of an older version, which `run` takes over.
pub(crate) fn look(path: &Path) -> Result<Option<OutboxSummary>, Error> {
    let error = |problem: &str| Error::outbox(Some(path), problem);
    let cannot = |source| error("cannot be read").with_source(source);
    let path = &with_real_folder(path).map_err(cannot)?;
    let place = DatabaseFile::open(path)
        .and_then(|place| place.ok_or_else(|| io::ErrorKind::NotFound.into()));
    let folder = fs::metadata(folder(path)).map_err(cannot)?;
    place.and_then(|place| place.check_owner(&folder)).map_err(cannot)?;
    if owner(&beside(path, "-wal")).is_some_and(|of_wal| owner(path) != Some(of_wal)) {
        return Err(error(
            "has another owner than the -wal beside it; run it as the owner of both",
        ));
    }
    let end = Instant::now() + limits::OUTBOX_BUSY;
    loop {
        let way = ReadMode::of(path).map_err(cannot)?;
        let looked = look_in(path, way);
        // A process that has just opened or closed it has made or removed what is beside it.
        if ReadMode::of(path).is_ok_and(|now| now != way) && Instant::now() < end {
            continue;
        }
        let broken = "is no outbox, or broken";
        return match looked {
            Ok(found) => found.map_err(|damage| error(broken).with_source(damage)),
            Err(source) if is_of_the_content(&source) => Err(error(broken).with_source(source)),
            Err(source) => Err(error("cannot be read").with_source(source)),
        };
    }
}

/// `Ok(Err(why))`: it is no outbox, or damaged.
fn look_in(path: &Path, way: ReadMode) -> rusqlite::Result<Result<Option<OutboxSummary>, String>> {
    let database = way.open(path, limits::OUTBOX_BUSY)?;
    if let Some(problem) = schema::problem(&database)? {
        return Ok(Err(problem));
    }
    match schema::version(&database)? {
        // Made, and nothing written yet.
        Some(0) => Ok(Ok(Some(OutboxSummary::default()))),
        Some(schema::VERSION) => Ok(Ok(Some(OutboxSummary {
            counts: rows::counts(&database)?,
            stuck: rows::stuck(&database)?,
        }))),
        _ => Ok(Ok(None)),
    }
}
