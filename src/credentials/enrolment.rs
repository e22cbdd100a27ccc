//! Reads the enrolment from the command line, the environment and `decnet.ini`, in the order of the
//! Python agent. Runs on the calling thread; the outbox thread reads it again when the ini
//! changes.
//!
//! From the top: [`EnrolmentSources`] names the sources, `Reading` reads them by the rules of the
//! Python agent, and [`Enrolment`] holds the values, each with its [`Provenance`]. The `.env`
//! files that the Python agent reads from its working directory are not read here.

mod ini;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use crate::error::{Error, sanitize_path};
use crate::files;
use crate::limits;
use crate::master::identity::MasterIdentity;
use crate::text::{sanitize, sanitize_within};
use ini::Ini;

const CONFIG: &str = "DECNET_CONFIG";
const MODE: &str = "DECNET_MODE";
const HOST_UUID: &str = "DECNET_HOST_UUID";
const MASTER_HOST: &str = "DECNET_MASTER_HOST";
const MASTER_PORT: &str = "DECNET_SWARMCTL_PORT";
const AGENT_DIR: &str = "DECNET_AGENT_DIR";
const MASTER_IDENTITY: &str = "DECNET_MASTER_IDENTITY";

/// The variables that are read. Others are not stored, because some variables of DECNET contain
/// secrets.
const VARIABLES: [&str; 7] =
    [CONFIG, MODE, HOST_UUID, MASTER_HOST, MASTER_PORT, AGENT_DIR, MASTER_IDENTITY];

/// The default port of the master.
const DEFAULT_PORT: u16 = 8770;

/// The folder of DECNET's ini and agent dir.
const ETC: &str = "/etc/decnet";

/// The identity of this host and the address of its master. Each value has its [`Provenance`].
///
/// ```
/// use decnet_heartbeat::Enrolment;
///
/// let enrolment = Enrolment::new("0c4f9a52", "master.lan", "/etc/decnet/agent")?;
/// assert_eq!(enrolment.master_port().value(), &8770);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolment {
    host_uuid: Sourced<String>,
    master_host: Sourced<String>,
    master_port: Sourced<u16>,
    agent_dir: Sourced<PathBuf>,
    master_identity: Option<Sourced<MasterIdentity>>,
    /// `None`: the program set the values.
    sources: Option<EnrolmentSources>,
}

impl Enrolment {
    /// An enrolment with values from the program. The master's port is the default, 8770. A
    /// relative agent dir is resolved against the current directory.
    ///
    /// # Errors
    /// If the uuid is empty, longer than 255 characters or has unprintable characters; if the host
    /// is not a host name or an IP address; if the agent dir is empty.
    pub fn new(
        host_uuid: impl Into<String>,
        master_host: impl Into<String>,
        agent_dir: impl Into<PathBuf>,
    ) -> Result<Self, Error> {
        Ok(Self {
            host_uuid: given(host_uuid.into()).parse("host uuid", host_uuid_of)?,
            master_host: given(master_host.into()).parse("master host", master_host_of)?,
            master_port: Sourced::new(DEFAULT_PORT, Provenance::Default),
            agent_dir: given(agent_dir.into()).parse("agent dir", agent_dir_of)?,
            master_identity: None,
            sources: None,
        })
    }

    /// Sets the master's port. [`reload`](Self::reload) resets it, except for an enrolment made by
    /// [`new`](Self::new).
    ///
    /// ```
    /// use decnet_heartbeat::Enrolment;
    ///
    /// let enrolment = Enrolment::new("0c4f9a52", "master.lan", "/etc/decnet/agent")?;
    /// let enrolment = enrolment.with_master_port(9443)?;
    /// assert_eq!(enrolment.master_port().value(), &9443);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If the port is 0.
    pub fn with_master_port(mut self, port: u16) -> Result<Self, Error> {
        self.master_port = given(port.to_string()).parse("master port", master_port_of)?;
        Ok(self)
    }

    /// Reads the environment of this process and `decnet.ini`.
    ///
    /// ```
    /// use decnet_heartbeat::Enrolment;
    ///
    /// match Enrolment::from_env() {
    ///     Ok(enrolment) => println!("the master is {}", enrolment.master_host().value()),
    ///     Err(error) if error.is_not_enrolled() => println!("not a worker: {error}"),
    ///     Err(error) => eprintln!("the enrolment is not usable: {error:?}"),
    /// }
    /// ```
    ///
    /// # Errors
    /// As for [`EnrolmentSources::read`].
    pub fn from_env() -> Result<Self, Error> {
        EnrolmentSources::from_env().read()
    }

    /// Reads the same sources again: the current ini, and the variables as they were when the
    /// sources were created. An enrolment with values from the program is returned unchanged.
    ///
    /// ```
    /// use decnet_heartbeat::EnrolmentSources;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let ini = dir.path().join("decnet.ini");
    /// let enrol = |uuid: &str| {
    ///     let agent = format!("host-uuid = {uuid}\nmaster-host = master.lan\n");
    ///     std::fs::write(&ini, format!("[decnet]\nmode = agent\n[agent]\n{agent}"))
    /// };
    /// enrol("u-1")?;
    /// let enrolment = EnrolmentSources::from_variables([("HOME", "/root")]).config(&ini).read()?;
    /// enrol("u-2")?;
    /// assert_eq!(enrolment.host_uuid().value(), "u-1");
    /// assert_eq!(enrolment.reload()?.host_uuid().value(), "u-2");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As for [`EnrolmentSources::read`].
    pub fn reload(&self) -> Result<Self, Error> {
        self.sources.as_ref().map_or_else(|| Ok(self.clone()), EnrolmentSources::read)
    }

