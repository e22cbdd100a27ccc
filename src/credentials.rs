//! Our side and the master's, as the files say: taken over anew when they change and prove usable, kept as they were
//! when they do not. Runs on the outbox thread, since the agent dir may hang.

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

/// All that a connection to the master needs, in memory.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    pub(crate) enrolment: Enrolment,
    pub(crate) certificate: Certificate,
    name: ServerName<'static>,
    tls: Arc<ClientConfig>,
}

impl Credentials {
    /// Loads and proves everything. An error names the file or key at fault.
    pub(crate) fn load(enrolment: Enrolment, given: Option<MasterIdentity>) -> Result<Self, Error> {
        let provider = verifier::provider();
        let bundle = Bundle::load(enrolment.agent_dir().value(), &provider)?;
        let (name, identity) = (server_name(&enrolment)?, identity(&enrolment, given));
        let judge = verifier::verifier(&bundle.roots, identity, &name, &provider);
        let tls = verifier::client_config(&bundle.identity, judge, &provider)?;
        Ok(Self { enrolment, certificate: bundle.certificate, name, tls })
    }

    /// The master, with no connection to it yet.
    pub(crate) fn master(&self) -> MasterClient {
        client(&self.enrolment, &self.name, &self.tls)
    }
}

/// The client of an enrolment's master, with no connection to it yet.
pub(crate) fn client(
    enrolment: &Enrolment,
    name: &ServerName<'static>,
    tls: &Arc<ClientConfig>,
) -> MasterClient {
    let (host, port) = (enrolment.master_host().value(), *enrolment.master_port().value());
    MasterClient::new(host, port, enrolment.master_url(), name.clone(), Arc::clone(tls))
}

/// The ini and the bundle, looked at again and again.
#[derive(Debug)]
pub(crate) struct CredentialFiles {
    enrolment: Enrolment,
    /// The rule given by the program; otherwise the enrolment's, otherwise the default.
    given: Option<MasterIdentity>,
    /// Of the certificate that was taken over last.
    fingerprint: String,
    /// What the files looked like when they were taken over.
    stamps: FileVersions,
    /// The last reason for not taking the files over, so that it is logged once.
    problem: Option<String>,
    /// All of them, so that reasons that alternate are logged less and less often.
    problems: LogThrottle,
}

impl CredentialFiles {
    pub(crate) fn load(
        enrolment: Enrolment,
        given: Option<MasterIdentity>,
    ) -> Result<(Self, Credentials), Error> {
        let stamps = FileVersions::of(&enrolment);
        let access = Credentials::load(enrolment.clone(), given)?;
        let fingerprint = access.certificate.fingerprint.clone();
        let problems = LogThrottle::default();
        Ok((Self { enrolment, given, fingerprint, stamps, problem: None, problems }, access))
    }

    /// Looks at the files: four `stat`s when nothing has changed. What is new and usable.
    ///
    /// The bundle's files are written one after another. What does not fit yet is looked at again next time, and the
    /// old pair goes on meanwhile.
    pub(crate) fn refresh(&mut self) -> Option<Credentials> {
        let stamps = FileVersions::of(&self.enrolment);
        if stamps == self.stamps {
            return None;
        }
        match self.enrolment.reload().and_then(|enrolment| Credentials::load(enrolment, self.given))
        {
            Ok(access) => {
                // Of before the loading: what changed in between is seen next time.
                self.stamps = stamps;
                self.problem = None;
                self.enrolment = access.enrolment.clone();
                self.fingerprint.clone_from(&access.certificate.fingerprint);
                Some(access)
            }
            Err(error) => {
                self.note_problem(chain(&error));
                None
            }
        }
    }

    fn note_problem(&mut self, problem: String) {
        if self.problem.as_ref() == Some(&problem) {
            return;
        }
        if self.problems.count("credentials", &problem, Instant::now()).is_some() {
            let (host, master) = (self.enrolment.host_uuid().value(), self.enrolment.master_url());
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

    /// Whether the ini and the bundle do not exist. What cannot be looked at may exist, and so may what a symlink leads to.
    pub(crate) fn are_gone(&self) -> bool {
        let dir = self.enrolment.agent_dir().value();
        let is_gone = |path: &Path| {
            fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
        };
        self.enrolment.ini().is_none_or(is_gone)
            && [bundle::CA, bundle::CERTIFICATE, bundle::KEY]
                .iter()
                .all(|name| is_gone(&dir.join(name)))
    }
}

/// The rule that holds: the program's, otherwise the enrolment's, otherwise the default.
pub(crate) fn identity(enrolment: &Enrolment, given: Option<MasterIdentity>) -> MasterIdentity {
    given.or_else(|| enrolment.master_identity().map(|found| *found.value())).unwrap_or_default()
}

/// The configured host, as TLS has it.
pub(crate) fn server_name(enrolment: &Enrolment) -> Result<ServerName<'static>, Error> {
    let host = enrolment.master_host();
    ServerName::try_from(host.value().clone()).map_err(|source| {
        Error::config(host.provenance().to_string(), "is no host").with_source(source)
    })
}

/// What the ini and the bundle looked like.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileVersions {
    ini: Option<FileVersion>,
    bundle: [FileVersion; 3],
}

impl FileVersions {
    fn of(enrolment: &Enrolment) -> Self {
        Self {
            ini: enrolment.ini().map(FileVersion::of),
            bundle: Bundle::stamps(enrolment.agent_dir().value()),
        }
    }
}
