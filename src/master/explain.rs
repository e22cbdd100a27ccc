//! What an error on the way to the master means, in words: a class to search for, and what an operator may do. Values only,
//! for any thread.

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

/// The class of a failure in one word; [`Failure::class`](crate::Failure::class) has the table.
pub(crate) fn class(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(timeout) => {
            format!("timeout-{}", timeout.to_string().replace(' ', "-"))
        }
        ureq::Error::HostNotFound => "dns".to_owned(),
        ureq::Error::Other(cause) if cause.is::<LookupFailed>() => "dns".to_owned(),
        ureq::Error::Other(cause) if cause.is::<rustls::Error>() => "tls".to_owned(),
        ureq::Error::Io(error) if tls_error(error).is_some() || not_tls(error).is_some() => {
            "tls".to_owned()
        }
        ureq::Error::Io(error) if is_closed(error) => "connection-closed".to_owned(),
        ureq::Error::Io(error) => match error.kind() {
            ErrorKind::ConnectionRefused => "refused".to_owned(),
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => {
                "unreachable".to_owned()
            }
            _ => "io".to_owned(),
        },
        ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => {
            "invalid-response".to_owned()
        }
        _ => "io".to_owned(),
    }
}

/// What went wrong, with its cause where that is not obvious.
pub(crate) fn explain(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(cause) => sanitize(&handshake(cause).says),
        ureq::Error::Other(cause) if cause.is::<LookupFailed>() => chain(&**cause),
        error => http_problem(error),
    }
}

/// The other side has closed the connection, or reset it.
pub(crate) fn is_closed(error: &io::Error) -> bool {
    use ErrorKind as Kind;
    let closed =
        [Kind::ConnectionAborted, Kind::ConnectionReset, Kind::BrokenPipe, Kind::UnexpectedEof];
    closed.contains(&error.kind()) && tls_error(error).is_none() && not_tls(error).is_none()
}

/// A new connection was closed without an answer. The real master sends no alert when it refuses a certificate: asyncio drops
/// what OpenSSL has written.
pub(crate) fn closed_without_an_answer(error: &ureq::Error) -> String {
    sanitize(&format!("{}: the master may refuse this host's certificate", explain(error)))
}

/// The connection was closed, and the last thing that it carried was our certificate.
#[cfg(feature = "cli")]
pub(crate) fn closed_on_our_certificate() -> Explained {
    Explained::new(
        "the master closed the connection after it saw this host's certificate: it probably refuses it",
        "see what stands at worker.crt above: the master's CA must have issued it, it must be valid by the master's clock, and \
         for clients (clientAuth); then enrol this host again",
    )
}

/// The TLS error inside, where it is one.
fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn not_tls(error: &io::Error) -> Option<&NotTls> {
    error.get_ref()?.downcast_ref()
}

/// What an error means, and what an operator may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Explained {
    pub(crate) says: String,
    /// Both are written side by side, so that they fit. Only `check` has room for it.
    pub(crate) advice: &'static str,
}

impl Explained {
    fn new(says: impl Into<String>, advice: &'static str) -> Self {
        Self { says: says.into(), advice }
    }
}

const PORT: &str =
    "see that it is DECNET's swarm controller that answers there, and that this is its port";
const ENROL_HERE: &str = "enrol this host again from this master";
const REISSUE: &str =
    "let the master issue certificates with keys and signatures that both sides support";

/// What went wrong on the way to a connection with TLS.
pub(crate) fn handshake(error: &io::Error) -> Explained {
    if let Some(error) = tls_error(error) {
        return tls(error);
    }
    let advice = match (not_tls(error), error.kind()) {
        (Some(NotTls::Http), _) => {
            "start the master's swarm controller with --tls, which its shipped unit leaves out, or correct the master's port"
        }
        (Some(NotTls::Other), _) => {
            "correct the master's host and port: another service listens there"
        }
        (None, ErrorKind::TimedOut) => {
            "see that it is DECNET's swarm controller that answers there, and that it runs with --tls; plain HTTP waits \
             in silence for more"
        }
        (None, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
            "see that it is DECNET's swarm controller that answers there; a load balancer that reaches no master closes \
             like this, too"
        }
        (None, _) => {
            "see that it is DECNET's swarm controller that answers there, and to the network between"
        }
    };
    match error.kind() {
        // rustls adds a link to its documentation, which is of no use to an operator.
        ErrorKind::UnexpectedEof => Explained::new("the other side closed the connection", advice),
        _ => Explained::new(error.to_string(), advice),
    }
}

