//! A rejected host keeps beating, and a changed bundle is loaded when it is complete.

use decnet_heartbeat::loopback::Role;
use decnet_heartbeat::{LifecycleDelta, Operation};

use crate::support::{
    Fixture, TIMEOUT, blocking_source, errors_containing, now, record_errors, wait_for_stats,
};

#[test]
fn decommissioned_host_keeps_beating_and_keeps_its_deltas() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.decommission(&fixture.worker.uuid);
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    let failure = wait_for_stats(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
    assert_eq!(
        (failure.class.as_str(), failure.detail.as_str()),
        ("http-404", r#"{"detail":"unknown host"}"#)
    );
    tick.send(now()).unwrap();
    let failing = wait_for_stats(&heartbeat, |stats| {
        stats.failure.as_ref().is_some_and(|failure| failure.count == 2)
    });
    assert_eq!(failing.waiting, 1);
    fixture.master.pin(&fixture.worker.uuid, &fixture.worker.fingerprint);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
}

#[test]
fn incomplete_bundle_is_read_again_and_the_old_one_stays_in_use() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    let old = std::fs::read(fixture.agent_dir().join("worker.key")).unwrap();
    let again = fixture.master.re_enrol(&fixture.worker.uuid, &fixture.agent_dir()).unwrap();
    let new = std::fs::read(fixture.agent_dir().join("worker.key")).unwrap();
    // The new certificate with the old key, as during an enrolment.
    std::fs::write(fixture.agent_dir().join("worker.key"), old).unwrap();
    fixture.master.pin(&fixture.worker.uuid, &fixture.worker.fingerprint);
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(2, TIMEOUT), "{:?}", heartbeat.stats());
    std::fs::write(fixture.agent_dir().join("worker.key"), new).unwrap();
    fixture.master.pin(&fixture.worker.uuid, &again.fingerprint);
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(3, TIMEOUT), "{:?}", heartbeat.stats());
}

#[test]
fn new_bundle_is_loaded_while_the_source_blocks() {
    let fixture = Fixture::new();
    let (_release, source) = blocking_source();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    fixture.master.re_enrol(&fixture.worker.uuid, &fixture.agent_dir()).unwrap();
    // This beat requests no snapshot, because one is pending.
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    assert!(fixture.master.wait_for_beats(2, TIMEOUT), "{:?}", heartbeat.stats());
    assert_eq!(
        wait_for_stats(&heartbeat, |stats| stats.delivered == 1)
            .failure
            .map(|failure| failure.class),
        None
    );
}

#[test]
fn log_distinguishes_unknown_host_and_rejected_certificate() {
    record_errors();
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    let other = fixture.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    fixture.master.pin(&fixture.worker.uuid, &other.fingerprint);
    let wait_for_failures = |count| {
        wait_for_stats(&heartbeat, |stats| {
            stats.failure.as_ref().is_some_and(|failure| failure.count == count)
        })
    };
    tick.send(now()).unwrap();
    wait_for_failures(1);
    fixture.master.decommission(&fixture.worker.uuid);
    tick.send(now()).unwrap();
    wait_for_failures(2);
    let errors = errors_containing(&fixture.worker.uuid);
    assert!(
        errors[0].starts_with("master does not accept this host's certificate: ")
            && errors[0].contains("class=http-403 "),
        "{errors:?}"
    );
    assert!(
        errors[1].starts_with("master does not know this host; enrol it again: ")
            && errors[1].contains("class=http-404 "),
        "{errors:?}"
    );
}
