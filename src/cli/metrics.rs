//! `--metrics-file`: the stats in Prometheus' text format, for node_exporter's textfile collector. Values only; the
//! program's main thread writes them.
//!
//! Names and help after Prometheus' conventions: base units, `_total` for what only grows, `_timestamp_seconds` for a
//! moment. What is not there has no sample, but for the last success: before the first one it is 0, so that "too long
//! ago" holds from the start.

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
    counter("beats_total", "Beats that the master accepted.", |stats| Some(stats.beats as f64)),
    gauge(
        "last_success_timestamp_seconds",
        "When the master last accepted a beat; 0: never yet.",
        |stats| stats.last_success.map_or(Some(0.0), moment),
    ),
    gauge("next_beat_timestamp_seconds", "When the next beat is due.", |stats| {
        stats.next_beat.and_then(moment)
    }),
    gauge("failure_streak", "Beats that failed in a row.", |stats| {
        Some(stats.failure.as_ref().map_or(0.0, |failure| failure.count as f64))
    }),
    gauge(
        "failing_since_timestamp_seconds",
        "When the first of the beats that failed in a row did.",
        |stats| stats.failure.as_ref().and_then(|failure| moment(failure.since)),
    ),
    gauge(
        "decommissioned",
        "Whether the master has not accepted this host for long, and its files are gone.",
        |stats| truth(stats.decommissioned),
    ),
    gauge("round_trip_seconds", "From a beat's request to its answer, the last time.", |stats| {
        stats.round_trip.as_ref().map(Duration::as_secs_f64)
    }),
    gauge("session_resumed", "Whether the last TLS handshake resumed a session.", |stats| {
        truth(stats.resumed)
    }),
    counter("deltas_delivered_total", "Deltas that the master accepted.", |stats| {
        Some(stats.delivered as f64)
    }),
    counter("deltas_rejected_total", "Deltas that the master refused for good.", |stats| {
        Some(stats.rejected as f64)
    }),
    counter("deltas_dropped_total", "Deltas that fell out of the outbox undelivered.", |stats| {
        Some(stats.dropped as f64)
    }),
    gauge(
        "deltas_waiting",
        "Deltas that the master has neither accepted nor refused for good.",
        |stats| Some(stats.waiting as f64),
    ),
    gauge("deltas_held", "Waiting deltas that something newer holds back.", |stats| {
        Some(stats.held as f64)
    }),
    gauge(
        "oldest_waiting_timestamp_seconds",
        "When the operation ended that the oldest waiting delta tells of.",
        |stats| stats.oldest_waiting.and_then(moment),
    ),
    gauge("operations_in_flight", "Operations in flight, counted for each decky.", |stats| {
        Some(stats.operations as f64)
    }),
    gauge("outbox_durable", "Whether all of the outbox is in its file.", |stats| {
        truth(stats.outbox.is_some())
    }),
    gauge("status_known", "Whether the last beat said all of what runs here.", |stats| {
        truth(stats.status_fault.is_none())
    }),
    counter("snapshots_total", "Snapshots that the status source gave.", |stats| {
        Some(stats.snapshots as f64)
    }),
    gauge(
        "last_snapshot_timestamp_seconds",
        "When the status source gave the last snapshot.",
        |stats| stats.last_snapshot.and_then(moment),
    ),
    gauge(
        "snapshot_pending_since_timestamp_seconds",
        "Since when the status source has owed a snapshot.",
        |stats| stats.snapshot_pending_since.and_then(moment),
    ),
    counter("panics_total", "Panics caught, of the status source and of a beat.", |stats| {
        Some(stats.panics as f64)
    }),
    gauge(
        "certificate_expiry_timestamp_seconds",
        "The last moment in which this host's certificate is valid.",
        |stats| stats.certificate_expires.and_then(moment),
    ),
];

/// All of them.
pub(super) fn text(stats: &Stats) -> String {
    let mut text = String::new();
    for Metric { name, kind, help, value } in METRICS {
        if let Some(value) = value(stats) {
            sample(&mut text, name, kind, help, "", value);
        }
    }
    let unknown = |what: &Option<String>| what.clone().unwrap_or_default();
    let us = labels(&[
        ("version", env!("CARGO_PKG_VERSION")),
        ("host_uuid", &unknown(&stats.host_uuid)),
        ("url", &unknown(&stats.url)),
        ("fingerprint", &unknown(&stats.fingerprint)),
    ]);
    sample(&mut text, "info", "gauge", "Who we are to the master, and where it is.", &us, 1.0);
    if let Some(failure) = &stats.failure {
        let class = labels(&[("class", &failure.class)]);
        sample(
            &mut text,
            "failure_info",
            "gauge",
            "The class of the last beat's failure.",
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

fn moment(at: SystemTime) -> Option<f64> {
    at.duration_since(UNIX_EPOCH).ok().map(|since| since.as_millis() as f64 / 1e3)
}

fn truth(is: bool) -> Option<f64> {
    Some(if is { 1.0 } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(stats: &Stats) -> Vec<String> {
        text(stats).lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }

    #[test]
    fn what_is_not_there_has_no_sample_and_no_success_yet_is_long_ago() {
        let samples = samples(&Stats::default());
        assert!(
            samples.contains(&"decnet_heartbeat_last_success_timestamp_seconds 0".to_owned()),
            "{samples:?}"
        );
        for absent in [
            "next_beat",
            "failing_since",
            "round_trip",
            "oldest_waiting",
            "certificate_expiry",
            "failure_info",
        ] {
            assert!(!samples.iter().any(|sample| sample.contains(absent)), "{absent}: {samples:?}");
        }
    }

    #[test]
    fn moments_are_in_seconds_and_truths_are_one_and_zero() {
        let at = UNIX_EPOCH + Duration::from_millis(1_700_000_000_250);
        let stats = Stats { next_beat: Some(at), resumed: true, waiting: 3, ..Stats::default() };
        let samples = samples(&stats);
        for sample in [
            "next_beat_timestamp_seconds 1700000000.25",
            "session_resumed 1",
            "deltas_waiting 3",
            "outbox_durable 0",
            "status_known 1",
        ] {
            assert!(
                samples.contains(&format!("decnet_heartbeat_{sample}")),
                "{sample}: {samples:?}"
            );
        }
    }

    #[test]
    fn every_metric_has_its_help_and_type_once() {
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
    fn a_label_is_one_whatever_is_in_it() {
        assert_eq!(labels(&[("a", "x"), ("b", "\\\"\n")]), r#"{a="x",b="\\\"\n"}"#);
    }
}
