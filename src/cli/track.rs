//! `track`: an operation is a command, and the master hears how it ended. Runs on the program's main thread.

use std::collections::BTreeSet;
use std::process::ExitCode;

use super::arguments::{Common, TrackOptions};
use super::command::{Ended, Signals};
use super::report::{Reported, Reporter};
use super::{command, enrolment, outbox, warn_of_unlisted};
use crate::delta::{LifecycleDelta, Outcome, check_decky};
use crate::error::{Error, chain};
use crate::outbox::Kept;

/// The command runs whether or not it can be reported; what stands in the way of a report is said in the log.
pub(super) fn track(common: &Common, options: TrackOptions) -> Result<ExitCode, Error> {
    let TrackOptions { operation, deckies, outbox: path, command } = options;
    // From here on a signal ends the command, and not us before the report.
    let signals = Signals::catch()?;
    let deckies: Vec<String> = deckies.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    deckies.iter().try_for_each(|decky| check_decky(decky))?;
    let mut reporter = match enrolment(common) {
        Ok(enrolment) => Reporter::open(enrolment, common.master_identity, &outbox(path))?,
        Err(error) if error.is_not_enrolled() => {
            log::warn!("there is no master to tell: error={:?}", chain(&error));
            return Ok(ExitCode::from(command::run(&command, &signals).code));
        }
        Err(error) => return Err(error),
    };
    let ids = reporter.begin(operation, &deckies)?;
    let Ended { outcome, code } = command::run(&command, &signals);
    // A deploy lists its deckies while it runs.
    warn_of_unlisted(reporter.agent_dir(), deckies.iter().map(String::as_str));
    let delta = |decky| match &outcome {
        Outcome::Succeeded => LifecycleDelta::succeeded(decky, operation),
        Outcome::Failed(error) => LifecycleDelta::failed(decky, operation, error.as_str()),
    };
    let ended: Vec<_> = ids.into_iter().zip(deckies).map(|(id, decky)| Kept { id, delta: delta(decky) }).collect();
    reporter.end(&ended);
    match reporter.post(&ended) {
        Reported::Delivered => (),
        Reported::Kept(why) => {
            let (names, outbox) = (reporter.names(), reporter.place());
            log::warn!("kept for decnet-heartbeat run, not delivered: {names} outbox={outbox} error={why:?}");
        }
        Reported::Lost(why) => log::error!("neither delivered nor kept: {} error={why:?}", reporter.names()),
    }
    Ok(ExitCode::from(code))
}
