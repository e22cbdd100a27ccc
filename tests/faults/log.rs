//! The log as an attack surface: what others say comes out of it cut, escaped and on one line, and no secret at all.

use std::time::Duration;

use decnet_heartbeat::Heartbeat;
use decnet_heartbeat::loopback::{Answer, Options, Role};
use serde_json::json;

use crate::stage::{Stage, World};
use crate::subject::{Logger, Source};

/// Characters of a line at the most: a few foreign texts, each cut, and what is around them.
const LINE: usize = 1_500;

/// Lines of a row's whole log at the most, `trace` included.
const LINES: usize = 120;

/// Every line is one of ours, short, and without what a terminal obeys. The library says nothing as a panic would.
pub fn check(stage: &Stage, log: &str) {
    // The last line may be just being written.
    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        let is_ours = ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"]
            .iter()
            .any(|level| line.contains(&format!(" [{level}] (")));
        assert!(is_ours && line.starts_with("20"), "{line:?}");
        assert!(line.chars().count() <= LINE, "{line}");
        check_keys(line);
        assert!(
            !line.chars().any(|c| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c)),
            "{line:?}"
        );
    }
    assert!(log.lines().count() <= LINES, "{log}");
    check_secrets(stage, log);
}

/// What happened, and then `key=value`, each value in one piece: first whose line it is, in a fixed order. A line that
/// knows the master knows the host.
fn check_keys(line: &str) {
    let message = line.split_once(") ").unwrap().1;
    // The subject's log names the module, too; the program's does not.
    let message = message
        .strip_prefix("decnet_heartbeat")
        .map_or(message, |rest| rest.split_once(": ").unwrap().1);
    let Some((what, mut rest)) = message.split_once(": ") else { return };
    assert!(!what.contains('='), "{line}");
    let mut keys = Vec::new();
    while !rest.is_empty() {
        let (key, value) =
            rest.split_once('=').unwrap_or_else(|| panic!("a value in pieces, {rest:?}: {line}"));
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
                quote.unwrap_or_else(|| panic!("a quote that does not end: {line}")) + 2
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

/// Nothing of any key that was ever in the bundle.
pub fn check_secrets(stage: &Stage, said: &str) {
    let key = std::fs::read_to_string(stage.agent_file("worker.key")).unwrap();
    for line in key.lines().filter(|line| !line.starts_with("-----")) {
        assert!(line.len() < 16 || !said.contains(&line[..16]), "key material: {said}");
    }
}

/// Fifty beats that fail alike are a handful of lines, and what changes is said at once.
pub fn repeated_failures_are_said_ever_more_rarely() {
    let stage =
        Stage::new(World { interval: Duration::from_millis(50), ticks: true, ..World::default() });
    let mut subject = stage.start();
    stage.master.always(Some(Answer::status(503).into()));
    subject.until("50 failures", |stats| stats["failure"]["count"].as_u64() >= Some(50));
    let counts = || {
        let failed =
            subject.log_lines("beat failed: ").into_iter().filter(|line| line.contains("[WARN]"));
        failed
            .map(|line| {
                line.split("failures=").nth(1).unwrap().split(' ').next().unwrap().to_owned()
            })
            .collect::<Vec<_>>()
    };
    let mut said = counts();
    said.truncate(6);
    assert_eq!(said, ["1", "2", "4", "8", "16", "32"]);
    assert!(counts().len() <= 8);
    stage.master.always(Some(Answer::status(502).into()));
    subject.until("another failure", |stats| stats["failure"]["class"] == "http-502");
    stage.master.always(None);
    subject.until("all to be well", |stats| stats["failure"].is_null());
    assert!((1..=2).contains(&subject.log_lines("beats accepted again: ").len()));
}

/// What a master may say, and a file, and an argument: long, many lines, control and bidi characters.
pub fn hostile_text_stays_text() {
    let hostile = format!(
        "\u{1b}]0;owned\u{7}\r\n2026-01-01T00:00:00Z [ERROR] (x) forged\u{202e}\u{2028}{}",
        "z".repeat(9_000)
    );
    let stage = Stage::new(World { source: Source::Decnet, ..World::default() });
    let mut subject = stage.start();
    for status in [403, 422, 503] {
        stage.master.script([Answer::status(status).body(hostile.clone()).into()]);
        subject.tick();
        subject.until("a refusal", |stats| !stats["failure"].is_null() || status == 422);
        subject.tick();
        subject.until("all to be well", |stats| stats["failure"].is_null());
    }
    let beats = subject.stats()["beats"].as_u64();
    std::fs::write(stage.path("state.json"), &hostile).unwrap();
    std::fs::write(stage.agent_file("topology.db"), &hostile).unwrap();
    std::fs::write(stage.path("decnet.ini"), &hostile).unwrap();
    subject.tick();
    subject.until("a beat", |stats| stats["beats"].as_u64() > beats);
    let log = subject.log();
    assert!(log.contains("\\u{1b}]0;owned") && !log.contains("\n2026-01-01"), "{log}");
    check(&stage, &log);
    // What an operator is told of an argument.
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    let output = program
        .env_clear()
        .args(["--log-file", "/nowhere\u{1b}[31m\n/at all", "run"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("/nowhere\\u{1b}[31m\\u{a}/at all") && said.lines().count() == 1,
        "{said}"
    );
}

/// `{:?}` of all that has to do with the bundle.
pub fn no_key_is_in_any_debug_text() {
    let stage = Stage::new(World::default());
    let builder = || Heartbeat::builder().enrolment(stage.worker.enrolment().unwrap());
    let heartbeat = builder().start().unwrap();
    let issued = stage.master.authority().issue(Role::Master).unwrap();
    let options = Options { certificate: Some(issued.clone()), ..Options::default() };
    let said = [
        format!(
            "{heartbeat:#?} {:#?} {:#?} {:#?}",
            builder(),
            heartbeat.deltas(),
            heartbeat.stats()
        ),
        format!("{:#?} {:#?} {:#?}", stage.worker, stage.worker.enrolment(), stage.master),
        format!("{options:#?} {issued:#?} {:#?}", stage.master.authority()),
        format!("{:#?}", builder().start().map(drop)),
    ];
    for text in said {
        check_secrets(&stage, &text);
        assert!(!text.contains("PRIVATE KEY") && !text.contains(&issued.key[60..90]), "{text}");
    }
}

/// Each line of the log is a panic: while all is well, while beats fail, while the outbox is busy, and at a stop.
pub fn a_logger_that_panics() {
    let stage = Stage::new(World { logger: Logger::Panics, ..World::default() });
    let mut subject = stage.start();
    let before = subject.footprint();
    subject.push("a");
    subject.until("the first delta", |stats| stats["delivered"] == 1);
    stage.master.script([Answer::status(503).into(), Answer::status(422).into()]);
    subject.push("b");
    subject.until("a failure", |stats| !stats["failure"].is_null());
    let stats = subject
        .until("the second delta", |stats| stats["delivered"] == 2 && stats["failure"].is_null());
    assert_eq!(
        (&stats["ended_thread"], &stats["waiting"], &stats["rejected"]),
        (&json!(null), &json!(0), &json!(0))
    );
    let beats = stats["beats"].as_u64().unwrap();
    // Nothing is put off: a line that is lost is no failure of its beat.
    for more in 1..=5 {
        subject.tick();
        subject.until("a beat", |stats| stats["beats"].as_u64() >= Some(beats + more));
    }
    assert_eq!(subject.footprint().threads, before.threads);
    subject.push("c");
    let stopped = subject.stop(Duration::from_secs(5));
    assert!(stopped["in_time"] == true && stopped["undelivered"] == 0, "{stopped}");
}
