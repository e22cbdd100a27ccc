//! What the requests of an agent do. Each is submitted to the outbox and completed after its
//! commit, both by the thread `pipe`, which waits for neither. At the end of the program the main
//! thread reports what is open.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::messages::{Begin, End, Method, RpcError, RpcResult};
use super::status::AgentStatus;
use crate::delta::{LifecycleDelta, Operation};
use crate::error::chain;
use crate::heartbeat::prepared::{PreparedHeartbeat, StatsReader};
use crate::outbox::resume::BegunRow;
use crate::outbox::{NewRows, QueuedDelta, RowChange, SentBy};
use crate::stats::Stats;
use crate::text::sanitize;
use crate::threads::outbox_client::OutboxClient;
use crate::threads::outbox_client::submit::SubmittedResume;
use crate::threads::request_queue::{Submitted, WakeEvent};

/// What the agent has open, and the parts of the heartbeat that its requests need.
#[derive(Debug)]
pub(super) struct Session {
    outbox: Arc<OutboxClient>,
    stats: StatsReader,
    status: AgentStatus,
    /// Never held while a thread blocks.
    operations: Mutex<Operations>,
}

#[derive(Debug, Default)]
struct Operations {
    last_handle: u64,
    open: BTreeMap<u64, OpenOperation>,
}

/// An operation that has not ended on all of its deckies.
#[derive(Debug)]
struct OpenOperation {
    operation: Operation,
    /// The ids of the rows, by decky.
    rows: BTreeMap<String, i64>,
}

/// A request that was submitted.
#[derive(Debug)]
pub(super) enum Work {
    /// Nothing is left to do. `None`: its result was taken.
    Done(Option<Result<RpcResult, RpcError>>),
    Begin {
        submitted: Submitted,
        operation: Operation,
        deckies: Vec<String>,
    },
    Resume {
        submitted: SubmittedResume,
        operation: Operation,
    },
    End(Submitted),
    Push(Submitted),
    Stats,
}

impl Session {
    pub(super) fn new(prepared: &PreparedHeartbeat, status: AgentStatus) -> Self {
        let outbox = Arc::clone(prepared.outbox());
        Self { outbox, stats: prepared.stats(), status, operations: Mutex::default() }
    }

    pub(super) fn stats(&self) -> Stats {
        self.stats.read()
    }

    /// Submits a request. `event` is set when it can be completed.
    pub(super) fn submit(&self, method: Result<Method, RpcError>, event: &Arc<WakeEvent>) -> Work {
        let work = match method {
            Ok(Method::Begin(begin)) => self.begin(begin, event),
            Ok(Method::End(end)) => self.end(end, event),
            Ok(Method::Push(deltas)) => self.push(deltas, event),
            Ok(Method::Status(status)) => {
                self.status.set(status.map(|status| *status));
                Ok(Work::Done(Some(Ok(RpcResult::Empty {}))))
            }
            Ok(Method::Stats) => Ok(Work::Stats),
            Err(error) => Err(error),
        };
        work.unwrap_or_else(|error| Work::Done(Some(Err(error))))
    }

    fn begin(&self, begin: Begin, event: &Arc<WakeEvent>) -> Result<Work, RpcError> {
        let Begin { operation, deckies, resumes } = begin;
        if resumes {
            let submitted = self.outbox.submit_resume(operation, deckies, event);
            let submitted = submitted.map_err(|error| RpcError::outbox(&error))?;
            return Ok(Work::Resume { submitted, operation });
        }
        let rows = NewRows::Operation(operation, deckies.clone());
        let submitted = self.outbox.submit_new_rows(rows, event);
        let submitted = submitted.map_err(|error| RpcError::outbox(&error))?;
        Ok(Work::Begin { submitted, operation, deckies })
    }

    fn end(&self, end: End, event: &Arc<WakeEvent>) -> Result<Work, RpcError> {
        let End { handle, decky, ended } = end;
        let (operation, rows) = self.lock().take_rows(handle, decky.as_deref())?;
        let delta = |(decky, id)| QueuedDelta { id, delta: ended.clone().delta(decky, operation) };
        let ended = rows.into_iter().map(delta).collect();
        let change = RowChange::Ended(ended, SentBy::Deliverer);
        let submitted = self.outbox.submit_change(change, event);
        submitted.map(Work::End).map_err(|error| RpcError::outbox(&error))
    }

    fn push(&self, deltas: Vec<LifecycleDelta>, event: &Arc<WakeEvent>) -> Result<Work, RpcError> {
        if deltas.is_empty() {
            return Ok(Work::Done(Some(Ok(self.queued()))));
        }
        let rows = NewRows::Deltas(deltas, SentBy::Deliverer);
        let submitted = self.outbox.submit_new_rows(rows, event);
        submitted.map(Work::Push).map_err(|error| RpcError::outbox(&error))
    }

