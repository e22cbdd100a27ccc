//! Sends one POST to the master and maps its answer to a [`Verdict`]. Runs on the heartbeat thread.

pub(crate) mod body;
pub(crate) mod crypto;
pub(crate) mod explain;
pub(crate) mod first_bytes;
pub(crate) mod identity;
pub(crate) mod resolver;
pub(crate) mod tls;
pub(crate) mod verifier;
pub(crate) mod x509;

use std::io::Read;
use std::mem;
#[cfg(feature = "cli")]
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use ureq::config::{AutoHeaderValue, Config, IpFamily};
use ureq::http::{Response, StatusCode, header};
use ureq::unversioned::transport::Connector;
use ureq::{Agent, Timeout};

use crate::limits;
use crate::master::explain::{class, closed_without_an_answer, explain, is_closed};
use crate::master::resolver::MasterResolver;
use crate::master::tls::{Answer, Exchange, SharedConnections, TlsConnector};
use crate::text::sanitize;

/// What the answer to a POST means for the beat and its deltas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The master accepted the body; its deltas are delivered.
    Accepted,
    /// The master rejected the body, and would reject the same body again.
    BodyRejected,
    /// The master does not know this host or this certificate. The host may be enrolled again.
    HostRejected,
    /// The master cannot process the POST now. Holds the time from `Retry-After`, if the answer has
    /// one.
    RetryLater(Option<Duration>),
    /// No answer arrived.
    #[default]
    NoResponse,
}

impl Verdict {
    /// The verdict of an answer. No other code interprets a status.
    ///
    /// | status | verdict | what follows |
    /// | --- | --- | --- |
    /// | 2xx | [`Accepted`](Self::Accepted) | the deltas are acknowledged |
    /// | 2xx except 204, with an HTML page | [`RetryLater`](Self::RetryLater) | a gateway answered; backoff |
    /// | 400, 413, 422 | [`BodyRejected`](Self::BodyRejected) | a lighter body is sent, see `content` |
    /// | 403, 404 | [`HostRejected`](Self::HostRejected) | beats continue at each tick; deltas stay queued |
    /// | 408, 425, 429, 5xx | [`RetryLater`](Self::RetryLater) | backoff, or `Retry-After` clamped to 1 s … 10 min |
    /// | 3xx and all others | [`RetryLater`](Self::RetryLater) | redirects are not followed; backoff |
    /// | no answer | [`NoResponse`](Self::NoResponse) | backoff |
    fn of(status: StatusCode, retry_after: Option<Duration>) -> Self {
        match status.as_u16() {
            200..=299 => Self::Accepted,
            400 | 413 | 422 => Self::BodyRejected,
            403 | 404 => Self::HostRejected,
            408 | 425 | 429 | 500..=599 => Self::RetryLater(retry_after),
            _ => Self::RetryLater(None),
        }
    }

    /// The verdict of an answer that is an HTML page. A 204 has no body, whatever its
    /// `Content-Type`.
    fn of_page(status: StatusCode, retry_after: Option<Duration>) -> Self {
        match Self::of(status, retry_after) {
            Self::Accepted if status != StatusCode::NO_CONTENT => Self::RetryLater(retry_after),
            verdict => verdict,
        }
    }
}

/// The result of one POST. By default it has no answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct PostResult {
    pub(crate) verdict: Verdict,
    /// The class of the result: `http-204`, `timeout-connect`, `refused`. See
    /// [`Failure::class`](crate::Failure::class).
    pub(crate) class: String,
    /// The text of the answer or of the error, safe to log. Empty for an accepted POST.
    pub(crate) detail: String,
    /// The time from the request to the verdict.
    pub(crate) took: Duration,
    /// Whether the last handshake resumed a session.
    pub(crate) resumed: bool,
    /// No answer arrived on a reused connection. The master may have closed it before the request
    /// was sent, so the caller retries once, immediately, on a new connection.
    pub(crate) stale: bool,
    /// The answer was an HTML page, so it probably came from a gateway.
    pub(crate) is_page: bool,
    /// Part of the body was sent, and the answer is 5xx or missing. The master may have applied the
    /// deltas.
    pub(crate) in_doubt: bool,
}

impl PostResult {
    /// The result of an answer, from the master or from a gateway.
    fn of(
        status: StatusCode,
        retry_after: Option<&str>,
        content_type: Option<&str>,
        body: &[u8],
    ) -> Self {
        let is_page = is_page(content_type, body);
        let retry_after = retry_after.and_then(|text| parse_retry_after(text, SystemTime::now()));
        let verdict_of = if is_page { Verdict::of_page } else { Verdict::of };
        let verdict = verdict_of(status, retry_after);
        let text = sanitize(&String::from_utf8_lossy(body));
        let detail = match verdict {
            Verdict::Accepted => String::new(),
            _ if status.is_success() => {
                sanitize(&format!("the answer is an HTML page, probably of a gateway: {text}"))
            }
            _ => text,
        };
        let class = format!("http-{}", status.as_u16());
        Self { verdict, class, detail, is_page, ..Self::default() }
    }

