//! A whole beat on a host with real containers, compared with the Python module.

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

/// The master closes a connection that is idle for 5 s, so each beat opens a new one.
const IDLE: Duration = Duration::from_millis(5_500);

/// The number of beats and of pushes of each peer, alternating. The first ones do not count.
const ROUNDS: usize = 9;

/// The number of deckies on the host.
const DECKIES: usize = 40;

/// Measures with each number of services per decky. Without services nothing is deployed.
pub fn measure() -> Result<Figures, String> {
    let mut fixture = DockerFixture::start()?;
    let mut figures = Figures::default();
    for services in [0, 1, 3, 5] {
        fixture.deploy(services);
        match services {
            0 => figures.lines.push(fixture.bytes_of_a_beat()),
            3 => figures.lines.push(fixture.cpu_of_a_beat()),
            _ => (),
        }
        if services != 3 {
            figures.pairs.extend(fixture.compare());
        }
    }
    Ok(figures)
}

/// A real master, a real Docker Engine, and a host on which containers are started.
struct DockerFixture {
    master: RealMaster,
    docker: Docker,
    folder: TempDir,
    containers: usize,
}

impl DockerFixture {
    fn start() -> Result<Self, String> {
        if let Some(missing) = Docker::missing() {
            return Err(missing.to_owned());
        }
        if !support::python_path().exists() {
            return Err("the real master: tests/e2e/setup.sh".to_owned());
        }
        Ok(Self {
            master: RealMaster::start(),
            docker: Docker::start(),
            folder: tempfile::tempdir().unwrap(),
            containers: 0,
        })
    }

    /// Starts containers until each decky has this number of services.
    fn deploy(&mut self, services: usize) {
        while self.containers < DECKIES * services {
            let decky = self.containers % DECKIES + 1;
            let service = SERVICES[self.containers / DECKIES];
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

    /// Enrols a new host with this name.
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

    /// The beat resumes a session of the real master, whose tickets contain the client certificate.
    fn bytes_of_a_beat(&self) -> Line {
        let relay = Relay::start(self.master.port());
        let mut peer = Peer::ours(&Setup { port: relay.port, ..self.setup("relayed") });
        command_after_pause(&mut peer, "beat");
        let before = relay.passed();
        command_after_pause(&mut peer, "beat");
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

    /// The bytes of a body, measured at the bare master.
    fn json_of_a_beat(&self) -> usize {
        let master = BareMaster::start(ACCEPTED, After::KeepOpen);
        let agent_dir = self.folder.path().join("bare");
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
        let beats = (0..ROUNDS).map(|_| command_after_pause(&mut peer, "beat")).skip(1);
        let beats: Vec<Took> = beats.collect();
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

    /// Both peers do the same, alternating.
    fn compare(&self) -> Vec<Pair> {
        let mut peers = [Peer::python(&self.setup("python")), Peer::ours(&self.setup("ours"))];
        let mut turns = |what: &str| -> [Vec<Took>; 2] {
            let mut took = [Vec::new(), Vec::new()];
            for round in 0..ROUNDS {
                thread::sleep(IDLE);
                for (peer, took) in peers.iter_mut().zip(&mut took) {
                    let this = peer.command(what);
                    if round > 0 {
                        took.push(this);
                    }
                }
            }
            took
        };
        let beats = turns("beat");
        let pushes = turns("push");
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
            pair("resident memory at the end", &resident, &pushes),
        ]
    }
}

/// Waits until the connection is closed, and lets the peer do this.
fn command_after_pause(peer: &mut Peer, what: &str) -> Took {
    thread::sleep(IDLE);
    peer.command(what)
}

fn median(took: &[Took], what: impl Fn(&Took) -> f64) -> Amount {
    let times: Vec<Duration> =
        took.iter().map(|took| Duration::from_secs_f64(what(took))).collect();
    Amount::Time(percentile(&times, 50))
}

fn resident(took: &[Took]) -> Amount {
    Amount::Megabytes(took.last().unwrap().resident_kb / 1024.0)
}
