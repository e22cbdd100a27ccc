//! `--metrics-file`: the statistics in Prometheus' text format, for node_exporter's textfile
//! collector. Values only; the thread `stats-files` writes them.
//!
//! Names follow Prometheus' conventions: base units, `_total` for counters, `_timestamp_seconds`
//! for times. An unknown value has no sample, except for the last success: before the first one it
//! is 0, so that an alert on its age also covers the start.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::stats::Stats;

/// One metric, without labels.
struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(&Stats) -> Option<f64>,
}

const fn counter(
    name: &'static str,
    help: &'static str,
    value: fn(&Stats) -> Option<f64>,
) -> Metric {
    Metric { name, kind: "counter", help, value }
}

const fn gauge(name: &'static str, help: &'static str, value: fn(&Stats) -> Option<f64>) -> Metric {
    Metric { name, kind: "gauge", help, value }
}

const METRICS: [Metric; 22] = [
    counter("beats_total", "Number of beats that the master accepted.", |stats| {
        Some(stats.beats as f64)
    }),
    gauge(
        "last_success_timestamp_seconds",
        "Time of the last accepted beat; 0 if there was none yet.",
        |stats| stats.last_success.map_or(Some(0.0), timestamp),
    ),
    gauge("next_beat_timestamp_seconds", "Time when the next beat is due.", |stats| {
        stats.next_beat.and_then(timestamp)
    }),
    gauge(
        "consecutive_failures",
        "Number of beats that failed since the last accepted one.",
        |stats| Some(stats.failure.as_ref().map_or(0.0, |failure| failure.count as f64)),
    ),
    gauge(
        "failing_since_timestamp_seconds",
        "Time of the first failed beat since the last accepted one.",
        |stats| stats.failure.as_ref().and_then(|failure| timestamp(failure.since)),
    ),
    gauge(
        "decommissioned",
        "1 if the host is decommissioned: the master rejects it, and its ini and bundle do not \
         exist.",
        |stats| bool_value(stats.decommissioned),
    ),
    gauge(
        "last_request_duration_seconds",
        "Duration of the last request to the master.",
        |stats| stats.round_trip.as_ref().map(Duration::as_secs_f64),
    ),
    gauge("session_resumed", "1 if the last TLS handshake resumed a session.", |stats| {
        bool_value(stats.resumed)
    }),
    counter("deltas_delivered_total", "Number of deltas that the master accepted.", |stats| {
        Some(stats.delivered as f64)
    }),
    counter("deltas_rejected_total", "Number of deltas that the master rejected.", |stats| {
        Some(stats.rejected as f64)
    }),
    counter(
        "deltas_dropped_total",
        "Number of deltas that were dropped undelivered, because the outbox was full or they \
         were too old.",
        |stats| Some(stats.dropped as f64),
    ),
    gauge("deltas_waiting", "Number of queued deltas.", |stats| Some(stats.waiting as f64)),
    gauge("deltas_held", "Number of queued deltas that a newer operation holds back.", |stats| {
        Some(stats.held as f64)
    }),
    gauge(
        "oldest_waiting_timestamp_seconds",
        "Time when the operation of the oldest queued delta ended.",
        |stats| stats.oldest_waiting.and_then(timestamp),
    ),
    gauge(
        "operations_in_flight",
        "Number of operations in flight, counted for each decky.",
        |stats| Some(stats.operations as f64),
    ),
    gauge(
        "outbox_durable",
        "1 if the outbox is on disk; 0 if it is degraded, in memory.",
        |stats| bool_value(stats.outbox.is_some()),
    ),
    gauge("status_complete", "1 if the last beat contained the complete status.", |stats| {
        bool_value(stats.status_fault.is_none())
    }),
    counter("snapshots_total", "Number of snapshots that the status source returned.", |stats| {
        Some(stats.snapshots as f64)
    }),
    gauge("last_snapshot_timestamp_seconds", "Time of the last snapshot.", |stats| {
        stats.last_snapshot.and_then(timestamp)
    }),
    gauge(
        "snapshot_pending_since_timestamp_seconds",
        "Time of the snapshot request that the status source has not answered yet.",
        |stats| stats.snapshot_pending_since.and_then(timestamp),
    ),
    counter(
        "panics_total",
        "Number of panics that were caught, in the status source and in beats.",
        |stats| Some(stats.panics as f64),
    ),
    gauge(
        "certificate_expiry_timestamp_seconds",
        "Time when this host's certificate expires.",
        |stats| stats.certificate_expires.and_then(timestamp),
    ),
];

/// All metrics.
pub(super) fn text(stats: &Stats) -> String {
    let mut text = String::new();
    for Metric { name, kind, help, value } in METRICS {
        if let Some(value) = value(stats) {
            sample(&mut text, name, kind, help, "", value);
        }
    }
    let or_empty = |value: &Option<String>| value.clone().unwrap_or_default();
    let info = labels(&[
        ("version", env!("CARGO_PKG_VERSION")),
        ("host_uuid", &or_empty(&stats.host_uuid)),
        ("url", &or_empty(&stats.url)),
        ("fingerprint", &or_empty(&stats.fingerprint)),
    ]);
    sample(&mut text, "info", "gauge", "Version, host, master and certificate.", &info, 1.0);
    if let Some(failure) = &stats.failure {
        let class = labels(&[("class", &failure.class)]);
        sample(
            &mut text,
            "failure_info",
            "gauge",
            "Class of the last failed beat, while beats fail.",
            &class,
            1.0,
        );
    }
    text
}

fn sample(text: &mut String, name: &str, kind: &str, help: &str, labels: &str, value: f64) {
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "# HELP decnet_heartbeat_{name} {help}\n# TYPE decnet_heartbeat_{name} {kind}\n\
         decnet_heartbeat_{name}{labels} {value}\n"
    );
}

fn labels(labels: &[(&str, &str)]) -> String {
    let labels: Vec<_> =
        labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    format!("{{{}}}", labels.join(","))
}

fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

fn timestamp(at: SystemTime) -> Option<f64> {
    at.duration_since(UNIX_EPOCH).ok().map(|since| since.as_millis() as f64 / 1e3)
}

fn bool_value(value: bool) -> Option<f64> {
    Some(if value { 1.0 } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let page = include_str!("../docs/operations.md");
        for Metric { name, .. } in METRICS {
            assert!(page.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(labels(&[("a", "x"), ("b", "\\\"\n")]), r#"{a="x",b="\\\"\n"}"#);
    }
}
