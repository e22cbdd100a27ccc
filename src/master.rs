//! One POST and one [`Verdict`]: the only user of ureq towards the master. Runs on the heartbeat thread.

use std::fmt;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use ureq::config::{AutoHeaderValue, Config, IpFamily};
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Timeout};

use crate::enrolment::Enrolment;
use crate::explain::{class, explain};
use crate::limits;
use crate::resolve::MasterResolver;
use crate::text::printable;
use crate::tls::{Answer, Connections, TlsConnector};

/// What an answer means for the beat and its deltas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The deltas in the body are delivered.
    Accepted,
    /// The body is refused. It would be refused again as it stands.
    BodyRefused,
    /// The master does not know this host, or not this certificate. An operator may enrol it again.
    HostRefused,
    /// The master cannot answer now; after how long it wants to be asked again, if it says so.
    TryLater(Option<Duration>),
    /// There was no answer.
    NoAnswer,
}

impl Verdict {
    /// The one place where an answer's status gets its meaning (`PROTOCOL.md`, "The answers").
    ///
    /// | status | verdict | what follows |
    /// | --- | --- | --- |
    /// | 2xx | [`Accepted`](Self::Accepted) | the deltas are delivered, nothing is sent again |
    /// | 400, 413, 422 | [`BodyRefused`](Self::BodyRefused) | liveness goes on without the deltas |
    /// | 403, 404 | [`HostRefused`](Self::HostRefused) | keep beating on the tick, keep the deltas |
    /// | 408, 425, 429, 5xx | [`TryLater`](Self::TryLater) | backoff, or `Retry-After` within 1 s to 10 min |
    /// | 3xx and all else | [`TryLater`](Self::TryLater) | never followed; backoff |
    /// | no answer | [`NoAnswer`](Self::NoAnswer) | backoff |
    fn of(status: StatusCode, retry_after: Option<Duration>) -> Self {
        match status.as_u16() {
            200..=299 => Self::Accepted,
            400 | 413 | 422 => Self::BodyRefused,
            403 | 404 => Self::HostRefused,
            408 | 425 | 429 | 500..=599 => Self::TryLater(retry_after),
            _ => Self::TryLater(None),
        }
    }
}

/// How one POST ended.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
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
}

impl Reply {
    /// The master's, in the status line of its answer.
    fn of(status: StatusCode, verdict: Verdict, said: String) -> Self {
        let class = format!("http-{}", status.as_u16());
        let detail = if verdict == Verdict::Accepted { String::new() } else { said };
        Self { verdict, class, detail, took: Duration::ZERO, resumed: false, stale: false }
    }

    /// There was nothing to send, as the body could not be written. Sent as it stands it would be refused.
    pub(crate) fn unwritten(error: &serde_json::Error) -> Self {
        let (class, detail) = ("unwritten".to_owned(), printable(&error.to_string()));
        Self { verdict: Verdict::BodyRefused, class, detail, took: Duration::ZERO, resumed: false, stale: false }
    }
}

/// The master, as this host may talk to it. It is replaced whole when the bundle or the enrolment changes.
pub(crate) struct Master {
    agent: Agent,
    url: String,
    resolver: MasterResolver,
    connections: Arc<Mutex<Connections>>,
}

impl Master {
    /// Behind a TLS configuration, which knows the bundle and the rule for the master's certificate.
    pub(crate) fn new(enrolment: &Enrolment, name: ServerName<'static>, tls: Arc<ClientConfig>) -> Self {
        let tls = TlsConnector::new(tls, name);
        let connections = tls.connections();
        let resolver = MasterResolver::new(enrolment.master_host().value(), *enrolment.master_port().value());
        let agent = Agent::with_parts(config(), tls, resolver.clone());
        Self { agent, url: enrolment.master_url(), resolver, connections }
    }

    /// What answers behind this connector.
    #[cfg(fuzzing)]
    pub(crate) fn behind(
        connector: impl ureq::unversioned::transport::Connector,
        connections: Arc<Mutex<Connections>>,
    ) -> Self {
        let resolver = MasterResolver::new("127.0.0.1", 1);
        let agent = Agent::with_parts(config(), connector, resolver.clone());
        Self { agent, url: "https://127.0.0.1/swarm/heartbeat".to_owned(), resolver, connections }
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
    pub(crate) fn post(&self, body: &[u8], within: Duration) -> Reply {
        let started = Instant::now();
        let before = self.connections(|connections| {
            connections.answer = Answer::default();
            connections.tried
        });
        let request = self.agent.post(&self.url).content_type("application/json");
        let answer = request.config().timeout_global(Some(within)).build().send(body);
        let took = started.elapsed();
        let Connections { tried, resumed, answer: seen } = self.connections(|connections| connections.clone());
        match (answer, seen.status()) {
            (Ok(answer), _) => Reply { took, resumed, ..read(answer) },
            // The status line has decided already. What is wrong with the rest changes nothing.
            (Err(error), Some(status)) => {
                Reply { took, resumed, ..Reply::of(status, Verdict::of(status, None), explain(&error)) }
            }
            (Err(error), None) => {
                let stale = tried == before && may_be_the_connections(&error);
                // That a connection has ended while it was idle says nothing of the address.
                if !stale {
                    self.resolver.distrust();
                }
                let (class, detail) = (class(&error), explain(&error));
                Reply { verdict: Verdict::NoAnswer, class, detail, took, resumed, stale }
            }
        }
    }

    fn connections<T>(&self, look: impl FnOnce(&mut Connections) -> T) -> T {
        look(&mut self.connections.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Master {
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
fn read(mut answer: Response<ureq::Body>) -> Reply {
    let status = answer.status();
    let retry_after = answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let verdict = Verdict::of(status, retry_after.and_then(|text| parse_retry_after(text, SystemTime::now())));
    let mut said = Vec::new();
    // Read to its end, so that the connection can be used again. A body that breaks off changes nothing.
    let _ = answer.body_mut().as_reader().take(limits::ANSWER_BODY as u64).read_to_end(&mut said);
    Reply::of(status, verdict, printable(&String::from_utf8_lossy(&said)))
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
    let lost = [Kind::BrokenPipe, Kind::ConnectionAborted, Kind::ConnectionReset, Kind::UnexpectedEof];
    match error {
        ureq::Error::Io(error) => lost.contains(&error.kind()),
        // A name that is still being looked up is no connection yet.
        error => matches!(error, ureq::Error::Timeout(timeout) if *timeout != Timeout::Resolve),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_of_the_table_has_its_verdict() {
        let later = Some(Duration::from_secs(7));
        for (statuses, verdict) in [
            (&[200, 201, 202, 204, 206][..], Verdict::Accepted),
            (&[400, 413, 422], Verdict::BodyRefused),
            (&[403, 404], Verdict::HostRefused),
            (&[408, 425, 429, 500, 502, 503, 504, 599], Verdict::TryLater(later)),
            (&[300, 301, 302, 303, 307, 308, 401, 402, 405, 418, 451], Verdict::TryLater(None)),
        ] {
            for status in statuses {
                assert_eq!(Verdict::of(StatusCode::from_u16(*status).unwrap(), later), verdict, "{status}");
            }
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
}
