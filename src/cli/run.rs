//! `run`: beat until a signal comes. The main thread waits for signals, for beats to write the stats after, and for
//! the time to pet systemd's watchdog if there is one.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use crossbeam_channel::{Receiver, bounded, never, select, tick};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{Common, RunOptions, enrolment, outbox};
use crate::error::{Error, printable_path};
use crate::heartbeat::Heartbeat;
use crate::stats::Stats;
use crate::status::decnet::DecnetStatus;
use crate::{files, limits};

pub(super) fn run(common: &Common, options: RunOptions) -> Result<(), Error> {
    let signals = signals()?;
    let enrolment = enrolment(common)?;
    let source = DecnetStatus::new(enrolment.agent_dir().value())
        .state_file(options.state_file)
        .docker_socket(options.docker_socket);
    let mut builder = Heartbeat::builder()
        .enrolment(enrolment)
        .status_source(source)
        .interval(options.interval)
        .outbox(outbox(options.outbox));
    if let Some(identity) = common.master_identity {
        builder = builder.master_identity(identity);
    }
    let heartbeat = builder.start()?;
    tell_systemd(&[NotifyState::Ready]);
    let watched = watch(&heartbeat, &signals, options.stats_file);
    tell_systemd(&[NotifyState::Stopping]);
    let stopped = heartbeat.stop(limits::RUN_GRACE);
    if stopped.undelivered > 0 {
        log::warn!("stopped with deltas undelivered: waiting={} kept={}", stopped.undelivered, stopped.kept);
    }
    watched
}

/// Returns when a signal asks for the end, or when there is nothing left to watch.
fn watch(heartbeat: &Heartbeat, signals: &Receiver<i32>, stats_file: Option<PathBuf>) -> Result<(), Error> {
    let watchdog = sd_notify::watchdog_enabled().map_or_else(never, |limit| tick(limit / 2));
    let beats = heartbeat.beats();
    let mut stats_file = stats_file.map(StatsFile::new);
    loop {
        select! {
            recv(signals) -> signal => {
                log::info!("stopping: signal={}", signal.unwrap_or_default());
                return Ok(());
            }
            recv(beats) -> beat => match (beat, &mut stats_file) {
                (Ok(()), Some(file)) => file.write(&heartbeat.stats()),
                (Ok(()), None) => (),
                (Err(_), _) => return Err(Error::setting("heartbeat", "the thread has ended unasked")),
            },
            recv(watchdog) -> _ => if !heartbeat.is_stalled() {
                tell_systemd(&[NotifyState::Watchdog]);
            },
        }
    }
}

/// `--stats-file`.
struct StatsFile {
    path: PathBuf,
    /// A file that cannot be written is said once.
    said: bool,
}

impl StatsFile {
    fn new(path: PathBuf) -> Self {
        Self { path, said: false }
    }

    fn write(&mut self, stats: &Stats) {
        let json = serde_json::to_vec_pretty(stats).map_err(Into::into);
        let written = json.and_then(|json| files::replace(&self.path, &json));
        if let Err(error) = &written
            && !self.said
        {
            log::warn!("the stats cannot be written: file={} error={error}", printable_path(&self.path));
        }
        self.said = written.is_err();
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

/// Nothing where there is no systemd.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::warn!("systemd cannot be told: error={error}");
    }
}