    /// The id of this host in the master's records.
    pub fn host_uuid(&self) -> &Sourced<String> {
        &self.host_uuid
    }

    /// The master's host name or IP address. An IPv6 address has no brackets.
    pub fn master_host(&self) -> &Sourced<String> {
        &self.master_host
    }

    /// The port of the master's swarm controller.
    pub fn master_port(&self) -> &Sourced<u16> {
        &self.master_port
    }

    /// The folder of the bundle (`ca.crt`, `worker.crt`, `worker.key`), of `topology.db` and of the
    /// outbox.
    pub fn agent_dir(&self) -> &Sourced<PathBuf> {
        &self.agent_dir
    }

    /// The rule for the master's certificate, if the environment or the ini sets it.
    pub fn master_identity(&self) -> Option<&Sourced<MasterIdentity>> {
        self.master_identity.as_ref()
    }

    /// The path of the ini, whether or not it exists. `None` for values from the program.
    ///
    /// ```
    /// use decnet_heartbeat::{Enrolment, EnrolmentSources};
    ///
    /// let variables = [("DECNET_HOST_UUID", "0c4f9a52"), ("DECNET_MASTER_HOST", "master.lan")];
    /// let enrolment = EnrolmentSources::from_variables(variables).config("/no/such.ini").read()?;
    /// assert_eq!(enrolment.ini(), Some(std::path::Path::new("/no/such.ini")));
    /// // Values from the program have no ini.
    /// assert_eq!(Enrolment::new("0c4f9a52", "master.lan", "/srv/agent")?.ini(), None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn ini(&self) -> Option<&Path> {
        self.sources.as_ref().map(|sources| sources.ini.value().as_path())
    }

    /// The URL to which beats are sent.
    pub(crate) fn master_url(&self) -> String {
        format!("https://{}/swarm/heartbeat", self.master_authority())
    }

    /// The master's authority in a URL: `host:port`, with an IPv6 address in brackets.
    pub(crate) fn master_authority(&self) -> String {
        let host = self.master_host.value();
        let port = self.master_port.value();
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }
}

/// A value with its source.
///
/// ```
/// use decnet_heartbeat::{Enrolment, Provenance};
///
/// let enrolment = Enrolment::new("0c4f9a52", "master.lan", "/etc/decnet/agent")?;
/// assert_eq!(enrolment.master_host().value(), "master.lan");
/// assert_eq!(enrolment.master_host().provenance(), &Provenance::Program);
/// assert_eq!(enrolment.master_port().provenance(), &Provenance::Default);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sourced<T> {
    value: T,
    provenance: Provenance,
}

impl<T> Sourced<T> {
    /// The value.
    pub fn value(&self) -> &T {
        &self.value
    }

    /// The source of the value.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    fn new(value: T, provenance: Provenance) -> Self {
        Self { value, provenance }
    }

    /// Checks and converts the value. `setting` names a value from the program in an error.
    fn parse<U>(
        self,
        setting: &'static str,
        parse: impl FnOnce(T) -> Result<U, String>,
    ) -> Result<Sourced<U>, Error> {
        match parse(self.value) {
            Ok(value) => Ok(Sourced::new(value, self.provenance)),
            Err(problem) if self.provenance == Provenance::Program => {
                Err(Error::setting(setting, problem))
            }
            Err(problem) => Err(Error::config(self.provenance.to_string(), problem)),
        }
    }
}

fn given<T>(value: T) -> Sourced<T> {
    Sourced::new(value, Provenance::Program)
}

/// The source of a value. `Display` is for messages: `/etc/decnet/decnet.ini [agent] host-uuid`.
///
/// ```
/// use decnet_heartbeat::EnrolmentSources;
///
/// let variables = [("DECNET_HOST_UUID", "0c4f9a52"), ("DECNET_MASTER_HOST", "master.lan")];
/// let enrolment = EnrolmentSources::from_variables(variables).config("/no/such.ini").read()?;
/// assert_eq!(enrolment.host_uuid().provenance().to_string(), "DECNET_HOST_UUID");
/// assert_eq!(enrolment.master_port().provenance().to_string(), "default");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Provenance {
    /// The program set it.
    Program,
    /// A command line option, with its dashes.
    CommandLine(&'static str),
    /// An environment variable.
    Environment(&'static str),
    /// A key of an ini file.
    Ini {
        /// The file.
        file: PathBuf,
        /// The section of the key.
        section: String,
        /// The key, in lower case.
        key: String,
    },
    /// The default value.
    Default,
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program => f.write_str("given by the program"),
            Self::CommandLine(name) | Self::Environment(name) => f.write_str(name),
            Self::Ini { file, section, key } => {
                write!(f, "{} [{}] {}", sanitize_path(file), sanitize(section), sanitize(key))
            }
            Self::Default => f.write_str("default"),
        }
    }
}

