//! The idle program: its memory compared with an empty program's, its wake-ups and its size, and
//! the threads that it starts for a beat. Reads `/proc`.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use decnet_heartbeat::loopback::{Enrolled, LoopbackMaster};
use decnet_heartbeat::{DecnetStatus, Enrolment, Heartbeat};
use tempfile::TempDir;

use crate::disk;
use crate::table::{Amount, Figures, Goal, Line};

const PROGRAM: &str = env!("CARGO_BIN_EXE_decnet-heartbeat");

/// The default interval.
const INTERVAL: Duration = Duration::from_secs(30);

/// The number of beats in which the started threads are counted.
const COUNTED: u64 = 20;

/// The interval of these beats.
const QUICK: Duration = Duration::from_secs(1);

/// Measures the program, and at the same time an agent that only embeds the library.
pub fn measure() -> Result<Figures, String> {
    let idle = [ProgramFixture::new("127.0.0.1")?, ProgramFixture::new("127.0.0.1")?];
    let [run, embedded] = &idle;
    let program = Killed(run.run(INTERVAL).spawn().unwrap());
    let agent = Killed(embedded.embed().spawn().unwrap());
    // The second beat comes after a random part of the interval; from then on the ticks are an
    // interval apart.
    let timeout = INTERVAL * 2 + Duration::from_secs(10);
    let wake_ups = thread::scope(|scope| {
        let of = |fixture: &'_ ProgramFixture, process: u32| {
            assert!(fixture.master.wait_for_beats(2, timeout), "no second beat");
            let after_beat = switches_when_idle(process);
            // Ends shortly before the next tick. The measurement is that nothing happens.
            assert!(
                !fixture.master.wait_for_beats(3, INTERVAL - INTERVAL / 10),
                "the third beat came early"
            );
            let wake_ups = voluntary_switches(process) - after_beat;
            assert!(fixture.master.wait_for_beats(3, timeout), "no third beat");
            switches_when_idle(process);
            Amount::Count(wake_ups as f64)
        };
        let of_both = [(run, program.id()), (embedded, agent.id())];
        let threads = of_both.map(|(fixture, process)| scope.spawn(move || of(fixture, process)));
        threads.map(|thread| thread.join().unwrap())
    });
    let empty = Killed(empty_program(run.folder.path()).spawn().unwrap());
    switches_when_idle(empty.id());
    let megabytes =
        |process: &Killed, field| Amount::Megabytes(status_kb(process.id(), field) / 1024.0);
    let size = fs::metadata(PROGRAM).unwrap().len() as f64 / 1024.0 / 1024.0;
    let line =
        |what: &str, floor, measured, goal| Line { what: what.to_owned(), floor, measured, goal };
    Ok(vec![
        line(
            "resident memory of `run`, idle; floor: an empty program with two threads",
            Some(megabytes(&empty, "VmRSS:")),
            megabytes(&program, "VmRSS:"),
            Goal::AtMost(Amount::Megabytes(7.5)),
        ),
        line(
            "resident memory of an agent that embeds it, idle",
            Some(megabytes(&empty, "VmRSS:")),
            megabytes(&agent, "VmRSS:"),
            Goal::AtMost(Amount::Megabytes(7.0)),
        ),
        line(
            "anonymous memory of `run`, idle",
            Some(megabytes(&empty, "RssAnon:")),
            megabytes(&program, "RssAnon:"),
            Goal::AtMostAbove(Amount::Megabytes(1.5)),
        ),
        line(
            "wake-ups of `run` between two ticks, all threads",
            None,
            wake_ups[0],
            Goal::AtMost(Amount::Count(0.0)),
        ),
        line(
            "wake-ups of an agent that embeds it, between two ticks",
            None,
            wake_ups[1],
            Goal::AtMost(Amount::Count(0.0)),
        ),
        line(
            "stripped release binary",
            None,
            Amount::Megabytes(size),
            Goal::AtMost(Amount::Megabytes(5.0)),
        ),
    ]
    .into())
}

/// The agent: a process that starts the same heartbeat as `run` and sleeps.
pub fn run_idle_agent(setup: &str) {
    let (uuid, port, agent_dir): (String, u16, String) = serde_json::from_str(setup).unwrap();
    let enrolment =
        Enrolment::new(&uuid, "127.0.0.1", &agent_dir).unwrap().with_master_port(port).unwrap();
    let nowhere = Path::new(&agent_dir).join("none");
    let source =
        DecnetStatus::new(Path::new(&agent_dir)).state_file(&nowhere).docker_socket(&nowhere);
    let _heartbeat = Heartbeat::builder()
        .enrolment(enrolment)
        .status_source(source)
        .interval(INTERVAL)
        .start()
        .unwrap();
    loop {
        thread::park();
    }
}

