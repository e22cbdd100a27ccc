//! The cryptography of TLS and of the checks of the bundle: ring. For any thread.

use std::sync::{Arc, LazyLock};

use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;

pub(crate) static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(ring::default_provider()));

/// The algorithms of the signatures that can be verified.
pub(crate) fn algorithms() -> WebPkiSupportedAlgorithms {
    PROVIDER.signature_verification_algorithms
}

/// Checks that a certificate chains to a root, is valid at `now`, and is for servers.
pub(crate) fn verify_chain(
    certificate: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
    now: UnixTime,
) -> Result<(), rustls::Error> {
    let certificate = ParsedCertificate::try_from(certificate)?;
    let all = algorithms().all;
    verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, all)
}