/// The sources of an [`Enrolment`]: the command line, the environment, an ini file.
///
/// The command line takes precedence over the environment, the environment over the ini, and the
/// ini over the defaults.
///
/// ```
/// use decnet_heartbeat::EnrolmentSources;
///
/// # let dir = tempfile::tempdir()?;
/// let ini = dir.path().join("decnet.ini");
/// let agent = "host-uuid = u-1\nmaster-host = master.lan\nswarmctl-port = 9000\n";
/// std::fs::write(&ini, format!("[decnet]\nmode = agent\n[agent]\n{agent}"))?;
/// let sources = EnrolmentSources::from_variables([("DECNET_SWARMCTL_PORT", "9443")]);
/// let enrolment = sources.config(&ini).agent_dir("/srv/agent").read()?;
/// assert_eq!(enrolment.host_uuid().value(), "u-1"); // from the ini
/// assert_eq!(enrolment.master_port().value(), &9443); // from the variable
/// assert_eq!(enrolment.agent_dir().provenance().to_string(), "--agent-dir");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnrolmentSources {
    variables: HashMap<&'static str, OsString>,
    ini: Sourced<PathBuf>,
    agent_dir: Option<PathBuf>,
    default_agent_dir: PathBuf,
    /// The current directory at creation. Relative paths are resolved against it in each reading.
    folder: PathBuf,
}

impl EnrolmentSources {
    /// Reads the current environment of this process: the `DECNET_*` variables of the enrolment, and
    /// the home folder.
    pub fn from_env() -> Self {
        Self::new(std::env::vars_os(), std::env::home_dir(), Path::new(ETC))
    }

    /// Uses these variables, `HOME` included, instead of the environment of this process. The last
    /// value of a variable counts.
    ///
    /// ```
    /// use decnet_heartbeat::EnrolmentSources;
    ///
    /// let sources = EnrolmentSources::from_variables([
    ///     ("DECNET_HOST_UUID", "0c4f9a52"),
    ///     ("DECNET_MASTER_HOST", "master.lan"),
    ///     ("DECNET_AGENT_DIR", "/srv/agent"),
    /// ]);
    /// assert_eq!(sources.read()?.agent_dir().value(), std::path::Path::new("/srv/agent"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_variables<K, V>(variables: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        Self::new(
            variables.into_iter().map(|(name, value)| (name.into(), value.into())),
            None,
            Path::new(ETC),
        )
    }

    fn new(
        all: impl Iterator<Item = (OsString, OsString)>,
        home: Option<PathBuf>,
        etc: &Path,
    ) -> Self {
        let mut home = home;
        let mut variables = HashMap::new();
        for (name, value) in all {
            if let Some(known) = VARIABLES.into_iter().find(|known| name == *known) {
                variables.insert(known, value);
            } else if name == "HOME" && home.is_none() {
                home = Some(PathBuf::from(value));
            }
        }
        let ini = match variables.get(CONFIG).filter(|path| !path.is_empty()) {
            Some(path) => {
                Sourced::new(files::absolute(Path::new(path)), Provenance::Environment(CONFIG))
            }
            None => Sourced::new(etc.join("decnet.ini"), Provenance::Default),
        };
        let system = etc.join("agent");
        let default_agent_dir = match home {
            Some(home) if !system.exists() => files::absolute(&home.join(".decnet/agent")),
            _ => system,
        };
        let folder = std::env::current_dir().unwrap_or_default();
        Self { variables, ini, agent_dir: None, default_agent_dir, folder }
    }

    /// Sets the ini, as `--config` does, instead of `DECNET_CONFIG` or `/etc/decnet/decnet.ini`. A
    /// relative path is resolved against the current directory.
    pub fn config(mut self, path: impl Into<PathBuf>) -> Self {
        let path = files::absolute(&path.into());
        self.ini = Sourced::new(path, Provenance::CommandLine("--config"));
        self
    }

    /// Sets the agent dir, as `--agent-dir` does. It takes precedence over the environment and the
    /// ini. A relative path is resolved against the current directory; one from the environment or
    /// the ini, against the current directory at the creation of these sources.
    pub fn agent_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.agent_dir = Some(files::absolute(&path.into()));
        self
    }

    /// Reads the enrolment. The ini need not exist if the environment has all values.
    ///
    /// ```
    /// use decnet_heartbeat::EnrolmentSources;
    ///
    /// let sources = EnrolmentSources::from_variables([("DECNET_MASTER_HOST", "master.lan")]);
    /// let error = sources.config("/no/such.ini").read().unwrap_err();
    /// assert!(error.is_not_enrolled());
    /// assert!(error.to_string().contains("DECNET_HOST_UUID"));
    /// ```
    ///
    /// # Errors
    /// [`Error::is_not_enrolled`] if the host uuid or the master host is missing. The message names
    /// the value and its sources. [`Error::is_config`] for a value that cannot be used, or an ini
    /// that cannot be read.
    pub fn read(&self) -> Result<Enrolment, Error> {
        self.read_with(IniFile::read(self.ini.value())?)
    }

    /// As [`read`](Self::read), with this content of the ini.
    #[cfg(fuzzing)]
    pub(crate) fn read_content(&self, content: Vec<u8>) -> Result<Enrolment, Error> {
        self.read_with(IniFile::parse(self.ini.value(), content)?)
    }

    fn read_with(&self, file: IniFile) -> Result<Enrolment, Error> {
        let reading = Reading::begin(self, file)?;
        // An invalid port is reported before missing values, because it shows that this host is
        // meant to be enrolled.
        let master_port = match reading.text(MASTER_PORT)? {
            Some(port) => port.parse("master port", master_port_of)?,
            None => Sourced::new(DEFAULT_PORT, Provenance::Default),
        };
        let host_uuid = reading.required("host uuid", HOST_UUID, "host-uuid")?;
        let master_host = reading.required("master host", MASTER_HOST, "master-host")?;
        let (host_uuid, master_host) = match (host_uuid, master_host) {
            (Ok(host_uuid), Ok(master_host)) => (host_uuid, master_host),
            (host_uuid, master_host) => {
                let missing: Vec<_> =
                    [host_uuid.err(), master_host.err()].into_iter().flatten().collect();
                let missing = format!("{}; enrol this host from its master", missing.join("; "));
                let error = Error::not_enrolled(missing);
                return Err(if reading.may_be_completed() { error.passing() } else { error });
            }
        };
        let master_identity = reading.text(MASTER_IDENTITY)?;
        let parse_identity =
            |text: Sourced<String>| text.parse("master identity", |text| text.parse());
        Ok(Enrolment {
            host_uuid: host_uuid.parse("host uuid", host_uuid_of)?,
            master_host: master_host.parse("master host", master_host_of)?,
            master_port,
            agent_dir: self.read_agent_dir(&reading)?,
            master_identity: master_identity.map(parse_identity).transpose()?,
            sources: Some(self.clone()),
        })
    }

    fn read_agent_dir(&self, reading: &Reading<'_>) -> Result<Sourced<PathBuf>, Error> {
        if let Some(path) = &self.agent_dir {
            let provenance = Provenance::CommandLine("--agent-dir");
            return Sourced::new(path.clone(), provenance).parse("agent dir", agent_dir_of);
        }
        // As in the Python agent, an empty value counts as unset, and `~` is not expanded.
        match reading.find(AGENT_DIR)?.filter(|sourced| !sourced.value.is_empty()) {
            Some(path) => path.parse("agent dir", |path| agent_dir_of(self.folder.join(path))),
            None => Ok(Sourced::new(self.default_agent_dir.clone(), Provenance::Default)),
        }
    }
}