/// Counts the threads that beats start, with the master's address and with its name, which is
/// looked up on a thread.
pub fn measure_threads() -> Result<Figures, String> {
    let strace = Command::new("strace").arg("--version").stdout(Stdio::null()).status();
    if !strace.is_ok_and(|status| status.success()) {
        return Err("Debian's strace".to_owned());
    }
    let line = |host: &str, what: &str| Line {
        what: format!("threads started per beat, the master given by {what}"),
        floor: None,
        measured: Amount::Count(threads_started(host) as f64 / COUNTED as f64),
        goal: Goal::AtMost(Amount::Count(0.0)),
    };
    Ok(vec![line("127.0.0.1", "address"), line("localhost", "name")].into())
}

fn threads_started(host: &str) -> usize {
    let fixture = ProgramFixture::new(host).unwrap();
    let trace = fixture.folder.path().join("trace");
    let mut strace = Command::new("strace");
    // With -D, the started process is the program, and strace is its child.
    strace.args(["-D", "-f", "-qq", "-e", "trace=clone,clone3,fork,vfork", "-o"]).arg(&trace);
    let program = fixture.run(QUICK);
    strace.arg(program.get_program()).args(program.get_args()).env_clear().stderr(Stdio::null());
    let _program = Killed(strace.spawn().unwrap());
    let started = || {
        fs::read_to_string(&trace).unwrap().lines().filter(|line| line.contains("clone")).count()
    };
    assert!(fixture.master.wait_for_beats(2, crate::TIMEOUT), "no second beat");
    let before = started();
    assert!(before >= 3, "strace sees the program's own threads");
    assert!(fixture.master.wait_for_beats(2 + COUNTED, crate::TIMEOUT), "the beats have stopped");
    started() - before
}

/// A master, and a worker's configuration.
pub struct ProgramFixture {
    master: LoopbackMaster,
    worker: Enrolled,
    pub folder: TempDir,
}

impl ProgramFixture {
    /// The worker's configuration has this host as its master.
    pub fn new(host: &str) -> Result<Self, String> {
        let master = LoopbackMaster::start().unwrap();
        let folder = disk::folder()?;
        let ini = folder.path().join("decnet.ini");
        let worker = master.enrol(&folder.path().join("agent")).unwrap();
        worker.write_ini(&ini).unwrap();
        let text = fs::read_to_string(&ini).unwrap();
        assert!(text.contains("127.0.0.1"), "{text}");
        fs::write(&ini, text.replace("127.0.0.1", host)).unwrap();
        Ok(Self { master, worker, folder })
    }

    fn run(&self, interval: Duration) -> Command {
        self.command("run", interval)
    }

    /// `run` or `pipe`.
    pub fn command(&self, name: &str, interval: Duration) -> Command {
        let folder = self.folder.path();
        let mut command = Command::new(PROGRAM);
        command.env_clear().arg("--config").arg(folder.join("decnet.ini")).arg(name);
        command.args(["--interval", &format!("{}ms", interval.as_millis())]);
        command
            .arg("--state-file")
            .arg(folder.join("none"))
            .arg("--docker-socket")
            .arg(folder.join("none"));
        command.stderr(Stdio::null());
        command
    }

    /// This bench as a process that runs [`run_idle_agent`].
    fn embed(&self) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let setup = (&self.worker.uuid, self.master.port(), self.folder.path().join("agent"));
        command.env_clear().arg("--embedded").arg(serde_json::to_string(&setup).unwrap());
        command
    }
}

/// Compiles the empty program with the same options as the program.
fn empty_program(folder: &Path) -> Command {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/budget/empty.rs");
    let program = folder.join("empty");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut compile = Command::new(rustc);
    compile
        .args(["--edition=2024", "-Copt-level=3", "-Cstrip=symbols", "-o"])
        .arg(&program)
        .arg(source);
    assert!(compile.status().expect("rustc").success());
    Command::new(program)
}

/// A process that is killed when the value is dropped.
pub struct Killed(pub Child);

impl Killed {
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the process is idle: all threads sleep, and the number of voluntary context switches
/// does not change for 50 ms. Returns that number.
fn switches_when_idle(process: u32) -> u64 {
    loop {
        let before = voluntary_switches(process);
        let asleep = tasks(process).all(|task| field(&task, "State:").starts_with('S'));
        std::thread::sleep(Duration::from_millis(50));
        if asleep && before == voluntary_switches(process) {
            return before;
        }
    }
}

/// The number of voluntary context switches, one for each wake-up of a thread.
fn voluntary_switches(process: u32) -> u64 {
    tasks(process)
        .map(|task| field(&task, "voluntary_ctxt_switches:").parse::<u64>().unwrap())
        .sum()
}

/// `status` of each thread.
fn tasks(process: u32) -> impl Iterator<Item = String> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap())
}

/// A size in the `status` of the process.
pub fn status_kb(process: u32, name: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    field(&status, name).trim_end_matches(" kB").parse().unwrap()
}

/// A field of a `status` file.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).expect("a field of status").trim()
}