    /// The result of a beat that panicked. Whether the master answered is unknown.
    pub(crate) fn panicked(message: &str) -> Self {
        Self { class: "panic".to_owned(), detail: message.to_owned(), ..Self::default() }
    }

    /// The result of a body that could not be serialized. Nothing was sent. It counts as a rejected
    /// body.
    pub(crate) fn invalid_body(error: &serde_json::Error) -> Self {
        Self {
            verdict: Verdict::BodyRejected,
            class: "invalid-body".to_owned(),
            detail: sanitize(&error.to_string()),
            ..Self::default()
        }
    }
}

/// An HTTP client for the master. It is replaced when the bundle or the enrolment changes.
#[derive(Debug)]
pub(crate) struct MasterClient {
    agent: Agent,
    url: String,
    resolver: MasterResolver,
    connections: SharedConnections,
}

impl MasterClient {
    /// A client with this TLS configuration, which contains the bundle and the rule for the
    /// master's certificate.
    pub(crate) fn new(
        host: &str,
        port: u16,
        url: String,
        name: ServerName<'static>,
        tls: Arc<ClientConfig>,
    ) -> Self {
        let resolver = MasterResolver::new(host, port);
        let connections = SharedConnections::default();
        let connector = TlsConnector::new(tls, name, resolver.clone(), connections.clone());
        Self::with_connector(connector, connections, url, resolver)
    }

    /// A client with this connector, which updates `connections`.
    pub(crate) fn with_connector(
        connector: impl Connector,
        connections: SharedConnections,
        url: String,
        resolver: MasterResolver,
    ) -> Self {
        let agent = Agent::with_parts(config(), connector, resolver.clone());
        Self { agent, url, resolver, connections }
    }

    /// Uses these addresses, in this order, instead of a lookup.
    #[cfg(feature = "cli")]
    pub(crate) fn use_addresses(&self, addresses: &[SocketAddr]) {
        self.resolver.set_addresses(addresses);
    }

    /// A handle that interrupts a POST from another thread. The client cannot be used afterwards.
    pub(crate) fn interrupter(&self) -> Agent {
        self.agent.clone()
    }

    /// The URL to which beats are sent.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Posts `body`. The whole POST takes at most `within`.
    pub(crate) fn post(&self, body: &[u8], within: Duration) -> PostResult {
        self.close_old_or_bad_connection();
        self.connections.update(|connections| connections.exchange = Exchange::default());
        let started = Instant::now();
        let request = self.agent.post(&self.url).content_type("application/json");
        let response = request.config().timeout_global(Some(within)).build().send(body);
        let result = response.map(read);
        let took = started.elapsed();
        let resumed = self.connections.update(|connections| connections.resumed);
        let exchange = self.connections.update(|connections| mem::take(&mut connections.exchange));
        let without_answer = |error: &ureq::Error| {
            let class = class(error);
            let is_new = exchange.has_connected;
            // A resumed handshake sends no certificate.
            let may_be_refused = is_new && !resumed && exchange.answer.is_empty();
            let detail = match class.as_str() {
                "connection-closed" if may_be_refused => closed_without_an_answer(error),
                _ => explain(error),
            };
            let stale = !is_new && may_be_stale(error);
            PostResult { class, detail, stale, ..PostResult::default() }
        };
        let result = result.unwrap_or_else(|error| {
            result_of_answer(&exchange.answer, &error).unwrap_or_else(|| without_answer(&error))
        });
        // An idle connection that was closed does not make the address bad.
        if result.verdict == Verdict::NoResponse && !result.stale {
            self.resolver.report_failure();
        }
        self.count(&result);
        let in_doubt = exchange.body_sent
            && (result.verdict == Verdict::NoResponse || result.class.starts_with("http-5"));
        PostResult { took, resumed, in_doubt, ..result }
    }

    /// Counts consecutive bad answers.
    fn count(&self, result: &PostResult) {
        self.connections.update(|connections| match result.verdict {
            Verdict::Accepted => {
                connections.bad_answers = 0;
                connections.has_accepted = true;
            }
            // `report_failure` has requested a new lookup already.
            Verdict::NoResponse => (),
            // The body is at fault, as this connection has accepted another one.
            Verdict::BodyRejected if connections.has_accepted => (),
            _ => connections.bad_answers += 1,
        });
    }

