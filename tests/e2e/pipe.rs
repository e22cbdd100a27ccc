//! `pipe` with its agent dir on a disk that does not answer.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Received, Seen};
use serde_json::{Value, json};

use crate::support::{FreezableDisk, Loopback, TIMEOUT, commands};

/// A request waits a second for the disk. A busy machine wakes a thread later.
const ANSWERED: Duration = Duration::from_millis(1_500);

/// `pipe`, and the agent's ends of its pipes.
struct Agent {
    pipe: Child,
    answers: Receiver<String>,
}

impl Agent {
    fn start(loopback: &Loopback, ini: &Path) -> Self {
        loopback.worker.write_ini(ini).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
        command.env_clear().arg("--config").arg(ini).args(["pipe", "--interval", "200ms"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut pipe = command.spawn().unwrap();
        let answers = commands::lines(pipe.stdout.take().unwrap());
        Self { pipe, answers }
    }

    fn send(&mut self, id: u64, method: &str, params: Value) {
        let line = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        writeln!(self.pipe.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    fn push(&mut self, id: u64, decky: &str) {
        let delta = json!({"decky_name": decky, "operation": "deploy", "status": "succeeded"});
        self.send(id, "push", json!({"deltas": [delta]}));
    }

    /// The next answer, which must have this id.
    fn answer(&self, id: u64) -> Value {
        let line = self.answers.recv_timeout(TIMEOUT).expect("an answer");
        let answer: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(answer["id"], id, "{answer}");
        answer
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended. It is not waited for: it ends when the disk thaws.
        let _ = self.pipe.kill();
    }
}

#[test]
#[ignore = "mounts, and so needs root"]
fn requests_are_answered_while_the_disk_is_frozen() {
    let disk = FreezableDisk::mount();
    let folder = tempfile::tempdir().unwrap();
    let loopback = Loopback::new(&disk.path().join("agent"));
    let mut agent = Agent::start(&loopback, &folder.path().join("decnet.ini"));
    agent.send(1, "begin", json!({"operation": "mutate", "deckies": ["a"]}));
    assert_eq!(agent.answer(1)["result"]["durable"], true);
    disk.freeze();
    let since = Instant::now();
    agent.push(2, "first");
    // The disk has the first request before the others are queued.
    thread::sleep(Duration::from_millis(100));
    agent.send(3, "begin", json!({"operation": "deploy", "deckies": ["b"], "resume": true}));
    agent.send(4, "end", json!({"handle": 1, "status": "succeeded"}));
    agent.push(5, "second");
    agent.send(6, "stats", Value::Null);
    let doubt = |answer: Value| answer["error"]["data"]["in_doubt"].clone();
    assert_eq!(doubt(agent.answer(2)), true);
    assert_eq!(doubt(agent.answer(3)), false);
    assert_eq!(agent.answer(4)["result"], json!({"durable": false}));
    assert_eq!(doubt(agent.answer(5)), false);
    assert!(agent.answer(6)["result"]["outbox_busy_since"].is_string());
    assert!(since.elapsed() < ANSWERED, "{:?}", since.elapsed());
    let beats = loopback.master.received().len();
    assert!(loopback.master.wait_until(TIMEOUT, |seen| seen.received().len() > beats + 3));
    disk.thaw();
    let deltas = |request: &Received| {
        let lifecycle = request.json.as_ref().and_then(|json| json["lifecycle"].as_array());
        lifecycle.map_or(0, Vec::len)
    };
    let has_both = |seen: &Seen| seen.received().iter().map(deltas).sum::<usize>() >= 2;
    assert!(loopback.master.wait_until(TIMEOUT, has_both));
    agent.push(7, "third");
    assert_eq!(agent.answer(7)["result"], json!({"durable": true}));
    drop(agent.pipe.stdin.take());
    assert_eq!(
        commands::wait_for_exit(&mut agent.pipe, TIMEOUT).and_then(|status| status.code()),
        Some(0)
    );
    let mut sent = loopback.sent();
    sent.sort();
    assert_eq!(sent, ["a", "first", "third"]);
}
