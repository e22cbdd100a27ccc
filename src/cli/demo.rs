//! `demo`: the whole thing against a loopback master, printed as it happens. Nothing is played: every line is what the
//! heartbeat or the master says of itself. Runs on the program's main thread.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, select};
use serde_json::json;

use super::output::answer;
use crate::delta::{LifecycleDelta, Operation};
use crate::error::Error;
use crate::heartbeat::Heartbeat;
use crate::loopback::{Enrolled, LifecycleRow, LoopbackMaster, RowStatus, Scratch};
use crate::stats::{Failure, Stats};
use crate::status::Snapshot;

/// Something that happens, at some part of the time.
struct Scene {
    at: f64,
    happens: fn(&mut Demo) -> Result<(), Error>,
}

const SCRIPT: [Scene; 6] = [
    Scene { at: 0.15, happens: Demo::the_master_orders_a_deploy },
    Scene { at: 0.25, happens: Demo::the_deploy_succeeds },
    Scene { at: 0.40, happens: Demo::the_master_goes_away },
    Scene { at: 0.50, happens: Demo::a_mutate_fails_meanwhile },
    Scene { at: 0.70, happens: Demo::the_master_comes_back },
    Scene { at: 1.00, happens: Demo::the_end },
];

/// Where everything is in order by the end, it says so in a line; otherwise that is the error.
pub(super) fn demo(length: Duration) -> Result<(), Error> {
    let start = Instant::now();
    let mut demo = Demo::new(start, length)?;
    for scene in SCRIPT {
        demo.watch_until(start + length.mul_f64(scene.at))?;
        (scene.happens)(&mut demo)?;
    }
    demo.summary()
}

struct Demo {
    start: Instant,
    // Before the folder and the master that it uses.
    heartbeat: Heartbeat,
    beats: Receiver<()>,
    master: LoopbackMaster,
    worker: Enrolled,
    deployed: Arc<Mutex<bool>>,
    seen: Stats,
    pushed: Instant,
    outage: (Instant, Duration),
    _folder: Scratch,
}

impl Demo {
    fn new(start: Instant, length: Duration) -> Result<Self, Error> {
        let folder = Scratch::new()?;
        let master = LoopbackMaster::start()?;
        let worker = master.enrol(&folder.path().join("agent"))?;
        say(
            start,
            "⌂",
            &format!("a DECNET master with a CA of its own listens on {}", master.address()),
        )?;
        say(
            start,
            "✎",
            &format!("this host is enrolled as {}, pinned to its certificate", worker.uuid),
        )?;
        let deployed = Arc::new(Mutex::new(false));
        let heartbeat = Heartbeat::builder()
            .enrolment(worker.enrolment()?)
            .status_source(source(Arc::clone(&deployed)))
            .interval(length.div_f64(15.0))
            .start()?;
        let (beats, seen) = (heartbeat.beats(), heartbeat.stats());
        let (pushed, outage) = (start, (start, Duration::ZERO));
        Ok(Self {
            start,
            heartbeat,
            beats,
            master,
            worker,
            deployed,
            seen,
            pushed,
            outage,
            _folder: folder,
        })
    }

    fn say(&self, mark: &str, what: &str) -> Result<(), Error> {
        say(self.start, mark, what)
    }

    /// Prints the beats as they end.
    fn watch_until(&mut self, until: Instant) -> Result<(), Error> {
        let over = at(until);
        loop {
            select! {
                recv(self.beats) -> _ => self.beaten()?,
                recv(over) -> _ => return Ok(()),
            }
        }
    }

