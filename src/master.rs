//! One POST and one [`Verdict`]: the only user of ureq towards the master. Runs on the heartbeat thread.

pub(crate) mod body;
pub(crate) mod explain;
pub(crate) mod first_bytes;
pub(crate) mod identity;
pub(crate) mod resolver;
pub(crate) mod tls;
pub(crate) mod verifier;
pub(crate) mod x509;

use std::fmt;
use std::io::Read;
use std::mem;
#[cfg(feature = "cli")]
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use ureq::config::{AutoHeaderValue, Config, IpFamily};
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Timeout};

use crate::limits;
use crate::master::explain::{class, closed_without_an_answer, explain};
use crate::master::resolver::MasterResolver;
use crate::master::tls::{Answer, Connections, TlsConnector};
use crate::text::sanitize;

/// What an answer means for the beat and its deltas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The deltas in the body are delivered.
    Accepted,
    /// The body is refused. It would be refused again as it stands.
    BodyRejected,
    /// The master does not know this host, or not this certificate. An operator may enrol it again.
    HostRejected,
    /// The master cannot answer now; after how long it wants to be asked again, if it says so.
    RetryLater(Option<Duration>),
    /// There was no answer.
    NoResponse,
}

impl Verdict {
    /// The one place where an answer gets its meaning (`PROTOCOL.md`, "The answers").
    ///
    /// | status | verdict | what follows |
    /// | --- | --- | --- |
    /// | 2xx | [`Accepted`](Self::Accepted) | the deltas are delivered, nothing is sent again |
    /// | 2xx but 204, a page of HTML | [`RetryLater`](Self::RetryLater) | a gateway's answer; backoff |
    /// | 400, 413, 422 | [`BodyRejected`](Self::BodyRejected) | the body is made lighter, see `content` |
    /// | 403, 404 | [`HostRejected`](Self::HostRejected) | keep beating on the tick, keep the deltas |
    /// | 408, 425, 429, 5xx | [`RetryLater`](Self::RetryLater) | backoff, or `Retry-After` within 1 s to 10 min |
    /// | 3xx and all else | [`RetryLater`](Self::RetryLater) | never followed; backoff |
    /// | no answer | [`NoResponse`](Self::NoResponse) | backoff |
    fn of(status: StatusCode, retry_after: Option<Duration>, is_page: bool) -> Self {
        match status.as_u16() {
            // 204 has no body, so no header can make it a page.
            200..=203 | 205..=299 if is_page => Self::RetryLater(retry_after),
            200..=299 => Self::Accepted,
            400 | 413 | 422 => Self::BodyRejected,
            403 | 404 => Self::HostRejected,
            408 | 425 | 429 | 500..=599 => Self::RetryLater(retry_after),
            _ => Self::RetryLater(None),
        }
    }
}

/// How one POST ended.
#[derive(Clone, Debug)]
pub(crate) struct PostResult {
    pub(crate) verdict: Verdict,
    /// What class of thing happened, in a word that can be searched for: `http-204`, `timeout-connect`, `refused`.
    pub(crate) class: String,
    /// What the master or the system said, safe to log. Empty when it was accepted.
    pub(crate) detail: String,
    /// From the request to the verdict.
    pub(crate) took: Duration,
    /// The last handshake resumed a session.
    pub(crate) resumed: bool,
    /// There was no answer on a reused connection, which may have ended before, with or without a word: worth one more try
    /// at once, on a fresh one.
    pub(crate) stale: bool,
    /// The answer was a page of HTML, so a gateway may have made it.
    pub(crate) is_page: bool,
    /// Part of the body was sent, and the answer is 5xx or missing: the master may have applied the deltas.
    pub(crate) in_doubt: bool,
}