/// One reading of the sources. The ini is read once, and searched for each variable.
struct Reading<'a> {
    sources: &'a EnrolmentSources,
    file: IniFile,
    /// The sections in which the key `a-b` sets `DECNET_A_B`, in order of precedence.
    sections: Vec<&'static str>,
}

enum IniFile {
    DoesNotExist,
    NotAFile,
    Read(Ini),
}

impl<'a> Reading<'a> {
    fn begin(sources: &'a EnrolmentSources, file: IniFile) -> Result<Self, Error> {
        let mut reading = Self { sources, file, sections: vec!["decnet"] };
        if matches!(reading.file, IniFile::Read(_)) {
            let mode = reading.text(MODE)?;
            let role = mode.map(|mode| mode.parse("mode", role_of)).transpose()?;
            reading.sections.push(role.map_or("master", |role| role.value));
        }
        Ok(reading)
    }

    /// The value of a variable from the environment, otherwise from the ini. An empty value hides
    /// those of later sources.
    fn find(&self, variable: &'static str) -> Result<Option<Sourced<OsString>>, Error> {
        if let Some(value) = self.sources.variables.get(variable) {
            return Ok(Some(Sourced::new(value.clone(), Provenance::Environment(variable))));
        }
        let IniFile::Read(ini) = &self.file else { return Ok(None) };
        let in_roles = self.sections.iter().flat_map(|section| {
            ini.keys(section)
                .filter(|(_, key)| variable_of(key) == variable)
                .map(|(home, key)| (*section, home, key))
        });
        let in_swarm =
            ini.keys("swarm").filter(|(_, key)| variable == MASTER_PORT && *key == "swarmctl-port");
        let Some((section, home, key)) =
            in_roles.chain(in_swarm.map(|(home, key)| ("swarm", home, key))).next()
        else {
            return Ok(None);
        };
        let file = self.sources.ini.value().clone();
        let provenance = Provenance::Ini { file, section: home.to_owned(), key: key.to_owned() };
        match ini.get(section, key) {
            Ok(value) => Ok(value.map(|value| Sourced::new(value.into(), provenance))),
            Err(problem) => Err(Error::config(provenance.to_string(), problem)),
        }
    }

    fn text(&self, variable: &'static str) -> Result<Option<Sourced<String>>, Error> {
        let to_text =
            |value: OsString| value.into_string().map_err(|_| "is not valid UTF-8".into());
        self.find(variable)?.map(|sourced| sourced.parse(variable, to_text)).transpose()
    }

