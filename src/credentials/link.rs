//! The connection to the master as this host. Runs on the heartbeat thread, and opens no file.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ureq::Agent;

use crate::credentials::Credentials;
use crate::limits;
use crate::master::MasterClient;
use crate::stats::Stats;

/// Everything that a beat needs to reach the master.
#[derive(Debug)]
pub(crate) struct MasterLink {
    access: Credentials,
    master: MasterClient,
    /// The days for which it was last said that the certificate will be valid, so that it is said once a day.
    said: Option<i64>,
    interrupt: Arc<PostInterrupt>,
}

impl MasterLink {
    pub(crate) fn new(access: Credentials) -> Self {
        let master = access.master();
        let interrupt = Arc::new(PostInterrupt::default());
        interrupt.watch(master.interrupter());
        Self { access, master, said: None, interrupt }
    }

    /// Whose beats these are.
    pub(crate) fn host(&self) -> &str {
        self.access.enrolment.host_uuid().value()
    }

    /// Whose beats these are and where they go, for the log: the keys that a line begins with.
    pub(crate) fn names(&self) -> LogKeys<'_> {
        LogKeys { host: self.host(), master: self.master.url() }
    }

    pub(crate) fn master(&self) -> &MasterClient {
        &self.master
    }

    pub(crate) fn fingerprint(&self) -> &str {
        &self.access.certificate.fingerprint
    }

    /// The days that the certificate is valid for, where that is to be said: from 30 days before its end on, once a day.
    pub(crate) fn days_left(&mut self, now: SystemTime) -> Option<i64> {
        let days = days_until(self.access.certificate.expires?, now);
        if days > limits::EXPIRY_WARNING || self.said == Some(days) {
            return None;
        }
        self.said = Some(days);
        self.said
    }

    pub(crate) fn interrupt(&self) -> Arc<PostInterrupt> {
        Arc::clone(&self.interrupt)
    }

    /// Puts who we are and where the master is into the stats.
    pub(crate) fn describe(&self, stats: &mut Stats) {
        stats.host_uuid = Some(self.host().to_owned());
        stats.url = Some(self.master.url().to_owned());
        stats.fingerprint = Some(self.fingerprint().to_owned());
        stats.certificate_expires = self.access.certificate.expires;
    }

    /// Changed credentials hold from the next POST on.
    pub(crate) fn take_over(&mut self, access: Credentials) {
        self.access = access;
        self.said = None;
        self.renew();
    }

    /// Makes the connection anew: after a panic the old one may be in any state.
    pub(crate) fn renew(&mut self) {
        self.master = self.access.master();
        self.interrupt.watch(self.master.interrupter());
    }
}

/// `host=… master=…`
pub(crate) struct LogKeys<'a> {
    pub(crate) host: &'a str,
    /// Its URL.
    pub(crate) master: &'a str,
}

impl fmt::Display for LogKeys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host={} master={}", self.host, self.master)
    }
}

/// Whole days until then; below zero afterwards.
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

impl fmt::Debug for PostInterrupt {
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
