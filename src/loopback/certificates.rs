//! A certificate authority and the certificates that it issues, by role. Values and files only, for
//! any thread.

use std::fmt;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use ring::digest::{SHA256, digest};
use rustls::RootCertStore;
use rustls::crypto::ring::{Ticketer, default_provider};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ServerConfig, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};

use super::Offered;
use crate::error::{Error, sanitize_path};
use crate::master::identity::hex;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Certificates are valid from this long before now, for a peer whose clock is behind.
const BACKDATED: Duration = Duration::from_secs(300);

/// A certificate authority, such as a master's. A clone is the same authority.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::Heartbeat;
/// use decnet_heartbeat::loopback::{Authority, LoopbackMaster, Options, Role};
///
/// # let dir = tempfile::tempdir()?;
/// // A master with the certificate of another CA that has the same name.
/// let certificate = Authority::new()?.issue(Role::Master)?;
/// let options = Options { certificate: Some(certificate), ..Options::default() };
/// let master = LoopbackMaster::start_with(options)?;
/// let worker = master.enrol(dir.path())?;
/// let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
/// assert!(master.wait_until(Duration::from_secs(10), |seen| {
///     seen.connections().iter().any(|connection| connection.failure.is_some())
/// }));
/// assert!(master.received().is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Authority {
    issuer: Arc<CertifiedIssuer<'static, KeyPair>>,
}

/// The purpose of a certificate. Each one is signed by the authority and has an ECDSA P-256 key.
///
/// Unless the variant says otherwise, a certificate is valid from five minutes ago for 825 days,
/// has both `serverAuth` and `clientAuth`, and has `O=DECNET, OU=swarm-worker` in its subject, like
/// every certificate of a real master.
///
/// ```
/// use decnet_heartbeat::loopback::{Authority, Role};
///
/// let authority = Authority::new()?;
/// for role in [Role::Master, Role::Worker("worker-01".to_owned())] {
///     assert!(authority.issue(role)?.certificate.starts_with("-----BEGIN CERTIFICATE-----"));
/// }
/// // A name that a certificate cannot contain is an error.
/// assert!(authority.issue(Role::Named("décor".to_owned())).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// The master's: CN `swarmctl`, valid for `swarmctl`, `localhost` and 127.0.0.1.
    Master,
    /// A worker's, with its name.
    Worker(String),
    /// A worker's that was enrolled through the master's web page. The common name is the worker's,
    /// and the certificate is valid for that name and for the master's host. So the worker can
    /// impersonate the master to clients that use
    /// [`MasterIdentity::Host`](crate::MasterIdentity::Host).
    WebEnrolled {
        /// The worker's name.
        name: String,
        /// The master's host, a DNS name or an IP address.
        master_host: String,
    },
    /// As [`Worker`](Self::Worker), but it expires after this time.
    ShortLived(String, Duration),
    /// One with any other name or IP address, such as that of a master whose operator has issued a
    /// certificate for its host. Workers accept it with
    /// [`MasterIdentity::Host`](crate::MasterIdentity::Host), and not by default.
    Named(String),
    /// As [`Master`](Self::Master), but it expired yesterday.
    Expired,
    /// As [`Master`](Self::Master), but it is valid from tomorrow.
    NotYetValid,
    /// As [`Master`](Self::Master), but with `clientAuth` only.
    WithoutServerAuth,
    /// As [`Master`](Self::Master), but marked as a CA certificate, which no peer may present.
    CaAsLeaf,
}

/// A certificate and its key.
///
/// ```
/// use decnet_heartbeat::loopback::{Authority, Role};
///
/// let issued = Authority::new()?.issue(Role::Master)?;
/// assert!(issued.key.starts_with("-----BEGIN PRIVATE KEY-----"));
/// assert_eq!(issued.fingerprint.len(), 64);
/// assert!(!format!("{issued:?}").contains("PRIVATE KEY")); // a failed assertion prints no key
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Issued {
    /// The certificate, PEM.
    pub certificate: String,
    /// Its private key, PKCS#8 in PEM.
    pub key: String,
    /// SHA-256 of the certificate's DER in 64 lowercase hexadecimal digits, which a master pins.
    pub fingerprint: String,
}