/// What went wrong in a handshake.
fn tls(error: &rustls::Error) -> Explained {
    use rustls::{Error as Tls, PeerIncompatible as Incompatible};
    let Explained { says, advice } = match error {
        Tls::InvalidCertificate(bad) => return certificate(bad, error),
        Tls::AlertReceived(alert) => received(*alert),
        Tls::PeerIncompatible(
            Incompatible::ServerDoesNotSupportTls12Or13
            | Incompatible::ServerTlsVersionIsDisabledByOurConfig
            | Incompatible::Tls12NotOffered
            | Incompatible::Tls12NotOfferedOrEnabled,
        ) => old_tls(),
        Tls::PeerIncompatible(Incompatible::NoCertificateRequestSignatureSchemesInCommon) => {
            Explained::new("the master accepts no signature that worker.key can make", REISSUE)
        }
        Tls::PeerIncompatible(_) => {
            Explained::new("the master and this host have no TLS algorithms in common", REISSUE)
        }
        Tls::PeerMisbehaved(_)
        | Tls::InvalidMessage(_)
        | Tls::InappropriateMessage { .. }
        | Tls::InappropriateHandshakeMessage { .. }
        | Tls::DecryptError => Explained::new(
            "the other side breaks the rules of TLS",
            "see that it is DECNET's swarm controller that answers there, and what may change traffic in between",
        ),
        _ => return Explained::new(error.to_string(), PORT),
    };
    Explained::new(format!("{says} ({error})"), advice)
}

/// Either side can be the one that notices.
fn old_tls() -> Explained {
    let says = "the master speaks no TLS that we do: 1.2 or 1.3";
    Explained::new(says, "let the master, or what answers for it, speak TLS 1.2 or 1.3")
}

