//! Resolves the master's host. An IP address needs no lookup. A name is looked up on a separate
//! thread, because the system's resolver takes no deadline. The result is used until a connection
//! to it fails, or for [`limits::RESOLVE_AGAIN`].
//!
//! Called on the heartbeat thread. At most one lookup runs at a time. A beat with a cached address
//! starts no lookup.

use std::error::Error;
use std::fmt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// ureq's `MAX_ADDRS`. Pushing more addresses panics.
const MOST_ADDRESSES: usize = 16;

/// The lookup of the host's name failed, or found no address.
///
/// The source is the error of the system's resolver. The standard library passes on only its text.
#[derive(Debug)]
pub(crate) struct LookupFailed {
    problem: String,
    source: Option<io::Error>,
    /// What the operator can do.
    #[cfg_attr(not(feature = "cli"), expect(dead_code, reason = "`check` shows it"))]
    pub(crate) advice: &'static str,
}

const CHECK_DNS: &str = "correct the master's name, check the DNS configuration of this host, or \
                         configure the master's IP address";

impl fmt::Display for LookupFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)
    }
}

impl Error for LookupFailed {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_ref().map(|source| source as &(dyn Error + 'static))
    }
}

/// Resolves the master's host. Clones share a cache.
#[derive(Clone, Debug)]
pub(crate) struct MasterResolver {
    host: String,
    port: u16,
    cache: Arc<Mutex<Cache>>,
}

#[derive(Debug, Default)]
struct Cache {
    addresses: Vec<SocketAddr>,
    /// When the addresses were looked up. `None`: the next request looks the name up again.
    fresh_since: Option<Instant>,
    /// The address of the last connection.
    current: Option<SocketAddr>,
    /// The address that is tried first: that of the last connection, or the next one after that
    /// connection failed.
    first: Option<SocketAddr>,
    /// A lookup that has not returned yet.
    pending: Option<Receiver<io::Result<Vec<SocketAddr>>>>,
}

impl MasterResolver {
    pub(crate) fn new(host: &str, port: u16) -> Self {
        Self { host: host.to_owned(), port, cache: Arc::default() }
    }

    /// Records that a TCP connection to this address was opened.
    pub(crate) fn connected_to(&self, address: SocketAddr) {
        let mut cache = self.lock();
        cache.current = Some(address);
        cache.first = Some(address);
    }

    /// Records that the current address is bad: a POST to it failed, or its answers are bad. The
    /// next request looks the name up again and starts with the address after it.
    pub(crate) fn report_failure(&self) {
        let mut cache = self.lock();
        cache.fresh_since = None;
        cache.start_with_the_next();
    }

    /// Makes the next request look the name up again.
    pub(crate) fn look_up_again(&self) {
        self.lock().fresh_since = None;
    }

