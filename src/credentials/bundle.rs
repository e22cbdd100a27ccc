//! Who we are: `ca.crt`, `worker.crt` and `worker.key`, loaded and proven before use. Runs on the thread that asks:
//! the caller's at start, the heartbeat thread afterwards.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, InconsistentKeys, RootCertStore};

use crate::credentials::pem::{self, Section};
use crate::error::{Error, sanitize_path};
use crate::files::{self, FileVersion};
use crate::limits;
use crate::master::identity::fingerprint;
use crate::master::x509::{X509, unsupported_private_key};
use crate::panics::quietly;
use crate::text::sanitize;

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
    /// The certificates of the CA file that may not issue any, and why: they count for nothing.
    #[cfg(feature = "cli")]
    pub(crate) ignored: Vec<String>,
}

/// What a bundle that cannot be used takes.
pub(crate) const ENROL: &str =
    "enrol this host again from its master, which writes all three files";
const MEND: &str = "mend the file, or enrol this host again";
const OTHER_KEY: &str =
    "let the master issue a certificate whose key is supported, and enrol this host again";

/// What is worth knowing of our certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// SHA-256 of its DER in lowercase hexadecimal: what the master pins to the host uuid.
    pub(crate) fingerprint: String,
    /// The last moment in which it is valid. `None`: it does not say that in a way that can be read.
    pub(crate) expires: Option<SystemTime>,
}

impl Bundle {
    /// Reads the three files of `dir` and proves them: every certificate of the CA file parses and one at least may issue
    /// others, the key is one that can sign (PKCS#1, PKCS#8 or SEC1) and fits the certificate. The files are not written
    /// atomically, so a new certificate beside an old key is an error here, and the caller looks again later.
    pub(crate) fn load(dir: &Path, provider: &CryptoProvider) -> Result<Self, Error> {
        Self::prove(dir, read, provider)
    }

    /// As [`load`](Self::load), of what `read` finds at the three files' paths.
    pub(crate) fn prove(
        dir: &Path,
        read: impl Fn(&Path) -> Result<Vec<u8>, Error>,
        provider: &CryptoProvider,
    ) -> Result<Self, Error> {
        let [ca_file, certificate_file, key_file] =
            [CA, CERTIFICATE, KEY].map(|name| dir.join(name));
        let algorithms = provider.signature_verification_algorithms;
        let (roots, ignored) = roots(&ca_file, &read(&ca_file)?, &algorithms)?;
        let chain = own_chain(&certificate_file, &read(&certificate_file)?)?;
        let own = chain.first().map(|own| (fingerprint(own), expiry(own, provider)));
        let (fingerprint, expires) = own.unwrap_or_default();
        let key = private_key(&key_file, &read(&key_file)?)?;
        let identity = identity(dir, chain, key, provider)?;
        warn_of_readers(&key_file);
        for ignored in &ignored {
            log::warn!(
                "a certificate of ca.crt is ignored: file={} reason={ignored:?}",
                sanitize_path(&ca_file)
            );
        }
        let certificate = Certificate { fingerprint, expires };
        Ok(Self {
            roots: Arc::new(roots),
            identity: Arc::new(identity),
            certificate,
            #[cfg(feature = "cli")]
            ignored,
        })
    }

    /// Whether our certificate was issued by the bundle's CA. A master that has another one may take it all the same.
    #[cfg(feature = "cli")]
    pub(crate) fn is_of_its_ca(&self, provider: &CryptoProvider) -> bool {
        self.is_of(&self.roots, provider)
    }

    /// Whether our certificate was issued by one of these.
    #[cfg(feature = "cli")]
    pub(crate) fn is_of(&self, roots: &RootCertStore, provider: &CryptoProvider) -> bool {
        let [own, others @ ..] = self.identity.cert.as_slice() else { return false };
        let Ok(own) = ParsedCertificate::try_from(own) else { return false };
        let algorithms = provider.signature_verification_algorithms.all;
        let judged = verify_server_cert_signed_by_trust_anchor(
            &own,
            roots,
            others,
            UnixTime::now(),
            algorithms,
        );
        #[expect(deprecated, reason = "webpki may still give it")]
        let is_strangers = |error: &rustls::Error| {
            use CertificateError as Bad;
            matches!(
                error,
                rustls::Error::InvalidCertificate(
                    Bad::UnknownIssuer
                        | Bad::BadSignature
                        // The CA of that name has a key of another type.
                        | Bad::UnsupportedSignatureAlgorithm
                        | Bad::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
                )
            )
        };
        !judged.as_ref().is_err_and(is_strangers)
    }

    /// Why a master whose OpenSSL has its defaults may refuse our certificate, whatever its issuer.
    #[cfg(feature = "cli")]
    pub(crate) fn weak_signature(&self, provider: &CryptoProvider) -> Option<String> {
        let own = X509::parse(self.identity.cert.first()?)?;
        own.unsupported_signature(&provider.signature_verification_algorithms)
    }

