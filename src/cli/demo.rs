//! `demo`: a heartbeat and a loopback master, printed as they work. Every line is an event of the
//! heartbeat or of the master; none is simulated. Runs on the main thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
use crate::text::counted;

const DECKY: &str = "decky-01";

/// What to do after the demo.
const NEXT_STEPS: &str = "
Next steps on an enrolled worker:
  decnet-heartbeat check         check everything that run needs
  decnet-heartbeat run           send beats until SIGTERM or SIGINT
  decnet-heartbeat track --help  run a command and report how it ended
";

/// Plays the demo and prints a summary. Fails if a delta was not delivered.
pub(super) fn demo(length: Duration) -> Result<(), Error> {
    let mut demo = Demo::new(length)?;
    let address = demo.master.address();
    demo.print("⌂", &format!("a DECNET master with its own CA listens on {address}"))?;
    demo.print("✎", &format!("this host is enrolled: {}", demo.worker.uuid))?;
    demo.watch_until(0.15)?;
    demo.open_row(Operation::Deploy);
    demo.print("→", "the master orders a deploy of decky-01; its row is now: running")?;
    demo.watch_until(0.25)?;
    demo.is_deployed.store(true, Ordering::Relaxed);
    let succeeded = LifecycleDelta::succeeded(DECKY, Operation::Deploy);
    demo.push(succeeded, "deploy decky-01 succeeded")?;
    demo.watch_until(0.40)?;
    demo.master.stop();
    let outage_start = Instant::now();
    demo.open_row(Operation::Mutate);
    demo.print("⚡", "the master stops: connections are closed, new ones are refused")?;
    demo.watch_until(0.50)?;
    let failed = LifecycleDelta::failed(DECKY, Operation::Mutate, "compose exited with 1");
    demo.push(failed, "mutate decky-01 failed")?;
    demo.watch_until(0.70)?;
    let outage = outage_start.elapsed();
    demo.master.start_again()?;
    demo.print("⚡", "the master is running again")?;
    demo.watch_until(1.0)?;
    demo.print("■", "the heartbeat stops")?;
    demo.finish(outage)
}

struct Demo {
    start: Instant,
    length: Duration,
    // Dropped before the master and the folder that it uses.
    heartbeat: Heartbeat,
    beats: Receiver<()>,
    master: LoopbackMaster,
    worker: Enrolled,
    is_deployed: Arc<AtomicBool>,
    /// The stats as of the last line.
    last_stats: Stats,
    pushed_at: Instant,
    _folder: Scratch,
}

impl Demo {
    fn new(length: Duration) -> Result<Self, Error> {
        let start = Instant::now();
        let folder = Scratch::new()?;
        let master = LoopbackMaster::start()?;
        let worker = master.enrol(&folder.path().join("agent"))?;
        let is_deployed = Arc::new(AtomicBool::new(false));
        let heartbeat = Heartbeat::builder()
            .enrolment(worker.enrolment()?)
            .status_source(source(Arc::clone(&is_deployed)))
            .interval(length.div_f64(15.0))
            .start()?;
        Ok(Self {
            start,
            length,
            beats: heartbeat.beats(),
            last_stats: heartbeat.stats(),
            heartbeat,
            master,
            worker,
            is_deployed,
            pushed_at: start,
            _folder: folder,
        })
    }

    /// Prints a line of at most 80 columns.
    fn print(&self, mark: &str, event: &str) -> Result<(), Error> {
        let seconds = self.start.elapsed().as_secs_f64();
        print_result(&format!("{seconds:6.2} s  {mark}  {event}\n"))
    }

    /// Prints beats until this part of the demo's length is over.
    fn watch_until(&mut self, part: f64) -> Result<(), Error> {
        let over = at(self.start + self.length.mul_f64(part));
        loop {
            select! {
                recv(self.beats) -> _ => self.print_beat()?,
                recv(over) -> _ => return Ok(()),
            }
        }
    }

    fn print_beat(&mut self) -> Result<(), Error> {
        let now = self.heartbeat.stats();
        match (&now.failure, &self.last_stats.failure) {
            (Some(Failure { class, count, .. }), _) => {
                let queued = counted(now.waiting, "delta", "deltas");
                let event = format!("beat failed: {class}, {count} in a row; {queued} queued");
                self.print("✗", &event)?;
            }
            (None, _) if now.beats == self.last_stats.beats => (),
            (None, Some(_)) => {
                let event = format!("beat {} accepted: the master is reachable again", now.beats);
                self.print("♥", &event)?;
            }
            (None, None) => {
                let took = ms(now.round_trip.unwrap_or_default());
                self.print("♥", &format!("beat {} accepted in {took}", now.beats))?;
            }
        }
        let delivered = now.delivered - self.last_stats.delivered;
        if delivered > 0 {
            let row = self.master.rows().pop().map_or_else(String::new, |row| describe(&row));
            let count = counted(delivered, "delta", "deltas");
            let latency = self.pushed_at.elapsed().as_secs_f64();
            self.print("✓", &format!("{count} delivered {latency:.3} s after the push"))?;
            self.print(" ", &format!("the master's row: {row}"))?;
        }
        self.last_stats = now;
        Ok(())
    }

    /// Opens a row at the master, as it does for an operation that it orders.
    fn open_row(&self, operation: Operation) {
        self.master.open_operation(&self.worker.uuid, DECKY, operation.as_str());
    }

    fn push(&mut self, delta: LifecycleDelta, description: &str) -> Result<(), Error> {
        self.pushed_at = Instant::now();
        self.heartbeat.deltas().push(delta)?;
        let took = ms(self.pushed_at.elapsed());
        self.print("+", &format!("push: {description}; on disk after {took}"))
    }

    fn finish(self, outage: Duration) -> Result<(), Error> {
        let stats = self.heartbeat.stats();
        let stopping = Instant::now();
        let undelivered = self.heartbeat.stop(Duration::from_secs(2)).undelivered;
        let took = ms(stopping.elapsed());
        let open = self.master.rows().iter().filter(|row| row.status == RowStatus::Running).count();
        print_result(&format!(
            "\n{} beats accepted, {} delivered, {undelivered} undelivered.\n\
             The master was down for {:.1} s. The heartbeat stopped in {took}.\n",
            stats.beats,
            counted(stats.delivered, "delta", "deltas"),
            outage.as_secs_f64()
        ))?;
        if open > 0 || undelivered > 0 {
            let problem = format!("{open} operations are open, {undelivered} deltas undelivered");
            return Err(Error::loopback(problem));
        }
        print_result(NEXT_STEPS)
    }
}

/// A status source: reports no decky at first, then one decky with one service.
fn source(is_deployed: Arc<AtomicBool>) -> impl FnMut() -> Snapshot + Send {
    move || {
        if !is_deployed.load(Ordering::Relaxed) {
            return Snapshot::new(&json!({"deployed": false, "deckies": []}));
        }
        let decky = json!({
            "name": DECKY, "ip": "192.0.2.7", "services": ["ssh"], "distro": "debian",
            "base_image": "debian:bookworm", "hostname": "fileserver"
        });
        let runtime = json!({DECKY: {"running": true, "services": {"ssh": "running"}}});
        Snapshot::new(&json!({
            "deployed": true, "mode": "swarm", "deckies": [decky], "runtime": runtime,
            "compose_path": "/opt/decnet/decnet-compose.yml"
        }))
    }
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn describe(row: &LifecycleRow) -> String {
    let error = row.error.as_ref().map_or_else(String::new, |error| format!(" ({error})"));
    format!("{} {} {:?}{error}", row.operation, row.decky, row.status).to_lowercase()
}
