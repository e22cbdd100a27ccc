//! Who counts as the master: the rule for its certificate, and the rustls configuration that enforces it. Handshakes run on
//! the heartbeat thread.
//!
//! A session is resumed without a certificate. So the tickets belong to one configuration, of one bundle and one rule: a
//! changed rule begins without any.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::SingleCertAndKey;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};

use crate::bundle::{self, Bundle};
use crate::error::Error;
use crate::identity::{MasterIdentity, hex};
use crate::limits;
use crate::text::printable;
use crate::x509::X509;

/// The common name and a DNS name of the master's own certificate, and of no other that its CA issues (`PROTOCOL.md`, "TLS").
pub(crate) const MASTER_NAME: &str = "swarmctl";

/// ring, for TLS and for the bundle's proof alike.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The rule by which `master`'s certificate is judged.
pub(crate) fn verifier(
    bundle: &Bundle,
    identity: MasterIdentity,
    master: &ServerName<'static>,
    provider: &CryptoProvider,
) -> Arc<dyn ServerCertVerifier> {
    Arc::new(MasterVerifier {
        roots: match identity {
            MasterIdentity::PublicCa => Arc::new(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }),
            _ => Arc::clone(&bundle.roots),
        },
        identity,
        host: master.clone(),
        algorithms: provider.signature_verification_algorithms,
    })
}

/// The configuration for one bundle and one rule. It keeps the session tickets, so it lives as long as the bundle.
pub(crate) fn client_config(
    bundle: &Bundle,
    verifier: Arc<dyn ServerCertVerifier>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|source| Error::setting("TLS", "the provider lacks TLS 1.2 or 1.3").because(source))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&bundle.identity))));
    config.resumption = Resumption::in_memory_sessions(limits::TLS_SESSIONS);
    Ok(Arc::new(config))
}

/// Enforces a [`MasterIdentity`]. Nothing of the request leaves before it has agreed.
#[derive(Debug)]
struct MasterVerifier {
    roots: Arc<RootCertStore>,
    identity: MasterIdentity,
    host: ServerName<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl MasterVerifier {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        if let MasterIdentity::Fingerprint(pinned) = self.identity {
            let is_pinned = bundle::fingerprint(end_entity) == hex(&pinned);
            return if is_pinned { Ok(()) } else { Err(CertificateError::ApplicationVerificationFailure.into()) };
        }
        let certificate = ParsedCertificate::try_from(end_entity)?;
        self.check_chain(&certificate, intermediates, now)?;
        match self.identity {
            MasterIdentity::Name => Ok(is_masters_own(end_entity)?),
            MasterIdentity::Host if self.is_for_host(&certificate).is_ok() => Ok(()),
            MasterIdentity::Host => Ok(is_masters_own(end_entity).map_err(Refusal::or_host)?),
            MasterIdentity::PublicCa => self.is_for_host(&certificate),
            MasterIdentity::AnyFromCa | MasterIdentity::Fingerprint(_) => Ok(()),
        }
    }

    fn is_for_host(&self, certificate: &ParsedCertificate<'_>) -> Result<(), rustls::Error> {
        verify_server_name(certificate, &self.host)
    }

    /// The certificate chains to a root, is within its dates, and may serve.
    fn check_chain(
        &self,
        certificate: &ParsedCertificate<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(certificate, &self.roots, intermediates, now, algorithms)
    }

    /// webpki knows neither the rule nor the reason why it could not verify a signature: the issuer's key is too small, say.
    fn explain(
        &self,
        error: rustls::Error,
        shown: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
    ) -> rustls::Error {
        #[expect(deprecated, reason = "webpki may still give it")]
        let is_unverified = matches!(
            error,
            rustls::Error::InvalidCertificate(
                CertificateError::BadSignature
                    | CertificateError::UnsupportedSignatureAlgorithm
                    | CertificateError::UnsupportedSignatureAlgorithmContext { .. }
                    | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
            )
        );
        if is_unverified && let Some(problem) = self.unsupported(shown, others) {
            return Refusal::Unsupported(problem).into();
        }
        let is_of_no_root = is_unverified || error == CertificateError::UnknownIssuer.into();
        if is_of_no_root && self.identity == MasterIdentity::PublicCa { Refusal::NotPublic.into() } else { error }
    }

