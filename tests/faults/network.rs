//! The network: each failure is bounded by a timeout, which the error names, and the next attempt is made soon after.

use std::time::Duration;

use decnet_heartbeat::loopback::{Effect, Fault as Answer};

use crate::gate::Network;
use crate::row::{Again, Fault, Right, Row};
use crate::stage::{Stage, World};
use crate::subject::Source;

/// More than any buffer between the agent and the relay holds. It may be on its way on a connection that was there, and then
/// once more on a fresh one.
const BIG: usize = 12 << 20;

pub fn rows() -> Vec<Row> {
    let fails = |class, says, after| Right::Fails { class, says, after, again: Again::Soon };
    let network = |name: &str, network, right| {
        Row::new(format!("network/{name}"), Fault::Network(network), right)
    };
    let master = |name: &str, answer, right| {
        Row::new(format!("network/{name}"), Fault::Afresh(answer), right)
    };
    // The body is built anew for each attempt, and the source makes its string twice.
    let big = World { source: Source::Of(BIG), growth: 8 * BIG as u64 / 1024, ..World::default() };
    // By then the states are too old to be sent again, so the second attempt, on a fresh connection, is a small one.
    let without_states =
        || Right::LeavesOut { after: 0.0..10.5, says: ": timeout-send-body: timeout: send body" };
    let closed = || fails("connection-closed", "", 0.0..0.5);
    let was_reset = || fails("connection-closed", "Connection reset by peer", 0.0..0.5);
    let reset = |name: &str, answer| {
        Row::new(
            format!("network/reset_{name}"),
            Fault::Both(Network::ResetsAtTheEnd, answer),
            was_reset(),
        )
    };
    vec![
        network("refused", Network::Refuses, fails("refused", "Connection refused", 0.0..0.5)),
        network(
            "blackholed",
            Network::Swallows,
            fails("timeout-connect", "timeout: connect", 4.9..5.2),
        ),
        network(
            "accepted_but_no_handshake",
            Network::IsMute,
            fails("timeout-connect", "timeout: connect", 4.9..5.2),
        ),
        master(
            "established_then_silent",
            Answer::NeverAnswer(Effect::Lost),
            fails("timeout-receive-response", "timeout: receive response", 9.9..10.2),
        ),
        // Half of its time for the connection that was there, and half for a fresh one.
        Row::new(
            "network/silent_twice",
            Fault::Always(Answer::NeverAnswer(Effect::Lost)),
            fails("timeout-global", "timeout: global", 19.9..20.2),
        ),
        network("proxy_stops_in_the_request", Network::StallsAfter(100_000), without_states())
            .with(big),
        network("reset_in_the_handshake", Network::ResetsAfter(1), was_reset()),
        reset("before_the_body", Answer::CutBeforeRequest),
        reset("in_the_body", Answer::CutInBody),
        reset("after_the_body", Answer::CutAfterBody(Effect::Lost)),
        network("reset_in_a_big_body", Network::ResetsAfter(100_000), closed()).with(big),
        network("slow_reader", Network::Drips(200_000), without_states()).with(big),
        network(
            "one_byte_a_second_of_the_handshake",
            Network::DripsBack,
            fails("timeout-connect", "timeout: connect", 4.9..5.2),
        ),
        master(
            "one_byte_a_second_of_headers",
            Answer::Slowly(Duration::from_secs(1)),
            fails("timeout-receive-response", "", 9.9..10.2),
        ),
        master(
            "one_byte_a_second_of_a_refusal",
            Answer::Endless(
                b"HTTP/1.1 503 No\r\ncontent-length: 900\r\n\r\n".to_vec(),
                b".".to_vec(),
                Duration::from_secs(1),
            ),
            fails("http-503", "..", 9.9..10.5),
        ),
        master(
            "one_byte_a_second_of_an_acceptance",
            Answer::Endless(
                b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n".to_vec(),
                b".".to_vec(),
                Duration::from_secs(1),
            ),
            Right::Delivers { after: 0.0..10.5 },
        ),
    ]
}

/// A master that never answers, for six intervals: one beat at a time is on its way, and afterwards there is no burst.
pub fn ticks_do_not_pile_up() {
    let interval = Duration::from_secs(1);
    let stage = Stage::new(World { interval, ticks: true, ..World::default() });
    let mut subject = stage.start();
    stage.master.always(Some(Answer::NeverAnswer(Effect::Lost)));
    let before = stage.master.received().len();
    std::thread::sleep(interval * 6);
    let tried = stage.master.received().len() - before;
    assert!((3..=8).contains(&tried), "{tried}");
    stage.master.always(None);
    subject.until("a beat", |stats| stats["failure"].is_null());
    let before = stage.master.received().len();
    std::thread::sleep(interval * 3);
    let beats = stage.master.received().len() - before;
    assert!((2..=4).contains(&beats), "{beats}");
}
