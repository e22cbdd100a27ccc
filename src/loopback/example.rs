//! What the demo and the examples of the documentation start from: a temporary folder, a master and
//! an enrolled worker. Runs on the caller's thread.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::{Enrolled, LoopbackMaster};
use crate::error::Error;
use crate::heartbeat::{Heartbeat, HeartbeatBuilder};
use crate::limits;
use crate::status::Snapshot;

/// A temporary folder with mode 0700. It is removed when the value is dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Creates a folder in the system's temporary directory.
    ///
    /// # Errors
    ///
    /// The folder cannot be created.
    pub fn new() -> Result<Self, Error> {
        let path =
            std::env::temp_dir().join(format!("decnet-heartbeat-{:016x}", fastrand::u64(..)));
        DirBuilder::new().mode(0o700).create(&path).map_err(|source| {
            Error::loopback(format!("cannot create the folder {}", path.display()))
                .with_source(source)
        })?;
        Ok(Self(path))
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // If this fails, a few KiB stay in the temporary directory.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running master, a worker that it has enrolled in a temporary folder, and a builder for this
/// worker's heartbeat with an interval of 50 ms.
///
/// # Errors
///
/// The folder, a certificate or the master's thread cannot be created.
pub fn example() -> Result<(Scratch, LoopbackMaster, Enrolled, HeartbeatBuilder), Error> {
    let scratch = Scratch::new()?;
    let master = LoopbackMaster::start()?;
    let worker = master.enrol(scratch.path())?;
    let builder = Heartbeat::builder()
        .enrolment(worker.enrolment()?)
        .interval(limits::MIN_INTERVAL)
        .status_source(|| Snapshot::unknown("an example"));
    Ok((scratch, master, worker, builder))
}

/// The same with the heartbeat started. The master owns the folder.
///
/// # Errors
///
/// As [`example`], and the errors of [`HeartbeatBuilder::start`].
pub fn example_heartbeat() -> Result<(LoopbackMaster, Enrolled, Heartbeat), Error> {
    let (scratch, mut master, worker, builder) = example()?;
    let heartbeat = builder.start()?;
    master.scratch = Some(scratch);
    Ok((master, worker, heartbeat))
}
