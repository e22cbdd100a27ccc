//! The master's address. A fixed address needs nothing; a name is looked up on a thread of its own, since the system's
//! resolver cannot be given a deadline, and the last good answer serves until it fails.
//!
//! Called on the heartbeat thread. At most one lookup runs at a time, and a beat on a known address starts none.

use std::error::Error;
use std::fmt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use std::{io, mem};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use ureq::Timeout;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;
use ureq::unversioned::transport::time;

use crate::error::http_problem;
use crate::limits;
use crate::panics::quietly;
use crate::text::sanitize;

/// ureq's `MAX_ADDRS`: pushing more would panic.
const MOST_ADDRESSES: usize = 16;

/// The host's name has no address that is known here.
///
/// Its source says what the system's resolver said; of that there is only the text.
#[derive(Debug)]
pub(crate) struct LookupFailed {
    host: String,
    why: Why,
}

#[derive(Debug)]
enum Why {
    /// The resolver's answer, or the system's: there is no such name, or no name server answers.
    Refused(io::Error),
    NoAddress,
    /// There is no thread for it.
    NotStarted(io::Error),
    /// The thread has ended without an answer.
    Lost,
}

impl fmt::Display for LookupFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = sanitize(&self.host);
        match &self.why {
            Why::Refused(_) => write!(f, "the name {host} could not be looked up"),
            Why::NoAddress => write!(f, "the name {host} has no address"),
            Why::NotStarted(_) => {
                write!(
                    f,
                    "the name {host} could not be looked up: the system refused a thread for it"
                )
            }
            Why::Lost => write!(
                f,
                "the name {host} could not be looked up: the lookup ended without an answer"
            ),
        }
    }
}

impl Error for LookupFailed {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.why {
            Why::Refused(source) | Why::NotStarted(source) => Some(source),
            Why::NoAddress | Why::Lost => None,
        }
    }
}

#[cfg(feature = "cli")]
impl LookupFailed {
    /// What an operator may do about it.
    pub(crate) fn advice(&self) -> &'static str {
        match &self.why {
            // The resolver's code does not get through the standard library; this is its text in glibc.
            Why::Refused(source) if source.to_string().contains("Temporary failure") => {
                "see to the name service of this host, which does not answer, or name the master by its address"
            }
            Why::NotStarted(_) => {
                "raise the limit of threads of this host, or name the master by its address"
            }
            Why::Refused(_) | Why::NoAddress | Why::Lost => {
                "correct the master's name, see to the name service of this host, or name the master by its address"
            }
        }
    }
}

/// Resolves the one host that is ever asked for. Clones share what they know.
#[derive(Clone, Debug)]
pub(crate) struct MasterResolver {
    host: String,
    port: u16,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    addresses: Vec<SocketAddr>,
    /// When they were looked up; `None` when they have failed since.
    fresh_since: Option<Instant>,
    /// The address of the last connection.
    current: Option<SocketAddr>,
    /// The address that is tried first: the last one that could be connected to, or the one after it once it has failed.
    first: Option<SocketAddr>,
    /// A lookup that has not answered yet.
    pending: Option<Receiver<io::Result<Vec<SocketAddr>>>>,
}

impl MasterResolver {
    pub(crate) fn new(host: &str, port: u16) -> Self {
        Self { host: host.to_owned(), port, known: Arc::default() }
    }

