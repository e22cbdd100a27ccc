//! The credentials in use, with the client for the master. Runs on the heartbeat thread, and opens
//! no file.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use ureq::Agent;

use crate::credentials::Credentials;
use crate::limits;
use crate::master::MasterClient;
use crate::stats::Stats;

/// The credentials in use, and a client for the master that uses them.
#[derive(Debug)]
pub(crate) struct MasterLink {
    credentials: Credentials,
    master: MasterClient,
    /// The expiry that was logged last: it is logged once a day.
    logged_expiry: Option<Expiry>,
    interrupt: Arc<PostInterrupt>,
}

impl MasterLink {
    pub(crate) fn new(credentials: Credentials) -> Self {
        let master = credentials.master();
        let interrupt = Arc::new(PostInterrupt::default());
        interrupt.watch(master.interrupter());
        Self { credentials, master, logged_expiry: None, interrupt }
    }

    /// The host uuid.
    pub(crate) fn host(&self) -> &str {
        self.credentials.enrolment.host_uuid().value()
    }

    /// The keys with which a log line about this host begins.
    pub(crate) fn names(&self) -> LogKeys<'_> {
        LogKeys { host: self.host(), master: self.master.url() }
    }

    pub(crate) fn master(&self) -> &MasterClient {
        &self.master
    }

    pub(crate) fn fingerprint(&self) -> &str {
        &self.credentials.certificate.fingerprint
    }

    /// The certificate's expiry, if it is to be logged: once a day, from 30 days before it on.
    pub(crate) fn expiry_to_log(&mut self, now: SystemTime) -> Option<Expiry> {
        let expiry = Expiry::of(self.credentials.certificate.expires?, now);
        if !expiry.is_near() || self.logged_expiry == Some(expiry) {
            return None;
        }
        self.logged_expiry = Some(expiry);
        self.logged_expiry
    }

    /// Whether [`PostInterrupt::now`] was called.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupt.is_interrupted()
    }

    pub(crate) fn interrupt(&self) -> Arc<PostInterrupt> {
        Arc::clone(&self.interrupt)
    }

    /// Sets the host, the master's URL and the certificate in the stats.
    pub(crate) fn describe(&self, stats: &mut Stats) {
        stats.host_uuid = Some(self.host().to_owned());
        stats.url = Some(self.master.url().to_owned());
        stats.fingerprint = Some(self.fingerprint().to_owned());
        stats.certificate_expires = self.credentials.certificate.expires;
    }

    /// Uses changed credentials from the next POST on.
    pub(crate) fn replace_credentials(&mut self, credentials: Credentials) {
        self.credentials = credentials;
        self.logged_expiry = None;
        self.replace_client();
    }

    /// Replaces the client. After a panic the old one may be in an invalid state.
    pub(crate) fn replace_client(&mut self) {
        self.master = self.credentials.master();
        self.interrupt.watch(self.master.interrupter());
    }
}

/// `host=… master=…`
pub(crate) struct LogKeys<'a> {
    pub(crate) host: &'a str,
    /// The master's URL.
    pub(crate) master: &'a str,
}

impl fmt::Display for LogKeys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host={} master={}", self.host, self.master)
    }
}

/// The whole days until a certificate expires, or since it has expired. Neither is negative, so log
/// and `check` show the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expiry {
    DaysLeft(u64),
    DaysExpired(u64),
}

impl Expiry {
    pub(crate) fn of(expires: SystemTime, now: SystemTime) -> Self {
        let days = |time: Duration| time.as_secs() / (24 * 60 * 60);
        match expires.duration_since(now) {
            Ok(left) => Self::DaysLeft(days(left)),
            Err(over) => Self::DaysExpired(days(over.duration())),
        }
    }

    /// Whether this is to be reported.
    pub(crate) fn is_near(self) -> bool {
        !matches!(self, Self::DaysLeft(days) if days > limits::EXPIRY_WARNING)
    }
}

/// `days_left=9`
impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DaysLeft(days) => write!(f, "days_left={days}"),
            Self::DaysExpired(days) => write!(f, "days_expired={days}"),
        }
    }
}

/// Interrupts a POST from another thread.
#[derive(Debug, Default)]
pub(crate) struct PostInterrupt(Mutex<InterruptState>);

#[derive(Debug, Default)]
struct InterruptState {
    agent: Option<Agent>,
    interrupted: bool,
}

impl PostInterrupt {
    /// Interrupts the POST in progress, and every later one.
    pub(crate) fn now(&self) {
        let mut state = self.lock();
        state.interrupted = true;
        if let Some(agent) = state.agent.take() {
            agent.shutdown();
        }
    }

    fn is_interrupted(&self) -> bool {
        self.lock().interrupted
    }

    fn watch(&self, agent: Agent) {
        let mut state = self.lock();
        if state.interrupted {
            agent.shutdown();
        } else {
            state.agent = Some(agent);
        }
    }

    fn lock(&self) -> MutexGuard<'_, InterruptState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expiry_counts_whole_days() {
        let now = SystemTime::now();
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        for (left, days) in [(0, 0), (23, 0), (24, 1), (49, 2)] {
            assert_eq!(Expiry::of(now + hours(left), now), Expiry::DaysLeft(days));
        }
        for (ago, days) in [(1, 0), (23, 0), (24, 1)] {
            assert_eq!(Expiry::of(now - hours(ago), now), Expiry::DaysExpired(days));
        }
    }
}
