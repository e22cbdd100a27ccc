//! The state file that the option or the environment names. Runs on the calling thread.

use std::path::{Path, PathBuf};

use crate::error::sanitize_path;
use crate::status::decnet::DecnetStatus;

/// The environment variable that names the state file.
pub(super) const STATE_FILE_VARIABLE: &str = "DECNET_HEARTBEAT_STATE_FILE";

/// The state file that the environment variable names. An empty variable counts as unset.
pub(super) fn state_file_of_environment() -> Option<PathBuf> {
    std::env::var_os(STATE_FILE_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// DECNET's status, with the state file of the option or the environment variable, if any.
pub(super) fn source(agent_dir: &Path, state_file: Option<&Path>) -> DecnetStatus {
    let source = DecnetStatus::new(agent_dir);
    match state_file.map(Path::to_owned).or_else(state_file_of_environment) {
        Some(path) => source.state_file(path),
        None => source,
    }
}

/// Warns of deckies that the state file does not list: the master probably does not know them
/// either. Does nothing if the state file does not exist or cannot be read.
pub(super) fn warn_of_unlisted<'a>(agent_dir: &Path, deckies: impl IntoIterator<Item = &'a str>) {
    let Some((file, unlisted)) = source(agent_dir, None).unlisted(deckies) else { return };
    for decky in unlisted {
        let file = sanitize_path(&file);
        log::warn!("the state file does not list the decky: decky={decky} file={file}");
    }
}
