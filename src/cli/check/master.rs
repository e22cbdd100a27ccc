//! The way to the master: its name, TCP, TLS, and one beat. Runs on the program's main thread.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustls::ClientConfig;
use rustls::client::ResolvesClientCert;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName};

use super::certificate::Described;
use super::handshake::{Asked, HandshakeInfo, RecordingVerifier, shake_hands};
use super::steps::{Checklist, Step};
use crate::credentials::bundle::Bundle;
use crate::credentials::client;
use crate::credentials::enrolment::Enrolment;
use crate::credentials::server_name;
use crate::error::Error;
use crate::limits;
use crate::master::body::Body;
use crate::master::explain::{Explained, closed_on_our_certificate, explain, handshake, is_closed};
use crate::master::identity::MasterIdentity;
use crate::master::resolver::{LookupFailed, MasterResolver};
use crate::master::verifier;
use crate::master::{PostResult, Verdict};
use crate::status::Snapshot;
use crate::text::sanitize;

/// Each step needs the one before it. `bundle`: `None` where it cannot be used.
pub(super) fn check(
    enrolment: &Enrolment,
    bundle: Option<&Bundle>,
    rule: MasterIdentity,
    snapshot: &Snapshot,
    list: &mut Checklist,
) -> Result<(), Error> {
    let (step, addresses) = name(enrolment);
    list.add(step);
    let way = bundle.map(|bundle| MasterProbe::new(enrolment, bundle, rule)).transpose();
    let not_tried =
        || Step::not_tried("tls", "it takes a connection, and a bundle that can be used");
    let reached = Reached::of(&addresses, |stream| match &way {
        Ok(Some(way)) => way.shake_hands(stream),
        Ok(None) | Err(_) => not_tried(),
    });
    list.add(reached.tcp);
    let way = way?;
    let tls = reached.tls.unwrap_or_else(not_tried);
    let shaken = tls.is_good();
    list.add(tls);
    list.add(match (&way, snapshot.topology()) {
        // The master would order the topology to be built again.
        (Some(_), None) if shaken => Step::not_tried("beat", "topology.db cannot be read"),
        (Some(way), Some(_)) if shaken => way.beat(snapshot, &reached.addresses),
        _ => Step::not_tried("beat", "it takes TLS"),
    });
    Ok(())
}

/// Where the master's name leads.
fn name(enrolment: &Enrolment) -> (Step, Vec<SocketAddr>) {
    let (host, port) = (enrolment.master_host().value(), *enrolment.master_port().value());
    let since = Instant::now();
    match MasterResolver::new(host, port).addresses(limits::CONNECT) {
        Ok(addresses) if host.parse::<IpAddr>().is_ok() => (
            Step::good("name", format!("{host} is an address, there is nothing to look up")),
            addresses,
        ),
        Ok(addresses) => {
            let ips: Vec<_> = addresses.iter().map(|address| address.ip().to_string()).collect();
            let says =
                format!("{host} is {}, looked up in {}", ips.join(", "), ms(since.elapsed()));
            (Step::good("name", says).fact("addresses", ips), addresses)
        }
        Err(error) => {
            let advice = match &error {
                ureq::Error::Other(cause) => cause.downcast_ref().map(LookupFailed::advice),
                _ => None,
            };
            let advice = advice.unwrap_or(
                "see to the name service of this host, or name the master by its address",
            );
            (Step::bad("name", format!("{host}: {}", explain(&error)), advice), Vec::new())
        }
    }
}

/// How TCP and TLS went on the first address that serves. If none does, on the first that could be connected to.
struct Reached {
    tcp: Step,
    tls: Option<Step>,
    /// All addresses, and first the one that serves.
    addresses: Vec<SocketAddr>,
}

impl Reached {
    fn of(addresses: &[SocketAddr], shake_hands: impl Fn(TcpStream) -> Step) -> Self {
        let (mut tcp, mut tls, mut failed) =
            (Step::not_tried("tcp", "it takes an address"), None, Vec::new());
        // There are sixteen at the most.
        let share = limits::CONNECT / u32::try_from(addresses.len()).unwrap_or(1).max(1);
        for (position, address) in addresses.iter().enumerate() {
            let (connected, stream) = connect(*address, share);
            let shaken = stream.map(&shake_hands);
            if shaken.as_ref().is_some_and(Step::is_good) {
                let tcp = match failed.as_slice() {
                    [] => connected,
                    // run connects in the same way, and after a failed handshake begins with the next address.
                    failed => connected.advise(format!(
                        "see to the addresses that failed before: {}",
                        failed.join("; ")
                    )),
                };
                let mut addresses = addresses.to_vec();
                addresses.rotate_left(position);
                return Self { tcp, tls: shaken, addresses };
            }
            failed.push(match &shaken {
                Some(step) => format!("{address}: {}", step.says()),
                None => connected.says().to_owned(),
            });
            if tls.is_none() {
                (tcp, tls) = (connected, shaken);
            }
        }
        Self { tcp, tls, addresses: addresses.to_vec() }
    }
}

