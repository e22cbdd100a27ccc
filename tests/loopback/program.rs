//! The program as operators, shells and systemd use it.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use decnet_heartbeat::loopback::Role;
use serde_json::Value;

use crate::support::{Fixture, TIMEOUT, json_of, program};

fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

fn terminate(child: &Child) {
    let kill = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(kill.success());
}

#[test]
fn not_enrolled_exits_78_and_names_the_places_searched() {
    let output = output(program().args(["--config", "/nonexistent/decnet.ini", "run"]));
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8(output.stderr).unwrap();
    for part in
        ["not enrolled", "DECNET_HOST_UUID", "DECNET_MASTER_HOST", "/nonexistent/decnet.ini"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn missing_bundle_exits_78_and_is_named() {
    let mut command = program();
    command.env("DECNET_HOST_UUID", "u").env("DECNET_MASTER_HOST", "127.0.0.1");
    let output = output(command.args(["--agent-dir", "/nonexistent/agent", "run"]));
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        text,
        "decnet-heartbeat: bundle: /nonexistent/agent/ca.crt: cannot be read; enrol this host, or correct the agent dir, \
         which does not exist: No such file or directory (os error 2)\n"
    );
}

#[test]
fn invalid_value_exits_2_and_is_named() {
    let output = output(program().args(["--master-identity", "anyone", "run"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("must be name, host, ca, public, or sha256:")
    );
}

#[test]
fn agent_dir_of_two_lines_exits_2_without_advice_about_an_ini() {
    for command in ["run", "check"] {
        let output = output(program().args(["--agent-dir", "a\nb", command]));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(
            text.contains(r"'a\u{a}b' for '--agent-dir <DIR>': must be a path on one line"),
            "{text}"
        );
        assert!(!text.contains("indented"), "{text}");
    }
}

#[test]
fn interval_out_of_range_exits_2() {
    for command in ["run", "check"] {
        for interval in ["10ms", "49ms", "61m", "2h", "0s", "1y", "x", ""] {
            let output = output(program().args([command, "--interval", interval]));
            assert_eq!(output.status.code(), Some(2), "{command} {interval}");
        }
    }
    let text = output(program().args(["run", "--interval", "10ms"])).stderr;
    assert!(String::from_utf8(text).unwrap().contains("must be from 50ms to 1h"));
}

#[test]
fn invalid_decky_name_exits_2_and_writes_nothing() {
    let fixture = Fixture::new();
    let files = || std::fs::read_dir(fixture.agent_dir()).unwrap().count();
    let before = files();
    fixture.write_ini();
    let ran = fixture.path("ran");
    for name in [
        "",
        " ",
        "a,b",
        "a b",
        "d1\n",
        "a/b",
        "a*",
        "ä",
        "a\u{1b}[31m",
        "a\u{202e}b",
        &"x".repeat(129),
    ] {
        let mut push = program();
        push.arg("--config").arg(fixture.ini());
        push.args(["push", "--operation", "deploy", "--status", "succeeded", "decky-01", name]);
        let mut track = program();
        track.arg("--config").arg(fixture.ini());
        track
            .args(["track", "--operation", "deploy", "--decky", "decky-01", name, "--", "touch"])
            .arg(&ran);
        for command in [&mut push, &mut track] {
            let output = output(command);
            let text = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{text}");
            assert!(text.contains("decky name: "), "{text}");
            assert!(!text.contains(['\u{1b}', '\u{202e}']), "safe to print: {text:?}");
            let first = text.split("\n\n").next().unwrap();
            assert!(!first.contains('\n'), "on one line: {first:?}");
        }
    }
    assert_eq!((files(), ran.exists(), fixture.master.received().len()), (before, false, 0));
}

#[test]
fn unlisted_decky_is_a_warning() {
    let fixture = Fixture::new();
    let ini = fixture.ini();
    let state = fixture.path("state.json");
    fixture.write_ini();
    let messages = |name: &str| {
        let mut push = program();
        push.arg("--config").arg(&ini).args([
            "push",
            "--operation",
            "deploy",
            "--status",
            "succeeded",
            name,
        ]);
        let mut track = program();
        track.arg("--config").arg(&ini).args([
            "track",
            "--operation",
            "mutate",
            "--decky",
            name,
            "--",
            "true",
        ]);
        [push, track].map(|mut command| {
            let output = output(command.env("DECNET_HEARTBEAT_STATE_FILE", &state));
            assert_eq!(output.status.code(), Some(0), "{output:?}");
            String::from_utf8(output.stderr).unwrap()
        })
    };
    let none = || [String::new(), String::new()];
    assert_eq!(messages("d2"), none(), "no state file");
    let content = r#"{"config": {"mode": "swarm", "deckies": [{"name": "d1", "services": []}]}, "compose_path": "/x"}"#;
    std::fs::write(&state, content).unwrap();
    assert_eq!(messages("d1"), none());
    for text in messages("d2") {
        let warning =
            format!("the state file does not list the decky: decky=d2 file={}", state.display());
        assert!(text.contains("[WARN]") && text.contains(&warning), "{text}");
    }
    std::fs::write(&state, "{").unwrap();
    assert_eq!(messages("d2"), none(), "unreadable state file");
}

#[test]
fn run_beats_until_sigterm_and_exits_0() {
    let fixture = Fixture::new();
    let stats = fixture.path("stats.json");
    let mut child = fixture.run_command().arg("--stats-file").arg(&stats).spawn().unwrap();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    terminate(&child);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(
        log.contains(&fixture.worker.uuid) && log.contains(&fixture.worker.fingerprint),
        "{log}"
    );
    assert!(!log.contains('\u{1b}'), "no colours into a pipe: {log}");
    assert_eq!(json_of(&fixture.master.received()[0])["topology"]["topology_id"], Value::Null);
}

#[test]
fn stats_file_is_rewritten_after_each_beat() {
    let fixture = Fixture::new();
    let stats = fixture.path("stats.json");
    let mut command = fixture.run_command();
    let child = command.args(["--interval", "50ms", "--stats-file"]).arg(&stats).spawn().unwrap();
    assert!(fixture.master.wait_for_beats(5, TIMEOUT));
    terminate(&child);
    child.wait_with_output().unwrap();
    let stats: Value = serde_json::from_slice(&std::fs::read(&stats).unwrap()).unwrap();
    assert_eq!(
        (&stats["host_uuid"], &stats["failure"]),
        (&fixture.worker.uuid.as_str().into(), &Value::Null)
    );
    assert!(stats["beats"].as_u64().unwrap() >= 3, "{stats}");
}

#[test]
fn log_file_gets_the_log() {
    let fixture = Fixture::new();
    let log = fixture.path("heartbeat.log");
    let mut command = fixture.run_command();
    let child = command.args(["--log-level", "debug", "--log-file"]).arg(&log).spawn().unwrap();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    terminate(&child);
    assert_eq!(child.wait_with_output().unwrap().stderr, b"");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("[INFO] (decnet-heartbeat) first beat accepted"), "{log}");
    assert!(!log.contains("ureq") && !log.contains("POST"), "only our own lines: {log}");
}

#[test]
fn certificate_that_expires_within_30_days_is_logged_once_a_day() {
    let fixture = Fixture::new();
    let nine_days = Duration::from_secs(9 * 86_400 + 3_600);
    let issued =
        fixture.master.authority().issue(Role::ShortLived("w".to_owned(), nine_days)).unwrap();
    fixture.master.authority().write_bundle(&issued, &fixture.agent_dir()).unwrap();
    fixture.master.pin(&fixture.worker.uuid, &issued.fingerprint);
    let child = fixture.run_command().args(["--interval", "50ms"]).spawn().unwrap();
    assert!(fixture.master.wait_for_beats(5, TIMEOUT));
    terminate(&child);
    let log = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
    let text: Vec<_> =
        log.lines().filter(|line| line.contains("certificate expires soon")).collect();
    let [text] = text.as_slice() else { panic!("{log}") };
    let expected = format!(
        "[WARN] (decnet-heartbeat) certificate expires soon; enrol this host again: host={} master={} fingerprint={} \
         days_left=9",
        fixture.worker.uuid,
        fixture.master.url(),
        issued.fingerprint
    );
    assert!(text.ends_with(&expected), "{text}");
}

#[test]
fn systemd_is_notified_of_ready_watchdog_and_stopping() {
    let fixture = Fixture::new();
    let socket = fixture.path("notify");
    let systemd = UnixDatagram::bind(&socket).unwrap();
    systemd.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut command = fixture.run_command();
    let mut child =
        command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "100000").spawn().unwrap();
    let receive = || {
        let mut buffer = [0; 100];
        let length = systemd.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap().trim().to_owned()
    };
    assert_eq!(receive(), "READY=1");
    assert_eq!(receive(), "WATCHDOG=1");
    terminate(&child);
    let last = std::iter::repeat_with(receive).find(|text| text != "WATCHDOG=1");
    assert_eq!(last.as_deref(), Some("STOPPING=1"));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn bash_completes_options_and_values() {
    let script = output(program().args(["completions", "bash"]));
    assert_eq!((script.status.code(), script.stderr.as_slice()), (Some(0), &b""[..]));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("completions");
    std::fs::write(&path, script.stdout).unwrap();
    for (typed, expected) in [
        (["check", "--metr"], "--metrics-file"),
        (["--log-level", "w"], "warn"),
        (["--master-identity", "ho"], "host"),
        (["push", "--oper"], "--operation"),
    ] {
        // What bash does when a user types these words and the tabulator key.
        let [before, word] = typed;
        let completion = format!(
            "source {} && COMP_WORDS=(decnet-heartbeat {before} {word}); COMP_CWORD=2; \
             _decnet-heartbeat decnet-heartbeat {word} {before}; echo ${{COMPREPLY[@]}}",
            path.display()
        );
        let completed = output(Command::new("bash").arg("-c").arg(completion));
        let candidates = String::from_utf8_lossy(&completed.stdout);
        assert_eq!(candidates.trim(), expected, "{completed:?}");
    }
    assert_eq!(output(program().args(["completions", "tcsh"])).status.code(), Some(2));
}

#[test]
fn demo_shows_an_outage_fits_80_columns_and_ends_with_next_steps() {
    let mut child =
        program().args(["demo", "--seconds", "5"]).stdout(Stdio::piped()).spawn().unwrap();
    let lines: Vec<_> =
        BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{lines:#?}");
    let position = |part: &str| {
        lines
            .iter()
            .position(|line| line.contains(part))
            .unwrap_or_else(|| panic!("{part}: {lines:#?}"))
    };
    assert!(position("the master stops") < position("beat failed: refused"));
    let row = "the master's row: mutate decky-01 failed (compose exited with 1)";
    assert!(position("the master is running again") < position(row));
    assert!(position("2 deltas delivered, 0 undelivered") < position("Next steps"));
    assert!(position("Next steps") < position("decnet-heartbeat check"));
    let too_long = lines.iter().find(|line| line.chars().count() > 80);
    assert_eq!(too_long, None);
}

#[test]
fn argv_0_is_not_printed() {
    for arguments in [&["push"][..], &["--help"], &["--version"], &["help", "run"]] {
        let output = output(program().arg0("\u{1b}]0;t\u{7}\u{202e}").args(arguments));
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(text.contains("decnet-heartbeat") && !text.contains('\u{202e}'), "{text:?}");
    }
}
