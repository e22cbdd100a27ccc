//! What `push` and `track` share: their deltas go to the outbox first, claimed by this process, then to the master at once.
//! Where the master cannot be reached in time they stay in the outbox for `run`. The program's main thread uses the outbox;
//! a thread that nobody waits for after the timeout sends the POST.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, bounded};

use super::arguments::Telling;
use super::command_signals::{Signals, wait};
use crate::body::{self, Body};
use crate::credentials::Access;
use crate::delta::{LifecycleDelta, Operation};
use crate::enrolment::Enrolment;
use crate::error::{Error, chain, printable_path};
use crate::identity::MasterIdentity;
use crate::limits;
use crate::link::{Link, Names};
use crate::master::Verdict;
use crate::outbox::{Add, Change, Kept, OutboxLocation, Poster, Settled};
use crate::status::decnet::DecnetStatus;
use crate::status::{Snapshot, StatusSource};
use crate::threads::client::OutboxClient;
use crate::threads::start::contribute;

/// Where the deltas of this process go.
#[derive(Debug)]
pub(super) struct Reporter {
    outbox: Arc<OutboxClient>,
    enrolment: Enrolment,
    identity: Option<MasterIdentity>,
}

/// What has become of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reported {
    /// The master has them.
    Delivered,
    /// They are on the disk, as they were to be.
    Left,
    /// They are on the disk, and why the master has not heard of them.
    Kept(String),
    /// They may be on the disk one day, and why nobody knows. To report them again may do it twice.
    InDoubt(String),
    /// Neither.
    Lost(String),
}

impl Reported {
    /// They could not be kept.
    fn of(error: &Error) -> Self {
        if error.is_in_doubt() { Self::InDoubt(chain(error)) } else { Self::Lost(chain(error)) }
    }
}

/// How long the master may take, and what ends the waiting early.
#[derive(Debug)]
pub(super) struct Patience<'a> {
    until: Instant,
    signals: Option<&'a mut Signals>,
    /// A signal has asked us to end.
    has_ended: bool,
}

impl<'a> Patience<'a> {
    /// From now on. Without signals, as they end the process.
    pub(super) fn new(timeout: Duration, signals: Option<&'a mut Signals>) -> Self {
        Self { until: Instant::now() + timeout, signals, has_ended: false }
    }

    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Whether a signal asks us to end.
    fn has_ended(&mut self) -> bool {
        self.has_ended = self.has_ended || self.signals.as_mut().is_some_and(|signals| signals.ask_to_end());
        self.has_ended
    }

    /// Sleeps before what has failed is tried again.
    fn pause(&self) -> io::Result<()> {
        let pause = Instant::now() + limits::REPORT_PAUSE;
        self.sleep(None, pause.min(self.until))
    }

    /// Sleeps until a signal comes or `other` is readable or closed, at the longest until then.
    fn sleep(&self, other: Option<&UnixStream>, until: Instant) -> io::Result<()> {
        let signals = self.signals.as_ref().and_then(|signals| signals.fd());
        let files: Vec<_> = other.map(AsFd::as_fd).into_iter().chain(signals).collect();
        wait(&files, Some(until))
    }
}

impl Reporter {
    pub(super) fn open(
        enrolment: Enrolment,
        identity: Option<MasterIdentity>,
        location: &OutboxLocation,
    ) -> Result<Self, Error> {
        let (outbox, problem) = contribute(location.path(enrolment.agent_dir().value()))?;
        if let Some(problem) = problem {
            log::warn!("the outbox cannot be used: {} error={:?}", names(&enrolment), chain(&problem));
        }
        Ok(Self { outbox, enrolment, identity })
    }

    /// Reports deltas that the disk does not know of yet.
    pub(super) fn report(
        &mut self,
        deltas: &[LifecycleDelta],
        telling: &Telling,
        patience: &mut Patience<'_>,
    ) -> Reported {
        if telling.no_wait {
            return self.keep(deltas);
        }
        match self.claim(deltas.to_vec()) {
            Ok(claimed) => self.post(&claimed, patience),
            Err(error) => Reported::of(&error),
        }
    }

