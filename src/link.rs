//! Our side and the master's, as the files say: taken over anew when they change and prove usable, kept as they were
//! when they do not. Runs on the caller's thread at start, and on the heartbeat thread before each beat.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls::pki_types::ServerName;
use ureq::Agent;

use crate::bundle::{self, Bundle, Certificate};
use crate::enrolment::Enrolment;
use crate::error::{Error, chain};
use crate::files::Stamp;
use crate::identity::MasterIdentity;
use crate::limits;
use crate::master::Master;
use crate::panics::quietly;
use crate::repeats::Repeats;
use crate::stats::Stats;
use crate::verifier;

/// Everything that a beat needs to reach the master as this host.
#[derive(Debug)]
pub(crate) struct Link {
    enrolment: Enrolment,
    /// The rule given by the program; otherwise the enrolment's, otherwise the default.
    given: Option<MasterIdentity>,
    master: Master,
    certificate: Certificate,
    /// What the files looked like when they were taken over.
    stamps: Stamps,
    /// The last reason for not taking the files over, so that it is logged once.
    problem: Option<String>,
    /// All of them, so that reasons that alternate are logged less and less often.
    problems: Repeats,
    /// The days for which it was last said that the certificate will be valid, so that it is said once a day.
    said: Option<i64>,
    interrupt: Arc<Interrupt>,
}

impl Link {
    /// Loads and proves everything. An error names the file or key at fault.
    pub(crate) fn new(enrolment: Enrolment, given: Option<MasterIdentity>) -> Result<Self, Error> {
        let stamps = Stamps::of(&enrolment);
        let (master, certificate) = connectable(&enrolment, given)?;
        let interrupt = Arc::new(Interrupt::default());
        interrupt.watch(master.interrupter());
        Ok(Self {
            enrolment,
            given,
            master,
            certificate,
            stamps,
            problem: None,
            problems: Repeats::default(),
            said: None,
            interrupt,
        })
    }

    pub(crate) fn enrolment(&self) -> &Enrolment {
        &self.enrolment
    }

    /// Whose beats these are and where they go, for the log: the keys that a line begins with.
    pub(crate) fn names(&self) -> Names<'_> {
        Names { host: self.enrolment.host_uuid().value(), master: self.master.url() }
    }

    pub(crate) fn master(&self) -> &Master {
        &self.master
    }

    pub(crate) fn fingerprint(&self) -> &str {
        &self.certificate.fingerprint
    }

    /// The days that the certificate is valid for, where that is to be said: from 30 days before its end on, once a day.
    pub(crate) fn days_left(&mut self, now: SystemTime) -> Option<i64> {
        let days = days_until(self.certificate.expires?, now);
        if days > limits::EXPIRY_WARNING || self.said == Some(days) {
            return None;
        }
        self.said = Some(days);
        self.said
    }

    pub(crate) fn interrupt(&self) -> Arc<Interrupt> {
        Arc::clone(&self.interrupt)
    }

    /// Puts who we are and where the master is into the stats.
    pub(crate) fn describe(&self, stats: &mut Stats) {
        stats.host_uuid = Some(self.enrolment.host_uuid().value().clone());
        stats.url = Some(self.master.url().to_owned());
        stats.fingerprint = Some(self.certificate.fingerprint.clone());
        stats.certificate_expires = self.certificate.expires;
    }

    /// Looks at the files: four `stat`s when nothing has changed. Whether something new was taken over.
    ///
    /// The bundle's files are written one after another. What does not fit yet is looked at again next time, and the
    /// old pair goes on meanwhile.
    pub(crate) fn refresh(&mut self) -> bool {
        let stamps = Stamps::of(&self.enrolment);
        if stamps == self.stamps {
            return false;
        }
        match self.take_over() {
            Ok(()) => {
                // Of before the loading: what changed in between is seen next time.
                self.stamps = stamps;
                self.problem = None;
                true
            }
            Err(error) => {
                let problem = chain(&error);
                if self.problem.as_ref() != Some(&problem) {
                    if self.problems.count("credentials", &problem, Instant::now()).is_some() {
                        let (names, fingerprint) = (self.names(), self.fingerprint());
                        quietly(|| {
                            log::warn!(
                                "changed credentials are not usable, keeping the old ones: {names} \
                             fingerprint={fingerprint} error={problem:?}"
                            )
                        });
                    }
                    self.problem = Some(problem);
                }
                false
            }
        }
    }

    /// Whether the ini and the bundle do not exist. What cannot be looked at may exist, and so may what a symlink leads to.
    pub(crate) fn files_are_gone(&self) -> bool {
        let dir = self.enrolment.agent_dir().value();
        let is_gone = |path: &Path| fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
        self.enrolment.ini().is_none_or(is_gone)
            && [bundle::CA, bundle::CERTIFICATE, bundle::KEY].iter().all(|name| is_gone(&dir.join(name)))
    }

    /// Makes the connection anew from the files: after a panic the old one may be in any state.
    pub(crate) fn renew(&mut self) -> Result<(), Error> {
        self.take_over()
    }

    fn take_over(&mut self) -> Result<(), Error> {
        let enrolment = self.enrolment.reload()?;
        let (master, certificate) = connectable(&enrolment, self.given)?;
        self.interrupt.watch(master.interrupter());
        (self.enrolment, self.master, self.certificate, self.said) = (enrolment, master, certificate, None);
        Ok(())
    }
}

