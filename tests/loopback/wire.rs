//! What comes over the connection that is no plain answer: early ones, interim ones, what is left over, and what has no end.

use std::io::Write;
use std::time::Duration;

use decnet_heartbeat::{LifecycleDelta, Operation, Snapshot};
use serde_json::json;

use crate::support::{PATIENCE, RawMaster, Stage, now, settled};

/// More than all buffers between the two ends hold.
const BIG: usize = 14 << 20;

const NO_CONTENT: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

/// A source whose status is as large as that, and made before it is asked.
fn big() -> impl FnMut() -> Snapshot + Send + 'static {
    let snapshot = Snapshot::new(&json!({"deployed": true, "pad": "x".repeat(BIG)}));
    move || snapshot.clone()
}

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// What is done after the answer while the body is still on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    /// The connection is closed with unread bytes, and so reset.
    Close,
    /// Nothing more is read.
    Stall,
}

/// A master that answers a large body like this before it has read it.
fn early(stage: &Stage, answer: &'static [u8], then: Then) -> RawMaster {
    RawMaster::new(stage, move |connection| {
        loop {
            let length = connection.read_head()?;
            if length > BIG {
                connection.say(answer)?;
                if then == Then::Stall {
                    connection.stall();
                }
                return Ok(());
            }
            connection.read_body(length)?;
            connection.say(NO_CONTENT)?;
        }
    })
}

#[test]
fn an_answer_that_comes_before_the_body_is_read_counts() {
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
        let stage = Stage::new();
        let master = early(&stage, answer, then);
        let (builder, _tick) = stage.builder();
        let heartbeat = master.instead(&stage, builder).status_source(big()).start().unwrap();
        let failed = settled(&heartbeat, |stats| stats.failure.is_some());
        let failure = failed.failure.unwrap();
        assert_eq!(
            (failure.class.as_str(), failure.detail.as_str()),
            (class, "not yours"),
            "{answer:?} {then:?}"
        );
        if class == "http-429" {
            let next =
                failed.next_beat.unwrap().duration_since(std::time::SystemTime::now()).unwrap();
            assert!(next > Duration::from_secs(500), "its Retry-After counts, too: {next:?}");
        }
    }
}

#[test]
fn an_acceptance_that_comes_before_the_body_is_read_delivers() {
    let stage = Stage::new();
    let master = early(&stage, NO_CONTENT, Then::Close);
    let (builder, _tick) = stage.builder();
    let heartbeat = master.instead(&stage, builder).status_source(big()).start().unwrap();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 1);
    assert!(stats.failure.is_none() && stats.waiting == 0, "{stats:?}");
}

#[test]
fn a_body_that_is_too_large_for_the_master_is_made_lighter_at_once() {
    let stage = Stage::new();
    let master = early(&stage, b"HTTP/1.1 413 Too Large\r\n\r\n", Then::Close);
    let (builder, tick) = stage.builder();
    let heartbeat = master.instead(&stage, builder).status_source(big()).start().unwrap();
    let stats = settled(&heartbeat, |stats| stats.beats == 1);
    assert!(stats.failure.is_none(), "{stats:?}");
    heartbeat.deltas().push(deployed("d")).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1 && stats.rejected == 0);
    tick.send(now()).unwrap();
    let stats = settled(&heartbeat, |stats| stats.beats >= 3);
    assert!(stats.status_fault.unwrap().contains("http-413"));
}

#[test]
fn a_connection_that_ends_while_a_large_body_is_sent_makes_the_next_one_lighter() {
    let stage = Stage::new();
    let master = RawMaster::new(&stage, |connection| {
        loop {
            let length = connection.read_head()?;
            if length > BIG {
                return Ok(());
            }
            connection.read_body(length)?;
            connection.say(NO_CONTENT)?;
        }
    });
    let (builder, _tick) = stage.builder();
    let heartbeat = master.instead(&stage, builder).status_source(big()).start().unwrap();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!(stats.rejected, 0);
    let (_, first) = master.requests.recv_timeout(PATIENCE).unwrap();
    assert!(first["status"]["error"].as_str().unwrap().contains("connection-closed"), "{first}");
    assert_eq!(first["lifecycle"][0]["decky_name"], "d");
}

