//! The bundle: `ca.crt`, `worker.crt` and `worker.key`. The files are checked when they are loaded.
//! Runs on the outbox thread, and for `check` on the main thread.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};

use crate::credentials::pem::{self, REPAIR, Section};
use crate::error::{Error, sanitize_path};
use crate::files;
use crate::limits;
use crate::master::crypto::{PROVIDER, verify_chain};
use crate::master::identity::fingerprint;
use crate::master::x509::{X509, unsupported_private_key};
use crate::panics::quietly;
use crate::text::sanitize;

pub(crate) const CA: &str = "ca.crt";
pub(crate) const CERTIFICATE: &str = "worker.crt";
pub(crate) const KEY: &str = "worker.key";

/// A bundle that was checked: its certificate and its key match.
pub(crate) struct Bundle {
    /// The CAs to which the master's certificate must chain.
    pub(crate) roots: Arc<RootCertStore>,
    /// This host's certificate with its chain, and its key.
    pub(crate) identity: Arc<CertifiedKey>,
    /// The fingerprint and the expiry of this host's certificate.
    pub(crate) certificate: Certificate,
    /// The certificates in `ca.crt` that are ignored because they are not CA certificates, with the
    /// reasons.
    #[cfg(feature = "cli")]
    pub(crate) ignored: Vec<String>,
}

/// The advice for a bundle that cannot be used.
pub(crate) const ENROL: &str =
    "enrol this host again from its master, which writes all three files";
const OTHER_KEY: &str =
    "let the master issue a certificate whose key is supported, and enrol this host again";

/// This host's certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// SHA-256 of its DER in lowercase hexadecimal. The master pins it to the host uuid.
    pub(crate) fingerprint: String,
    /// The end of its validity. `None`: it cannot be parsed.
    pub(crate) expires: Option<SystemTime>,
}

impl Bundle {
    /// Reads and checks the three files in `dir`: every certificate in `ca.crt` can be parsed, at
    /// least one is a CA certificate, and the key (PKCS#1, PKCS#8 or SEC1) is supported and matches
    /// the certificate. Enrolment does not write the files atomically. A new certificate with an
    /// old key is an error, and the caller tries again later.
    pub(crate) fn load(dir: &Path) -> Result<Self, Error> {
        Self::load_with(dir, read)
    }

    /// As [`load`](Self::load), with `read` to read each file.
    pub(crate) fn load_with(
        dir: &Path,
        read: impl Fn(&Path) -> Result<Vec<u8>, Error>,
    ) -> Result<Self, Error> {
        let Parts { roots, chain, key } = Parts::read(dir, read);
        let (roots, ignored) = roots?;
        let chain = chain?;
        let certificate = chain.first().map(Certificate::of).unwrap_or_default();
        let identity = identity(dir, chain, key?)?;
        warn_of_readable_key(&dir.join(KEY));
        for ignored in &ignored {
            log::warn!(
                "certificate in ca.crt ignored: file={} reason={ignored:?}",
                sanitize_path(&dir.join(CA))
            );
        }
        Ok(Self {
            roots: Arc::new(roots),
            identity: Arc::new(identity),
            certificate,
            #[cfg(feature = "cli")]
            ignored,
        })
    }

    /// Whether one of these CAs issued this host's certificate. The master may accept it if not, as
    /// it may trust another CA.
    #[cfg(feature = "cli")]
    pub(crate) fn is_issued_by(&self, roots: &RootCertStore) -> bool {
        let [own, others @ ..] = self.identity.cert.as_slice() else { return false };
        let result = verify_chain(own, others, roots, UnixTime::now());
        #[expect(deprecated, reason = "webpki may still return it")]
        let is_of_another_ca = |error: &rustls::Error| {
            use CertificateError as Bad;
            matches!(
                error,
                rustls::Error::InvalidCertificate(
                    Bad::UnknownIssuer
                        | Bad::BadSignature
                        // The CA with the issuer's name has a key of another type.
                        | Bad::UnsupportedSignatureAlgorithm
                        | Bad::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
                )
            )
        };
        !result.as_ref().is_err_and(is_of_another_ca)
    }

