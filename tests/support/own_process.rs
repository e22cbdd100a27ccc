//! Tests that need a process of their own.

use std::process::Command;

/// Runs a test in a process of its own, so that no other test affects its threads, its logger or
/// its working directory. `test` is the test's full name; `work` is its content.
pub fn run_in_own_process(test: &str, work: impl FnOnce()) {
    const CHILD: &str = "DECNET_HEARTBEAT_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return work();
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).env_clear().env(CHILD, "1");
    let output = child.env("DECNET_CONFIG", "/no/such.ini").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}
