//! The master's answers: each status with its meaning and with every kind of `Retry-After`, and what is hardly an answer.

use std::time::{Duration, SystemTime};

use decnet_heartbeat::loopback::{Answer, Fault as Wire};

use crate::row::{Again, Fault, Right, Row};
use crate::stage::{Stage, World};

/// What follows a status: the first word of its class is `http-`.
#[derive(Clone, Copy)]
enum Meaning {
    Accepted,
    /// Waits for the tick, whatever `Retry-After` says.
    Refused,
    /// Backs off, whatever `Retry-After` says.
    Fails,
    /// Comes again when `Retry-After` says, within bounds.
    Later,
}

/// `docs/protocol.md`, "The answers". What is not in there fails and is tried again.
const STATUSES: [(u16, Meaning); 21] = [
    (200, Meaning::Accepted),
    (201, Meaning::Accepted),
    (204, Meaning::Accepted),
    (301, Meaning::Fails),
    (302, Meaning::Fails),
    (303, Meaning::Fails),
    (307, Meaning::Fails),
    (308, Meaning::Fails),
    (400, Meaning::Refused),
    (401, Meaning::Fails),
    (403, Meaning::Refused),
    (404, Meaning::Refused),
    (408, Meaning::Later),
    (413, Meaning::Refused),
    (422, Meaning::Refused),
    (425, Meaning::Later),
    (429, Meaning::Later),
    (500, Meaning::Later),
    (502, Meaning::Later),
    (503, Meaning::Later),
    (504, Meaning::Later),
];

/// What the header says, and when a master that says so is asked again.
const RETRY_AFTER: [(&str, RetryAfter, Again); 6] = [
    ("", RetryAfter::No, Again::Soon),
    ("_retry_after_0", RetryAfter::Is("0"), Again::After(1.0)),
    ("_retry_after_a_day", RetryAfter::Is("86400"), Again::After(600.0)),
    // A date has no fractions: up to one of the four seconds is lost.
    ("_retry_after_a_date", RetryAfter::IsADateIn(Duration::from_secs(4)), Again::After(3.0)),
    (
        "_retry_after_a_past_date",
        RetryAfter::Is("Sun, 06 Nov 1994 08:49:37 GMT"),
        Again::After(1.0),
    ),
    ("_retry_after_junk", RetryAfter::Is("soon, or later"), Again::Soon),
];

