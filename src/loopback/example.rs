//! What the demo and the examples of these docs begin with: a folder of their own, gone with it, and a worker in it. Runs on
//! the thread that asks.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::{Enrolled, LoopbackMaster};
use crate::error::Error;
use crate::heartbeat::{Heartbeat, HeartbeatBuilder};
use crate::status::Snapshot;

/// A folder for its owner alone, removed when it is dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new one, where such folders are.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self, Error> {
        let path =
            std::env::temp_dir().join(format!("decnet-heartbeat-{:016x}", fastrand::u64(..)));
        DirBuilder::new().mode(0o700).create(&path).map_err(|source| {
            Error::loopback(format!("the folder {} cannot be made", path.display()))
                .with_source(source)
        })?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left behind is a few KiB in the folder for such things.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A master, a worker that it has enrolled in a folder, and a heartbeat of it to be built.
///
/// # Errors
/// When one of them cannot be made.
pub fn example() -> Result<(Scratch, LoopbackMaster, Enrolled, HeartbeatBuilder), Error> {
    let (scratch, master) = (Scratch::new()?, LoopbackMaster::start()?);
    let worker = master.enrol(scratch.path())?;
    let builder = Heartbeat::builder().enrolment(worker.enrolment()?);
    Ok((scratch, master, worker, builder.status_source(|| Snapshot::unknown("an example"))))
}
