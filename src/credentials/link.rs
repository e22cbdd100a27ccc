//! The credentials in use, with the client for the master. Runs on the heartbeat thread, and opens
//! no file.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
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
    /// The number of days that was last reported, so that each is reported once.
    reported_days: Option<i64>,
    interrupt: Arc<PostInterrupt>,
}

impl MasterLink {
    pub(crate) fn new(credentials: Credentials) -> Self {
        let master = credentials.master();
        let interrupt = Arc::new(PostInterrupt::default());
        interrupt.watch(master.interrupter());
        Self { credentials, master, reported_days: None, interrupt }
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

    /// The days until the certificate expires, if a warning is due: once a day from
    /// [`limits::EXPIRY_WARNING`] days before.
    pub(crate) fn days_left(&mut self, now: SystemTime) -> Option<i64> {
        let days = days_until(self.credentials.certificate.expires?, now);
        if days > limits::EXPIRY_WARNING || self.reported_days == Some(days) {
            return None;
        }
        self.reported_days = Some(days);
        self.reported_days
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
        self.reported_days = None;
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

/// Whole days until `end`. Negative after `end`.
pub(crate) fn days_until(end: SystemTime, now: SystemTime) -> i64 {
    const DAY: u64 = 24 * 60 * 60;
    let days = |time: Duration| i64::try_from(time.as_secs() / DAY).unwrap_or(i64::MAX);
    end.duration_since(now).map_or_else(|over| -1 - days(over.duration()), days)
}

/// Interrupts a POST from another thread.
#[derive(Default)]
pub(crate) struct PostInterrupt(Mutex<InterruptState>);

#[derive(Default)]
struct InterruptState {
    agent: Option<Agent>,
    interrupted: bool,
}

impl PostInterrupt {
    /// Interrupts the POST in progress, and every later one.
    pub(crate) fn now(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.interrupted = true;
        if let Some(agent) = state.agent.take() {
            agent.shutdown();
        }
    }

    fn watch(&self, agent: Agent) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.interrupted {
            agent.shutdown();
        } else {
            state.agent = Some(agent);
        }
    }
}

impl fmt::Debug for PostInterrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostInterrupt").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_rounded_down_and_negative_after_the_end() {
        let now = SystemTime::now();
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        assert_eq!([0, 23, 24, 49].map(|left| days_until(now + hours(left), now)), [0, 0, 1, 2]);
        assert_eq!([1, 23, 24].map(|ago| days_until(now - hours(ago), now)), [-1, -1, -2]);
    }
}