/// `host=… master=…`
pub(crate) struct Names<'a> {
    pub(crate) host: &'a str,
    /// Its URL.
    pub(crate) master: &'a str,
}

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host={} master={}", self.host, self.master)
    }
}

fn connectable(enrolment: &Enrolment, given: Option<MasterIdentity>) -> Result<(Master, Certificate), Error> {
    let provider = verifier::provider();
    let bundle = Bundle::load(enrolment.agent_dir().value(), &provider)?;
    let (name, identity) = (server_name(enrolment)?, identity(enrolment, given));
    let judge = verifier::verifier(&bundle, identity, &name, &provider);
    let config = verifier::client_config(&bundle, judge, &provider)?;
    Ok((Master::new(enrolment, name, config), bundle.certificate))
}

/// The rule that holds: the program's, otherwise the enrolment's, otherwise the default.
pub(crate) fn identity(enrolment: &Enrolment, given: Option<MasterIdentity>) -> MasterIdentity {
    given.or_else(|| enrolment.master_identity().map(|found| *found.value())).unwrap_or_default()
}

/// The configured host, as TLS has it.
pub(crate) fn server_name(enrolment: &Enrolment) -> Result<ServerName<'static>, Error> {
    let host = enrolment.master_host();
    ServerName::try_from(host.value().clone())
        .map_err(|source| Error::config(host.provenance().to_string(), "is no host").because(source))
}

/// Whole days until then; below zero afterwards.
pub(crate) fn days_until(end: SystemTime, now: SystemTime) -> i64 {
    const DAY: u64 = 24 * 60 * 60;
    let days = |time: Duration| i64::try_from(time.as_secs() / DAY).unwrap_or(i64::MAX);
    end.duration_since(now).map_or_else(|over| -1 - days(over.duration()), days)
}

/// What the ini and the bundle looked like.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamps {
    ini: Option<Stamp>,
    bundle: [Stamp; 3],
}

impl Stamps {
    fn of(enrolment: &Enrolment) -> Self {
        Self { ini: enrolment.ini().map(Stamp::of), bundle: Bundle::stamps(enrolment.agent_dir().value()) }
    }
}

/// Interrupts a POST from another thread.
#[derive(Default)]
pub(crate) struct Interrupt(Mutex<Watched>);

#[derive(Default)]
struct Watched {
    agent: Option<Agent>,
    interrupted: bool,
}

impl Interrupt {
    /// Cuts the POST that is under way, and every later one.
    pub(crate) fn now(&self) {
        let mut watched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        watched.interrupted = true;
        if let Some(agent) = watched.agent.take() {
            agent.shutdown();
        }
    }

    fn watch(&self, agent: Agent) {
        let mut watched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if watched.interrupted {
            agent.shutdown();
        } else {
            watched.agent = Some(agent);
        }
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupt").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_whole_ones_and_negative_once_it_is_over() {
        let now = SystemTime::now();
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        assert_eq!([0, 23, 24, 49].map(|left| days_until(now + hours(left), now)), [0, 0, 1, 2]);
        assert_eq!([1, 23, 24].map(|ago| days_until(now - hours(ago), now)), [-1, -1, -2]);
    }
}
