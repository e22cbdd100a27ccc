//! Checks the connection to the master: its name, TCP, TLS, and one beat. Runs on the main thread.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustls::ClientConfig;
use rustls::client::ResolvesClientCert;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName};

use super::certificate::CertificateInfo;
use super::handshake::{self, HandshakeInfo, RecordingResolver, RecordingVerifier};
use super::steps::{Checklist, Step};
use crate::credentials::bundle::Bundle;
use crate::credentials::client;
use crate::credentials::enrolment::Enrolment;
use crate::credentials::server_name;
use crate::error::Error;
use crate::limits;
use crate::master::body::Body;
use crate::master::explain::{self, Explained, closed_on_our_certificate, explain, is_closed};
use crate::master::identity::MasterIdentity;
use crate::master::resolver::{LookupFailed, MasterResolver};
use crate::master::verifier;
use crate::master::{PostResult, Verdict};
use crate::status::Snapshot;
use crate::text::sanitize;

/// Each step needs the one before it. `bundle`: `None` if it is invalid.
pub(super) fn check(
    enrolment: &Enrolment,
    bundle: Option<&Bundle>,
    rule: MasterIdentity,
    snapshot: &Snapshot,
    list: &mut Checklist,
) -> Result<(), Error> {
    let (step, addresses) = name(enrolment);
    list.add(step);
    let probe = bundle.map(|bundle| MasterProbe::new(enrolment, bundle, rule)).transpose();
    let not_tried = || Step::not_tried("tls", "needs a connection and a valid bundle");
    let reached = ConnectionSteps::of(&addresses, |stream| match &probe {
        Ok(Some(probe)) => probe.handshake(stream),
        Ok(None) | Err(_) => not_tried(),
    });
    list.add(reached.tcp);
    let probe = probe?;
    let tls = reached.tls.unwrap_or_else(not_tried);
    let has_tls = tls.is_good();
    list.add(tls);
    list.add(match (&probe, snapshot.topology()) {
        // A beat without the topology makes the master order a rebuild.
        (Some(_), None) if has_tls => Step::not_tried("beat", "topology.db cannot be read"),
        (Some(probe), Some(_)) if has_tls => probe.beat(snapshot, &reached.addresses),
        _ => Step::not_tried("beat", "needs TLS"),
    });
    Ok(())
}

const CHECK_NAME: &str = "correct the master's name, check the DNS configuration of this host, or \
                          configure the master's IP address";

/// Resolves the master's name.
fn name(enrolment: &Enrolment) -> (Step, Vec<SocketAddr>) {
    let host = enrolment.master_host().value();
    let port = *enrolment.master_port().value();
    let since = Instant::now();
    match MasterResolver::new(host, port).addresses(limits::CONNECT) {
        Ok(addresses) if host.parse::<IpAddr>().is_ok() => {
            (Step::good("name", format!("{host} is an address; no lookup is needed")), addresses)
        }
        Ok(addresses) => {
            let ips: Vec<_> = addresses.iter().map(|address| address.ip().to_string()).collect();
            let message =
                format!("{host} is {}, looked up in {}", ips.join(", "), ms(since.elapsed()));
            (Step::good("name", message).fact("addresses", ips), addresses)
        }
        Err(error) => {
            let advice = match &error {
                ureq::Error::Other(cause) => {
                    cause.downcast_ref().map(|failed: &LookupFailed| failed.advice)
                }
                _ => None,
            };
            let problem = format!("{host}: {}", explain(&error));
            (Step::bad("name", problem, advice.unwrap_or(CHECK_NAME)), Vec::new())
        }
    }
}

/// The steps TCP and TLS of the first address that works. If none does, of the first address that
/// accepts a connection.
struct ConnectionSteps {
    tcp: Step,
    tls: Option<Step>,
    /// All addresses, the one that works first.
    addresses: Vec<SocketAddr>,
}

impl ConnectionSteps {
    fn of(addresses: &[SocketAddr], handshake: impl Fn(TcpStream) -> Step) -> Self {
        let mut tcp = Step::not_tried("tcp", "needs an address");
        let mut tls = None;
        let mut failed = Vec::new();
        // The resolver returns at most sixteen.
        let share = limits::CONNECT / u32::try_from(addresses.len()).unwrap_or(1).max(1);
        for (position, address) in addresses.iter().enumerate() {
            let (connected, stream) = connect(*address, share);
            let tls_step = stream.map(&handshake);
            if tls_step.as_ref().is_some_and(Step::is_good) {
                let tcp = match failed.as_slice() {
                    [] => connected,
                    // `run` also tries the addresses in turn.
                    failed => connected.advise(format!(
                        "check the addresses that failed before: {}",
                        failed.join("; ")
                    )),
                };
                let mut addresses = addresses.to_vec();
                addresses.rotate_left(position);
                return Self { tcp, tls: tls_step, addresses };
            }
            failed.push(match &tls_step {
                Some(step) => format!("{address}: {}", step.message()),
                None => connected.message().to_owned(),
            });
            if tls.is_none() {
                tcp = connected;
                tls = tls_step;
            }
        }
        Self { tcp, tls, addresses: addresses.to_vec() }
    }
}

