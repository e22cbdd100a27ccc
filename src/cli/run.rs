//! `run`: beat until a signal comes. The main thread waits for signals, for beats to write the stats and metrics after,
//! and for the time to pet systemd's watchdog if there is one.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded, never, select, tick};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use super::arguments::{Common, RunOptions};
use super::{enrolment, metrics, outbox};
use crate::error::{Error, printable_path};
use crate::heartbeat::Heartbeat;
use crate::repeats::Repeats;
use crate::stats::Stats;
use crate::text::{escaped_json, printable};
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
    let mut systemd = Systemd::default();
    systemd.tell(&[NotifyState::Ready]);
    let reports = [options.stats_file.map(Report::stats), options.metrics_file.map(Report::metrics)];
    let watched = watch(&heartbeat, &signals, reports.into_iter().flatten().collect(), &mut systemd);
    systemd.tell(&[NotifyState::Stopping]);
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
    let watchdog = sd_notify::watchdog_enabled().map_or_else(never, |limit| tick(limit / 2));
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
                    let stats = heartbeat.stats();
                    reports.iter_mut().for_each(|report| report.write(&stats));
                    if stats.decommissioned {
                        return Err(decommissioned());
                    }
                }
                Err(_) => return Err(Error::setting("heartbeat", "the thread has ended unasked")),
            },
            recv(watchdog) -> _ => if !heartbeat.is_stalled() {
                systemd.tell(&[NotifyState::Watchdog]);
            },
        }
    }
}

/// Nothing that a restart could mend: the answer and the files would be the same.
fn decommissioned() -> Error {
    Error::not_enrolled(
        "this host was decommissioned: its ini and its bundle are gone, and the master does not accept it any more; enrol it \
         again, or remove this program's unit",
    )
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
            text: |stats| serde_json::to_string_pretty(stats).map(|json| escaped_json(&json) + "\n"),
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

/// The supervisor, if it is systemd.
#[derive(Debug, Default)]
struct Systemd {
    problems: Repeats,
}

impl Systemd {
    /// Nothing where there is no systemd. What fails with every notification is logged less and less often.
    fn tell(&mut self, state: &[NotifyState<'_>]) {
        let Err(error) = sd_notify::notify(state) else { return };
        let problem = printable(&error.to_string());
        if let Some(times) = self.problems.count("systemd", &problem, Instant::now()) {
            log::warn!("systemd cannot be told: times={times} error={problem:?}");
        }
    }
}
