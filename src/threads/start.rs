//! How the outbox thread is started, and what is waited for: a start must not hang on a disk that does.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, SendError, Sender, bounded, unbounded};

use super::batches::Batches;
use super::outbox::{Heartbeat, OutboxThread};
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
use crate::stats::{SharedStats, ThreadWatch};

const NAME: &str = "decnet-outbox";

/// What a heartbeat's outbox thread is started with.
pub(crate) struct Start {
    pub(crate) enrolment: Box<dyn FnOnce() -> Result<Enrolment, Error> + Send>,
    pub(crate) identity: Option<MasterIdentity>,
    pub(crate) location: OutboxLocation,
    pub(crate) stats: Arc<SharedStats>,
}

/// A heartbeat's outbox thread.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) client: Arc<OutboxClient>,
    pub(crate) batches: Batches,
    pub(crate) access: Credentials,
    /// What is wrong with the outbox, if anything is, and why.
    pub(crate) problem: Option<(&'static str, Error)>,
}

/// Starts it. Credentials are waited for 5 s, and the outbox 1 s: it may come later.
///
/// # Errors
///
/// The host is not enrolled, a value or the bundle cannot be used or read, another process delivers from the outbox, this process
/// was forked from one in which a heartbeat ran, or the system refuses a thread. Nothing runs then.
pub(crate) fn start(start: Start) -> Result<Started, Error> {
    let (desk, books) = (Arc::new(RequestQueue::default()), Arc::new(SharedOutboxStats::default()));
    let (news, unread) = bounded(1);
    let (batches, answers) = unbounded();
    // Without room: what is sent is received, or there is nobody to receive it.
    let (loaded, access) = bounded(0);
    let (opened, outcome) = bounded(0);
    let (thread_desk, thread_books) = (Arc::clone(&desk), Arc::clone(&books));
    let watch = ThreadWatch::new(NAME, &start.stats);
    let run = move || {
        let stats = Arc::clone(&start.stats);
        if let Some((credentials, path)) = load(start, &loaded)
            && let Some(outbox) = open(path, &thread_books, &opened)
        {
            let heartbeat = Heartbeat { credentials, are_gone: false, news, answers: batches };
            OutboxThread::new(thread_desk, outbox, Some(heartbeat)).run(Some(&stats));
        }
        watch.disarm();
    };
    let (thread, ended) = spawn(run)?;
    let (access, path) = match access.recv_timeout(limits::CREDENTIALS_WAIT) {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            // It has said its last word.
            let _ = thread.join();
            return Err(error);
        }
        Err(_) => return Err(no_credentials()),
    };
    let client = Arc::new(OutboxClient::new(desk, books, path, ended));
    let problem = match outcome.recv_timeout(limits::OUTBOX_BUSY) {
        Ok(opened) => opened?
            .map(|problem| ("the outbox is in memory, deltas do not survive a restart", problem)),
        Err(_) => {
            let seconds = limits::OUTBOX_BUSY.as_secs();
            let problem = client.error(&format!("its disk has not answered for {seconds} s"));
            Some(("the outbox does not answer, beating without deltas until it does", problem))
        }
    };
    let batches = Batches::new(Arc::clone(&client), unread, answers);
    Ok(Started { client, batches, access, problem })
}

/// Starts one for the program, which adds to an outbox. Waited for 1 s; the second value says what is wrong with it.
#[cfg(feature = "cli")]
pub(crate) fn contribute(
    path: Option<PathBuf>,
) -> Result<(Arc<OutboxClient>, Option<Error>), Error> {
    let (desk, books) = (Arc::new(RequestQueue::default()), Arc::new(SharedOutboxStats::default()));
    let (thread_desk, thread_books, place) = (Arc::clone(&desk), Arc::clone(&books), path.clone());
    let (opened, outcome) = bounded(1);
    let run = move || match Outbox::open(place, Role::Contribute, Arc::clone(&thread_books)) {
        Ok((outbox, problem)) => {
            let _ = opened.send(Ok(problem));
            OutboxThread::new(thread_desk, outbox, None).run(None);
        }
        Err(error) => drop(opened.send(Err(error))),
    };
    let (_, ended) = spawn(run)?;
    let client = Arc::new(OutboxClient::new(desk, books, path, ended));
    let problem = match outcome.recv_timeout(limits::OUTBOX_BUSY) {
        Ok(opened) => opened?,
        Err(_) => Some(client.error("does not answer")),
    };
    Ok((client, problem))
}