/// The header, when it is sent.
#[derive(Clone, Copy, Debug)]
pub enum RetryAfter {
    No,
    Is(&'static str),
    IsADateIn(Duration),
}

impl RetryAfter {
    pub fn added_to(self, answer: Answer) -> Answer {
        match self {
            Self::No => answer,
            Self::Is(value) => answer.header("Retry-After", value),
            Self::IsADateIn(time) => {
                answer.header("Retry-After", httpdate::fmt_http_date(SystemTime::now() + time))
            }
        }
    }
}

/// A beat that is refused is tried without its deltas and without its status, all at once.
fn right(status: u16, meaning: Meaning, later: Again) -> Right {
    let class: &'static str = format!("http-{status}").leak();
    let fails = |again| Right::Fails { class, says: "says the master", after: 0.0..0.5, again };
    match meaning {
        Meaning::Accepted => Right::Delivers { after: 0.0..0.5 },
        Meaning::Refused => fails(Again::AtATick),
        Meaning::Fails => fails(Again::Soon),
        Meaning::Later => fails(later),
    }
}

pub fn rows() -> Vec<Row> {
    let mut rows = odd();
    for (status, meaning) in STATUSES {
        for (name, retry_after, again) in RETRY_AFTER {
            let mut answer = Answer::status(status);
            if status != 204 {
                answer = answer.body(format!("{status} says the master\u{1b}[31m\n"));
            }
            let fault = Fault::Answer(answer, retry_after);
            rows.push(Row::new(
                format!("answer/{status}{name}"),
                fault,
                right(status, meaning, again),
            ));
        }
    }
    rows
}

/// What is hardly an answer. A 2xx status line counts, whatever comes after it.
fn odd() -> Vec<Row> {
    let row =
        |name: &str, wire, right| Row::new(format!("answer/{name}"), Fault::Always(wire), right);
    let raw = |bytes: &[u8]| Wire::Raw(bytes.to_vec());
    let fails = |class, says| Right::Fails { class, says, after: 0.0..0.5, again: Again::Soon };
    let delivers = || Right::Delivers { after: 0.0..0.5 };
    let headers = format!("HTTP/1.1 204 No Content\r\nx: {}\r\n\r\n", "y".repeat(64 * 1024));
    let endless =
        |first: &[u8], again: &[u8]| Wire::Endless(first.to_vec(), again.to_vec(), Duration::ZERO);
    vec![
        row("garbage", raw(&[0xff; 3_000]), fails("invalid-response", "")),
        row(
            "another_protocols_banner",
            raw(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"),
            fails("invalid-response", "invalid HTTP version"),
        ),
        Row::new(
            "answer/another_protocols_banner_without_tls",
            Fault::Afresh(Wire::Banner(b"220 mail ready\r\n".to_vec())),
            fails("tls", "neither TLS nor HTTP"),
        ),
        row("headers_of_64_kib", raw(headers.as_bytes()), delivers()),
        row("endless_headers", endless(b"HTTP/1.1 204 No Content\r\nx: ", &[b'y'; 32]), delivers()),
        row(
            "endless_headers_of_a_refusal",
            endless(b"HTTP/1.1 503 No\r\nx: ", &[b'y'; 32]),
            fails("http-503", "header"),
        ),
        row(
            "endless_status_line",
            endless(b"HTTP/1.1 2", &[b'2'; 32]),
            fails("invalid-response", ""),
        ),
        row(
            "headers_that_are_none",
            raw(b"HTTP/1.1 503 No\r\nbad\x7f: \x00\r\n\r\n"),
            fails("http-503", "invalid header"),
        ),
        row("endless_body", endless(b"HTTP/1.1 200 OK\r\n\r\n", &[b'.'; 4096]), delivers()),
        row(
            "endless_body_of_a_refusal",
            endless(b"HTTP/1.1 503 No\r\n\r\n", &[b'.'; 4096]),
            fails("http-503", "...."),
        ),
        row(
            "endless_interim_answers",
            endless(b"", &b"HTTP/1.1 100 Continue\r\n\r\n".repeat(40)),
            fails("invalid-response", "header"),
        ),
        row(
            "truncated_body_after_204",
            raw(b"HTTP/1.1 204 No Content\r\ncontent-length: 10\r\n\r\nabc"),
            delivers(),
        ),
        row(
            "truncated_body_after_200",
            raw(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc"),
            delivers(),
        ),
        row(
            "extra_bytes_after_204",
            raw(b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 403 Forbidden\r\n\r\n"),
            delivers(),
        ),
        row("closed_in_the_headers", raw(b"HTTP/1.1 204 No Con"), delivers()),
        row("closed_in_the_status_line", raw(b"HTTP/1.1 20"), fails("connection-closed", "")),
    ]
}

/// Bytes that come with an acceptance and look like the next answer: they are not taken for it, since the connection that they
/// came on is not used again.
pub fn extra_bytes_are_not_the_next_answer() {
    let stage = Stage::new(World::default());
    let mut subject = stage.start();
    let extra = Answer::status(204).body("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n");
    stage.master.script(vec![Wire::Answer(extra); 5]);
    for beats in 2..=7 {
        subject.tick();
        subject.until("a beat", |stats| stats["beats"] == beats);
    }
    assert_eq!(subject.log_lines("does not accept"), [""; 0]);
    assert_eq!((stage.master.received().len(), stage.master.connections().len()), (7, 6));
}
