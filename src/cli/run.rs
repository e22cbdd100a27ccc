//! `run`: sends heartbeats until a signal stops it. The main thread waits for signals, for beats
//! (after each the stats and metrics are written) and for the next watchdog notification. After the
//! start it does no file I/O, so no disk delays a signal or the watchdog.

use std::time::Instant;

use crossbeam_channel::{Receiver, never, select, tick};
use signal_hook::low_level;

use super::arguments::{Common, RunOptions};
use super::enrolment::{enrolment, outbox};
use super::exit::{NOT_CONFIGURED, code_of};
use super::own_files::OwnFiles;
use super::stats_files::StatsFiles;
use super::systemd::{self, Systemd};
use crate::credentials::enrolment::Enrolment;
use crate::error::Error;
use crate::heartbeat::{Heartbeat, HeartbeatBuilder, Stopped};
use crate::limits;

pub(super) fn run(
    common: &Common,
    options: RunOptions,
    signals: &Receiver<i32>,
) -> Result<(), Error> {
    // First: this error is permanent, the others may be transient.
    let own = OwnFiles::of(common, &options, enrolment(common).ok().as_ref());
    let stats_files =
        StatsFiles::start(options.stats_file.clone(), options.metrics_file.clone(), own)?;
    let start = || start(common, &options);
    let Some(heartbeat) = start_with_retries(signals, start)? else { return Ok(()) };
    let mut systemd = Systemd::from_env();
    systemd.ready();
    let result = watch(&heartbeat, signals, stats_files.as_ref(), &mut systemd);
    systemd.stopping();
    let host = host(&heartbeat);
    warn_of_undelivered(&host, &heartbeat.stop(limits::RUN_GRACE));
    if let Some(files) = stats_files {
        files.finish();
    }
    result
}

pub(super) fn warn_of_undelivered(host: &str, stopped: &Stopped) {
    if stopped.undelivered > 0 {
        log::warn!(
            "stopped with undelivered deltas: host={host} waiting={} durable={}",
            stopped.undelivered,
            stopped.durable
        );
    }
}

/// Reports a configuration error only after it has lasted for [`limits::ENROLMENT_RETRY`]: an
/// enrolment removes files and writes them again. `None`: a signal requested the end meanwhile.
pub(super) fn start_with_retries<T>(
    signals: &Receiver<i32>,
    start: impl Fn() -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    let end = Instant::now() + limits::ENROLMENT_RETRY;
    loop {
        match start() {
            Err(error) if code_of(&error) == NOT_CONFIGURED && Instant::now() < end => (),
            result => return result.map(Some),
        }
        if signals.recv_timeout(limits::ENROLMENT_PAUSE).is_ok() {
            return Ok(None);
        }
    }
}

fn start(common: &Common, options: &RunOptions) -> Result<Heartbeat, Error> {
    let enrolment = enrolment(common)?;
    let source = options.source(enrolment.agent_dir().value());
    builder(common, options, enrolment).status_source(source).start()
}

/// A heartbeat with these options, without its status source.
pub(super) fn builder(
    common: &Common,
    options: &RunOptions,
    enrolment: Enrolment,
) -> HeartbeatBuilder {
    let builder = Heartbeat::builder()
        .enrolment(enrolment)
        .interval(options.interval)
        .outbox(outbox(options.outbox.clone()));
    let builder = match &options.agent_version {
        Some(version) => builder.agent_version(version),
        None => builder,
    };
    match common.master_identity {
        Some(identity) => builder.master_identity(identity),
        None => builder,
    }
}

/// Returns when a signal requests the end, when the host is decommissioned, or when the heartbeat
/// thread has ended.
fn watch(
    heartbeat: &Heartbeat,
    signals: &Receiver<i32>,
    stats_files: Option<&StatsFiles>,
    systemd: &mut Systemd,
) -> Result<(), Error> {
    let watchdog = systemd::watchdog_interval().map_or_else(never, tick);
    let beats = heartbeat.beats();
    loop {
        let ready = systemd.next_ready();
        select! {
            recv(signals) -> signal => {
                let signal = signal.ok().and_then(low_level::signal_name).unwrap_or("none");
                log::info!("stopping: host={} signal={signal}", host(heartbeat));
                return Ok(());
            }
            recv(beats) -> beat => match beat {
                Ok(()) => {
                    let stats = heartbeat.stats();
                    let is_decommissioned = stats.decommissioned;
                    if let Some(files) = stats_files {
                        files.write(stats);
                    }
                    if is_decommissioned {
                        return Err(decommissioned());
                    }
                    systemd.retry_ready();
                }
                Err(_) => return Err(heartbeat_ended()),
            },
            recv(ready) -> _ => systemd.retry_ready(),
            recv(watchdog) -> _ => if !heartbeat.is_stalled() {
                systemd.alive();
            },
        }
    }
}

pub(super) fn heartbeat_ended() -> Error {
    Error::setting("heartbeat", "its thread ended unexpectedly")
}

/// A restart does not help: the answer and the files would be the same.
pub(super) fn decommissioned() -> Error {
    Error::not_enrolled(
        "this host was decommissioned: its ini and its bundle do not exist, and the master \
         rejects it; enrol it again, or remove this program's unit",
    )
}

/// The host's uuid, for the log.
fn host(heartbeat: &Heartbeat) -> String {
    heartbeat.stats().host_uuid.unwrap_or_default()
}