    /// A required value, without surrounding white space, which no uuid and no host has. The inner
    /// error is the message for a value that is missing or empty.
    fn required(
        &self,
        what: &str,
        variable: &'static str,
        key: &str,
    ) -> Result<Result<Sourced<String>, String>, Error> {
        let why = match self.text(variable)? {
            Some(Sourced { value, provenance }) if !ini::trim(&value).is_empty() => {
                return Ok(Ok(Sourced::new(ini::trim(&value).to_owned(), provenance)));
            }
            Some(Sourced { provenance: Provenance::Environment(_), .. }) => {
                format!("{variable} is set but empty, which hides the ini; fill it in or unset it")
            }
            Some(Sourced { provenance, .. }) => {
                format!("{variable} is not set, and {provenance} is empty")
            }
            None => format!("{variable} is not set, and {}", self.ini_lacks(key)),
        };
        Ok(Err(format!("no {what}: {why}")))
    }

    /// Whether an enrolment in progress may add the missing values: the ini is empty, or it [may
    /// appear](files::may_appear).
    fn may_be_completed(&self) -> bool {
        match &self.file {
            IniFile::DoesNotExist => files::may_appear(self.sources.ini.value()),
            IniFile::NotAFile => false,
            IniFile::Read(ini) => ini.is_empty(),
        }
    }

    fn ini_lacks(&self, key: &str) -> String {
        let path = sanitize_path(self.sources.ini.value());
        let named = match &self.sources.ini.provenance {
            Provenance::CommandLine(name) | Provenance::Environment(name) => {
                format!(" (named by {name})")
            }
            _ => String::new(),
        };
        match &self.file {
            IniFile::DoesNotExist => format!("{path}{named} does not exist"),
            IniFile::NotAFile => format!("{path}{named} is not a file"),
            IniFile::Read(_) if self.sections.contains(&"agent") => {
                format!("{path}{named} has no {key} in [decnet] or [agent]")
            }
            IniFile::Read(_) => {
                format!(
                    "{path}{named} has no {key} in [decnet] or [master]; [agent] is read only with mode = agent"
                )
            }
        }
    }
}

impl IniFile {
    fn read(path: &Path) -> Result<Self, Error> {
        let error = match files::read(path, limits::INI_FILE) {
            Ok(content) => return Self::parse(path, content),
            Err(error) => error,
        };
        let problem = match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => return Ok(Self::DoesNotExist),
            ErrorKind::InvalidInput => return Ok(Self::NotAFile),
            ErrorKind::FileTooLarge => {
                let most = limits::INI_FILE;
                let problem = format!("is larger than {most} bytes; this cannot be a decnet.ini");
                return Err(Error::config(sanitize_path(path), problem));
            }
            _ => format!("cannot be read; {}", files::remedy(&error)),
        };
        Err(Error::config(sanitize_path(path), problem).with_source(error))
    }

    /// Parses the content of the file at `path`.
    fn parse(path: &Path, content: Vec<u8>) -> Result<Self, Error> {
        let text = String::from_utf8(content).map_err(|error| {
            Error::config(sanitize_path(path), "is not valid UTF-8").with_source(error.utf8_error())
        })?;
        let ini = Ini::parse(&text).map_err(|fault| {
            Error::config(format!("{} line {}", sanitize_path(path), fault.line), fault.problem)
        })?;
        Ok(Self::Read(ini))
    }
}

/// The variable that a key of `[decnet]` or of the role section sets.
fn variable_of(key: &str) -> String {
    format!("DECNET_{}", key.replace('-', "_").to_uppercase())
}

/// The section for a mode.
fn role_of(mode: String) -> Result<&'static str, String> {
    match mode.to_lowercase().as_str() {
        "agent" => Ok("agent"),
        "master" => Ok("master"),
        _ => Err(format!("must be agent or master, not `{}`", sanitize(&mode))),
    }
}

fn host_uuid_of(uuid: String) -> Result<String, String> {
    // A uuid that must be escaped or truncated in the log is invalid.
    if uuid.is_empty() || sanitize_within(&uuid, limits::HOST_UUID) != uuid {
        return Err(format!("must be 1 to {} printable characters on one line", limits::HOST_UUID));
    }
    Ok(uuid)
}

fn master_host_of(text: String) -> Result<String, String> {
    host(&text).map(str::to_owned)
}

/// Checks a host name or an IP address. Removes the brackets of an IPv6 address.
fn host(text: &str) -> Result<&str, String> {
    let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    if let Some(address) = bracketed.filter(|address| address.parse::<Ipv6Addr>().is_ok()) {
        return Ok(address);
    }
    if text.parse::<IpAddr>().is_ok() {
        return Ok(text);
    }
    let name = text.strip_suffix('.').unwrap_or(text);
    let problem = if name.split('.').all(is_label) && name.len() <= 253 {
        // A name whose last label has only digits is an IPv4 address, in one of its notations.
        let last = name.rsplit('.').next().unwrap_or(name);
        if !last.bytes().all(|byte| byte.is_ascii_digit()) {
            return Ok(text);
        }
        "must be a host name or an IPv4 address of four numbers below 256"
    } else if text.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && !text.is_ascii()
    {
        "must be a host name in ASCII (write the xn-- form of an international one)"
    } else {
        "must be only a host name or an IP address, without scheme, user, port, path or spaces"
    };
    Err(format!("{problem}, not `{}`", sanitize(text)))
}