impl Authority {
    /// Creates an authority with a new key. All authorities have the same name, as DECNET's do.
    ///
    /// # Errors
    ///
    /// The system's random number generator fails.
    pub fn new() -> Result<Self, Error> {
        let create = || -> Result<_, rcgen::Error> {
            let mut params = named("DECNET SWARM Root CA", &[])?;
            params.not_after = params.not_before + 3650 * DAY;
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![
                KeyUsagePurpose::DigitalSignature,
                KeyUsagePurpose::KeyCertSign,
                KeyUsagePurpose::CrlSign,
            ];
            CertifiedIssuer::self_signed(params, KeyPair::generate()?)
        };
        let issuer = create().map_err(|cause| {
            Error::loopback("cannot make a certificate authority").with_source(cause)
        })?;
        Ok(Self { issuer: Arc::new(issuer) })
    }

    /// The authority's certificate in PEM, which is the `ca.crt` of a bundle.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::Authority;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let authority = Authority::new()?;
    /// std::fs::write(dir.path().join("ca.crt"), authority.certificate())?;
    /// assert_eq!(authority.clone().certificate(), authority.certificate()); // the same authority
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn certificate(&self) -> String {
        self.issuer.pem()
    }

    /// Issues a certificate for a new key.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::{Authority, Role};
    ///
    /// # let authority = Authority::new()?;
    /// let first = authority.issue(Role::Master)?;
    /// let second = authority.issue(Role::Master)?;
    /// assert_ne!(first.fingerprint, second.fingerprint);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A certificate cannot contain the name in `role`, or the system's random number generator
    /// fails.
    pub fn issue(&self, role: Role) -> Result<Issued, Error> {
        let create = || -> Result<_, rcgen::Error> {
            let key = KeyPair::generate()?;
            let certificate = params_of(&role)?.signed_by(&key, &self.issuer)?;
            Ok(Issued {
                fingerprint: fingerprint(certificate.der()),
                certificate: certificate.pem(),
                key: key.serialize_pem(),
            })
        };
        create().map_err(|cause| {
            Error::loopback(format!("cannot issue a certificate for {role:?}")).with_source(cause)
        })
    }

    /// Creates an authority whose certificate this authority issues for a role. It issues
    /// certificates even if its own one does not allow that, as an attacker with a worker's key
    /// can.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::{Authority, Role};
    ///
    /// let attacker = Authority::new()?.subordinate(Role::Worker("worker-01".to_owned()))?;
    /// let forged = attacker.issue(Role::Master)?; // no client accepts it
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The errors of [`issue`](Self::issue).
    pub fn subordinate(&self, role: Role) -> Result<Self, Error> {
        let create = || -> Result<_, rcgen::Error> {
            CertifiedIssuer::signed_by(params_of(&role)?, KeyPair::generate()?, &self.issuer)
        };
        let issuer = create().map_err(|cause| {
            Error::loopback(format!("cannot issue a certificate for {role:?}")).with_source(cause)
        })?;
        Ok(Self { issuer: Arc::new(issuer) })
    }

