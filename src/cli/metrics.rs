//! `--metrics-file`: the statistics in Prometheus' text format, for node_exporter's textfile
//! collector. Values only; the thread `stats-files` writes them.
//!
//! Names follow Prometheus' conventions: base units, `_total` for counters, `_timestamp_seconds`
//! for times. An unknown value has no sample, except for the last success: before the first one it
//! is 0, so that an alert on its age also covers the start.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::stats::Stats;

/// All metrics.
pub(super) fn text(stats: &Stats) -> String {
    let mut metrics = Metrics(String::new());
    metrics.add_beats(stats);
    metrics.add_deltas(stats);
    metrics.add_status(stats);
    metrics.add_names(stats);
    metrics.0
}

/// The text so far. Each method adds one metric; those at the end add the metrics of one topic.
struct Metrics(String);

impl Metrics {
    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.sample("counter", name, help, "", value as f64);
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.sample("gauge", name, help, "", value);
    }

    fn count(&mut self, name: &str, help: &str, value: u64) {
        self.gauge(name, help, value as f64);
    }

    fn flag(&mut self, name: &str, help: &str, value: bool) {
        self.gauge(name, help, if value { 1.0 } else { 0.0 });
    }

    /// `None`: the time is unknown.
    fn time(&mut self, name: &str, help: &str, value: Option<SystemTime>) {
        if let Some(since) = value.and_then(|at| at.duration_since(UNIX_EPOCH).ok()) {
            self.gauge(name, help, since.as_millis() as f64 / 1e3);
        }
    }

    fn sample(&mut self, kind: &str, name: &str, help: &str, labels: &str, value: f64) {
        // Writing to a String cannot fail.
        let _ = write!(
            self.0,
            "# HELP decnet_heartbeat_{name} {help}\n# TYPE decnet_heartbeat_{name} {kind}\n\
             decnet_heartbeat_{name}{labels} {value}\n"
        );
    }

    fn add_beats(&mut self, stats: &Stats) {
        let failure = stats.failure.as_ref();
        self.counter("beats_total", "Beats that the master accepted.", stats.beats);
        self.time(
            "last_success_timestamp_seconds",
            "Time of the last accepted beat; 0 if there was none yet.",
            stats.last_success.or(Some(UNIX_EPOCH)),
        );
        self.time(
            "next_beat_timestamp_seconds",
            "Time when the next beat is due.",
            stats.next_beat,
        );
        self.count(
            "consecutive_failures",
            "Beats that failed since the last accepted one.",
            failure.map_or(0, |failure| failure.count),
        );
        self.time(
            "failing_since_timestamp_seconds",
            "Time of the first failed beat since the last accepted one.",
            failure.map(|failure| failure.since),
        );
        self.flag(
            "decommissioned",
            "1 if the host is decommissioned: the master rejects it, and its ini and bundle do not \
             exist.",
            stats.decommissioned,
        );
        if let Some(duration) = stats.round_trip {
            let help = "Duration of the last request to the master.";
            self.gauge("last_request_duration_seconds", help, duration.as_secs_f64());
        }
        let help = "1 if the last TLS handshake resumed a session.";
        self.flag("session_resumed", help, stats.resumed);
    }

    fn add_deltas(&mut self, stats: &Stats) {
        self.counter("deltas_delivered_total", "Deltas that the master accepted.", stats.delivered);
        self.counter("deltas_rejected_total", "Deltas that the master rejected.", stats.rejected);
        self.counter(
            "deltas_dropped_total",
            "Deltas that were dropped undelivered, because the outbox was full or they were too \
             old.",
            stats.dropped,
        );
        self.count("deltas_waiting", "Queued deltas.", stats.waiting);
        let help =
            "Queued deltas that wait for a newer operation, or that another process is sending.";
        self.count("deltas_held", help, stats.held);
        self.time(
            "oldest_waiting_timestamp_seconds",
            "Time when the operation of the oldest queued delta ended.",
            stats.oldest_waiting,
        );
        let help = "Operations in flight, counted for each decky.";
        self.count("operations_in_flight", help, stats.operations);
        let help = "1 if the outbox is on disk; 0 if it is degraded, in memory.";
        self.flag("outbox_durable", help, stats.outbox.is_some());
    }

    fn add_status(&mut self, stats: &Stats) {
        let help = "1 if the last beat contained the complete status.";
        self.flag("status_complete", help, stats.status_fault.is_none());
        let help = "Snapshots that the status source returned.";
        self.counter("snapshots_total", help, stats.snapshots);
        let help = "Time of the last snapshot.";
        self.time("last_snapshot_timestamp_seconds", help, stats.last_snapshot);
        self.time(
            "snapshot_pending_since_timestamp_seconds",
            "Time of the snapshot request that the status source has not answered yet.",
            stats.snapshot_pending_since,
        );
        let help =
            "Panics that were caught in the status source, in beats and in the outbox thread.";
        self.counter("panics_total", help, stats.panics);
        let help = "Time when this host's certificate expires.";
        self.time("certificate_expiry_timestamp_seconds", help, stats.certificate_expires);
    }

    /// The metrics with labels. Their value is 1.
    fn add_names(&mut self, stats: &Stats) {
        let info = labels(&[
            ("version", env!("CARGO_PKG_VERSION")),
            ("host_uuid", stats.host_uuid.as_deref().unwrap_or_default()),
            ("url", stats.url.as_deref().unwrap_or_default()),
            ("fingerprint", stats.fingerprint.as_deref().unwrap_or_default()),
        ]);
        self.sample("gauge", "info", "Version, host, master and certificate.", &info, 1.0);
        if let Some(failure) = &stats.failure {
            let class = labels(&[("class", &failure.class)]);
            let help = "Class of the last failed beat, while beats fail.";
            self.sample("gauge", "failure_info", help, &class, 1.0);
        }
    }
}

