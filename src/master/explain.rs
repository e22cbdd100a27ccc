//! Explains an error of a POST to the operator: its class, its text and advice. Pure functions, for
//! any thread.

use std::io::{self, ErrorKind};

use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError};

use crate::delta::from_micros;
use crate::error::{chain, http_problem};
use crate::limits;
use crate::master::first_bytes::NotTls;
use crate::master::resolver::LookupFailed;
use crate::master::verifier::Refusal;
use crate::text::{quoted, sanitize};

/// The class of a failure. [`Failure::class`](crate::Failure::class) has the table.
pub(crate) fn class(error: &ureq::Error) -> String {
    let class = match error {
        ureq::Error::Timeout(timeout) => {
            return format!("timeout-{}", timeout.to_string().replace(' ', "-"));
        }
        ureq::Error::HostNotFound => "dns",
        ureq::Error::Other(cause) if cause.is::<LookupFailed>() => "dns",
        ureq::Error::Other(cause) if cause.is::<rustls::Error>() => "tls",
        ureq::Error::Io(error) => io_class(error),
        ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => "invalid-response",
        _ => "io",
    };
    class.to_owned()
}

fn io_class(error: &io::Error) -> &'static str {
    match error.kind() {
        _ if tls_error(error).is_some() || not_tls(error).is_some() => "tls",
        _ if is_closed(error) => "connection-closed",
        ErrorKind::ConnectionRefused => "refused",
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => {
            "unreachable"
        }
        _ => "io",
    }
}

/// The text of an error, with its probable cause.
pub(crate) fn explain(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(cause) => sanitize(&handshake(cause).text),
        ureq::Error::Other(cause) if cause.is::<LookupFailed>() => chain(&**cause),
        error => http_problem(error),
    }
}

/// Whether the peer closed or reset the connection.
pub(crate) fn is_closed(error: &io::Error) -> bool {
    use ErrorKind as Kind;
    let closed =
        [Kind::ConnectionAborted, Kind::ConnectionReset, Kind::BrokenPipe, Kind::UnexpectedEof];
    closed.contains(&error.kind()) && tls_error(error).is_none() && not_tls(error).is_none()
}

/// The text for a new connection that was closed without an answer. The master may have rejected
/// the client certificate: it sends no alert then, because asyncio discards the alert that OpenSSL
/// wrote.
pub(crate) fn closed_without_an_answer(error: &ureq::Error) -> String {
    sanitize(&format!("{}: the master may refuse this host's certificate", explain(error)))
}

/// The explanation of a connection that was closed after this host sent its certificate.
#[cfg(feature = "cli")]
pub(crate) fn closed_on_our_certificate() -> Explained {
    Explained::new(
        "the master closed the connection after it saw this host's certificate: it probably refuses it",
        "see the step worker.crt above: the certificate must be issued by the master's CA, valid by the master's clock \
         and usable for clients (clientAuth); then enrol this host again",
    )
}

/// The TLS error inside an I/O error.
fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn not_tls(error: &io::Error) -> Option<&NotTls> {
    error.get_ref()?.downcast_ref()
}

/// What an error means, and what the operator can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Explained {
    pub(crate) text: String,
    /// Shown by `check` only. The log has no room for it.
    pub(crate) advice: &'static str,
}

impl Explained {
    fn new(text: impl Into<String>, advice: &'static str) -> Self {
        Self { text: text.into(), advice }
    }
}

const CHECK_PORT: &str =
    "check that DECNET's swarm controller listens at this address, and that the port is right";
const ENROL_HERE: &str = "enrol this host again from this master";
const REISSUE: &str =
    "let the master issue certificates with keys and signatures that both sides support";

/// Explains an error of the connection or of the TLS handshake.
pub(crate) fn handshake(error: &io::Error) -> Explained {
    if let Some(error) = tls_error(error) {
        return tls(error);
    }
    let advice = match (not_tls(error), error.kind()) {
        (Some(NotTls::Http), _) => {
            "start the master's swarm controller with --tls, which is missing in DECNET's systemd unit, or correct the \
             master's port"
        }
        (Some(NotTls::Other), _) => {
            "correct the master's host and port: another service listens there"
        }
        (None, ErrorKind::TimedOut) => {
            "check that DECNET's swarm controller listens at this address, and that it runs with --tls; a plain HTTP \
             server does not answer a TLS handshake"
        }
        (None, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
            "check that DECNET's swarm controller listens at this address; a load balancer that cannot reach a master \
             also closes the connection"
        }
        (None, _) => {
            "check that DECNET's swarm controller listens at this address, and check the network"
        }
    };
    match error.kind() {
        // rustls' text contains a link to its documentation, which does not help an operator.
        ErrorKind::UnexpectedEof => Explained::new("the other side closed the connection", advice),
        _ => Explained::new(error.to_string(), advice),
    }
}