    /// Why OpenSSL with its defaults, which the master uses, may refuse this host's certificate:
    /// its signature is weak.
    #[cfg(feature = "cli")]
    pub(crate) fn weak_signature(&self) -> Option<String> {
        X509::parse(self.identity.cert.first()?)?.unsupported_signature()
    }
}

/// The paths of the three files.
pub(super) fn paths(dir: &Path) -> [PathBuf; 3] {
    [CA, CERTIFICATE, KEY].map(|name| dir.join(name))
}

/// What each file of a bundle contains.
struct Parts {
    /// The CA certificates, and for each other certificate the reason why it is ignored.
    roots: Result<(RootCertStore, Vec<String>), Error>,
    chain: Result<Vec<CertificateDer<'static>>, Error>,
    key: Result<PrivateKeyDer<'static>, Error>,
}

impl Parts {
    fn read(dir: &Path, read: impl Fn(&Path) -> Result<Vec<u8>, Error>) -> Self {
        let file = |name| {
            let path = dir.join(name);
            read(&path).map(|content| PemFile { path, content })
        };
        Self {
            roots: file(CA).and_then(|file| file.roots()),
            chain: file(CERTIFICATE).and_then(|file| file.own_chain()),
            key: file(KEY).and_then(|file| file.private_key()),
        }
    }
}

/// The result of the check of each file of a bundle.
#[cfg(feature = "cli")]
pub(crate) struct BundleCheck {
    pub(crate) ca: Result<(), Error>,
    pub(crate) certificate: Result<(), Error>,
    /// `None`: the key cannot be checked without a valid certificate.
    pub(crate) key: Option<Result<(), Error>>,
}

#[cfg(feature = "cli")]
impl BundleCheck {
    /// Checks each file by itself, and then whether certificate and key match. `error` is the error
    /// of the load.
    pub(crate) fn of(dir: &Path, error: Error) -> Self {
        let Parts { roots, chain, key } = Parts::read(dir, read);
        let ca = roots.map(drop);
        let (certificate, key) = match (chain, key) {
            (Ok(chain), Ok(key)) => match identity(dir, chain, key) {
                // The files have changed since the load.
                Ok(_) if ca.is_ok() => (Ok(()), Some(Err(error))),
                Ok(_) => (Ok(()), Some(Ok(()))),
                Err(error) if error.path() == Some(&dir.join(CERTIFICATE)) => (Err(error), None),
                Err(error) => (Ok(()), Some(Err(error))),
            },
            (Ok(_), Err(error)) => (Ok(()), Some(Err(error))),
            (Err(error), key) => (Err(error), key.err().map(Err)),
        };
        Self { ca, certificate, key }
    }
}

/// The certificates and the key, if the key belongs to the first certificate.
fn identity(
    dir: &Path,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, Error> {
    // The error of rustls adds nothing.
    let key = PROVIDER.key_provider.load_private_key(key).map_err(|_| {
        Error::bundle(dir.join(KEY), "holds a private key that cannot be read", ENROL)
    })?;
    let identity = CertifiedKey::new(chain, key);
    let Err(source) = identity.keys_match() else { return Ok(identity) };
    if !matches!(source, rustls::Error::InconsistentKeys(_)) {
        let error = Error::bundle(dir.join(CERTIFICATE), "cannot be used", ENROL);
        return Err(error.with_source(source));
    }
    let matches_another = identity.cert.iter().skip(1).any(|other| {
        let other = CertifiedKey::new(vec![other.clone()], Arc::clone(&identity.key));
        other.keys_match().is_ok()
    });
    let mismatch = |remedy| {
        let problem = format!("{CERTIFICATE} and {KEY} do not match");
        Error::bundle(dir, problem, remedy).with_source(source)
    };
    Err(if matches_another {
        mismatch("put this host's own certificate first in worker.crt")
    } else {
        // Enrolment writes the files one after another, so they may match soon.
        mismatch("enrol this host again, unless its enrolment is in progress").passing()
    })
}

impl Certificate {
    fn of(der: &CertificateDer<'_>) -> Self {
        Self { fingerprint: fingerprint(der), expires: expiry(der) }
    }
}

/// The end of a certificate's validity. webpki checks the dates first, so a verification at a late
/// time fails with an error that contains the end.
fn expiry(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let late = UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX));
    match verify_chain(certificate, &[], &RootCertStore::empty(), late) {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
            not_after,
            ..
        })) => UNIX_EPOCH.checked_add(Duration::from_secs(not_after.as_secs())),
        _ => None,
    }
}

