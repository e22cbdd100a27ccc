//! Who we are: `ca.crt`, `worker.crt` and `worker.key`, loaded and proven before use. Runs on the thread that asks:
//! the caller's at start, the heartbeat thread afterwards.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::digest;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};

use crate::error::{Error, printable_path};
use crate::files::{self, Stamp};
use crate::identity::hex;
use crate::limits;
use crate::panics::quietly;

pub(crate) const CA: &str = "ca.crt";
pub(crate) const CERTIFICATE: &str = "worker.crt";
pub(crate) const KEY: &str = "worker.key";

/// A bundle whose parts are known to fit.
pub(crate) struct Bundle {
    /// The CAs that the master's certificate must chain to.
    pub(crate) roots: Arc<RootCertStore>,
    /// Our certificate, the rest of its chain, and the key that fits it.
    pub(crate) identity: Arc<CertifiedKey>,
    /// What the master knows us by.
    pub(crate) certificate: Certificate,
}

/// What is worth knowing of our certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// SHA-256 of its DER in lowercase hexadecimal: what the master pins to the host uuid.
    pub(crate) fingerprint: String,
    /// The last moment in which it is valid. `None`: it does not say that in a way that can be read.
    pub(crate) expires: Option<SystemTime>,
}

impl Bundle {
    /// Reads the three files of `dir` and proves them: every certificate of the CA file parses, the key is one that
    /// can sign (PKCS#1, PKCS#8 or SEC1) and fits the certificate. The files are not written atomically, so a new
    /// certificate beside an old key is an error here, and the caller looks again later.
    pub(crate) fn load(dir: &Path, provider: &CryptoProvider) -> Result<Self, Error> {
        Self::prove(dir, read, provider)
    }

    /// As [`load`](Self::load), of what `read` finds at the three files' paths.
    pub(crate) fn prove(
        dir: &Path,
        read: impl Fn(&Path) -> Result<Vec<u8>, Error>,
        provider: &CryptoProvider,
    ) -> Result<Self, Error> {
        let [ca, certificate, key] = [CA, CERTIFICATE, KEY].map(|name| dir.join(name));
        let roots = roots(&ca, &read(&ca)?)?;
        let chain = certificates(&certificate, &read(&certificate)?)?;
        let own = chain.first().map(|own| (fingerprint(own), expiry(own, provider)));
        let (fingerprint, expires) = own.unwrap_or_default();
        let key = private_key(&key, &read(&key)?)?;
        let identity = CertifiedKey::from_der(chain, key, provider).map_err(|source| {
            Error::bundle(dir, format!("{CERTIFICATE} and {KEY} do not make an identity; enrol this host again"))
                .because(source)
        })?;
        warn_of_readers(&dir.join(KEY));
        let certificate = Certificate { fingerprint, expires };
        Ok(Self { roots: Arc::new(roots), identity: Arc::new(identity), certificate })
    }

    /// Whether our certificate was issued by the bundle's CA. A master that has another one may take it all the same.
    #[cfg(feature = "cli")]
    pub(crate) fn is_of_its_ca(&self, provider: &CryptoProvider) -> bool {
        let [own, others @ ..] = self.identity.cert.as_slice() else { return false };
        let Ok(own) = ParsedCertificate::try_from(own) else { return false };
        let algorithms = provider.signature_verification_algorithms.all;
        let judged = verify_server_cert_signed_by_trust_anchor(&own, &self.roots, others, UnixTime::now(), algorithms);
        let strangers = [CertificateError::UnknownIssuer, CertificateError::BadSignature];
        !judged.is_err_and(|error| strangers.into_iter().any(|stranger| error == stranger.into()))
    }

    /// What changes when any of the three files does: three `stat`s.
    pub(crate) fn stamps(dir: &Path) -> [Stamp; 3] {
        [CA, CERTIFICATE, KEY].map(|name| Stamp::of(&dir.join(name)))
    }
}

/// SHA-256 of a certificate's DER in lowercase hexadecimal.
pub(crate) fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    hex(digest::digest(&digest::SHA256, certificate).as_ref())
}

/// The last moment in which a certificate is valid. webpki looks at the dates before all else, and tells it to whoever comes
/// later than that; nothing else of it is looked at here.
fn expiry(certificate: &CertificateDer<'_>, provider: &CryptoProvider) -> Option<SystemTime> {
    let certificate = ParsedCertificate::try_from(certificate).ok()?;
    let (nobody, late) = (RootCertStore::empty(), UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX)));
    let algorithms = provider.signature_verification_algorithms.all;
    match verify_server_cert_signed_by_trust_anchor(&certificate, &nobody, &[], late, algorithms) {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => {
            UNIX_EPOCH.checked_add(Duration::from_secs(not_after.as_secs()))
        }
        _ => None,
    }
}

fn roots(path: &Path, content: &[u8]) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for ca in certificates(path, content)? {
        roots.add(ca).map_err(|source| Error::bundle(path, "is not a CA certificate").because(source))?;
    }
    Ok(roots)
}

fn certificates(path: &Path, content: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(content)
        .collect::<Result<_, _>>()
        .map_err(|error| Error::bundle(path, pem_problem(&error)))?;
    if certificates.is_empty() {
        return Err(Error::bundle(path, "holds no certificate; it should be a PEM file that begins -----BEGIN CERT"));
    }
    Ok(certificates)
}

fn private_key(path: &Path, content: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_slice(content).map_err(|error| match error {
        pem::Error::NoItemsFound => Error::bundle(path, "holds no private key; PKCS#1, PKCS#8 and SEC1 are understood"),
        error => Error::bundle(path, pem_problem(&error)),
    })
}

/// A key that others may read is as good as theirs. It is used all the same: liveness is worth more.
fn warn_of_readers(key: &Path) {
    let others = fs::metadata(key).map_or(0, |found| found.permissions().mode() & 0o077);
    if others != 0 {
        let (file, mode) = (printable_path(key), 0o600 | others);
        quietly(|| log::warn!("the key can be read by others, make it 0600: file={file} mode={mode:04o}"));
    }
}

/// In our own words: the library's quote bytes of the file, and one of the files is a key.
fn pem_problem(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::MissingSectionEnd { .. } => "ends in the middle of a PEM section; was it written half?",
        pem::Error::Base64Decode(_) => "has a PEM section that is not base64",
        _ => "is not PEM",
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    files::read(path, limits::PEM_FILE).map_err(|source| Error::bundle(path, "cannot be read").because(source))
}
