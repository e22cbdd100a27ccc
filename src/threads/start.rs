//! Starts the outbox thread. The caller's waits are bounded, so that a start does not block on a
//! disk that does not answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, SendError, Sender, bounded, unbounded};

use super::batches::Batches;
use super::outbox::{Delivery, OutboxThread};
use super::outbox_client::OutboxClient;
use super::request_queue::RequestQueue;
use crate::credentials::enrolment::Enrolment;
use crate::credentials::{CredentialFiles, Credentials};
use crate::error::{Error, chain, sanitize_path};
use crate::folder_access::{other_folder, others_may_write};
use crate::forked::OutboxThreadRuns;
use crate::limits;
use crate::master::identity::MasterIdentity;
use crate::outbox::{Outbox, OutboxLocation, Role, SharedOutboxStats};
use crate::panics::{caught, quietly};
use crate::stats::SharedStats;
use crate::threads;

const NAME: &str = "decnet-outbox";

/// A heartbeat's outbox thread.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) client: Arc<OutboxClient>,
    pub(crate) batches: Batches,
    pub(crate) credentials: Credentials,
    /// What is wrong with the outbox: the line to log, and its error.
    pub(crate) problem: Option<(&'static str, Error)>,
}

/// Starts the outbox thread of a heartbeat. Waits up to 5 s for the credentials, and up to 1 s for
/// the outbox, which may be opened later.
///
/// # Errors
///
/// - The host is not enrolled.
/// - A value or the bundle cannot be used or read.
/// - Another process delivers from the outbox.
/// - This process was forked from one in which a heartbeat ran.
/// - The system refuses a thread.
pub(crate) fn start(
    enrolment: impl FnOnce() -> Result<Enrolment, Error> + Send + 'static,
    identity: Option<MasterIdentity>,
    location: OutboxLocation,
    role: Role,
    stats: &Arc<SharedStats>,
) -> Result<Started, Error> {
    let queue = Arc::new(RequestQueue::default());
    let outbox_stats = Arc::new(SharedOutboxStats::default());
    let (events, event_receiver) = bounded(1);
    let (batches, batch_receiver) = unbounded();
    // No capacity: a message is received, or `send` fails because the caller has given up.
    let (loaded, loaded_receiver) = bounded(0);
    let (opened, opened_receiver) = bounded(0);
    let thread_queue = Arc::clone(&queue);
    let thread_outbox_stats = Arc::clone(&outbox_stats);
    let thread_stats = Arc::clone(stats);
    let runs = OutboxThreadRuns::new()?;
    let run = move || {
        let _runs = runs;
        let files = || CredentialFiles::load(enrolment()?, identity);
        if let Some((credentials, path)) = load(files, &location, &loaded)
            && let Some(outbox) = open(path, role, &thread_outbox_stats, &opened)
        {
            let delivery = Delivery { credentials, files_missing: false, events, batches };
            OutboxThread::new(thread_queue, outbox, Some(delivery)).run(Some(&thread_stats));
        }
    };
    let (thread, ended) = threads::spawn(NAME, limits::STACK, Some(stats), run)?;
    let (credentials, path) = await_credentials(&loaded_receiver, thread)?;
    let client = Arc::new(OutboxClient::new(queue, outbox_stats, path, ended));
    let problem = match opened_receiver.recv_timeout(limits::OUTBOX_BUSY) {
        Ok(opened) => opened?
            .map(|problem| ("outbox in memory; its deltas do not survive a restart", problem)),
        Err(_) => {
            let seconds = limits::OUTBOX_BUSY.as_secs();
            let problem = client.error(&format!("its disk has not answered for {seconds} s"));
            Some(("outbox does not answer; beats are sent without deltas until it does", problem))
        }
    };
    let batches = Batches::new(Arc::clone(&client), event_receiver, batch_receiver);
    Ok(Started { client, batches, credentials, problem })
}

/// Waits for the credentials and the path of the outbox.
fn await_credentials(loaded: &Receiver<Loaded>, thread: JoinHandle<()>) -> Loaded {
    let Ok(result) = loaded.recv_timeout(limits::CREDENTIALS_WAIT) else {
        let seconds = limits::CREDENTIALS_WAIT.as_secs();
        let problem =
            format!("cannot be read: their disk has not answered for {seconds} s; try again later");
        return Err(Error::setting("ini and bundle", problem).passing());
    };
    if result.is_err() {
        // The thread ends after this error.
        let _ = thread.join();
    }
    result
}

