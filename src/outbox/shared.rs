//! What one thread at a time has of the outbox: the connection, and what is known of the file behind it. A change goes to
//! the disk; a file that refuses it is left alone for a moment, and tried again.

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::path::Path;
use std::time::Instant;

use rusqlite::Connection;

use super::lock::Owner;
use super::store::{Refusal, Store};
use crate::error::{chain, printable_path};
use crate::limits;
use crate::panics::quietly;

/// What one thread at a time has.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: Store,
    pub(super) owner: Owner,
    /// Some row names us as its owner, or did.
    pub(super) owning: bool,
    /// Ids of rows in files that were left. Such a file may come back, and what has become of its rows meanwhile holds.
    pub(super) left: BTreeSet<i64>,
    /// Up to when the file is left alone and how it refused the last time, unless it has been written since.
    pub(super) refused: Option<(Instant, Refusal)>,
    /// Up to when the rows have been aged.
    pub(super) aged: Instant,
    /// How many of those that fell out have been logged.
    pub(super) said: u64,
}

/// The file did not take a change.
pub(super) struct Refused {
    pub(super) why: Refusal,
    pub(super) source: Box<dyn StdError + Send + Sync>,
}

impl Shared {
    /// Makes a change on the disk. A file that has just refused is left alone for a moment.
    pub(super) fn write<T>(
        &mut self,
        path: Option<&Path>,
        deadline: Instant,
        change: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Refused> {
        if let Some((until, why)) = self.refused
            && Instant::now() < until
        {
            return Err(Refused { why, source: "it could not be written a moment ago".into() });
        }
        let written = self.attempt(path, deadline, change);
        match &written {
            Ok(_) if self.refused.take().is_some() => {
                quietly(|| log::info!("the outbox is on the disk again: outbox={}", name(path)))
            }
            Err(refused) if refused.why != Refusal::Locked => self.turn_to_memory(path, refused),
            _ => (),
        }
        written
    }

    /// Makes a change on the disk, or in memory where the file refuses it.
    pub(super) fn change<T>(
        &mut self,
        path: Option<&Path>,
        deadline: Instant,
        change: impl Fn(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        match self.write(path, deadline, &change) {
            Ok(done) => Ok(done),
            Err(_) => self.store.remember(change),
        }
    }

    fn attempt<T>(
        &mut self,
        path: Option<&Path>,
        deadline: Instant,
        change: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Refused> {
        if let (true, Some(path)) = (self.owning && self.store.is_file(), path) {
            self.owner.live(path).map_err(|source| Refused { why: Refusal::Unwritable, source: source.into() })?;
        }
        let within = deadline.saturating_duration_since(Instant::now());
        let written = self.store.write(within, change);
        written.map_err(|source| Refused { why: Refusal::of(&source), source: source.into() })
    }

    /// The file refuses for more than a moment: until it takes a change again, what comes is in memory.
    fn turn_to_memory(&mut self, path: Option<&Path>, refused: &Refused) {
        if self.refused.is_none() {
            quietly(|| {
                log::error!(
                    "the outbox cannot be written, deltas are in memory and do not survive a restart: outbox={} error={:?}",
                    name(path),
                    chain(refused.source.as_ref())
                )
            });
            if let Err(error) = self.store.leave_a_gap() {
                quietly(|| log::debug!("the outbox cannot be read: error={:?}", error.to_string()));
            }
        }
        self.refused = Some((Instant::now() + limits::OUTBOX_RETRY, refused.why));
    }
}

/// For the log.
pub(super) fn name(path: Option<&Path>) -> String {
    path.map_or_else(|| "memory".to_owned(), printable_path)
}
