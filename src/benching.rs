//! Internals that the benches measure. Embedders do not need them. Runs on the caller's thread.

use std::path::Path;

use crate::master::body::Body;
use crate::outbox::schema;
use crate::status::decnet::DecnetStatus;
use crate::status::docker::{Containers, DockerState, Networks};

/// The statement that creates the outbox's table. The baseline bench of SQLite uses the same table.
pub const TABLE: &str = schema::TABLE;

/// The statement that creates its index.
pub const INDEX: &str = schema::INDEX;

/// Writes bodies from a state file and fixed Docker states.
#[derive(Debug)]
pub struct Bodies {
    source: DecnetStatus,
    engine: DockerState,
}

impl Bodies {
    /// Uses the state file at this path, and these containers: the name and the state of each.
    pub fn new(state_file: &Path, containers: Vec<(String, String)>) -> Self {
        let source = DecnetStatus::new(Path::new("/etc/decnet/agent")).state_file(state_file);
        let states = containers.into_iter().map(|(name, state)| (name, Some(state))).collect();
        let containers = Ok(Containers { states, left_out: None });
        Self { source, engine: DockerState { containers, networks: Ok(Networks::default()) } }
    }

    /// Writes a body as it is posted.
    ///
    /// # Errors
    ///
    /// The state file cannot be read.
    pub fn write(&mut self) -> Result<Vec<u8>, String> {
        let snapshot = self.source.status(&self.engine, None)?;
        serde_json::to_vec(&Body::of("u", &snapshot, &[])).map_err(|error| error.to_string())
    }
}
