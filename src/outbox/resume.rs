//! Takes over operations in flight of processes that have ended: an agent that restarts its `pipe`
//! still has them open. Runs on the outbox thread.

use std::time::Instant;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, params};

use super::file::FileProblem;
use super::locks::OwnerState;
use super::queued::NewRows;
use super::rows::{InsertedRows, Rows};
use super::{Outbox, RowChange, deadline};
use crate::delta::Operation;
use crate::error::{Error, chain};
use crate::panics::quietly;

/// A row in flight of an operation that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BegunRow {
    pub(crate) decky: String,
    pub(crate) id: i64,
    /// The process that had it in flight before, as the row named it. `None`: the row is new.
    former_owner: Option<Vec<u8>>,
}

impl BegunRow {
    /// Whether it was taken over from a process that has ended.
    pub(crate) fn is_resumed(&self) -> bool {
        self.former_owner.is_some()
    }
}

/// The result of one transaction.
enum Resumed {
    /// Another process has the file locked.
    Locked,
    /// There is no room for the new rows.
    NoRoom,
    /// The rows, and which of them are new.
    Begun(Vec<BegunRow>, Option<InsertedRows>),
}

impl Outbox {
    /// Begins an operation. A row in flight of the same decky and operation is taken over if the
    /// process that owns it has ended; for the other deckies, rows are added. The rows are sorted
    /// by decky.
    ///
    /// While the file refuses changes, all rows are new: rows of other processes are never changed
    /// in memory.
    pub(crate) fn resume(
        &mut self,
        operation: Operation,
        deckies: &[String],
        by: Instant,
    ) -> Result<Vec<BegunRow>, Error> {
        self.store.locks.is_token_used = true;
        let ended = self.owners_in_state(OwnerState::Ended)?;
        let (resumed, written) = self.change(by, |rows, refusal| match refusal {
            Some(FileProblem::Locked) => Ok(Resumed::Locked),
            Some(_) => rows.begin_or_take_over(operation, deckies, &[]),
            None => rows.begin_or_take_over(operation, deckies, &ended),
        });
        let resumed = resumed.map_err(|source| self.store.error("cannot keep anything", source))?;
        self.update_stats();
        let new_rows = |rows: &[BegunRow]| {
            let new = rows.iter().filter(|row| !row.is_resumed());
            NewRows::Operation(operation, new.map(|row| row.decky.clone()).collect())
        };
        match resumed {
            Resumed::Begun(rows, None) => Ok(rows),
            Resumed::Begun(rows, Some(inserted)) => {
                self.record_added(Some(inserted), &new_rows(&rows)).map(|_| rows)
            }
            Resumed::NoRoom => {
                let rows = NewRows::Operation(operation, deckies.to_vec());
                self.record_added(None, &rows).map(|_| Vec::new())
            }
            Resumed::Locked => {
                let locked = self.error("is locked by another process; nothing was queued");
                Err(written.err().into_iter().fold(locked, Error::with_source))
            }
        }
    }

    /// Undoes [`resume`](Self::resume) for a caller that has not received its answer.
    pub(crate) fn undo_resume(&mut self, rows: &[BegunRow]) {
        for row in rows.iter().filter(|row| !row.is_resumed()) {
            self.record_change(RowChange::Withdrawn(row.id..row.id + 1));
        }
        let (undone, _) = self.change(deadline(), |all, _| {
            rows.iter().try_for_each(|row| match &row.former_owner {
                Some(owner) => set_owner(all.db, row.id, owner),
                None => Ok(()),
            })
        });
        if let Err(error) = undone {
            // They are reported failed when this process ends.
            let error = chain(&self.store.error("cannot be written", error));
            quietly(|| log::warn!("operation stays in flight: error={error:?}"));
        }
        self.update_stats();
    }
}

