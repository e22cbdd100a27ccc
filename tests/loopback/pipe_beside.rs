//! `pipe` beside another process that delivers from its outbox, and with an outbox in memory.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Instant;

use nix::fcntl::{FcntlArg, fcntl};
use serde_json::{Value, json};

use crate::hand_over::start_run;
use crate::pipe::{often, rarely};
use crate::support::{Agent, Fixture, TIMEOUT, wait_for_line};

fn push(agent: &mut Agent, decky: &str) -> Value {
    let delta = json!({"decky_name": decky, "operation": "mutate", "status": "succeeded"});
    agent.result("push", json!({"deltas": [delta]}))
}

#[test]
fn second_pipe_adds_to_the_outbox_and_takes_over_when_the_first_ends() {
    let fixture = Fixture::new();
    for decky in ["a", "b", "c"] {
        fixture.master.open_operation(&fixture.worker.uuid, decky, "mutate");
    }
    let mut first = Agent::start(&mut often(&fixture));
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    // Its next tick is in an hour. It looks at the outbox five seconds after its start, too.
    let mut second = Agent::start(&mut rarely(&fixture));
    let said =
        wait_for_line(&second.log, "another process delivers; deltas are added to its outbox");
    assert!(said.contains(&format!("process {}", first.pipe.0.id())), "{said}");
    assert_eq!(push(&mut second, "a"), json!({"durable": true}));
    fixture.wait_for_closed_rows(1);
    let stats = second.result("stats", Value::Null);
    assert_eq!((&stats["beats"], &stats["host_uuid"]), (&json!(0), &json!(fixture.worker.uuid)));
    // Its operation goes on when the other process has ended.
    let begun = second.result("begin", json!({"operation": "mutate", "deckies": ["b"]}));
    assert_eq!(begun["durable"], true);
    assert_eq!(first.close(), Some(0));
    wait_for_line(&second.log, "heartbeat starting: ");
    assert_eq!(
        second.result("end", json!({"handle": 1, "status": "succeeded"})),
        json!({"durable": true})
    );
    push(&mut second, "c");
    fixture.wait_for_closed_rows(3);
    assert_eq!(second.close(), Some(0));
    let others: Vec<_> =
        second.log.iter().filter(|line| line.contains("another process")).collect();
    assert!(others.is_empty(), "it is said once: {others:?}");
}

#[test]
fn pipe_beside_run_wakes_it_after_each_commit_and_does_not_beat() {
    let fixture = Fixture::new();
    for (decky, operation) in [("a", "deploy"), ("b", "deploy"), ("c", "mutate")] {
        fixture.master.open_operation(&fixture.worker.uuid, decky, operation);
    }
    // Its next tick is in an hour.
    let _run = start_run(&fixture, "1h");
    let mut agent = Agent::start(&mut rarely(&fixture));
    agent.deploy(&["a", "b"]);
    push(&mut agent, "c");
    fixture.wait_for_closed_rows(1);
    agent.result("end", json!({"handle": 1, "decky": "a", "status": "succeeded"}));
    fixture.wait_for_closed_rows(2);
    // The end of stdin is an outcome, too.
    assert_eq!(agent.close(), Some(0));
    fixture.wait_for_closed_rows(3);
    assert_eq!(fixture.master.rows()[1].error.as_deref(), Some("the agent ended during deploy"));
    assert!(!agent.log.iter().any(|line| line.contains("heartbeat starting")));
}

#[test]
fn outbox_in_memory_is_not_durable() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let folder = fixture.dir.path().join("outbox");
    std::fs::create_dir(&folder).unwrap();
    let mut agent = Agent::start(rarely(&fixture).arg("--outbox").arg(&folder));
    let begin = json!({"operation": "deploy", "deckies": ["a"], "resume": true});
    let begun = agent.result("begin", begin);
    assert_eq!(begun, json!({"handle": 1, "durable": false, "resumed": []}));
    let end = json!({"handle": 1, "status": "failed", "error": "why"});
    assert_eq!(agent.result("end", end), json!({"durable": false}));
    assert_eq!(push(&mut agent, "b"), json!({"durable": false}));
    fixture.wait_for_closed_rows(1);
    assert_eq!(agent.result("stats", Value::Null)["outbox"], Value::Null);
    assert_eq!(agent.close(), Some(0));
}

#[test]
fn outbox_without_room_refuses_and_is_not_in_doubt() {
    let fixture = Fixture::new();
    let mut agent = Agent::start(&mut rarely(&fixture));
    let deckies: Vec<_> = (0..10_000).map(|n| format!("d{n}")).collect();
    let begin = json!({"operation": "deploy", "deckies": deckies});
    assert_eq!(agent.result("begin", begin)["handle"], 1);
    for resume in [false, true] {
        let begin = json!({"operation": "deploy", "deckies": ["a"], "resume": resume});
        let error = agent.ask("begin", begin)["error"].clone();
        assert_eq!(
            (&error["code"], &error["data"]),
            (&json!(-32_000), &json!({"in_doubt": false}))
        );
        assert!(error["message"].as_str().unwrap().contains("has no room for 1 more"), "{error}");
    }
    agent.pipe.signal("KILL");
}

/// Locks the byte with which processes take turns to change an outbox, or unlocks it.
fn set_lock(lock_file: &File, kind: i32) {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: i64::from(i32::MAX),
        l_len: 1,
        l_pid: 0,
    };
    // The process may be acknowledging a delta.
    fcntl(lock_file.as_fd(), FcntlArg::F_OFD_SETLKW(&lock)).unwrap();
}

#[test]
fn outbox_that_another_process_has_locked_refuses_and_beats_go_on() {
    let fixture = Fixture::new();
    let mut agent = Agent::start(&mut often(&fixture));
    assert_eq!(push(&mut agent, "a"), json!({"durable": true}));
    let lock_file = fixture.agent_dir().join("heartbeat.db-lock");
    let lock_file = File::options().read(true).write(true).open(lock_file).unwrap();
    set_lock(&lock_file, libc::F_WRLCK);
    let beats = fixture.master.received().len();
    let since = Instant::now();
    let error =
        agent.ask("begin", json!({"operation": "deploy", "deckies": ["a"]}))["error"].clone();
    assert_eq!((&error["code"], &error["data"]), (&json!(-32_000), &json!({"in_doubt": false})));
    assert!(since.elapsed() < TIMEOUT / 4, "{:?}", since.elapsed());
    fixture.wait_for_requests(beats + 3);
    set_lock(&lock_file, libc::F_UNLCK);
    assert_eq!(agent.deploy(&["a"]), json!({"handle": 1, "durable": true, "resumed": []}));
    assert_eq!(agent.close(), Some(0));
}
