//! `pipe`: a heartbeat for an agent in any language, which starts this program as its child and
//! speaks JSON-RPC 2.0 with it, one message a line.
//!
//! - The main thread waits for signals, for the end of stdin and for beats. It never waits for a
//!   file.
//! - The thread `pipe` ([`conversation`]) reads requests and writes answers.
//! - The three threads of the heartbeat do the rest. An agent that does not read its answers stops
//!   the reading of its requests, and neither the beats nor the stop.
//!
//! While another process delivers from the outbox, no beat is sent: requests only add to that
//! outbox. The heartbeat starts when that process has ended.

mod conversation;
mod lines;
mod messages;
mod session;
mod status;

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, after, never, select, tick};
use signal_hook::low_level;

use super::arguments::{Common, RunOptions};
use super::enrolment::enrolment;
use super::own_files::OwnFiles;
use super::run::{
    builder, decommissioned, heartbeat_ended, start_with_retries, warn_of_undelivered,
};
use super::stats_files::StatsFiles;
use crate::error::Error;
use crate::heartbeat::Heartbeat;
use crate::heartbeat::prepared::PreparedHeartbeat;
use crate::limits;
use conversation::Conversation;
use session::Session;
use status::{AgentStatus, PipeSource};

pub(super) fn pipe(
    common: &Common,
    options: RunOptions,
    signals: &Receiver<i32>,
) -> Result<(), Error> {
    // First: this error is permanent, the others may be transient.
    let own = OwnFiles::of(common, &options, enrolment(common).ok().as_ref());
    let stats_files =
        StatsFiles::start(options.stats_file.clone(), options.metrics_file.clone(), own)?;
    let status = AgentStatus::default();
    let prepare = || prepare(common, &options, &status);
    let Some(prepared) = start_with_retries(signals, prepare)? else { return Ok(()) };
    let session = Arc::new(Session::new(&prepared, status));
    let conversation = Conversation::start(Arc::clone(&session))?;
    let mut pipe = Pipe {
        prepared: Some(prepared),
        heartbeat: None,
        session,
        ended: conversation.stdin_ended.clone(),
        signals: signals.clone(),
        grace: None,
        judge: after(limits::RESUME_TIME),
        look: tick(options.interval),
        stats_files,
    };
    let result = pipe.start_if_free().and_then(|()| pipe.watch());
    conversation.finish();
    if matches!(result, Ok(End::Stdin)) {
        pipe.session.fail_open_operations();
    }
    let result = result.and_then(|_| pipe.take_over());
    pipe.stop();
    result
}

/// Opens the outbox and loads the credentials.
fn prepare(
    common: &Common,
    options: &RunOptions,
    status: &AgentStatus,
) -> Result<PreparedHeartbeat, Error> {
    let enrolment = enrolment(common)?;
    let decnet = options.source(enrolment.agent_dir().value());
    let source = PipeSource { agent: status.clone(), decnet };
    builder(common, options, enrolment).status_source(source).prepare_to_resume()
}

/// Why the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The agent has ended, or has closed its end of stdin.
    Stdin,
    /// A signal requested it, and the agent has not closed stdin by the end of the grace or until a
    /// second signal. The agent may be running, and may resume its operations.
    Signal,
}

/// What wakes the main thread.
enum Event {
    Signal(i32),
    StdinEnded,
    GraceEnded,
    BeatEnded,
    HeartbeatEnded,
    /// The outbox is to be maintained.
    MaintenanceDue,
    /// Delivery may have begun.
    OutboxChanged,
}

/// The main thread's part.
struct Pipe {
    /// While another process delivers.
    prepared: Option<PreparedHeartbeat>,
    /// While no other process delivers.
    heartbeat: Option<Heartbeat>,
    session: Arc<Session>,
    /// Disconnected when stdin has ended.
    ended: Receiver<()>,
    signals: Receiver<i32>,
    /// After a signal: when stdin is no longer read.
    grace: Option<Receiver<Instant>>,
    /// Once: when operations of processes that have ended are reported failed.
    judge: Receiver<Instant>,
    /// How often it is checked whether the other process still delivers.
    look: Receiver<Instant>,
    stats_files: Option<StatsFiles>,
}

