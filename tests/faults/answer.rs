//! The master's answers: statuses with and without `Retry-After`, and answers that are not valid
//! HTTP. Unit tests cover every status and every form of the header; these rows show the effect on
//! the beats.

use std::time::{Duration, SystemTime};

use decnet_heartbeat::loopback::{Answer, Fault as MasterFault};

use crate::fault_case::{Expect, Fault, FaultCase, Retry};
use crate::test_bed::{Scenario, TestBed};

/// The `Retry-After` header of an answer.
#[derive(Clone, Copy, Debug)]
pub enum RetryAfter {
    Absent,
    Text(&'static str),
    /// A date that is this far in the future when the answer is sent.
    DateIn(Duration),
}

impl RetryAfter {
    pub fn add_to(self, answer: Answer) -> Answer {
        match self {
            Self::Absent => answer,
            Self::Text(text) => answer.header("Retry-After", text),
            Self::DateIn(time) => {
                answer.header("Retry-After", httpdate::fmt_http_date(SystemTime::now() + time))
            }
        }
    }
}

pub fn cases() -> Vec<FaultCase> {
    [accepted(), rejected(), retried(), malformed()].concat()
}

fn status(name: &str, status: u16, retry_after: RetryAfter, expect: Expect) -> FaultCase {
    let mut answer = Answer::status(status);
    if status != 204 {
        answer = answer.body(format!("{status} from the master\u{1b}[31m\n"));
    }
    let fault = Fault::Answer(answer, retry_after);
    FaultCase::new(format!("answer/{status}{name}"), fault, expect)
}

/// A rejected beat is sent without its deltas and without its status at once, so it fails as soon
/// as any other.
fn fails(class: &'static str, detail: &'static str, retry: Retry) -> Expect {
    Expect::Fails { class, detail, after: 0.0..0.5, retry }
}

fn delivers() -> Expect {
    Expect::Delivers { after: 0.0..0.5 }
}

/// The master has processed the beat, whatever the rest of the answer is.
fn accepted() -> Vec<FaultCase> {
    vec![
        status("", 200, RetryAfter::Absent, delivers()),
        status("_with_retry_after", 204, RetryAfter::Text("86400"), delivers()),
    ]
}

/// The next attempt is made at the next tick. `Retry-After` has no effect.
fn rejected() -> Vec<FaultCase> {
    let case = |name, code, class, detail, retry_after| {
        status(name, code, retry_after, fails(class, detail, Retry::AtNextTick))
    };
    let zero = RetryAfter::Text("0");
    vec![
        case("_with_retry_after", 403, "http-403", "403 from the master", zero),
        case("", 404, "http-404", "404 from the master", RetryAfter::Absent),
        case("_with_retry_after", 422, "http-422", "422 from the master", zero),
    ]
}

/// The next attempt is made after the backoff, or at the time of `Retry-After` within its limits.
fn retried() -> Vec<FaultCase> {
    let case = |name, code, class, detail, retry_after, retry| {
        status(name, code, retry_after, fails(class, detail, retry))
    };
    let unavailable = |name, retry_after, retry| {
        case(name, 503, "http-503", "503 from the master", retry_after, retry)
    };
    let day = RetryAfter::Text("86400");
    vec![
        // Redirects are not followed.
        case("_with_retry_after", 307, "http-307", "307 from the master", day, Retry::AfterBackoff),
        case("_with_retry_after", 401, "http-401", "401 from the master", day, Retry::AfterBackoff),
        case("", 500, "http-500", "500 from the master", RetryAfter::Absent, Retry::AfterBackoff),
        case(
            "_retry_after_date",
            429,
            "http-429",
            "429 from the master",
            RetryAfter::DateIn(Duration::from_secs(4)),
            // A date has no fractions: up to one of the four seconds is lost.
            Retry::AfterSeconds(3.0),
        ),
        unavailable("_retry_after_0", RetryAfter::Text("0"), Retry::AfterSeconds(1.0)),
        unavailable("_retry_after_a_day", day, Retry::AfterSeconds(600.0)),
        unavailable("_retry_after_invalid", RetryAfter::Text("soon"), Retry::AfterBackoff),
    ]
}

/// Answers that are not valid HTTP. A 2xx status line accepts the beat, whatever comes after it.
fn malformed() -> Vec<FaultCase> {
    let case = |name: &str, fault, expect| {
        FaultCase::new(format!("answer/{name}"), Fault::EveryRequest(fault), expect)
    };
    let raw = |bytes: &[u8]| MasterFault::Raw(bytes.to_vec());
    let fails = |class, detail| fails(class, detail, Retry::AfterBackoff);
    let headers = format!("HTTP/1.1 204 No Content\r\nx: {}\r\n\r\n", "y".repeat(64 * 1024));
    let endless = |first: &[u8], repeated: &[u8]| {
        MasterFault::Endless(first.to_vec(), repeated.to_vec(), Duration::ZERO)
    };
    vec![
        case("binary", raw(&[0xff; 3_000]), fails("invalid-response", "invalid HTTP version")),
        case(
            "banner_of_other_protocol",
            raw(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"),
            fails("invalid-response", "invalid HTTP version"),
        ),
        FaultCase::new(
            "answer/banner_of_other_protocol_without_tls",
            Fault::EveryRequestOnNewConnection(MasterFault::Banner(b"220 mail ready\r\n".to_vec())),
            fails("tls", "neither TLS nor HTTP"),
        ),
        case("headers_of_64_kib", raw(headers.as_bytes()), delivers()),
        case(
            "endless_headers",
            endless(b"HTTP/1.1 204 No Content\r\nx: ", &[b'y'; 32]),
            delivers(),
        ),
        case(
            "endless_headers_of_503",
            endless(b"HTTP/1.1 503 No\r\nx: ", &[b'y'; 32]),
            fails("http-503", "header"),
        ),
        case(
            "endless_status_line",
            endless(b"HTTP/1.1 2", &[b'2'; 32]),
            fails("invalid-response", "status"),
        ),
        case(
            "invalid_headers",
            raw(b"HTTP/1.1 503 No\r\nbad\x7f: \x00\r\n\r\n"),
            fails("http-503", "invalid header"),
        ),
        case("endless_body", endless(b"HTTP/1.1 200 OK\r\n\r\n", &[b'.'; 4096]), delivers()),
        case(
            "endless_body_of_503",
            endless(b"HTTP/1.1 503 No\r\n\r\n", &[b'.'; 4096]),
            fails("http-503", "...."),
        ),
        FaultCase::new(
            "answer/endless_interim_answers",
            Fault::EveryRequest(endless(b"", &b"HTTP/1.1 100 Continue\r\n\r\n".repeat(40))),
            // A debug build takes seconds for the thousands of answers on a busy machine. The limit
            // is reached before the timeout of ten seconds.
            Expect::Fails {
                class: "invalid-response",
                detail: "header",
                after: 0.0..6.5,
                retry: Retry::AfterBackoff,
            },
        ),
        case(
            "truncated_body_of_204",
            raw(b"HTTP/1.1 204 No Content\r\ncontent-length: 10\r\n\r\nabc"),
            delivers(),
        ),
        case(
            "truncated_body_of_200",
            raw(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc"),
            delivers(),
        ),
        case(
            "extra_bytes_after_204",
            raw(b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 403 Forbidden\r\n\r\n"),
            delivers(),
        ),
        case("closed_in_headers", raw(b"HTTP/1.1 204 No Con"), delivers()),
        case("closed_in_status_line", raw(b"HTTP/1.1 20"), fails("connection-closed", "closed")),
    ]
}

/// Bytes after an acceptance that look like another answer. They are not read as the next answer,
/// because their connection is not used again.
pub fn extra_bytes_are_not_read_as_next_answer() {
    let bed = TestBed::new(Scenario::default());
    let mut agent = bed.start();
    let extra = Answer::status(204).body("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n");
    bed.master.script(vec![MasterFault::Answer(extra); 5]);
    for beats in 2..=7 {
        agent.tick();
        agent.wait_for("a beat", |stats| stats["beats"] == beats);
    }
    assert_eq!(agent.log_lines("does not accept"), [""; 0]);
    assert_eq!(bed.master.received().len(), 7);
    assert_eq!(bed.master.connections().len(), 6);
}
