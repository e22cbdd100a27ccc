//! `push`: reports how an operation ended, at once or through the outbox. Runs on the main thread.

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::ErrorKind;

use super::arguments::{Arguments, Common, PushOptions, Status};
use super::output::{print_message, report_error};
use super::report::{ReportWait, Reported, Reporter};
use super::{enrolment, help_or_usage_error, outbox, warn_of_unlisted};
use crate::delta::LifecycleDelta;
use crate::error::Error;

/// `EX_TEMPFAIL` of sysexits.h: the deltas are queued in the outbox, but not delivered yet.
const QUEUED: u8 = 75;

/// Prints whether the deltas were delivered or queued. If neither, that is the error.
pub(super) fn push(common: &Common, options: PushOptions) -> Result<ExitCode, Error> {
    let PushOptions { operation, status, error, outbox: path, delivery, deckies } = options;
    if status == Status::Succeeded && error.is_some() {
        let text = "--error says why it failed: it goes with --status failed";
        return Ok(help_or_usage_error(
            Arguments::command().error(ErrorKind::ArgumentConflict, text),
        ));
    }
    let error = error.unwrap_or_else(|| "no reason given".to_owned());
    // A decky that is named twice gets one delta.
    let deckies: BTreeSet<String> = deckies.into_iter().collect();
    let delta = |decky| match status {
        Status::Succeeded => LifecycleDelta::succeeded(decky, operation),
        Status::Failed => LifecycleDelta::failed(decky, operation, error.as_str()),
    };
    let deltas: Vec<LifecycleDelta> = deckies.into_iter().map(delta).collect();
    deltas.iter().try_for_each(LifecycleDelta::check)?;
    let enrolment = enrolment(common)?;
    warn_of_unlisted(enrolment.agent_dir().value(), deltas.iter().map(LifecycleDelta::decky));
    let mut reporter = Reporter::open(enrolment, common.master_identity, &outbox(path))?;
    let wait = &mut ReportWait::new(delivery.timeout, None);
    let reported = reporter.report(&deltas, &delivery, wait);
    let (message, code) = match reported {
        Reported::Delivered => ("delivered\n".to_owned(), ExitCode::SUCCESS),
        Reported::Queued => (
            format!("kept in {} for decnet-heartbeat run\n", reporter.outbox_name()),
            ExitCode::SUCCESS,
        ),
        Reported::Undelivered(why) => {
            let place = reporter.outbox_name();
            (
                format!("kept in {place} for decnet-heartbeat run, not delivered: {why}\n"),
                ExitCode::from(QUEUED),
            )
        }
        Reported::InDoubt(why) => {
            report_error(&why);
            reporter.await_disk(wait);
            return Ok(ExitCode::FAILURE);
        }
        Reported::Lost(why) => {
            return Err(Error::outbox(None, format!("neither delivered nor kept: {why}")));
        }
    };
    print_message(&message);
    Ok(code)
}
