//! Unusual answers on a connection: early, interim and incomplete ones, and bytes after an answer.

use std::io::{self, Write};
use std::time::Duration;

use crossbeam_channel::bounded;
use decnet_heartbeat::{LifecycleDelta, Operation, Snapshot};
use serde_json::json;

use crate::support::{Fixture, RawMaster, TIMEOUT, now, wait_for_stats};

/// More bytes than the socket buffers of both sides take.
const BIG: usize = 14 << 20;

const NO_CONTENT: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

/// A source with a status of this size, which is created in advance.
fn big_source() -> impl FnMut() -> Snapshot + Send + 'static {
    let snapshot = Snapshot::new(&json!({"deployed": true, "pad": "x".repeat(BIG)}));
    move || snapshot.clone()
}

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// What the master does after its answer, while the client sends the body.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    /// It closes the connection with unread bytes, which resets it.
    Close,
    /// It reads no more bytes.
    Stall,
}

/// A master that sends this answer to a large body before it reads the body.
fn master_with_early_answer(fixture: &Fixture, answer: &'static [u8], then: Then) -> RawMaster {
    RawMaster::new(fixture, move |connection| {
        loop {
            let length = connection.read_head()?;
            if length > BIG {
                connection.send(answer)?;
                if then == Then::Stall {
                    connection.block();
                }
                return Ok(());
            }
            connection.read_body(length)?;
            connection.send(NO_CONTENT)?;
        }
    })
}

#[test]
fn answer_before_the_end_of_the_body_counts() {
    let cases: [(&[u8], Then, &str); 4] = [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nnot yours", Then::Close, "http-403"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nnot yours", Then::Stall, "http-403"),
        (
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 403 Forbidden\r\n\r\nnot yours",
            Then::Close,
            "http-403",
        ),
        (b"HTTP/1.1 429 Slow Down\r\nRetry-After: 600\r\n\r\nnot yours", Then::Close, "http-429"),
    ];
    for (answer, then, class) in cases {
        let fixture = Fixture::new();
        let master = master_with_early_answer(&fixture, answer, then);
        let (builder, _tick) = fixture.builder();
        let heartbeat =
            master.redirect(&fixture, builder).status_source(big_source()).start().unwrap();
        let failed = wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
        let failure = failed.failure.unwrap();
        assert_eq!(
            (failure.class.as_str(), failure.detail.as_str()),
            (class, "not yours"),
            "{answer:?} {then:?}"
        );
        if class == "http-429" {
            let next =
                failed.next_beat.unwrap().duration_since(std::time::SystemTime::now()).unwrap();
            assert!(next > Duration::from_secs(500), "Retry-After counts, too: {next:?}");
        }
    }
}

#[test]
fn acceptance_before_the_end_of_the_body_delivers() {
    let fixture = Fixture::new();
    let master = master_with_early_answer(&fixture, NO_CONTENT, Then::Close);
    let (builder, _tick) = fixture.builder();
    let heartbeat = master.redirect(&fixture, builder).status_source(big_source()).start().unwrap();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    assert!(stats.failure.is_none() && stats.waiting == 0, "{stats:?}");
}

#[test]
fn answer_413_makes_the_next_body_lighter_at_once() {
    let fixture = Fixture::new();
    let master = master_with_early_answer(&fixture, b"HTTP/1.1 413 Too Large\r\n\r\n", Then::Close);
    let (builder, tick) = fixture.builder();
    let heartbeat = master.redirect(&fixture, builder).status_source(big_source()).start().unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    assert!(stats.failure.is_none(), "{stats:?}");
    heartbeat.deltas().push(deployed("d")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1 && stats.rejected == 0);
    tick.send(now()).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.beats >= 3);
    assert!(stats.status_fault.unwrap().contains("http-413"));
}

#[test]
fn closed_connection_during_a_large_body_makes_the_next_one_lighter() {
    let fixture = Fixture::new();
    let master = RawMaster::new(&fixture, |connection| {
        loop {
            let length = connection.read_head()?;
            if length > BIG {
                return Ok(());
            }
            connection.read_body(length)?;
            connection.send(NO_CONTENT)?;
        }
    });
    let (builder, _tick) = fixture.builder();
    let heartbeat = master.redirect(&fixture, builder).status_source(big_source()).start().unwrap();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!(stats.rejected, 0);
    let (_, first) = master.requests.recv_timeout(TIMEOUT).unwrap();
    assert!(first["status"]["error"].as_str().unwrap().contains("connection-closed"), "{first}");
    assert_eq!(first["lifecycle"][0]["decky_name"], "d");
}

