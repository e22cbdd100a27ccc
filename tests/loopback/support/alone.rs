//! Tests that need a process of their own.

use std::process::Command;

/// This test (its whole name) once more, alone in a process of its own: for its threads, its logger or its folder.
pub fn alone(test: &str, work: impl FnOnce()) {
    const CHILD: &str = "DECNET_HEARTBEAT_TEST_ALONE";
    if std::env::var_os(CHILD).is_some() {
        return work();
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).env_clear().env(CHILD, "1");
    let output = child.env("DECNET_CONFIG", "/no/such.ini").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}
