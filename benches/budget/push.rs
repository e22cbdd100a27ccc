//! The time from a push to its request at the master.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use decnet_heartbeat::DecnetStatus;

use crate::TIMEOUT;
use crate::disk::{RawTable, delta, wal_has_grown};
use crate::floor::{After, BareBeat, BareClient};
use crate::post::{BareFixture, PAUSE};
use crate::table::{Amount, Figures, Goal, Line, percentile};

const PUSHES: usize = 3_000;
const HUNG: usize = 20;

/// Alternates between a push and its floors, each after a pause. The floor of the delivery is
/// [`BareDelivery`]. The floor of `push()` is a commit on the calling thread.
pub fn measure() -> Result<Figures, String> {
    let fixture = BareFixture::new(After::KeepOpen)?;
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.start().unwrap();
    let beats = heartbeat.beats();
    let deltas = heartbeat.deltas();
    fixture.master.arrival();
    let outbox = heartbeat.stats().outbox.expect("an outbox on the disk");
    let mut request = Vec::new();
    while !wal_has_grown(&outbox) {
        while beats.try_recv().is_ok() {}
        deltas.push(delta()).unwrap();
        request = fixture.master.arrival().request;
        beats.recv_timeout(TIMEOUT).unwrap();
    }
    let raw = RawTable::new(&fixture.folder.path().join("raw.db"));
    let bare = BareDelivery::start(&fixture);
    let mut took = Took::default();
    for _ in 0..PUSHES {
        thread::sleep(PAUSE);
        while beats.try_recv().is_ok() {}
        let delta = delta();
        let since = Instant::now();
        deltas.push(delta).unwrap();
        took.push.push(since.elapsed());
        took.to_master.push(fixture.master.arrival().at - since);
        beats.recv_timeout(TIMEOUT).unwrap();
        thread::sleep(PAUSE);
        took.commit.push(raw.commit());
        raw.delete_newest();
        thread::sleep(PAUSE);
        took.bare_to_master.push(bare.deliver(&request));
    }
    assert_eq!(heartbeat.stats().failure.map(|failure| failure.class), None);
    let line = |what: &str, percent, (floor, measured): (&[Duration], &[Duration]), most| Line {
        what: format!("{what}, p{percent}"),
        floor: Some(Amount::Time(percentile(floor, percent))),
        measured: Amount::Time(percentile(measured, percent)),
        goal: Goal::AtMostTimes(most),
    };
    let to_master: (&[_], &[_]) = (&took.bare_to_master, &took.to_master);
    Ok(vec![
        line("from push() to its request at the master, connection warm", 50, to_master, 1.15),
        line("from push() to its request at the master, connection warm", 99, to_master, 1.3),
        line(
            "push() of one thread with pauses; floor: a commit of SQLite",
            50,
            (&took.commit, &took.push),
            1.15,
        ),
    ]
    .into())
}

#[derive(Default)]
struct Took {
    push: Vec<Duration>,
    commit: Vec<Duration>,
    to_master: Vec<Duration>,
    bare_to_master: Vec<Duration>,
}

/// The least that stores a delta and delivers it, if neither the disk nor the network may block the
/// other: one thread commits the row, and another one sends the same request on a warm connection.
/// The row is deleted after the answer, so checkpoints are about as frequent. Unlike a heartbeat,
/// this makes no snapshot.
struct BareDelivery<'a> {
    fixture: &'a BareFixture,
    requests: Sender<Vec<u8>>,
    done: Receiver<()>,
}

impl<'a> BareDelivery<'a> {
    fn start(fixture: &'a BareFixture) -> Self {
        let client = BareClient::new(fixture.master.address, &fixture.agent_dir());
        let table = fixture.folder.path().join("delivery.db");
        let beat = BareBeat::start(client, After::KeepOpen);
        let (requests, received) = unbounded::<Vec<u8>>();
        let (finish, done) = unbounded();
        thread::spawn(move || {
            let raw = RawTable::new(&table);
            for request in received {
                raw.commit();
                beat.exchange(&request);
                raw.delete_newest();
                let _ = finish.send(());
            }
        });
        Self { fixture, requests, done }
    }

    /// Delivers a delta. Returns the time until its request is at the master.
    fn deliver(&self, request: &[u8]) -> Duration {
        let request = request.to_vec();
        let since = Instant::now();
        self.requests.send(request).unwrap();
        let took = self.fixture.master.arrival().at - since;
        self.done.recv_timeout(TIMEOUT).unwrap();
        took
    }
}

/// Measures pushes while Docker does not answer.
pub fn measure_with_hung_docker() -> Result<Figures, String> {
    let fixture = BareFixture::new(After::KeepOpen)?;
    let agent_dir = fixture.agent_dir();
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("docker.sock");
    let release = start_hung_docker(&socket);
    let source = DecnetStatus::new(&agent_dir)
        .state_file(fixture.folder.path().join("none"))
        .docker_socket(socket);
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    // The first beat is sent without a snapshot, the next one with it.
    fixture.master.arrival();
    release.send(()).unwrap();
    fixture.master.arrival();
    let mut took = Vec::new();
    for _ in 0..HUNG {
        let since = Instant::now();
        heartbeat.deltas().push(delta()).unwrap();
        took.push(fixture.master.arrival().at - since);
        release.send(()).unwrap();
        fixture.master.arrival();
    }
    Ok(vec![Line {
        what: "from push() to its request at the master while Docker does not answer, at most"
            .to_owned(),
        floor: None,
        measured: Amount::Time(percentile(&took, 100)),
        goal: Goal::AtMost(Amount::Time(Duration::from_millis(300))),
    }]
    .into())
}

/// Starts a Docker that does not answer. It closes one connection for each message of the sender.
fn start_hung_docker(socket: &Path) -> Sender<()> {
    let listener = UnixListener::bind(socket).unwrap();
    let (release, released) = unbounded();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 1024]);
            if released.recv().is_err() {
                return;
            }
        }
    });
    release
}
