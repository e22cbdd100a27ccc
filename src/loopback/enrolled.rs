//! A worker that a master has enrolled. For any thread.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use super::certificates::write_file;
use crate::credentials::enrolment::Enrolment;
use crate::error::Error;

/// An enrolled worker, with its bundle in a folder.
///
/// ```
/// use decnet_heartbeat::loopback::LoopbackMaster;
///
/// # let dir = tempfile::tempdir()?;
/// let master = LoopbackMaster::start()?;
/// let worker = master.enrol(dir.path())?;
/// assert!(worker.agent_dir.join("worker.key").exists());
/// assert_eq!((worker.port, worker.fingerprint.len()), (master.port(), 64));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Enrolled {
    /// The host uuid.
    pub uuid: String,
    /// SHA-256 of the pinned certificate's DER in 64 lowercase hexadecimal digits.
    pub fingerprint: String,
    /// The master's port on 127.0.0.1.
    pub port: u16,
    /// The folder with `ca.crt`, `worker.crt` and `worker.key`.
    pub agent_dir: PathBuf,
}

impl Enrolled {
    /// The enrolment for a heartbeat of this worker.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::Heartbeat;
    ///
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The agent dir is empty.
    pub fn enrolment(&self) -> Result<Enrolment, Error> {
        Enrolment::new(&self.uuid, Ipv4Addr::LOCALHOST.to_string(), &self.agent_dir)?
            .with_master_port(self.port)
    }

    /// Writes the worker's `decnet.ini` to `path`, as in an enrolment bundle.
    ///
    /// ```
    /// use decnet_heartbeat::EnrolmentSources;
    ///
    /// # let (dir, _master, worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// let ini = dir.path().join("decnet.ini");
    /// worker.write_ini(&ini)?;
    /// let enrolment = EnrolmentSources::from_variables([("DECNET_CONFIG", &ini)]).read()?;
    /// assert_eq!(enrolment.host_uuid().value(), &worker.uuid);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn write_ini(&self, path: &Path) -> Result<(), Error> {
        write_file(path, &self.ini(), 0o644)
    }
}
