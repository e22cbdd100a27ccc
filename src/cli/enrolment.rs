//! The enrolment and the outbox of a command. Runs on the main thread.

use std::path::{Path, PathBuf};
use std::thread;

use crossbeam_channel::bounded;

use super::arguments::Common;
use crate::credentials::enrolment::{Enrolment, EnrolmentSources};
use crate::error::Error;
use crate::files::absolute;
use crate::limits;
use crate::outbox::OutboxLocation;

/// Reads the enrolment: the options first, then the environment and the ini.
pub(super) fn enrolment(common: &Common) -> Result<Enrolment, Error> {
    let mut sources = EnrolmentSources::from_env();
    if let Some(ini) = &common.config {
        sources = sources.config(ini.clone());
    }
    if let Some(dir) = &common.agent_dir {
        sources = sources.agent_dir(dir.clone());
    }
    let (sender, receiver) = bounded(1);
    let sources_of_thread = sources.clone();
    // On its own thread: the disk may not answer, and `track` must still run its command.
    let run = move || drop(sender.send(sources_of_thread.read()));
    if thread::Builder::new().name("ini".to_owned()).spawn(run).is_err() {
        return sources.read();
    }
    receiver.recv_timeout(limits::CREDENTIALS_WAIT).unwrap_or_else(|_| {
        let seconds = limits::CREDENTIALS_WAIT.as_secs();
        let problem =
            format!("cannot be read: its disk has not answered for {seconds} s; try again later");
        Err(Error::setting("ini", problem).passing())
    })
}

/// The environment variable that names the outbox.
const OUTBOX_VARIABLE: &str = "DECNET_HEARTBEAT_OUTBOX";

/// The outbox that the environment variable names. An empty variable counts as unset.
pub(super) fn outbox_of_environment() -> Option<PathBuf> {
    std::env::var_os(OUTBOX_VARIABLE)
        .filter(|path| !path.is_empty())
        .map(|path| absolute(Path::new(&path)))
}

/// The outbox of `--outbox`, that of the environment variable, or the default one.
pub(super) fn outbox(path: Option<PathBuf>) -> OutboxLocation {
    path.or_else(outbox_of_environment).map_or(OutboxLocation::AgentDir, OutboxLocation::File)
}