impl PostResult {
    /// The master's, or a gateway's.
    fn of(
        status: StatusCode,
        retry_after: Option<&str>,
        content_type: Option<&str>,
        body: &[u8],
    ) -> Self {
        let is_page = is_page(content_type, body);
        let retry_after = retry_after.and_then(|text| parse_retry_after(text, SystemTime::now()));
        let verdict = Verdict::of(status, retry_after, is_page);
        let said = sanitize(&String::from_utf8_lossy(body));
        let detail = match verdict {
            Verdict::Accepted => String::new(),
            _ if status.is_success() => {
                sanitize(&format!("a page of HTML, so a gateway answered: {said}"))
            }
            _ => said,
        };
        Self {
            verdict,
            class: format!("http-{}", status.as_u16()),
            detail,
            is_page,
            ..Self::unanswered()
        }
    }

    /// The beat panicked, so nothing is known of an answer.
    pub(crate) fn panicked(said: &str) -> Self {
        Self { class: "panic".to_owned(), detail: said.to_owned(), ..Self::unanswered() }
    }

    fn unanswered() -> Self {
        Self {
            verdict: Verdict::NoResponse,
            class: String::new(),
            detail: String::new(),
            took: Duration::ZERO,
            resumed: false,
            stale: false,
            is_page: false,
            in_doubt: false,
        }
    }

    /// There was nothing to send, as the body could not be written. Sent as it stands it would be refused.
    pub(crate) fn unwritten(error: &serde_json::Error) -> Self {
        let (class, detail) = ("invalid-body".to_owned(), sanitize(&error.to_string()));
        Self { verdict: Verdict::BodyRejected, class, detail, ..Self::unanswered() }
    }
}

/// The master, as this host may talk to it. It is replaced whole when the bundle or the enrolment changes.
pub(crate) struct MasterClient {
    agent: Agent,
    url: String,
    resolver: MasterResolver,
    connections: Arc<Mutex<Connections>>,
    /// Answers in a row that are not 2xx.
    bad_answers: AtomicU32,
}

impl MasterClient {
    /// Behind a TLS configuration, which knows the bundle and the rule for the master's certificate.
    pub(crate) fn new(
        host: &str,
        port: u16,
        url: String,
        name: ServerName<'static>,
        tls: Arc<ClientConfig>,
    ) -> Self {
        let resolver = MasterResolver::new(host, port);
        let tls = TlsConnector::new(tls, name, resolver.clone());
        let connections = tls.connections();
        let agent = Agent::with_parts(config(), tls, resolver.clone());
        Self { agent, url, resolver, connections, bad_answers: AtomicU32::new(0) }
    }

    /// What answers behind this connector.
    #[cfg(fuzzing)]
    pub(crate) fn behind(
        connector: impl ureq::unversioned::transport::Connector,
        connections: Arc<Mutex<Connections>>,
    ) -> Self {
        let resolver = MasterResolver::new("127.0.0.1", 1);
        let agent = Agent::with_parts(config(), connector, resolver.clone());
        let url = "https://127.0.0.1/swarm/heartbeat".to_owned();
        Self { agent, url, resolver, connections, bad_answers: AtomicU32::new(0) }
    }

    /// Uses these addresses of the master's in this order, without a lookup.
    #[cfg(feature = "cli")]
    pub(crate) fn use_addresses(&self, addresses: &[SocketAddr]) {
        self.resolver.know(addresses);
    }

    /// A handle that interrupts a POST from another thread; the master cannot be used afterwards.
    pub(crate) fn interrupter(&self) -> Agent {
        self.agent.clone()
    }