fn connect(address: SocketAddr, within: Duration) -> (Step, Option<TcpStream>) {
    let since = Instant::now();
    match TcpStream::connect_timeout(&address, within) {
        Ok(stream) => {
            let took = since.elapsed();
            let step = Step::good("tcp", format!("{address} answers in {}", ms(took)));
            (step.fact("address", address.to_string()).fact("ms", millis(took)), Some(stream))
        }
        Err(error) => {
            let advice = match error.kind() {
                ErrorKind::ConnectionRefused => {
                    "start the master's swarm controller, or correct the master's port"
                }
                ErrorKind::InvalidInput | ErrorKind::AddrNotAvailable | ErrorKind::Unsupported => {
                    "correct the master's host: this host cannot connect to such an address"
                }
                _ if matches!(
                    error.raw_os_error(),
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS)
                ) =>
                {
                    "raise the limits of this host: it has no socket left"
                }
                _ => "see to the route to the master, and to the firewalls on it",
            };
            (
                Step::bad("tcp", format!("{address}: {error}"), advice)
                    .fact("address", address.to_string()),
                None,
            )
        }
    }
}

/// The master always asks.
const NOT_ASKED: &str = "it asked for no certificate of ours, which the master does: let a proxy in front of the master pass \
                         TLS through, or see that the swarm controller asks for client certificates";

/// Why the rules `name` and `host` accept the master's own certificate.
const OWN: &str = "it is of ca.crt, and its common name and a DNS name are swarmctl";

/// As the agent reaches the master, but for the witness.
struct MasterProbe<'a> {
    enrolment: &'a Enrolment,
    bundle: &'a Bundle,
    rule: MasterIdentity,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
    witness: Arc<RecordingVerifier>,
    asked: Arc<Asked>,
}

impl<'a> MasterProbe<'a> {
    fn new(
        enrolment: &'a Enrolment,
        bundle: &'a Bundle,
        rule: MasterIdentity,
    ) -> Result<Self, Error> {
        let (name, provider) = (server_name(enrolment)?, verifier::provider());
        let judge = verifier::verifier(&bundle.roots, rule, &name, &provider);
        let witness = Arc::new(RecordingVerifier::before(judge));
        let config = verifier::client_config(
            &bundle.identity,
            Arc::clone(&witness) as Arc<dyn ServerCertVerifier>,
            &provider,
        )?;
        let mut config = ClientConfig::clone(&config);
        let asked = Arc::new(Asked::before(Arc::clone(&config.client_auth_cert_resolver)));
        config.client_auth_cert_resolver = Arc::clone(&asked) as Arc<dyn ResolvesClientCert>;
        Ok(Self { enrolment, bundle, rule, name, config: Arc::new(config), witness, asked })
    }

    /// Who answers there, and who counts as the master.
    fn shake_hands(&self, stream: TcpStream) -> Step {
        self.asked.forget();
        self.witness.forget();
        let shaken = shake_hands(&self.config, &self.name, stream);
        let shown = self.witness.shown();
        let described = shown.as_ref().and_then(|shown| Described::of(shown).ok());
        let now = SystemTime::now();
        let who = described.as_ref().map_or_else(String::new, |shown| {
            format!("; {} for {}, {}", shown.subject, shown.names(), shown.validity(now))
        });
        let step = match shaken {
            Ok(HandshakeInfo { version, took }) => {
                let accepted = self.accepted_as(shown.as_ref());
                let step = Step::good(
                    "tls",
                    format!(
                        "{version} in {}{who}; accepted by {}: {accepted}",
                        ms(took),
                        self.rule
                    ),
                );
                let step = step.fact("version", version).fact("ms", millis(took));
                match described.as_ref() {
                    _ if !self.asked.was_asked() => step.advise(NOT_ASKED),
                    // It is pinned.
                    Some(shown) if !shown.is_valid(now) => step.advise(
                        "renew the master's certificate: its dates do not matter to this rule, and they do to other agents",
                    ),
                    Some(shown) if shown.ends_soon(now) => step.advise("renew the master's certificate in time"),
                    _ => step,
                }
            }
            Err(error) => {
                let Explained { text: says, advice } =
                    match self.asked.was_asked() && is_closed(&error) {
                        true => closed_on_our_certificate(),
                        false => handshake(&error),
                    };
                let step = Step::bad("tls", format!("{}{who}", sanitize(&says)), advice);
                step.fact("our_fingerprint", self.bundle.certificate.fingerprint.as_str())
            }
        };
        let step = step.fact("rule", self.rule.to_string());
        match described {
            Some(described) => described.facts(step, now),
            None => step,
        }
    }

