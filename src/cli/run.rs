//! `run`: beat until a signal comes. The main thread waits for signals, for beats to write the stats and metrics after,
//! and for the time to notify systemd's watchdog if there is one.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded, never, select, tick};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use super::arguments::{Common, RunOptions};
use super::systemd::{self, Systemd};
use super::{enrolment, metrics, outbox};
use crate::error::{Error, printable_path};
use crate::heartbeat::Heartbeat;
use crate::repeats::Repeats;
use crate::stats::Stats;
use crate::text::printable;
use crate::{files, limits};

pub(super) fn run(common: &Common, options: RunOptions) -> Result<(), Error> {
    let signals = signals()?;
    let enrolment = enrolment(common)?;
    let source = options.source(enrolment.agent_dir().value());
    let mut builder = Heartbeat::builder()
        .enrolment(enrolment)
        .status_source(source)
        .interval(options.interval)
        .outbox(outbox(options.outbox));
    if let Some(identity) = common.master_identity {
        builder = builder.master_identity(identity);
    }
    let heartbeat = builder.start()?;
    let mut systemd = Systemd::from_env();
    systemd.ready();
    let reports = [options.stats_file.map(Report::stats), options.metrics_file.map(Report::metrics)];
    let watched = watch(&heartbeat, &signals, reports.into_iter().flatten().collect(), &mut systemd);
    systemd.stopping();
    let host = host(&heartbeat);
    let stopped = heartbeat.stop(limits::RUN_GRACE);
    if stopped.undelivered > 0 {
        log::warn!(
            "stopped with deltas undelivered: host={host} waiting={} kept={}",
            stopped.undelivered,
            stopped.kept
        );
    }
    watched
}

/// Returns when a signal asks for the end, or when there is nothing left to watch.
fn watch(
    heartbeat: &Heartbeat,
    signals: &Receiver<i32>,
    mut reports: Vec<Report>,
    systemd: &mut Systemd,
) -> Result<(), Error> {
    let watchdog = systemd::watchdog().map_or_else(never, tick);
    let beats = heartbeat.beats();
    loop {
        select! {
            recv(signals) -> signal => {
                let signal = signal.ok().and_then(low_level::signal_name).unwrap_or("none");
                log::info!("stopping: host={} signal={signal}", host(heartbeat));
                return Ok(());
            }
            recv(beats) -> beat => match beat {
                Ok(()) => {
                    if !reports.is_empty() {
                        let stats = heartbeat.stats();
                        reports.iter_mut().for_each(|report| report.write(&stats));
                    }
                    systemd.catch_up();
                }
                Err(_) => return Err(Error::setting("heartbeat", "the thread has ended unasked")),
            },
            recv(watchdog) -> _ => if !heartbeat.is_stalled() {
                systemd.alive();
            },
        }
    }
}

/// For the log.
fn host(heartbeat: &Heartbeat) -> String {
    heartbeat.stats().host_uuid.unwrap_or_default()
}

/// `--stats-file` or `--metrics-file`.
struct Report {
    path: PathBuf,
    text: fn(&Stats) -> serde_json::Result<String>,
    /// `None`: what the umask leaves.
    mode: Option<u32>,
    /// The last reason why it could not be written, so that it is logged once.
    problem: Option<String>,
    /// All of them: a file that can be written only now and then is logged less and less often.
    problems: Repeats,
}

impl Report {
    fn stats(path: PathBuf) -> Self {
        Self {
            path,
            text: |stats| serde_json::to_string_pretty(stats).map(|json| json + "\n"),
            mode: None,
            problem: None,
            problems: Repeats::default(),
        }
    }

    /// Whatever the umask is: node_exporter is another user.
    fn metrics(path: PathBuf) -> Self {
        Self {
            path,
            text: |stats| Ok(metrics::text(stats)),
            mode: Some(0o644),
            problem: None,
            problems: Repeats::default(),
        }
    }

    fn write(&mut self, stats: &Stats) {
        let text = (self.text)(stats).map_err(Into::into);
        let written = text.and_then(|text| files::replace(&self.path, text.as_bytes(), self.mode));
        let problem = written.err().map(|error| printable(&error.to_string()));
        if let Some(problem) = problem.as_ref().filter(|problem| self.problem.as_ref() != Some(problem))
            && self.problems.count("stats", problem, Instant::now()).is_some()
        {
            let file = printable_path(&self.path);
            log::warn!("the stats cannot be written: file={file} error={problem:?}");
        }
        self.problem = problem;
    }
}

/// SIGTERM and SIGINT, by way of a thread of their own. The second one ends the program at once.
fn signals() -> Result<Receiver<i32>, Error> {
    const NAME: &str = "signals";
    let failed = |source| Error::setting("signals", "cannot be caught").because(source);
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&asked)).map_err(failed)?;
        signal_hook::flag::register(signal, Arc::clone(&asked)).map_err(failed)?;
    }
    let mut caught = Signals::new([SIGTERM, SIGINT]).map_err(failed)?;
    let (sender, receiver) = bounded(1);
    thread::Builder::new()
        .name(NAME.to_owned())
        .spawn(move || caught.forever().try_for_each(|signal| sender.send(signal)))
        .map_err(|source| Error::thread(NAME, source))?;
    Ok(receiver)
}
