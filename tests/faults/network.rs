//! Faults of the network: each failure is bounded by a timeout, which the error names. The next
//! attempt is made soon after it.

use std::time::Duration;

use decnet_heartbeat::loopback::{Effect, Fault as MasterFault};

use crate::agent::Source;
use crate::fault_case::{Expect, Fault, FaultCase, Retry};
use crate::tcp_proxy::ProxyMode;
use crate::test_bed::{Scenario, TestBed, Ticks};

/// A status that is larger than all buffers between the agent and the proxy. It may be sent on the
/// open connection and once more on a new one.
pub const LARGE_STATUS: usize = 12 << 20;

/// With [`LARGE_STATUS`]. The body is built for each attempt, and the source makes its string
/// twice. A debug build takes longer for that than a delta waits for its snapshot.
pub fn large_status() -> Scenario {
    Scenario {
        source: Source::OfSize(LARGE_STATUS),
        growth: 8 * LARGE_STATUS as u64 / 1024,
        ..Scenario::default()
    }
}

pub fn cases() -> Vec<FaultCase> {
    let fails =
        |class, detail, after| Expect::Fails { class, detail, after, retry: Retry::AfterBackoff };
    let connect_timeout = || fails("timeout-connect", "timeout: connect", 4.9..5.2);
    let answer_timeout =
        || fails("timeout-receive-response", "timeout: receive response", 9.9..10.2);
    let was_reset = || fails("connection-closed", "Connection reset by peer", 0.0..0.5);
    // The delta is sent at once, and the large status follows in its own beat on the same
    // connection. After the timeout the status is too old to be sent again on a new connection, or
    // it fails there, too, and is left out.
    let without_status = || Expect::DeliversWithoutStatus {
        after: 0.0..10.5,
        errors: &[
            "no fresh snapshot: it became stale before it was sent",
            "the master failed on them: timeout-send-body: timeout: send body",
        ],
    };
    let proxy = |name: &str, mode, expect| {
        FaultCase::new(format!("network/{name}"), Fault::Proxy(mode), expect)
    };
    let master = |name: &str, fault, expect| {
        let fault = Fault::EveryRequestOnNewConnection(fault);
        FaultCase::new(format!("network/{name}"), fault, expect)
    };
    let reset = |name: &str, fault| {
        let fault = Fault::ProxyAndMaster(ProxyMode::ResetAtEnd, fault);
        FaultCase::new(format!("network/{name}"), fault, was_reset())
    };
    let slow_body = |status: &str| {
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: 900\r\n\r\n");
        MasterFault::Endless(head.into_bytes(), b".".to_vec(), Duration::from_secs(1))
    };
    vec![
        proxy(
            "connection_refused",
            ProxyMode::RefuseConnections,
            fails("refused", "Connection refused", 0.0..0.5),
        ),
        proxy("connection_requests_dropped", ProxyMode::DropConnectionRequests, connect_timeout()),
        proxy("no_answer_to_handshake", ProxyMode::Silent, connect_timeout()),
        master("no_answer_to_request", MasterFault::NeverAnswer(Effect::Lost), answer_timeout()),
        // Half of the time is for the open connection, and half for a new one.
        FaultCase::new(
            "network/no_answer_on_open_and_new_connection",
            Fault::EveryRequest(MasterFault::NeverAnswer(Effect::Lost)),
            fails("timeout-global", "timeout: global", 19.9..20.2),
        ),
        proxy("upload_stalls", ProxyMode::StallAfter(100_000), without_status())
            .in_scenario(large_status()),
        proxy("reset_in_handshake", ProxyMode::ResetAfter(1), was_reset()),
        reset("reset_before_body", MasterFault::CutBeforeRequest),
        reset("reset_in_body", MasterFault::CutInBody),
        reset("reset_after_body", MasterFault::CutAfterBody(Effect::Lost)),
        proxy(
            "reset_in_large_body",
            ProxyMode::ResetAfter(100_000),
            // The reset is noticed by a write, as a reset or as a broken pipe.
            fails("connection-closed", "(os error ", 0.0..0.5),
        )
        .in_scenario(large_status()),
        proxy("slow_upload", ProxyMode::SlowUpload(200_000), without_status())
            .in_scenario(large_status()),
        proxy(
            "handshake_at_one_byte_per_second",
            ProxyMode::OneBytePerSecondDownload,
            connect_timeout(),
        ),
        master(
            "headers_at_one_byte_per_second",
            MasterFault::Slowly(Duration::from_secs(1)),
            answer_timeout(),
        ),
        master(
            "body_of_503_at_one_byte_per_second",
            slow_body("503 No"),
            fails("http-503", "..", 9.9..10.5),
        ),
        master(
            "body_of_200_at_one_byte_per_second",
            slow_body("200 OK"),
            Expect::Delivers { after: 0.0..10.5 },
        ),
    ]
}

/// With a master that does not answer for six intervals, one beat at a time is in progress, and
/// afterwards there is no burst.
pub fn ticks_do_not_pile_up() {
    let interval = Duration::from_secs(1);
    let bed = TestBed::new(Scenario { interval, ticks: Ticks::FromTimer, ..Scenario::default() });
    let mut agent = bed.start();
    bed.master.always(Some(MasterFault::NeverAnswer(Effect::Lost)));
    let attempts = requests_within(&bed, interval * 6);
    assert!((3..=8).contains(&attempts), "{attempts}");
    bed.master.always(None);
    agent.wait_for("a beat", |stats| stats["failure"].is_null());
    let beats = requests_within(&bed, interval * 3);
    assert!((2..=4).contains(&beats), "{beats}");
}

/// The number of requests that arrive within this time. The end of the time is no event, so it
/// sleeps.
fn requests_within(bed: &TestBed, time: Duration) -> usize {
    let before = bed.master.received().len();
    std::thread::sleep(time);
    bed.master.received().len() - before
}