#[test]
fn status_line_counts_without_complete_headers() {
    for interim in [
        "",
        "HTTP/1.1 100 Continue\r\n\r\n",
        "HTTP/1.1 102 Processing\r\nx: y\r\n\r\nHTTP/1.1 103 E\r\n\r\n",
    ] {
        let fixture = Fixture::new();
        let master = RawMaster::new(&fixture, move |connection| {
            connection.read_request()?;
            connection.send(format!("{interim}HTTP/1.1 404 Not Found\r\ncontent-le").as_bytes())
        });
        let (builder, _tick) = fixture.builder();
        let heartbeat = master.redirect(&fixture, builder).start().unwrap();
        let failure = wait_for_stats(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
        assert_eq!(failure.class, "http-404", "{interim:?}: {failure:?}");
    }
}

/// Bytes that follow an answer on its connection.
#[derive(Clone, Copy, Debug)]
enum Leftover {
    /// A TLS record in the same packet.
    Record,
    /// The first half of a record in the same packet.
    HalfARecord,
    /// A record 5 ms later.
    LaterRecord,
}

#[test]
fn leftover_bytes_are_not_the_next_answer() {
    for leftover in [Leftover::Record, Leftover::HalfARecord, Leftover::LaterRecord] {
        // Depending on the length, one read returns both records or only the first.
        for padding in [0, 1_000, 4_040, 4_096, 7_900] {
            let fixture = Fixture::new();
            let answer = format!("HTTP/1.1 204 No Content\r\nx: {}\r\n\r\n", "y".repeat(padding));
            // The client has read the answer, and the leftover bytes were sent.
            let (answer_read, read) = bounded(1);
            let (leftover_sent, sent) = bounded(1);
            let master = RawMaster::new(&fixture, move |connection| {
                loop {
                    connection.read_request()?;
                    let first = connection.records(&[answer.as_bytes()]);
                    let second = connection.records(&[NO_CONTENT]);
                    match leftover {
                        Leftover::Record => {
                            connection.socket.write_all(&[first, second].concat())?
                        }
                        Leftover::HalfARecord => {
                            connection
                                .socket
                                .write_all(&[&first, &second[..second.len() / 2]].concat())?;
                        }
                        Leftover::LaterRecord => {
                            connection.socket.write_all(&first)?;
                            read.recv().map_err(io::Error::other)?;
                            connection.socket.write_all(&second)?;
                        }
                    }
                    leftover_sent.send(()).map_err(io::Error::other)?;
                }
            });
            let (builder, tick) = fixture.builder();
            let heartbeat = master.redirect(&fixture, builder).start().unwrap();
            for beats in 1..5 {
                wait_for_stats(&heartbeat, |stats| stats.beats == beats);
                // Only a later record waits for it.
                let _ = answer_read.try_send(());
                sent.recv_timeout(TIMEOUT).unwrap();
                if beats < 4 {
                    tick.send(now()).unwrap();
                }
            }
            let connections: Vec<_> =
                master.requests.try_iter().map(|(connection, _)| connection).collect();
            assert_eq!(connections, [1, 2, 3, 4], "{leftover:?} after {padding} bytes");
            assert!(heartbeat.stats().failure.is_none());
        }
    }
}

#[test]
fn incomplete_200_of_a_gateway_acknowledges_nothing() {
    let page =
        "HTTP/1.1 200 OK\r\nServer: gateway\r\nContent-Type: text/html\r\n\r\n<h1>Back soon</h1>";
    let head = page.find("\r\n\r\n").unwrap();
    for cut in [16, 30, 45, head + 2, page.len()] {
        let fixture = Fixture::new();
        let master = RawMaster::new(&fixture, move |connection| {
            connection.read_request()?;
            connection.send(&page.as_bytes()[..cut])
        });
        let (builder, _tick) = fixture.builder();
        let heartbeat = master.redirect(&fixture, builder).start().unwrap();
        heartbeat.deltas().push(deployed("d")).unwrap();
        let stats = wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
        assert_eq!(
            (stats.delivered, stats.beats, stats.waiting),
            (0, 0, 1),
            "cut after {cut}: {stats:?}"
        );
    }
}