/// Explains an error of the TLS handshake.
fn tls(error: &rustls::Error) -> Explained {
    use rustls::{Error as Tls, PeerIncompatible as Incompatible};
    let (text, advice) = match error {
        Tls::InvalidCertificate(bad) => return certificate(bad, error),
        Tls::AlertReceived(alert) => received(*alert),
        Tls::PeerIncompatible(
            Incompatible::ServerDoesNotSupportTls12Or13
            | Incompatible::ServerTlsVersionIsDisabledByOurConfig
            | Incompatible::Tls12NotOffered
            | Incompatible::Tls12NotOfferedOrEnabled,
        ) => OLD_TLS,
        Tls::PeerIncompatible(Incompatible::NoCertificateRequestSignatureSchemesInCommon) => {
            ("the master accepts no signature that worker.key can make", REISSUE)
        }
        Tls::PeerIncompatible(_) => {
            ("the master and this host have no TLS algorithms in common", REISSUE)
        }
        Tls::PeerMisbehaved(_)
        | Tls::InvalidMessage(_)
        | Tls::InappropriateMessage { .. }
        | Tls::InappropriateHandshakeMessage { .. }
        | Tls::DecryptError => (
            "the peer violates the TLS protocol",
            "check that DECNET's swarm controller listens at this address, and that no device in the network changes the \
             traffic",
        ),
        _ => return Explained::new(error.to_string(), CHECK_PORT),
    };
    Explained::new(format!("{text} ({error})"), advice)
}

/// The text and the advice for a protocol version that is not supported. This host or the master
/// detects it.
const OLD_TLS: (&str, &str) = (
    "the master supports neither TLS 1.2 nor TLS 1.3",
    "enable TLS 1.2 or 1.3 at the master, or at the proxy in front of it",
);

/// Explains why the master's certificate was rejected.
fn certificate(bad: &CertificateError, error: &rustls::Error) -> Explained {
    use CertificateError as Bad;
    if let Some(text) = dates("the master's certificate", bad) {
        return Explained::new(text, "renew the master's certificate, or set this host's clock");
    }
    let (text, advice) = match bad {
        Bad::NotValidForNameContext { .. } | Bad::NotValidForName => (
            "the master's certificate is not for the configured host",
            "configure the master by a name of its certificate, or choose another rule with --master-identity",
        ),
        // All DECNET CAs have the same name. So a certificate of another master's CA looks like one
        // of this CA with a bad signature.
        Bad::UnknownIssuer | Bad::BadSignature => (
            "the master's certificate is not issued by the CA in ca.crt",
            "enrol this host from this master, or correct the master's address; a proxy in front of the master must pass \
             TLS through, because its own certificate is not issued by the CA in ca.crt",
        ),
        Bad::ApplicationVerificationFailure => (
            "the master's certificate is not the pinned one",
            "if the peer is the master, correct the pinned fingerprint",
        ),
        Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => (
            "the master's certificate is not for servers",
            "give the master a certificate for servers, issued by its own CA",
        ),
        Bad::BadEncoding => (
            "the master's certificate cannot be parsed",
            "let the master issue itself a new certificate",
        ),
        Bad::UnhandledCriticalExtension => (
            "the master's certificate has an unknown critical extension",
            "give the master a certificate without that extension",
        ),
        Bad::Other(other) => match other.0.downcast_ref::<Refusal>() {
            Some(refusal) => return refused(refusal),
            None => of_webpki(&other.to_string()),
        },
        _ => {
            return Explained::new(
                error.to_string(),
                "let the master issue itself a new certificate",
            );
        }
    };
    Explained::new(format!("{text} ({error})"), advice)
}

