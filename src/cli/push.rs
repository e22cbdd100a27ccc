//! `push`: reports how an operation ended, at once or through the outbox. Runs on the main thread.

mod lines;

use std::collections::BTreeSet;
use std::io;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::ErrorKind;
use serde_json::json;

use super::arguments::{Arguments, Common, FinalStatus, PushOptions};
use super::enrolment::{enrolment, outbox};
use super::exit::help_or_usage_error;
use super::json_delta::NO_REASON;
use super::logging::report_error;
use super::output::print_result;
use super::report::{ReportResult, ReportWait, Reporter};
use super::state_file::warn_of_unlisted;
use crate::delta::{LifecycleDelta, Outcome};
use crate::error::Error;

/// `EX_TEMPFAIL` of sysexits.h: the deltas are queued in the outbox, but not delivered yet.
const QUEUED: u8 = 75;

/// Prints whether the deltas were delivered or queued. If neither, that is the error.
pub(super) fn push(common: &Common, options: PushOptions) -> Result<ExitCode, Error> {
    let deltas = if options.lines {
        lines::read(io::stdin().lock()).map_err(|problem| {
            Arguments::command().error(ErrorKind::ValueValidation, format!("stdin: {problem}"))
        })
    } else {
        deltas_of_options(&options)
    };
    let deltas = match deltas {
        Ok(deltas) => deltas,
        Err(error) => return Ok(help_or_usage_error(error)),
    };
    deltas.iter().try_for_each(LifecycleDelta::check)?;
    let delivery = &options.delivery;
    let enrolment = enrolment(common)?;
    warn_of_unlisted(enrolment.agent_dir().value(), deltas.iter().map(LifecycleDelta::decky));
    let location = outbox(delivery.outbox.clone());
    let mut reporter = Reporter::open(enrolment, common.master_identity, &location)?;
    let wait = &mut ReportWait::new(delivery.timeout, None);
    let reported = reporter.report(&deltas, delivery, wait);
    let place = reporter.outbox_name();
    // An error is ignored: the command has done its work.
    let _ = print_result(&if options.json {
        as_json(&reported, deltas.len(), &place)
    } else {
        as_text(&reported, &place)
    });
    match reported {
        ReportResult::Delivered | ReportResult::Queued => Ok(ExitCode::SUCCESS),
        ReportResult::Undelivered(_) => Ok(ExitCode::from(QUEUED)),
        ReportResult::Rejected(why) => {
            Err(Error::outbox(None, format!("the master rejected it: {why}")))
        }
        ReportResult::InDoubt(why) => {
            report_error(&why);
            reporter.await_disk(wait);
            Ok(ExitCode::FAILURE)
        }
        ReportResult::Lost(why) => {
            Err(Error::outbox(None, format!("neither delivered nor kept: {why}")))
        }
    }
}

/// The deltas of the command line. A decky that is named twice gets one.
fn deltas_of_options(options: &PushOptions) -> Result<Vec<LifecycleDelta>, clap::Error> {
    let usage_error = |kind, text: &str| Err(Arguments::command().error(kind, text.to_owned()));
    let (Some(operation), Some(status)) = (options.operation, options.status) else {
        let text = "--operation and --status are required without --lines";
        return usage_error(ErrorKind::MissingRequiredArgument, text);
    };
    let outcome = match (status, options.error.clone()) {
        (FinalStatus::Succeeded, None) => Outcome::Succeeded,
        (FinalStatus::Succeeded, Some(_)) => {
            let text = "--error says why it failed: it goes with --status failed";
            return usage_error(ErrorKind::ArgumentConflict, text);
        }
        (FinalStatus::Failed, error) => {
            Outcome::Failed(error.unwrap_or_else(|| NO_REASON.to_owned()))
        }
    };
    let deckies: BTreeSet<&String> = options.deckies.iter().collect();
    let delta = |decky: &String| {
        let delta = LifecycleDelta::new(decky, operation, outcome.clone());
        options.completed_at.map_or(delta.clone(), |at| delta.completed_at(at))
    };
    Ok(deckies.into_iter().map(delta).collect())
}

/// Nothing for a result that is an error.
fn as_text(reported: &ReportResult, place: &str) -> String {
    match reported {
        ReportResult::Delivered => "delivered\n".to_owned(),
        ReportResult::Queued => format!("kept in {place} for decnet-heartbeat run\n"),
        ReportResult::Undelivered(why) => {
            format!("kept in {place} for decnet-heartbeat run, not delivered: {why}\n")
        }
        ReportResult::Rejected(_) | ReportResult::InDoubt(_) | ReportResult::Lost(_) => {
            String::new()
        }
    }
}

/// One line of JSON, which escapes the reason.
fn as_json(reported: &ReportResult, deltas: usize, place: &str) -> String {
    let (result, reason) = match reported {
        ReportResult::Delivered => ("delivered", None),
        ReportResult::Queued => ("queued", None),
        ReportResult::Undelivered(why) => ("undelivered", Some(why)),
        ReportResult::Rejected(why) => ("rejected", Some(why)),
        ReportResult::InDoubt(why) => ("in-doubt", Some(why)),
        ReportResult::Lost(why) => ("lost", Some(why)),
    };
    let result = json!({"result": result, "deltas": deltas, "outbox": place, "reason": reason});
    crate::text::escape_json(&format!("{result}\n"))
}