impl Rows<'_> {
    fn begin_or_take_over(
        &mut self,
        operation: Operation,
        deckies: &[String],
        ended: &[Vec<u8>],
    ) -> rusqlite::Result<Resumed> {
        let mut rows = Vec::with_capacity(deckies.len());
        let mut new = Vec::new();
        for decky in deckies {
            match in_flight(self.db, operation, decky, ended)? {
                Some(row) => rows.push(row),
                None => new.push(decky.clone()),
            }
        }
        // First: without room nothing is changed.
        let mut inserted = None;
        if !new.is_empty() {
            let Some(added) = self.add(&NewRows::Operation(operation, new.clone()))? else {
                return Ok(Resumed::NoRoom);
            };
            inserted = Some(added);
        }
        for row in &rows {
            set_owner(self.db, row.id, self.token.as_bytes())?;
        }
        let first = inserted.map_or(0, |added| added.first);
        let new = new.into_iter().zip(first..);
        rows.extend(new.map(|(decky, id)| BegunRow { decky, id, former_owner: None }));
        rows.sort_by(|one, other| one.decky.cmp(&other.decky));
        Ok(Resumed::Begun(rows, inserted))
    }
}

/// The newest row in flight of this decky and operation that one of these owners has. Older ones
/// are reported failed like others of these owners.
fn in_flight(
    db: &Connection,
    operation: Operation,
    decky: &str,
    owners: &[Vec<u8>],
) -> rusqlite::Result<Option<BegunRow>> {
    if owners.is_empty() {
        return Ok(None);
    }
    let mut select = db.prepare_cached(
        "SELECT id, owner FROM delta WHERE decky = ?1 AND operation = ?2 AND owner IS NOT NULL
         AND completed_at IS NULL ORDER BY id DESC",
    )?;
    let mut rows = select.query(params![decky, operation.as_str()])?;
    while let Some(row) = rows.next()? {
        let owner = row.get_ref(1)?.as_bytes()?.to_vec();
        if owners.contains(&owner) {
            let former_owner = Some(owner);
            return Ok(Some(BegunRow { decky: decky.to_owned(), id: row.get(0)?, former_owner }));
        }
    }
    Ok(None)
}