    /// Closes the connection and requests a new lookup of the name, if the connection is older than
    /// [`limits::CONNECTION_AGE`], or after [`limits::BAD_ANSWERS`] bad answers in a row. The name
    /// may have another address now.
    fn close_old_or_bad_connection(&self) {
        self.connections.update(|connections| {
            let is_bad = connections.bad_answers >= limits::BAD_ANSWERS;
            let is_old =
                connections.opened.is_some_and(|opened| opened.elapsed() >= limits::CONNECTION_AGE);
            if is_bad {
                self.resolver.report_failure();
            } else if is_old {
                self.resolver.look_up_again();
            } else {
                return;
            }
            connections.close = true;
            connections.bad_answers = 0;
            connections.opened = connections.opened.filter(|_| !is_old);
        });
    }
}

/// The result of an answer that is incomplete or invalid. `None`: its status line is missing. A 2xx
/// that is not 204 may be an HTML page, which the headers tell, so they must be complete.
fn result_of_answer(answer: &Answer, error: &ureq::Error) -> Option<PostResult> {
    let is_decided =
        |status: &StatusCode| *status == 204 || !status.is_success() || answer.has_whole_head();
    let status = answer.status().filter(is_decided)?;
    let retry_after = answer.header("retry-after");
    let result = PostResult::of(status, retry_after, answer.header("content-type"), answer.body());
    let has_detail = result.verdict == Verdict::Accepted || !result.detail.is_empty();
    let detail = if has_detail { result.detail } else { explain(error) };
    Some(PostResult { detail, ..result })
}

/// The configuration of ureq. Defaults that matter here are set explicitly.
fn config() -> Config {
    Config::builder()
        // `HTTPS_PROXY` must not redirect beats.
        .proxy(None)
        .https_only(true)
        // Only the master may see the client certificate.
        .max_redirects(0)
        // `Verdict::of` interprets 4xx and 5xx.
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
        // The master closes idle connections; this client does not.
        .max_idle_age(limits::MAX_INTERVAL * 2)
        .build()
}

/// Reads an answer, and at most [`limits::ANSWER_BODY`] bytes of its body.
fn read(mut answer: Response<ureq::Body>) -> PostResult {
    let mut body = Vec::new();
    // The connection can be reused only if the body was read to its end. A truncated body does not
    // change the verdict.
    let _ = answer.body_mut().as_reader().take(limits::ANSWER_BODY as u64).read_to_end(&mut body);
    let header = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
    PostResult::of(
        answer.status(),
        header(header::RETRY_AFTER),
        header(header::CONTENT_TYPE),
        &body,
    )
}

/// Whether an answer is an HTML page. The master answers with JSON or without a body.
fn is_page(content_type: Option<&str>, body: &[u8]) -> bool {
    let media_type =
        content_type.and_then(|text| text.split(';').next()).unwrap_or_default().trim();
    let is_html = ["text/html", "application/xhtml+xml"]
        .iter()
        .any(|html| media_type.eq_ignore_ascii_case(html));
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body).trim_ascii_start();
    is_html || body.starts_with(b"<")
}

/// Parses `Retry-After`, in seconds or as a date. The result is clamped to 1 s … 10 min. `None`:
/// the value is invalid.
pub(crate) fn parse_retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    let wait = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number that overflows is a long time.
        Duration::from_secs(text.parse().unwrap_or(u64::from(u32::MAX)))
    } else {
        httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()
    };
    let (least, most) = limits::RETRY_AFTER;
    Some(wait.clamp(least, most))
}