/// Starts an outbox thread for the program, which adds to an outbox. Waits up to 1 s for the
/// outbox. The second value is what is wrong with it.
#[cfg(feature = "cli")]
pub(crate) fn contribute(
    path: Option<PathBuf>,
) -> Result<(Arc<OutboxClient>, Option<Error>), Error> {
    let queue = Arc::new(RequestQueue::default());
    let stats = Arc::new(SharedOutboxStats::default());
    let thread_queue = Arc::clone(&queue);
    let thread_stats = Arc::clone(&stats);
    let thread_path = path.clone();
    let (opened, opened_receiver) = bounded(1);
    let runs = OutboxThreadRuns::new()?;
    let run = move || {
        let _runs = runs;
        match Outbox::open(thread_path, Role::Contribute, thread_stats) {
            Ok((outbox, problem)) => {
                let _ = opened.send(Ok(problem));
                OutboxThread::new(thread_queue, outbox, None).run(None);
            }
            Err(error) => drop(opened.send(Err(error))),
        }
    };
    let (_, ended) = threads::spawn(NAME, limits::STACK, None, run)?;
    let client = Arc::new(OutboxClient::new(queue, stats, path, ended));
    let problem = match opened_receiver.recv_timeout(limits::OUTBOX_BUSY) {
        Ok(opened) => opened?,
        Err(_) => Some(client.error("does not answer")),
    };
    Ok((client, problem))
}

/// The credentials and the path of the outbox, which a start waits for first.
type Loaded = Result<(Credentials, Option<PathBuf>), Error>;

/// Loads the credentials. `None`: they cannot be used, or the caller has given up.
fn load(
    files: impl FnOnce() -> Result<(CredentialFiles, Credentials), Error>,
    location: &OutboxLocation,
    loaded: &Sender<Loaded>,
) -> Option<(CredentialFiles, Option<PathBuf>)> {
    let result = caught(files)
        .unwrap_or_else(|panic| Err(Error::setting("credentials", format!("panicked: {panic}"))));
    match result {
        Ok((files, credentials)) => {
            let agent_dir = credentials.enrolment.agent_dir().value().clone();
            let path = location.path(&agent_dir);
            loaded.send(Ok((credentials, path.clone()))).ok()?;
            warn_of_writable_folders(&agent_dir, path.as_deref());
            Some((files, path))
        }
        Err(error) => {
            // An error of `send` means that the caller has given up.
            let _ = loaded.send(Err(error));
            None
        }
    }
}

/// A user who may write to a folder may replace the key, the CA and the outbox in it.
fn warn_of_writable_folders(agent_dir: &Path, outbox: Option<&Path>) {
    let outbox_dir = outbox.and_then(|outbox| other_folder(outbox, agent_dir));
    for dir in [agent_dir].into_iter().chain(outbox_dir) {
        if let Some(why) = others_may_write(dir) {
            quietly(|| {
                log::warn!(
                    "other users may replace the heartbeat's files: folder={} reason={why:?}",
                    sanitize_path(dir)
                );
            });
        }
    }
}

/// Opens the outbox, and reports the result to a start that still waits. If it no longer waits, the
/// heartbeat is running, so the outbox is opened in any case: if another process delivers from it,
/// when that process stops.
fn open(
    path: Option<PathBuf>,
    role: Role,
    stats: &Arc<SharedOutboxStats>,
    opened: &Sender<Result<Option<Error>, Error>>,
) -> Option<Outbox> {
    match Outbox::open(path.clone(), role, Arc::clone(stats)) {
        Ok((outbox, problem)) => {
            if let Err(SendError(Ok(Some(problem)) | Err(problem))) = opened.send(Ok(problem)) {
                log_late_problem(&problem);
            }
            Some(outbox)
        }
        Err(locked) => match opened.send(Err(locked)) {
            Err(SendError(Err(locked))) => {
                log_late_problem(&locked);
                Outbox::open(path, Role::DeliverLater, Arc::clone(stats))
                    .ok()
                    .map(|(outbox, _)| outbox)
            }
            _ => None,
        },
    }
}

fn log_late_problem(problem: &Error) {
    quietly(|| log::error!("outbox answers now, with a problem: error={:?}", chain(problem)));
}
