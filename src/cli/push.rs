//! `push`: reports how an operation ended, now or by way of the outbox. Runs on the program's main thread.

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::ErrorKind;

use super::arguments::{Arguments, Common, PushOptions, Status};
use super::output::{complain, print};
use super::report::{Patience, Reported, Reporter};
use super::{enrolment, help_or_refuse, outbox, warn_of_unlisted};
use crate::delta::LifecycleDelta;
use crate::error::Error;

/// `EX_TEMPFAIL` of sysexits.h: the outbox has the deltas, and the master does not have them yet.
const KEPT: u8 = 75;

/// Where the deltas are delivered or kept, that is said in a line; otherwise that they are neither is the error.
pub(super) fn push(common: &Common, options: PushOptions) -> Result<ExitCode, Error> {
    let PushOptions { operation, status, error, outbox: path, telling, deckies } = options;
    if status == Status::Succeeded && error.is_some() {
        let text = "--error says why it failed: it goes with --status failed";
        return Ok(help_or_refuse(Arguments::command().error(ErrorKind::ArgumentConflict, text)));
    }
    let error = error.unwrap_or_else(|| "no reason given".to_owned());
    // A decky that is named twice has one delta.
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
    let patience = &mut Patience::new(telling.timeout, None);
    let reported = reporter.report(&deltas, &telling, patience);
    let (said, code) = match reported {
        Reported::Delivered => ("delivered\n".to_owned(), ExitCode::SUCCESS),
        Reported::Left => {
            (format!("kept in {} for decnet-heartbeat run\n", reporter.place()), ExitCode::SUCCESS)
        }
        Reported::Queued(why) => {
            let place = reporter.place();
            (
                format!("kept in {place} for decnet-heartbeat run, not delivered: {why}\n"),
                ExitCode::from(KEPT),
            )
        }
        Reported::InDoubt(why) => {
            complain(&why);
            reporter.await_disk(patience);
            return Ok(ExitCode::FAILURE);
        }
        Reported::Lost(why) => {
            return Err(Error::outbox(None, format!("neither delivered nor kept: {why}")));
        }
    };
    print(&said);
    Ok(code)
}
