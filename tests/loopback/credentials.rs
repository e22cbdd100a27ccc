//! A host that is refused keeps beating, and a bundle that is just being written is taken over when it is whole.

use decnet_heartbeat::loopback::Role;
use decnet_heartbeat::{LifecycleDelta, Operation};

use crate::support::{PATIENCE, Stage, errors_with, hanging, now, remember_errors, settled};

#[test]
fn a_decommissioned_host_keeps_beating_and_keeps_its_deltas() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.decommission(&stage.worker.uuid);
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    let failure = settled(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
    assert_eq!(
        (failure.class.as_str(), failure.detail.as_str()),
        ("http-404", r#"{"detail":"unknown host"}"#)
    );
    tick.send(now()).unwrap();
    let failing = settled(&heartbeat, |stats| {
        stats.failure.as_ref().is_some_and(|failure| failure.count == 2)
    });
    assert_eq!(failing.waiting, 1);
    stage.master.pin(&stage.worker.uuid, &stage.worker.fingerprint);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
}

#[test]
fn a_half_written_bundle_is_looked_at_again_and_the_old_one_goes_on() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    let old = std::fs::read(stage.agent_dir().join("worker.key")).unwrap();
    let again = stage.master.re_enrol(&stage.worker.uuid, &stage.agent_dir()).unwrap();
    let new = std::fs::read(stage.agent_dir().join("worker.key")).unwrap();
    // The new certificate beside the old key, as a reader may meet them.
    std::fs::write(stage.agent_dir().join("worker.key"), old).unwrap();
    stage.master.pin(&stage.worker.uuid, &stage.worker.fingerprint);
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(2, PATIENCE), "{:?}", heartbeat.stats());
    std::fs::write(stage.agent_dir().join("worker.key"), new).unwrap();
    stage.master.pin(&stage.worker.uuid, &again.fingerprint);
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(3, PATIENCE), "{:?}", heartbeat.stats());
}

#[test]
fn a_new_bundle_is_taken_over_while_the_source_hangs() {
    let stage = Stage::new();
    let (_release, source) = hanging();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    stage.master.re_enrol(&stage.worker.uuid, &stage.agent_dir()).unwrap();
    // A beat that puts no question, as one is open.
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    assert!(stage.master.wait_for_beats(2, PATIENCE), "{:?}", heartbeat.stats());
    assert_eq!(
        settled(&heartbeat, |stats| stats.delivered == 1).failure.map(|failure| failure.class),
        None
    );
}

#[test]
fn the_log_tells_a_host_that_is_not_known_from_a_certificate_that_is_refused() {
    remember_errors();
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    let other = stage.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    stage.master.pin(&stage.worker.uuid, &other.fingerprint);
    let fails = |count| {
        settled(&heartbeat, |stats| {
            stats.failure.as_ref().is_some_and(|failure| failure.count == count)
        })
    };
    tick.send(now()).unwrap();
    fails(1);
    stage.master.decommission(&stage.worker.uuid);
    tick.send(now()).unwrap();
    fails(2);
    let said = errors_with(&stage.worker.uuid);
    assert!(
        said[0].starts_with("master does not accept this host's certificate: ")
            && said[0].contains("class=http-403 ")
    );
    assert!(
        said[1].starts_with("master does not know this host; enrol it again: ")
            && said[1].contains("class=http-404 ")
    );
}
