//! `track`: runs a command as an operation and reports how it ended. Runs on the main thread.
//!
//! The command runs whether or not the operation can be reported; problems with the report are
//! logged. The operation is committed as in flight before the command starts. If that fails,
//! because the ini cannot be read or the outbox is locked, it is tried again after the command has
//! ended.
//!
//! - **Streams**: the command inherits stdin. It also inherits stdout, unless that is the same file
//!   as stderr. Its stderr is a pipe, or a pseudoterminal if ours is a terminal, and a
//!   [`companion`] process copies it to ours. If stdout and stderr are the same file (`2>&1`, a
//!   terminal), stdout is the same pipe or pseudoterminal. So the order of the output stays, and
//!   the tail in the report comes from both. A command that reads from its stderr reads nothing.
//! - **Signals** are passed on to the command. A signal that was sent to the process group has
//!   reached it already and is not passed on. After the command has ended, HUP, INT, QUIT and TERM
//!   leave the report to the outbox at once.
//! - **Errors**: if the command exited with an error, the reported error is the tail of its stderr,
//!   or `exited with N` if it wrote nothing. If a signal ended it, the error is `ended by signal
//!   N`, followed by the tail, if any.

mod command;
pub(super) mod companion;
mod stderr;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use super::arguments::{Common, DeliveryOptions, TrackOptions};
use super::command_signals::Signals;
use super::enrolment::{enrolment, outbox};
use super::report::{ReportResult, ReportWait, Reporter};
use super::state_file::warn_of_unlisted;
use crate::delta::{LifecycleDelta, Operation, Outcome};
use crate::error::{Error, chain};
use crate::outbox::OutboxLocation;
use command::CommandEnd;
use stderr::Stderr;

pub(super) fn track(common: &Common, options: TrackOptions) -> Result<ExitCode, Error> {
    let TrackOptions { operation, deckies, mut delivery, command } = options;
    // From here on a signal ends the command, not `track` before its report.
    let mut signals = Signals::catch();
    let (mut stderr, outputs) = Stderr::copied();
    let deckies = deckies.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    let location = outbox(delivery.outbox.clone());
    let mut report =
        OperationReport { common, operation, deckies, location, reporter: None, first_row: None };
    let is_enrolled = report.begin();
    let ended = match signals.first_for_command() {
        Some(signal) => {
            drop(outputs);
            // The signal requests an immediate end.
            delivery = DeliveryOptions { timeout: Duration::ZERO, no_wait: true, ..delivery };
            CommandEnd::before_start(signal)
        }
        None => command::run(&command, outputs, &mut signals, &mut stderr),
    };
    if is_enrolled {
        report.end(&ended.outcome, &delivery, &mut signals);
    }
    stderr.finish();
    Ok(ExitCode::from(ended.code))
}

/// The operation, and how far it is recorded.
struct OperationReport<'a> {
    common: &'a Common,
    operation: Operation,
    deckies: Vec<String>,
    location: OutboxLocation,
    /// `None` while the enrolment cannot be read.
    reporter: Option<Reporter>,
    /// The id of the first row in flight. `None`: the rows could not be written.
    first_row: Option<i64>,
}

impl OperationReport<'_> {
    /// Records the operation as in flight, if possible. Returns whether this host is enrolled.
    fn begin(&mut self) -> bool {
        let reporter = match self.open() {
            Ok(reporter) => self.reporter.insert(reporter),
            Err(error) if error.is_not_enrolled() => {
                log::warn!("the operation is not reported: error={:?}", chain(&error));
                return false;
            }
            Err(error) => {
                log::warn!(
                    "could not record the operation; trying again after the command: error={:?}",
                    chain(&error)
                );
                return true;
            }
        };
        match reporter.begin(self.operation, &self.deckies) {
            Ok(first) => self.first_row = Some(first),
            Err(error) => reporter.log_problem(&error),
        }
        true
    }

    fn open(&self) -> Result<Reporter, Error> {
        Reporter::open(enrolment(self.common)?, self.common.master_identity, &self.location)
    }

    /// Reports how the operation ended, at once or through the outbox.
    fn end(mut self, outcome: &Outcome, delivery: &DeliveryOptions, signals: &mut Signals) {
        // The deltas carry the current time: the operation has just ended.
        let delta = |decky: &String| LifecycleDelta::new(decky, self.operation, outcome.clone());
        let deltas: Vec<_> = self.deckies.iter().map(delta).collect();
        // Rows that are only in memory are lost with this process, so they are not ended but
        // reported again. Rows in a file, even in a replaced one, must be ended by their ids.
        let first_row =
            self.first_row.filter(|_| self.reporter.as_ref().is_some_and(Reporter::try_to_write));
        if first_row.is_none() {
            match self.open() {
                Ok(reporter) => self.reporter = Some(reporter),
                Err(error) if self.reporter.is_none() => {
                    let error = chain(&error);
                    log::error!("report lost, neither delivered nor queued: error={error:?}");
                }
                Err(_) => (),
            }
        }
        let Some(reporter) = &mut self.reporter else { return };
        // After the command: a deploy adds its deckies to the state file.
        warn_of_unlisted(reporter.agent_dir(), self.deckies.iter().map(String::as_str));
        let mut wait = ReportWait::new(delivery.timeout, Some(signals));
        let reported = match first_row {
            Some(first) => reporter.end(first, deltas, delivery, &mut wait),
            None => report_without_rows(reporter, &self.location, &deltas, delivery, &mut wait),
        };
        log_problem(reporter, &reported);
        if matches!(reported, ReportResult::InDoubt(_)) {
            reporter.await_disk(&mut wait);
        }
    }
}

/// Logs why a report was not delivered, if it should have been.
fn log_problem(reporter: &Reporter, reported: &ReportResult) {
    let names = reporter.names();
    match reported {
        ReportResult::Delivered | ReportResult::Queued => (),
        ReportResult::Undelivered(why) => log::warn!(
            "not delivered; queued for decnet-heartbeat run: {names} outbox={} error={why:?}",
            reporter.outbox_name()
        ),
        ReportResult::Rejected(why) => {
            log::error!("the master rejected the report: {names} error={why:?}")
        }
        ReportResult::InDoubt(why) => {
            log::error!("report in doubt, it may be queued: {names} error={why:?}")
        }
        ReportResult::Lost(why) => {
            log::error!("report lost, neither delivered nor queued: {names} error={why:?}")
        }
    }
}

/// Reports an operation that has no rows on disk. If neither the outbox nor the master can be
/// reached, the outbox is tried again until the timeout.
fn report_without_rows(
    reporter: &mut Reporter,
    location: &OutboxLocation,
    deltas: &[LifecycleDelta],
    delivery: &DeliveryOptions,
    wait: &mut ReportWait<'_>,
) -> ReportResult {
    let reported = reporter.report(deltas, delivery, wait);
    let ReportResult::Lost(why) = reported else { return reported };
    match reporter.retry_queue(location, deltas, wait) {
        None => ReportResult::Lost(why),
        Some(ReportResult::Queued) if !delivery.no_wait => ReportResult::Undelivered(why),
        Some(reported) => reported,
    }
}
