//! A whole beat on a host with real containers: what it costs, and what the Python module takes for the same.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use decnet_heartbeat::{DecnetStatus, Heartbeat};
use tempfile::TempDir;

use crate::body::{SERVICES, container, state};
use crate::floor::{ACCEPTED, After, BareMaster};
use crate::peers::{Peer, Setup, Took};
use crate::relay::Relay;
use crate::support::{self, Docker, RealMaster};
use crate::table::{Amount, Figures, Goal, Line, Pair, percentile};

/// The master closes a connection that is idle for 5 s, as it is between any two beats.
const IDLE: Duration = Duration::from_millis(5_500);

/// Beats, and pushes, of each in turn; the first of each is left out.
const ROUNDS: usize = 9;

/// Deckies on the host, but for the time before the first is deployed.
const DECKIES: usize = 40;

/// What is measured, and by how many services each decky has: with none of them nothing is deployed.
pub fn measure() -> Result<Figures, String> {
    let mut stage = Stage::start()?;
    let mut figures = Figures::default();
    for services in [0, 1, 3, 5] {
        stage.deploy(services);
        match services {
            0 => figures.lines.push(stage.bytes_of_a_beat()),
            3 => figures.lines.push(stage.cpu_of_a_beat()),
            _ => (),
        }
        if services != 3 {
            figures.pairs.extend(stage.compare());
        }
    }
    Ok(figures)
}

/// A real master, a real Docker Engine, and a host on which containers come up.
struct Stage {
    master: RealMaster,
    docker: Docker,
    folder: TempDir,
    containers: usize,
}

impl Stage {
    fn start() -> Result<Self, String> {
        if let Some(missing) = Docker::missing() {
            return Err(missing.to_owned());
        }
        if !support::python_path().exists() {
            return Err("the real master: tests/e2e/setup.sh".to_owned());
        }
        let (master, docker, folder) =
            (RealMaster::start(), Docker::start(), tempfile::tempdir().unwrap());
        Ok(Self { master, docker, folder, containers: 0 })
    }

    /// So many of the services run on each decky, one after another.
    fn deploy(&mut self, services: usize) {
        while self.containers < DECKIES * services {
            let (decky, service) =
                (self.containers % DECKIES + 1, SERVICES[self.containers / DECKIES]);
            self.docker.run(&container(decky, service));
            self.containers += 1;
        }
        if services > 0 {
            std::fs::write(self.state_file(), state(DECKIES, &SERVICES[..services]).to_string())
                .unwrap();
        }
    }

    fn state_file(&self) -> PathBuf {
        self.folder.path().join("decnet-state.json")
    }

    /// A host of its own at the master.
    fn setup(&self, name: &str) -> Setup {
        let name = format!("{name}-{}", self.containers);
        Setup::new(
            &self.master,
            &name,
            &self.folder.path().join(&name),
            &self.state_file(),
            &self.docker.socket(),
        )
    }

    /// Each beat resumes a session of the real master's, whose tickets have our certificate in them.
    fn bytes_of_a_beat(&self) -> Line {
        let relay = Relay::start(self.master.port());
        let mut peer = Peer::ours(&Setup { port: relay.port, ..self.setup("relayed") });
        told(&mut peer, "beat");
        let before = relay.passed();
        told(&mut peer, "beat");
        Line {
            what:
                "bytes on the wire beyond the JSON, both ways, session resumed with the real master"
                    .to_owned(),
            floor: None,
            measured: Amount::Bytes(
                (relay.passed() - before) as f64 - self.json_of_a_beat() as f64,
            ),
            goal: Goal::AtMost(Amount::Bytes(1_000.0)),
        }
    }

    /// Bytes of the body, from a master that can be asked.
    fn json_of_a_beat(&self) -> usize {
        let (master, agent_dir) =
            (BareMaster::start(ACCEPTED, After::KeepOpen), self.folder.path().join("bare"));
        let source = DecnetStatus::new(&agent_dir)
            .state_file(self.state_file())
            .docker_socket(self.docker.socket());
        let (tick, ticks) = unbounded();
        let builder = Heartbeat::builder()
            .enrolment(master.enrol(&agent_dir))
            .status_source(source)
            .ticks(ticks);
        let _heartbeat = builder.start().unwrap();
        master.arrival();
        tick.send(Instant::now()).unwrap();
        master.arrival().json()
    }

    fn cpu_of_a_beat(&self) -> Line {
        let mut peer = Peer::ours(&self.setup("ours"));
        let beats: Vec<Took> = (0..ROUNDS).map(|_| told(&mut peer, "beat")).skip(1).collect();
        Line {
            what: format!(
                "a whole beat with {DECKIES} deckies and {} real containers, CPU, p50",
                self.containers
            ),
            floor: None,
            measured: median(&beats, |took| took.cpu),
            goal: Goal::AtMost(Amount::Time(Duration::from_millis(3))),
        }
    }

    /// Both do the same in turn.
    fn compare(&self) -> Vec<Pair> {
        let mut peers = [Peer::python(&self.setup("python")), Peer::ours(&self.setup("ours"))];
        let mut turns = |what: &str| -> [Vec<Took>; 2] {
            let mut took = [Vec::new(), Vec::new()];
            for round in 0..ROUNDS {
                thread::sleep(IDLE);
                for (peer, took) in peers.iter_mut().zip(&mut took) {
                    let this = peer.tell(what);
                    if round > 0 {
                        took.push(this);
                    }
                }
            }
            took
        };
        let (beats, pushes) = (turns("beat"), turns("push"));
        let pair = |what: &str, of: &dyn Fn(&[Took]) -> Amount, took: &[Vec<Took>; 2]| Pair {
            what: format!("{what}, {} containers", self.containers),
            python: of(&took[0]),
            ours: of(&took[1]),
        };
        vec![
            pair(
                "a beat, from the tick to its 204, p50",
                &|took| median(took, |took| took.wall),
                &beats,
            ),
            pair("CPU of a beat, p50", &|took| median(took, |took| took.cpu), &beats),
            pair("from a push to its 204, p50", &|took| median(took, |took| took.wall), &pushes),
            pair("CPU of a push, p50", &|took| median(took, |took| took.cpu), &pushes),
            pair("resident memory after it all", &resident, &pushes),
        ]
    }
}

fn told(peer: &mut Peer, what: &str) -> Took {
    thread::sleep(IDLE);
    peer.tell(what)
}

fn median(took: &[Took], what: impl Fn(&Took) -> f64) -> Amount {
    let times: Vec<Duration> =
        took.iter().map(|took| Duration::from_secs_f64(what(took))).collect();
    Amount::Time(percentile(&times, 50))
}

fn resident(took: &[Took]) -> Amount {
    Amount::Megabytes(took.last().unwrap().resident_kb / 1024.0)
}