    /// Waits for as long as there is time until the disk has what is in doubt: the end of this process might undo it.
    pub(super) fn await_disk(&self, patience: &mut Patience<'_>) {
        while self.outbox.is_busy() && !patience.has_ended() && !patience.left().is_zero() {
            if patience.pause().is_err() {
                return;
            }
        }
    }

    /// Claims deltas, in memory if the file cannot have them.
    fn claim(&mut self, deltas: Vec<LifecycleDelta>) -> Result<Vec<Kept>, Error> {
        let add = Add::Deltas(deltas.clone(), Poster::Us);
        let first = match self.outbox.add(add.clone(), false) {
            // What is in doubt must not be sent twice.
            Err(error) if error.is_outbox() && !error.is_in_doubt() => {
                self.turn_to_memory(&error)?;
                self.outbox.add(add, false)?
            }
            added => added?,
        };
        Ok((first..).zip(deltas).map(|(id, delta)| Kept { id, delta }).collect())
    }

    fn turn_to_memory(&mut self, error: &Error) -> Result<(), Error> {
        log::warn!("the outbox cannot be used: {} error={:?}", self.names(), chain(error));
        (self.outbox, _) = contribute(None)?;
        Ok(())
    }

    /// Writes an operation down as in flight.
    pub(super) fn begin(&self, operation: Operation, deckies: &[String]) -> Result<Vec<i64>, Error> {
        let first = self.outbox.add(Add::Operation(operation, deckies.to_vec()), false)?;
        Ok((first..).take(deckies.len()).collect())
    }

    /// Whether all that was given to it is on the disk.
    pub(super) fn is_on_disk(&self) -> bool {
        self.outbox.path().is_some()
    }

    /// The same, after another attempt to write there what is not.
    pub(super) fn goes_to_disk(&self) -> bool {
        self.is_on_disk() || self.outbox.change(Change::Released(Vec::new()), false).is_ok() && self.is_on_disk()
    }

    /// What was begun here has ended.
    pub(super) fn end(&self, ended: &[Kept], poster: Poster) {
        if let Err(error) = self.outbox.change(Change::Ended(ended.to_vec(), poster), false) {
            log::warn!("how the operation ended is not on the disk: {} error={:?}", self.names(), chain(&error));
        }
    }

    /// Keeps deltas for `run` to deliver.
    fn keep(&self, deltas: &[LifecycleDelta]) -> Reported {
        let added = self.outbox.add(Add::Deltas(deltas.to_vec(), Poster::Deliverer), false);
        self.left(added.map(drop))
    }

    /// Keeps deltas for `run` as soon as their file can be had, for as long as there is time. `None`: they are not kept.
    pub(super) fn insist(
        &mut self,
        location: &OutboxLocation,
        deltas: &[LifecycleDelta],
        patience: &mut Patience<'_>,
    ) -> Option<Reported> {
        while !patience.has_ended() && !patience.left().is_zero() {
            let opened = contribute(location.path(self.agent_dir()));
            if let Ok((outbox, None)) = opened {
                self.outbox = outbox;
                match self.keep(deltas) {
                    Reported::Lost(_) => (),
                    reported => return Some(reported),
                }
            }
            if patience.pause().is_err() {
                break;
            }
        }
        None
    }

    /// Leaves what has ended to `run`.
    pub(super) fn leave(&self, patience: &mut Patience<'_>) -> Reported {
        self.left(self.write_down(patience))
    }

    fn left(&self, written: Result<(), Error>) -> Reported {
        match written {
            Ok(()) if self.is_on_disk() => Reported::Left,
            Ok(()) => Reported::Lost("the outbox is in memory alone".to_owned()),
            Err(error) => Reported::of(&error),
        }
    }

