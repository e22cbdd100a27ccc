//! A look at the outbox' file that changes nothing. Runs on the thread that asks.

use std::fs;
use std::path::Path;
use std::time::Instant;

use rusqlite::Connection;

use super::entries;
use super::file::is_of_the_content;
use super::schema;
use crate::error::Error;
use crate::kept::{Counts, Stuck};
use crate::limits;
use crate::read_only::{Way, beside, owner};

/// What is in the file. `None`: it is of an older version, which `run` takes over.
pub(crate) fn look(path: &Path) -> Result<Option<Counts>, Error> {
    look_for(path, Some(Counts::default()), entries::counts)
}

/// The rows of which nobody could tell for a day whether their owners run.
#[cfg_attr(not(test), expect(dead_code, reason = "`check` is to name them"))]
pub(crate) fn stuck(path: &Path) -> Result<Vec<Stuck>, Error> {
    look_for(path, None, entries::stuck).map(Option::unwrap_or_default)
}

/// What is found in the file; in one that was made a moment ago `nothing`. `None`: it is of an older version.
fn look_for<T: Clone>(
    path: &Path,
    nothing: Option<T>,
    find: impl Fn(&Connection) -> rusqlite::Result<T>,
) -> Result<Option<T>, Error> {
    let error = |problem: &str| Error::outbox(Some(path), problem);
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => (),
        Ok(_) => return Err(error("is not a regular file; a symlink is not followed")),
        Err(source) => return Err(error("cannot be read").because(source)),
    }
    if owner(&beside(path, "-wal")).is_some_and(|of_wal| owner(path) != Some(of_wal)) {
        return Err(error("has another owner than the -wal beside it; run it as the owner of both"));
    }
    let end = Instant::now() + limits::OUTBOX_BUSY;
    loop {
        let way = Way::to(path);
        let looked = find_in(path, way, &nothing, &find);
        // A process that has just opened or closed it has made or removed what is beside it.
        if Way::to(path) != way && Instant::now() < end {
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
fn find_in<T: Clone>(
    path: &Path,
    way: Way,
    nothing: &Option<T>,
    find: impl Fn(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<Result<Option<T>, String>> {
    let database = way.open(path, limits::OUTBOX_BUSY)?;
    if let Some(problem) = schema::problem(&database)? {
        return Ok(Err(problem));
    }
    match schema::version(&database)? {
        // Made, and nothing written yet.
        Some(0) => Ok(Ok(nothing.clone())),
        Some(schema::VERSION) => Ok(Ok(Some(find(&database)?))),
        _ => Ok(Ok(None)),
    }
}
