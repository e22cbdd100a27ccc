//! A loopback master with one enrolled worker.

use std::path::Path;
use std::time::Instant;

use crossbeam_channel::{Sender, unbounded};
use decnet_heartbeat::loopback::{Enrolled, LoopbackMaster, Seen};
use decnet_heartbeat::{Heartbeat, HeartbeatBuilder, Snapshot};
use serde_json::json;

use super::{TIMEOUT, requests};

pub struct Loopback {
    pub master: LoopbackMaster,
    pub worker: Enrolled,
}

impl Loopback {
    /// Starts a master, and writes the worker's bundle into `agent_dir`.
    pub fn new(agent_dir: &Path) -> Self {
        let master = LoopbackMaster::start().unwrap();
        let worker = master.enrol(agent_dir).unwrap();
        Self { master, worker }
    }

    /// A heartbeat that beats on the ticks that are sent, and reports that nothing is deployed.
    pub fn builder(&self) -> (HeartbeatBuilder, Sender<Instant>) {
        let (tick, ticks) = unbounded();
        let builder = Heartbeat::builder()
            .enrolment(self.worker.enrolment().unwrap())
            .ticks(ticks)
            .status_source(nothing_deployed);
        (builder, tick)
    }

    /// The deckies of all deltas that the master received, in their order.
    pub fn sent(&self) -> Vec<String> {
        self.master.received().iter().flat_map(requests::deckies).collect()
    }

    /// Waits until the master has received a delta of this decky.
    pub fn wait_for_delta(&self, decky: &str) {
        let is_received = |seen: &Seen| {
            seen.received().iter().flat_map(requests::deckies).any(|received| received == decky)
        };
        assert!(self.master.wait_until(TIMEOUT, is_received), "no delta of {decky}");
    }
}

pub fn nothing_deployed() -> Snapshot {
    Snapshot::new(&json!({"deployed": false, "deckies": []}))
}
