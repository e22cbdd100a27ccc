//! Loads the enrolment and the bundle, and reloads them when their files change. Changed files that
//! cannot be used are reported, and the old credentials stay. Runs on the outbox thread, because
//! the agent dir may not respond.

pub(crate) mod bundle;
pub(crate) mod enrolment;
pub(crate) mod link;
pub(crate) mod pem;

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;

use crate::credentials::enrolment::Enrolment;
use crate::error::{Error, chain};
use crate::files::FileVersion;
use crate::log_throttle::LogThrottle;
use crate::master::MasterClient;
use crate::master::identity::MasterIdentity;
use crate::master::verifier;
use crate::panics::quietly;
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
        let provider = verifier::provider();
        let bundle = Bundle::load(enrolment.agent_dir().value(), &provider)?;
        let name = server_name(&enrolment)?;
        let identity = identity(&enrolment, given);
        let verifier = verifier::verifier(&bundle.roots, identity, &name, &provider);
        let tls = verifier::client_config(&bundle.identity, verifier, &provider)?;
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
    versions: FileVersions,
    /// The error of the last reload, so that the same error in a row is logged once.
    problem: Option<String>,
    /// Throttles errors that alternate.
    throttle: LogThrottle,
}

impl CredentialFiles {
    pub(crate) fn load(
        enrolment: Enrolment,
        given: Option<MasterIdentity>,
    ) -> Result<(Self, Credentials), Error> {
        let versions = FileVersions::of(&enrolment);
        let credentials = Credentials::load(enrolment.clone(), given)?;
        let fingerprint = credentials.certificate.fingerprint.clone();
        let throttle = LogThrottle::default();
        let files = Self { enrolment, given, fingerprint, versions, problem: None, throttle };
        Ok((files, credentials))
    }

    /// Reloads the files if they have changed. Returns the new credentials if they are usable.
    /// Costs four `stat`s if nothing has changed.
    ///
    /// Enrolment writes the files of the bundle one after another. Files that do not match yet are
    /// read again next time; the old credentials are used meanwhile.
    pub(crate) fn reload(&mut self) -> Option<Credentials> {
        let versions = FileVersions::of(&self.enrolment);
        if versions == self.versions {
            return None;
        }
        match self.enrolment.reload().and_then(|enrolment| Credentials::load(enrolment, self.given))
        {
            Ok(credentials) => {
                // The versions from before the load, so that a change during it is noticed next
                // time.
                self.versions = versions;
                self.problem = None;
                self.enrolment = credentials.enrolment.clone();
                self.fingerprint.clone_from(&credentials.certificate.fingerprint);
                Some(credentials)
            }
            Err(error) => {
                self.log_problem(chain(&error));
                None
            }
        }
    }

    fn log_problem(&mut self, problem: String) {
        if self.problem.as_ref() == Some(&problem) {
            return;
        }
        if self.throttle.count("credentials", &problem, Instant::now()).is_some() {
            let host = self.enrolment.host_uuid().value();
            let master = self.enrolment.master_url();
            let fingerprint = &self.fingerprint;
            quietly(|| {
                log::warn!(
                    "changed credentials are not usable, keeping the old ones: host={host} master={master} \
                     fingerprint={fingerprint} error={problem:?}"
                )
            });
        }
        self.problem = Some(problem);
    }

    /// Whether the ini and the files of the bundle are absent. A file that cannot be checked is not
    /// absent, nor is a dangling symlink.
    pub(crate) fn are_absent(&self) -> bool {
        let dir = self.enrolment.agent_dir().value();
        let is_absent = |path: &Path| {
            fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
        };
        self.enrolment.ini().is_none_or(is_absent)
            && [bundle::CA, bundle::CERTIFICATE, bundle::KEY]
                .iter()
                .all(|name| is_absent(&dir.join(name)))
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

/// The versions of the ini and of the files of the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileVersions {
    ini: Option<FileVersion>,
    bundle: [FileVersion; 3],
}

impl FileVersions {
    fn of(enrolment: &Enrolment) -> Self {
        Self {
            ini: enrolment.ini().map(FileVersion::of),
            bundle: Bundle::versions(enrolment.agent_dir().value()),
        }
    }
}
