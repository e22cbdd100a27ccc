//! A look at the outbox' file that changes nothing. Runs on the thread that asks.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

use super::entries;
use super::file::is_of_the_content;
use super::schema;
use crate::database_files::{Place, in_real_folder};
use crate::error::Error;
use crate::files::{beside, folder};
use crate::kept::{Counts, Stuck};
use crate::limits;
use crate::read_only::{Way, owner};

/// What is in an outbox.
#[derive(Debug, Default)]
pub(crate) struct Looked {
    pub(crate) counts: Counts,
    /// Rows of which nobody could tell for a day whether their owners run.
    pub(crate) stuck: Vec<Stuck>,
}

/// What is in the file. `None`: it is of an older version, which `run` takes over.
pub(crate) fn look(path: &Path) -> Result<Option<Looked>, Error> {
    let error = |problem: &str| Error::outbox(Some(path), problem);
    let cannot = |source| error("cannot be read").because(source);
    let path = &in_real_folder(path).map_err(cannot)?;
    let place = Place::look(path).and_then(|place| place.ok_or_else(|| io::ErrorKind::NotFound.into()));
    let folder = fs::metadata(folder(path)).map_err(cannot)?;
    place.and_then(|place| place.refuse_strangers(&folder)).map_err(cannot)?;
    if owner(&beside(path, "-wal")).is_some_and(|of_wal| owner(path) != Some(of_wal)) {
        return Err(error("has another owner than the -wal beside it; run it as the owner of both"));
    }
    let end = Instant::now() + limits::OUTBOX_BUSY;
    loop {
        let way = Way::to(path).map_err(cannot)?;
        let looked = look_in(path, way);
        // A process that has just opened or closed it has made or removed what is beside it.
        if Way::to(path).is_ok_and(|now| now != way) && Instant::now() < end {
            continue;
        }
        let broken = "is no outbox, or broken";
        return match looked {
            Ok(found) => found.map_err(|damage| error(broken).because(damage)),
            Err(source) if is_of_the_content(&source) => Err(error(broken).because(source)),
            Err(source) => Err(error("cannot be read").because(source)),
        };
    }
}

/// `Ok(Err(why))`: it is no outbox, or damaged.
fn look_in(path: &Path, way: Way) -> rusqlite::Result<Result<Option<Looked>, String>> {
    let database = way.open(path, limits::OUTBOX_BUSY)?;
    if let Some(problem) = schema::problem(&database)? {
        return Ok(Err(problem));
    }
    match schema::version(&database)? {
        // Made, and nothing written yet.
        Some(0) => Ok(Ok(Some(Looked::default()))),
        Some(schema::VERSION) => {
            Ok(Ok(Some(Looked { counts: entries::counts(&database)?, stuck: entries::stuck(&database)? })))
        }
        _ => Ok(Ok(None)),
    }
}