    /// The addresses of the host, in the order in which they are tried. Waits for a lookup up to
    /// `timeout`.
    pub(crate) fn addresses(&self, timeout: Duration) -> Result<Vec<SocketAddr>, ureq::Error> {
        if let Ok(fixed) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(fixed, self.port)]);
        }
        let mut cache = self.lock();
        if cache.fresh_since.is_some_and(|since| since.elapsed() < limits::RESOLVE_AGAIN) {
            return Ok(cache.in_order());
        }
        match self.look_up(&mut cache.pending, timeout) {
            Ok(addresses) => {
                cache.addresses = addresses;
                cache.fresh_since = Some(Instant::now());
                Ok(cache.in_order())
            }
            Err(error) if cache.addresses.is_empty() => Err(error),
            Err(error) => {
                let problem = http_problem(&error);
                quietly(|| {
                    log::debug!(
                        "name lookup failed, using the cached address: master={} error={problem:?}",
                        self.host
                    );
                });
                // The cached addresses count as fresh again. Otherwise every beat would wait for a
                // DNS server that does not answer. If they fail, `report_failure` requests a new
                // lookup.
                cache.fresh_since = Some(Instant::now());
                Ok(cache.in_order())
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the pending lookup, or starts one and waits for it.
    fn look_up(
        &self,
        pending: &mut Option<Receiver<io::Result<Vec<SocketAddr>>>>,
        timeout: Duration,
    ) -> Result<Vec<SocketAddr>, ureq::Error> {
        let lookup = match mem::take(pending) {
            Some(lookup) => lookup,
            None => self.spawn_lookup().map_err(|source| self.not_started(source))?,
        };
        match lookup.recv_timeout(timeout) {
            Ok(Ok(addresses)) if addresses.is_empty() => {
                Err(self.failed("has no address", None, CHECK_DNS))
            }
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(source)) => {
                // The standard library drops the resolver's error code. This is glibc's text for
                // `EAI_AGAIN`.
                let advice = if source.to_string().contains("Temporary failure") {
                    "check the DNS configuration of this host, as no name server answers, or \
                     configure the master's IP address"
                } else {
                    CHECK_DNS
                };
                Err(self.failed("could not be looked up", Some(source), advice))
            }
            Err(RecvTimeoutError::Timeout) => {
                *pending = Some(lookup);
                Err(ureq::Error::Timeout(Timeout::Resolve))
            }
            Err(RecvTimeoutError::Disconnected) => {
                let problem = "could not be looked up: the lookup ended without a result";
                Err(self.failed(problem, None, CHECK_DNS))
            }
        }
    }

    fn not_started(&self, source: io::Error) -> ureq::Error {
        let problem = "could not be looked up: cannot start a thread for the lookup";
        let advice =
            "raise the limit of threads on this host, or configure the master's IP address";
        self.failed(problem, Some(source), advice)
    }

    fn failed(
        &self,
        problem: &str,
        source: Option<io::Error>,
        advice: &'static str,
    ) -> ureq::Error {
        let problem = format!("the name {} {problem}", sanitize(&self.host));
        ureq::Error::Other(Box::new(LookupFailed { problem, source, advice }))
    }

    fn spawn_lookup(&self) -> io::Result<Receiver<io::Result<Vec<SocketAddr>>>> {
        let (sender, receiver) = bounded(1);
        let host = self.host.clone();
        let port = self.port;
        thread::Builder::new().name("decnet-resolve".to_owned()).spawn(move || {
            let addresses = (host.as_str(), port)
                .to_socket_addrs()
                .map(|addresses| addresses.take(MOST_ADDRESSES).collect());
            // The receiver was dropped if the client was replaced or the heartbeat stopped.
            let _ = sender.send(addresses);
        })?;
        Ok(receiver)
    }
}

impl MasterResolver {
    /// Fills the cache as if the name had just been looked up.
    #[cfg(any(test, feature = "cli"))]
    pub(crate) fn set_addresses(&self, addresses: &[SocketAddr]) {
        let mut cache = self.lock();
        cache.addresses = addresses.to_vec();
        cache.fresh_since = Some(Instant::now());
    }

    #[cfg(test)]
    pub(crate) fn is_fresh(&self) -> bool {
        self.lock().fresh_since.is_some()
    }
}