    /// What changes when any of the three files does: three `stat`s.
    pub(crate) fn stamps(dir: &Path) -> [FileVersion; 3] {
        [CA, CERTIFICATE, KEY].map(|name| FileVersion::of(&dir.join(name)))
    }
}

/// What is wrong with each file of a bundle that cannot be used.
#[cfg(feature = "cli")]
pub(crate) struct Judged {
    pub(crate) ca: Result<(), Error>,
    pub(crate) certificate: Result<(), Error>,
    /// `None`: it may be good, but there is no certificate that it could fit.
    pub(crate) key: Option<Result<(), Error>>,
}

#[cfg(feature = "cli")]
impl Judged {
    /// Each file by itself, and then whether certificate and key fit. `found`: what was wrong when the bundle was loaded.
    pub(crate) fn of(dir: &Path, provider: &CryptoProvider, found: Error) -> Self {
        let [ca_file, certificate_file, key_file] =
            [CA, CERTIFICATE, KEY].map(|name| dir.join(name));
        let algorithms = provider.signature_verification_algorithms;
        let ca =
            read(&ca_file).and_then(|content| roots(&ca_file, &content, &algorithms)).map(drop);
        let chain =
            read(&certificate_file).and_then(|content| own_chain(&certificate_file, &content));
        let key = read(&key_file).and_then(|content| private_key(&key_file, &content));
        let (certificate, key) = match (chain, key) {
            (Ok(chain), Ok(key)) => match identity(dir, chain, key, provider) {
                // The files have changed since.
                Ok(_) if ca.is_ok() => (Ok(()), Some(Err(found))),
                Ok(_) => (Ok(()), Some(Ok(()))),
                Err(error) if error.path() == Some(&certificate_file) => (Err(error), None),
                Err(error) => (Ok(()), Some(Err(error))),
            },
            (Ok(_), Err(error)) => (Ok(()), Some(Err(error))),
            (Err(error), key) => (Err(error), key.err().map(Err)),
        };
        Self { ca, certificate, key }
    }
}

/// Our certificate, and what comes with it.
fn own_chain(path: &Path, content: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let chain = certificates(path, content)?;
    match chain.first().and_then(|own| X509::parse(own)).and_then(|own| own.unsupported_key()) {
        Some(problem) => Err(Error::bundle(path, format!("cannot be used: {problem}"), OTHER_KEY)),
        None => Ok(chain),
    }
}

/// Our certificates and the key, if it is the first one's.
fn identity(
    dir: &Path,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, Error> {
    let key = provider.key_provider.load_private_key(key);
    // rustls' own words say no more.
    let key = key.map_err(|_| {
        Error::bundle(dir.join(KEY), "holds a private key that cannot be read", ENROL)
    })?;
    let identity = CertifiedKey::new(chain, key);
    let fits = |identity: &CertifiedKey| match identity.keys_match() {
        // No key of ring's is of this kind.
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(()),
        Err(error) => Err(error),
    };
    let source = match fits(&identity) {
        Ok(()) => return Ok(identity),
        Err(source) => source,
    };
    if !matches!(source, rustls::Error::InconsistentKeys(_)) {
        return Err(
            Error::bundle(dir.join(CERTIFICATE), "cannot be used", ENROL).with_source(source)
        );
    }
    let others = identity.cert.iter().skip(1);
    let mut others =
        others.map(|other| CertifiedKey::new(vec![other.clone()], Arc::clone(&identity.key)));
    let unfit = |remedy| {
        Error::bundle(dir, format!("{CERTIFICATE} and {KEY} do not make an identity"), remedy)
    };
    Err(match others.any(|other| fits(&other).is_ok()) {
        true => unfit("put this host's own certificate first in worker.crt").with_source(source),
        // Enrolment writes one file after another, so this may pass.
        false => unfit("enrol this host again, unless it is being enrolled right now")
            .with_source(source)
            .passing(),
    })
}

/// The last moment in which a certificate is valid. webpki looks at the dates before all else, and tells it to whoever comes
/// later than that; nothing else of it is looked at here.
fn expiry(certificate: &CertificateDer<'_>, provider: &CryptoProvider) -> Option<SystemTime> {
    let certificate = ParsedCertificate::try_from(certificate).ok()?;
    let (nobody, late) =
        (RootCertStore::empty(), UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX)));
    let algorithms = provider.signature_verification_algorithms.all;
    match verify_server_cert_signed_by_trust_anchor(&certificate, &nobody, &[], late, algorithms) {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
            not_after,
            ..
        })) => UNIX_EPOCH.checked_add(Duration::from_secs(not_after.as_secs())),
        _ => None,
    }
}