    fn unsupported(&self, shown: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Option<String> {
        if let Some(problem) = X509::parse(shown).and_then(|shown| shown.unsupported_signature(&self.algorithms)) {
            return Some(format!("the master's certificate cannot be verified: {problem}"));
        }
        // A root that comes along is not verified.
        let issuers = others.iter().filter_map(|other| X509::parse(other)).filter(|issuer| !issuer.is_self_issued());
        let mut problems = issuers
            .filter_map(|issuer| issuer.unsupported_key().or_else(|| issuer.unsupported_signature(&self.algorithms)));
        Some(format!("an issuer of the master's certificate cannot be verified: {}", problems.next()?))
    }
}

/// The subject's common name and a DNS name are the master's, and no other.
pub(crate) fn is_masters_own(certificate: &CertificateDer<'_>) -> Result<(), Refusal> {
    let refusal = |problem| Refusal::NotMasters { problem, or_host: false };
    let Some(certificate) = X509::parse(certificate) else { return Err(refusal("it cannot be read".to_owned())) };
    if !certificate.has_common_name(MASTER_NAME) {
        return Err(refusal(match certificate.common_name().map(|name| printable(&name)) {
            Some(name) => format!("its common name is {name:?} and must be {MASTER_NAME:?} alone"),
            None => format!("it has no common name, which must be {MASTER_NAME:?}"),
        }));
    }
    if !certificate.has_dns_name(MASTER_NAME) {
        return Err(refusal(format!("its common name is {MASTER_NAME:?}, but none of its DNS names is")));
    }
    Ok(())
}

/// Our own reasons not to take a peer for the master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is of our CA, which issued it to somebody else. `or_host`: nor is it valid for the configured host.
    NotMasters { problem: String, or_host: bool },
    /// The rule is `public`, and no public CA issued it.
    NotPublic,
    /// A key or a signature of a kind that cannot be verified here.
    Unsupported(String),
    /// The peer did not sign the handshake with its certificate's key.
    NotItsKey,
}

impl Refusal {
    fn or_host(self) -> Self {
        match self {
            Self::NotMasters { problem, .. } => Self::NotMasters { problem, or_host: true },
            other => other,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMasters { problem, or_host } => {
                write!(f, "the certificate is not the master's own: {problem}")?;
                if *or_host { f.write_str("; nor is it valid for the configured host") } else { Ok(()) }
            }
            Self::NotPublic => f.write_str("the certificate is not of a public CA, which the rule public demands"),
            Self::Unsupported(problem) => f.write_str(problem),
            Self::NotItsKey => f.write_str("the peer does not have the key of the certificate that it shows"),
        }
    }
}

impl StdError for Refusal {}

/// They travel in rustls' error, where `explain` finds them again.
impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> Self {
        CertificateError::Other(OtherError(Arc::new(refusal))).into()
    }
}

/// In a handshake webpki's bad signature is the peer's, not an issuer's.
fn of_handshake(error: rustls::Error) -> rustls::Error {
    if error == CertificateError::BadSignature.into() { Refusal::NotItsKey.into() } else { error }
}

impl ServerCertVerifier for MasterVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity, intermediates, now).map_err(|error| self.explain(error, end_entity, intermediates))?;
        // Its signature of the handshake could not be verified, and would be called bad.
        if let Some(problem) = X509::parse(end_entity).and_then(|shown| shown.unsupported_key()) {
            return Err(Refusal::Unsupported(format!("the master's certificate cannot be used: {problem}")).into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms).map_err(of_handshake)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms).map_err(of_handshake)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[cfg(feature = "loopback")]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    /// Why a certificate of that common name and these DNS names is not the master's own.
    fn judged(common_name: Option<&str>, dns_names: &[&str]) -> Option<String> {
        let names: Vec<_> = dns_names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        common_name.into_iter().for_each(|name| params.distinguished_name.push(DnType::CommonName, name));
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        is_masters_own(certificate.der()).err().map(|refusal| refusal.to_string())
    }

    #[test]
    fn the_common_name_and_a_dns_name_are_both_needed() {
        assert_eq!(judged(Some("swarmctl"), &["localhost", "swarmctl"]), None);
        for (common_name, dns_names, says) in [
            (Some("swarmctl"), &["localhost"][..], "its common name is \"swarmctl\", but none of its DNS names is"),
            (Some("swarmctl"), &["*"], "its common name is \"swarmctl\", but none of its DNS names is"),
            (Some("w\n"), &["swarmctl"], "its common name is \"w\" and must be \"swarmctl\" alone"),
            (None, &["swarmctl"], "it has no common name, which must be \"swarmctl\""),
        ] {
            let said = judged(common_name, dns_names).unwrap();
            assert_eq!(said, format!("the certificate is not the master's own: {says}"));
        }
    }
}
