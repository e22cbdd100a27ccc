//! The state file at the paths of DECNET's installer and of an editable install.

use std::process::Command;

/// The line of `check` about the state file, on a worker whose files these commands create. It runs
/// in its own mount namespace, in which `/opt` and `/usr/local/bin` are empty before.
fn checked(layout: &str) -> String {
    let script = format!(
        r#"mount --make-rprivate / && mount -t tmpfs none /opt && mount -t tmpfs none /usr/local/bin || exit 1
           {layout}
           exec "$0" --config /nonexistent check --docker-socket /nonexistent"#
    );
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script, env!("CARGO_BIN_EXE_decnet-heartbeat")]);
    let output = command.env_remove("DECNET_HEARTBEAT_STATE_FILE").output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let line = stdout.lines().find(|line| line.contains(" state-file "));
    line.unwrap_or_else(|| panic!("{stdout}{}", String::from_utf8_lossy(&output.stderr)))
        .replace(" state-file    ", " ")
}

/// Creates the installer's files, except for the state file, and enters the folder of the package.
const INSTALLED: &str =
    "mkdir -p /opt/decnet/venv/bin /opt/decnet/venv/lib/python3.11/site-packages/decnet
    touch /opt/decnet/venv/bin/decnet && ln -s /opt/decnet/venv/bin/decnet /usr/local/bin/decnet
    cd /opt/decnet/venv/lib/python3.11/site-packages";

const STATE: &str = r#"echo '{"config": {"mode": "swarm", "deckies": [{"name": "d", "services": []}]}, "compose_path": ""}' > decnet-state.json"#;

#[test]
#[ignore = "needs root, to mount file systems"]
fn state_file_is_found_beside_package() {
    let packages = "/opt/decnet/venv/lib/python3.11/site-packages";
    let found = format!("✓ {packages}/decnet-state.json (found beside {packages}/decnet): ");
    assert_eq!(checked(INSTALLED), format!("{found}does not exist; nothing is deployed"));
    assert_eq!(checked(&format!("{INSTALLED} && {STATE}")), format!("{found}1 decky"));
    // The environment is also found if the command is a copy, or missing.
    for command in
        ["rm /usr/local/bin/decnet && touch /usr/local/bin/decnet", "rm /usr/local/bin/decnet"]
    {
        assert_eq!(
            checked(&format!("{INSTALLED} && {STATE} && {command}")),
            format!("{found}1 decky")
        );
    }
    let editable = format!("mkdir -p /opt/decnet/decnet && cd /opt/decnet && {STATE}");
    let found = "✓ /opt/decnet/decnet-state.json (found beside /opt/decnet/decnet): 1 decky";
    assert_eq!(checked(&editable), found);
    let in_environment =
        format!("{INSTALLED} && rmdir decnet && touch __editable__.decnet.pth && {editable}");
    assert_eq!(checked(&in_environment), found);
}

#[test]
#[ignore = "needs root, to mount file systems"]
fn unknown_path_of_state_file_is_an_error() {
    let not_found = "✗ the state file was not found: DECNET's Python package is not in /usr/local/bin/decnet (it does not \
                   exist), /opt/decnet/venv or /opt/decnet";
    for layout in ["", &format!("mkdir /opt/decnet && cd /opt/decnet && {STATE}")] {
        assert_eq!(checked(layout), not_found);
    }
    let looped = "✗ cannot locate the state file: /usr/local/bin/decnet cannot be accessed: Too many levels of \
                  symbolic links (os error 40)";
    assert_eq!(checked(&format!("{INSTALLED} && ln -sf decnet /usr/local/bin/decnet")), looped);
}