/// Describes an error about a certificate's dates. `whose` names the certificate.
fn dates(whose: &str, bad: &CertificateError) -> Option<String> {
    match bad {
        CertificateError::ExpiredContext { time, not_after } => {
            let now = utc(*time);
            let end = utc(*not_after);
            Some(format!(
                "{whose} has expired by this host's clock, which shows {now}: it was valid until {end}"
            ))
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            let now = utc(*time);
            let start = utc(*not_before);
            Some(format!(
                "{whose} is not yet valid by this host's clock, which shows {now}: it is valid from {start}"
            ))
        }
        // webpki's `InvalidCertValidity`.
        CertificateError::Expired => {
            Some(format!("{whose} is never valid: it ends before it begins"))
        }
        _ => None,
    }
}

/// The text and the advice for an error of webpki that rustls passes on unchanged.
fn of_webpki(error: &str) -> (&'static str, &'static str) {
    match error {
        "CaUsedAsEndEntity" => (
            "the master's certificate is a CA certificate, which a server must not use",
            "give the master a certificate for servers, issued by its own CA",
        ),
        "EndEntityUsedAsCa" => (
            "the master's certificate is issued by a certificate that is not a CA certificate: another host may impersonate \
             the master",
            IMPERSONATION,
        ),
        "PathLenConstraintViolated" => (
            "the chain of the master's certificate has more CAs than one of them allows",
            "give the master a certificate that its root CA issued directly",
        ),
        "NameConstraintViolation" => (
            "the master's certificate has a name that its CA may not issue",
            "give the master a certificate with names that the name constraints of its CA allow",
        ),
        "UnsupportedCriticalExtension" => (
            "the master's certificate, or an issuer's, has an unknown critical extension",
            "give the master a certificate without that extension",
        ),
        "UnsupportedCertVersion" => (
            "the master's certificate, or an issuer's, is not an X.509 version 3 certificate",
            "give the master a certificate of version 3, issued by its own CA",
        ),
        _ => (
            "the certificate chain of the master is not valid",
            "let the master issue itself a new certificate",
        ),
    }
}

const IMPERSONATION: &str = "find out which host answers at this address, and which worker's certificate and key were copied; enrol that worker \
     again";

/// The text and the advice for an error of the verifier of this crate.
fn refused(refusal: &Refusal) -> Explained {
    let advice = match refusal {
        Refusal::OfIssuer { name, bad } => {
            let whose = format!(
                "an issuer of the master's certificate, {},",
                quoted(name, limits::LOG_TEXT / 2)
            );
            let text = dates(&whose, bad).unwrap_or_else(|| refusal.to_string());
            return Explained::new(
                text,
                "renew that issuer's certificate at the master, or set this host's clock",
            );
        }
        Refusal::NotACa(_) => IMPERSONATION,
        Refusal::NotMasters { or_host: false, .. } => {
            "if the peer is the master, restore its own certificate or choose another rule with --master-identity; \
             otherwise another host impersonates the master"
        }
        Refusal::NotMasters { or_host: true, .. } => {
            "if the peer is the master, configure it by a name of its certificate or choose another rule with \
             --master-identity; otherwise another host impersonates the master"
        }
        Refusal::NotPublic => {
            "choose another rule with --master-identity, or give the master a certificate of a public CA"
        }
        Refusal::Unsupported(_) => {
            "give the master a certificate with a key and a signature that are supported"
        }
        Refusal::NotItsKey => {
            "another host may impersonate the master with a copy of its certificate: find out which host answers at this \
             address"
        }
    };
    Explained::new(refusal.to_string(), advice)
}

