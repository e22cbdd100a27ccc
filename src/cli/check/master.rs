//! The way to the master: its name, TCP, TLS, and one beat. Runs on the program's main thread.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustls::client::danger::ServerCertVerifier;
use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, Error as TlsError};

use super::certificate::Described;
use super::handshake::{Shaken, Witness, shake_hands};
use super::steps::{Checklist, Step};
use crate::body::{self, Body};
use crate::bundle::Bundle;
use crate::enrolment::Enrolment;
use crate::error::{Error, http_problem};
use crate::explain::{explain_tls, tls_error};
use crate::identity::MasterIdentity;
use crate::link::server_name;
use crate::master::{Master, Reply, Verdict};
use crate::resolve::MasterResolver;
use crate::status::Snapshot;
use crate::text::printable;
use crate::{limits, verifier};

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
    let (step, stream) = tcp(&addresses);
    list.add(step);
    let (Some(bundle), Some(stream)) = (bundle, stream) else {
        list.add(Step::not_tried("tls", "it takes a connection, and a bundle that can be used"));
        list.add(Step::not_tried("beat", "it takes TLS"));
        return Ok(());
    };
    let way = Way::new(enrolment, bundle, rule)?;
    let step = way.shake_hands(stream);
    let shaken = step.is_good();
    list.add(step);
    list.add(if shaken { way.beat(snapshot) } else { Step::not_tried("beat", "it takes TLS") });
    Ok(())
}

/// Where the master's name leads.
fn name(enrolment: &Enrolment) -> (Step, Vec<SocketAddr>) {
    let (host, port) = (enrolment.master_host().value(), *enrolment.master_port().value());
    let since = Instant::now();
    match MasterResolver::new(host, port).addresses(limits::CONNECT) {
        Ok(addresses) if host.parse::<IpAddr>().is_ok() => {
            (Step::good("name", format!("{host} is an address, there is nothing to look up")), addresses)
        }
        Ok(addresses) => {
            let ips: Vec<_> = addresses.iter().map(|address| address.ip().to_string()).collect();
            let says = format!("{host} is {}, looked up in {}", ips.join(", "), ms(since.elapsed()));
            (Step::good("name", says).fact("addresses", ips), addresses)
        }
        Err(error) => {
            let says = format!("{host}: {}", http_problem(&error));
            let advice = "see to the name service of this host, or name the master by its address";
            (Step::bad("name", says, advice), Vec::new())
        }
    }
}

/// The first of the addresses that answers.
fn tcp(addresses: &[SocketAddr]) -> (Step, Option<TcpStream>) {
    let mut failed = Step::not_tried("tcp", "it takes an address");
    // There are sixteen at the most.
    let share = limits::CONNECT / u32::try_from(addresses.len()).unwrap_or(1).max(1);
    for address in addresses {
        let since = Instant::now();
        match TcpStream::connect_timeout(address, share) {
            Ok(stream) => {
                let took = since.elapsed();
                let step = Step::good("tcp", format!("{address} answers in {}", ms(took)));
                return (step.fact("address", address.to_string()).fact("ms", millis(took)), Some(stream));
            }
            Err(error) => {
                let advice = match error.kind() {
                    ErrorKind::ConnectionRefused => "start the master's swarm controller, or correct the master's port",
                    _ => "see to the route to the master, and to the firewalls on it",
                };
                failed = Step::bad("tcp", format!("{address}: {error}"), advice).fact("address", address.to_string());
            }
        }
    }
    (failed, None)
}

/// As the agent reaches the master, but for the witness.
struct Way<'a> {
    enrolment: &'a Enrolment,
    bundle: &'a Bundle,
    rule: MasterIdentity,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
    witness: Arc<Witness>,
}

impl<'a> Way<'a> {
    fn new(enrolment: &'a Enrolment, bundle: &'a Bundle, rule: MasterIdentity) -> Result<Self, Error> {
        let (name, provider) = (server_name(enrolment)?, verifier::provider());
        let judge = verifier::verifier(bundle, rule, &name, &provider);
        let witness = Arc::new(Witness::before(judge));
        let config = verifier::client_config(bundle, Arc::clone(&witness) as Arc<dyn ServerCertVerifier>, &provider)?;
        Ok(Self { enrolment, bundle, rule, name, config, witness })
    }

