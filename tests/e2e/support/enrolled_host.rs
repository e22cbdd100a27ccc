//! The real master with one enrolled host, and heartbeats that beat when the test sends a tick.

use std::path::Path;
use std::time::Instant;

use crossbeam_channel::{Sender, unbounded};
use decnet_heartbeat::{DecnetStatus, Enrolment, Heartbeat, HeartbeatBuilder};
use serde_json::{Value, json};

use super::master::Worker;
use super::{RealMaster, nothing_deployed};

/// A real master and a host that is enrolled with it.
pub struct EnrolledHost {
    pub master: RealMaster,
    agent_dir: tempfile::TempDir,
    pub worker: Worker,
}

impl EnrolledHost {
    pub fn new() -> Self {
        let master = RealMaster::start();
        let agent_dir = tempfile::tempdir().unwrap();
        let worker = master.enrol("worker", agent_dir.path());
        Self { master, agent_dir, worker }
    }

    pub fn agent_dir(&self) -> &Path {
        self.agent_dir.path()
    }

    pub fn enrolment(&self) -> Enrolment {
        let enrolment = Enrolment::new(&self.worker.uuid, "127.0.0.1", self.agent_dir()).unwrap();
        enrolment.with_master_port(self.master.port()).unwrap()
    }

    /// Writes an ini as the master writes it for this host.
    pub fn write_ini(&self, path: &Path) {
        let ini = format!(
            "[decnet]\nmode = agent\ndisallow-master = true\nlog-directory = /var/log/decnet\n\n\
             [agent]\nmaster-host = 127.0.0.1\nswarmctl-port = {}\nswarm-syslog-port = 6514\nagent-port = 8765\n\
             agent-dir = {}\nupdater-dir = /etc/decnet/updater\nhost-uuid = {}\n",
            self.master.port(),
            self.agent_dir().display(),
            self.worker.uuid
        );
        std::fs::write(path, ini).unwrap();
    }

    /// A heartbeat that beats on the ticks that are sent. Unless it gets another source, it reports
    /// that nothing is deployed.
    pub fn builder(&self) -> (HeartbeatBuilder, Sender<Instant>) {
        let (tick, ticks) = unbounded();
        let builder = Heartbeat::builder()
            .enrolment(self.enrolment())
            .ticks(ticks)
            .status_source(nothing_deployed);
        (builder, tick)
    }

    pub fn start(&self, source: DecnetStatus) -> (Heartbeat, Sender<Instant>) {
        let (builder, tick) = self.builder();
        (builder.status_source(source).start().unwrap(), tick)
    }

    /// Waits for this many answers of the master, and returns the statuses of all.
    pub fn wait_for_statuses(&self, count: usize) -> Vec<u16> {
        self.master.answers(count).iter().map(|answer| answer.status.unwrap()).collect()
    }

    pub fn swarm_host_row(&self) -> Value {
        self.master.rows("swarm_hosts", json!({"uuid": self.worker.uuid}))[0].clone()
    }

    pub fn lifecycle_row(&self, id: &str) -> Value {
        self.master.rows("decky_lifecycle", json!({"id": id}))[0].clone()
    }

    pub fn shards(&self) -> Vec<Value> {
        self.master.rows("decky_shards", json!({}))
    }
}

/// A decky as the Python agent writes it into the state file.
pub fn decky(name: &str, services: &[&str]) -> Value {
    json!({
        "name": name, "ip": "10.0.0.5", "services": services, "distro": "debian", "base_image": "debian:12",
        "build_base": "debian:12", "hostname": name, "archetype": null, "service_config": {"ssh": {"banner": "é\n"}},
        "nmap_os": "linux", "mutate_interval": 30, "last_mutated": 1_700_000_000.25, "last_login_attempt": 0.0,
        "host_uuid": null,
    })
}

/// Writes a state file as the Python agent writes it.
pub fn write_state_file(path: &Path, deckies: &[Value]) {
    let config = json!({
        "mode": "swarm", "interface": "eth0", "subnet": "10.0.0.0/24", "gateway": "10.0.0.1", "deckies": deckies,
        "log_file": null, "ipvlan": false, "mutate_interval": 30,
    });
    let state = json!({"config": config, "compose_path": "/opt/decnet/c.yml"});
    std::fs::write(path, state.to_string()).unwrap();
}

pub fn send_tick(tick: &Sender<Instant>) {
    tick.send(Instant::now()).unwrap();
}
