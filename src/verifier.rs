//! Who counts as the master: the rule for its certificate, and the rustls configuration that enforces it. Handshakes run on
//! the heartbeat thread.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::SingleCertAndKey;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::bundle::{self, Bundle};
use crate::error::Error;
use crate::identity::{MasterIdentity, hex};
use crate::limits;

/// The name that the master's own certificate always carries (`PROTOCOL.md`, "TLS").
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

    /// The certificate is the master's own, or at least the configured host's.
    fn check_name(&self, certificate: &ParsedCertificate<'_>) -> Result<(), rustls::Error> {
        let own = ServerName::try_from(MASTER_NAME).map_err(|_| rustls::Error::General(MASTER_NAME.to_owned()))?;
        verify_server_name(certificate, &own).or_else(|_| verify_server_name(certificate, &self.host))
    }
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
        let certificate = ParsedCertificate::try_from(end_entity)?;
        match self.identity {
            MasterIdentity::Name => {
                self.check_chain(&certificate, intermediates, now)?;
                self.check_name(&certificate)?;
            }
            MasterIdentity::AnyFromCa => self.check_chain(&certificate, intermediates, now)?,
            MasterIdentity::PublicCa => {
                self.check_chain(&certificate, intermediates, now)?;
                verify_server_name(&certificate, &self.host)?;
            }
            MasterIdentity::Fingerprint(pinned) => {
                if bundle::fingerprint(end_entity) != hex(&pinned) {
                    return Err(CertificateError::ApplicationVerificationFailure.into());
                }
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
