//! What a master can do wrong, as data: a test scripts a table of it. Values only; `server` acts on them.

use std::time::Duration;

/// One thing that goes wrong, at a new connection or at a request.
///
/// A fault takes effect at the next moment that fits it; the faults scripted behind it wait until it has.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::loopback::{Answer, Effect, Fault};
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let builder = builder.interval(Duration::from_millis(50));
/// master.script([
///     Fault::CutBeforeHandshake,           // at the first connection
///     Fault::Answer(Answer::status(500)),  // at the first request of the next one
///     Fault::Serve,                        // the second request is served
///     Fault::CutAfterBody(Effect::Lost),   // of the third nobody hears
/// ]);
/// let heartbeat = builder.start()?;
/// assert!(master.wait_for_beats(2, SOON)); // all the same
/// assert_eq!(master.faults_left(), 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// At a request: none. It is served as usual, which keeps the place between two faults.
    Serve,
    /// At a connection: closed as soon as it is accepted.
    CutBeforeHandshake,
    /// At a connection: accepted, and then silence until the client goes.
    NeverHandshake,
    /// At a connection: these bytes in plain text instead of TLS, then closed.
    Banner(Vec<u8>),
    /// At a request: the connection is cut when its first bytes arrive; it is not recorded.
    CutBeforeRequest,
    /// At a request: cut when its head and half of its body have arrived; recorded with that half, never applied.
    CutInBody,
    /// At a request: all of it is read, then the connection is cut instead of an answer.
    CutAfterBody(Effect),
    /// At a request: all of it is read and nothing applied, then silence for so long, and then the connection is cut.
    CutAfterSilence(Duration),
    /// At a request: all of it is read, then silence until the client goes.
    NeverAnswer(Effect),
    /// At a request: all of it is read and recorded, nothing is applied, and this is the answer.
    Answer(Answer),
    /// At a request: as [`Answer`](Self::Answer) if its body has these bytes in it, otherwise served as usual: a master
    /// that cannot stomach one delta.
    AnswerTo(Vec<u8>, Answer),
    /// At a request: as [`Answer`](Self::Answer), but these bytes as they stand, then the connection is closed.
    Raw(Vec<u8>),
    /// At a request: all of it is read and recorded, nothing is applied, and the answer never ends: the first bytes, and
    /// then the others again and again, with this pause between two. Headers, interim answers or a body, fast or slow.
    Endless(Vec<u8>, Vec<u8>, Duration),
    /// At a request: served as usual, but the answer goes out a byte at a time with this pause between two.
    Slowly(Duration),
    /// At a request: served as usual, then the connection is cut without TLS's `close_notify`.
    CutAfterAnswer,
}

/// Whether a request that gets no answer was nevertheless acted on.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::loopback::{Effect, Fault, RowStatus, Seen};
/// # use decnet_heartbeat::{LifecycleDelta, Operation};
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// # assert!(master.wait_for_beats(1, SOON));
/// master.open_operation(&worker.uuid, "decky-01", "deploy");
/// // The master acts on the delta, and its answer is lost. So the delta comes again, and finds no open row.
/// master.script([Fault::CutAfterBody(Effect::Applied)]);
/// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
/// let told = |seen: &Seen| {
///     let beats = seen.received().iter().filter_map(|beat| beat.json.as_ref());
///     beats.filter(|beat| beat["lifecycle"][0]["decky_name"] == "decky-01").count()
/// };
/// assert!(master.wait_until(SOON, |seen| told(seen) >= 2));
/// assert_eq!(master.rows()[0].status, RowStatus::Succeeded);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It was: its deltas are in the rows. Only the answer is missing.
    Applied,
    /// It was not: the master forgot it.
    Lost,
}

/// An HTTP answer.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::loopback::Answer;
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// let answer = Answer::status(503).header("Retry-After", "1").body("busy");
/// master.script([answer.into()]);
/// let heartbeat = builder.start()?;
/// # heartbeat.beats().recv_timeout(SOON)?;
/// let failure = heartbeat.stats().failure.ok_or("no failure")?;
/// assert_eq!((failure.class.as_str(), failure.detail.as_str()), ("http-503", "busy"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Headers in their order. `content-length` is added unless it is among them; a `connection: close` is obeyed.
    pub headers: Vec<(String, String)>,
    /// The body's bytes.
    pub body: Vec<u8>,
}

impl Answer {
    /// An answer without headers and body.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::Answer;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// master.script([Answer::status(500).into()]);
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_until(SOON, |seen| seen.received().iter().any(|beat| beat.status == Some(500))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    /// The same with one header more.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::loopback::Answer;
    /// let moved = Answer::status(307).header("Location", "https://127.0.0.1:1/").header("Connection", "close");
    /// assert_eq!(moved.headers[1], ("Connection".to_owned(), "close".to_owned())); // in this order
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The same with this body.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::loopback::Answer;
    /// let answer = Answer::status(422).body(r#"{"detail": "bad delta"}"#);
    /// assert_eq!(answer.body.first(), Some(&b'{'));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// The header of this name in any case, the first of them.
    pub(super) fn first_header(&self, name: &str) -> Option<&str> {
        first_header(&self.headers, name)
    }
}

impl From<Answer> for Fault {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

/// When a fault can take effect.
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

/// The first of `headers` with this name in any case.
pub(super) fn first_header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.as_str())
}