    /// Posts what this process has claimed, and leaves to `run` what the master has not accepted in time, or must not hear
    /// before something newer.
    pub(super) fn post(&self, deltas: &[Kept], patience: &mut Patience<'_>) -> Reported {
        let (overtaken, free) = self.overtaken_and_free(deltas);
        let mut left = free.as_slice();
        let failed = loop {
            let (body, later) = left.split_at(left.len().min(limits::DELTAS_PER_BODY));
            if body.is_empty() {
                break None;
            }
            if let Err(why) = self.send(body, patience) {
                break Some(why);
            }
            // What the file does not take now it takes in the end, or that is an error there.
            let _ = self.outbox.change(Change::Settled(ids(body), Settled::Delivered), false);
            left = later;
        };
        let left = [left, &overtaken].concat();
        // The same.
        let _ = if left.is_empty() { Ok(()) } else { self.outbox.change(Change::Released(ids(&left)), false) };
        if let Err(error) = self.write_down(patience) {
            log::error!(
                "the outbox does not know what has been delivered, run may send a delta again: {} error={:?}",
                self.names(),
                chain(&error)
            );
        }
        if left.is_empty() {
            return Reported::Delivered;
        }
        let why = failed.unwrap_or_else(|| "a newer operation of the same decky is to be heard first".to_owned());
        if self.is_on_disk() { Reported::Kept(why) } else { Reported::Lost(why) }
    }

    /// Where the outbox cannot say, the delta may not be in there either, and to post it is all that can be done for it. A disk
    /// that has not answered once is not asked about the others.
    fn overtaken_and_free(&self, deltas: &[Kept]) -> (Vec<Kept>, Vec<Kept>) {
        let mut answers = true;
        deltas.iter().cloned().partition(|kept| {
            answers
                && self.outbox.is_overtaken(kept).unwrap_or_else(|error| {
                    log::debug!("the outbox cannot be asked for newer operations: error={:?}", chain(&error));
                    answers = false;
                    false
                })
        })
    }

    /// Tries for as long as there is time: what was in flight on the disk and has not ended there is reported failed when
    /// this process is gone.
    fn write_down(&self, patience: &mut Patience<'_>) -> Result<(), Error> {
        loop {
            // All that was not written yet is written with any change.
            let Err(error) = self.outbox.change(Change::Released(Vec::new()), false) else { return Ok(()) };
            if patience.has_ended() || patience.left().is_zero() || patience.pause().is_err() {
                return Err(error);
            }
        }
    }

    /// One POST. Why it was not accepted.
    fn send(&self, deltas: &[Kept], patience: &mut Patience<'_>) -> Result<(), String> {
        if patience.has_ended() {
            return Err(SIGNAL.to_owned());
        }
        let deltas = deltas.iter().map(|kept| kept.delta.clone()).collect();
        let post = Post { enrolment: self.enrolment.clone(), identity: self.identity, deltas };
        let within = patience.left();
        match post.clone().start(within) {
            Ok((answer, done)) => await_answer(&answer, &done, patience),
            Err(error) => {
                log::debug!("the POST has no thread of its own: error={:?}", error.to_string());
                post.send(within)
            }
        }
    }

    /// Where the files of this host are.
    pub(super) fn agent_dir(&self) -> &Path {
        self.enrolment.agent_dir().value()
    }

    /// Who we are to which master: what a line of the log begins with.
    pub(super) fn names(&self) -> String {
        names(&self.enrolment)
    }

    /// Where they are kept, for a person.
    pub(super) fn place(&self) -> String {
        self.outbox.path().map_or_else(|| "memory".to_owned(), printable_path)
    }
}

/// Why a report was not sent to its end.
const SIGNAL: &str = "a signal came while it was sent";

/// Waits for the answer, but not for a thread that hangs.
fn await_answer(
    answer: &Receiver<Result<(), String>>,
    done: &UnixStream,
    patience: &mut Patience<'_>,
) -> Result<(), String> {
    let until = patience.until + limits::REPORT_SLACK;
    loop {
        match answer.try_recv() {
            Ok(answer) => return answer,
            Err(TryRecvError::Disconnected) => return Err("the POST panicked".to_owned()),
            Err(TryRecvError::Empty) => (),
        }
        if patience.has_ended() {
            return Err(SIGNAL.to_owned());
        }
        if Instant::now() >= until {
            return Err("no answer in time".to_owned());
        }
        patience.sleep(Some(done), until).map_err(|error| error.to_string())?;
    }
}