fn connect(address: SocketAddr, timeout: Duration) -> (Step, Option<TcpStream>) {
    let since = Instant::now();
    let connected = TcpStream::connect_timeout(&address, timeout);
    let took = since.elapsed();
    let step = match &connected {
        Ok(_) => Step::good("tcp", format!("connected to {address} in {}", ms(took)))
            .fact("ms", millis(took)),
        Err(error) => Step::bad("tcp", format!("{address}: {error}"), connect_advice(error)),
    };
    (step.fact("address", address.to_string()), connected.ok())
}

fn connect_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionRefused => {
            "start the master's swarm controller, or correct the master's port"
        }
        ErrorKind::InvalidInput | ErrorKind::AddrNotAvailable | ErrorKind::Unsupported => {
            "correct the master's host: this host cannot connect to this kind of address"
        }
        _ => match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS) => {
                "raise the limits of this host: no socket is left"
            }
            _ => "check the route to the master, and its firewalls",
        },
    }
}

/// The advice if the peer requests no certificate. The master always does.
const NOT_REQUESTED: &str = "it requested no certificate from this host, but the master does: \
                             let a proxy in front of the master pass TLS through, or make the \
                             swarm controller require client certificates";

/// Why the rules `name` and `host` accept the master's own certificate.
const OWN: &str = "issued by ca.crt, with swarmctl as common name and DNS name";

/// Connects to the master as `run` does, and records the handshake.
struct MasterProbe<'a> {
    enrolment: &'a Enrolment,
    bundle: &'a Bundle,
    rule: MasterIdentity,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
    verifier: Arc<RecordingVerifier>,
    resolver: Arc<RecordingResolver>,
}

impl<'a> MasterProbe<'a> {
    fn new(
        enrolment: &'a Enrolment,
        bundle: &'a Bundle,
        rule: MasterIdentity,
    ) -> Result<Self, Error> {
        let name = server_name(enrolment)?;
        let inner = verifier::verifier(&bundle.roots, rule, &name);
        let recording = Arc::new(RecordingVerifier::new(inner));
        let config = verifier::client_config(
            &bundle.identity,
            Arc::clone(&recording) as Arc<dyn ServerCertVerifier>,
        )?;
        let mut config = ClientConfig::clone(&config);
        let resolver =
            Arc::new(RecordingResolver::new(Arc::clone(&config.client_auth_cert_resolver)));
        config.client_auth_cert_resolver = Arc::clone(&resolver) as Arc<dyn ResolvesClientCert>;
        Ok(Self {
            enrolment,
            bundle,
            rule,
            name,
            config: Arc::new(config),
            verifier: recording,
            resolver,
        })
    }

    /// The step `tls`: the certificate of the peer, and whether the rule accepts it.
    fn handshake(&self, stream: TcpStream) -> Step {
        self.resolver.reset();
        self.verifier.reset();
        let result = handshake::handshake(&self.config, &self.name, stream);
        let presented = self.verifier.presented();
        let described = presented.as_ref().and_then(|der| CertificateInfo::of(der).ok());
        let now = SystemTime::now();
        let peer = described.as_ref().map_or_else(String::new, |peer| {
            format!("; {} for {}, {}", peer.subject, peer.names(), peer.validity(now))
        });
        let step = match result {
            Ok(HandshakeInfo { version, took }) => {
                let took_ms = ms(took);
                let rule = self.rule;
                let reason = self.reason(presented.as_ref());
                let message =
                    format!("{version} in {took_ms}{peer}; accepted by the rule {rule}: {reason}");
                self.advise(Step::good("tls", message), described.as_ref(), now)
                    .fact("version", version)
                    .fact("ms", millis(took))
            }
            Err(error) => {
                let is_closed = self.resolver.was_requested() && is_closed(&error);
                let Explained { text, advice } = if is_closed {
                    closed_on_our_certificate()
                } else {
                    explain::handshake(&error)
                };
                Step::bad("tls", format!("{}{peer}", sanitize(&text)), advice)
                    .fact("our_fingerprint", self.bundle.certificate.fingerprint.as_str())
            }
        };
        let step = step.fact("rule", self.rule.to_string());
        match described {
            Some(described) => described.facts(step, now),
            None => step,
        }
    }