impl Pipe {
    fn watch(&mut self) -> Result<End, Error> {
        loop {
            match self.next_event() {
                Event::StdinEnded => return Ok(End::Stdin),
                Event::GraceEnded => return Ok(End::Signal),
                Event::HeartbeatEnded => return Err(heartbeat_ended()),
                Event::Signal(_) if self.grace.is_some() => return Ok(End::Signal),
                Event::Signal(signal) => self.begin_to_stop(signal),
                Event::BeatEnded => self.record_beat()?,
                Event::MaintenanceDue => self.maintain()?,
                // Another event may have left no room for the one that delivery has begun.
                Event::OutboxChanged => self.start_if_free()?,
            }
        }
    }

    fn next_event(&self) -> Event {
        let beats = self.heartbeat.as_ref().map_or_else(never, Heartbeat::beats);
        let grace = self.grace.clone().unwrap_or_else(never);
        let prepared = self.prepared.as_ref();
        let outbox_events = prepared.map_or_else(never, |prepared| prepared.events().clone());
        // A heartbeat that beats maintains the outbox itself.
        let look = prepared.map_or_else(never, |_| self.look.clone());
        select! {
            recv(self.ended) -> _ => Event::StdinEnded,
            recv(self.signals) -> signal => Event::Signal(signal.unwrap_or_default()),
            recv(grace) -> _ => Event::GraceEnded,
            recv(beats) -> beat => beat.map_or(Event::HeartbeatEnded, |()| Event::BeatEnded),
            recv(self.judge) -> _ => Event::MaintenanceDue,
            recv(look) -> _ => Event::MaintenanceDue,
            recv(outbox_events) -> event => {
                event.map_or(Event::HeartbeatEnded, |_| Event::OutboxChanged)
            }
        }
    }

    /// The supervisor may have stopped the agent, too, which still writes how its operations end.
    fn begin_to_stop(&mut self, signal: i32) {
        let host = self.session.stats().host_uuid.unwrap_or_default();
        let signal = low_level::signal_name(signal).unwrap_or("none");
        log::info!("stopping at the end of stdin: host={host} signal={signal}");
        self.grace = Some(after(limits::RUN_GRACE));
    }

    fn record_beat(&self) -> Result<(), Error> {
        let stats = self.session.stats();
        let is_decommissioned = stats.decommissioned;
        if let Some(files) = &self.stats_files {
            files.write(stats);
        }
        if is_decommissioned { Err(decommissioned()) } else { Ok(()) }
    }

    fn maintain(&mut self) -> Result<(), Error> {
        self.session.maintain();
        self.start_if_free()
    }

    /// Starts the heartbeat if no other process delivers any more.
    fn start_if_free(&mut self) -> Result<(), Error> {
        if let Some(prepared) = self.prepared.take_if(|prepared| prepared.may_start()) {
            self.heartbeat = Some(prepared.start()?);
        }
        Ok(())
    }

    /// At the end: if the process that delivered has ended meanwhile, nobody else delivers what
    /// waits.
    fn take_over(&mut self) -> Result<(), Error> {
        if self.prepared.is_some() {
            self.session.take_over();
        }
        self.start_if_free()
    }

    /// Delivers what waits, within the grace.
    fn stop(self) {
        match self.heartbeat {
            Some(heartbeat) => {
                let host = self.session.stats().host_uuid.unwrap_or_default();
                warn_of_undelivered(&host, &heartbeat.stop(limits::RUN_GRACE));
            }
            None => self.session.release(Instant::now() + limits::RUN_GRACE),
        }
        if let Some(files) = self.stats_files {
            files.finish();
        }
    }
}