    /// Which part of the rule it was that accepted the certificate.
    fn accepted_as(&self, shown: Option<&CertificateDer<'static>>) -> String {
        let host = self.enrolment.master_host().value();
        let is_masters_own = shown.is_some_and(|shown| verifier::is_masters_own(shown).is_ok());
        match self.rule {
            MasterIdentity::Name => OWN.to_owned(),
            MasterIdentity::Host if is_masters_own => OWN.to_owned(),
            MasterIdentity::Host => {
                format!("it is of ca.crt, and for {host}, as any worker's may be")
            }
            MasterIdentity::AnyFromCa => "it is of ca.crt, and its names do not matter".to_owned(),
            MasterIdentity::Fingerprint(_) => "it is the pinned one".to_owned(),
            MasterIdentity::PublicCa => format!("it is publicly trusted, and for {host}"),
        }
    }

    /// One beat as `run` sends it, without deltas: these are for `run`.
    fn beat(&self, snapshot: &Snapshot, addresses: &[SocketAddr]) -> Step {
        let host = self.enrolment.host_uuid().value();
        let body = serde_json::to_vec(&Body::of(host, snapshot, &[]));
        let master = client(self.enrolment, &self.name, &self.config);
        master.use_addresses(addresses);
        let reply = match body {
            Ok(body) => master.post(&body, limits::POST),
            Err(error) => PostResult::invalid_body(&error),
        };
        let fingerprint = &self.bundle.certificate.fingerprint;
        let PostResult { verdict, class, detail, took, resumed, .. } = reply;
        let session = if resumed { "session resumed" } else { "new session" };
        let says = format!("{class} in {}, {session}", ms(took));
        let (means, advice) = meaning(verdict, &class, fingerprint);
        let step = match advice {
            None => Step::good("beat", format!("{says}: {means}")),
            Some(advice) if detail.is_empty() => {
                Step::bad("beat", format!("{says}: {means}"), advice)
            }
            Some(advice) => Step::bad("beat", format!("{says}: {means}: {detail}"), advice),
        };
        step.fact("class", class)
            .fact("ms", millis(took))
            .fact("resumed", resumed)
            .fact("fingerprint", fingerprint.as_str())
    }
}

