//! The rule for the master's certificate, as the operator writes it. Values only; `verifier`
//! enforces the rule.

use std::fmt;
use std::str::FromStr;

use ring::digest;
use rustls::pki_types::CertificateDer;

/// The rule for the master's certificate.
///
/// Every worker's certificate allows `serverAuth`. The Python agent accepts any certificate of
/// the CA, so with a stolen worker key an attacker can impersonate the master. The default requires
/// the certificate that the master issues to itself (DECNET's `pki.ensure_swarmctl_cert`): its
/// common name is `swarmctl`, and one of its DNS names is `swarmctl`. The common name of a worker's
/// certificate is the worker's name. So never enrol a worker with the name `swarmctl`: its key
/// could impersonate the master. If that has happened, pin the master's certificate with
/// [`Fingerprint`](Self::Fingerprint).
///
/// As text (`DECNET_MASTER_IDENTITY`, `[agent] master-identity`, `--master-identity`):
/// `name`, `host`, `ca`, `sha256:<hex>` or `public`.
///
/// ```
/// use decnet_heartbeat::MasterIdentity;
///
/// assert_eq!(MasterIdentity::default(), MasterIdentity::Name);
/// // With or without colons, as openssl prints it.
/// let pinned: MasterIdentity = format!("sha256:{}", "A7".repeat(32)).parse()?;
/// assert_eq!(pinned, MasterIdentity::Fingerprint([0xa7; 32]));
/// assert!("swarmctl".parse::<MasterIdentity>().is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MasterIdentity {
    /// `name`: the certificate chains to the bundle's `ca.crt` and is the master's own.
    ///
    /// Its subject has exactly one common name, `swarmctl`, as a `UTF8String` or a
    /// `PrintableString`, and one of its DNS names is `swarmctl`. Both are compared byte for byte.
    /// A name in another case or a wildcard does not match.
    #[default]
    Name,
    /// `host`: as `name`, or the certificate chains to the bundle's `ca.crt` and is valid for the
    /// configured master host. Use it for a master with a certificate of another name.
    ///
    /// This rule is weaker. DECNET's web page enrols a worker with a certificate that is valid for
    /// the worker's name *and for the master's host*, so the key of any worker that was enrolled
    /// there can impersonate the master.
    Host,
    /// `ca`: the certificate chains to the bundle's `ca.crt`. Its name is not checked. This is the
    /// rule of the Python agent.
    AnyFromCa,
    /// `sha256:<hex>`: one certificate, by the SHA-256 of its DER. Its chain, name and dates are
    /// not checked.
    Fingerprint([u8; 32]),
    /// `public`: the certificate chains to a public root and is valid for the configured master
    /// host.
    PublicCa,
}

impl FromStr for MasterIdentity {
    type Err = String;

    /// The error names the accepted forms. The caller adds the source of the text.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "name" => Ok(Self::Name),
            "host" => Ok(Self::Host),
            "ca" => Ok(Self::AnyFromCa),
            "public" => Ok(Self::PublicCa),
            other => match other.strip_prefix("sha256:").and_then(parse_hex) {
                Some(digest) => Ok(Self::Fingerprint(digest)),
                None => Err("must be name, host, ca, public, or sha256: and 64 hexadecimal digits"
                    .to_owned()),
            },
        }
    }
}

impl fmt::Display for MasterIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name => f.write_str("name"),
            Self::Host => f.write_str("host"),
            Self::AnyFromCa => f.write_str("ca"),
            Self::PublicCa => f.write_str("public"),
            Self::Fingerprint(digest) => write!(f, "sha256:{}", hex(digest)),
        }
    }
}

/// Lowercase hexadecimal, as the master writes fingerprints.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of a certificate's DER, as the master writes it.
pub(crate) fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    hex(digest::digest(&digest::SHA256, certificate).as_ref())
}

/// Parses 64 hexadecimal digits in either case, with or without the colons that openssl prints.
fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| *c != ':')
        .map(|c| c.to_digit(16).map(|d| d as u8))
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> =
        digits.chunks_exact(2).filter_map(|pair| Some(pair.first()? * 16 + pair.last()?)).collect();
    (digits.len() == 64).then(|| bytes.try_into().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_parsed_from_its_own_text() {
        let pinned = MasterIdentity::Fingerprint([0xa7; 32]);
        for rule in [
            MasterIdentity::Name,
            MasterIdentity::Host,
            MasterIdentity::AnyFromCa,
            MasterIdentity::PublicCa,
            pinned,
        ] {
            assert_eq!(rule.to_string().parse(), Ok(rule));
        }
    }

    #[test]
    fn fingerprint_with_colons_is_accepted() {
        let text = format!("sha256:{}", vec!["A7"; 32].join(":"));
        assert_eq!(text.parse(), Ok(MasterIdentity::Fingerprint([0xa7; 32])));
    }

    #[test]
    fn invalid_rule_error_names_the_accepted_forms() {
        for text in [
            "",
            "any",
            "NAME",
            "Host",
            "sha256:",
            "sha256:abc",
            &format!("sha256:{}", "g".repeat(64)),
        ] {
            assert_eq!(
                text.parse::<MasterIdentity>(),
                Err("must be name, host, ca, public, or sha256: and 64 hexadecimal digits"
                    .to_owned()),
                "{text}"
            );
        }
    }
}