/// One POST with nothing said of what runs here: that is for `run` to say.
#[derive(Clone)]
struct Post {
    enrolment: Enrolment,
    identity: Option<MasterIdentity>,
    deltas: Vec<LifecycleDelta>,
}

impl Post {
    /// Sends it on a thread of its own: where its answer comes, and what is closed after that.
    fn start(self, within: Duration) -> io::Result<(Receiver<Result<(), String>>, UnixStream)> {
        let (sender, answer) = bounded(1);
        let (done, open) = UnixStream::pair()?;
        let send = move || {
            let _open = open;
            // Nobody may be waiting any more.
            let _ = sender.send(self.send(within));
            drop(sender);
        };
        thread::Builder::new().name("report".to_owned()).spawn(send)?;
        Ok((answer, done))
    }

    /// Why it was not accepted.
    fn send(&self, within: Duration) -> Result<(), String> {
        let until = Instant::now() + within;
        let agent_dir = self.enrolment.agent_dir().value();
        // Without it the master may order the topology to be built again.
        let topology = DecnetStatus::new(agent_dir).applied_topology().ok_or("topology.db cannot be read")?;
        let access = Access::load(self.enrolment.clone(), self.identity).map_err(|error| chain(&error))?;
        let link = Link::new(access);
        let lifecycle: Vec<_> = self.deltas.iter().collect();
        let nothing = Snapshot::unknown("a delta alone");
        let body = Body {
            host_uuid: link.host(),
            agent_version: env!("CARGO_PKG_VERSION"),
            status: nothing.raw_status(),
            topology: Some(body::Topology::from(&topology)),
            lifecycle: &lifecycle,
        };
        let body = serde_json::to_vec(&body).map_err(|error| error.to_string())?;
        let reply = link.master().post(&body, until.saturating_duration_since(Instant::now()));
        let (class, detail) = (reply.class, reply.detail);
        match reply.verdict {
            Verdict::Accepted => Ok(()),
            Verdict::HostRefused if class == "http-404" => {
                Err(format!("the master does not know this host, enrol it again ({class}): {detail}"))
            }
            Verdict::HostRefused => {
                let fingerprint = link.fingerprint();
                let problem = "the master does not accept this host's certificate";
                Err(format!("{problem} ({class}, fingerprint {fingerprint}): {detail}"))
            }
            Verdict::NoAnswer => Err(format!("no answer from {}: {class}: {detail}", link.master().url())),
            _ => Err(format!("{} answered {class}: {detail}", link.master().url())),
        }
    }
}

fn ids(deltas: &[Kept]) -> Vec<i64> {
    deltas.iter().map(|kept| kept.id).collect()
}

fn names(enrolment: &Enrolment) -> String {
    Names { host: enrolment.host_uuid().value(), master: &enrolment.master_url() }.to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::outbox::{FILE, look};

    #[test]
    fn what_was_begun_beside_its_file_ends_there_by_the_same_name() {
        let dir = tempfile::tempdir().unwrap();
        let agent_dir = dir.path().join("agent");
        let enrolment = Enrolment::new("u", "127.0.0.1", &agent_dir).unwrap();
        let reporter = Reporter::open(enrolment, None, &OutboxLocation::AgentDir).unwrap();
        let begun = reporter.begin(Operation::Deploy, &["d".to_owned()]).unwrap();
        assert!(!reporter.goes_to_disk());
        fs::create_dir(&agent_dir).unwrap();
        assert!(!reporter.is_on_disk() && reporter.goes_to_disk());
        let counts = || look(&agent_dir.join(FILE)).unwrap().unwrap().counts;
        assert_eq!((counts().operations, counts().waiting), (1, 0));
        let delta = LifecycleDelta::succeeded("d", Operation::Deploy);
        reporter.end(&[Kept { id: begun[0], delta }], Poster::Deliverer);
        assert_eq!((counts().operations, counts().waiting), (0, 1));
    }
}
