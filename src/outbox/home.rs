//! How the outbox gets to its file, at the start and whenever it has lost it, and who may deliver from there. Runs on the
//! thread that opens the outbox, and on the heartbeat thread before a beat.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use super::entries::{self, Copied};
use super::lock::DeliveryLock;
use super::shared::{Shared, name};
use super::store::{Refusal, Store};
use super::{Outbox, deadline, file, unpoisoned};
use crate::error::{Error, chain, printable_path};
use crate::limits;
use crate::panics::quietly;
use crate::text::printable;

/// Whether we deliver.
#[derive(Debug)]
pub(super) enum Delivery {
    /// Others do.
    No,
    /// We do, and have the lock, where there is a file to lock.
    Yes(Option<DeliveryLock>),
}

/// Why the outbox is not in its file.
pub(super) enum Away {
    /// Somebody else delivers from it.
    Held(Error),
    Unusable(Error),
}

impl Outbox {
    /// Moves from memory, or from a file that is gone or broken, to the file at its place.
    pub(super) fn go_home(&self, shared: &mut Shared) -> Result<(), Away> {
        let Some(path) = self.path.as_deref() else { return Ok(()) };
        let unusable =
            |doing: &str, source: rusqlite::Error| Away::Unusable(Error::outbox(Some(path), doing).because(source));
        self.take_delivery(path)?;
        if shared.store.is_file() {
            // Closed first: what SQLite keeps beside the file that is gone must not mix with the new one's.
            self.leave_file(shared).map_err(|source| unusable("cannot be left", source))?;
        }
        let mut home = self.open_home(path)?;
        if shared.owning {
            let live = shared.owner.live(path);
            live.map_err(|source| Away::Unusable(Error::outbox(Some(path), "cannot be written").because(source)))?;
        }
        let taken = home.take_over(&shared.store, Copied::Everything, &shared.left, limits::OUTBOX_BUSY);
        taken.map_err(|source| unusable("cannot be written", source))?;
        (shared.store, shared.refused) = (home, None);
        Ok(())
    }

    /// Takes everything from a file that is gone, and from a broken one what it did not know.
    fn leave_file(&self, shared: &mut Shared) -> rusqlite::Result<()> {
        let copied = match shared.refused {
            Some((_, Refusal::Corrupt)) => Copied::Unwritten,
            _ => Copied::Everything,
        };
        let mut memory = Store::in_memory()?;
        memory.take_over(&shared.store, copied, &BTreeSet::new(), Duration::ZERO)?;
        shared.left.extend(memory.read(entries::ids)?);
        while shared.left.len() > limits::OUTBOX_ROWS {
            shared.left.pop_first();
        }
        shared.store = memory;
        Ok(())
    }

    /// Takes the delivery lock, if we are to deliver and do not have it yet.
    fn take_delivery(&self, path: &Path) -> Result<(), Away> {
        let mut role = unpoisoned(&self.role);
        if !matches!(*role, Delivery::Yes(None)) {
            return Ok(());
        }
        match DeliveryLock::take(path) {
            Ok(Ok(lock)) => {
                *role = Delivery::Yes(Some(lock));
                Ok(())
            }
            Ok(Err(holder)) => {
                let problem =
                    format!("is delivered from by process {holder} already; stop that one, or use another file");
                Err(Away::Held(Error::outbox(Some(path), problem)))
            }
            Err(source) => Err(Away::Unusable(Error::outbox(Some(path), "cannot be written").because(source))),
        }
    }

    /// Opens the file. If it is none of ours, or broken, and it is ours to care for, it is moved aside for a new one.
    fn open_home(&self, path: &Path) -> Result<Store, Away> {
        let problem = match Store::at(path, deadline()).map_err(Away::Unusable)? {
            Ok(store) => return Ok(store),
            Err(problem) if self.delivers() => problem,
            Err(problem) => {
                return Err(Away::Unusable(Error::outbox(Some(path), "is no outbox, or broken").because(problem)));
            }
        };
        let aside = file::move_aside(path).map_err(|source| {
            Away::Unusable(Error::outbox(Some(path), "is broken, and cannot be moved aside").because(source))
        })?;
        quietly(|| {
            log::error!(
                "the outbox was broken or none, it is moved aside and a new one begun: file={} aside={} error={:?}",
                printable_path(path),
                printable_path(&aside),
                printable(&problem)
            )
        });
        match Store::at(path, deadline()).map_err(Away::Unusable)? {
            Ok(store) => Ok(store),
            Err(problem) => Err(Away::Unusable(Error::outbox(Some(path), "cannot be made anew").because(problem))),
        }
    }

    /// Goes to the file at its place, if it is not there and that file can be had.
    pub(super) fn look_for_home(&self, shared: &mut Shared) {
        if !self.is_away(shared) {
            return;
        }
        match self.go_home(shared) {
            Ok(()) => quietly(|| log::info!("the outbox has a file again: outbox={}", name(self.path.as_deref()))),
            Err(Away::Held(error) | Away::Unusable(error)) => {
                quietly(|| log::debug!("the outbox has no file yet: error={:?}", chain(&error)));
            }
        }
    }

    /// It is to have a file, and has not the one at its place, or a broken one.
    fn is_away(&self, shared: &Shared) -> bool {
        let broken = shared.refused.is_some_and(|(_, why)| why == Refusal::Corrupt);
        self.path.as_deref().is_some_and(|path| broken || !shared.store.is_at(path))
    }
}
