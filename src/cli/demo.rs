//! `demo`: a heartbeat and a loopback master, printed as they work. Every line is an event of the
//! heartbeat or of the master; none is simulated. Runs on the main thread.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, select};
use serde_json::json;

use super::output::print_result;
use crate::delta::{LifecycleDelta, Operation};
use crate::error::Error;
use crate::heartbeat::Heartbeat;
use crate::loopback::{Enrolled, LifecycleRow, LoopbackMaster, RowStatus, Scratch};
use crate::stats::{Failure, Stats};
use crate::status::Snapshot;

/// One event of the demo.
struct Scene {
    /// When it happens, as a fraction of the demo's length.
    at: f64,
    play: fn(&mut Demo) -> Result<(), Error>,
}

/// What to do after the demo.
const NEXT_STEPS: &str = "
Next steps on an enrolled worker:
  decnet-heartbeat check         check everything that a heartbeat needs
  decnet-heartbeat run           send heartbeats until SIGTERM
  decnet-heartbeat track --help  run a command and report how it ended
";

const SCRIPT: [Scene; 6] = [
    Scene { at: 0.15, play: Demo::order_deploy },
    Scene { at: 0.25, play: Demo::deploy_succeeds },
    Scene { at: 0.40, play: Demo::stop_master },
    Scene { at: 0.50, play: Demo::mutate_fails },
    Scene { at: 0.70, play: Demo::restart_master },
    Scene { at: 1.00, play: Demo::announce_stop },
];

/// Plays the demo and prints a summary. Fails if a delta was not delivered.
pub(super) fn demo(length: Duration) -> Result<(), Error> {
    let start = Instant::now();
    let mut demo = Demo::new(start, length)?;
    for scene in SCRIPT {
        demo.watch_until(start + length.mul_f64(scene.at))?;
        (scene.play)(&mut demo)?;
    }
    demo.finish()
}

struct Demo {
    start: Instant,
    // Dropped before the master and the folder that it uses.
    heartbeat: Heartbeat,
    beats: Receiver<()>,
    master: LoopbackMaster,
    worker: Enrolled,
    deployed: Arc<Mutex<bool>>,
    /// The stats as of the last line.
    last_stats: Stats,
    pushed_at: Instant,
    outage_start: Instant,
    outage: Duration,
    _folder: Scratch,
}

impl Demo {
    fn new(start: Instant, length: Duration) -> Result<Self, Error> {
        let folder = Scratch::new()?;
        let master = LoopbackMaster::start()?;
        let worker = master.enrol(&folder.path().join("agent"))?;
        print_event(
            start,
            "⌂",
            &format!("a DECNET master with its own CA listens on {}", master.address()),
        )?;
        print_event(start, "✎", &format!("this host is enrolled: {}", worker.uuid))?;
        let deployed = Arc::new(Mutex::new(false));
        let heartbeat = Heartbeat::builder()
            .enrolment(worker.enrolment()?)
            .status_source(source(Arc::clone(&deployed)))
            .interval(length.div_f64(15.0))
            .start()?;
        Ok(Self {
            start,
            beats: heartbeat.beats(),
            last_stats: heartbeat.stats(),
            heartbeat,
            master,
            worker,
            deployed,
            pushed_at: start,
            outage_start: start,
            outage: Duration::ZERO,
            _folder: folder,
        })
    }

    fn print(&self, mark: &str, event: &str) -> Result<(), Error> {
        print_event(self.start, mark, event)
    }

    /// Prints beats until then.
    fn watch_until(&mut self, until: Instant) -> Result<(), Error> {
        let over = at(until);
        loop {
            select! {
                recv(self.beats) -> _ => self.print_beat()?,
                recv(over) -> _ => return Ok(()),
            }
        }
    }

    fn print_beat(&mut self) -> Result<(), Error> {
        let now = self.heartbeat.stats();
        let delivered = now.delivered - self.last_stats.delivered;
        match (&now.failure, &self.last_stats.failure) {
            (Some(Failure { class, count, .. }), _) => {
                let queued = deltas(now.waiting);
                self.print(
                    "✗",
                    &format!("beat failed: {class}, {count} in a row; {queued} queued"),
                )?;
            }
            (None, _) if now.beats == self.last_stats.beats => (),
            (None, Some(_)) => self.print(
                "♥",
                &format!("beat {} accepted: the master is reachable again", now.beats),
            )?,
            (None, None) => {
                self.print("♥", &format!("beat {} accepted in {}", now.beats, duration_of(&now)))?
            }
        }
        if delivered > 0 {
            let row = self.master.rows().pop().map_or_else(String::new, |row| describe(&row));
            let latency = self.pushed_at.elapsed().as_secs_f64();
            self.print(
                "✓",
                &format!("{} delivered {latency:.3} s after the push", deltas(delivered)),
            )?;
            self.print(" ", &format!("the master's row: {row}"))?;
        }
        self.last_stats = now;
        Ok(())
    }