    /// Writes a worker's bundle to `dir`, which is created if needed: `ca.crt`, `worker.crt` and
    /// `worker.key` (mode 0600), one after another, as a master does.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::{Authority, Role};
    /// use decnet_heartbeat::{Enrolment, Heartbeat};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let authority = Authority::new()?;
    /// let role = Role::Worker("worker-01".to_owned());
    /// let enrolment = Enrolment::new("0c4f9a52", "127.0.0.1", dir.path())?;
    /// // A key that does not match its certificate, as in a bundle that is being written.
    /// let mut worker = authority.issue(role.clone())?;
    /// worker.key = authority.issue(role)?.key;
    /// authority.write_bundle(&worker, dir.path())?;
    /// let error = Heartbeat::builder().enrolment(enrolment).start().unwrap_err();
    /// assert!(error.is_bundle());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A file cannot be written.
    pub fn write_bundle(&self, worker: &Issued, dir: &Path) -> Result<(), Error> {
        fs::create_dir_all(dir)
            .and_then(|()| fs::set_permissions(dir, Permissions::from_mode(0o700)))
            .map_err(|cause| cannot_write(dir, cause))?;
        write_file(&dir.join("ca.crt"), &self.certificate(), 0o644)?;
        write_file(&dir.join("worker.crt"), &worker.certificate, 0o644)?;
        write_file(&dir.join("worker.key"), &worker.key, 0o600)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("fingerprint", &fingerprint(self.issuer.der()))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Issued {
    /// Leaves out the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("fingerprint", &self.fingerprint).finish_non_exhaustive()
    }
}

/// The names, dates and key usages of a role.
fn params_of(role: &Role) -> Result<CertificateParams, rcgen::Error> {
    let mut params = match role {
        Role::Worker(name) | Role::ShortLived(name, _) | Role::Named(name) => named(name, &[name])?,
        Role::WebEnrolled { name, master_host } => named(name, &[name, master_host])?,
        _ => named("swarmctl", &["swarmctl", "localhost", "127.0.0.1"])?,
    };
    params.distinguished_name.push(DnType::OrganizationalUnitName, "swarm-worker");
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    match role {
        Role::Expired => {
            params.not_after = params.not_before - DAY;
            params.not_before = params.not_after - 30 * DAY;
        }
        Role::ShortLived(_, left) => params.not_after = params.not_before + BACKDATED + *left,
        Role::NotYetValid => params.not_before += DAY,
        Role::WithoutServerAuth => {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]
        }
        Role::CaAsLeaf => params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
        Role::Master | Role::Worker(_) | Role::WebEnrolled { .. } | Role::Named(_) => {}
    }
    Ok(params)
}

/// The subject, the names and addresses, and the validity of a certificate.
fn named(common_name: &str, alternatives: &[&str]) -> Result<CertificateParams, rcgen::Error> {
    let alternatives: Vec<String> = alternatives.iter().map(|&name| name.to_owned()).collect();
    let mut params = CertificateParams::new(alternatives)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.distinguished_name.push(DnType::OrganizationName, "DECNET");
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since_epoch.saturating_sub(BACKDATED);
    params.not_after = params.not_before + 825 * DAY;
    Ok(params)
}

/// The server's TLS configuration. It requires client certificates that chain to `client_ca` (PEM).
/// Sessions are resumed by ticket; the ticket keys are new in each configuration, as in each start
/// of uvicorn.
pub(super) fn server_config(
    server: &Issued,
    client_ca: &str,
    offered: Offered,
) -> Result<Arc<ServerConfig>, Error> {
    let create = || -> Result<_, Box<dyn std::error::Error + Send + Sync>> {
        let versions: &[_] = match offered {
            Offered::Tls12And13 => &[&TLS13, &TLS12],
            Offered::Tls12Only => &[&TLS12],
        };
        let provider = Arc::new(default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(client_ca.as_bytes()) {
            roots.add(certificate?)?;
        }
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .build()?;
        let chain = CertificateDer::pem_slice_iter(server.certificate.as_bytes())
            .collect::<Result<Vec<_>, _>>()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, PrivateKeyDer::from_pem_slice(server.key.as_bytes())?)?;
        config.ticketer = Ticketer::new()?;
        Ok(Arc::new(config))
    };
    create().map_err(|cause| Error::loopback("cannot set up TLS").with_source(cause))
}

/// SHA-256 of a certificate's DER, in lowercase hexadecimal.
pub(super) fn fingerprint(der: &[u8]) -> String {
    hex(digest(&SHA256, der).as_ref())
}

/// Writes a file. Its mode is set before its content is written.
pub(super) fn write_file(path: &Path, text: &str, mode: u32) -> Result<(), Error> {
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())
    };
    write().map_err(|cause| cannot_write(path, cause))
}

fn cannot_write(path: &Path, cause: std::io::Error) -> Error {
    Error::loopback(format!("cannot write {}", sanitize_path(path))).with_source(cause)
}