    /// Where the beats go.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Posts `body`, all of it within `within`.
    pub(crate) fn post(&self, body: &[u8], within: Duration) -> PostResult {
        self.leave_a_bad_address();
        let started = Instant::now();
        let before = self.connections(|connections| {
            (connections.answer, connections.body_sent) = (Answer::default(), false);
            connections.tried
        });
        let request = self.agent.post(&self.url).content_type("application/json");
        let answered = request.config().timeout_global(Some(within)).build().send(body);
        let reply = answered.map(read);
        let took = started.elapsed();
        let (tried, resumed, body_sent, seen) = self.connections(|connections| {
            (
                connections.tried,
                connections.resumed,
                connections.body_sent,
                mem::take(&mut connections.answer),
            )
        });
        // What is accepted without 204 could be a page of a gateway: its head says so, and must have come.
        let has_said =
            |status: &StatusCode| *status == 204 || !status.is_success() || seen.has_whole_head();
        let reply = reply.unwrap_or_else(|error| match seen.status().filter(has_said) {
            // The status line has decided already. What is wrong with the rest changes nothing.
            Some(status) => {
                let reply = PostResult::of(
                    status,
                    seen.header("retry-after"),
                    seen.header("content-type"),
                    seen.body(),
                );
                let has_detail = reply.verdict == Verdict::Accepted || !reply.detail.is_empty();
                let detail = if has_detail { reply.detail } else { explain(&error) };
                PostResult { detail, ..reply }
            }
            None => {
                let (class, is_new) = (class(&error), tried != before);
                let detail = match class.as_str() {
                    // A resumed session shows no certificate.
                    "connection-closed" if is_new && !resumed && seen.is_empty() => {
                        closed_without_an_answer(&error)
                    }
                    _ => explain(&error),
                };
                let stale = !is_new && may_be_the_connections(&error);
                PostResult { class, detail, stale, ..PostResult::unanswered() }
            }
        });
        // That a connection has ended while it was idle says nothing of the address.
        if reply.verdict == Verdict::NoResponse && !reply.stale {
            self.resolver.distrust();
        }
        self.count(&reply);
        let in_doubt = body_sent
            && (reply.verdict == Verdict::NoResponse || reply.class.starts_with("http-5"));
        PostResult { took, resumed, in_doubt, ..reply }
    }