/// The kinds of rows are counted as before: the row had an owner, and has one.
fn set_owner(db: &Connection, id: i64, owner: &[u8]) -> rusqlite::Result<()> {
    // As it is, text that is not UTF-8 too.
    let owner = ToSqlOutput::Borrowed(ValueRef::Text(owner));
    db.prepare_cached("UPDATE delta SET owner = ?2, age = 0 WHERE id = ?1")?
        .execute(params![id, owner])
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::super::Role;
    use super::super::store::RefusedWrite;
    use super::*;
    use crate::delta::Outcome;
    use crate::limits;

    fn open(dir: &Path, role: Role) -> Outbox {
        let path = Some(dir.join("heartbeat.db"));
        let (outbox, problem) = Outbox::open(path, role, std::sync::Arc::default()).unwrap();
        assert!(problem.is_none(), "{problem:?}");
        outbox
    }

    fn begin(outbox: &mut Outbox, operation: Operation, deckies: &[&str]) -> Vec<BegunRow> {
        let deckies: Vec<_> = deckies.iter().map(|decky| (*decky).to_owned()).collect();
        outbox.resume(operation, &deckies, deadline()).unwrap()
    }

    fn ids(rows: &[BegunRow]) -> Vec<i64> {
        rows.iter().map(|row| row.id).collect()
    }

    fn resumed(rows: &[BegunRow]) -> Vec<&str> {
        rows.iter().filter(|row| row.is_resumed()).map(|row| row.decky.as_str()).collect()
    }

    /// The deckies that are reported failed, after the time in which they may be taken over.
    fn judged(outbox: &mut Outbox) -> Vec<String> {
        outbox.recovers_from = Instant::now();
        outbox.maintain().unwrap();
        let failed = outbox.read_deliverable(10, |_| true).unwrap();
        let expected = Outcome::Failed("its process ended during deploy".to_owned());
        assert!(failed.iter().all(|queued| *queued.delta.outcome() == expected), "{failed:?}");
        failed.into_iter().map(|queued| queued.delta.decky().to_owned()).collect()
    }

    #[test]
    fn rows_of_an_ended_process_are_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = open(dir.path(), Role::Contribute);
        let begun = begin(&mut first, Operation::Deploy, &["a", "b"]);
        assert!(resumed(&begun).is_empty());
        let mut second = open(dir.path(), Role::Resume);
        let beside = begin(&mut second, Operation::Deploy, &["a"]);
        assert!(resumed(&beside).is_empty(), "its owner is running");
        drop(first);
        let mutated = begin(&mut second, Operation::Mutate, &["a"]);
        assert!(resumed(&mutated).is_empty(), "it is another operation");
        let rows = begin(&mut second, Operation::Deploy, &["c", "a", "b"]);
        assert_eq!(resumed(&rows), ["a", "b"]);
        assert_eq!(ids(&rows)[..2], ids(&begun));
        assert!(rows[2].decky == "c" && rows[2].id > mutated[0].id);
        assert!(judged(&mut second).is_empty());
        assert_eq!(second.stats.read().counts.operations, 5);
    }

    #[test]
    fn rows_of_an_ended_process_are_judged_after_the_time_to_resume() {
        let dir = tempfile::tempdir().unwrap();
        begin(&mut open(dir.path(), Role::Contribute), Operation::Deploy, &["a"]);
        let mut outbox = open(dir.path(), Role::Resume);
        assert!(outbox.recovers_from > Instant::now() + limits::RESUME_TIME / 2);
        outbox.maintain().unwrap();
        assert!(outbox.read_deliverable(10, |_| true).unwrap().is_empty());
        assert_eq!(judged(&mut outbox), ["a"]);
    }

    #[test]
    fn rows_of_the_process_that_delivered_are_judged_after_the_time_to_resume() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = open(dir.path(), Role::Deliver);
        begin(&mut first, Operation::Deploy, &["a", "b"]);
        let mut second = open(dir.path(), Role::Resume);
        // It has run for longer than that.
        second.recovers_from = Instant::now();
        drop(first);
        second.maintain().unwrap();
        assert!(second.delivers() && second.read_deliverable(10, |_| true).unwrap().is_empty());
        assert_eq!(resumed(&begin(&mut second, Operation::Deploy, &["a"])), ["a"]);
        assert_eq!(judged(&mut second), ["b"]);
    }

    #[test]
    fn undone_resume_leaves_the_rows_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        begin(&mut open(dir.path(), Role::Contribute), Operation::Deploy, &["a"]);
        let mut outbox = open(dir.path(), Role::Resume);
        let rows = begin(&mut outbox, Operation::Deploy, &["a", "new"]);
        outbox.undo_resume(&rows);
        assert_eq!(outbox.stats.read().counts.operations, 1);
        let again = begin(&mut outbox, Operation::Deploy, &["a"]);
        assert_eq!((resumed(&again), ids(&again)), (vec!["a"], vec![rows[0].id]));
        outbox.undo_resume(&again);
        assert_eq!(judged(&mut outbox), ["a"]);
    }

    #[test]
    fn resume_without_room_takes_nothing_over() {
        let dir = tempfile::tempdir().unwrap();
        begin(&mut open(dir.path(), Role::Contribute), Operation::Deploy, &["a"]);
        let mut outbox = open(dir.path(), Role::Resume);
        let many: Vec<_> = (1..limits::OUTBOX_ROWS).map(|n| format!("d{n}")).collect();
        outbox.resume(Operation::Mutate, &many, deadline()).unwrap();
        let deckies = ["a", "b"].map(str::to_owned);
        let error = outbox.resume(Operation::Deploy, &deckies, deadline()).unwrap_err();
        assert!(error.to_string().contains("has no room for 2 more"), "{error}");
        assert_eq!(judged(&mut outbox), ["a"]);
    }

    #[test]
    fn rows_of_others_are_not_taken_over_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        begin(&mut open(dir.path(), Role::Contribute), Operation::Deploy, &["a"]);
        let mut outbox = open(dir.path(), Role::Resume);
        let retry_at = Instant::now() + Duration::from_secs(60);
        outbox.store.refusal = Some(RefusedWrite { problem: FileProblem::Unwritable, retry_at });
        assert!(resumed(&begin(&mut outbox, Operation::Deploy, &["a"])).is_empty());
        outbox.store.refusal = None;
        assert!(begin(&mut outbox, Operation::Deploy, &["a"]).iter().all(BegunRow::is_resumed));
    }
}
