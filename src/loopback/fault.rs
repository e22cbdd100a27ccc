//! The faults of a master, which a test scripts. Values only; `server` carries them out.

use std::time::Duration;

/// A fault of a new connection or of a request.
///
/// Each fault is either of a connection or of a request. It takes effect on the next one, and the
/// faults after it in the script follow it.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::loopback::{Answer, Effect, Fault};
///
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// master.script([
///     Fault::CutBeforeHandshake,           // of the first connection
///     Fault::Answer(Answer::status(500)),  // of the next connection's first request
///     Fault::Serve,                        // the second request is served
///     Fault::CutAfterBody(Effect::Lost),   // the third is lost
/// ]);
/// let heartbeat = builder.start()?;
/// assert!(master.wait_for_beats(2, Duration::from_secs(10)));
/// assert_eq!(master.faults_left(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// Of a request: it is served normally. This is for a request between two faults.
    Serve,
    /// Of a connection: it is closed as soon as it is accepted.
    CutBeforeHandshake,
    /// Of a connection: it is accepted, and nothing is sent until the client closes it.
    NeverHandshake,
    /// Of a connection: these bytes are sent in plain text instead of TLS, then it is closed.
    Banner(Vec<u8>),
    /// Of a request: the connection is cut when the first bytes arrive. The request is not
    /// recorded.
    CutBeforeRequest,
    /// Of a request: the connection is cut when the head and half of the body have arrived. The
    /// request is recorded with that half, and not applied.
    CutInBody,
    /// Of a request: it is read, then the connection is cut without an answer.
    CutAfterBody(Effect),
    /// Of a request: it is read and not applied. The connection is cut after this time.
    CutAfterSilence(Duration),
    /// Of a request: it is read, and nothing is sent until the client closes the connection.
    NeverAnswer(Effect),
    /// Of a request: it is read, recorded and not applied, and this is the answer.
    Answer(Answer),
    /// Of a request: as [`Answer`](Self::Answer) if its body contains these bytes. Otherwise it is
    /// served normally. So a master can fail on one delta.
    AnswerTo(Vec<u8>, Answer),
    /// Of a request: as [`Answer`](Self::Answer), but these bytes are sent unchanged, then the
    /// connection is closed.
    Raw(Vec<u8>),
    /// Of a request: it is read, recorded and not applied, and the answer never ends. The first
    /// bytes are sent once, then the second ones repeatedly, with this pause between them. They can
    /// be headers, interim answers or a body.
    Endless(Vec<u8>, Vec<u8>, Duration),
    /// Of a request: it is served normally, but the answer is sent byte by byte with this pause.
    Slowly(Duration),
    /// Of a request: it is served normally, then the connection is cut without TLS's
    /// `close_notify`.
    CutAfterAnswer,
}

/// Whether the master applies a request that it does not answer.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::loopback::{Effect, Fault, RowStatus, Seen};
/// use decnet_heartbeat::{LifecycleDelta, Operation};
///
/// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
/// master.open_operation(&worker.uuid, "decky-01", "deploy");
/// // The master applies the delta, and its answer is lost. So the delta is sent again.
/// master.script([Fault::CutAfterBody(Effect::Applied)]);
/// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
/// let beats_with_delta = |seen: &Seen| {
///     let beats = seen.received().iter().filter_map(|beat| beat.json.as_ref());
///     beats.filter(|beat| beat["lifecycle"][0]["decky_name"] == "decky-01").count()
/// };
/// assert!(master.wait_until(Duration::from_secs(10), |seen| beats_with_delta(seen) >= 2));
/// assert_eq!(master.rows()[0].status, RowStatus::Succeeded);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It applies the request. Only the answer is missing.
    Applied,
    /// It does not apply the request.
    Lost,
}

/// An HTTP answer.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::loopback::Answer;
///
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// let answer = Answer::status(503).header("Retry-After", "1").body("busy");
/// master.script([answer.into()]);
/// let heartbeat = builder.start()?;
/// heartbeat.beats().recv_timeout(Duration::from_secs(10))?;
/// let failure = heartbeat.stats().failure.ok_or("no failure")?;
/// assert_eq!((failure.class.as_str(), failure.detail.as_str()), ("http-503", "busy"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers in order. `content-length` is added unless it is one of them. After
    /// `connection: close` the connection is closed.
    pub headers: Vec<(String, String)>,
    /// The body's bytes.
    pub body: Vec<u8>,
}

impl Answer {
    /// An answer without headers and body.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::loopback::Answer;
    ///
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// master.script([Answer::status(500).into()]);
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| {
    ///     seen.received().iter().any(|beat| beat.status == Some(500))
    /// }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    /// Adds a header.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::Answer;
    ///
    /// let moved = Answer::status(307).header("Location", "https://127.0.0.1:1/");
    /// assert_eq!(moved.headers[0].0, "Location");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sets the body.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::Answer;
    ///
    /// let answer = Answer::status(422).body(r#"{"detail": "bad delta"}"#);
    /// assert_eq!(answer.body.first(), Some(&b'{'));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// The first header with this name, in any case.
    pub(super) fn first_header(&self, name: &str) -> Option<&str> {
        first_header(&self.headers, name)
    }
}

impl From<Answer> for Fault {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

/// What a fault takes effect on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Connection,
    Request,
}

impl Fault {
    pub(super) fn moment(&self) -> Moment {
        match self {
            Self::CutBeforeHandshake | Self::NeverHandshake | Self::Banner(_) => Moment::Connection,
            Self::Serve
            | Self::CutBeforeRequest
            | Self::CutInBody
            | Self::CutAfterBody(_)
            | Self::CutAfterSilence(_)
            | Self::NeverAnswer(_)
            | Self::Answer(_)
            | Self::AnswerTo(..)
            | Self::Raw(_)
            | Self::Endless(..)
            | Self::Slowly(_)
            | Self::CutAfterAnswer => Moment::Request,
        }
    }
}

/// The first header with this name, in any case.
pub(super) fn first_header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.as_str())
}