    fn count(&self, reply: &PostResult) {
        match reply.verdict {
            Verdict::Accepted => {
                self.bad_answers.store(0, Ordering::Relaxed);
                self.connections(|connections| connections.has_accepted = true);
            }
            // The address is looked up again already.
            Verdict::NoResponse => (),
            // It is the body's fault: this connection has accepted others.
            Verdict::BodyRejected if self.connections(|connections| connections.has_accepted) => (),
            _ => drop(self.bad_answers.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// Closes a connection that is old, or whose answers are bad, and has the name looked up again: it may lead to
    /// another master by now.
    fn leave_a_bad_address(&self) {
        let is_bad = self.bad_answers.load(Ordering::Relaxed) >= limits::BAD_ANSWERS;
        let close = self.connections(|connections| {
            let is_old =
                connections.opened.is_some_and(|opened| opened.elapsed() >= limits::CONNECTION_AGE);
            connections.close |= is_bad || is_old;
            connections.opened = connections.opened.filter(|_| !is_old);
            is_bad || is_old
        });
        if close {
            self.bad_answers.store(0, Ordering::Relaxed);
            self.resolver.look_up_again(is_bad);
        }
    }

    fn connections<T>(&self, look: impl FnOnce(&mut Connections) -> T) -> T {
        look(&mut self.connections.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for MasterClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Master").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Every default of ureq's that matters here, stated.
fn config() -> Config {
    Config::builder()
        // No variable of the environment sends a beat elsewhere.
        .proxy(None)
        .https_only(true)
        // The certificate is shown to the master alone.
        .max_redirects(0)
        // A refusal is an answer with a meaning.
        .http_status_as_error(false)
        .ip_family(IpFamily::Any)
        .user_agent(concat!("decnet-heartbeat/", env!("CARGO_PKG_VERSION")))
        .accept(AutoHeaderValue::None)
        .accept_encoding(AutoHeaderValue::None)
        .timeout_global(Some(limits::POST))
        .timeout_resolve(Some(limits::CONNECT))
        .timeout_connect(Some(limits::CONNECT))
        .timeout_send_request(Some(limits::SEND))
        .timeout_send_body(Some(limits::SEND))
        .timeout_recv_response(Some(limits::RESPONSE))
        .timeout_recv_body(Some(limits::RESPONSE))
        .max_response_header_size(limits::ANSWER_HEADERS)
        .input_buffer_size(limits::HTTP_BUFFER)
        .output_buffer_size(limits::HTTP_BUFFER)
        .max_idle_connections(1)
        .max_idle_connections_per_host(1)
        // The master decides when an idle connection ends, not we.
        .max_idle_age(limits::MAX_INTERVAL * 2)
        .build()
}

/// The verdict of an answer, and the head of what it says.
fn read(mut answer: Response<ureq::Body>) -> PostResult {
    let mut said = Vec::new();
    // Read to its end, so that the connection can be used again. A body that breaks off changes nothing.
    let _ = answer.body_mut().as_reader().take(limits::ANSWER_BODY as u64).read_to_end(&mut said);
    let header = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
    PostResult::of(
        answer.status(),
        header(header::RETRY_AFTER),
        header(header::CONTENT_TYPE),
        &said,
    )
}

/// Whether an answer is a page for people. The master's own answers are JSON, or nothing.
fn is_page(content_type: Option<&str>, body: &[u8]) -> bool {
    let media_type =
        content_type.and_then(|text| text.split(';').next()).unwrap_or_default().trim();
    let is_html = ["text/html", "application/xhtml+xml"]
        .iter()
        .any(|html| media_type.eq_ignore_ascii_case(html));
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body).trim_ascii_start();
    is_html || body.starts_with(b"<")
}

/// `Retry-After` in seconds or as a date, clamped to 1 s … 10 min. Anything else is as if it were not there.
pub(crate) fn parse_retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    let wait = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit are a long time all the same.
        Duration::from_secs(text.parse().unwrap_or(u64::from(u32::MAX)))
    } else {
        httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()
    };
    let (least, most) = limits::RETRY_AFTER;
    Some(wait.clamp(least, most))
}

/// Whether a connection looks like this that the other side had closed, or one that leads nowhere any more. A master that
/// is only slow is not asked twice as often for it: the connection that is tried then is no reused one.
fn may_be_the_connections(error: &ureq::Error) -> bool {
    use std::io::ErrorKind as Kind;
    let lost =
        [Kind::BrokenPipe, Kind::ConnectionAborted, Kind::ConnectionReset, Kind::UnexpectedEof];
    match error {
        ureq::Error::Io(error) => lost.contains(&error.kind()),
        // A name that is still being looked up is no connection yet.
        error => matches!(error, ureq::Error::Timeout(timeout) if *timeout != Timeout::Resolve),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::bundle::Bundle;
    use crate::credentials::enrolment::Enrolment;
    use crate::loopback::{Answer, Effect, Fault, LoopbackMaster, Options};
    use crate::master::identity::MasterIdentity;
    use crate::master::verifier;

    #[test]
    fn every_status_of_the_table_has_its_verdict() {
        let later = Some(Duration::from_secs(7));
        for (statuses, verdict) in [
            (&[200, 201, 202, 204, 206][..], Verdict::Accepted),
            (&[400, 413, 422], Verdict::BodyRejected),
            (&[403, 404], Verdict::HostRejected),
            (&[408, 425, 429, 500, 502, 503, 504, 599], Verdict::RetryLater(later)),
            (&[300, 301, 302, 303, 307, 308, 401, 402, 405, 418, 451], Verdict::RetryLater(None)),
        ] {
            for status in statuses {
                let status = StatusCode::from_u16(*status).unwrap();
                assert_eq!(Verdict::of(status, later, false), verdict, "{status}");
                let of_a_page = if verdict == Verdict::Accepted && status != 204 {
                    Verdict::RetryLater(later)
                } else {
                    verdict
                };
                assert_eq!(Verdict::of(status, later, true), of_a_page, "{status}");
            }
        }
    }

    #[test]
    fn a_page_for_people_is_told_from_the_masters_json() {
        for (content_type, body, page) in [
            (Some("text/html"), &b"Back soon"[..], true),
            (Some("Text/HTML; charset=utf-8"), b"", true),
            (Some("application/xhtml+xml"), b"", true),
            (None, b"\xef\xbb\xbf \r\n<!doctype html>", true),
            (Some("text/plain"), b"<h1>Back soon</h1>", true),
            (Some("application/json"), b"{\"detail\":\"<p>\"}", false),
            (Some("text/plain"), b"ok", false),
            (None, b"", false),
        ] {
            assert_eq!(is_page(content_type, body), page, "{content_type:?} {body:?}");
        }
    }

    #[test]
    fn retry_after_is_clamped_and_junk_is_ignored() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (text, wait) in [
            ("0", Some(1)),
            (" 7 ", Some(7)),
            ("86400", Some(600)),
            ("99999999999999999999999999", Some(600)),
            ("Sun, 06 Nov 1994 08:50:07 GMT", Some(30)),
            ("Tue, 06 Nov 1984 08:50:07 GMT", Some(1)),
            ("", None),
            ("-1", None),
            ("+5", None),
            ("1.5", None),
            ("soon", None),
        ] {
            assert_eq!(parse_retry_after(text, now), wait.map(Duration::from_secs), "{text:?}");
        }
    }

    /// Two masters of one CA, and this host as it reaches the one or the other by a name that leads to both.
    fn two_masters() -> (tempfile::TempDir, [LoopbackMaster; 2], MasterClient) {
        let dir = tempfile::tempdir().unwrap();
        let first = LoopbackMaster::start().unwrap();
        let authority = Some(first.authority().clone());
        let second =
            LoopbackMaster::start_with(Options { authority, ..Options::default() }).unwrap();
        let worker = first.enrol(dir.path()).unwrap();
        second.pin(&worker.uuid, &worker.fingerprint);
        let master = client(&worker.enrolment().unwrap());
        master.resolver.know(&[first.address(), second.address()]);
        (dir, [first, second], master)
    }

    fn client(enrolment: &Enrolment) -> MasterClient {
        let provider = verifier::provider();
        let bundle = Bundle::load(enrolment.agent_dir().value(), &provider).unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let judge = verifier::verifier(&bundle.roots, MasterIdentity::Name, &name, &provider);
        let config = verifier::client_config(&bundle.identity, judge, &provider).unwrap();
        // A name, so that what it leads to can change. It is never looked up here.
        let url = "https://nowhere.invalid:8770/swarm/heartbeat".to_owned();
        MasterClient::new("nowhere.invalid", 8770, url, name, config)
    }

    fn post(master: &MasterClient) -> String {
        master.post(b"{}", limits::POST).class
    }

    #[test]
    fn a_master_that_answers_badly_three_times_in_a_row_is_left_for_the_next_address() {
        let (_dir, [bad, good], master) = two_masters();
        bad.always(Some(Answer::status(503).into()));
        good.always(Some(Answer::status(204).into()));
        let classes: Vec<_> = (0..6)
            .map(|_| {
                let class = post(&master);
                master.resolver.know(&[bad.address(), good.address()]);
                class
            })
            .collect();
        assert_eq!(
            classes,
            ["http-503", "http-503", "http-503", "http-204", "http-204", "http-204"]
        );
        assert_eq!((bad.connections().len(), good.connections().len()), (1, 1));
    }

    #[test]
    fn answers_that_are_bad_now_and_then_keep_the_connection() {
        let (_dir, [first, second], master) = two_masters();
        let bad = || Fault::Answer(Answer::status(403));
        let good = || Fault::Answer(Answer::status(204));
        first.script([bad(), bad(), good(), bad(), bad(), good()]);
        assert_eq!(std::array::from_fn::<_, 6, _>(|_| post(&master).len()), [8; 6]);
        assert_eq!((first.connections().len(), second.connections().len()), (1, 0));
    }

    #[test]
    fn refused_bodies_are_no_fault_of_an_address_that_has_accepted_one() {
        let (_dir, [first, second], master) = two_masters();
        let refused = || Fault::Answer(Answer::status(422));
        first.script([
            Fault::Answer(Answer::status(204)),
            refused(),
            refused(),
            refused(),
            refused(),
        ]);
        let classes: Vec<_> = (0..5).map(|_| post(&master)).collect();
        assert_eq!(classes[1..], ["http-422"; 4]);
        assert_eq!((first.connections().len(), second.connections().len()), (1, 0));
        // One that has never accepted anything may be the wrong one.
        master.connections(|connections| connections.has_accepted = false);
        first.script([refused(), refused(), refused()]);
        (0..3).for_each(|_| drop(post(&master)));
        second.always(Some(Answer::status(204).into()));
        master.leave_a_bad_address();
        master.resolver.know(&[first.address(), second.address()]);
        assert_eq!(post(&master), "http-204");
        assert_eq!(second.connections().len(), 1);
    }

    #[test]
    fn after_a_failed_handshake_the_next_attempt_starts_with_the_next_address() {
        let (_dir, [bad, good], master) = two_masters();
        good.always(Some(Answer::status(204).into()));
        bad.script([
            Fault::CutBeforeHandshake,
            Fault::Banner(b"HTTP/1.0 400 Bad Request\r\n\r\n".to_vec()),
        ]);
        for _ in 0..2 {
            master.resolver.know(&[bad.address(), good.address()]);
            assert!(!post(&master).starts_with("http-"));
            master.resolver.know(&[bad.address(), good.address()]);
            assert_eq!(post(&master), "http-204");
            // The next connection is a new one, and begins with the address that failed.
            master.resolver.connected_to(bad.address());
            master.connections(|connections| connections.close = true);
        }
        assert_eq!(bad.connections().len(), 2);
    }

    #[test]
    fn a_connection_is_left_after_ten_minutes_and_the_name_looked_up_again() {
        let (_dir, [first, second], master) = two_masters();
        first.always(Some(Answer::status(204).into()));
        second.always(Some(Answer::status(204).into()));
        assert_eq!((post(&master), post(&master)), ("http-204".to_owned(), "http-204".to_owned()));
        let age =
            |age: Duration| master.connections(|it| it.opened = Instant::now().checked_sub(age));
        age(limits::CONNECTION_AGE - Duration::from_secs(5));
        post(&master);
        assert_eq!(first.connections().len(), 1);
        age(limits::CONNECTION_AGE);
        master.leave_a_bad_address();
        assert!(!master.resolver.is_fresh(), "it is looked up again");
        master.resolver.know(&[second.address()]);
        post(&master);
        assert_eq!((first.connections().len(), second.connections().len()), (1, 1));
    }

    #[test]
    fn in_doubt_is_what_was_sent_and_not_answered_or_answered_with_5xx() {
        let (_dir, [first, _second], master) = two_masters();
        master.resolver.know(&[first.address()]);
        let faults = [
            (Answer::status(204).into(), false),
            (Answer::status(500).into(), true),
            (Answer::status(429).into(), false),
            (Answer::status(403).into(), false),
            (Answer::status(422).into(), false),
            (Fault::CutAfterBody(Effect::Applied), true),
            (Fault::CutBeforeHandshake, false),
            (Fault::Raw(b"HTTP/1.1 503 No\r\n".to_vec()), true),
            (Fault::Raw(b"HTTP/1.1 40".to_vec()), true),
        ];
        for (fault, in_doubt) in faults {
            first.script([fault.clone()]);
            assert_eq!(master.post(b"{}", limits::POST).in_doubt, in_doubt, "{fault:?}");
            master.resolver.know(&[first.address()]);
        }
    }
}
