//! The log as an attack surface: text of other programs is truncated, escaped and put on one line
//! before it is logged, and no key is logged.

use std::process::Command;
use std::time::Duration;

use decnet_heartbeat::Heartbeat;
use decnet_heartbeat::loopback::{Answer, Options, Role};

use crate::agent::{Logger, Source};
use crate::agent_process::AgentProcess;
use crate::fault_case::becomes_true;
use crate::test_bed::{Scenario, TIMEOUT, TestBed, Ticks};

/// The maximum number of characters in a line: a few texts of other programs, each shortened, and
/// the rest of the line.
const LINE: usize = 1_500;

/// The maximum number of lines that a row logs, `trace` included.
const LINES: usize = 120;

/// Asserts that every line has the library's form, is short, and has no control character.
pub fn check_log(bed: &TestBed, log: &str) {
    // The last line may not be complete yet.
    let complete = log.rsplit_once('\n').map_or("", |(complete, _)| complete);
    for line in complete.lines() {
        let has_level = ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"]
            .iter()
            .any(|level| line.contains(&format!(" [{level}] (")));
        assert!(has_level && line.starts_with("20"), "{line:?}");
        assert!(line.chars().count() <= LINE, "{line}");
        check_fields(line);
        assert!(
            !line.chars().any(|c| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c)),
            "{line:?}"
        );
    }
    assert!(log.lines().count() <= LINES, "{log}");
    check_no_key(bed, log);
}

/// Asserts that a line has a message and then fields `key=value`, with each value in one piece.
/// Fields that name the heartbeat come first, in a fixed order, and `master` only with `host`.
fn check_fields(line: &str) {
    let message = line.split_once(") ").unwrap().1;
    // The agent's log contains the module, too; that of the program does not.
    let message = message
        .strip_prefix("decnet_heartbeat")
        .map_or(message, |rest| rest.split_once(": ").unwrap().1);
    let Some((what, mut rest)) = message.split_once(": ") else { return };
    assert!(!what.contains('='), "{line}");
    let mut keys = Vec::new();
    while !rest.is_empty() {
        let (key, value) =
            rest.split_once('=').unwrap_or_else(|| panic!("no key before {rest:?}: {line}"));
        assert!(
            !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
            "{key:?}: {line}"
        );
        keys.push(key);
        let end = match value.strip_prefix('"') {
            None => value.find(' ').unwrap_or(value.len()),
            Some(text) => {
                let mut escaped = false;
                let quote = text.find(|c| {
                    let ends = c == '"' && !escaped;
                    escaped = c == '\\' && !escaped;
                    ends
                });
                quote.unwrap_or_else(|| panic!("a quote without an end: {line}")) + 2
            }
        };
        rest = value[end..].trim_start();
    }
    let order = ["host", "master", "class", "fingerprint"]
        .map(|key| keys.iter().position(|found| *found == key));
    let known: Vec<_> = order.iter().flatten().copied().collect();
    assert_eq!(known, (0..known.len()).collect::<Vec<_>>(), "{line}");
    assert!(order[1].is_none() || order[0].is_some(), "{line}");
}

/// Asserts that a text contains no part of the key.
pub fn check_no_key(bed: &TestBed, text: &str) {
    let key = std::fs::read_to_string(bed.agent_file("worker.key")).unwrap();
    for line in key.lines().filter(|line| !line.starts_with("-----")) {
        assert!(line.len() < 16 || !text.contains(&line[..16]), "a part of the key: {text}");
    }
}

/// Fifty equal failures are logged in a few lines. A change is logged at once.
pub fn repeated_failures_are_logged_at_a_decreasing_rate() {
    let interval = Duration::from_millis(50);
    let bed = TestBed::new(Scenario { interval, ticks: Ticks::FromTimer, ..Scenario::default() });
    let mut agent = bed.start();
    bed.master.always(Some(Answer::status(503).into()));
    agent.wait_for("50 failures", |stats| stats["failure"]["count"].as_u64() >= Some(50));
    let logged = logged_failure_counts(&agent);
    assert_eq!(logged[..6], ["1", "2", "4", "8", "16", "32"]);
    assert!(logged.len() <= 8, "{logged:?}");
    bed.master.always(Some(Answer::status(502).into()));
    agent.wait_for("another failure", |stats| stats["failure"]["class"] == "http-502");
    bed.master.always(None);
    agent.wait_for("the recovery", |stats| stats["failure"].is_null());
    assert!((1..=2).contains(&agent.log_lines("beats accepted again: ").len()));
}

/// The field `failures` of the warnings.
fn logged_failure_counts(agent: &AgentProcess) -> Vec<String> {
    let lines = agent.log_lines("beat failed: ");
    let warnings = lines.iter().filter(|line| line.contains("[WARN]"));
    let counts = warnings.map(|line| line.split("failures=").nth(1).unwrap());
    counts.map(|rest| rest.split(' ').next().unwrap().to_owned()).collect()
}

