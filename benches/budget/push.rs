//! From a push to the master having it.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use decnet_heartbeat::DecnetStatus;

use crate::PATIENCE;
use crate::disk::{RawTable, delta, wal_has_grown};
use crate::floor::{After, BareBeat, BareClient};
use crate::post::{PAUSE, Stage};
use crate::table::{Amount, Figures, Goal, Line, percentile};

const PUSHES: usize = 3_000;
const HUNG: usize = 20;

/// A push after a pause, beside what it cannot do without, in turn. To the master that is [`BareDelivery`]; `push()` alone is
/// beside a commit on the thread that wants it, which has nobody to wait for.
pub fn measure() -> Result<Figures, String> {
    let stage = Stage::new(After::KeepOpen)?;
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    let (beats, deltas) = (heartbeat.beats(), heartbeat.deltas());
    stage.master.arrival();
    let outbox = heartbeat.stats().outbox.expect("an outbox on the disk");
    let mut request = Vec::new();
    while !wal_has_grown(&outbox) {
        while beats.try_recv().is_ok() {}
        deltas.push(delta()).unwrap();
        request = stage.master.arrival().request;
        beats.recv_timeout(PATIENCE).unwrap();
    }
    let raw = RawTable::new(&stage.folder.path().join("raw.db"));
    let bare = BareDelivery::start(&stage);
    let mut took = Took::default();
    for _ in 0..PUSHES {
        thread::sleep(PAUSE);
        while beats.try_recv().is_ok() {}
        let (delta, since) = (delta(), Instant::now());
        deltas.push(delta).unwrap();
        took.push.push(since.elapsed());
        took.to_master.push(stage.master.arrival().at - since);
        beats.recv_timeout(PATIENCE).unwrap();
        thread::sleep(PAUSE);
        took.commit.push(raw.commit());
        raw.forget();
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
        line("push to the master having it, connection warm", 50, to_master, 1.15),
        line("push to the master having it, connection warm", 99, to_master, 1.3),
        line(
            "push() of one thread with pauses; floor: SQLite's commit",
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

/// The least that keeps a delta and delivers it where the disk may hang and the network may hang: a thread for each. The one
/// that pushes hands over to the first, which commits the row and hands the same request as ours over to the second, which has
/// a warm connection. Ours has a snapshot made for each beat, too, and this has not. The row is removed when the master has
/// answered, so this checkpoints about as often.
struct BareDelivery<'a> {
    stage: &'a Stage,
    ask: Sender<Vec<u8>>,
    done: Receiver<()>,
}

impl<'a> BareDelivery<'a> {
    fn start(stage: &'a Stage) -> Self {
        let client = BareClient::new(stage.master.address, &stage.agent_dir());
        let (table, beat) =
            (stage.folder.path().join("delivery.db"), BareBeat::start(client, After::KeepOpen));
        let ((ask, asked), (finish, done)) = (unbounded::<Vec<u8>>(), unbounded());
        thread::spawn(move || {
            let raw = RawTable::new(&table);
            for request in asked {
                raw.commit();
                beat.exchange(&request);
                raw.forget();
                let _ = finish.send(());
            }
        });
        Self { stage, ask, done }
    }

    /// How long it takes until the master has it.
    fn deliver(&self, request: &[u8]) -> Duration {
        let (request, since) = (request.to_vec(), Instant::now());
        self.ask.send(request).unwrap();
        let took = self.stage.master.arrival().at - since;
        self.done.recv_timeout(PATIENCE).unwrap();
        took
    }
}

/// Each time a Docker that has answered so far hangs from the push on.
pub fn measure_hung() -> Result<Figures, String> {
    let stage = Stage::new(After::KeepOpen)?;
    let (agent_dir, sockets) = (stage.agent_dir(), tempfile::tempdir().unwrap());
    let socket = sockets.path().join("docker.sock");
    let release = hanging_docker(&socket);
    let source = DecnetStatus::new(&agent_dir)
        .state_file(stage.folder.path().join("none"))
        .docker_socket(socket);
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    // The first beat goes out without its snapshot, the next one with it.
    stage.master.arrival();
    release.send(()).unwrap();
    stage.master.arrival();
    let mut took = Vec::new();
    for _ in 0..HUNG {
        let since = Instant::now();
        heartbeat.deltas().push(delta()).unwrap();
        took.push(stage.master.arrival().at - since);
        release.send(()).unwrap();
        stage.master.arrival();
    }
    Ok(vec![Line {
        what: "push to the master having it while Docker hangs, at most".to_owned(),
        floor: None,
        measured: Amount::Time(percentile(&took, 100)),
        goal: Goal::AtMost(Amount::Time(Duration::from_millis(300))),
    }]
    .into())
}

/// A socket where a connection is closed without an answer each time the sender says so.
fn hanging_docker(socket: &Path) -> crossbeam_channel::Sender<()> {
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
