//! `track`: an operation is a command, and the master hears how it ended. Runs on the program's main thread.
//!
//! The command runs whether or not it can be reported, and what stands in the way of a report is logged. It is on the
//! disk as in flight before the command starts. What could not be written then, because the ini cannot be read or the
//! outbox is locked, is tried again after the command has ended.
//!
//! - **Streams**: stdin is the command's. So is stdout, unless it is the same file as stderr. Stderr is a pipe, or a
//!   pseudoterminal where ours is a terminal, and a [`companion`] process copies it to ours. Where stdout and stderr are
//!   the same file (`2>&1`, a terminal), stdout is that pipe or pseudoterminal, too: so the order of what is written stays,
//!   and the tail for the report is of both. What reads from its stderr reads nothing.
//! - **Signals** are the command's. One that was sent to the process group has reached it, and is not passed on. After the
//!   command has ended, HUP, INT, QUIT and TERM leave the report to the outbox at once.
//! - **Errors**: the error of a command that exited by itself is the tail of its stderr alone, or `exited with N` if it
//!   wrote nothing. The error of one that a signal ended is `ended by signal N`, followed by the tail if there is one.

mod command;
pub(super) mod companion;
mod stderr;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use super::arguments::{Common, DeltaOptions, TrackOptions};
use super::command_signals::Signals;
use super::report::{Patience, Reported, Reporter};
use super::{enrolment, outbox, warn_of_unlisted};
use crate::delta::{LifecycleDelta, Operation, Outcome};
use crate::error::{Error, chain};
use crate::outbox::{OutboxLocation, QueuedDelta, SentBy};
use command::Ended;
use stderr::Stderr;

pub(super) fn track(common: &Common, options: TrackOptions) -> Result<ExitCode, Error> {
    let TrackOptions { operation, deckies, outbox: path, telling, command } = options;
    // From here on a signal ends the command, and not us before the report.
    let mut signals = Signals::catch();
    let (mut stderr, outputs) = Stderr::copied();
    let deckies = deckies.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    let mut tracked =
        Tracked { common, operation, deckies, location: outbox(path), reporter: None, begun: None };
    let is_enrolled = tracked.begin();
    let early = signals.deadly();
    let ended = match early {
        Some(signal) => {
            drop(outputs);
            Ended::before_the_start(signal)
        }
        None => command::run(&command, outputs, &mut signals, &mut stderr),
    };
    if is_enrolled {
        // A signal before the start asks us to end at once.
        let telling =
            early.map_or(telling, |_| DeltaOptions { timeout: Duration::ZERO, no_wait: true });
        tracked.end(&ended.outcome, &telling, &mut signals);
    }
    stderr.finish();
    Ok(ExitCode::from(ended.code))
}

/// The operation, and what is known of it outside.
struct Tracked<'a> {
    common: &'a Common,
    operation: Operation,
    deckies: Vec<String>,
    location: OutboxLocation,
    /// `None` while the enrolment cannot be read.
    reporter: Option<Reporter>,
    /// The rows that are in flight.
    begun: Option<Vec<i64>>,
}

impl Tracked<'_> {
    /// Writes the operation down as in flight, if that can be. Whether there is a master to tell.
    fn begin(&mut self) -> bool {
        let reporter = match self.open() {
            Ok(reporter) => self.reporter.insert(reporter),
            Err(error) if error.is_not_enrolled() => {
                log::warn!("there is no master to tell: error={:?}", chain(&error));
                return false;
            }
            Err(error) => {
                log::warn!(
                    "the report cannot be prepared, it is tried again after the command: error={:?}",
                    chain(&error)
                );
                return true;
            }
        };
        match reporter.begin(self.operation, &self.deckies) {
            Ok(ids) => self.begun = Some(ids),
            Err(error) => log::warn!(
                "the outbox cannot be used: {} error={:?}",
                reporter.names(),
                chain(&error)
            ),
        }
        true
    }

    fn open(&self) -> Result<Reporter, Error> {
        Reporter::open(enrolment(self.common)?, self.common.master_identity, &self.location)
    }

    /// Reports how it ended: now, or by way of the outbox.
    fn end(mut self, outcome: &Outcome, telling: &DeltaOptions, signals: &mut Signals) {
        // Now, as this is when it ended.
        let delta = |decky: &String| LifecycleDelta::new(decky, self.operation, outcome.clone());
        let deltas: Vec<_> = self.deckies.iter().map(delta).collect();
        // Rows in memory end with us. Any that are in a file, also in one that was replaced, must end by this name.
        let begun = self
            .begun
            .take()
            .filter(|_| self.reporter.as_ref().is_some_and(Reporter::goes_to_disk));
        let again = if begun.is_none() { self.open().map(Some) } else { Ok(None) };
        let mut reporter = match (again, self.reporter) {
            (Ok(Some(reporter)), _) | (_, Some(reporter)) => reporter,
            (Ok(None), None) => return,
            (Err(error), None) => {
                return log::error!("neither delivered nor kept: error={:?}", chain(&error));
            }
        };
        // A deploy lists its deckies while it runs.
        warn_of_unlisted(reporter.agent_dir(), self.deckies.iter().map(String::as_str));
        let mut patience = Patience::new(telling.timeout, Some(signals));
        let reported = match begun {
            Some(ids) => {
                let ended = ids
                    .into_iter()
                    .zip(deltas)
                    .map(|(id, delta)| QueuedDelta { id, delta })
                    .collect();
                end_begun(&reporter, ended, telling, &mut patience)
            }
            None => end_unbegun(&mut reporter, &self.location, &deltas, telling, &mut patience),
        };
        match reported {
            Reported::Delivered | Reported::Left => (),
            Reported::Queued(why) => {
                let (names, outbox) = (reporter.names(), reporter.place());
                log::warn!(
                    "kept for decnet-heartbeat run, not delivered: {names} outbox={outbox} error={why:?}"
                );
            }
            Reported::InDoubt(why) => {
                log::error!(
                    "it is in doubt whether the report is kept: {} error={why:?}",
                    reporter.names()
                );
                reporter.await_disk(&mut patience);
            }
            Reported::Lost(why) => {
                log::error!("neither delivered nor kept: {} error={why:?}", reporter.names())
            }
        }
    }
}

/// Reports rows that are in flight on the disk.
fn end_begun(
    reporter: &Reporter,
    ended: Vec<QueuedDelta>,
    telling: &DeltaOptions,
    patience: &mut Patience<'_>,
) -> Reported {
    if telling.no_wait {
        reporter.end(&ended, SentBy::Deliverer);
        return reporter.leave(patience);
    }
    reporter.end(&ended, SentBy::ThisProcess);
    reporter.post(&ended, patience)
}

/// Reports what the disk knows nothing of yet. Where that cannot be changed and the master cannot be reached, neither, the
/// file is tried for as long as there is time.
fn end_unbegun(
    reporter: &mut Reporter,
    location: &OutboxLocation,
    deltas: &[LifecycleDelta],
    telling: &DeltaOptions,
    patience: &mut Patience<'_>,
) -> Reported {
    let reported = reporter.report(deltas, telling, patience);
    let Reported::Lost(why) = reported else { return reported };
    match reporter.insist(location, deltas, patience) {
        None => Reported::Lost(why),
        Some(Reported::Left) if !telling.no_wait => Reported::Queued(why),
        Some(reported) => reported,
    }
}