    /// Who answers there, and who counts as the master.
    fn shake_hands(&self, stream: TcpStream) -> Step {
        let shaken = shake_hands(&self.config, &self.name, stream);
        let shown = self.witness.shown();
        let described = shown.as_ref().and_then(|shown| Described::of(shown).ok());
        let now = SystemTime::now();
        let who = described.as_ref().map_or_else(String::new, |shown| {
            format!("; {} for {}, {}", shown.subject, shown.names(), shown.validity(now))
        });
        let step = match shaken {
            Ok(Shaken { version, took }) => {
                let accepted = self.accepted_as(shown.as_ref());
                let step =
                    Step::good("tls", format!("{version} in {}{who}; accepted by {}: {accepted}", ms(took), self.rule));
                let step = step.fact("version", version).fact("ms", millis(took));
                let soon = described.as_ref().is_some_and(|shown| shown.ends_soon(now));
                if soon { step.advise("renew the master's certificate in time") } else { step }
            }
            Err(error) => {
                let tls = tls_error(&error);
                let says = tls.map_or_else(|| printable(&error.to_string()), |error| printable(&explain_tls(error)));
                let step = Step::bad("tls", format!("{says}{who}"), advice(tls));
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
        let own = ServerName::try_from(verifier::MASTER_NAME).ok();
        let parsed = shown.and_then(|shown| ParsedCertificate::try_from(shown).ok());
        let is_for_own = own.zip(parsed).is_some_and(|(own, shown)| verify_server_name(&shown, &own).is_ok());
        match self.rule {
            MasterIdentity::Name if is_for_own => format!("it is of ca.crt, and for {}", verifier::MASTER_NAME),
            MasterIdentity::Name => format!("it is of ca.crt, and for {host}"),
            MasterIdentity::AnyFromCa => "it is of ca.crt, and its names do not matter".to_owned(),
            MasterIdentity::Fingerprint(_) => "it is the pinned one".to_owned(),
            MasterIdentity::PublicCa => format!("it is publicly trusted, and for {host}"),
        }
    }

    /// One beat as `run` sends it, without deltas: these are for `run`.
    fn beat(&self, snapshot: &Snapshot) -> Step {
        let body = serde_json::to_vec(&Body {
            host_uuid: self.enrolment.host_uuid().value(),
            agent_version: env!("CARGO_PKG_VERSION"),
            status: snapshot.raw_status(),
            topology: snapshot.topology().map(body::Topology::from),
            lifecycle: &[],
        });
        let master = Master::new(self.enrolment, self.name.clone(), Arc::clone(&self.config));
        let reply = match body {
            Ok(body) => master.post(&body, limits::POST),
            Err(error) => Reply::unwritten(&error),
        };
        let fingerprint = &self.bundle.certificate.fingerprint;
        let Reply { verdict, class, detail, took, resumed, .. } = reply;
        let session = if resumed { "session resumed" } else { "new session" };
        let says = format!("{class} in {}, {session}", ms(took));
        let (means, advice) = meaning(verdict, fingerprint);
        let step = match advice {
            None => Step::good("beat", format!("{says}: {means}")),
            Some(advice) if detail.is_empty() => Step::bad("beat", format!("{says}: {means}"), advice),
            Some(advice) => Step::bad("beat", format!("{says}: {means}: {detail}"), advice),
        };
        step.fact("class", class)
            .fact("ms", millis(took))
            .fact("resumed", resumed)
            .fact("fingerprint", fingerprint.as_str())
    }
}

/// What an answer means, and what is to be done if it is not the right one.
fn meaning(verdict: Verdict, fingerprint: &str) -> (&'static str, Option<String>) {
    match verdict {
        Verdict::Accepted => ("the master knows this host and took the beat", None),
        Verdict::HostRefused => (
            "the master does not accept this host",
            Some(format!("compare sha256 {fingerprint} with the master's record of this host, or enrol it again")),
        ),
        Verdict::BodyRefused => (
            "the master refuses what this host reports",
            Some("see what the state file and topology.db hold; run would beat without a status".to_owned()),
        ),
        Verdict::TryLater(_) => (
            "the master cannot take it now",
            Some("see to the master's log, and that it is DECNET's swarm controller that answers there".to_owned()),
        ),
        Verdict::NoAnswer => {
            ("no answer", Some("see to the master's log; run would try again, ever more rarely".to_owned()))
        }
    }
}

/// What to do where there is no TLS with the master.
fn advice(error: Option<&TlsError>) -> &'static str {
    use CertificateError as Bad;
    match error {
        Some(TlsError::InvalidCertificate(bad)) => match bad {
            Bad::ExpiredContext { .. } | Bad::NotValidYetContext { .. } => {
                "renew the master's certificate, or set this host's clock"
            }
            Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
                "name the master as its certificate does, or choose another rule with --master-identity"
            }
            Bad::UnknownIssuer | Bad::BadSignature => {
                "enrol this host from this master, or correct the master's address: ca.crt is another one's"
            }
            Bad::ApplicationVerificationFailure => "correct the pinned fingerprint, if it is the master that answers",
            _ => "give the master a certificate for servers, issued by its own CA",
        },
        Some(TlsError::AlertReceived(_)) => "enrol this host again: the master does not take worker.crt",
        Some(_) => "see that it is DECNET's swarm controller that answers there, and that this is its port",
        None => "see that it is DECNET's swarm controller that answers there, and to the network between",
    }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", millis(time))
}
