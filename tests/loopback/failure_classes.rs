//! Each class of failure that the documentation lists, caused by real sockets and the system's
//! resolver.

use std::collections::BTreeSet;

use decnet_heartbeat::loopback::{Effect, Enrolled, Fault};
use decnet_heartbeat::{Enrolment, Failure, Heartbeat};

use crate::support::{Fixture, nothing_deployed, wait_for_stats};

/// The classes that these tests cause.
const CAUSED_HERE: [&str; 10] = [
    "http-403",
    "dns",
    "refused",
    "unreachable",
    "timeout-connect",
    "tls",
    "connection-closed",
    "timeout-receive-response",
    "invalid-response",
    "io",
];

/// The classes that need a slow network or a resolver that does not answer. Tests of the network
/// in `tests/faults` and of the resolver in `tests/e2e` cause them. No public function makes a body
/// that cannot be written as JSON.
const CAUSED_ELSEWHERE: [&str; 4] =
    ["timeout-resolve", "timeout-send-body", "timeout-global", "invalid-body"];

/// Starts a heartbeat, and waits for the first failure of this class.
fn wait_for_failure(enrolment: Enrolment, class: &str) -> Failure {
    let heartbeat =
        Heartbeat::builder().enrolment(enrolment).status_source(nothing_deployed).start().unwrap();
    let has_class = |failure: &Failure| failure.class == class;
    wait_for_stats(&heartbeat, |stats| stats.failure.as_ref().is_some_and(has_class))
        .failure
        .unwrap()
}

/// The worker's enrolment with another address of the master.
fn enrolment_at(worker: &Enrolled, host: &str, port: u16) -> Enrolment {
    Enrolment::new(&worker.uuid, host, &worker.agent_dir).unwrap().with_master_port(port).unwrap()
}

#[test]
fn unresolvable_name_is_of_class_dns() {
    let fixture = Fixture::new();
    let failure = wait_for_failure(enrolment_at(&fixture.worker, "no-such.invalid", 8770), "dns");
    assert!(
        failure.detail.starts_with("the name no-such.invalid could not be looked up: "),
        "{failure:?}"
    );
}

#[test]
fn closed_port_is_of_class_refused() {
    let mut fixture = Fixture::new();
    fixture.master.stop();
    wait_for_failure(fixture.worker.enrolment().unwrap(), "refused");
}

#[test]
fn address_without_a_route_is_of_class_unreachable() {
    let fixture = Fixture::new();
    // TCP does not connect to a multicast address. No packet leaves the host.
    wait_for_failure(enrolment_at(&fixture.worker, "224.0.0.1", 8770), "unreachable");
}

#[test]
fn other_socket_errors_are_of_class_io() {
    let fixture = Fixture::new();
    // A link-local address without its interface is EINVAL. Without IPv6 there is no socket for it.
    wait_for_failure(enrolment_at(&fixture.worker, "fe80::1", 8770), "io");
}

#[test]
fn each_fault_of_a_master_has_its_class() {
    for (fault, class, detail) in [
        (Fault::CutBeforeHandshake, "connection-closed", "the other side closed the connection"),
        (Fault::NeverHandshake, "timeout-connect", "timeout: connect"),
        (
            Fault::Banner(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
            "tls",
            "the answer is plain HTTP, not TLS",
        ),
        (
            Fault::Banner(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
            "tls",
            "the answer is neither TLS nor HTTP",
        ),
        (Fault::NeverAnswer(Effect::Lost), "timeout-receive-response", "timeout: receive response"),
        (Fault::Raw(vec![0xff; 3_000]), "invalid-response", "protocol: http parse fail: "),
    ] {
        let fixture = Fixture::new();
        fixture.master.always(Some(fault));
        let failure = wait_for_failure(fixture.worker.enrolment().unwrap(), class);
        assert!(failure.detail.starts_with(detail), "{class}: {failure:?}");
    }
}

#[test]
fn rejection_is_of_the_class_of_its_status() {
    let fixture = Fixture::new();
    let other = fixture
        .master
        .authority()
        .issue(decnet_heartbeat::loopback::Role::Worker("other".to_owned()))
        .unwrap();
    fixture.master.pin(&fixture.worker.uuid, &other.fingerprint);
    wait_for_failure(fixture.worker.enrolment().unwrap(), "http-403");
}

#[test]
fn documentation_lists_exactly_the_tested_classes() {
    let stats = include_str!("../../src/stats.rs");
    let table =
        stats.split_once("| class | what happened |").unwrap().1.split_once("pub class").unwrap().0;
    let listed: BTreeSet<_> = table.lines().filter_map(|line| line.split('`').nth(1)).collect();
    let caused: BTreeSet<_> = CAUSED_HERE.into_iter().chain(CAUSED_ELSEWHERE).collect();
    assert_eq!(listed, caused);
    let page = include_str!("../../src/docs/operations.md");
    let named = page.split("`class=").skip(1).map(|rest| rest.split('`').next().unwrap());
    for class in named.filter(|class| !class.ends_with('…')) {
        assert!(
            listed.contains(class) || class.starts_with("http-"),
            "operations.md names {class}"
        );
    }
}