    fn order_deploy(&mut self) -> Result<(), Error> {
        self.master.open_operation(&self.worker.uuid, "decky-01", Operation::Deploy.as_str());
        self.print("→", "the master orders a deploy of decky-01; its row is now: running")
    }

    fn deploy_succeeds(&mut self) -> Result<(), Error> {
        *self.deployed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.push(
            LifecycleDelta::succeeded("decky-01", Operation::Deploy),
            "deploy decky-01 succeeded",
        )
    }

    fn stop_master(&mut self) -> Result<(), Error> {
        self.master.stop();
        self.outage_start = Instant::now();
        self.master.open_operation(&self.worker.uuid, "decky-01", Operation::Mutate.as_str());
        self.print("⚡", "the master stops: connections are closed, new ones are refused")
    }

    fn mutate_fails(&mut self) -> Result<(), Error> {
        let delta = LifecycleDelta::failed("decky-01", Operation::Mutate, "compose exited with 1");
        self.push(delta, "mutate decky-01 failed")
    }

    fn restart_master(&mut self) -> Result<(), Error> {
        self.outage = self.outage_start.elapsed();
        self.master.start_again()?;
        self.print("⚡", "the master is running again")
    }

    fn announce_stop(&mut self) -> Result<(), Error> {
        self.print("■", "the heartbeat stops")
    }

    fn push(&mut self, delta: LifecycleDelta, description: &str) -> Result<(), Error> {
        self.pushed_at = Instant::now();
        self.heartbeat.deltas().push(delta)?;
        let took = self.pushed_at.elapsed().as_secs_f64() * 1e3;
        self.print("+", &format!("push: {description}; on disk after {took:.1} ms"))
    }

    fn finish(self) -> Result<(), Error> {
        let stats = self.heartbeat.stats();
        let stopping = Instant::now();
        let stopped = self.heartbeat.stop(Duration::from_secs(2));
        let took = stopping.elapsed().as_secs_f64() * 1e3;
        let open = self.master.rows().iter().filter(|row| row.status == RowStatus::Running).count();
        print_result(&format!(
            "\n{} beats accepted, {} delivered, {} undelivered.\n\
             The master was down for {:.1} s. The heartbeat stopped in {took:.1} ms.\n",
            stats.beats,
            deltas(stats.delivered),
            stopped.undelivered,
            self.outage.as_secs_f64()
        ))?;
        if open > 0 || stopped.undelivered > 0 {
            return Err(Error::loopback(format!(
                "{open} of its rows are still open; this should not happen"
            )));
        }
        print_result(NEXT_STEPS)
    }
}

/// A status source: reports no decky at first, then one decky with one service.
fn source(deployed: Arc<Mutex<bool>>) -> impl FnMut() -> Snapshot + Send {
    move || {
        if !*deployed.lock().unwrap_or_else(PoisonError::into_inner) {
            return Snapshot::new(&json!({"deployed": false, "deckies": []}));
        }
        let decky = json!({
            "name": "decky-01", "ip": "192.0.2.7", "services": ["ssh"], "distro": "debian",
            "base_image": "debian:bookworm", "hostname": "fileserver"
        });
        let runtime = json!({"decky-01": {"running": true, "services": {"ssh": "running"}}});
        Snapshot::new(&json!({
            "deployed": true, "mode": "swarm", "deckies": [decky], "runtime": runtime,
            "compose_path": "/opt/decnet/decnet-compose.yml"
        }))
    }
}

/// Prints a line of at most 80 columns.
fn print_event(start: Instant, mark: &str, event: &str) -> Result<(), Error> {
    print_result(&format!("{:6.2} s  {mark}  {event}\n", start.elapsed().as_secs_f64()))
}

fn duration_of(stats: &Stats) -> String {
    let ms = stats.round_trip.unwrap_or_default().as_secs_f64() * 1e3;
    format!("{ms:.1} ms")
}

fn deltas(count: u64) -> String {
    if count == 1 { "1 delta".to_owned() } else { format!("{count} deltas") }
}

fn describe(row: &LifecycleRow) -> String {
    let error = row.error.as_ref().map_or_else(String::new, |error| format!(" ({error})"));
    format!("{} {} {:?}{error}", row.operation, row.decky, row.status).to_lowercase()
}