    /// Adds what to do about a peer whose certificate was accepted.
    fn advise(&self, step: Step, peer: Option<&CertificateInfo>, now: SystemTime) -> Step {
        match peer {
            _ if !self.resolver.was_requested() => step.advise(NOT_REQUESTED),
            // The rule is a fingerprint, which does not check dates.
            Some(peer) if !peer.is_valid(now) => step.advise(
                "renew the master's certificate: this rule ignores its dates, but other agents do \
                 not",
            ),
            Some(peer) if peer.expires_soon(now) => {
                step.advise("renew the master's certificate before it expires")
            }
            _ => step,
        }
    }

    /// Why the rule accepts the certificate.
    fn reason(&self, presented: Option<&CertificateDer<'static>>) -> String {
        let host = self.enrolment.master_host().value();
        let is_masters_own = presented.is_some_and(|der| verifier::is_masters_own(der).is_ok());
        match self.rule {
            MasterIdentity::Name => OWN.to_owned(),
            MasterIdentity::Host if is_masters_own => OWN.to_owned(),
            MasterIdentity::Host => {
                format!("issued by ca.crt for {host}; a worker's certificate could be, too")
            }
            MasterIdentity::AnyFromCa => "issued by ca.crt; its names are not checked".to_owned(),
            MasterIdentity::Fingerprint(_) => "its fingerprint matches".to_owned(),
            MasterIdentity::PublicCa => format!("publicly trusted, for {host}"),
        }
    }

    /// Sends one beat as `run` does, without deltas.
    fn beat(&self, snapshot: &Snapshot, addresses: &[SocketAddr]) -> Step {
        let host = self.enrolment.host_uuid().value();
        let body = match serde_json::to_vec(&Body::of(host, snapshot, &[])) {
            Ok(body) => body,
            Err(error) => {
                let problem = format!("nothing was sent: the body cannot be serialized: {error}");
                return Step::bad("beat", problem, CHECK_CONTENTS);
            }
        };
        let master = client(self.enrolment, &self.name, &self.config);
        master.use_addresses(addresses);
        let PostResult { verdict, class, detail, took, resumed, .. } =
            master.post(&body, limits::POST);
        let fingerprint = &self.bundle.certificate.fingerprint;
        let session = if resumed { "session resumed" } else { "new session" };
        let result = match verdict {
            Verdict::NoResponse => format!("{class} after {}", ms(took)),
            _ => format!("{class} in {}, {session}", ms(took)),
        };
        let (meaning, advice) = explain_verdict(verdict, &class, fingerprint);
        let step = match advice {
            None => Step::good("beat", format!("{result}: {meaning}")),
            Some(advice) if detail.is_empty() => {
                Step::bad("beat", format!("{result}: {meaning}"), advice)
            }
            Some(advice) => Step::bad("beat", format!("{result}: {meaning}: {detail}"), advice),
        };
        step.fact("class", class)
            .fact("ms", millis(took))
            .fact("resumed", resumed)
            .fact("fingerprint", fingerprint.as_str())
    }
}

const WRONG_SERVER: &str =
    "check that DECNET's swarm controller listens at this address, and that the port is right";
const CHECK_CONTENTS: &str = "check the contents of the state file and of topology.db; until then \
                              run sends beats without a status";

/// What the end of a beat means, and what to do if it was not accepted.
fn explain_verdict(
    verdict: Verdict,
    class: &str,
    fingerprint: &str,
) -> (&'static str, Option<String>) {
    let (meaning, advice) = match verdict {
        Verdict::Accepted => return ("the master accepted the beat", None),
        Verdict::HostRejected if class == "http-404" => (
            "the master does not know this host",
            "enrol this host again: it was never enrolled there, or was decommissioned; if it is \
             enrolled, check that this master's swarm controller listens at this address",
        ),
        Verdict::HostRejected => {
            let advice = format!(
                "compare sha256 {fingerprint} with the master's record of this host, or enrol it \
                 again; a proxy in front of the master must pass TLS through, otherwise the \
                 master sees the proxy's certificate"
            );
            return ("the master does not accept this host's certificate", Some(advice));
        }
        Verdict::BodyRejected | Verdict::RetryLater(_) => explain_answer(verdict, class),
        Verdict::NoResponse => explain_no_response(class),
    };
    (meaning, Some(advice.to_owned()))
}

