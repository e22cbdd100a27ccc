//! The status of an agent that reports its own, in place of DECNET's. The source runs on the status
//! thread; the agent's status is set by the thread `pipe`.

use std::sync::{Arc, Mutex, PoisonError};

use crate::status::decnet::DecnetStatus;
use crate::status::{Snapshot, StatusSource, Topology};

/// What the agent has reported last. `None`: DECNET's status is sent. The lock is held only to copy
/// or to replace it.
#[derive(Clone, Debug, Default)]
pub(super) struct AgentStatus(Arc<Mutex<Option<Snapshot>>>);

impl AgentStatus {
    pub(super) fn set(&self, status: Option<Snapshot>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    fn get(&self) -> Option<Snapshot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The agent's status with DECNET's topology, or DECNET's status.
#[derive(Debug)]
pub(super) struct PipeSource {
    pub(super) agent: AgentStatus,
    pub(super) decnet: DecnetStatus,
}

impl StatusSource for PipeSource {
    fn snapshot(&mut self) -> Snapshot {
        if self.agent.get().is_none() {
            return self.decnet.snapshot();
        }
        // First, as Docker may be slow: the agent may report a newer status meanwhile.
        let topology = self.decnet.topology();
        match (self.agent.get(), topology) {
            (Some(status), Some(topology)) => status.with_topology(topology),
            (Some(status), None) => status,
            (None, _) => self.decnet.snapshot(),
        }
    }

    fn applied_topology(&mut self) -> Option<Topology> {
        self.decnet.applied_topology()
    }
}
