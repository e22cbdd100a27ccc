//! `--stats-file` and `--metrics-file`: written after each beat by a thread of their own, `stats-files`. The newest stats
//! replace those that wait, and nobody waits for a disk.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use super::metrics;
use super::own_files::OwnFiles;
use crate::error::{Error, sanitize_path};
use crate::files;
use crate::limits;
use crate::log_throttle::LogThrottle;
use crate::stats::Stats;
use crate::text::{escape_json, sanitize};

const NAME: &str = "stats-files";

/// The files, if there are any.
#[derive(Debug)]
pub(super) struct StatsFiles {
    newest: Sender<Stats>,
    /// What the thread has not taken yet.
    waiting: Receiver<Stats>,
    /// Disconnected when the thread has ended.
    end: Receiver<()>,
}

impl StatsFiles {
    /// An existing target that must not be replaced is an error. A disk that does not answer in time is none.
    pub(super) fn start(
        stats: Option<PathBuf>,
        metrics: Option<PathBuf>,
        own: OwnFiles,
    ) -> Result<Option<Self>, Error> {
        let files: Vec<_> = [stats.map(StatsFile::stats), metrics.map(StatsFile::metrics)]
            .into_iter()
            .flatten()
            .collect();
        if files.is_empty() {
            return Ok(None);
        }
        let (newest, waiting) = bounded(1);
        let (checks, checked) = bounded(1);
        let (running, end) = bounded(0);
        let taken = waiting.clone();
        let work = move || {
            let _running: Sender<()> = running;
            let _ = checks.send(files.iter().try_for_each(|file| file.check(&own)));
            write_each(files, &taken);
        };
        thread::Builder::new()
            .name(NAME.to_owned())
            .spawn(work)
            .map_err(|source| Error::thread(NAME, source))?;
        checked.recv_timeout(limits::STATS_CHECK).unwrap_or(Ok(()))?;
        Ok(Some(Self { newest, waiting, end }))
    }

    /// Never waits.
    pub(super) fn write(&self, mut stats: Stats) {
        while let Err(TrySendError::Full(newer)) = self.newest.try_send(stats) {
            let _ = self.waiting.try_recv();
            stats = newer;
        }
    }

    /// Waits a moment until what was given last is written.
    pub(super) fn finish(self) {
        let Self { newest, waiting, end } = self;
        drop((newest, waiting));
        let _ = end.recv_timeout(limits::STATS_FINISH);
    }
}

fn write_each(mut files: Vec<StatsFile>, stats: &Receiver<Stats>) {
    for stats in stats {
        files.iter_mut().for_each(|file| file.write(&stats));
    }
}

/// One of the two.
struct StatsFile {
    option: &'static str,
    path: PathBuf,
    text: fn(&Stats) -> serde_json::Result<String>,
    /// `None`: what the umask leaves.
    mode: Option<u32>,
    /// The last reason why it could not be written, so that it is logged once.
    problem: Option<String>,
    /// All of them: a file that can be written only now and then is logged less and less often.
    problems: LogThrottle,
}

impl StatsFile {
    fn stats(path: PathBuf) -> Self {
        let text = |stats: &Stats| {
            serde_json::to_string_pretty(stats).map(|json| escape_json(&json) + "\n")
        };
        Self::new("--stats-file", path, text, None)
    }

    /// Whatever the umask is: node_exporter is another user.
    fn metrics(path: PathBuf) -> Self {
        Self::new("--metrics-file", path, |stats| Ok(metrics::text(stats)), Some(0o644))
    }

    fn new(
        option: &'static str,
        path: PathBuf,
        text: fn(&Stats) -> serde_json::Result<String>,
        mode: Option<u32>,
    ) -> Self {
        Self { option, path, text, mode, problem: None, problems: LogThrottle::default() }
    }

    /// A folder that is not there yet is no error: it may be mounted later.
    fn check(&self, own: &OwnFiles) -> Result<(), Error> {
        if let Some(what) = own.at(self.option, &self.path) {
            let problem = format!(
                "{} is {what}, which would be replaced; name another file",
                sanitize_path(&self.path)
            );
            return Err(Error::config(self.option, problem));
        }
        match files::replaceable(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                Err(refused(self.option, &self.path, error))
            }
            _ => Ok(()),
        }
    }

    fn write(&mut self, stats: &Stats) {
        let text = (self.text)(stats).map_err(Into::into);
        let written = text.and_then(|text| files::replace(&self.path, text.as_bytes(), self.mode));
        let problem = written.err().map(|error| sanitize(&error.to_string()));
        if let Some(problem) =
            problem.as_ref().filter(|problem| self.problem.as_ref() != Some(problem))
            && self.problems.count("stats", problem, Instant::now()).is_some()
        {
            let file = sanitize_path(&self.path);
            log::warn!("the stats cannot be written: file={file} error={problem:?}");
        }
        self.problem = problem;
    }
}

fn refused(option: &str, path: &Path, error: io::Error) -> Error {
    let problem = format!(
        "{} cannot be used; name a regular file, or a path where nothing is",
        sanitize_path(path)
    );
    Error::config(option, problem).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_stats_replace_those_that_wait_and_nobody_waits() {
        let (newest, waiting) = bounded(1);
        let (running, end) = bounded(0);
        // A thread that a disk holds up takes nothing.
        let taken = waiting.clone();
        let files = StatsFiles { newest, waiting, end };
        for beats in 1..=3 {
            files.write(Stats { beats, ..Stats::default() });
        }
        let start = Instant::now();
        files.finish();
        assert!(start.elapsed() < limits::STATS_FINISH * 20, "{:?}", start.elapsed());
        assert_eq!(taken.iter().map(|stats| stats.beats).collect::<Vec<_>>(), [3]);
        drop::<Sender<()>>(running);
    }
}