/// The CAs of the file, and of its other certificates why each is none. webpki takes whatever it is given as a root for a CA:
/// with a worker's certificate among them, that worker's key could make a master's.
fn roots(
    path: &Path,
    content: &[u8],
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<(RootCertStore, Vec<String>), Error> {
    let mut roots = RootCertStore::empty();
    let mut ignored = Vec::new();
    for der in certificates(path, content)? {
        match X509::parse(&der).and_then(|certificate| not_a_root(&certificate, algorithms)) {
            Some(problem) => ignored.push(problem),
            None => roots.add(der).map_err(|source| {
                Error::bundle(path, NOT_A_CERTIFICATE, MEND).with_source(source)
            })?,
        }
    }
    match ignored.first() {
        Some(problem) if roots.is_empty() => {
            Err(Error::bundle(path, format!("holds no usable CA certificate: {problem}"), ENROL))
        }
        _ => Ok((roots, ignored)),
    }
}

/// Why a certificate is no root, with its common name.
fn not_a_root(certificate: &X509<'_>, algorithms: &WebPkiSupportedAlgorithms) -> Option<String> {
    let problem = certificate.not_a_ca(algorithms).map(|what| format!("it is {what}"));
    let problem = problem.or_else(|| certificate.unsupported_key())?;
    let name =
        certificate.common_name().map_or_else(|| "no name".to_owned(), |name| sanitize(&name));
    Some(format!("{name}: {problem}"))
}

const NOT_A_CERTIFICATE: &str = "has a section that is not an X.509 certificate";

/// Whether a certificate of the CA file is a root.
#[cfg(feature = "cli")]
pub(crate) fn is_root(der: &CertificateDer<'_>, provider: &CryptoProvider) -> bool {
    let algorithms = provider.signature_verification_algorithms;
    X509::parse(der).is_some_and(|certificate| not_a_root(&certificate, &algorithms).is_none())
}

/// All certificates of a file, at least one.
pub(crate) fn certificates(
    path: &Path,
    content: &[u8],
) -> Result<Vec<CertificateDer<'static>>, Error> {
    certificates_of(path, content).map_err(|error| unless_half_written(content, error))
}

fn certificates_of(path: &Path, content: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let (mut certificates, mut other) = (Vec::new(), None);
    for section in sections(path, content)? {
        match section {
            Section::Certificate(der) if X509::parse(&der).is_none() => {
                return Err(Error::bundle(path, NOT_A_CERTIFICATE, MEND));
            }
            Section::Certificate(der) => certificates.push(CertificateDer::from(der)),
            Section::PrivateKey(_) | Section::EncryptedKey => other = Some("a private key"),
            Section::Other(name) => other = Some(name),
        }
    }
    match (certificates.is_empty(), other) {
        (false, _) => Ok(certificates),
        (true, Some(other)) => {
            Err(Error::bundle(path, format!("holds no certificate, but {other}"), ENROL))
        }
        (true, None) => Err(Error::bundle(
            path,
            "holds no PEM section that begins -----BEGIN CERTIFICATE-----",
            ENROL,
        )),
    }
}

/// The one private key of a file.
fn private_key(path: &Path, content: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    private_key_of(path, content).map_err(|error| unless_half_written(content, error))
}

fn private_key_of(path: &Path, content: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    let (mut keys, mut encrypted, mut other) = (Vec::new(), false, None);
    for section in sections(path, content)? {
        match section {
            Section::PrivateKey(key) => keys.push(key),
            Section::EncryptedKey => encrypted = true,
            Section::Certificate(_) => other = Some("a certificate"),
            Section::Other(name) => other = Some(name),
        }
    }
    let count = keys.len();
    match (keys.pop(), encrypted, other) {
        (Some(key), ..) if count == 1 => match unsupported_private_key(&key) {
            Some(problem) => {
                Err(Error::bundle(path, format!("cannot be used: it {problem}"), OTHER_KEY))
            }
            None => Ok(key),
        },
        (Some(_), ..) => Err(Error::bundle(
            path,
            format!("holds {count} private keys"),
            "keep the one of worker.crt",
        )),
        (None, true, _) => Err(Error::bundle(
            path,
            "holds an encrypted private key, and there is nobody to ask for its passphrase",
            "decrypt it (openssl pkey -in worker.key -out FILE), or enrol this host again",
        )),
        (None, false, Some(other)) => {
            Err(Error::bundle(path, format!("holds no private key, but {other}"), ENROL))
        }
        (None, false, None) => Err(Error::bundle(
            path,
            "holds no private key; PKCS#1, PKCS#8 and SEC1 in PEM are understood",
            ENROL,
        )),
    }
}

/// An enrolment that is under way has not written the rest of this file yet.
fn unless_half_written(content: &[u8], error: Error) -> Error {
    if pem::is_half_written(content) { error.passing() } else { error }
}