/// The thread, and what is disconnected when it has ended.
fn spawn(run: impl FnOnce() + Send + 'static) -> Result<(JoinHandle<()>, Receiver<()>), Error> {
    let (alive, ended) = bounded(0);
    let runs = OutboxThreadRuns::new()?;
    let run = move || {
        let _alive: Sender<()> = alive;
        let _runs = runs;
        run();
    };
    let builder = thread::Builder::new().name(NAME.to_owned()).stack_size(limits::STACK);
    let thread = builder.spawn(run).map_err(|source| Error::thread(NAME, source))?;
    Ok((thread, ended))
}

fn no_credentials() -> Error {
    let seconds = limits::CREDENTIALS_WAIT.as_secs();
    let problem = format!(
        "cannot be read, their disk has not answered for {seconds} s; try again when it does"
    );
    Error::setting("ini and bundle", problem).passing()
}

/// What a start waits for first: what the master is reached with, and where the outbox belongs.
type Loaded = Result<(Credentials, Option<PathBuf>), Error>;

/// Loads the credentials. `None`: they cannot be used, or nobody waits for them any more.
fn load(start: Start, loaded: &Sender<Loaded>) -> Option<(CredentialFiles, Option<PathBuf>)> {
    let Start { enrolment, identity, location, .. } = start;
    let found =
        caught(|| enrolment().and_then(|enrolment| CredentialFiles::load(enrolment, identity)));
    match found
        .unwrap_or_else(|said| Err(Error::setting("credentials", format!("panicked: {said}"))))
    {
        Ok((credentials, access)) => {
            let agent_dir = access.enrolment.agent_dir().value().clone();
            let path = location.path(&agent_dir);
            loaded.send(Ok((access, path.clone()))).ok()?;
            warn_of_others(&agent_dir, path.as_deref());
            Some((credentials, path))
        }
        Err(error) => {
            // Nobody may be waiting any more.
            let _ = loaded.send(Err(error));
            None
        }
    }
}

/// Whoever may write into a folder may replace the key, the CA and the outbox.
fn warn_of_others(agent_dir: &Path, outbox: Option<&Path>) {
    let beside = outbox.and_then(|outbox| other_folder(outbox, agent_dir));
    for dir in [agent_dir].into_iter().chain(beside) {
        if let Some(why) = others_may_write(dir) {
            let dir = sanitize_path(dir);
            quietly(|| {
                log::warn!("others may replace the heartbeat's files: folder={dir} because={why:?}")
            });
        }
    }
}

/// Opens the outbox, and says what has come of it to a start that still waits. Otherwise the heartbeat runs, so it is opened in
/// any case: if another process delivers from it, as soon as that does not any more.
fn open(
    path: Option<PathBuf>,
    books: &Arc<SharedOutboxStats>,
    opened: &Sender<Result<Option<Error>, Error>>,
) -> Option<Outbox> {
    let late = |problem: &Error| {
        quietly(|| {
            log::error!(
                "the outbox answers now, and is not as it should be: error={:?}",
                chain(problem)
            )
        });
    };
    match Outbox::open(path.clone(), Role::Deliver, Arc::clone(books)) {
        Ok((outbox, problem)) => {
            if let Err(SendError(Ok(Some(problem)) | Err(problem))) = opened.send(Ok(problem)) {
                late(&problem);
            }
            Some(outbox)
        }
        Err(held) => match opened.send(Err(held)) {
            Err(SendError(Err(held))) => {
                late(&held);
                Outbox::open(path, Role::DeliverLater, Arc::clone(books))
                    .ok()
                    .map(|(outbox, _)| outbox)
            }
            _ => None,
        },
    }
}
