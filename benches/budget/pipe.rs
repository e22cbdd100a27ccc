//! From a line of an agent to `pipe` to the answer that it is on the disk.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::TIMEOUT;
use crate::disk::RawTable;
use crate::post::PAUSE;
use crate::process::{Killed, ProgramFixture};
use crate::table::{Amount, Figures, Goal, Line, percentile};

/// As many as the outbox has room for, so that none is dropped if the master is slow.
const FLOOD: u64 = 10_000;
const LINES: usize = 1_000;

/// First a flood, in which the WAL grows. Then single lines after a pause, each in turn with its
/// floor: a line to a child that writes it back, and a commit on the thread that waits for it.
pub fn measure() -> Result<Figures, String> {
    let fixture = ProgramFixture::new("127.0.0.1")?;
    let mut command = fixture.command("pipe", Duration::from_secs(3_600));
    let mut pipe = Lines::start(&mut command);
    pipe.exchange(&line("stats", 0, Value::Null));
    let flood = pipe.flood();
    pipe.await_delivery();
    let mut echo = Lines::start(&mut Command::new("cat"));
    let raw = RawTable::new(&fixture.folder.path().join("raw.db"));
    let (mut took, mut floor) = (Vec::new(), Vec::new());
    for id in 0..LINES as u64 {
        thread::sleep(PAUSE);
        let line = push(id);
        let since = Instant::now();
        pipe.exchange(&line);
        took.push(since.elapsed());
        pipe.await_delivery();
        thread::sleep(PAUSE);
        let since = Instant::now();
        echo.exchange(&line);
        raw.commit();
        floor.push(since.elapsed());
        raw.delete_newest();
    }
    Ok(vec![
        Line {
            what:
                "a line of `pipe` to its answer, p50; floor: a child that echoes it, and a commit"
                    .to_owned(),
            floor: Some(Amount::Time(percentile(&floor, 50))),
            measured: Amount::Time(percentile(&took, 50)),
            goal: Goal::AtMostTimes(1.3),
        },
        Line {
            what: "10,000 lines of `pipe` whose agent waits for no answer, all answers read"
                .to_owned(),
            floor: None,
            measured: Amount::Time(flood),
            goal: Goal::AtMost(Amount::Time(Duration::from_secs(1))),
        },
    ]
    .into())
}

fn line(method: &str, id: u64, params: Value) -> String {
    format!("{}\n", json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}))
}

fn push(id: u64) -> String {
    let delta = json!({"decky_name": "decky-01", "operation": "mutate", "status": "failed",
        "error": "compose exited with 1"});
    line("push", id, json!({"deltas": [delta]}))
}

/// A child that answers each line with a line.
struct Lines {
    _child: Killed,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Lines {
    fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child: Child = command.spawn().unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { _child: Killed(child), stdin, stdout }
    }

    fn exchange(&mut self, line: &str) -> String {
        self.stdin.write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        self.stdout.read_line(&mut answer).unwrap();
        assert!(answer.ends_with('\n'), "it has ended");
        answer
    }

    /// How long it takes until all are answered.
    fn flood(&mut self) -> Duration {
        let lines: Vec<String> = (1..=FLOOD).map(push).collect();
        let since = Instant::now();
        thread::scope(|scope| {
            let stdin = &mut self.stdin;
            scope.spawn(move || {
                lines.iter().for_each(|line| stdin.write_all(line.as_bytes()).unwrap());
            });
            for answer in (&mut self.stdout).lines().take(FLOOD as usize) {
                assert!(answer.unwrap().contains(r#"{"durable":true}"#));
            }
        });
        since.elapsed()
    }

    /// Waits until the master has everything.
    fn await_delivery(&mut self) {
        let end = Instant::now() + TIMEOUT;
        loop {
            let answer: Value =
                serde_json::from_str(&self.exchange(&line("stats", 0, Value::Null))).unwrap();
            if answer["result"]["waiting"] == 0 {
                return;
            }
            assert!(Instant::now() < end, "{answer}");
            thread::sleep(PAUSE);
        }
    }
}
