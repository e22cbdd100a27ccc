//! The state file at the places where DECNET's installer, and an editable install, have it.

use std::process::Command;

/// What `check` shows of the state file on a worker that is laid out by these commands. `/opt` and `/usr/local/bin` are
/// empty before, in a mount namespace of its own.
fn shown(layout: &str) -> String {
    let script = format!(
        r#"mount --make-rprivate / && mount -t tmpfs none /opt && mount -t tmpfs none /usr/local/bin || exit 1
           {layout}
           exec "$0" --config /nonexistent check --docker-socket /nonexistent"#
    );
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script, env!("CARGO_BIN_EXE_decnet-heartbeat")]);
    let output = command.env_remove("DECNET_HEARTBEAT_STATE_FILE").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let line = said.lines().find(|line| line.contains(" state-file "));
    line.unwrap_or_else(|| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)))
        .replace(" state-file    ", " ")
}

/// The installer's layout, up to the package.
const INSTALLED: &str =
    "mkdir -p /opt/decnet/venv/bin /opt/decnet/venv/lib/python3.11/site-packages/decnet
    touch /opt/decnet/venv/bin/decnet && ln -s /opt/decnet/venv/bin/decnet /usr/local/bin/decnet
    cd /opt/decnet/venv/lib/python3.11/site-packages";

const STATE: &str = r#"echo '{"config": {"mode": "swarm", "deckies": [{"name": "d", "services": []}]}, "compose_path": ""}' > decnet-state.json"#;

#[test]
#[ignore = "needs root, to mount file systems"]
fn the_state_file_is_found_where_decnet_has_it() {
    let packages = "/opt/decnet/venv/lib/python3.11/site-packages";
    let found = format!("✓ {packages}/decnet-state.json (found beside {packages}/decnet): ");
    assert_eq!(shown(INSTALLED), format!("{found}it does not exist, so nothing is deployed"));
    assert_eq!(shown(&format!("{INSTALLED} && {STATE}")), format!("{found}1 decky"));
    // A copy of the command, and none: the environment is found all the same.
    for command in
        ["rm /usr/local/bin/decnet && touch /usr/local/bin/decnet", "rm /usr/local/bin/decnet"]
    {
        assert_eq!(
            shown(&format!("{INSTALLED} && {STATE} && {command}")),
            format!("{found}1 decky")
        );
    }
    let editable = format!("mkdir -p /opt/decnet/decnet && cd /opt/decnet && {STATE}");
    let found = "✓ /opt/decnet/decnet-state.json (found beside /opt/decnet/decnet): 1 decky";
    assert_eq!(shown(&editable), found);
    let of_environment =
        format!("{INSTALLED} && rmdir decnet && touch __editable__.decnet.pth && {editable}");
    assert_eq!(shown(&of_environment), found);
}

#[test]
#[ignore = "needs root, to mount file systems"]
fn a_state_file_that_is_not_found_is_a_fault_and_not_nothing_deployed() {
    let nowhere = "✗ the state file was not found: DECNET's Python package is not in /usr/local/bin/decnet (it does not \
                   exist), /opt/decnet/venv or /opt/decnet";
    for layout in ["", &format!("mkdir /opt/decnet && cd /opt/decnet && {STATE}")] {
        assert_eq!(shown(layout), nowhere);
    }
    let looped = "✗ cannot locate the state file: /usr/local/bin/decnet cannot be accessed: Too many levels of \
                  symbolic links (os error 40)";
    assert_eq!(shown(&format!("{INSTALLED} && ln -sf decnet /usr/local/bin/decnet")), looped);
}