/// Whether the cause of an error on a reused connection may be that the connection was closed or
/// its route lost while it was idle. A slow master does not get more requests for this: the second
/// try uses a new connection, and only a reused one is retried.
fn may_be_stale(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Io(error) => is_closed(error),
        // During a lookup there is no connection yet.
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
                assert_eq!(Verdict::of(status, later), verdict, "{status}");
                let of_a_page = if verdict == Verdict::Accepted && status != 204 {
                    Verdict::RetryLater(later)
                } else {
                    verdict
                };
                assert_eq!(Verdict::of_page(status, later), of_a_page, "{status}");
            }
        }
    }

    #[test]
    fn html_page_is_recognised() {
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
    fn retry_after_is_clamped_and_invalid_values_are_ignored() {
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

    /// Two masters with the same CA, and a client for a name that has the addresses of both.
    fn two_masters() -> (tempfile::TempDir, [LoopbackMaster; 2], MasterClient) {
        let dir = tempfile::tempdir().unwrap();
        let first = LoopbackMaster::start().unwrap();
        let authority = Some(first.authority().clone());
        let second =
            LoopbackMaster::start_with(Options { authority, ..Options::default() }).unwrap();
        let worker = first.enrol(dir.path()).unwrap();
        second.pin(&worker.uuid, &worker.fingerprint);
        let master = client(&worker.enrolment().unwrap());
        master.resolver.set_addresses(&[first.address(), second.address()]);
        (dir, [first, second], master)
    }

    fn client(enrolment: &Enrolment) -> MasterClient {
        let bundle = Bundle::load(enrolment.agent_dir().value()).unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let verifier = verifier::verifier(&bundle.roots, MasterIdentity::Name, &name);
        let config = verifier::client_config(&bundle.identity, verifier).unwrap();
        // The tests set the addresses of this name; it is never looked up.
        let url = "https://nowhere.invalid:8770/swarm/heartbeat".to_owned();
        MasterClient::new("nowhere.invalid", 8770, url, name, config)
    }

    fn post(master: &MasterClient) -> String {
        master.post(b"{}", limits::POST).class
    }

    #[test]
    fn three_bad_answers_in_a_row_switch_to_the_next_address() {
        let (_dir, [bad, good], master) = two_masters();
        bad.always(Some(Answer::status(503).into()));
        good.always(Some(Answer::status(204).into()));
        let classes: Vec<_> = (0..6)
            .map(|_| {
                let class = post(&master);
                master.resolver.set_addresses(&[bad.address(), good.address()]);
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
    fn fewer_than_three_bad_answers_in_a_row_keep_the_connection() {
        let (_dir, [first, second], master) = two_masters();
        let bad = || Fault::Answer(Answer::status(403));
        let good = || Fault::Answer(Answer::status(204));
        first.script([bad(), bad(), good(), bad(), bad(), good()]);
        assert_eq!(std::array::from_fn::<_, 6, _>(|_| post(&master).len()), [8; 6]);
        assert_eq!((first.connections().len(), second.connections().len()), (1, 0));
    }

    #[test]
    fn rejected_bodies_keep_a_connection_that_has_accepted_one() {
        let (_dir, [first, second], master) = two_masters();
        let rejected = || Fault::Answer(Answer::status(422));
        first.script([
            Fault::Answer(Answer::status(204)),
            rejected(),
            rejected(),
            rejected(),
            rejected(),
        ]);
        let classes: Vec<_> = (0..5).map(|_| post(&master)).collect();
        assert_eq!(classes[1..], ["http-422"; 4]);
        assert_eq!((first.connections().len(), second.connections().len()), (1, 0));
        // A connection that has accepted nothing may lead to a wrong address.
        master.connections.update(|connections| connections.has_accepted = false);
        first.script([rejected(), rejected(), rejected()]);
        (0..3).for_each(|_| drop(post(&master)));
        second.always(Some(Answer::status(204).into()));
        master.close_old_or_bad_connection();
        master.resolver.set_addresses(&[first.address(), second.address()]);
        assert_eq!(post(&master), "http-204");
        assert_eq!(second.connections().len(), 1);
    }

    #[test]
    fn failed_handshake_makes_the_next_attempt_start_with_the_next_address() {
        let (_dir, [bad, good], master) = two_masters();
        good.always(Some(Answer::status(204).into()));
        bad.script([
            Fault::CutBeforeHandshake,
            Fault::Banner(b"HTTP/1.0 400 Bad Request\r\n\r\n".to_vec()),
        ]);
        for _ in 0..2 {
            master.resolver.set_addresses(&[bad.address(), good.address()]);
            assert!(!post(&master).starts_with("http-"));
            master.resolver.set_addresses(&[bad.address(), good.address()]);
            assert_eq!(post(&master), "http-204");
            // The next round opens a new connection, starting with the address that failed.
            master.resolver.connected_to(bad.address());
            master.connections.update(|connections| connections.close = true);
        }
        assert_eq!(bad.connections().len(), 2);
    }

    #[test]
    fn connection_is_closed_after_ten_minutes_and_the_name_looked_up_again() {
        let (_dir, [first, second], master) = two_masters();
        first.always(Some(Answer::status(204).into()));
        second.always(Some(Answer::status(204).into()));
        assert_eq!((post(&master), post(&master)), ("http-204".to_owned(), "http-204".to_owned()));
        let age = |age: Duration| {
            master.connections.update(|it| it.opened = Instant::now().checked_sub(age))
        };
        age(limits::CONNECTION_AGE - Duration::from_secs(5));
        post(&master);
        assert_eq!(first.connections().len(), 1);
        age(limits::CONNECTION_AGE);
        master.close_old_or_bad_connection();
        assert!(!master.resolver.is_fresh(), "the name is looked up again");
        master.resolver.set_addresses(&[second.address()]);
        post(&master);
        assert_eq!((first.connections().len(), second.connections().len()), (1, 1));
    }

    #[test]
    fn post_is_in_doubt_if_body_was_sent_and_answer_is_5xx_or_missing() {
        let (_dir, [first, _second], master) = two_masters();
        master.resolver.set_addresses(&[first.address()]);
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
            master.resolver.set_addresses(&[first.address()]);
        }
    }
}
