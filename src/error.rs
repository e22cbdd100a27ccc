//! The opaque error type. Each error describes one layer and has the next one as its source. For
//! any thread.

use std::error::Error as StdError;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::limits;
use crate::text::{layers, sanitize};

/// An error of reading the enrolment, of starting a heartbeat, or of pushing a delta.
///
/// `Display` describes this layer, with the file, key or value at fault and what to do about it.
/// [`source`](StdError::source) is the next layer. `Debug` prints the whole chain. The accessors
/// distinguish the cases that a caller may handle differently.
///
/// ```
/// use decnet_heartbeat::{Enrolment, Heartbeat};
///
/// # let dir = tempfile::tempdir()?;
/// std::fs::create_dir(dir.path().join("ca.crt"))?; // a folder instead of the file
/// let enrolment = Enrolment::new("0c4f9a52", "127.0.0.1", dir.path())?;
/// let error = Heartbeat::builder().enrolment(enrolment).start().unwrap_err();
/// assert!(error.is_bundle() && !error.is_transient()); // an operator must correct it
/// assert_eq!(error.path(), Some(dir.path().join("ca.crt").as_path()));
/// assert!(format!("{error:?}").ends_with("not a regular file")); // prints the chain of sources
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Error {
    // Boxed, so that results are small.
    inner: Box<Inner>,
}

struct Inner {
    kind: Kind,
    source: Option<Box<dyn StdError + Send + Sync>>,
    /// The same call may succeed later, also if no source is temporary.
    passing: bool,
    in_doubt: bool,
}

enum Kind {
    /// The missing values and their sources.
    NotEnrolled(String),
    Config {
        place: String,
        problem: String,
    },
    Bundle {
        path: PathBuf,
        problem: String,
        remedy: &'static str,
    },
    Outbox {
        path: Option<PathBuf>,
        problem: String,
    },
    Setting {
        name: &'static str,
        problem: String,
    },
    /// The name of the thread.
    Thread(&'static str),
    /// The id of the parent.
    Forked(u32),
    #[cfg(feature = "cli")]
    Output,
    #[cfg(feature = "loopback")]
    Loopback(String),
}

impl Error {
    /// This host is not enrolled. `missing` names the missing values and their sources.
    pub(crate) fn not_enrolled(missing: impl Into<String>) -> Self {
        Self::new(Kind::NotEnrolled(missing.into()))
    }

    /// A configured value is not usable. `place` is the variable, or the file, section and key.
    pub(crate) fn config(place: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::new(Kind::Config { place: place.into(), problem: problem.into() })
    }

    /// A file of the bundle is not usable. `remedy` is what to do.
    pub(crate) fn bundle(
        path: impl Into<PathBuf>,
        problem: impl Into<String>,
        remedy: &'static str,
    ) -> Self {
        Self::new(Kind::Bundle { path: path.into(), problem: problem.into(), remedy })
    }

    /// The problem with a file of the bundle, with its sources, and what to do.
    #[cfg(feature = "cli")]
    pub(crate) fn bundle_parts(&self) -> Option<(String, &'static str)> {
        let Kind::Bundle { problem, remedy, .. } = &self.inner.kind else { return None };
        let problem = sanitize(problem);
        let problem = match self.source() {
            Some(source) => format!("{problem}: {}", chain(source)),
            None => problem,
        };
        Some((problem, remedy))
    }

    /// An operation of the outbox failed. `path` is `None` for an outbox in memory.
    pub(crate) fn outbox(path: Option<&Path>, problem: impl Into<String>) -> Self {
        Self::new(Kind::Outbox { path: path.map(Path::to_owned), problem: problem.into() })
    }

    /// A value of a builder is not usable.
    pub(crate) fn setting(name: &'static str, problem: impl Into<String>) -> Self {
        Self::new(Kind::Setting { name, problem: problem.into() })
    }

    /// A thread could not be started.
    pub(crate) fn thread(name: &'static str, source: io::Error) -> Self {
        Self::new(Kind::Thread(name)).with_source(source)
    }

    /// The handle belongs to the process `from`, from which this process was forked.
    pub(crate) fn forked(from: u32) -> Self {
        Self::new(Kind::Forked(from))
    }

    /// The output of the program could not be printed.
    #[cfg(feature = "cli")]
    pub(crate) fn output(source: io::Error) -> Self {
        Self::new(Kind::Output).with_source(source)
    }

    /// Whether the reader of the program's output has closed the pipe. This is not reported.
    #[cfg(feature = "cli")]
    pub(crate) fn is_pipe_closed(&self) -> bool {
        let source = self.source().and_then(|source| source.downcast_ref::<io::Error>());
        matches!(self.inner.kind, Kind::Output)
            && source.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    }

