//! Readiness and the watchdog for systemd, or for any supervisor that speaks its protocol (sd_notify(3)). Runs on the
//! program's main thread.
//!
//! Of our own: the crate `sd-notify` knows no abstract sockets, and its sends wait for a supervisor that does not read.

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
    /// READY is to be sent with the next notification.
    owes_ready: bool,
    /// How long it was waited last for the supervisor to have room for READY.
    pause: Duration,
    problems: LogThrottle,
}

impl Systemd {
    /// What the environment says. Where it cannot be used, that is logged, once.
    pub(super) fn from_env() -> Self {
        let address =
            env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()).and_then(|name| {
                let address = address(&name);
                address
                    .inspect_err(|error| {
                        let (name, problem) =
                            (sanitize(&name.to_string_lossy()), error.to_string());
                        log::warn!(
                            "systemd cannot be notified: NOTIFY_SOCKET={name:?} error={problem:?}"
                        );
                    })
                    .ok()
            });
        Self { address, owes_ready: false, pause: limits::READY, problems: LogThrottle::default() }
    }

    pub(super) fn ready(&mut self) {
        self.owes_ready = true;
        self.notify("");
    }

    pub(super) fn alive(&mut self) {
        self.notify(ALIVE);
    }

    /// That it was ever ready is of no use any more.
    pub(super) fn stopping(&mut self) {
        self.owes_ready = false;
        self.notify(STOPPING);
    }

    /// Sends READY again if it could not be sent. For each beat, and for [`when_to_catch_up`](Self::when_to_catch_up).
    pub(super) fn catch_up(&mut self) {
        if self.owes_ready {
            self.notify("");
        }
    }

    /// Says when READY is to be sent again: the supervisor does not wait for a beat that is an hour away. Ever later, so that
    /// a socket that never works costs nothing.
    pub(super) fn when_to_catch_up(&mut self) -> Receiver<Instant> {
        if !self.owes_ready || self.address.is_none() {
            return never();
        }
        self.pause = self.pause.saturating_mul(2);
        after(self.pause)
    }

    /// Never waits: a notification for which the supervisor has no room fails. What fails each time is logged less and less
    /// often.
    fn notify(&mut self, state: &str) {
        let Some(address) = &self.address else { return };
        let states = if self.owes_ready { [READY, state].concat() } else { state.to_owned() };
        match send(address, states.as_bytes()) {
            Ok(()) => self.owes_ready = false,
            Err(error) => {
                let problem = sanitize(&error.to_string());
                if let Some(times) = self.problems.count("systemd", &problem, Instant::now()) {
                    log::warn!("systemd could not be notified: times={times} error={problem:?}");
                }
            }
        }
    }
}

/// To the address and not over a connection: a supervisor that starts anew has another socket there.
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
            "neither an absolute path nor an abstract socket",
        )),
    }
}

/// How often systemd is to hear that all is well: twice in the time after which it ends the service. `None`: it does not
/// watch this process.
pub(super) fn watchdog() -> Option<Duration> {
    let theirs = env::var_os("WATCHDOG_PID")
        .is_none_or(|pid| number(pid) == Some(u64::from(std::process::id())));
    let limit = env::var_os("WATCHDOG_USEC")
        .filter(|_| theirs)
        .and_then(number)
        .filter(|usec| *usec > 0)?;
    Some((Duration::from_micros(limit) / 2).max(limits::WATCHDOG))
}

fn number(text: OsString) -> Option<u64> {
    text.to_str()?.parse().ok()
}
