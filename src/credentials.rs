//! Loads the enrolment and the bundle, and reloads them when their files change. Changed files that
//! cannot be used are reported, and the old credentials stay. Runs on the outbox thread, because
//! the agent dir may not answer.

pub(crate) mod bundle;
pub(crate) mod enrolment;
pub(crate) mod link;
pub(crate) mod pem;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;

use crate::credentials::enrolment::Enrolment;
use crate::error::{Error, chain};
use crate::files::FileVersion;
use crate::log_throttle::LogThrottle;
use crate::master::MasterClient;
use crate::master::identity::MasterIdentity;
use crate::master::verifier;
use bundle::{Bundle, Certificate};

/// Everything that a connection to the master needs, in memory.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    pub(crate) enrolment: Enrolment,
    pub(crate) certificate: Certificate,
    name: ServerName<'static>,
    tls: Arc<ClientConfig>,
}

impl Credentials {
    /// Loads and checks all files. An error names the file or key at fault.
    pub(crate) fn load(enrolment: Enrolment, given: Option<MasterIdentity>) -> Result<Self, Error> {
        let bundle = Bundle::load(enrolment.agent_dir().value())?;
        let name = server_name(&enrolment)?;
        let identity = identity(&enrolment, given);
        let verifier = verifier::verifier(&bundle.roots, identity, &name);
        let tls = verifier::client_config(&bundle.identity, verifier)?;
        Ok(Self { enrolment, certificate: bundle.certificate, name, tls })
    }

    /// A client for the master, not connected yet.
    pub(crate) fn master(&self) -> MasterClient {
        client(&self.enrolment, &self.name, &self.tls)
    }
}

/// A client for the master of an enrolment, not connected yet.
pub(crate) fn client(
    enrolment: &Enrolment,
    name: &ServerName<'static>,
    tls: &Arc<ClientConfig>,
) -> MasterClient {
    let host = enrolment.master_host().value();
    let port = *enrolment.master_port().value();
    MasterClient::new(host, port, enrolment.master_url(), name.clone(), Arc::clone(tls))
}

/// The files of the credentials. They are reloaded when they change.
#[derive(Debug)]
pub(crate) struct CredentialFiles {
    enrolment: Enrolment,
    /// The rule given by the program. It takes precedence over that of the enrolment.
    given: Option<MasterIdentity>,
    /// The fingerprint of the certificate in use.
    fingerprint: String,
    /// The versions of the files that are in use.
    versions: Vec<FileVersion>,
    throttle: LogThrottle,
}

impl CredentialFiles {
    pub(crate) fn load(
        enrolment: Enrolment,
        given: Option<MasterIdentity>,
    ) -> Result<(Self, Credentials), Error> {
        let versions = versions(&enrolment);
        let credentials = Credentials::load(enrolment.clone(), given)?;
        let fingerprint = credentials.certificate.fingerprint.clone();
        let throttle = LogThrottle::default();
        let files = Self { enrolment, given, fingerprint, versions, throttle };
        Ok((files, credentials))
    }

    /// Reloads the files if they have changed. Returns the new credentials if they are usable.
    /// Costs four `stat`s if nothing has changed.
    ///
    /// Enrolment writes the files of the bundle one after another. Files that do not match yet are
    /// read again next time; the old credentials are used meanwhile.
    pub(crate) fn reload(&mut self) -> Option<Credentials> {
        let versions = versions(&self.enrolment);
        if versions == self.versions {
            return None;
        }
        match self.enrolment.reload().and_then(|enrolment| Credentials::load(enrolment, self.given))
        {
            Ok(credentials) => {
                // The versions from before the load, so that a change during it is noticed next
                // time.
                self.versions = versions;
                self.throttle.end("credentials");
                self.enrolment = credentials.enrolment.clone();
                self.fingerprint.clone_from(&credentials.certificate.fingerprint);
                Some(credentials)
            }
            Err(error) => {
                self.log_problem(&chain(&error));
                None
            }
        }
    }

    fn log_problem(&mut self, problem: &str) {
        self.throttle.log_lasting("credentials", problem, |_| {
            log::warn!(
                "changed credentials are not usable, keeping the old ones: host={} master={} \
                 fingerprint={} error={problem:?}",
                self.enrolment.host_uuid().value(),
                self.enrolment.master_url(),
                self.fingerprint,
            );
        });
    }

    /// Whether the ini and the files of the bundle are absent. A file that cannot be checked is not
    /// absent, nor is a dangling symlink.
    pub(crate) fn are_absent(&self) -> bool {
        let is_absent = |path: &PathBuf| {
            fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
        };
        paths(&self.enrolment).iter().all(is_absent)
    }
}

/// The rule that applies: that of the program, otherwise that of the enrolment, otherwise the
/// default.
pub(crate) fn identity(enrolment: &Enrolment, given: Option<MasterIdentity>) -> MasterIdentity {
    given.or_else(|| enrolment.master_identity().map(|rule| *rule.value())).unwrap_or_default()
}

/// The configured host as a TLS server name.
pub(crate) fn server_name(enrolment: &Enrolment) -> Result<ServerName<'static>, Error> {
    let host = enrolment.master_host();
    ServerName::try_from(host.value().clone()).map_err(|source| {
        Error::config(host.provenance().to_string(), "is not a host name or IP address")
            .with_source(source)
    })
}

/// The versions of the ini and of the files of the bundle. Costs four `stat`s.
fn versions(enrolment: &Enrolment) -> Vec<FileVersion> {
    paths(enrolment).iter().map(|path| FileVersion::of(path)).collect()
}

/// The ini, if there may be one, and the files of the bundle.
fn paths(enrolment: &Enrolment) -> Vec<PathBuf> {
    let bundle = bundle::paths(enrolment.agent_dir().value());
    enrolment.ini().map(Path::to_owned).into_iter().chain(bundle).collect()
}