/// Why the master's certificate is not accepted.
fn certificate(bad: &CertificateError, error: &rustls::Error) -> Explained {
    use CertificateError as Bad;
    if let Some(says) = dates("the master's certificate", bad) {
        return Explained::new(says, "renew the master's certificate, or set this host's clock");
    }
    let (says, advice) = match bad {
        Bad::NotValidForNameContext { .. } | Bad::NotValidForName => (
            "the master's certificate is not for the configured host",
            "name the master as its certificate does, or choose another rule with --master-identity",
        ),
        // Every DECNET CA has the same name, so that of another master looks like ours with a wrong signature.
        Bad::UnknownIssuer | Bad::BadSignature => (
            "the master's certificate is not of our ca.crt",
            "enrol this host from this master, or correct the master's address; a proxy in front of the master must pass \
             TLS through, as a certificate of its own is not of ca.crt",
        ),
        Bad::ApplicationVerificationFailure => (
            "the master's certificate is not the pinned one",
            "correct the pinned fingerprint, if it is the master that answers",
        ),
        Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => (
            "the master's certificate is not for servers",
            "give the master a certificate for servers, issued by its own CA",
        ),
        Bad::BadEncoding => {
            ("the master's certificate cannot be read", "let the master issue itself a new one")
        }
        Bad::UnhandledCriticalExtension => (
            "the master's certificate has a critical extension that is not known here",
            "give the master a certificate without it",
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
    Explained::new(format!("{says} ({error})"), advice)
}

/// What of a certificate's dates is wrong. `whose`: which certificate it is.
fn dates(whose: &str, bad: &CertificateError) -> Option<String> {
    match bad {
        CertificateError::ExpiredContext { time, not_after } => {
            let (now, end) = (utc(*time), utc(*not_after));
            Some(format!(
                "{whose} has expired by this host's clock, which says {now}: it was valid until {end}"
            ))
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            let (now, start) = (utc(*time), utc(*not_before));
            Some(format!(
                "{whose} is not yet valid by this host's clock, which says {now}: it is from {start} on"
            ))
        }
        // webpki's `InvalidCertValidity`.
        CertificateError::Expired => {
            Some(format!("{whose} is never valid: it ends before it begins"))
        }
        _ => None,
    }
}

/// webpki's own error, which rustls passes on as it is.
fn of_webpki(error: &str) -> (&'static str, &'static str) {
    match error {
        "CaUsedAsEndEntity" => (
            "the master's certificate is a CA's own, which no server may show",
            "give the master a certificate for servers, issued by its own CA",
        ),
        "EndEntityUsedAsCa" => (
            "the master's certificate is issued by another certificate that is no CA's: somebody may pose as the master",
            POSES,
        ),
        "PathLenConstraintViolated" => (
            "there are more CAs above the master's certificate than one of them allows",
            "give the master a certificate that its CA itself has issued",
        ),
        "NameConstraintViolation" => (
            "the master's certificate has a name that its CA may not issue",
            "give the master a certificate with names that the name constraints of its CA allow",
        ),
        "UnsupportedCriticalExtension" => (
            "the master's certificate, or an issuer's, has a critical extension that is not known here",
            "give the master a certificate without it",
        ),
        "UnsupportedCertVersion" => (
            "the master's certificate, or an issuer's, is not of version 3 of X.509",
            "give the master a certificate of version 3, issued by its own CA",
        ),
        _ => (
            "the master's certificate breaks a rule of its chain",
            "let the master issue itself a new one",
        ),
    }
}

const POSES: &str = "see what answers there, and which worker's certificate and key were copied; enrol that worker again";

/// Our own reasons say it all.
fn refused(refusal: &Refusal) -> Explained {
    let advice = match refusal {
        Refusal::OfIssuer { name, bad } => {
            let whose = format!(
                "an issuer of the master's certificate, {},",
                quoted(name, limits::LOG_TEXT / 2)
            );
            let says = dates(&whose, bad).unwrap_or_else(|| refusal.to_string());
            return Explained::new(
                says,
                "renew that issuer's certificate at the master, or set this host's clock",
            );
        }
        Refusal::NotACa(_) => POSES,
        Refusal::NotMasters { or_host: false, .. } => {
            "if it is the master, give it its own certificate back or choose another rule with --master-identity; \
             otherwise somebody poses as the master"
        }
        Refusal::NotMasters { or_host: true, .. } => {
            "name the master as its certificate does, or choose another rule with --master-identity; otherwise somebody \
             poses as the master"
        }
        Refusal::NotPublic => {
            "choose another rule with --master-identity, or give the master a certificate of a public CA"
        }
        Refusal::Unsupported(_) => {
            "give the master a certificate with a key and a signature that are supported"
        }
        Refusal::NotItsKey => {
            "somebody may pose as the master with a copy of its certificate: see what answers there"
        }
    };
    Explained::new(refusal.to_string(), advice)
}

/// What the master means by an alert, as OpenSSL, which serves it, sends them (`ssl_x509err2alert` in `statem_lib.c`).
fn received(alert: AlertDescription) -> Explained {
    use AlertDescription as Alert;
    let (says, advice) = match alert {
        Alert::ProtocolVersion => return old_tls(),
        Alert::BadCertificate | Alert::CertificateUnknown => (
            "the master refused our certificate: it may be too weak, of a signature that it does not take, or not valid yet \
             by its clock",
            "see what stands at worker.crt above, and to the master's clock; then enrol this host again",
        ),
        Alert::UnsupportedCertificate => {
            ("the master refused our certificate: it is not for clients", ENROL_HERE)
        }
        Alert::UnknownCA => (
            "the master refused our certificate: it is of a CA that the master does not know",
            ENROL_HERE,
        ),
        // Every DECNET CA has the same name, so that of another master looks like this one's with a wrong signature.
        Alert::DecryptError => (
            "the master refused our certificate: its CA has not signed it, so it is another master's",
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
            "the master got no certificate of ours: it accepts none with the kind of key that worker.key is",
            REISSUE,
        ),
        Alert::HandshakeFailure | Alert::InsufficientSecurity => (
            "the master and this host have no TLS algorithms in common: the master's key is of a kind that is not supported \
             here, such as P-521, or the master does not take one like worker.key",
            REISSUE,
        ),
        Alert::UnrecognisedName => (
            "what answers there does not know the master's name",
            "let the proxy or load balancer in front of the master pass TLS through for the name that is configured here",
        ),
        Alert::InternalError => ("the master's TLS has failed", "see to the master's log"),
        _ => (
            "the master refused our TLS",
            "see to the master's log, and what may change traffic in between",
        ),
    };
    Explained::new(says, advice)
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
    fn a_clock_that_runs_wild_is_said_as_what_it_is() {
        for (seconds, said) in [(0, "1970-01-01T00:00:00Z"), (u64::MAX, "9999-12-31T23:59:59Z")] {
            let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
            assert_eq!(utc(time), said);
        }
    }

    #[test]
    fn each_alert_has_its_meaning_and_an_advice_that_fits() {
        use AlertDescription as Alert;
        for (alert, says, advice) in [
            (
                Alert::BadCertificate,
                "refused our certificate: it may be too weak",
                "see what stands at worker.crt",
            ),
            (Alert::UnsupportedCertificate, "it is not for clients", "enrol this host again"),
            (Alert::UnknownCA, "of a CA that the master does not know", "enrol this host again"),
            (Alert::DecryptError, "so it is another master's", "enrol this host again"),
            (Alert::CertificateExpired, "expired by the master's clock", "set the master's clock"),
            (
                Alert::CertificateRequired,
                "got no certificate of ours",
                "keys and signatures that both sides support",
            ),
            (
                Alert::HandshakeFailure,
                "no TLS algorithms in common",
                "keys and signatures that both sides support",
            ),
            (Alert::ProtocolVersion, "speaks no TLS that we do", "speak TLS 1.2 or 1.3"),
            (Alert::UnrecognisedName, "does not know the master's name", "pass TLS through"),
            (Alert::InternalError, "has failed", "the master's log"),
            (Alert::IllegalParameter, "refused our TLS", "change traffic in between"),
        ] {
            let error = io::Error::other(rustls::Error::AlertReceived(alert));
            let explained = handshake(&error);
            assert!(
                explained.says.contains(says) && explained.advice.contains(advice),
                "{alert:?}: {explained:?}"
            );
            assert!(
                explained.says.ends_with(&format!("(received fatal alert: {alert:?})")),
                "{explained:?}"
            );
        }
    }

    #[test]
    fn a_peer_that_does_not_speak_tls_is_told_apart_by_what_it_says() {
        for (speaks, says, advice) in [
            (NotTls::Http, "plain HTTP", "with --tls"),
            (NotTls::Other, "neither TLS nor HTTP", "correct the master's host and port"),
        ] {
            let error = io::Error::other(speaks);
            let explained = handshake(&error);
            assert!(
                explained.says.contains(says) && explained.advice.contains(advice),
                "{explained:?}"
            );
            assert_eq!(class(&ureq::Error::Io(error)), "tls");
        }
    }
}