    fn beaten(&mut self) -> Result<(), Error> {
        let now = self.heartbeat.stats();
        let delivered = now.delivered - self.seen.delivered;
        match (&now.failure, &self.seen.failure) {
            (Some(Failure { class, count, .. }), _) => {
                self.say(
                    "✗",
                    &format!(
                        "beat failed ({class}), {count} in a row; {} on disk",
                        deltas(now.waiting)
                    ),
                )?;
            }
            (None, _) if now.beats == self.seen.beats => (),
            (None, Some(_)) => {
                self.say("♥", &format!("beat {} accepted: the master is heard again", now.beats))?
            }
            (None, None) => {
                self.say("♥", &format!("beat {} accepted in {}", now.beats, took(&now)))?
            }
        }
        if delivered > 0 {
            let row = self.master.rows().pop().map_or_else(String::new, |row| describe(&row));
            let waited = self.pushed.elapsed().as_secs_f64();
            self.say(
                "✓",
                &format!(
                    "{} delivered {waited:.3} s after the push; the master's row: {row}",
                    deltas(delivered)
                ),
            )?;
        }
        self.seen = now;
        Ok(())
    }

    fn the_master_orders_a_deploy(&mut self) -> Result<(), Error> {
        self.master.open_operation(&self.worker.uuid, "decky-01", Operation::Deploy.as_str());
        self.say(
            "→",
            "the master orders: deploy decky-01. Its row says running until this host reports",
        )
    }

    fn the_deploy_succeeds(&mut self) -> Result<(), Error> {
        *self.deployed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.push(
            LifecycleDelta::succeeded("decky-01", Operation::Deploy),
            "deploy of decky-01 succeeded",
        )
    }

    fn the_master_goes_away(&mut self) -> Result<(), Error> {
        self.master.stop();
        self.outage.0 = Instant::now();
        self.master.open_operation(&self.worker.uuid, "decky-01", Operation::Mutate.as_str());
        self.say("⚡", "the master is gone: connections cut, new ones refused")
    }

    fn a_mutate_fails_meanwhile(&mut self) -> Result<(), Error> {
        let delta = LifecycleDelta::failed("decky-01", Operation::Mutate, "compose exited with 1");
        self.push(delta, "mutate of decky-01 failed")
    }

    fn the_master_comes_back(&mut self) -> Result<(), Error> {
        self.outage.1 = self.outage.0.elapsed();
        self.master.start_again()?;
        self.say("⚡", "the master is back")
    }

    fn the_end(&mut self) -> Result<(), Error> {
        self.say("■", "stop")
    }

    fn push(&mut self, delta: LifecycleDelta, what: &str) -> Result<(), Error> {
        self.pushed = Instant::now();
        self.heartbeat.deltas().push(delta)?;
        let took = self.pushed.elapsed().as_secs_f64() * 1e3;
        self.say("+", &format!("push: {what}. On disk after {took:.1} ms, and the caller goes on"))
    }

    fn summary(self) -> Result<(), Error> {
        let stats = self.heartbeat.stats();
        let stopping = Instant::now();
        let stopped = self.heartbeat.stop(Duration::from_secs(2));
        let took = stopping.elapsed().as_secs_f64() * 1e3;
        let open = self.master.rows().iter().filter(|row| row.status == RowStatus::Running).count();
        answer(&format!(
            "\n{} beats accepted, {} delivered, {} lost, an outage of {:.1} s survived, stopped in {took:.1} ms.\n",
            stats.beats,
            deltas(stats.delivered),
            stopped.undelivered,
            self.outage.1.as_secs_f64()
        ))?;
        if open > 0 || stopped.undelivered > 0 {
            return Err(Error::loopback(format!(
                "{open} of its rows are still open; this should not happen"
            )));
        }
        Ok(())
    }
}

/// A closure is a status source: nothing at first, then one decky with one service.
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
        Snapshot::new(
            &json!({"deployed": true, "mode": "swarm", "compose_path": "/opt/decnet/decnet-compose.yml",
            "deckies": [decky], "runtime": runtime}),
        )
    }
}

fn say(start: Instant, mark: &str, what: &str) -> Result<(), Error> {
    answer(&format!("{:6.2} s  {mark}  {what}\n", start.elapsed().as_secs_f64()))
}

fn took(stats: &Stats) -> String {
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
