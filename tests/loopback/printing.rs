//! What the program prints: nothing that was given reaches a terminal raw, and an answer that cannot be printed is no success.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::{Command, Output, Stdio};

use crate::program::{program, run};
use crate::support::{PATIENCE, Stage};

/// Characters that do something to a terminal, hide, or reorder; and bytes that are no text.
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

/// What it printed, which must be text without any such character.
fn printed(output: &Output) -> String {
    safe(&[output.stdout.as_slice(), output.stderr.as_slice()].concat())
}

/// The text, which must be without any such character.
fn safe(text: &[u8]) -> String {
    let said = String::from_utf8(text.to_vec()).unwrap();
    let is_raw = |c: char| c != '\n' && c.is_control();
    let hidden = ['\u{202e}', '\u{ad}', '\u{3164}', '\u{fff9}', '\u{e0041}'];
    assert!(!said.contains(is_raw) && !said.contains(hidden), "{said:?}");
    assert!(!said.lines().any(|line| line.starts_with("INJECTED")), "{said}");
    said
}

#[test]
fn no_argument_reaches_a_terminal_as_it_was_given() {
    let before = |prefix: &str, raw: &[u8]| {
        OsString::from_vec([prefix.as_bytes(), raw, b"x\nINJECTED"].concat())
    };
    for raw in RAW {
        for arguments in [
            vec![before("", raw)],
            vec![before("--", raw)],
            vec![before("-", raw)],
            vec![before("--interval=", raw), "run".into()],
            vec!["run".into(), "--interval".into(), before("1", raw)],
            vec!["run".into(), "--interval".into(), before("1s", raw)],
            vec!["run".into(), before("--", raw)],
            vec!["run".into(), before("", raw)],
            vec!["run".into(), before("--intervall=", raw)],
            vec!["--log-level".into(), before("", raw), "run".into()],
            vec!["--master-identity".into(), before("sha256:", raw), "run".into()],
            vec!["demo".into(), "--seconds".into(), before("", raw)],
            vec!["completions".into(), before("bas", raw)],
            vec!["push".into(), "--operation".into(), before("", raw)],
            vec![
                "push".into(),
                "--operation=deploy".into(),
                "--status".into(),
                before("succeede", raw),
            ],
            vec![
                "push".into(),
                "--operation=deploy".into(),
                "--status=failed".into(),
                before("d", raw),
            ],
            vec![
                "track".into(),
                "--operation=deploy".into(),
                "--decky".into(),
                before("d", raw),
                "--".into(),
                "x".into(),
            ],
            vec!["help".into(), before("", raw)],
        ] {
            let output = output(program().args(&arguments));
            printed(&output);
            assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        }
    }
}

#[test]
fn no_path_and_no_error_reaches_a_terminal_as_it_is() {
    let stage = Stage::new();
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    for raw in RAW {
        let path = stage.dir.path().join(OsStr::from_bytes(raw));
        fs::write(&path, "neither an ini nor an outbox, and long enough to be looked at").unwrap();
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
        let config = ["--config".into(), stage.dir.path().join("decnet.ini").into_os_string()];
        for json in [&["check"][..], &["check", "--json"]] {
            let mut command = with(&config, json);
            for option in
                ["--outbox", "--state-file", "--docker-socket", "--stats-file", "--metrics-file"]
            {
                command.arg(option).arg(&path);
            }
            let said = printed(&output(&mut command));
            assert!(said.contains("outbox"), "{said}");
        }
        let mut track = with(&config, &["track", "--operation", "deploy", "--decky", "d", "--"]);
        let ran = output(track.arg(path.join("x")).env("DECNET_HEARTBEAT_STATE_FILE", &path));
        assert!(matches!(ran.status.code(), Some(126 | 127)), "{ran:?}");
        printed(&ran);
    }
}

#[test]
fn no_path_is_raw_in_the_stats_file() {
    let stage = Stage::new();
    let outbox = stage.dir.path().join("\u{9b}31m\u{202e}\u{ad}\u{e0041}");
    let stats = stage.dir.path().join("stats.json");
    let mut run = run(&stage.worker, stage.dir.path());
    run.args(["--interval", "50ms", "--outbox"])
        .arg(&outbox)
        .arg("--stats-file")
        .arg(&stats)
        .stderr(Stdio::null());
    let mut run = run.spawn().unwrap();
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    run.kill().unwrap();
    run.wait().unwrap();
    let written = fs::read(&stats).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&written).unwrap();
    assert_eq!(json["outbox"], outbox.to_str().unwrap());
    safe(&written);
}

fn with(before: &[OsString], after: &[&str]) -> Command {
    let mut command = program();
    command.args(before).args(after);
    command
}

/// The commands whose answer is all that they are for.
fn answers(stage: &Stage) -> Vec<Command> {
    let ini = stage.dir.path().join("decnet.ini");
    stage.worker.write_ini(&ini).unwrap();
    let config = ["--config".into(), ini.into_os_string()];
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
fn an_answer_that_cannot_be_printed_is_1_and_says_so() {
    let stage = Stage::new();
    for mut command in answers(&stage) {
        let output = output(command.stdout(File::options().write(true).open("/dev/full").unwrap()));
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        let expected = "decnet-heartbeat: the answer could not be printed: No space left on device (os error 28)\n";
        assert_eq!(said, expected, "{command:?}");
    }
}

#[test]
fn an_answer_that_nobody_reads_is_1_and_no_complaint() {
    let stage = Stage::new();
    for mut command in answers(&stage) {
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
fn a_full_stderr_changes_no_exit_code() {
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