/// The text and the advice for an alert that the master sent. The master uses OpenSSL, which maps errors to alerts in
/// `ssl_x509err2alert` (`statem_lib.c`).
fn received(alert: AlertDescription) -> (&'static str, &'static str) {
    use AlertDescription as Alert;
    match alert {
        Alert::ProtocolVersion => OLD_TLS,
        Alert::BadCertificate | Alert::CertificateUnknown => (
            "the master refused our certificate: it may be too weak, have an unsupported signature, or be not yet valid by \
             the master's clock",
            "see the step worker.crt above, and check the master's clock; then enrol this host again",
        ),
        Alert::UnsupportedCertificate => {
            ("the master refused our certificate: it is not for clients", ENROL_HERE)
        }
        Alert::UnknownCA => (
            "the master refused our certificate: it is issued by a CA that the master does not know",
            ENROL_HERE,
        ),
        // All DECNET CAs have the same name. So a certificate of another master's CA looks like one
        // of this master's CA with a bad signature.
        Alert::DecryptError => (
            "the master refused our certificate: the master's CA did not sign it, so another master issued it",
            ENROL_HERE,
        ),
        Alert::CertificateExpired => (
            "the master refused our certificate: it has expired by the master's clock",
            "enrol this host again, or set the master's clock",
        ),
        Alert::CertificateRevoked => {
            ("the master refused our certificate: it is revoked", ENROL_HERE)
        }
        Alert::AccessDenied => ("the master refused our certificate: access is denied", ENROL_HERE),
        Alert::NoCertificate | Alert::CertificateRequired => (
            "the master received no certificate from this host: it does not accept the key type of worker.key",
            REISSUE,
        ),
        Alert::HandshakeFailure | Alert::InsufficientSecurity => (
            "the master and this host have no TLS algorithms in common: this host does not support the key type of the \
             master, such as P-521, or the master does not support that of worker.key",
            REISSUE,
        ),
        Alert::UnrecognisedName => (
            "the peer does not know the master's name",
            "let the proxy or load balancer in front of the master pass TLS through for the name that is configured here",
        ),
        Alert::InternalError => ("the master's TLS failed", "check the master's log"),
        _ => (
            "the master refused the TLS handshake",
            "check the master's log, and that no device in the network changes the traffic",
        ),
    }
}

fn utc(time: UnixTime) -> String {
    let micros = i64::try_from(time.as_secs()).unwrap_or(i64::MAX).saturating_mul(1_000_000);
    humantime::format_rfc3339_seconds(from_micros(micros)).to_string()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_outside_the_calendar_are_clamped() {
        for (seconds, text) in [(0, "1970-01-01T00:00:00Z"), (u64::MAX, "9999-12-31T23:59:59Z")] {
            let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
            assert_eq!(utc(time), text);
        }
    }

    #[test]
    fn each_alert_has_an_explanation_and_advice() {
        use AlertDescription as Alert;
        for (alert, text, advice) in [
            (
                Alert::BadCertificate,
                "refused our certificate: it may be too weak",
                "see the step worker.crt",
            ),
            (Alert::UnsupportedCertificate, "it is not for clients", "enrol this host again"),
            (Alert::UnknownCA, "by a CA that the master does not know", "enrol this host again"),
            (Alert::DecryptError, "so another master issued it", "enrol this host again"),
            (Alert::CertificateExpired, "expired by the master's clock", "set the master's clock"),
            (
                Alert::CertificateRequired,
                "received no certificate from this host",
                "keys and signatures that both sides support",
            ),
            (
                Alert::HandshakeFailure,
                "no TLS algorithms in common",
                "keys and signatures that both sides support",
            ),
            (Alert::ProtocolVersion, "neither TLS 1.2 nor TLS 1.3", "enable TLS 1.2 or 1.3"),
            (Alert::UnrecognisedName, "does not know the master's name", "pass TLS through"),
            (Alert::InternalError, "TLS failed", "the master's log"),
            (Alert::IllegalParameter, "refused the TLS handshake", "changes the traffic"),
        ] {
            let error = io::Error::other(rustls::Error::AlertReceived(alert));
            let explained = handshake(&error);
            assert!(
                explained.text.contains(text) && explained.advice.contains(advice),
                "{alert:?}: {explained:?}"
            );
            assert!(
                explained.text.ends_with(&format!("(received fatal alert: {alert:?})")),
                "{explained:?}"
            );
        }
    }

    #[test]
    fn peer_without_tls_is_explained_by_its_protocol() {
        for (protocol, text, advice) in [
            (NotTls::Http, "plain HTTP", "with --tls"),
            (NotTls::Other, "neither TLS nor HTTP", "correct the master's host and port"),
        ] {
            let error = io::Error::other(protocol);
            let explained = handshake(&error);
            assert!(
                explained.text.contains(text) && explained.advice.contains(advice),
                "{explained:?}"
            );
            assert_eq!(class(&ureq::Error::Io(error)), "tls");
        }
    }
}