#[test]
fn a_status_line_counts_though_the_connection_ends_in_the_middle_of_the_headers() {
    for interim in [
        "",
        "HTTP/1.1 100 Continue\r\n\r\n",
        "HTTP/1.1 102 Processing\r\nx: y\r\n\r\nHTTP/1.1 103 E\r\n\r\n",
    ] {
        let stage = Stage::new();
        let master = RawMaster::new(&stage, move |connection| {
            connection.read_request()?;
            connection.say(format!("{interim}HTTP/1.1 404 Not Found\r\ncontent-le").as_bytes())
        });
        let (builder, _tick) = stage.builder();
        let heartbeat = master.instead(&stage, builder).start().unwrap();
        let failure = settled(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
        assert_eq!(failure.class, "http-404", "{interim:?}: {failure:?}");
    }
}

/// What is left on a connection after an answer, and when it comes.
#[derive(Clone, Copy, Debug)]
enum Left {
    /// A whole record, in the same packet.
    Record,
    /// The beginning of one, in the same packet.
    HalfARecord,
    /// A whole record, a moment later.
    Later,
}

#[test]
fn what_is_left_on_a_connection_is_not_the_next_answer() {
    for left in [Left::Record, Left::HalfARecord, Left::Later] {
        // The second record may be in what is read at once with the first, or not.
        for padding in [0, 1_000, 4_040, 4_096, 7_900] {
            let stage = Stage::new();
            let answer = format!("HTTP/1.1 204 No Content\r\nx: {}\r\n\r\n", "y".repeat(padding));
            let master = RawMaster::new(&stage, move |connection| {
                loop {
                    connection.read_request()?;
                    let first = connection.records(&[answer.as_bytes()]);
                    let second = connection.records(&[NO_CONTENT]);
                    match left {
                        Left::Record => connection.socket.write_all(&[first, second].concat())?,
                        Left::HalfARecord => {
                            connection
                                .socket
                                .write_all(&[&first, &second[..second.len() / 2]].concat())?;
                        }
                        Left::Later => {
                            connection.socket.write_all(&first)?;
                            std::thread::sleep(Duration::from_millis(5));
                            connection.socket.write_all(&second)?;
                        }
                    }
                }
            });
            let (builder, tick) = stage.builder();
            let heartbeat = master.instead(&stage, builder).start().unwrap();
            settled(&heartbeat, |stats| stats.beats == 1);
            for beats in 2..5 {
                // It may come only now.
                std::thread::sleep(Duration::from_millis(20));
                tick.send(now()).unwrap();
                settled(&heartbeat, |stats| stats.beats == beats);
            }
            let connections: Vec<_> =
                master.requests.try_iter().map(|(connection, _)| connection).collect();
            assert_eq!(connections, [1, 2, 3, 4], "{left:?} after {padding} bytes");
            assert!(heartbeat.stats().failure.is_none());
        }
    }
}

#[test]
fn a_200_whose_head_has_not_come_whole_delivers_nothing() {
    let page =
        "HTTP/1.1 200 OK\r\nServer: gateway\r\nContent-Type: text/html\r\n\r\n<h1>Back soon</h1>";
    let head = page.find("\r\n\r\n").unwrap();
    for cut in [16, 30, 45, head + 2, page.len()] {
        let stage = Stage::new();
        let master = RawMaster::new(&stage, move |connection| {
            connection.read_request()?;
            connection.say(&page.as_bytes()[..cut])
        });
        let (builder, _tick) = stage.builder();
        let heartbeat = master.instead(&stage, builder).start().unwrap();
        heartbeat.deltas().push(deployed("d")).unwrap();
        let stats = settled(&heartbeat, |stats| stats.failure.is_some());
        assert_eq!(
            (stats.delivered, stats.beats, stats.waiting),
            (0, 0, 1),
            "cut after {cut}: {stats:?}"
        );
    }
}