/// Why a certificate is not used as a root, with its common name.
fn not_a_root(certificate: &X509<'_>) -> Option<String> {
    let problem = certificate.not_a_ca().map(|what| format!("it is {what}"));
    let problem = problem.or_else(|| certificate.unsupported_key())?;
    let name =
        certificate.common_name().map_or_else(|| "no name".to_owned(), |name| sanitize(&name));
    Some(format!("{name}: {problem}"))
}

/// Whether a certificate of `ca.crt` is used as a root.
#[cfg(feature = "cli")]
pub(crate) fn is_root(der: &CertificateDer<'_>) -> bool {
    X509::parse(der).is_some_and(|certificate| not_a_root(&certificate).is_none())
}

/// All certificates of a file. It is an error if there is none.
#[cfg(feature = "cli")]
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    PemFile { path: path.to_owned(), content: read(path)? }.certificates()
}

/// A file of the bundle.
struct PemFile {
    path: PathBuf,
    content: Vec<u8>,
}

const NOT_A_CERTIFICATE: &str = "has a section that is not an X.509 certificate";

impl PemFile {
    /// The CA certificates, and for each other certificate the reason why it is ignored. webpki
    /// accepts any certificate as a root. With a worker's certificate as a root, that worker's key
    /// could issue a certificate for the master.
    fn roots(&self) -> Result<(RootCertStore, Vec<String>), Error> {
        let mut roots = RootCertStore::empty();
        let mut ignored = Vec::new();
        for der in self.certificates()? {
            match X509::parse(&der).and_then(|certificate| not_a_root(&certificate)) {
                Some(problem) => ignored.push(problem),
                None => roots
                    .add(der)
                    .map_err(|source| self.error(NOT_A_CERTIFICATE, REPAIR).with_source(source))?,
            }
        }
        match ignored.first() {
            Some(problem) if roots.is_empty() => {
                Err(self.error(format!("holds no usable CA certificate: {problem}"), ENROL))
            }
            _ => Ok((roots, ignored)),
        }
    }

    /// This host's certificate and its chain.
    fn own_chain(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        let chain = self.certificates()?;
        match chain.first().and_then(|own| X509::parse(own)?.unsupported_key()) {
            Some(problem) => Err(self.error(format!("cannot be used: {problem}"), OTHER_KEY)),
            None => Ok(chain),
        }
    }

    /// All certificates. It is an error if there is none.
    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        let mut certificates = Vec::new();
        let mut other = None;
        for section in self.sections()? {
            match section {
                Section::Certificate(der) if X509::parse(&der).is_none() => {
                    return Err(self.error(NOT_A_CERTIFICATE, REPAIR));
                }
                Section::Certificate(der) => certificates.push(der),
                Section::PrivateKey(_) | Section::EncryptedKey => other = Some("a private key"),
                Section::Other(name) => other = Some(name),
            }
        }
        if !certificates.is_empty() {
            return Ok(certificates);
        }
        let problem = match other {
            Some(other) => format!("holds no certificate, but {other}"),
            None => "holds no PEM section that begins with -----BEGIN CERTIFICATE-----".to_owned(),
        };
        Err(self.error(problem, ENROL))
    }

    /// The private key. It is an error if there is more than one.
    fn private_key(&self) -> Result<PrivateKeyDer<'static>, Error> {
        let mut keys = Vec::new();
        let mut encrypted = false;
        let mut other = None;
        for section in self.sections()? {
            match section {
                Section::PrivateKey(key) => keys.push(key),
                Section::EncryptedKey => encrypted = true,
                Section::Certificate(_) => other = Some("a certificate"),
                Section::Other(name) => other = Some(name),
            }
        }
        let count = keys.len();
        let (problem, remedy) = match (keys.pop(), encrypted, other) {
            (Some(key), ..) if count == 1 => match unsupported_private_key(&key) {
                Some(problem) => (format!("cannot be used: it {problem}"), OTHER_KEY),
                None => return Ok(key),
            },
            (Some(_), ..) => {
                (format!("holds {count} private keys"), "keep only the key of worker.crt")
            }
            (None, true, _) => (
                "holds an encrypted private key, which is not supported, as no passphrase can be \
                 entered"
                    .to_owned(),
                "decrypt it (openssl pkey -in worker.key -out FILE), or enrol this host again",
            ),
            (None, false, Some(other)) => (format!("holds no private key, but {other}"), ENROL),
            (None, false, None) => {
                ("holds no private key in PEM (PKCS#1, PKCS#8 or SEC1)".to_owned(), ENROL)
            }
        };
        Err(self.error(problem, remedy))
    }

    fn sections(&self) -> Result<Vec<Section>, Error> {
        pem::sections(&self.content)
            .map_err(|pem::Problem { what, remedy }| self.error(what, remedy))
    }

    /// An error about the content. It is passing if the file is incomplete, because an enrolment may
    /// still be writing it.
    fn error(&self, problem: impl Into<String>, remedy: &'static str) -> Error {
        let error = Error::bundle(&self.path, problem, remedy);
        if pem::is_half_written(&self.content) { error.passing() } else { error }
    }
}