    /// A connection to this address is there, whatever comes of it.
    pub(crate) fn connected_to(&self, address: SocketAddr) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        (known.current, known.first) = (Some(address), Some(address));
    }

    /// The last address did not serve: the next request looks the name up again, and begins with the address after it.
    pub(crate) fn distrust(&self) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.fresh_since = None;
        known.begin_with_the_next();
    }

    /// The next request looks the name up again. Where the last address answers badly, it begins with the one after it.
    pub(crate) fn look_up_again(&self, answers_badly: bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.fresh_since = None;
        if answers_badly {
            known.begin_with_the_next();
        }
    }

    /// What the host's addresses are, in the order in which they are to be tried, after waiting so long at the most for an
    /// answer.
    pub(crate) fn addresses(&self, patience: Duration) -> Result<Vec<SocketAddr>, ureq::Error> {
        if let Ok(fixed) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(fixed, self.port)]);
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.fresh_since.is_some_and(|since| since.elapsed() < limits::RESOLVE_AGAIN) {
            return Ok(known.in_order());
        }
        match self.look_up(&mut known.pending, patience) {
            Ok(addresses) => {
                known.addresses = addresses;
                known.fresh_since = Some(Instant::now());
                Ok(known.in_order())
            }
            Err(error) if known.addresses.is_empty() => Err(error),
            Err(error) => {
                let problem = http_problem(&error);
                quietly(|| {
                    log::debug!(
                        "name lookup failed, using the last good address: master={} error={problem:?}",
                        self.host
                    );
                });
                // For as long as a good answer, or every beat would wait for a DNS that is away. Where the address
                // does not serve, it is distrusted.
                known.fresh_since = Some(Instant::now());
                Ok(known.in_order())
            }
        }
    }

    /// Waits for the lookup that is under way, or for a new one.
    fn look_up(
        &self,
        pending: &mut Option<Receiver<io::Result<Vec<SocketAddr>>>>,
        patience: Duration,
    ) -> Result<Vec<SocketAddr>, ureq::Error> {
        let failed =
            |why| ureq::Error::Other(Box::new(LookupFailed { host: self.host.clone(), why }));
        let answer = match mem::take(pending) {
            Some(answer) => answer,
            None => self.spawn_lookup().map_err(|source| failed(Why::NotStarted(source)))?,
        };
        match answer.recv_timeout(patience) {
            Ok(Ok(addresses)) if addresses.is_empty() => Err(failed(Why::NoAddress)),
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(source)) => Err(failed(Why::Refused(source))),
            Err(RecvTimeoutError::Timeout) => {
                *pending = Some(answer);
                Err(ureq::Error::Timeout(Timeout::Resolve))
            }
            Err(RecvTimeoutError::Disconnected) => Err(failed(Why::Lost)),
        }
    }

    fn spawn_lookup(&self) -> io::Result<Receiver<io::Result<Vec<SocketAddr>>>> {
        let (sender, answer) = bounded(1);
        let (host, port) = (self.host.clone(), self.port);
        thread::Builder::new().name("decnet-resolve".to_owned()).spawn(move || {
            let found = (host.as_str(), port)
                .to_socket_addrs()
                .map(|found| found.take(MOST_ADDRESSES).collect());
            // Nobody waits any more: the master was replaced, or the agent stopped.
            let _ = sender.send(found);
        })?;
        Ok(answer)
    }
}

impl MasterResolver {
    /// As if the name had just been looked up.
    #[cfg(any(test, feature = "cli"))]
    pub(crate) fn know(&self, addresses: &[SocketAddr]) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        (known.addresses, known.fresh_since) = (addresses.to_vec(), Some(Instant::now()));
    }

    #[cfg(test)]
    pub(crate) fn is_fresh(&self) -> bool {
        self.known.lock().unwrap().fresh_since.is_some()
    }
}

impl Known {
    fn begin_with_the_next(&mut self) {
        let current = self.addresses.iter().position(|address| Some(*address) == self.current);
        if let Some(current) = current {
            self.first = self.addresses.get(current + 1).or(self.addresses.first()).copied();
        }
    }

    fn in_order(&self) -> Vec<SocketAddr> {
        let mut addresses = self.addresses.clone();
        let first = addresses.iter().position(|address| Some(*address) == self.first);
        addresses.rotate_left(first.unwrap_or(0));
        addresses
    }
}

