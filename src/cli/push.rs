//! `push`: reports how an operation ended, at once or through the outbox. Runs on the main thread.

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::ErrorKind;

use super::arguments::{Arguments, Common, FinalStatus, PushOptions};
use super::logging::report_error;
use super::output::print_result;
use super::report::{ReportResult, ReportWait, Reporter};
use super::{enrolment, help_or_usage_error, outbox, warn_of_unlisted};
use crate::delta::{LifecycleDelta, Outcome};
use crate::error::Error;

/// `EX_TEMPFAIL` of sysexits.h: the deltas are queued in the outbox, but not delivered yet.
const QUEUED: u8 = 75;

/// Prints whether the deltas were delivered or queued. If neither, that is the error.
pub(super) fn push(common: &Common, options: PushOptions) -> Result<ExitCode, Error> {
    let PushOptions { operation, status, error, delivery, deckies } = options;
    if status == FinalStatus::Succeeded && error.is_some() {
        let text = "--error says why it failed: it goes with --status failed";
        return Ok(help_or_usage_error(
            Arguments::command().error(ErrorKind::ArgumentConflict, text),
        ));
    }
    let outcome = match status {
        FinalStatus::Succeeded => Outcome::Succeeded,
        FinalStatus::Failed => {
            Outcome::Failed(error.unwrap_or_else(|| "no reason given".to_owned()))
        }
    };
    // A decky that is named twice gets one delta.
    let deckies: BTreeSet<String> = deckies.into_iter().collect();
    let delta = |decky| LifecycleDelta::new(decky, operation, outcome.clone());
    let deltas: Vec<LifecycleDelta> = deckies.into_iter().map(delta).collect();
    deltas.iter().try_for_each(LifecycleDelta::check)?;
    let enrolment = enrolment(common)?;
    warn_of_unlisted(enrolment.agent_dir().value(), deltas.iter().map(LifecycleDelta::decky));
    let location = outbox(delivery.outbox.clone());
    let mut reporter = Reporter::open(enrolment, common.master_identity, &location)?;
    let wait = &mut ReportWait::new(delivery.timeout, None);
    let reported = reporter.report(&deltas, &delivery, wait);
    let (message, code) = match reported {
        ReportResult::Delivered => ("delivered\n".to_owned(), ExitCode::SUCCESS),
        ReportResult::Queued => (
            format!("kept in {} for decnet-heartbeat run\n", reporter.outbox_name()),
            ExitCode::SUCCESS,
        ),
        ReportResult::Undelivered(why) => {
            let place = reporter.outbox_name();
            (
                format!("kept in {place} for decnet-heartbeat run, not delivered: {why}\n"),
                ExitCode::from(QUEUED),
            )
        }
        ReportResult::Rejected(why) => {
            return Err(Error::outbox(None, format!("the master rejected it: {why}")));
        }
        ReportResult::InDoubt(why) => {
            report_error(&why);
            reporter.await_disk(wait);
            return Ok(ExitCode::FAILURE);
        }
        ReportResult::Lost(why) => {
            return Err(Error::outbox(None, format!("neither delivered nor kept: {why}")));
        }
    };
    // An error is ignored: the command has done its work.
    let _ = print_result(&message);
    Ok(code)
}