/// Warns if other users can read the key. The key is used nevertheless, so that the heartbeat keeps
/// running.
fn warn_of_readable_key(key: &Path) {
    let others = fs::metadata(key).map_or(0, |found| found.permissions().mode() & 0o077);
    if others != 0 {
        let file = sanitize_path(key);
        let mode = 0o600 | others;
        quietly(|| {
            log::warn!(
                "private key is accessible to other users, set its mode to 0600: file={file} mode={mode:04o}"
            )
        });
    }
}

/// Reads one of the three files. The error for a missing file is passing if an enrolment may be in
/// progress, or if the file system may not be mounted yet.
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
        let may_appear = || files::may_appear(path) || paths(dir).iter().any(|path| path.exists());
        if is_missing && may_appear() { error.passing() } else { error }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Truncates each file at every byte. The result is either usable, or an error that may pass.
    #[cfg(feature = "loopback")]
    #[test]
    fn truncated_file_is_a_transient_error_and_garbage_is_not() {
        use crate::loopback::{Authority, Role};
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new().unwrap();
        authority
            .write_bundle(&authority.issue(Role::Worker("w".to_owned())).unwrap(), dir.path())
            .unwrap();
        for name in [CA, CERTIFICATE, KEY] {
            let path = dir.path().join(name);
            let whole = fs::read(&path).unwrap();
            let mut refused = 0;
            for end in 0..whole.len() {
                // Nothing follows, or zeros in place of the rest.
                for rest in [0, whole.len() - end] {
                    fs::write(&path, [&whole[..end], &vec![0; rest]].concat()).unwrap();
                    if let Err(error) = Bundle::load(dir.path()) {
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
                let error = Bundle::load(dir.path()).err().unwrap();
                assert!(!error.is_transient(), "{name} of {garbage:?}: {error:?}");
            }
            fs::write(&path, whole).unwrap();
        }
    }

    #[test]
    fn missing_files_are_transient_if_the_folder_is_empty_or_has_others_of_the_bundle() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("agent");
        let transient = || Bundle::load(&dir).err().unwrap().is_transient();
        assert!(transient(), "the parent folder is empty");
        fs::write(parent.path().join("other"), "").unwrap();
        assert!(!transient(), "the parent folder has files, but no agent dir");
        fs::create_dir(&dir).unwrap();
        assert!(transient(), "the agent dir is empty");
        fs::write(dir.join("heartbeat.db-lock"), "").unwrap();
        assert!(transient(), "files of the outbox do not count");
        fs::write(dir.join("topology.db"), "").unwrap();
        assert!(!transient(), "the agent dir has files, but not the bundle");
        fs::write(dir.join(KEY), "").unwrap();
        assert!(transient(), "one file of the bundle exists");
        let link = |target: &str, path: &Path| std::os::unix::fs::symlink(target, path).unwrap();
        fs::remove_file(dir.join(KEY)).unwrap();
        [CA, CERTIFICATE, KEY].iter().for_each(|name| link("/nonexistent/file", &dir.join(name)));
        assert!(transient(), "they are symlinks to a folder that may not be mounted yet");
        fs::remove_dir_all(&dir).unwrap();
        link("/nonexistent/agent", &dir);
        assert!(transient(), "the agent dir is a dangling symlink");
    }
}
