//! Reports deltas for `push` and `track`. The deltas are committed to the outbox first. If another
//! process delivers from it, they are [handed over](hand_over). Otherwise they are claimed by this
//! process and posted to the master. If the master cannot be reached in time, they stay in the
//! outbox, and `run` delivers them. The main thread uses the outbox. A thread of its own sends
//! the POST; after the timeout no thread waits for it.

mod hand_over;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, bounded};

use super::arguments::DeliveryOptions;
use super::command_signals::{Signals, wait};
use crate::credentials::Credentials;
use crate::credentials::current::{CurrentCredentials, LogKeys};
use crate::credentials::enrolment::Enrolment;
use crate::delta::{LifecycleDelta, Operation};
use crate::error::{Error, chain, sanitize_path};
use crate::limits;
use crate::master::body::Body;
use crate::master::identity::MasterIdentity;
use crate::master::{PostResult, Verdict};
use crate::outbox::{DeliveryResult, NewRows, OutboxLocation, QueuedDelta, RowChange, SentBy};
use crate::status::decnet::DecnetStatus;
use crate::status::{Snapshot, StatusSource};
use crate::threads::outbox_client::OutboxClient;
use crate::threads::start::contribute;

/// Queues deltas in the outbox and posts them to the master.
#[derive(Debug)]
pub(super) struct Reporter {
    outbox: Arc<OutboxClient>,
    enrolment: Enrolment,
    identity: Option<MasterIdentity>,
}

/// The result of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ReportResult {
    /// The master accepted the deltas.
    Delivered,
    /// The deltas are queued on disk, and `--no-wait` asked for no more.
    Queued,
    /// The deltas are queued on disk, because they could not be delivered for this reason.
    Undelivered(String),
    /// The master has rejected a delta, for this reason, and accepted the others.
    Rejected(String),
    /// It is unknown whether the deltas are on disk, for this reason. Reporting them again may send
    /// them twice.
    InDoubt(String),
    /// The deltas are neither delivered nor on disk, for this reason.
    Lost(String),
}

impl ReportResult {
    /// The deltas could not be queued.
    fn failed(error: &Error) -> Self {
        if error.is_in_doubt() { Self::InDoubt(chain(error)) } else { Self::Lost(chain(error)) }
    }
}

/// How long a report may take, and the signals that end it early.
#[derive(Debug)]
pub(super) struct ReportWait<'a> {
    deadline: Instant,
    signals: Option<&'a mut Signals>,
    /// A signal requested the end.
    is_interrupted: bool,
}

impl<'a> ReportWait<'a> {
    /// Starts now. Without `signals`, a signal ends the process.
    pub(super) fn new(timeout: Duration, signals: Option<&'a mut Signals>) -> Self {
        Self { deadline: Instant::now() + timeout, signals, is_interrupted: false }
    }

    fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Whether a signal requested the end.
    fn is_interrupted(&mut self) -> bool {
        self.is_interrupted = self.is_interrupted
            || self.signals.as_mut().is_some_and(|signals| signals.is_end_requested());
        self.is_interrupted
    }

    fn has_time(&mut self) -> bool {
        !self.is_interrupted() && !self.remaining().is_zero()
    }

    /// Sleeps before a retry. `false`: no time is left, or sleeping fails.
    fn pause(&mut self) -> bool {
        let pause = Instant::now() + limits::REPORT_PAUSE;
        self.has_time() && self.sleep(None, pause.min(self.deadline)).is_ok()
    }

    /// Sleeps until a signal arrives, or `other` is readable or closed, at most until `until`.
    fn sleep(&self, other: Option<&UnixStream>, until: Instant) -> io::Result<()> {
        let signals = self.signals.as_ref().and_then(|signals| signals.fd());
        let files: Vec<_> = other.map(AsFd::as_fd).into_iter().chain(signals).collect();
        wait(&files, Some(until))
    }
}

impl Reporter {
    pub(super) fn open(
        enrolment: Enrolment,
        identity: Option<MasterIdentity>,
        location: &OutboxLocation,
    ) -> Result<Self, Error> {
        let (outbox, problem) = contribute(location.path(enrolment.agent_dir().value()))?;
        let reporter = Self { outbox, enrolment, identity };
        if let Some(problem) = problem {
            reporter.log_problem(&problem);
        }
        Ok(reporter)
    }

    /// Logs that the outbox file cannot be used.
    pub(super) fn log_problem(&self, problem: &Error) {
        log::warn!("outbox cannot be used: {} error={:?}", self.names(), chain(problem));
    }

