//! What `push` and `track` share: their deltas go to the outbox first, claimed by this process, then to the master at once.
//! Where the master cannot be reached they stay in the outbox for `run`. Runs on the program's main thread.

use std::path::Path;

use crate::body::{self, Body};
use crate::delta::{LifecycleDelta, Operation};
use crate::enrolment::Enrolment;
use crate::error::{Error, chain, printable_path};
use crate::identity::MasterIdentity;
use crate::limits;
use crate::link::{Link, Names};
use crate::master::Verdict;
use crate::outbox::{self, Kept, Outbox, OutboxLocation, Poster, Role, Settled};
use crate::status::decnet::DecnetStatus;
use crate::status::{Snapshot, StatusSource};

/// Where the deltas of this process go.
#[derive(Debug)]
pub(super) struct Reporter {
    outbox: Outbox,
    enrolment: Enrolment,
    identity: Option<MasterIdentity>,
}

/// What has become of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reported {
    /// The master has them.
    Delivered,
    /// They are on the disk, and why the master has not heard of them.
    Kept(String),
    /// Neither.
    Lost(String),
}

impl Reporter {
    pub(super) fn open(
        enrolment: Enrolment,
        identity: Option<MasterIdentity>,
        location: &OutboxLocation,
    ) -> Result<Self, Error> {
        let (outbox, problem) = Outbox::open(location, enrolment.agent_dir().value(), Role::Contribute)?;
        if let Some(problem) = problem {
            log::warn!("the outbox cannot be used: {} error={:?}", names(&enrolment), chain(&problem));
        }
        Ok(Self { outbox, enrolment, identity })
    }

    /// Claims deltas, in memory if the file cannot have them.
    pub(super) fn claim(&mut self, deltas: Vec<LifecycleDelta>) -> Result<Vec<Kept>, Error> {
        match self.outbox.claim(deltas.clone()) {
            Err(error) if error.is_outbox() => {
                self.turn_to_memory(&error)?;
                self.outbox.claim(deltas)
            }
            claimed => claimed,
        }
    }

    /// Writes an operation down as in flight, in memory if the file cannot have it.
    pub(super) fn begin(&mut self, operation: Operation, deckies: &[String]) -> Result<Vec<i64>, Error> {
        match self.outbox.begin(operation, deckies) {
            Err(error) if error.is_outbox() => {
                self.turn_to_memory(&error)?;
                self.outbox.begin(operation, deckies)
            }
            begun => begun,
        }
    }

    /// What was begun here has ended, and this process will post it.
    pub(super) fn end(&self, ended: &[Kept]) {
        if let Err(error) = self.outbox.end(ended.to_vec(), Poster::Us) {
            log::warn!("how the operation ended is not on the disk: {} error={:?}", self.names(), chain(&error));
        }
    }

    fn turn_to_memory(&mut self, error: &Error) -> Result<(), Error> {
        log::warn!("the outbox cannot be used: {} error={:?}", self.names(), chain(error));
        let dir = self.enrolment.agent_dir().value();
        (self.outbox, _) = Outbox::open(&OutboxLocation::Memory, dir, Role::Contribute)?;
        Ok(())
    }

    /// Posts what this process has claimed, and leaves to `run` what the master has not accepted, or must not hear before
    /// something newer.
    pub(super) fn post(&self, deltas: &[Kept]) -> Reported {
        let (overtaken, free): (Vec<_>, Vec<_>) = deltas.iter().cloned().partition(|kept| self.is_overtaken(kept));
        let mut left = free.as_slice();
        let failed = loop {
            let (body, later) = left.split_at(left.len().min(limits::DELTAS_PER_BODY));
            if body.is_empty() {
                break None;
            }
            if let Err(why) = self.post_one(body) {
                break Some(why);
            }
            if let Err(error) = self.outbox.settle(body, &Settled::Delivered, outbox::deadline()) {
                log::error!("run may send a delta again: {} error={:?}", self.names(), chain(&error));
            }
            left = later;
        };
        let left = [left, &overtaken].concat();
        if left.is_empty() {
            return Reported::Delivered;
        }
        if let Err(error) = self.outbox.release(&left) {
            log::warn!("what is undelivered is not on the disk: {} error={:?}", self.names(), chain(&error));
        }
        let why = failed.unwrap_or_else(|| "a newer operation of the same decky is to be heard first".to_owned());
        if self.outbox.path().is_some() { Reported::Kept(why) } else { Reported::Lost(why) }
    }

    /// Where the outbox cannot say, the delta may not be in there either, and to post it is all that can be done for it.
    fn is_overtaken(&self, kept: &Kept) -> bool {
        self.outbox.is_overtaken(kept).unwrap_or_else(|error| {
            log::debug!("the outbox cannot be asked for newer operations: error={:?}", chain(&error));
            false
        })
    }

    /// One POST, with nothing said of what runs here: that is for `run` to say. Why it was not accepted.
    fn post_one(&self, deltas: &[Kept]) -> Result<(), String> {
        let agent_dir = self.enrolment.agent_dir().value();
        // Without it the master may order the topology to be built again.
        let topology = DecnetStatus::new(agent_dir).applied_topology().ok_or("topology.db cannot be read")?;
        let link = Link::new(self.enrolment.clone(), self.identity).map_err(|error| chain(&error))?;
        let lifecycle: Vec<_> = deltas.iter().map(|kept| &kept.delta).collect();
        let nothing = Snapshot::unknown("a delta alone");
        let body = Body {
            host_uuid: link.enrolment().host_uuid().value(),
            agent_version: env!("CARGO_PKG_VERSION"),
            status: nothing.raw_status(),
            topology: Some(body::Topology::from(&topology)),
            lifecycle: &lifecycle,
        };
        let body = serde_json::to_vec(&body).map_err(|error| error.to_string())?;
        let reply = link.master().post(&body, limits::POST);
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

fn names(enrolment: &Enrolment) -> String {
    Names { host: enrolment.host_uuid().value(), master: &enrolment.master_url() }.to_string()
}