/// Whether `label` is a label of a host name. Container networks create names with underscores.
fn is_label(label: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (1..=63).contains(&label.len())
        && label.bytes().all(is_inner)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

fn master_port_of(port: String) -> Result<u16, String> {
    port.trim()
        .parse()
        .map(NonZeroU16::get)
        .map_err(|_| format!("must be a whole number from 1 to 65535, not `{}`", sanitize(&port)))
}

fn agent_dir_of(path: PathBuf) -> Result<PathBuf, String> {
    if path.as_os_str().is_empty() {
        return Err("must not be empty".to_owned());
    }
    if path.to_string_lossy().contains(char::is_control) {
        // In an ini, a line that is indented deeper than its key continues the value.
        return Err("must be a path on one line, without control characters; are the lines after \
                    it indented?"
            .to_owned());
    }
    // The process may change its current directory later.
    Ok(files::absolute(&path))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A temporary folder in place of `/etc/decnet`, with an ini.
    struct Etc(tempfile::TempDir);

    impl Etc {
        fn new(ini: &str) -> Self {
            let etc = Self::bare();
            fs::write(etc.ini(), ini).unwrap();
            etc
        }

        fn bare() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn ini(&self) -> PathBuf {
            self.0.path().join("decnet.ini")
        }

        fn sources(&self, variables: &[(&str, &str)]) -> EnrolmentSources {
            let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
            EnrolmentSources::new(variables, Some(PathBuf::from("/home/op")), self.0.path())
        }

        fn read(&self, variables: &[(&str, &str)]) -> Enrolment {
            self.sources(variables).read().unwrap()
        }

        /// The whole message, with `ETC` in place of the folder.
        fn refusal(&self, variables: &[(&str, &str)]) -> String {
            self.message(&self.sources(variables).read().unwrap_err())
        }

        fn message(&self, error: &Error) -> String {
            format!("{error:?}").replace(self.0.path().to_str().unwrap(), "ETC")
        }

        fn place<T>(&self, sourced: &Sourced<T>) -> String {
            sourced.provenance().to_string().replace(self.0.path().to_str().unwrap(), "ETC")
        }
    }

    const WORKER: &str = "[decnet]\nmode = agent\n\n[agent]\nhost-uuid = u-1\nmaster-host = 10.0.0.1\n\
                          swarmctl-port = 9000\nagent-dir = /srv/agent\nmaster-identity = ca\n";

    const BOTH: [(&str, &str); 2] = [(HOST_UUID, "u-2"), (MASTER_HOST, "master.lan")];

    #[test]
    fn ini_of_an_enrolled_worker_has_all_values() {
        let etc = Etc::new(WORKER);
        let read = etc.read(&[]);
        assert_eq!(read.host_uuid().value(), "u-1");
        assert_eq!(read.master_host().value(), "10.0.0.1");
        assert_eq!(read.master_port().value(), &9000);
        assert_eq!(read.agent_dir().value(), Path::new("/srv/agent"));
        assert_eq!(read.master_identity().map(Sourced::value), Some(&MasterIdentity::AnyFromCa));
        assert_eq!(read.ini(), Some(etc.ini().as_path()));
        assert_eq!(etc.place(read.host_uuid()), "ETC/decnet.ini [agent] host-uuid");
        assert_eq!(
            etc.place(read.master_identity().unwrap()),
            "ETC/decnet.ini [agent] master-identity"
        );
    }

    #[test]
    fn option_precedes_variable_and_variable_precedes_ini() {
        let etc = Etc::new(WORKER);
        let variables = [
            BOTH[0],
            (MASTER_PORT, " 9001 "),
            (AGENT_DIR, "/srv/variable"),
            (MASTER_IDENTITY, "name"),
        ];
        let read = etc.read(&variables);
        assert_eq!(
            read.host_uuid(),
            &Sourced { value: "u-2".into(), provenance: Provenance::Environment(HOST_UUID) }
        );
        assert_eq!(
            read.master_port(),
            &Sourced { value: 9001, provenance: Provenance::Environment(MASTER_PORT) }
        );
        assert_eq!(read.agent_dir().provenance(), &Provenance::Environment(AGENT_DIR));
        assert_eq!(read.master_identity().map(Sourced::value), Some(&MasterIdentity::Name));
        assert_eq!(read.master_host().value(), "10.0.0.1");

        let read = etc.sources(&variables).agent_dir("/srv/option").read().unwrap();
        assert_eq!(read.agent_dir().value(), Path::new("/srv/option"));
        assert_eq!(read.agent_dir().provenance().to_string(), "--agent-dir");
    }

    #[test]
    fn defaults_apply_without_an_ini() {
        let etc = Etc::bare();
        let read = etc.read(&BOTH);
        assert_eq!(read.master_port(), &Sourced { value: 8770, provenance: Provenance::Default });
        assert_eq!(read.agent_dir().value(), Path::new("/home/op/.decnet/agent"));
        assert_eq!(read.agent_dir().provenance().to_string(), "default");
        assert_eq!(read.master_identity(), None);

        fs::create_dir(etc.0.path().join("agent")).unwrap();
        assert_eq!(etc.read(&BOTH).agent_dir().value(), &etc.0.path().join("agent"));
    }

    #[test]
    fn config_option_precedes_config_variable() {
        let etc = Etc::new(WORKER);
        let other = Etc::new(&WORKER.replace("u-1", "u-3"));
        let elsewhere = other.ini();
        let variable = [(CONFIG, elsewhere.to_str().unwrap())];
        assert_eq!(etc.read(&variable).host_uuid().value(), "u-3");
        assert_eq!(
            etc.sources(&variable).config(etc.ini()).read().unwrap().host_uuid().value(),
            "u-1"
        );
        assert_eq!(etc.read(&[(CONFIG, "")]).host_uuid().value(), "u-1");
    }

    #[test]
    fn first_section_with_a_key_counts() {
        let etc = Etc::new(
            "[DEFAULT]\nagent-dir = /srv/default\n[swarm]\nswarmctl-port = 1\n\
             [agent]\nhost_uuid = u-1\nhost-uuid = u-2\nmaster-host = a\n[decnet]\nmode = Agent\nmaster-host = b\n",
        );
        let read = etc.read(&[]);
        assert_eq!(etc.place(read.host_uuid()), "ETC/decnet.ini [agent] host_uuid");
        assert_eq!(etc.place(read.master_host()), "ETC/decnet.ini [decnet] master-host");
        assert_eq!(etc.place(read.master_port()), "ETC/decnet.ini [swarm] swarmctl-port");
        assert_eq!(etc.place(read.agent_dir()), "ETC/decnet.ini [DEFAULT] agent-dir");
    }

    #[test]
    fn not_enrolled_error_names_missing_values_and_their_sources() {
        let bare = Etc::bare();
        assert!(bare.sources(&[]).read().unwrap_err().is_not_enrolled());
        assert_eq!(
            bare.refusal(&[]),
            "not enrolled: no host uuid: DECNET_HOST_UUID is not set, and ETC/decnet.ini does not exist; \
             no master host: DECNET_MASTER_HOST is not set, and ETC/decnet.ini does not exist; \
             enrol this host from its master"
        );
        assert_eq!(
            bare.refusal(&[BOTH[1], (CONFIG, "/nowhere/decnet.ini")]),
            "not enrolled: no host uuid: DECNET_HOST_UUID is not set, and /nowhere/decnet.ini \
             (named by DECNET_CONFIG) does not exist; enrol this host from its master"
        );
        let error = bare.sources(&[BOTH[1]]).config(bare.0.path()).read().unwrap_err();
        assert_eq!(
            bare.message(&error),
            "not enrolled: no host uuid: DECNET_HOST_UUID is not set, and ETC (named by --config) is not a file; \
             enrol this host from its master"
        );
        assert_eq!(
            Etc::new("[decnet]\nmode = agent\n[agent]\nmaster-host =\n").refusal(&[BOTH[0]]),
            "not enrolled: no master host: DECNET_MASTER_HOST is not set, and ETC/decnet.ini [agent] master-host \
             is empty; enrol this host from its master"
        );
        assert_eq!(
            Etc::new("[decnet]\nmode = agent\n[agent]\n").refusal(&[BOTH[0]]),
            "not enrolled: no master host: DECNET_MASTER_HOST is not set, and ETC/decnet.ini has no master-host in \
             [decnet] or [agent]; enrol this host from its master"
        );
        assert_eq!(
            Etc::new("[agent]\nmaster-host = a").refusal(&[BOTH[0]]),
            "not enrolled: no master host: DECNET_MASTER_HOST is not set, and ETC/decnet.ini has no master-host in \
             [decnet] or [master]; [agent] is read only with mode = agent; enrol this host from its master"
        );
        assert_eq!(
            Etc::new(WORKER).refusal(&[(HOST_UUID, " ")]),
            "not enrolled: no host uuid: DECNET_HOST_UUID is set but empty, which hides the ini; fill it in or \
             unset it; enrol this host from its master"
        );
    }

    #[test]
    fn invalid_value_is_named_with_its_source() {
        let etc = Etc::new(WORKER);
        let port = "must be a whole number from 1 to 65535";
        for (name, value, problem) in [
            (MASTER_PORT, "0", format!("{port}, not `0`")),
            (MASTER_PORT, "", format!("{port}, not ``")),
            (MASTER_PORT, "65536", format!("{port}, not `65536`")),
            (MODE, "worker", "must be agent or master, not `worker`".to_owned()),
            (HOST_UUID, "a\u{1b}b", "must be 1 to 255 printable characters on one line".to_owned()),
            (
                AGENT_DIR,
                "/a\n/b",
                "must be a path on one line, without control characters; are the lines after it indented?".to_owned(),
            ),
            (MASTER_IDENTITY, "", "must be name, host, ca, public, or sha256: and 64 hexadecimal digits".to_owned()),
        ] {
            assert!(etc.sources(&[(name, value)]).read().unwrap_err().is_config());
            assert_eq!(etc.refusal(&[(name, value)]), format!("{name}: {problem}"));
        }
        for (from, to, message) in [
            ("9000", "80a", format!("[agent] swarmctl-port: {port}, not `80a`")),
            (
                "9000",
                "9%",
                "[agent] swarmctl-port: has a single %; write %% for a percent sign".to_owned(),
            ),
            (
                "agent\n",
                "worker\n",
                "[decnet] mode: must be agent or master, not `worker`".to_owned(),
            ),
            (
                "u-1",
                "u-1\n  x",
                "[agent] host-uuid: must be 1 to 255 printable characters on one line".to_owned(),
            ),
            (
                "[agent]",
                "agent",
                "line 4: neither [section], nor key = value, nor a comment".to_owned(),
            ),
        ] {
            assert_eq!(
                Etc::new(&WORKER.replacen(from, to, 1)).refusal(&[]),
                format!("ETC/decnet.ini {message}")
            );
        }
    }

    #[test]
    fn existing_ini_must_be_readable() {
        let etc = Etc::bare();
        fs::write(etc.ini(), vec![b'\n'; limits::INI_FILE as usize]).unwrap();
        etc.read(&BOTH);
        fs::write(etc.ini(), vec![b'\n'; limits::INI_FILE as usize + 1]).unwrap();
        assert_eq!(
            etc.refusal(&BOTH),
            "ETC/decnet.ini: is larger than 1048576 bytes; this cannot be a decnet.ini"
        );
        fs::write(etc.ini(), b"[agent]\n# \xff\n").unwrap();
        assert_eq!(
            etc.refusal(&BOTH),
            "ETC/decnet.ini: is not valid UTF-8: invalid utf-8 sequence of 1 bytes from index 10"
        );
    }

    #[test]
    fn fifo_is_not_opened() {
        let etc = Etc::bare();
        assert!(std::process::Command::new("mkfifo").arg(etc.ini()).status().unwrap().success());
        assert_eq!(etc.read(&BOTH).host_uuid().value(), "u-2");
    }

    #[test]
    fn master_host_is_only_a_host() {
        for (text, authority) in [
            ("swarmctl", "swarmctl:8770"),
            ("Master_1.lan.", "Master_1.lan.:8770"),
            ("10.0.0.1", "10.0.0.1:8770"),
            ("fd00::1", "[fd00::1]:8770"),
            ("[fd00::1]", "[fd00::1]:8770"),
        ] {
            assert_eq!(Enrolment::new("u", text, "/a").unwrap().master_authority(), authority);
        }
        let alone =
            "must be only a host name or an IP address, without scheme, user, port, path or spaces";
        let long = format!("{}.lan", "a".repeat(64));
        for (text, problem) in [
            ("", alone),
            ("https://a", alone),
            ("a/b", alone),
            ("a:80", alone),
            ("u@a", alone),
            ("a b", alone),
            ("-a", alone),
            ("[10.0.0.1]", alone),
            ("fe80::1%eth0", alone),
            (&long, alone),
            ("10.0.0.256", "must be a host name or an IPv4 address of four numbers below 256"),
            (
                "zürich.lan",
                "must be a host name in ASCII (write the xn-- form of an international one)",
            ),
        ] {
            let error = Enrolment::new("u", text, "/a").unwrap_err();
            assert_eq!(error.to_string(), format!("master host: {problem}, not `{text}`"));
        }
    }

    #[test]
    fn values_from_the_program_are_checked_and_survive_reload() {
        let given = Enrolment::new("u", "a", "/a").unwrap().with_master_port(1).unwrap();
        assert_eq!(given.master_port(), &Sourced { value: 1, provenance: Provenance::Program });
        assert_eq!(given.ini(), None);
        assert_eq!(given.reload().unwrap(), given);

        let refusal = |result: Result<Enrolment, Error>| result.unwrap_err().to_string();
        assert_eq!(
            refusal(Enrolment::new("", "a", "/a")),
            "host uuid: must be 1 to 255 printable characters on one line"
        );
        assert_eq!(refusal(Enrolment::new("u", "a", "")), "agent dir: must not be empty");
        assert_eq!(
            refusal(given.with_master_port(0)),
            "master port: must be a whole number from 1 to 65535, not `0`"
        );
    }

    #[test]
    fn reload_reads_the_current_ini() {
        let etc = Etc::new(WORKER);
        let before = etc.read(&[]);
        assert_eq!(before.reload().unwrap(), before);
        fs::write(etc.ini(), WORKER.replace("u-1", "u-4")).unwrap();
        assert_eq!(before.reload().unwrap().host_uuid().value(), "u-4");
        fs::remove_file(etc.ini()).unwrap();
        assert!(before.reload().unwrap_err().is_not_enrolled());
    }

    #[test]
    fn other_variables_are_not_stored() {
        let sources =
            EnrolmentSources::from_variables([("DECNET_JWT_SECRET", "hush"), ("HOME", "/home/op")]);
        assert!(!format!("{sources:?}").contains("hush"));
    }
}