fn labels(labels: &[(&str, &str)]) -> String {
    let labels: Vec<_> =
        labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    format!("{{{}}}", labels.join(","))
}

fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stats::Failure;

    fn samples(stats: &Stats) -> Vec<String> {
        text(stats).lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }

    #[test]
    fn unknown_values_have_no_sample_and_no_success_is_0() {
        let samples = samples(&Stats::default());
        assert!(
            samples.contains(&"decnet_heartbeat_last_success_timestamp_seconds 0".to_owned()),
            "{samples:?}"
        );
        for absent in [
            "next_beat",
            "failing_since",
            "last_request_duration",
            "oldest_waiting",
            "certificate_expiry",
            "failure_info",
        ] {
            assert!(!samples.iter().any(|sample| sample.contains(absent)), "{absent}: {samples:?}");
        }
    }

    #[test]
    fn times_are_in_seconds_and_booleans_are_1_and_0() {
        let at = UNIX_EPOCH + Duration::from_millis(1_700_000_000_250);
        let stats = Stats { next_beat: Some(at), resumed: true, waiting: 3, ..Stats::default() };
        let samples = samples(&stats);
        for sample in [
            "next_beat_timestamp_seconds 1700000000.25",
            "session_resumed 1",
            "deltas_waiting 3",
            "outbox_durable 0",
            "status_complete 1",
        ] {
            assert!(
                samples.contains(&format!("decnet_heartbeat_{sample}")),
                "{sample}: {samples:?}"
            );
        }
    }

    #[test]
    fn every_metric_has_one_help_and_one_type() {
        let text = text(&Stats::default());
        for comment in ["# HELP ", "# TYPE "] {
            let mut names: Vec<_> = text
                .lines()
                .filter_map(|line| line.strip_prefix(comment)?.split(' ').next())
                .collect();
            let all = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(
                (names.len(), text.lines().filter(|line| !line.starts_with('#')).count()),
                (all, all)
            );
        }
    }

    #[test]
    fn every_metric_is_documented() {
        let at = Some(UNIX_EPOCH);
        let failure = Failure {
            count: 1,
            since: UNIX_EPOCH,
            class: "refused".to_owned(),
            detail: String::new(),
        };
        let stats = Stats {
            next_beat: at,
            failure: Some(failure),
            round_trip: Some(Duration::ZERO),
            oldest_waiting: at,
            last_snapshot: at,
            snapshot_pending_since: at,
            certificate_expires: at,
            ..Stats::default()
        };
        let page = include_str!("../docs/operations.md");
        for sample in samples(&stats) {
            let name = sample.split([' ', '{']).next().unwrap();
            let name = name.strip_prefix("decnet_heartbeat_").unwrap();
            assert!(page.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(labels(&[("a", "x"), ("b", "\\\"\n")]), r#"{a="x",b="\\\"\n"}"#);
    }
}
