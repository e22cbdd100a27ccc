//! `--stats-file` and `--metrics-file`. The thread `stats-files` writes them after each beat. New
//! stats replace those that are not written yet, so no other thread waits for the disk.

use std::io;
use std::path::PathBuf;
use std::thread;

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

/// The handle of the thread that writes the files.
#[derive(Debug)]
pub(super) struct StatsFiles {
    sender: Sender<Stats>,
    /// The stats that the thread has not taken yet.
    pending: Receiver<Stats>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl StatsFiles {
    /// Fails if a target exists and must not be replaced. A disk that does not answer within
    /// [`limits::STATS_CHECK`] is not an error. `None`: there is no file to write.
    pub(super) fn start(
        stats: Option<PathBuf>,
        metrics: Option<PathBuf>,
        own: OwnFiles,
    ) -> Result<Option<Self>, Error> {
        let mut files: Vec<_> = [stats.map(StatsFile::stats), metrics.map(StatsFile::metrics)]
            .into_iter()
            .flatten()
            .collect();
        if files.is_empty() {
            return Ok(None);
        }
        let (sender, pending) = bounded(1);
        let (check_sender, check_result) = bounded(1);
        let (running, ended) = bounded(0);
        let receiver = pending.clone();
        let work = move || {
            let _running: Sender<()> = running;
            let _ = check_sender.send(files.iter().try_for_each(|file| file.check(&own)));
            for stats in receiver {
                files.iter_mut().for_each(|file| file.write(&stats));
            }
        };
        thread::Builder::new()
            .name(NAME.to_owned())
            .spawn(work)
            .map_err(|source| Error::thread(NAME, source))?;
        check_result.recv_timeout(limits::STATS_CHECK).unwrap_or(Ok(()))?;
        Ok(Some(Self { sender, pending, ended }))
    }

    /// Queues the stats in place of those that are not written yet. Never waits.
    pub(super) fn write(&self, mut stats: Stats) {
        while let Err(TrySendError::Full(returned)) = self.sender.try_send(stats) {
            let _ = self.pending.try_recv();
            stats = returned;
        }
    }

    /// Waits until the last stats are written, at most [`limits::STATS_FINISH`].
    pub(super) fn finish(self) {
        let Self { sender, pending, ended } = self;
        drop((sender, pending));
        let _ = ended.recv_timeout(limits::STATS_FINISH);
    }
}

/// One of the two files.
struct StatsFile {
    option: &'static str,
    path: PathBuf,
    text: fn(&Stats) -> serde_json::Result<String>,
    /// `None`: the umask decides.
    mode: Option<u32>,
    throttle: LogThrottle,
}

impl StatsFile {
    fn stats(path: PathBuf) -> Self {
        let text = |stats: &Stats| {
            serde_json::to_string_pretty(stats).map(|json| escape_json(&json) + "\n")
        };
        Self::new("--stats-file", path, text, None)
    }

    /// Mode 0644 with any umask: node_exporter runs as another user.
    fn metrics(path: PathBuf) -> Self {
        Self::new("--metrics-file", path, |stats| Ok(metrics::text(stats)), Some(0o644))
    }

    fn new(
        option: &'static str,
        path: PathBuf,
        text: fn(&Stats) -> serde_json::Result<String>,
        mode: Option<u32>,
    ) -> Self {
        Self { option, path, text, mode, throttle: LogThrottle::default() }
    }

    /// A missing folder is not an error: it may be mounted later.
    fn check(&self, own: &OwnFiles) -> Result<(), Error> {
        let file = sanitize_path(&self.path);
        if let Some(what) = own.at(self.option, &self.path) {
            let problem = format!("{file} is {what}, which would be replaced; name another file");
            return Err(Error::config(self.option, problem));
        }
        match files::check_replaceable(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                let advice = "name a regular file, or a path that does not exist";
                let problem = format!("{file} cannot be replaced; {advice}");
                Err(Error::config(self.option, problem).with_source(error))
            }
            _ => Ok(()),
        }
    }

    fn write(&mut self, stats: &Stats) {
        let text = (self.text)(stats).map_err(Into::into);
        let written = text.and_then(|text| files::replace(&self.path, text.as_bytes(), self.mode));
        match written {
            Ok(()) => drop(self.throttle.end("stats")),
            Err(error) => {
                let problem = sanitize(&error.to_string());
                self.throttle.log_lasting("stats", &problem, |_| {
                    let file = sanitize_path(&self.path);
                    log::warn!("stats file cannot be written: file={file} error={problem:?}");
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn new_stats_replace_pending_ones_without_waiting() {
        let (sender, pending) = bounded(1);
        let (running, ended) = bounded(0);
        // As if the thread were blocked by its disk: it takes nothing.
        let not_taken = pending.clone();
        let files = StatsFiles { sender, pending, ended };
        for beats in 1..=3 {
            files.write(Stats { beats, ..Stats::default() });
        }
        let start = Instant::now();
        files.finish();
        assert!(start.elapsed() < limits::STATS_FINISH * 20, "{:?}", start.elapsed());
        assert_eq!(not_taken.iter().map(|stats| stats.beats).collect::<Vec<_>>(), [3]);
        drop::<Sender<()>>(running);
    }
}