impl Resolver for MasterResolver {
    fn resolve(
        &self,
        _: &Uri,
        _: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let patience = match timeout.after {
            time::Duration::Exact(patience) => patience,
            time::Duration::NotHappening => limits::CONNECT,
        };
        let mut resolved = self.empty();
        self.addresses(patience)?
            .into_iter()
            .take(MOST_ADDRESSES)
            .for_each(|address| resolved.push(address));
        Ok(resolved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::master::explain;

    #[test]
    fn a_fixed_address_needs_no_lookup() {
        for host in ["127.0.0.1", "::1"] {
            let resolver = MasterResolver::new(host, 1);
            assert_eq!(
                resolver.addresses(Duration::ZERO).unwrap(),
                [SocketAddr::new(host.parse().unwrap(), 1)]
            );
            assert!(resolver.known.lock().unwrap().pending.is_none());
        }
    }

    #[test]
    fn a_name_is_looked_up_once_and_kept() {
        let resolver = MasterResolver::new("localhost", 7);
        let first = resolver.addresses(Duration::from_secs(5)).unwrap();
        assert!(!first.is_empty() && first.iter().all(|address| address.port() == 7));
        assert_eq!(
            resolver.addresses(Duration::ZERO).unwrap(),
            first,
            "no second lookup could finish in no time"
        );
    }

    #[test]
    fn the_last_good_address_serves_while_the_lookup_fails() {
        let resolver = MasterResolver::new("nowhere.invalid", 7);
        let good = vec![SocketAddr::from(([127, 0, 0, 1], 7))];
        resolver.known.lock().unwrap().addresses = good.clone();
        let (_sender, silent) = bounded(1);
        resolver.known.lock().unwrap().pending = Some(silent);
        assert_eq!(resolver.addresses(Duration::ZERO).unwrap(), good);
        assert!(
            resolver.known.lock().unwrap().pending.is_some(),
            "the lookup under way is waited for next time"
        );
        assert!(
            resolver.known.lock().unwrap().fresh_since.is_some(),
            "and not by the very next beat"
        );
        resolver.distrust();
        assert!(
            resolver.known.lock().unwrap().fresh_since.is_none(),
            "unless the address has failed"
        );
    }

    #[test]
    fn after_a_failed_address_the_next_one_is_first() {
        let resolver = MasterResolver::new("nowhere.invalid", 7);
        let [a, b, c] = [1, 2, 3].map(|last| SocketAddr::from(([127, 0, 0, last], 7)));
        let fresh = |addresses: &[SocketAddr]| resolver.know(addresses);
        let order = || resolver.addresses(Duration::ZERO).unwrap();
        fresh(&[a, b, c]);
        assert_eq!(order(), [a, b, c]);
        resolver.distrust();
        fresh(&[a, b, c]);
        assert_eq!(order(), [a, b, c], "none has been connected to");
        for (failed, next) in [(a, [b, c, a]), (b, [c, a, b]), (c, [a, b, c])] {
            resolver.connected_to(failed);
            resolver.distrust();
            fresh(&[a, b, c]);
            assert_eq!(order(), next);
        }
        resolver.connected_to(b);
        assert_eq!(order(), [b, c, a], "one that serves is kept");
        fresh(&[c, a]);
        assert_eq!(order(), [c, a], "unless the name does not lead there any more");
    }

    #[test]
    fn each_way_to_no_address_is_of_class_name_and_says_why() {
        let looked_up = |answer: Option<io::Result<Vec<SocketAddr>>>| {
            let resolver = MasterResolver::new("nowhere.invalid", 7);
            let (sender, pending) = bounded(1);
            answer.into_iter().for_each(|answer| sender.send(answer).unwrap());
            drop(sender);
            resolver.known.lock().unwrap().pending = Some(pending);
            resolver.addresses(Duration::ZERO).unwrap_err()
        };
        let failed = |why| {
            ureq::Error::Other(Box::new(LookupFailed { host: "nowhere.invalid".to_owned(), why }))
        };
        let refused = || io::Error::from_raw_os_error(libc::EAGAIN);
        for (error, says) in [
            (
                looked_up(Some(Err(io::Error::other("no such name")))),
                "could not be looked up: no such name",
            ),
            (looked_up(Some(Ok(Vec::new()))), "has no address"),
            (looked_up(None), "could not be looked up: the lookup ended without an answer"),
            (
                failed(Why::NotStarted(refused())),
                "could not be looked up: the system refused a thread for it: Resource temporarily unavailable (os error 11)",
            ),
        ] {
            assert_eq!(explain::class(&error), "dns");
            assert_eq!(explain::explain(&error), format!("the name nowhere.invalid {says}"));
        }
    }

    #[test]
    fn without_a_last_good_address_the_timeout_names_itself() {
        let resolver = MasterResolver::new("nowhere.invalid", 7);
        let (_sender, silent) = bounded(1);
        resolver.known.lock().unwrap().pending = Some(silent);
        assert_eq!(resolver.addresses(Duration::ZERO).unwrap_err().to_string(), "timeout: resolve");
    }
}
