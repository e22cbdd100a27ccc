//! The files that the heartbeat itself reads or writes. `--stats-file` and `--metrics-file` are
//! replaced after every beat, so neither may name one of these: the key or the outbox would be
//! lost. Runs on the calling thread.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::arguments::{Common, RunOptions};
use super::enrolment::outbox;
use super::state_file::state_file_of_environment;
use crate::credentials::bundle;
use crate::credentials::enrolment::Enrolment;
use crate::files::{beside, folder};
use crate::status::decnet::TOPOLOGY;

/// The suffixes of an outbox's files.
pub(super) const OUTBOX_SUFFIXES: [&str; 5] = ["", "-journal", "-wal", "-shm", "-lock"];

/// The suffix of the wake socket, which is no regular file.
const WAKE_SUFFIX: &str = "-wake";

/// Each file with its description.
#[derive(Clone, Debug)]
pub(super) struct OwnFiles(Vec<(&'static str, PathBuf)>);

impl OwnFiles {
    /// Without an enrolment, only the files of the command line and the environment.
    pub(super) fn of(common: &Common, options: &RunOptions, enrolment: Option<&Enrolment>) -> Self {
        let mut files = Vec::new();
        let named = [
            ("--stats-file", &options.stats_file),
            ("--metrics-file", &options.metrics_file),
            ("--log-file", &common.log_file),
            ("--config", &common.config),
            ("the state file", &options.state_file),
            ("the state file", &state_file_of_environment()),
        ];
        files.extend(named.into_iter().filter_map(|(what, path)| Some((what, path.clone()?))));
        let agent_dir = enrolment.map(|enrolment| enrolment.agent_dir().value());
        if let Some(dir) = agent_dir {
            let names = [bundle::CA, bundle::CERTIFICATE, bundle::KEY, TOPOLOGY];
            files.extend(names.map(|name| (name, dir.join(name))));
        }
        files.extend(enrolment.and_then(Enrolment::ini).map(|ini| ("the ini", ini.to_owned())));
        let location = outbox(options.outbox.clone());
        if let Some(file) = location.path(agent_dir.map_or(Path::new(""), PathBuf::as_path)) {
            files.extend(OUTBOX_SUFFIXES.map(|suffix| ("the outbox", beside(&file, suffix))));
            files.push(("the outbox", beside(&file, WAKE_SUFFIX)));
        }
        Self(files)
    }

    /// The description of the file that `path`, the value of `option`, would replace.
    pub(super) fn at(&self, option: &str, path: &Path) -> Option<&'static str> {
        let entry = entry(path);
        let mut others = self.0.iter().filter(|(what, _)| *what != option);
        others.find(|(_, file)| self::entry(file) == entry).map(|(what, _)| *what)
    }
}

/// The canonical folder and the name in it: replacing a file replaces this directory entry.
fn entry(path: &Path) -> (PathBuf, Option<&OsStr>) {
    let folder = folder(path);
    (fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned()), path.file_name())
}