fn explain_answer(verdict: Verdict, class: &str) -> (&'static str, &'static str) {
    match class {
        "http-413" => (
            "the body is too large",
            "let the proxy in front of the master accept larger bodies; until then run sends \
             beats without a status",
        ),
        // nginx answers so if it terminates TLS and requires a certificate.
        "http-400" => (
            "the request was rejected",
            "if the answer mentions certificates, let the proxy in front of the master pass TLS \
             through; otherwise check the contents of the state file and of topology.db",
        ),
        "http-502" | "http-503" | "http-504" => (
            "the master cannot accept beats now",
            "check the master's log; a proxy in front of the master must reach it and pass TLS \
             through",
        ),
        "http-408" | "http-425" | "http-429" => (
            "the master cannot accept beats now",
            "wait; run tries again at the time that the answer names",
        ),
        class if class.starts_with("http-5") => {
            ("the master failed", "check the master's log; run tries again")
        }
        _ if verdict == Verdict::BodyRejected => ("the master rejected the body", CHECK_CONTENTS),
        _ => ("the answer is not from a DECNET master", WRONG_SERVER),
    }
}

fn explain_no_response(class: &str) -> (&'static str, &'static str) {
    match class {
        "invalid-response" => ("the server does not speak HTTP/1.1", WRONG_SERVER),
        "tls" => {
            ("no answer: TLS failed", "see the step tls, and the master's log; run tries again")
        }
        "dns" | "timeout-resolve" => ("the master's name cannot be resolved", CHECK_NAME),
        "refused" => (
            "the connection was refused: nothing listens there any more",
            "start the master's swarm controller; run tries again",
        ),
        "unreachable" | "timeout-connect" => (
            "the master cannot be reached",
            "check the route to the master, and its firewalls; run tries again",
        ),
        _ => ("no answer", "check the master's log, and the network; run tries again"),
    }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", millis(time))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use serde_json::json;

    use super::*;
    use crate::cli::log_line::Style;
    use crate::loopback::LoopbackMaster;

    #[test]
    fn next_address_is_tried_after_a_failed_handshake() {
        let [bad, good] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let [bad, good] = [&bad, &good].map(|listener| listener.local_addr().unwrap());
        let handshake = |stream: TcpStream| match stream.peer_addr().unwrap() == good {
            true => Step::good("tls", "TLS 1.3"),
            false => Step::bad("tls", "connection-closed", ""),
        };
        let reached = ConnectionSteps::of(&[closed, bad, good], handshake);
        assert!(reached.tcp.is_good() && reached.tls.unwrap().is_good());
        assert_eq!(
            reached.addresses,
            [good, closed, bad],
            "the beat uses the address that works first"
        );
        let text = reached.tcp.text(Style::Plain, None);
        assert!(text.contains(&format!("{closed}: Connection refused")), "{text}");
        assert!(text.contains(&format!("{bad}: connection-closed")), "{text}");
        // None works: the steps are those of the first that accepts a connection.
        let reached = ConnectionSteps::of(&[closed, bad], handshake);
        assert!(reached.tcp.is_good() && reached.tls.is_some_and(|tls| !tls.is_good()));
    }

    #[test]
    fn beat_uses_the_address_of_the_handshake_without_another_lookup() {
        let dir = tempfile::tempdir().unwrap();
        let master = LoopbackMaster::start().unwrap();
        let worker = master.enrol(dir.path()).unwrap();
        let bundle = Bundle::load(dir.path()).unwrap();
        // A name that cannot be resolved.
        let enrolment = Enrolment::new(&worker.uuid, "nowhere.invalid", dir.path()).unwrap();
        let probe = MasterProbe::new(&enrolment, &bundle, MasterIdentity::Name).unwrap();
        let step = probe.beat(&Snapshot::new(&json!({"deployed": false})), &[master.address()]);
        assert!(step.is_good(), "{}", step.message());
    }

    #[test]
    fn each_class_without_an_answer_has_advice() {
        for (class, advice) in [
            ("dns", "correct the master's name"),
            ("timeout-resolve", "correct the master's name"),
            ("refused", "start the master's swarm controller"),
            ("unreachable", "check the route"),
            ("timeout-connect", "check the route"),
            ("tls", "see the step tls"),
            ("invalid-response", "that the port is right"),
            ("connection-closed", "check the master's log"),
        ] {
            let (_, found) = explain_verdict(Verdict::NoResponse, class, "");
            assert!(
                found.as_ref().is_some_and(|found| found.contains(advice)),
                "{class}: {found:?}"
            );
        }
    }
}
