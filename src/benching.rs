//! What the benches measure by itself and embedders do not need. Runs on the caller's thread.

use std::path::Path;

use crate::master::body::Body;
use crate::outbox::schema;
use crate::status::decnet::DecnetStatus;
use crate::status::docker::{Containers, DockerState, Networks};

/// The outbox' table, as it is made: the floor of what SQLite can do writes the same.
pub const TABLE: &str = schema::TABLE;

/// And its index.
pub const INDEX: &str = schema::INDEX;

/// Writes one body after another, of a state file and of what Docker has said last.
#[derive(Debug)]
pub struct Bodies {
    source: DecnetStatus,
    engine: DockerState,
}

impl Bodies {
    /// The state file is at this path, and Docker has these containers: a name and a state each.
    pub fn new(state_file: &Path, containers: Vec<(String, String)>) -> Self {
        let source = DecnetStatus::new(Path::new("/etc/decnet/agent")).state_file(state_file);
        let states = containers.into_iter().map(|(name, state)| (name, Some(state))).collect();
        let containers = Ok(Containers { states, left_out: None });
        Self { source, engine: DockerState { containers, networks: Ok(Networks::default()) } }
    }

    /// A body as it is posted.
    ///
    /// # Errors
    ///
    /// Why the state file cannot be read.
    pub fn write(&mut self) -> Result<Vec<u8>, String> {
        let snapshot = self.source.status(&self.engine, None)?;
        serde_json::to_vec(&Body::of("u", &snapshot, &[])).map_err(|error| error.to_string())
    }
}
