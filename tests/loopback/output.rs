//! The program's output: input is escaped before it is printed, and output that cannot be printed
//! is a failure.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::{Command, Output, Stdio};

use crate::support::{ChildProcess, Fixture, TIMEOUT, program};

/// Control characters, invisible characters, characters that change the order of text, and bytes
/// that are not UTF-8.
const RAW: [&[u8]; 10] = [
    b"\x1b]0;t\x07",
    b"\r",
    b"\x7f",
    "\u{9b}31m".as_bytes(),
    "\u{202e}".as_bytes(),
    "\u{ad}".as_bytes(),
    "\u{3164}".as_bytes(),
    "\u{fff9}".as_bytes(),
    "\u{e0041}".as_bytes(),
    b"\xff\xfe\x9b",
];

fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

/// The printed text. Asserts that it contains no such character.
fn printed(output: &Output) -> String {
    assert_escaped(&[output.stdout.as_slice(), output.stderr.as_slice()].concat())
}

fn assert_escaped(text: &[u8]) -> String {
    let text = String::from_utf8(text.to_vec()).unwrap();
    let is_control = |c: char| c != '\n' && c.is_control();
    let hidden = ['\u{202e}', '\u{ad}', '\u{3164}', '\u{fff9}', '\u{e0041}'];
    assert!(!text.contains(is_control) && !text.contains(hidden), "{text:?}");
    assert!(!text.lines().any(|line| line.starts_with("INJECTED")), "{text}");
    text
}

#[test]
fn arguments_are_escaped_in_output() {
    let argument = |prefix: &str, raw: &[u8]| {
        OsString::from_vec([prefix.as_bytes(), raw, b"x\nINJECTED"].concat())
    };
    for raw in RAW {
        for arguments in [
            vec![argument("", raw)],
            vec![argument("--", raw)],
            vec![argument("-", raw)],
            vec![argument("--interval=", raw), "run".into()],
            vec!["run".into(), "--interval".into(), argument("1", raw)],
            vec!["run".into(), "--interval".into(), argument("1s", raw)],
            vec!["run".into(), argument("--", raw)],
            vec!["run".into(), argument("", raw)],
            vec!["run".into(), argument("--intervall=", raw)],
            vec!["--log-level".into(), argument("", raw), "run".into()],
            vec!["--master-identity".into(), argument("sha256:", raw), "run".into()],
            vec!["demo".into(), "--seconds".into(), argument("", raw)],
            vec!["completions".into(), argument("bas", raw)],
            vec!["push".into(), "--operation".into(), argument("", raw)],
            vec![
                "push".into(),
                "--operation=deploy".into(),
                "--status".into(),
                argument("succeede", raw),
            ],
            vec![
                "push".into(),
                "--operation=deploy".into(),
                "--status=failed".into(),
                argument("d", raw),
            ],
            vec![
                "track".into(),
                "--operation=deploy".into(),
                "--decky".into(),
                argument("d", raw),
                "--".into(),
                "x".into(),
            ],
            vec!["help".into(), argument("", raw)],
        ] {
            let output = output(program().args(&arguments));
            printed(&output);
            assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        }
    }
}

#[test]
fn paths_and_errors_are_escaped_in_output() {
    let fixture = Fixture::new();
    fixture.write_ini();
    for raw in RAW {
        let path = fixture.path(OsStr::from_bytes(raw));
        fs::write(&path, "neither an ini nor an outbox, and long enough to be read").unwrap();
        let config = ["--config".into(), path.clone().into_os_string()];
        for mut command in [
            with(&config, &["run"]),
            with(&config, &["check"]),
            with(&config, &["check", "--json"]),
            with(&config, &["push", "--operation", "deploy", "--status", "succeeded", "d"]),
        ] {
            assert_eq!(output(&mut command).status.code(), Some(78));
            printed(&output(&mut command));
        }
        let config = ["--config".into(), fixture.ini().into_os_string()];
        for json in [&["check"][..], &["check", "--json"]] {
            let mut command = with(&config, json);
            for option in
                ["--outbox", "--state-file", "--docker-socket", "--stats-file", "--metrics-file"]
            {
                command.arg(option).arg(&path);
            }
            let text = printed(&output(&mut command));
            assert!(text.contains("outbox"), "{text}");
        }
        let mut track = with(&config, &["track", "--operation", "deploy", "--decky", "d", "--"]);
        let ran = output(track.arg(path.join("x")).env("DECNET_HEARTBEAT_STATE_FILE", &path));
        assert!(matches!(ran.status.code(), Some(126 | 127)), "{ran:?}");
        printed(&ran);
    }
}

#[test]
fn paths_are_escaped_in_the_stats_file() {
    let fixture = Fixture::new();
    let outbox = fixture.path("\u{9b}31m\u{202e}\u{ad}\u{e0041}");
    let stats = fixture.path("stats.json");
    let mut run = fixture.run_command();
    run.args(["--interval", "50ms", "--outbox"])
        .arg(&outbox)
        .arg("--stats-file")
        .arg(&stats)
        .stderr(Stdio::null());
    let run = ChildProcess::start(&mut run);
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    drop(run);
    let written = fs::read(&stats).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&written).unwrap();
    assert_eq!(json["outbox"], outbox.to_str().unwrap());
    assert_escaped(&written);
}

fn with(options: &[OsString], arguments: &[&str]) -> Command {
    let mut command = program();
    command.args(options).args(arguments);
    command
}

/// The commands whose only purpose is their output.
fn printing_commands(fixture: &Fixture) -> Vec<Command> {
    fixture.write_ini();
    let config = ["--config".into(), fixture.ini().into_os_string()];
    [
        &["check"][..],
        &["check", "--json"],
        &["demo", "--seconds", "5"],
        &["completions", "bash"],
        &["--help"],
        &["--version"],
    ]
    .map(|arguments| with(&config, arguments))
    .into()
}

#[test]
fn failed_print_exits_1_with_an_error() {
    let fixture = Fixture::new();
    for mut command in printing_commands(&fixture) {
        let output = output(command.stdout(File::options().write(true).open("/dev/full").unwrap()));
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        let expected = "decnet-heartbeat: the output could not be printed: No space left on device (os error 28)\n";
        assert_eq!(text, expected, "{command:?}");
    }
}

#[test]
fn closed_stdout_exits_1_without_an_error() {
    let fixture = Fixture::new();
    for mut command in printing_commands(&fixture) {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = output(command.stdout(writer));
        assert_eq!(
            (output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()),
            (Some(1), ""),
            "{command:?}"
        );
    }
}

#[test]
fn full_stderr_does_not_change_the_exit_code() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for (arguments, code) in [
        (&["run", "--interval", "x"][..], 2),
        (&["--nonsense"], 2),
        (&[], 2),
        (&["--config", "/nonexistent/decnet.ini", "run"], 78),
        (&["--config", "/nonexistent/decnet.ini", "check"], 78),
    ] {
        let status =
            program().args(arguments).stdout(Stdio::null()).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{arguments:?}");
    }
}