    /// Reports deltas that have no row in the outbox yet.
    pub(super) fn report(
        &mut self,
        deltas: &[LifecycleDelta],
        delivery: &DeliveryOptions,
        wait: &mut ReportWait<'_>,
    ) -> ReportResult {
        if delivery.no_wait {
            return self.queue(deltas);
        }
        if self.can_hand_over() {
            return self.hand_over_new(deltas, wait);
        }
        self.claim_and_post(deltas, wait)
    }

    fn claim_and_post(
        &mut self,
        deltas: &[LifecycleDelta],
        wait: &mut ReportWait<'_>,
    ) -> ReportResult {
        match self.add_claimed(deltas.to_vec()) {
            Ok(claimed) => self.post(&claimed, wait),
            Err(error) => ReportResult::failed(&error),
        }
    }

    /// Waits, within the timeout, until the disk has answered to a request in doubt: the end of
    /// this process might undo it.
    pub(super) fn await_disk(&self, wait: &mut ReportWait<'_>) {
        while self.outbox.is_busy() && wait.pause() {}
    }

    /// Queues the deltas as claimed by this process, in memory if the file cannot be written.
    fn add_claimed(&mut self, deltas: Vec<LifecycleDelta>) -> Result<Vec<QueuedDelta>, Error> {
        let add = NewRows::Deltas(deltas.clone(), SentBy::ThisProcess);
        let first = match self.outbox.add(add.clone()) {
            // A request in doubt may still be written: the deltas would be sent twice.
            Err(error) if error.is_outbox() && !error.is_in_doubt() => {
                self.log_problem(&error);
                (self.outbox, _) = contribute(None)?;
                self.outbox.add(add)?
            }
            added => added?,
        };
        Ok(numbered(first, deltas))
    }

    /// Adds a row in flight for each decky. Returns the id of the first; the others follow it.
    pub(super) fn begin(&self, operation: Operation, deckies: &[String]) -> Result<i64, Error> {
        self.outbox.add(NewRows::Operation(operation, deckies.to_vec()))
    }

    /// Whether all rows of this process are on disk.
    fn is_on_disk(&self) -> bool {
        self.outbox.path().is_some()
    }

    /// Tries again to write the rows that are only in memory. Returns whether all are on disk.
    pub(super) fn try_to_write(&self) -> bool {
        self.is_on_disk()
            || self.outbox.change(RowChange::Released(Vec::new())).is_ok() && self.is_on_disk()
    }

    /// Ends the rows in flight that begin with the id `first`, and reports them.
    pub(super) fn end(
        &self,
        first: i64,
        deltas: Vec<LifecycleDelta>,
        delivery: &DeliveryOptions,
        wait: &mut ReportWait<'_>,
    ) -> ReportResult {
        let ended = numbered(first, deltas);
        let is_handed_over = delivery.no_wait || self.can_hand_over();
        let sent_by = if is_handed_over { SentBy::Deliverer } else { SentBy::ThisProcess };
        if let Err(error) = self.outbox.change(RowChange::Ended(ended.clone(), sent_by)) {
            log::warn!(
                "could not record the end of the operation: {} error={:?}",
                self.names(),
                chain(&error)
            );
        }
        match sent_by {
            SentBy::Deliverer if delivery.no_wait => {
                let queued = self.queued(self.write_rows(wait));
                if queued == ReportResult::Queued {
                    self.outbox.wake_deliverer();
                }
                queued
            }
            SentBy::Deliverer => self.hand_over(&ended, wait),
            SentBy::ThisProcess => self.post(&ended, wait),
        }
    }

    /// Queues deltas for `run` to deliver.
    fn queue(&self, deltas: &[LifecycleDelta]) -> ReportResult {
        let added = self.outbox.add(NewRows::Deltas(deltas.to_vec(), SentBy::Deliverer));
        let queued = self.queued(added.map(drop));
        if queued == ReportResult::Queued {
            self.outbox.wake_deliverer();
        }
        queued
    }

    /// Tries to queue deltas for `run` until that succeeds or the timeout is over. `None`: they are
    /// not queued.
    pub(super) fn retry_queue(
        &mut self,
        location: &OutboxLocation,
        deltas: &[LifecycleDelta],
        wait: &mut ReportWait<'_>,
    ) -> Option<ReportResult> {
        while wait.has_time() {
            let opened = contribute(location.path(self.agent_dir()));
            if let Ok((outbox, None)) = opened {
                self.outbox = outbox;
                match self.queue(deltas) {
                    ReportResult::Lost(_) => (),
                    reported => return Some(reported),
                }
            }
            if !wait.pause() {
                break;
            }
        }
        None
    }