    /// The result of a request. `None`: it is not committed yet, and its second is not over.
    pub(super) fn complete(&self, work: &mut Work) -> Option<Result<RpcResult, RpcError>> {
        let result = match work {
            Work::Done(result) => return result.take(),
            Work::Stats => Ok(RpcResult::Stats(Box::new(self.stats()))),
            Work::Begin { submitted, operation, deckies } => {
                let first = self.outbox.fetch(submitted)?;
                first.map(|first| {
                    let rows = mem::take(deckies).into_iter().zip(first..).collect();
                    self.open(OpenOperation { operation: *operation, rows }, Vec::new())
                })
            }
            Work::Resume { submitted, operation } => {
                let rows = self.outbox.fetch_resumed(submitted)?;
                rows.map(|rows| self.open_resumed(*operation, rows))
            }
            // The end is never lost before the process ends, so it is no error that the file does
            // not have it yet.
            Work::End(submitted) => {
                let is_written = self.outbox.fetch(submitted)?.is_ok();
                Ok(RpcResult::Queued { durable: is_written && self.is_durable() })
            }
            Work::Push(submitted) => {
                let added = self.outbox.fetch(submitted)?;
                added.map(|_| self.queued())
            }
        };
        Some(result.map_err(|error| RpcError::outbox(&error)))
    }

    fn open_resumed(&self, operation: Operation, rows: Vec<BegunRow>) -> RpcResult {
        let resumed = rows.iter().filter(|row| row.is_resumed());
        let resumed = resumed.map(|row| row.decky.clone()).collect();
        let rows = rows.into_iter().map(|row| (row.decky, row.id)).collect();
        self.open(OpenOperation { operation, rows }, resumed)
    }

    /// Before the agent is told of the handle.
    fn open(&self, operation: OpenOperation, resumed: Vec<String>) -> RpcResult {
        let handle = self.lock().add(operation);
        RpcResult::Begun { handle, durable: self.is_durable(), resumed }
    }

    fn queued(&self) -> RpcResult {
        RpcResult::Queued { durable: self.is_durable() }
    }

    /// Whether everything that was committed so far is in the file.
    fn is_durable(&self) -> bool {
        self.outbox.path().is_some()
    }

    /// Reports what is open as failed, because the agent has ended. Waits at most a second.
    pub(super) fn fail_open_operations(&self) {
        let open = mem::take(&mut self.lock().open);
        let failed = |open: OpenOperation| {
            let operation = open.operation;
            let error = format!("the agent ended during {operation}");
            open.rows.into_iter().map(move |(decky, id)| {
                let delta = LifecycleDelta::failed(decky, operation, &error);
                QueuedDelta { id, delta }
            })
        };
        let failed: Vec<_> = open.into_values().flat_map(failed).collect();
        if failed.is_empty() {
            return;
        }
        let deckies = failed.len();
        log::warn!("the agent ended during operations; they are reported failed: rows={deckies}");
        let change = RowChange::Ended(failed, SentBy::Deliverer);
        if let Err(error) = self.outbox.change(change) {
            let error = chain(&error);
            log::error!("could not write the end of operations: rows={deckies} error={error:?}");
        }
    }

    /// Looks after the outbox: operations of processes that have ended are reported failed, and
    /// delivery begins if no other process delivers.
    pub(super) fn maintain(&self) {
        self.outbox.maintain();
    }

    /// Begins to deliver if no other process does. Waits at most a second.
    pub(super) fn take_over(&self) {
        self.outbox.maintain();
        // It is answered after the maintenance.
        self.outbox.has_deliverer();
    }

    /// Waits until `deadline` for all requests to be on the disk, and leaves them to the process
    /// that delivers.
    pub(super) fn release(&self, deadline: Instant) {
        if !self.outbox.release(deadline) {
            log::warn!("stopped before the disk has answered");
        }
    }

    /// A panic leaves the operations consistent, because each change is a single step.
    fn lock(&self) -> MutexGuard<'_, Operations> {
        self.operations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work {
    /// When the request is given up if it is not committed. `None`: it can be completed.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Done(_) | Self::Stats => None,
            Self::Begin { submitted, .. } | Self::End(submitted) | Self::Push(submitted) => {
                Some(submitted.deadline())
            }
            Self::Resume { submitted, .. } => Some(submitted.deadline()),
        }
    }
}

impl Operations {
    fn add(&mut self, operation: OpenOperation) -> u64 {
        self.last_handle += 1;
        self.open.insert(self.last_handle, operation);
        self.last_handle
    }

    /// Takes the row of one decky, or all rows of an operation, because it has ended.
    fn take_rows(
        &mut self,
        handle: u64,
        decky: Option<&str>,
    ) -> Result<(Operation, BTreeMap<String, i64>), RpcError> {
        let Some(open) = self.open.get_mut(&handle) else {
            return Err(RpcError::invalid_params(&format!("handle: {handle} is not open")));
        };
        let operation = open.operation;
        let rows = match decky {
            None => mem::take(&mut open.rows),
            Some(decky) => match open.rows.remove_entry(decky) {
                Some(row) => BTreeMap::from([row]),
                None => {
                    let name = sanitize(decky);
                    let problem = format!("decky: {name:?} is not open in this {operation}");
                    return Err(RpcError::invalid_params(&problem));
                }
            },
        };
        if open.rows.is_empty() {
            self.open.remove(&handle);
        }
        Ok((operation, rows))
    }
}