impl Cache {
    fn start_with_the_next(&mut self) {
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
        let timeout = match timeout.after {
            time::Duration::Exact(timeout) => timeout,
            time::Duration::NotHappening => limits::CONNECT,
        };
        let mut resolved = self.empty();
        self.addresses(timeout)?
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
    fn ip_address_needs_no_lookup() {
        for host in ["127.0.0.1", "::1"] {
            let resolver = MasterResolver::new(host, 1);
            assert_eq!(
                resolver.addresses(Duration::ZERO).unwrap(),
                [SocketAddr::new(host.parse().unwrap(), 1)]
            );
            assert!(resolver.lock().pending.is_none());
        }
    }

    #[test]
    fn name_is_looked_up_once_and_cached() {
        let resolver = MasterResolver::new("localhost", 7);
        let first = resolver.addresses(Duration::from_secs(5)).unwrap();
        assert!(!first.is_empty() && first.iter().all(|address| address.port() == 7));
        assert_eq!(
            resolver.addresses(Duration::ZERO).unwrap(),
            first,
            "a second lookup could not finish within a timeout of zero"
        );
    }

    #[test]
    fn cached_address_is_used_while_the_lookup_fails() {
        let resolver = MasterResolver::new("nowhere.invalid", 7);
        let cached = vec![SocketAddr::from(([127, 0, 0, 1], 7))];
        resolver.lock().addresses = cached.clone();
        let (_sender, silent) = bounded(1);
        resolver.lock().pending = Some(silent);
        assert_eq!(resolver.addresses(Duration::ZERO).unwrap(), cached);
        assert!(resolver.lock().pending.is_some(), "a later request waits for the same lookup");
        assert!(resolver.is_fresh(), "the next beat does not wait for it");
        resolver.report_failure();
        assert!(!resolver.is_fresh(), "after a failure it does");
    }

    #[test]
    fn address_after_the_failed_one_is_tried_first() {
        let resolver = MasterResolver::new("nowhere.invalid", 7);
        let [a, b, c] = [1, 2, 3].map(|last| SocketAddr::from(([127, 0, 0, last], 7)));
        let fresh = |addresses: &[SocketAddr]| resolver.set_addresses(addresses);
        let order = || resolver.addresses(Duration::ZERO).unwrap();
        fresh(&[a, b, c]);
        assert_eq!(order(), [a, b, c]);
        resolver.report_failure();
        fresh(&[a, b, c]);
        assert_eq!(order(), [a, b, c], "no connection was opened before the failure");
        for (failed, next) in [(a, [b, c, a]), (b, [c, a, b]), (c, [a, b, c])] {
            resolver.connected_to(failed);
            resolver.report_failure();
            fresh(&[a, b, c]);
            assert_eq!(order(), next);
        }
        resolver.connected_to(b);
        assert_eq!(order(), [b, c, a], "the connected address stays first");
        fresh(&[c, a]);
        assert_eq!(order(), [c, a], "unless the name no longer has that address");
    }

    #[test]
    fn lookup_errors_are_of_class_dns_and_name_the_cause() {
        let looked_up = |result: Option<io::Result<Vec<SocketAddr>>>| {
            let resolver = MasterResolver::new("nowhere.invalid", 7);
            let (sender, pending) = bounded(1);
            result.into_iter().for_each(|result| sender.send(result).unwrap());
            drop(sender);
            resolver.lock().pending = Some(pending);
            resolver.addresses(Duration::ZERO).unwrap_err()
        };
        let no_thread = io::Error::from_raw_os_error(libc::EAGAIN);
        for (error, text) in [
            (
                looked_up(Some(Err(io::Error::other("no such name")))),
                "could not be looked up: no such name",
            ),
            (looked_up(Some(Ok(Vec::new()))), "has no address"),
            (looked_up(None), "could not be looked up: the lookup ended without a result"),
            (
                MasterResolver::new("nowhere.invalid", 7).not_started(no_thread),
                "could not be looked up: cannot start a thread for the lookup: Resource temporarily unavailable (os error 11)",
            ),
        ] {
            assert_eq!(explain::class(&error), "dns");
            assert_eq!(explain::explain(&error), format!("the name nowhere.invalid {text}"));
        }
    }

    #[test]
    fn lookup_timeout_is_named_if_no_address_is_cached() {
        let resolver = MasterResolver::new("nowhere.invalid", 7);
        let (_sender, silent) = bounded(1);
        resolver.lock().pending = Some(silent);
        assert_eq!(resolver.addresses(Duration::ZERO).unwrap_err().to_string(), "timeout: resolve");
    }
}
