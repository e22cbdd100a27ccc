//! Every class of failure that the documentation lists, produced by real sockets and the system's resolver.

use std::collections::BTreeSet;

use decnet_heartbeat::loopback::{Effect, Enrolled, Fault};
use decnet_heartbeat::{Enrolment, Failure, Heartbeat};

use crate::support::{Stage, nothing_deployed, settled};

/// What is tried here.
const HERE: [&str; 10] = [
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

/// What takes a network that is slower than this one, or a resolver that is silent: `tests/faults/network.rs` and
/// `tests/e2e/resolver.rs` produce these. A body that cannot be written as JSON cannot be made from outside.
const ELSEWHERE: [&str; 4] =
    ["timeout-resolve", "timeout-send-body", "timeout-global", "invalid-body"];

/// The first failure of that class, however many others come before it.
fn failure(enrolment: Enrolment, class: &str) -> Failure {
    let heartbeat =
        Heartbeat::builder().enrolment(enrolment).status_source(nothing_deployed).start().unwrap();
    let is_there = |failure: &Failure| failure.class == class;
    settled(&heartbeat, |stats| stats.failure.as_ref().is_some_and(is_there)).failure.unwrap()
}

/// The worker, with its master elsewhere.
fn at(worker: &Enrolled, host: &str, port: u16) -> Enrolment {
    Enrolment::new(&worker.uuid, host, &worker.agent_dir).unwrap().with_master_port(port).unwrap()
}

#[test]
fn unresolvable_name_is_of_class_dns() {
    let stage = Stage::new();
    let failure = failure(at(&stage.worker, "no-such.invalid", 8770), "dns");
    assert!(
        failure.detail.starts_with("the name no-such.invalid could not be looked up: "),
        "{failure:?}"
    );
}

#[test]
fn a_port_where_nothing_listens_is_of_class_refused() {
    let mut stage = Stage::new();
    stage.master.stop();
    failure(stage.worker.enrolment().unwrap(), "refused");
}

#[test]
fn an_address_without_a_route_is_of_class_unreachable() {
    let stage = Stage::new();
    // TCP never connects to a group; not a byte leaves the host.
    failure(at(&stage.worker, "224.0.0.1", 8770), "unreachable");
}

#[test]
fn what_the_system_refuses_is_of_class_io() {
    let stage = Stage::new();
    // A link-local address without its interface; where there is no IPv6, there is no socket for it either.
    failure(at(&stage.worker, "fe80::1", 8770), "io");
}

#[test]
fn each_way_in_which_a_master_fails_has_its_class() {
    for (fault, class, says) in [
        (Fault::CutBeforeHandshake, "connection-closed", ""),
        (Fault::NeverHandshake, "timeout-connect", ""),
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
        (Fault::NeverAnswer(Effect::Lost), "timeout-receive-response", ""),
        (Fault::Raw(vec![0xff; 3_000]), "invalid-response", ""),
    ] {
        let stage = Stage::new();
        stage.master.always(Some(fault));
        let failure = failure(stage.worker.enrolment().unwrap(), class);
        assert!(failure.detail.starts_with(says), "{class}: {failure:?}");
    }
}

#[test]
fn an_answers_status_is_its_class() {
    let stage = Stage::new();
    let other = stage
        .master
        .authority()
        .issue(decnet_heartbeat::loopback::Role::Worker("other".to_owned()))
        .unwrap();
    stage.master.pin(&stage.worker.uuid, &other.fingerprint);
    failure(stage.worker.enrolment().unwrap(), "http-403");
}

#[test]
fn stats_document_every_class_and_the_page_on_operations_no_other() {
    let stats = include_str!("../../src/stats.rs");
    let table =
        stats.split_once("| class | what happened |").unwrap().1.split_once("pub class").unwrap().0;
    let listed: BTreeSet<_> = table.lines().filter_map(|line| line.split('`').nth(1)).collect();
    let tried: BTreeSet<_> = HERE.into_iter().chain(ELSEWHERE).collect();
    assert_eq!(listed, tried);
    let page = include_str!("../../src/docs/operations.md");
    let named = page.split("`class=").skip(1).map(|rest| rest.split('`').next().unwrap());
    for class in named.filter(|class| !class.ends_with('…')) {
        assert!(
            listed.contains(class) || class.starts_with("http-"),
            "operations.md names {class}"
        );
    }
}
