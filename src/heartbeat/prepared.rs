//! A heartbeat whose outbox is open and that does not beat yet: the program's `pipe` beside
//! another process that delivers. Runs on the caller's thread.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;

use super::{Heartbeat, HeartbeatBuilder, combined_stats, start};
use crate::error::Error;
use crate::outbox::Role;
use crate::stats::{SharedStats, Stats};
use crate::threads::batches::OutboxEvent;
use crate::threads::heartbeat::Setup;
use crate::threads::outbox_client::OutboxClient;
use crate::threads::schedule::Ticks;

/// A heartbeat that is started when this process delivers from the outbox.
pub(crate) struct PreparedHeartbeat(Box<Setup>);

/// Reads the stats of a heartbeat, also before it beats.
#[derive(Clone, Debug)]
pub(crate) struct StatsReader {
    outbox: Arc<OutboxClient>,
    stats: Arc<SharedStats>,
}

impl StatsReader {
    pub(crate) fn read(&self) -> Stats {
        combined_stats(&self.outbox, &self.stats)
    }
}

impl HeartbeatBuilder {
    /// Opens the outbox and loads the credentials, as [`start`](Self::start) does. Another process
    /// that delivers is no error. Operations of processes that have ended are reported failed only
    /// after [`limits::RESUME_TIME`](crate::limits::RESUME_TIME), so that this process may take
    /// them over.
    pub(crate) fn prepare_to_resume(mut self) -> Result<PreparedHeartbeat, Error> {
        let enrolment = self.enrolment.take();
        let enrolment = enrolment.ok_or_else(|| Error::not_enrolled("no enrolment is given"));
        let setup = self.prepare(Role::Resume, move || enrolment)?;
        let setup = setup.ok_or_else(|| Error::not_enrolled("no enrolment is given"))?;
        setup.stats.change(|stats| setup.credentials.describe(stats));
        Ok(PreparedHeartbeat(Box::new(setup)))
    }
}

impl PreparedHeartbeat {
    pub(crate) fn outbox(&self) -> &Arc<OutboxClient> {
        &self.0.outbox
    }

    pub(crate) fn stats(&self) -> StatsReader {
        StatsReader { outbox: Arc::clone(&self.0.outbox), stats: Arc::clone(&self.0.stats) }
    }

    /// Whether the heartbeat may start: no other process is known to deliver from the outbox.
    pub(crate) fn may_start(&self) -> bool {
        !self.0.outbox.is_standby()
    }

    /// Receives [`OutboxEvent::DeliveryBegan`] when the heartbeat may start.
    pub(crate) fn events(&self) -> &Receiver<OutboxEvent> {
        &self.0.batches.events
    }

    /// Starts the heartbeat. The first beat is sent at once.
    pub(crate) fn start(self) -> Result<Heartbeat, Error> {
        let Self(mut setup) = self;
        // The ticks of a heartbeat that has waited are in the past.
        setup.ticks = Ticks::every(setup.interval, Instant::now(), fastrand::f64());
        start(*setup)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::delta::{LifecycleDelta, Operation};
    use crate::outbox::{NewRows, Outbox, OutboxLocation, SentBy};

    #[test]
    fn delta_after_the_end_of_the_process_that_delivered_begins_delivery() {
        let (dir, _master, _worker, builder) = crate::loopback::example().unwrap();
        let file = dir.path().join("outbox.db");
        let first = Outbox::open(Some(file.clone()), Role::Deliver, Arc::default()).unwrap();
        let prepared = builder.outbox(OutboxLocation::File(file)).prepare_to_resume().unwrap();
        assert!(!prepared.may_start());
        drop(first);
        let delta = LifecycleDelta::succeeded("d", Operation::Deploy);
        prepared.outbox().add(NewRows::Deltas(vec![delta], SentBy::Deliverer)).unwrap();
        let event = prepared.events().recv_timeout(Duration::from_secs(10));
        assert!(matches!(event, Ok(OutboxEvent::DeliveryBegan)) && prepared.may_start());
    }
}