    /// An operation of the loopback master failed.
    #[cfg(feature = "loopback")]
    pub(crate) fn loopback(doing: impl Into<String>) -> Self {
        Self::new(Kind::Loopback(doing.into()))
    }

    fn new(kind: Kind) -> Self {
        Self { inner: Box::new(Inner { kind, source: None, passing: false, in_doubt: false }) }
    }

    /// Marks the error as one that may pass, such as for files that are being written.
    pub(crate) fn passing(mut self) -> Self {
        self.inner.passing = true;
        self
    }

    /// Marks the error as one of a request that may still be executed.
    pub(crate) fn in_doubt(mut self) -> Self {
        self.inner.in_doubt = true;
        self
    }

    /// Sets the source.
    pub(crate) fn with_source(
        mut self,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    /// Whether this host is not enrolled: the host uuid or the master host is missing.
    ///
    /// ```
    /// use decnet_heartbeat::EnrolmentSources;
    ///
    /// let sources = EnrolmentSources::from_variables([("HOME", "/root")]).config("/no/such.ini");
    /// let error = sources.read().unwrap_err();
    /// assert!(error.is_not_enrolled());
    /// ```
    pub fn is_not_enrolled(&self) -> bool {
        matches!(self.inner.kind, Kind::NotEnrolled(_))
    }

    /// Whether a value from a variable or the ini is not usable.
    ///
    /// ```
    /// use decnet_heartbeat::EnrolmentSources;
    ///
    /// let sources = EnrolmentSources::from_variables([("DECNET_SWARMCTL_PORT", "0")]);
    /// let error = sources.config("/no/such.ini").read().unwrap_err();
    /// assert!(error.is_config() && error.to_string().starts_with("DECNET_SWARMCTL_PORT: "));
    /// ```
    pub fn is_config(&self) -> bool {
        matches!(self.inner.kind, Kind::Config { .. })
    }

    /// Whether the bundle (`ca.crt`, `worker.crt`, `worker.key`) is not usable.
    pub fn is_bundle(&self) -> bool {
        matches!(self.inner.kind, Kind::Bundle { .. })
    }

    /// Whether the result of a request is in doubt: the disk has not answered within a second, and
    /// the request is executed when it answers, unless the process ends first. A delta is then
    /// queued and sent, so pushing it again may send it twice. An operation has not begun; its rows
    /// are removed again. If this is false, nothing was queued, and the call may be repeated.
    ///
    /// ```
    /// use decnet_heartbeat::{DeltaSender, Error, LifecycleDelta};
    ///
    /// fn push(deltas: &DeltaSender, delta: LifecycleDelta) -> Result<(), Error> {
    ///     match deltas.push(delta.clone()) {
    ///         Err(error) if error.is_outbox() && !error.is_in_doubt() => deltas.push(delta),
    ///         answer => answer,
    ///     }
    /// }
    /// ```
    pub fn is_in_doubt(&self) -> bool {
        self.inner.in_doubt
    }

    /// Whether the outbox could not queue a delta, or could not be opened.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::{LifecycleDelta, Operation, OutboxLocation};
    ///
    /// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let heartbeat = builder.outbox(OutboxLocation::Memory).start()?;
    /// let deltas = heartbeat.deltas();
    /// heartbeat.stop(Duration::from_secs(5));
    /// // Nothing delivers from an outbox in memory after the stop.
    /// let delta = LifecycleDelta::succeeded("decky-01", Operation::Deploy);
    /// let error = deltas.push(delta).unwrap_err();
    /// assert!(error.is_outbox());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn is_outbox(&self) -> bool {
        matches!(self.inner.kind, Kind::Outbox { .. })
    }

    /// Whether the same call may succeed later without a change of the configuration.
    ///
    /// True in these cases:
    ///
    /// - The system reports an error that may be temporary: an I/O error, no free descriptor or
    ///   memory, a file server that does not answer, a locked database.
    /// - An enrolment may be in progress, or a file system may not be mounted yet: certificate and
    ///   key do not match, a file is empty or truncated, some of the three files of the bundle are
    ///   missing, their folder is empty, or a symlink is dangling.
    ///
    /// False if a value or the content of a file is not usable, or if a file is missing, has the
    /// wrong type, is too large, or is not readable for this user.
    ///
    /// ```
    /// use decnet_heartbeat::{Enrolment, Heartbeat};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let enrolment = Enrolment::new("0c4f9a52", "127.0.0.1", dir.path())?;
    /// let start = || Heartbeat::builder().enrolment(enrolment.clone()).start();
    /// // The agent dir is empty. Its file system may not be mounted yet.
    /// assert!(start().unwrap_err().is_transient());
    /// // This is not a certificate.
    /// std::fs::write(dir.path().join("ca.crt"), "no certificate\n")?;
    /// assert!(!start().unwrap_err().is_transient());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn is_transient(&self) -> bool {
        self.inner.passing || causes(self).any(passes)
    }