/// Text of a master, a file and an argument: long, with line breaks, control characters and
/// characters that change the direction of text.
pub fn hostile_text_is_escaped() {
    let hostile = format!(
        "\u{1b}]0;owned\u{7}\r\n2026-01-01T00:00:00Z [ERROR] (x) forged\u{202e}\u{2028}{}",
        "z".repeat(9_000)
    );
    let bed = TestBed::new(Scenario { source: Source::Decnet, ..Scenario::default() });
    let mut agent = bed.start();
    // 422 is the last one: after it the master's next failure would suspend the states.
    for status in [403, 503, 422] {
        let beats = agent.stats()["beats"].as_u64();
        bed.master.script([Answer::status(status).body(hostile.clone()).into()]);
        agent.tick();
        let is_sent = bed.master.wait_until(TIMEOUT, |seen| {
            seen.received().iter().any(|request| request.status == Some(status))
        });
        assert!(is_sent, "{status}: {}", agent.log_tail());
        // After 422 the beat is sent without its status at once, and does not fail. The others
        // fail, and the next one is sent with a tick or after the backoff.
        if status != 422 {
            agent.wait_for("a failure", |stats| !stats["failure"].is_null());
            let class = format!("class=http-{status} ");
            assert!(becomes_true(|| !agent.log_lines(&class).is_empty()), "{}", agent.log());
            agent.tick();
        }
        agent.wait_for("the recovery", |stats| {
            stats["failure"].is_null() && stats["beats"].as_u64() > beats
        });
    }
    let beats = agent.stats()["beats"].as_u64();
    std::fs::write(bed.path("state.json"), &hostile).unwrap();
    std::fs::write(bed.agent_file("topology.db"), &hostile).unwrap();
    std::fs::write(bed.path("decnet.ini"), &hostile).unwrap();
    agent.tick();
    agent.wait_for("a beat", |stats| stats["beats"].as_u64() > beats);
    let log = agent.log();
    assert!(log.contains("\\u{1b}]0;owned") && !log.contains("\n2026-01-01"), "{log}");
    check_log(&bed, &log);
    assert_program_escapes_its_arguments();
}

fn assert_program_escapes_its_arguments() {
    let mut program = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    program.env_clear().args(["--log-file", "/nowhere\u{1b}[31m\n/at all", "run"]);
    let stderr = String::from_utf8(program.output().unwrap().stderr).unwrap();
    assert!(stderr.contains("/nowhere\\u{1b}[31m\\u{a}/at all"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

/// The output of `{:?}` for every type that has a key, or contains one that has.
pub fn debug_output_contains_no_key() {
    let bed = TestBed::new(Scenario::default());
    let builder = || Heartbeat::builder().enrolment(bed.worker.enrolment().unwrap());
    let heartbeat = builder().start().unwrap();
    let authority = bed.master.authority();
    let issued = authority.issue(Role::Master).unwrap();
    let options = Options { certificate: Some(issued.clone()), ..Options::default() };
    for text in [
        format!("{heartbeat:#?} {:#?}", builder()),
        format!("{:#?} {:#?}", heartbeat.deltas(), heartbeat.stats()),
        format!("{:#?} {:#?} {:#?}", bed.worker, bed.worker.enrolment(), bed.master),
        format!("{options:#?} {issued:#?} {authority:#?}"),
        format!("{:#?}", builder().start().map(drop)),
    ] {
        check_no_key(&bed, &text);
        assert!(!text.contains("PRIVATE KEY") && !text.contains(&issued.key[60..90]), "{text}");
    }
}

/// The logger panics for every line: of accepted and failed beats, of the outbox, and of a stop.
pub fn panicking_logger_loses_only_its_lines() {
    let bed = TestBed::new(Scenario { logger: Logger::Panics, ..Scenario::default() });
    let mut agent = bed.start();
    let before = agent.footprint();
    agent.push("a");
    agent.wait_for("the first delta", |stats| stats["delivered"] == 1);
    bed.master.script([Answer::status(503).into(), Answer::status(422).into()]);
    agent.push("b");
    agent.wait_for("a failure", |stats| !stats["failure"].is_null());
    let stats = agent.wait_for("the second delta", |stats| {
        stats["delivered"] == 2 && stats["failure"].is_null()
    });
    assert!(stats["ended_thread"].is_null(), "{stats}");
    assert_eq!(stats["waiting"], 0);
    assert_eq!(stats["rejected"], 0);
    // A lost line is not a failure of its beat, so no beat is delayed by a backoff.
    let beats = stats["beats"].as_u64().unwrap();
    for more in 1..=5 {
        agent.tick();
        agent.wait_for("a beat", |stats| stats["beats"].as_u64() >= Some(beats + more));
    }
    assert_eq!(agent.footprint().threads, before.threads);
    agent.push("c");
    let stopped = agent.stop(Duration::from_secs(5));
    assert!(stopped["in_time"] == true && stopped["undelivered"] == 0, "{stopped}");
}
