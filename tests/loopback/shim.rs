//! `shim`: the tests of the module that it prints are in `shim.py`, and run with the system's Python.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_decnet-heartbeat");

fn printed_module() -> String {
    let printed = Command::new(PROGRAM).arg("shim").output().unwrap();
    assert!(printed.status.success(), "{printed:?}");
    String::from_utf8(printed.stdout).unwrap()
}

fn assert_success(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_printed_module_passes_its_tests() {
    let dir = tempfile::tempdir().unwrap();
    let module = dir.path().join("sitecustomize.py");
    fs::write(&module, printed_module()).unwrap();
    let tests = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/loopback/shim.py");
    assert_success(&Command::new("python3").arg(tests).arg(&module).output().unwrap());
}

/// The indented blocks of the module's first text.
fn documented_commands(module: &str) -> Vec<String> {
    let text = module.split("\"\"\"").nth(1).unwrap();
    let mut blocks = vec![String::new()];
    for line in text.lines() {
        match line.strip_prefix("    ") {
            Some(command) => *blocks.last_mut().unwrap() += &format!("{command}\n"),
            None if blocks.last().unwrap().is_empty() => (),
            None => blocks.push(String::new()),
        }
    }
    blocks.retain(|block| !block.is_empty());
    blocks
}

/// Runs commands with the system's folders in this one, and without systemd.
fn run(commands: &str, root: &Path) {
    let root = root.display();
    let systemctl = "systemctl() { :; }\n";
    let commands = commands
        .replace("> /", &format!("> {root}/"))
        .replace(" /usr", &format!(" {root}/usr"))
        .replace(" /etc", &format!(" {root}/etc"))
        .replace("decnet-heartbeat shim", &format!("{PROGRAM} shim"));
    let script = format!("set -eu\n{systemctl}{commands}");
    assert_success(&Command::new("sh").args(["-c", &script]).output().unwrap());
}

#[test]
fn the_documented_commands_load_the_module_and_go_back() {
    let (dir, module) = (tempfile::tempdir().unwrap(), printed_module());
    let commands = documented_commands(&module);
    let page = include_str!("../../src/docs/operations.md");
    for block in &commands {
        assert!(page.contains(&format!("```sh\n{block}```\n")), "{block}");
    }
    let [load, go_back] = commands.as_slice() else { panic!("{commands:?}") };
    let drop_in = dir.path().join("etc/systemd/system/decnet-agent.service.d/heartbeat.conf");
    run(load, dir.path());
    let path = "/usr/local/lib/decnet-heartbeat";
    let loaded = dir.path().join(path.trim_start_matches('/')).join("sitecustomize.py");
    assert_eq!(fs::read_to_string(loaded).unwrap(), module);
    let expected = format!("[Service]\nEnvironment=PYTHONPATH={path}\n");
    assert_eq!(fs::read_to_string(&drop_in).unwrap(), expected);
    run(go_back, dir.path());
    assert!(!drop_in.exists());
}
