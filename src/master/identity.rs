//! Who counts as the master: the rule as an operator writes it. Values only; `verifier` enforces it.

use std::fmt;
use std::str::FromStr;

use ring::digest;
use rustls::pki_types::CertificateDer;

/// Who counts as the master.
///
/// Every worker's certificate carries `serverAuth`, so under the original agent's rule, "any certificate of
/// our CA", a stolen worker key can pose as the master. The default asks for the master's own certificate: the
/// master issues it to itself (DECNET's `pki.ensure_swarmctl_cert`), with the subject's common name `swarmctl` and a
/// DNS name `swarmctl`. A worker's certificate has the worker's name as its common name, so never enrol a worker that is
/// named `swarmctl`: its key could pose as the master. Where one was enrolled, pin the master's certificate with
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
    /// `name`: chains to the bundle's `ca.crt`, and is the master's own.
    ///
    /// Its subject has exactly one common name, `swarmctl`, as a `UTF8String` or a `PrintableString`, and one of its DNS
    /// names is `swarmctl`. Both are compared byte for byte: another case or a wildcard is another name.
    #[default]
    Name,
    /// `host`: as `name`, or it chains to the bundle's `ca.crt` and is valid for the configured master host. For a
    /// master whose operator has had it issue a certificate of another name.
    ///
    /// This is weaker: DECNET's web page enrols a worker with a certificate that is valid for the worker's name *and for
    /// the master's host*, so the key of any worker that was enrolled there can pose as the master.
    Host,
    /// `ca`: chains to the bundle's `ca.crt`, whatever its name. The rule of the original agent.
    AnyFromCa,
    /// `sha256:<hex>`: this one certificate, by the SHA-256 of its DER. Neither chain, name nor dates are looked at.
    Fingerprint([u8; 32]),
    /// `public`: chains to a public root and is valid for the configured master host.
    PublicCa,
}

impl FromStr for MasterIdentity {
    type Err = String;

    /// The error says what was expected; the caller says where the text came from.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "name" => Ok(Self::Name),
            "host" => Ok(Self::Host),
            "ca" => Ok(Self::AnyFromCa),
            "public" => Ok(Self::PublicCa),
            other => {
                other.strip_prefix("sha256:").and_then(parse_hex).map(Self::Fingerprint).ok_or_else(
                    || {
                        "must be name, host, ca, public, or sha256: and 64 hexadecimal digits"
                            .to_owned()
                    },
                )
            }
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

/// 64 hexadecimal digits of either case, with or without the colons that openssl prints.
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
    fn every_rule_survives_being_written_down() {
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
    fn a_fingerprint_may_be_written_as_openssl_does() {
        let text = format!("sha256:{}", vec!["A7"; 32].join(":"));
        assert_eq!(text.parse(), Ok(MasterIdentity::Fingerprint([0xa7; 32])));
    }

    #[test]
    fn anything_else_says_what_was_expected() {
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
