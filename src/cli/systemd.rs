//! Readiness and watchdog notifications for systemd, or for another supervisor with the protocol of
//! sd_notify(3). Runs on the main thread.
//!
//! The crate `sd-notify` does not support abstract sockets, and its sends block if the supervisor
//! does not read.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, after, never};

use crate::limits;
use crate::log_throttle::LogThrottle;
use crate::text::sanitize;

const READY: &str = "READY=1\n";
const STOPPING: &str = "STOPPING=1\n";
const ALIVE: &str = "WATCHDOG=1\n";

#[derive(Debug)]
pub(super) struct Systemd {
    /// `None`: there is no supervisor to notify.
    address: Option<SocketAddr>,
    /// The next notification carries READY.
    ready_pending: bool,
    /// The last pause before READY was sent again.
    pause: Duration,
    throttle: LogThrottle,
}

impl Systemd {
    /// Reads the socket's address from the environment. An invalid one is logged here, once.
    pub(super) fn from_env() -> Self {
        let name = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let address = name.and_then(|name| {
            let log_problem = |error: &io::Error| {
                let name = sanitize(&name.to_string_lossy());
                let problem = error.to_string();
                log::warn!("systemd cannot be notified: NOTIFY_SOCKET={name:?} error={problem:?}");
            };
            address(&name).inspect_err(log_problem).ok()
        });
        let throttle = LogThrottle::default();
        Self { address, ready_pending: false, pause: limits::READY, throttle }
    }

    pub(super) fn ready(&mut self) {
        self.ready_pending = true;
        self.notify("");
    }

    pub(super) fn alive(&mut self) {
        self.notify(ALIVE);
    }

    /// Also discards a READY that is still pending.
    pub(super) fn stopping(&mut self) {
        self.ready_pending = false;
        self.notify(STOPPING);
    }

    /// Sends READY again if that failed before. Called after each beat, and at the times of
    /// [`next_ready`](Self::next_ready).
    pub(super) fn retry_ready(&mut self) {
        if self.ready_pending {
            self.notify("");
        }
    }

    /// When READY is to be sent again: the supervisor does not wait for a beat that is an hour
    /// away. The pause doubles each time, so that a socket that never works costs little.
    pub(super) fn next_ready(&mut self) -> Receiver<Instant> {
        if !self.ready_pending || self.address.is_none() {
            return never();
        }
        self.pause = self.pause.saturating_mul(2);
        after(self.pause)
    }

    /// Never waits: if the supervisor's socket is full, the notification fails. Repeated failures
    /// are logged at a decreasing rate.
    fn notify(&mut self, state: &str) {
        let Some(address) = &self.address else { return };
        let states = if self.ready_pending { [READY, state].concat() } else { state.to_owned() };
        match send(address, states.as_bytes()) {
            Ok(()) => self.ready_pending = false,
            Err(error) => {
                let problem = sanitize(&error.to_string());
                self.throttle.log("systemd", &problem, |times| {
                    log::warn!("systemd could not be notified: times={times} error={problem:?}");
                });
            }
        }
    }
}

/// Sends to the address without a connection: a restarted supervisor has another socket there.
fn send(address: &SocketAddr, states: &[u8]) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(states, address).map(drop)
}

fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither an absolute path nor the name of an abstract socket",
        )),
    }
}

/// The time between two watchdog notifications: half of systemd's timeout. `None`: there is no
/// watchdog for this process.
pub(super) fn watchdog_interval() -> Option<Duration> {
    let is_for_us = env::var_os("WATCHDOG_PID")
        .is_none_or(|pid| number(pid) == Some(u64::from(std::process::id())));
    let timeout = env::var_os("WATCHDOG_USEC")
        .filter(|_| is_for_us)
        .and_then(number)
        .filter(|usec| *usec > 0)?;
    Some((Duration::from_micros(timeout) / 2).max(limits::WATCHDOG))
}

fn number(text: OsString) -> Option<u64> {
    text.to_str()?.parse().ok()
}
