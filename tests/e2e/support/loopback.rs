//! A loopback master with one enrolled worker, for the tests whose real peer is not the master.

use std::path::Path;
use std::time::Instant;

use crossbeam_channel::{Sender, unbounded};
use decnet_heartbeat::loopback::{Enrolled, LoopbackMaster};
use decnet_heartbeat::{Heartbeat, HeartbeatBuilder, Snapshot};
use serde_json::json;

pub struct Loopback {
    pub master: LoopbackMaster,
    pub worker: Enrolled,
}

impl Loopback {
    /// The worker's bundle is written into `agent_dir`.
    pub fn new(agent_dir: &Path) -> Self {
        let master = LoopbackMaster::start().unwrap();
        let worker = master.enrol(agent_dir).unwrap();
        Self { master, worker }
    }

    /// Beats on the ticks that are sent.
    pub fn builder(&self) -> (HeartbeatBuilder, Sender<Instant>) {
        let (tick, ticks) = unbounded();
        let source = || Snapshot::new(&json!({"deployed": false, "deckies": []}));
        (
            Heartbeat::builder()
                .enrolment(self.worker.enrolment().unwrap())
                .ticks(ticks)
                .status_source(source),
            tick,
        )
    }

    /// The deckies of all deltas that were sent, in their order.
    pub fn sent(&self) -> Vec<String> {
        let requests =
            self.master.received().into_iter().map(|request| request.json.expect("a body of JSON"));
        let deltas =
            requests.flat_map(|json| json["lifecycle"].as_array().cloned().unwrap_or_default());
        deltas.map(|delta| delta["decky_name"].as_str().unwrap().to_owned()).collect()
    }
}
