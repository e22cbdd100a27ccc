//! What an error on the way to the master means, in words: a class to search for, and what an operator may do. Values only,
//! for any thread.

use rustls::pki_types::UnixTime;

use crate::delta::from_micros;
use crate::error::http_problem;
use crate::text::printable;

/// The class of a failure in one word.
pub(crate) fn class(error: &ureq::Error) -> String {
    use std::io::ErrorKind;
    match error {
        ureq::Error::Timeout(timeout) => format!("timeout-{}", timeout.to_string().replace(' ', "-")),
        ureq::Error::HostNotFound => "name".to_owned(),
        ureq::Error::Io(error) if tls_error(error).is_some() => "tls".to_owned(),
        ureq::Error::Io(error) => match error.kind() {
            ErrorKind::ConnectionRefused => "refused".to_owned(),
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => "closed".to_owned(),
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "unreachable".to_owned(),
            _ => "io".to_owned(),
        },
        ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => "not-http".to_owned(),
        _ => "other".to_owned(),
    }
}

/// What went wrong, with what an operator may do where that is not obvious.
pub(crate) fn explain(error: &ureq::Error) -> String {
    let tls = match error {
        ureq::Error::Io(cause) => tls_error(cause),
        _ => None,
    };
    tls.map_or_else(|| http_problem(error), |cause| printable(&explain_tls(cause)))
}

/// The TLS error inside, where it is one.
pub(crate) fn tls_error(error: &std::io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// What went wrong in a handshake, in an operator's words.
pub(crate) fn explain_tls(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error as Tls};
    let advice = match error {
        Tls::InvalidCertificate(bad) => match bad {
            Bad::ExpiredContext { time, not_after } => {
                let (now, end) = (utc(*time), utc(*not_after));
                return format!(
                    "the master's certificate has expired by this host's clock, which says {now}: it was valid until {end}"
                );
            }
            Bad::NotValidYetContext { time, not_before } => {
                let (now, start) = (utc(*time), utc(*not_before));
                return format!(
                    "the master's certificate is not yet valid by this host's clock, which says {now}: it is from {start} on"
                );
            }
            Bad::NotValidForNameContext { .. } | Bad::NotValidForName => {
                "the master's certificate is neither for swarmctl nor for its host; see DECNET_MASTER_IDENTITY"
            }
            // Every DECNET CA has the same name, so that of another master looks like ours with a wrong signature.
            Bad::UnknownIssuer | Bad::BadSignature => "the master's certificate is not of our ca.crt",
            Bad::ApplicationVerificationFailure => "the master's certificate is not the pinned one",
            Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => "the master's certificate is not for servers",
            // webpki's own error, which rustls passes on as it is.
            Bad::Other(other) if other.to_string().contains("CaUsedAsEndEntity") => {
                "the master's certificate is a CA's own, which no server may show"
            }
            _ => return error.to_string(),
        },
        Tls::AlertReceived(Alert::ProtocolVersion) | Tls::PeerIncompatible(_) => {
            "the master speaks no TLS that we do: 1.2 or 1.3"
        }
        Tls::AlertReceived(_) => "the master refused our certificate or our TLS",
        _ => return error.to_string(),
    };
    format!("{advice} ({error})")
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
}
