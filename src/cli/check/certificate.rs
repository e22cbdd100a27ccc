//! Describes a certificate for people. Values only.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;
use x509_parser::time::ASN1Time;

use super::steps::Step;
use crate::credentials::link::Expiry;
use crate::delta::{from_micros, micros};
use crate::master::identity::fingerprint;
use crate::text::{counted, sanitize};

/// How many names of a certificate are shown; the others are counted.
const NAMES: usize = 8;

/// The contents of a certificate. Foreign text is escaped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CertificateInfo {
    pub(super) subject: String,
    pub(super) issuer: String,
    /// DNS names and IP addresses.
    pub(super) names: Vec<String>,
    pub(super) begins: SystemTime,
    pub(super) expires: SystemTime,
    pub(super) fingerprint: String,
}

impl CertificateInfo {
    /// The error says what cannot be parsed.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, parsed) =
            parse_x509_certificate(certificate).map_err(|error| sanitize(&error.to_string()))?;
        let alternatives = parsed
            .subject_alternative_name()
            .ok()
            .flatten()
            .map(|names| &names.value.general_names);
        let validity = parsed.validity();
        Ok(Self {
            subject: sanitize(&parsed.subject().to_string()),
            issuer: sanitize(&parsed.issuer().to_string()),
            names: alternatives.into_iter().flatten().filter_map(name).collect(),
            begins: time(validity.not_before),
            expires: time(validity.not_after),
            fingerprint: fingerprint(certificate),
        })
    }

    /// The first [`NAMES`] names.
    pub(super) fn names(&self) -> String {
        let shown: Vec<_> = self.names.iter().take(NAMES).map(String::as_str).collect();
        match self.names.len() {
            0 => "no name".to_owned(),
            many if many > NAMES => format!("{} and {} more", shown.join(", "), many - NAMES),
            _ => shown.join(", "),
        }
    }

    /// `expires in 42 days (2026-12-24)`
    pub(super) fn validity(&self, now: SystemTime) -> String {
        match Expiry::of(self.expires, now) {
            _ if self.begins > self.expires => {
                format!(
                    "never valid: it expires on {}, before it becomes valid on {}",
                    date(self.expires),
                    date(self.begins)
                )
            }
            _ if self.begins > now => {
                format!("not valid before {} by this host's clock", date(self.begins))
            }
            Expiry::DaysLeft(days) => {
                format!("expires in {} ({})", counted(days, "day", "days"), date(self.expires))
            }
            Expiry::DaysExpired(days) => format!(
                "expired {} ago by this host's clock ({})",
                counted(days, "day", "days"),
                date(self.expires)
            ),
        }
    }

    pub(super) fn is_valid(&self, now: SystemTime) -> bool {
        (self.begins..=self.expires).contains(&now)
    }

    pub(super) fn expires_soon(&self, now: SystemTime) -> bool {
        Expiry::of(self.expires, now).is_near()
    }

    /// Adds the contents as facts.
    pub(super) fn facts(&self, step: Step, now: SystemTime) -> Step {
        let (days_left, days_expired) = match Expiry::of(self.expires, now) {
            Expiry::DaysLeft(days) => (Some(days), None),
            Expiry::DaysExpired(days) => (None, Some(days)),
        };
        step.fact("subject", self.subject.as_str())
            .fact("issuer", self.issuer.as_str())
            .fact("names", self.names.iter().take(NAMES).map(String::as_str).collect::<Vec<_>>())
            .fact("expires", rfc3339(self.expires))
            .fact("days_left", days_left)
            .fact("days_expired", days_expired)
            .fact("fingerprint", self.fingerprint.as_str())
    }
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(sanitize(name)),
        GeneralName::IPAddress(bytes) => {
            let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from))
                .ok()
                .map(|address| address.to_string())
        }
        _ => None,
    }
}

fn time(at: ASN1Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(at.timestamp()).unwrap_or(0))
}

fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(from_micros(micros(at))).to_string()
}

fn date(at: SystemTime) -> String {
    rfc3339(at).chars().take(10).collect()
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::pem::PemObject;

    use super::*;
    use crate::loopback::{Authority, Role};

    fn described(role: Role) -> CertificateInfo {
        let issued = Authority::new().unwrap().issue(role).unwrap();
        CertificateInfo::of(&CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap())
            .unwrap()
    }

    #[test]
    fn master_certificate_is_described() {
        let master = described(Role::Master);
        assert_eq!(
            (master.subject.as_str(), master.issuer.as_str()),
            ("CN=swarmctl, O=DECNET, OU=swarm-worker", "CN=DECNET SWARM Root CA, O=DECNET")
        );
        assert_eq!(master.names(), "swarmctl, localhost, 127.0.0.1");
        let now = SystemTime::now();
        assert!(master.is_valid(now) && !master.expires_soon(now));
        assert!(
            master.validity(now).starts_with("expires in 824 days (20"),
            "{}",
            master.validity(now)
        );
    }

    #[test]
    fn validity_is_judged_by_this_hosts_clock() {
        let expired = described(Role::Expired);
        let early = described(Role::NotYetValid);
        let now = SystemTime::now();
        assert!(
            expired.validity(now).starts_with("expired 1 day ago by this host's clock"),
            "{}",
            expired.validity(now)
        );
        assert!(early.validity(now).starts_with("not valid before "), "{}", early.validity(now));
        assert!(!expired.is_valid(now) && !early.is_valid(now));
        let short = described(Role::ShortLived("w".to_owned(), Duration::from_secs(86_400 * 2)));
        assert!(short.is_valid(now) && short.expires_soon(now));
    }

    #[test]
    fn dates_in_the_wrong_order_are_reported() {
        let mut master = described(Role::Master);
        (master.begins, master.expires) = (master.expires, master.begins);
        let validity = master.validity(SystemTime::now());
        assert!(validity.starts_with("never valid: it expires on 20"), "{validity}");
        assert!(!master.is_valid(SystemTime::now()));
    }

    #[test]
    fn foreign_text_is_safe_to_print() {
        let hostile = described(Role::Named("\u{1b}[2J\nx".to_owned()));
        for text in [hostile.subject.clone(), hostile.names()] {
            assert!(!text.chars().any(char::is_control) && text.contains("x"), "{text:?}");
        }
    }
}