fn sections(path: &Path, content: &[u8]) -> Result<Vec<Section>, Error> {
    pem::sections(content)
        .map_err(|pem::Problem { what, remedy }| Error::bundle(path, what, remedy.unwrap_or(MEND)))
}

/// A key that others may read is as good as theirs. It is used all the same: liveness is worth more.
fn warn_of_readers(key: &Path) {
    let others = fs::metadata(key).map_or(0, |found| found.permissions().mode() & 0o077);
    if others != 0 {
        let (file, mode) = (sanitize_path(key), 0o600 | others);
        quietly(|| {
            log::warn!("the key can be read by others, make it 0600: file={file} mode={mode:04o}")
        });
    }
}

/// One of the three files. That it is missing may pass if an enrolment is under way, or the file system is not mounted yet.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    files::read(path, limits::PEM_FILE).map_err(|source| {
        let dir = path.parent().unwrap_or(Path::new(""));
        let is_missing = source.kind() == io::ErrorKind::NotFound;
        let remedy = match source.kind() {
            _ if is_missing && !dir.exists() => {
                "enrol this host, or correct the agent dir, which does not exist"
            }
            _ if is_missing => ENROL,
            _ => files::remedy(&source),
        };
        let error = Error::bundle(path, "cannot be read", remedy).with_source(source);
        let may_come = || {
            files::may_come(path)
                || [CA, CERTIFICATE, KEY].iter().any(|name| dir.join(name).exists())
        };
        if is_missing && may_come() { error.passing() } else { error }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::master::verifier;

    /// Cut at every byte, each of the three files is one that an enrolment has not finished, or it is good.
    #[cfg(feature = "loopback")]
    #[test]
    fn every_half_written_file_may_pass_and_garbage_may_not() {
        use crate::loopback::{Authority, Role};
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new().unwrap();
        authority
            .write_bundle(&authority.issue(Role::Worker("w".to_owned())).unwrap(), dir.path())
            .unwrap();
        let provider = verifier::provider();
        for name in [CA, CERTIFICATE, KEY] {
            let path = dir.path().join(name);
            let whole = fs::read(&path).unwrap();
            let mut refused = 0;
            for end in 0..whole.len() {
                // Nothing follows, or the room for the rest.
                for rest in [0, whole.len() - end] {
                    fs::write(&path, [&whole[..end], &vec![0; rest]].concat()).unwrap();
                    if let Err(error) = Bundle::load(dir.path(), &provider) {
                        let is_whole = whole[..end].trim_ascii_end() == whole.trim_ascii_end();
                        assert!(error.is_transient() || is_whole, "{name} cut at {end}: {error:?}");
                        refused += usize::from(rest == 0);
                    }
                }
            }
            assert!(refused >= whole.len() - 2, "{name}: {refused} of {}", whole.len());
            let text = String::from_utf8(whole.clone()).unwrap();
            let mangled = text.replacen("\nM", "\n!", 1);
            for garbage in ["garbage", "garbage\n", &mangled, mangled.trim_end(), "\0garbage"] {
                fs::write(&path, garbage).unwrap();
                let error = Bundle::load(dir.path(), &provider).err().unwrap();
                assert!(!error.is_transient(), "{name} of {garbage:?}: {error:?}");
            }
            fs::write(&path, whole).unwrap();
        }
    }

    #[test]
    fn files_that_are_missing_may_come_where_the_folder_is_empty_or_has_the_others() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("agent");
        let transient = || Bundle::load(&dir, &verifier::provider()).err().unwrap().is_transient();
        assert!(transient(), "the folder in which it is to be is empty");
        fs::write(parent.path().join("other"), "").unwrap();
        assert!(!transient(), "there are other files, and the agent dir is missing");
        fs::create_dir(&dir).unwrap();
        assert!(transient(), "the agent dir is empty");
        fs::write(dir.join("heartbeat.db-lock"), "").unwrap();
        assert!(transient(), "the outbox is ours");
        fs::write(dir.join("topology.db"), "").unwrap();
        assert!(!transient(), "somebody else's file is there, and the bundle is not");
        fs::write(dir.join(KEY), "").unwrap();
        assert!(transient(), "one of the three is there");
        let link = |target: &str, path: &Path| std::os::unix::fs::symlink(target, path).unwrap();
        fs::remove_file(dir.join(KEY)).unwrap();
        [CA, CERTIFICATE, KEY].iter().for_each(|name| link("/nonexistent/file", &dir.join(name)));
        assert!(transient(), "they are symlinks, and what these lead to may not be mounted");
        fs::remove_dir_all(&dir).unwrap();
        link("/nonexistent/agent", &dir);
        assert!(transient(), "the agent dir is such a symlink");
    }
}