/// What an answer means, and what is to be done if it is not the right one.
fn meaning(verdict: Verdict, class: &str, fingerprint: &str) -> (&'static str, Option<String>) {
    match (verdict, class) {
        (Verdict::Accepted, _) => ("the master knows this host and took the beat", None),
        (Verdict::HostRejected, "http-404") => (
            "the master does not know this host",
            Some("enrol this host again: it was never enrolled there, or has been decommissioned; if it is enrolled, see that \
                  it is this master's swarm controller that answers there".to_owned()),
        ),
        (Verdict::HostRejected, _) => (
            "the master does not accept this host's certificate",
            Some(format!(
                "compare sha256 {fingerprint} with the master's record of this host, or enrol it again; a proxy in front of \
                 the master must pass TLS through, as the master sees the proxy's certificate otherwise"
            )),
        ),
        (Verdict::BodyRejected, "invalid-body") => (
            "nothing was sent, as the body could not be written",
            Some("see what the state file and topology.db hold".to_owned()),
        ),
        (Verdict::BodyRejected, "http-413") => (
            "what this host reports is too large",
            Some("let the proxy in front of the master take larger bodies; run would beat without a status".to_owned()),
        ),
        // As nginx says it when it ends TLS and wants a certificate.
        (Verdict::BodyRejected, "http-400") => (
            "the request is refused",
            Some("if what it says is of certificates, let the proxy in front of the master pass TLS through; otherwise see \
                  what the state file and topology.db hold".to_owned()),
        ),
        (Verdict::BodyRejected, _) => (
            "the master refuses what this host reports",
            Some("see what the state file and topology.db hold; run would beat without a status".to_owned()),
        ),
        (Verdict::RetryLater(_), "http-502" | "http-503" | "http-504") => (
            "the master cannot take it now",
            Some("see to the master's log; if a proxy answers for the master, see that it reaches the master, and that it \
                  passes TLS through".to_owned()),
        ),
        (Verdict::RetryLater(_), class) if class.starts_with("http-5") => {
            ("the master has failed on it", Some("see to the master's log; run would try again".to_owned()))
        }
        (Verdict::RetryLater(_), "http-408" | "http-425" | "http-429") => {
            ("the master cannot take it now", Some("wait: run would try again when the answer says".to_owned()))
        }
        (Verdict::RetryLater(_), _) => (
            "this is no answer of the master's",
            Some("see that it is DECNET's swarm controller that answers there, and that this is its port".to_owned()),
        ),
        (Verdict::NoResponse, "invalid-response") => (
            "what answers there does not speak HTTP/1.1",
            Some("see that it is DECNET's swarm controller that answers there, and that this is its port".to_owned()),
        ),
        (Verdict::NoResponse, "tls") => (
            "no answer, as TLS has failed",
            Some("see what the step tls found, and the master's log; run would try again".to_owned()),
        ),
        (Verdict::NoResponse, "dns" | "timeout-resolve") => (
            "the master's name cannot be looked up",
            Some("correct the master's name, see to the name service of this host, or name the master by its address".to_owned()),
        ),
        (Verdict::NoResponse, "refused") => (
            "nothing listens there any more",
            Some("start the master's swarm controller; run would try again".to_owned()),
        ),
        (Verdict::NoResponse, "unreachable" | "timeout-connect") => (
            "the master cannot be reached",
            Some("see to the route to the master, and to the firewalls on it; run would try again".to_owned()),
        ),
        (Verdict::NoResponse, _) => {
            ("no answer", Some("see to the master's log, and to the network between; run would try again".to_owned()))
        }
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
    use crate::loopback::LoopbackMaster;

    #[test]
    fn an_address_that_fails_in_tls_is_left_for_the_next_one() {
        let [bad, good] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let [bad, good] = [&bad, &good].map(|listener| listener.local_addr().unwrap());
        let shake_hands = |stream: TcpStream| match stream.peer_addr().unwrap() == good {
            true => Step::good("tls", "TLS 1.3"),
            false => Step::bad("tls", "closed", "see to it"),
        };
        let reached = Reached::of(&[gone, bad, good], shake_hands);
        assert!(reached.tcp.is_good() && reached.tls.unwrap().is_good());
        assert_eq!(
            reached.addresses,
            [good, gone, bad],
            "the beat begins with the one that serves"
        );
        let said = reached.tcp.text(false);
        assert!(said.contains(&format!("{gone}: Connection refused")), "{said}");
        assert!(said.contains(&format!("{bad}: closed")), "{said}");
        // None serves: the first that could be connected to is the one to see to.
        let reached = Reached::of(&[gone, bad], shake_hands);
        assert!(reached.tcp.is_good() && reached.tls.is_some_and(|tls| !tls.is_good()));
    }

    #[test]
    fn the_beat_goes_where_the_handshake_went_without_another_lookup() {
        let dir = tempfile::tempdir().unwrap();
        let master = LoopbackMaster::start().unwrap();
        let worker = master.enrol(dir.path()).unwrap();
        let bundle = Bundle::load(dir.path(), &verifier::provider()).unwrap();
        // A name that leads nowhere.
        let enrolment = Enrolment::new(&worker.uuid, "nowhere.invalid", dir.path()).unwrap();
        let way = MasterProbe::new(&enrolment, &bundle, MasterIdentity::Name).unwrap();
        let step = way.beat(&Snapshot::new(&json!({"deployed": false})), &[master.address()]);
        assert!(step.is_good(), "{}", step.says());
    }

    #[test]
    fn each_class_without_an_answer_has_its_advice() {
        for (class, advice) in [
            ("dns", "correct the master's name"),
            ("timeout-resolve", "correct the master's name"),
            ("refused", "start the master's swarm controller"),
            ("unreachable", "see to the route"),
            ("timeout-connect", "see to the route"),
            ("tls", "see what the step tls found"),
            ("invalid-response", "that this is its port"),
            ("connection-closed", "see to the master's log"),
        ] {
            let (_, said) = meaning(Verdict::NoResponse, class, "");
            assert!(
                said.as_ref().unwrap().starts_with(advice)
                    || said.as_ref().unwrap().ends_with(advice),
                "{class}: {said:?}"
            );
        }
    }
}