    /// The file that cannot be used, if the error is about a file.
    pub fn path(&self) -> Option<&Path> {
        match &self.inner.kind {
            Kind::Bundle { path, .. } => Some(path),
            Kind::Outbox { path, .. } => path.as_deref(),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.inner.kind {
            Kind::NotEnrolled(missing) => write!(f, "not enrolled: {missing}"),
            Kind::Config { place, problem } => write!(f, "{place}: {problem}"),
            Kind::Bundle { path, problem, remedy } => {
                write!(f, "bundle: {}: {problem}; {remedy}", sanitize_path(path))
            }
            Kind::Outbox { path: Some(path), problem } => {
                write!(f, "outbox {}: {problem}", sanitize_path(path))
            }
            Kind::Outbox { path: None, problem } => write!(f, "outbox in memory: {problem}"),
            Kind::Setting { name, problem } => write!(f, "{name}: {problem}"),
            Kind::Thread(name) => write!(f, "cannot start the thread {name}"),
            Kind::Forked(from) => write!(
                f,
                "this process was forked from process {from}, in which a heartbeat was running, and has none of its threads; \
                 start the heartbeat after the fork, in the process that uses it"
            ),
            #[cfg(feature = "cli")]
            Kind::Output => f.write_str("the output could not be printed"),
            #[cfg(feature = "loopback")]
            Kind::Loopback(doing) => write!(f, "loopback master: {doing}"),
        }
    }
}

impl fmt::Debug for Error {
    /// The whole chain, for `main() -> Result<…>` and `unwrap`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", chain(self))
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.inner.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// The sources of an error, at most [`limits::ERROR_SOURCES`], as an error may be its own source.
fn causes(error: &Error) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    std::iter::successors(error.source(), |error| (*error).source()).take(limits::ERROR_SOURCES)
}

/// Whether this is an error of the system or of SQLite that may pass.
fn passes(error: &(dyn StdError + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return !is_permanent(error);
    }
    error
        .downcast_ref::<rusqlite::Error>()
        .and_then(rusqlite::Error::sqlite_error_code)
        .is_some_and(|code| {
            use rusqlite::ErrorCode as Code;
            matches!(
                code,
                Code::DatabaseBusy
                    | Code::DatabaseLocked
                    | Code::DiskFull
                    | Code::SystemIoFailure
                    | Code::OutOfMemory
            )
        })
}

/// Whether only a change of the files or of their permissions fixes this error.
fn is_permanent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::IsADirectory
            | ErrorKind::NotADirectory
            // From `files::regular`: not a regular file.
            | ErrorKind::InvalidInput
            | ErrorKind::InvalidData
            | ErrorKind::InvalidFilename
            | ErrorKind::FileTooLarge
    ) || error.raw_os_error() == Some(libc::ELOOP)
}

/// An error and all its sources on one line, safe to log.
pub(crate) fn chain(error: &dyn StdError) -> String {
    // One character more than `sanitize` keeps, so that it marks the truncation.
    let layers: Vec<_> = layers(error, limits::LOG_TEXT + 1).map(|text| sanitize(&text)).collect();
    layers.join(": ")
}

/// The text of an HTTP error, safe to log. For an error of the system, this is the system's text.
pub(crate) fn http_problem(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => sanitize(&error.to_string()),
        error => chain(error),
    }
}

/// A path as text for an error or a log line.
pub(crate) fn sanitize_path(path: &Path) -> String {
    sanitize(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_a_retry_cannot_fix_are_permanent() {
        let of = |code| {
            Error::bundle("/a", "cannot be read", "")
                .with_source(io::Error::from_raw_os_error(code))
        };
        for code in [
            libc::ENOENT,
            libc::EACCES,
            libc::EPERM,
            libc::EISDIR,
            libc::ENOTDIR,
            libc::EFBIG,
            libc::ELOOP,
        ] {
            assert!(!of(code).is_transient(), "{:?}", of(code));
        }
        assert!(!of(libc::ENAMETOOLONG).is_transient() && !of(libc::EINVAL).is_transient());
        for code in [
            libc::EIO,
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOMEM,
            libc::ESTALE,
            libc::ETIMEDOUT,
            libc::ENOTCONN,
            libc::EHOSTDOWN,
            libc::ENODEV,
            libc::EINTR,
            libc::EAGAIN,
            libc::ENOSPC,
        ] {
            assert!(of(code).is_transient(), "{:?}", of(code));
        }
        // At any position in the chain.
        assert!(Error::config("/a", "no").with_source(of(libc::EIO)).is_transient());
        assert!(
            !Error::config("/a", "no").is_transient()
                && Error::config("/a", "no").passing().is_transient()
        );
    }
}