    fn queued(&self, written: Result<(), Error>) -> ReportResult {
        match written {
            Ok(()) if self.is_on_disk() => ReportResult::Queued,
            Ok(()) => ReportResult::Lost("the outbox is only in memory".to_owned()),
            Err(error) => ReportResult::failed(&error),
        }
    }

    /// Posts the rows that this process has claimed. Leaves to `run` what the master has not
    /// accepted in time, and what a newer operation holds back.
    fn post(&self, deltas: &[QueuedDelta], wait: &mut ReportWait<'_>) -> ReportResult {
        let (held, free) = self.held_and_free(deltas);
        let mut unsent = free.as_slice();
        let failed = loop {
            let (body, later) = unsent.split_at(unsent.len().min(limits::DELTAS_PER_BODY));
            if body.is_empty() {
                break None;
            }
            if let Err(why) = self.send(body, wait) {
                break Some(why);
            }
            // `write_rows` below tries again and reports an error.
            let _ = self.outbox.change(RowChange::Answered(ids(body), DeliveryResult::Delivered));
            unsent = later;
        };
        let undelivered = [unsent, &held].concat();
        if !undelivered.is_empty() {
            let _ = self.outbox.change(RowChange::Released(ids(&undelivered)));
        }
        if let Err(error) = self.write_rows(wait) {
            log::error!(
                "could not record delivery; run may send deltas again: {} error={:?}",
                self.names(),
                chain(&error)
            );
        }
        if undelivered.is_empty() {
            return ReportResult::Delivered;
        }
        let why = failed.unwrap_or_else(|| HELD.to_owned());
        if self.is_on_disk() { ReportResult::Undelivered(why) } else { ReportResult::Lost(why) }
    }

    /// Splits the deltas into those that a newer operation holds back and the others. If the outbox
    /// cannot be asked, the delta is posted: it may not be on disk either. After one failure the
    /// outbox is not asked about further deltas.
    fn held_and_free(&self, deltas: &[QueuedDelta]) -> (Vec<QueuedDelta>, Vec<QueuedDelta>) {
        let mut responds = true;
        deltas.iter().cloned().partition(|queued| {
            responds
                && self.outbox.is_overtaken(queued).unwrap_or_else(|error| {
                    log::debug!(
                        "could not ask the outbox for newer operations: error={:?}",
                        chain(&error)
                    );
                    responds = false;
                    false
                })
        })
    }

    /// Writes all pending changes, with retries until the timeout. A row that stays in flight on
    /// disk is reported as failed after the end of this process.
    fn write_rows(&self, wait: &mut ReportWait<'_>) -> Result<(), Error> {
        loop {
            // Any change also writes the pending ones.
            let Err(error) = self.outbox.change(RowChange::Released(Vec::new())) else {
                return Ok(());
            };
            if !wait.pause() {
                return Err(error);
            }
        }
    }

    /// Sends one POST. The error says why it was not accepted.
    fn send(&self, deltas: &[QueuedDelta], wait: &mut ReportWait<'_>) -> Result<(), String> {
        if wait.is_interrupted() {
            return Err(SIGNAL.to_owned());
        }
        let deltas = deltas.iter().map(|queued| queued.delta.clone()).collect();
        let post = PostTask { enrolment: self.enrolment.clone(), identity: self.identity, deltas };
        let timeout = wait.remaining();
        match post.clone().start(timeout) {
            Ok((result, done)) => await_result(&result, &done, wait),
            Err(error) => {
                log::debug!("no thread for the POST: error={:?}", error.to_string());
                post.send(timeout)
            }
        }
    }

    /// The agent dir.
    pub(super) fn agent_dir(&self) -> &Path {
        self.enrolment.agent_dir().value()
    }

    /// The keys `host` and `master` of a log line.
    pub(super) fn names(&self) -> String {
        let host = self.enrolment.host_uuid().value();
        LogKeys { host, master: &self.enrolment.master_url() }.to_string()
    }

    /// The outbox's file, or `memory`, for messages.
    pub(super) fn outbox_name(&self) -> String {
        self.outbox.path().map_or_else(|| "memory".to_owned(), sanitize_path)
    }
}

/// The reason if a newer operation holds the deltas back.
const HELD: &str = "a newer operation of the same decky must be delivered first";

/// The reason if a signal ends a report.
const SIGNAL: &str = "interrupted by a signal";

/// Waits for the result of the POST, at most [`limits::REPORT_SLACK`] beyond the timeout.
fn await_result(
    result: &Receiver<Result<(), String>>,
    done: &UnixStream,
    wait: &mut ReportWait<'_>,
) -> Result<(), String> {
    let until = wait.deadline + limits::REPORT_SLACK;
    loop {
        match result.try_recv() {
            Ok(result) => return result,
            Err(TryRecvError::Disconnected) => return Err("the POST panicked".to_owned()),
            Err(TryRecvError::Empty) => (),
        }
        if wait.is_interrupted() {
            return Err(SIGNAL.to_owned());
        }
        if Instant::now() >= until {
            return Err("timeout".to_owned());
        }
        wait.sleep(Some(done), until).map_err(|error| error.to_string())?;
    }
}

/// One POST with deltas and an unknown status: only `run` reports what runs on this host.
#[derive(Clone)]
struct PostTask {
    enrolment: Enrolment,
    identity: Option<MasterIdentity>,
    deltas: Vec<LifecycleDelta>,
}

impl PostTask {
    /// Sends the POST on its own thread. The receiver gets the result, and the socket is closed
    /// then.
    fn start(self, timeout: Duration) -> io::Result<(Receiver<Result<(), String>>, UnixStream)> {
        let (sender, result) = bounded(1);
        let (done, open) = UnixStream::pair()?;
        let send = move || {
            let _open = open;
            // The receiver is dropped after the timeout.
            let _ = sender.send(self.send(timeout));
            drop(sender);
        };
        thread::Builder::new().name("report".to_owned()).spawn(send)?;
        Ok((result, done))
    }

    /// The error says why the POST was not accepted.
    fn send(&self, timeout: Duration) -> Result<(), String> {
        let deadline = Instant::now() + timeout;
        let agent_dir = self.enrolment.agent_dir().value();
        // A POST without the topology may make the master order a rebuild.
        let topology =
            DecnetStatus::new(agent_dir).applied_topology().ok_or("topology.db cannot be read")?;
        let credentials = Credentials::load(self.enrolment.clone(), self.identity)
            .map_err(|error| chain(&error))?;
        let credentials = CurrentCredentials::new(credentials);
        let lifecycle: Vec<_> = self.deltas.iter().collect();
        let snapshot = Snapshot::unknown("only deltas").with_topology(topology);
        let body = serde_json::to_vec(&Body::of(credentials.host(), &snapshot, &lifecycle))
            .map_err(|error| error.to_string())?;
        let master = credentials.master();
        let remaining = deadline.saturating_duration_since(Instant::now());
        let PostResult { verdict, class, detail, .. } = master.post(&body, remaining);
        match verdict {
            Verdict::Accepted => Ok(()),
            Verdict::HostRejected if class == "http-404" => Err(format!(
                "the master does not know this host; enrol it again ({class}): {detail}"
            )),
            Verdict::HostRejected => {
                let fingerprint = credentials.fingerprint();
                let problem = "the master does not accept this host's certificate";
                Err(format!("{problem} ({class}, fingerprint {fingerprint}): {detail}"))
            }
            Verdict::NoResponse => {
                Err(format!("no answer from {}: {class}: {detail}", master.url()))
            }
            _ => Err(format!("{} answered {class}: {detail}", master.url())),
        }
    }
}

/// The deltas with their ids, which follow each other.
fn numbered(first: i64, deltas: Vec<LifecycleDelta>) -> Vec<QueuedDelta> {
    (first..).zip(deltas).map(|(id, delta)| QueuedDelta { id, delta }).collect()
}

fn ids(deltas: &[QueuedDelta]) -> Vec<i64> {
    deltas.iter().map(|queued| queued.id).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::files::OUTBOX;
    use crate::outbox::summarize;

    #[test]
    fn operation_begun_without_its_file_ends_in_the_file_with_the_same_id() {
        let dir = tempfile::tempdir().unwrap();
        let agent_dir = dir.path().join("agent");
        let enrolment = Enrolment::new("u", "127.0.0.1", &agent_dir).unwrap();
        let reporter = Reporter::open(enrolment, None, &OutboxLocation::AgentDir).unwrap();
        let begun = reporter.begin(Operation::Deploy, &["d".to_owned()]).unwrap();
        assert!(!reporter.try_to_write());
        fs::create_dir(&agent_dir).unwrap();
        assert!(!reporter.is_on_disk() && reporter.try_to_write());
        let counts = || summarize(&agent_dir.join(OUTBOX)).unwrap().unwrap().counts;
        assert_eq!((counts().operations, counts().waiting), (1, 0));
        let delta = LifecycleDelta::succeeded("d", Operation::Deploy);
        let delivery = DeliveryOptions { timeout: Duration::ZERO, no_wait: true, outbox: None };
        let wait = &mut ReportWait::new(delivery.timeout, None);
        assert_eq!(reporter.end(begun, vec![delta], &delivery, wait), ReportResult::Queued);
        assert_eq!((counts().operations, counts().waiting), (0, 1));
    }
}
