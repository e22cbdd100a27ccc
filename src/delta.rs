//! Deltas: how an operation on a decky ended. Values only, for any thread.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::Error;
use crate::limits;
use crate::text::{cut, quoted};

/// An operation on a decky.
///
/// ```
/// use decnet_heartbeat::Operation;
///
/// assert_eq!("mutate".parse(), Ok(Operation::Mutate));
/// assert_eq!(Operation::Deploy.to_string(), "deploy"); // as in the protocol
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// The decky is deployed.
    Deploy,
    /// The decky's services are changed.
    Mutate,
}

impl Operation {
    /// The name in the protocol: `deploy` or `mutate`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deploy => "deploy",
            Self::Mutate => "mutate",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Operation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "deploy" => Ok(Self::Deploy),
            "mutate" => Ok(Self::Mutate),
            _ => Err("must be deploy or mutate".to_owned()),
        }
    }
}

/// How an operation ended.
///
/// ```
/// use decnet_heartbeat::{LifecycleDelta, Operation, Outcome};
///
/// let delta = LifecycleDelta::failed("decky-01", Operation::Deploy, "no such image");
/// match delta.outcome() {
///     Outcome::Succeeded => unreachable!(),
///     Outcome::Failed(error) => assert_eq!(error, "no such image"),
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded.
    Succeeded,
    /// It failed, with this error.
    Failed(String),
}

/// How and when one operation on one decky ended: an element of `lifecycle` in the protocol.
///
/// ```
/// use decnet_heartbeat::{LifecycleDelta, Operation};
///
/// let good = LifecycleDelta::succeeded("decky-01", Operation::Deploy);
/// let bad = LifecycleDelta::failed("decky-02", Operation::Mutate, "compose exited with 1");
/// assert_eq!((good.decky(), bad.decky()), ("decky-01", "decky-02"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LifecycleDelta {
    decky: String,
    operation: Operation,
    outcome: Outcome,
    completed_at: SystemTime,
}

impl LifecycleDelta {
    /// The operation on `decky` ended now with `outcome`. An error is truncated to 2,000
    /// characters, as the master does.
    ///
    /// ```
    /// use decnet_heartbeat::{LifecycleDelta, Operation, Outcome};
    ///
    /// let delta = LifecycleDelta::new("decky-01", Operation::Deploy, Outcome::Succeeded);
    /// assert_eq!(delta.decky(), "decky-01");
    /// ```
    pub fn new(decky: impl Into<String>, operation: Operation, outcome: Outcome) -> Self {
        match outcome {
            Outcome::Succeeded => Self::succeeded(decky, operation),
            Outcome::Failed(error) => Self::failed(decky, operation, error),
        }
    }

    /// The operation on `decky` succeeded, now.
    pub fn succeeded(decky: impl Into<String>, operation: Operation) -> Self {
        Self::ended(decky.into(), operation, Outcome::Succeeded)
    }

    /// The operation on `decky` failed, now. The error is truncated to 2,000 characters, as the
    /// master does.
    ///
    /// ```
    /// use decnet_heartbeat::{LifecycleDelta, Operation, Outcome};
    ///
    /// let log = "x".repeat(5_000);
    /// let delta = LifecycleDelta::failed("decky-01", Operation::Deploy, log);
    /// assert!(matches!(delta.outcome(), Outcome::Failed(error) if error.len() == 2_000));
    /// ```
    pub fn failed(decky: impl Into<String>, operation: Operation, error: impl AsRef<str>) -> Self {
        // It is truncated before it is copied, because it may be the whole log of a build.
        let error = cut(error.as_ref(), limits::DELTA_ERROR).to_owned();
        Self::ended(decky.into(), operation, Outcome::Failed(error))
    }

    fn ended(mut decky: String, operation: Operation, outcome: Outcome) -> Self {
        // The caller's string may have a large capacity.
        decky.shrink_to_fit();
        Self { decky, operation, outcome, completed_at: to_the_microsecond(SystemTime::now()) }
    }

    /// Sets the time of completion, with a resolution of a microsecond, from 1970 to 9999.
    ///
    /// ```
    /// use std::time::{Duration, SystemTime};
    /// use decnet_heartbeat::{LifecycleDelta, Operation};
    ///
    /// let an_hour_ago = SystemTime::now() - Duration::from_secs(3_600);
    /// let delta = LifecycleDelta::succeeded("decky-01", Operation::Deploy).completed_at(an_hour_ago);
    /// assert!(an_hour_ago.duration_since(delta.when())? < Duration::from_micros(1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn completed_at(mut self, at: SystemTime) -> Self {
        self.completed_at = to_the_microsecond(at);
        self
    }

    /// The decky's name.
    pub fn decky(&self) -> &str {
        &self.decky
    }

    /// The operation.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// How it ended.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// When it ended.
    pub fn when(&self) -> SystemTime {
        self.completed_at
    }

    /// Rejects a delta that the master could not match to a row. Called before a delta is queued.
    /// Deltas that an older version has queued are sent without this check.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check_decky(&self.decky)
    }
}

/// Rejects a name that no decky can have.
pub(crate) fn check_decky(name: &str) -> Result<(), Error> {
    if name.trim().is_empty() {
        return Err(Error::setting("decky name", "is empty; a delta needs the name of its decky"));
    }
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if name.len() > limits::DECKY_NAME || !name.bytes().all(is_allowed) {
        let name = quoted(name, limits::DECKY_NAME);
        let most = limits::DECKY_NAME;
        let problem = format!(
            "{name} is not a valid name: use at most {most} characters of A-Z, a-z, 0-9, _, . and -"
        );
        return Err(Error::setting("decky name", problem));
    }
    Ok(())
}

/// Microseconds since 1970, the resolution of the outbox and of the wire.
pub(crate) fn micros(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX).min(LAST_MICROSECOND)
}

/// The inverse of [`micros`].
pub(crate) fn from_micros(micros: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(u64::try_from(micros.min(LAST_MICROSECOND)).unwrap_or(0))
}

fn to_the_microsecond(at: SystemTime) -> SystemTime {
    from_micros(micros(at))
}

/// 9999-12-31T23:59:59.999999Z, the end of RFC 3339. Later times are clamped, so that a wrong clock
/// does not cause a panic.
const LAST_MICROSECOND: i64 = 253_402_300_799_999_999;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_is_truncated_at_a_character() {
        let delta = LifecycleDelta::failed("d", Operation::Deploy, "ä".repeat(3_000));
        assert_eq!(delta.outcome(), &Outcome::Failed("ä".repeat(2_000)));
    }

    #[test]
    fn times_outside_the_calendar_are_clamped() {
        let delta = LifecycleDelta::succeeded("d", Operation::Deploy);
        let early = delta.clone().completed_at(UNIX_EPOCH - Duration::from_secs(1));
        assert_eq!(early.when(), UNIX_EPOCH);
        let late = delta.completed_at(UNIX_EPOCH + Duration::from_secs(1 << 40));
        assert_eq!(micros(late.when()), LAST_MICROSECOND);
        assert_eq!(
            humantime::format_rfc3339_micros(late.when()).to_string(),
            "9999-12-31T23:59:59.999999Z"
        );
    }

    #[test]
    fn delta_without_decky_is_rejected() {
        for name in ["", " ", "\n"] {
            let error = LifecycleDelta::succeeded(name, Operation::Deploy).check().unwrap_err();
            assert_eq!(
                error.to_string(),
                "decky name: is empty; a delta needs the name of its decky"
            );
        }
    }

    #[test]
    fn invalid_decky_name_is_rejected_and_quoted() {
        for name in [
            "a,b",
            "a b",
            "d1\n",
            "\nd1",
            "d1 ",
            "a*",
            "a>",
            "ä",
            "a/b",
            "a\0",
            "\u{1b}[31m",
            "a\u{202e}b",
            "１",
        ] {
            let error = check_decky(name).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!(
                    "decky name: {name:?} is not a valid name: use at most 128 characters"
                )),
                "{error}"
            );
            assert!(!error.chars().any(char::is_control), "{error}");
        }
        for name in ["a", "A-z_0.9", "-", ".", "..", "_"] {
            check_decky(name).unwrap();
        }
    }

    #[test]
    fn long_decky_name_is_rejected_and_truncated() {
        check_decky(&"x".repeat(128)).unwrap();
        for long in ["x".repeat(129), "ä".repeat(1 << 20)] {
            let error = check_decky(&long).unwrap_err().to_string();
            assert!(
                error.contains("\"… is not a valid name") && error.contains("at most 128"),
                "{error}"
            );
            assert!(error.chars().count() < 300, "{error}");
        }
    }

    #[test]
    fn long_error_does_not_keep_its_memory() {
        let log = "x".repeat(10_000_000);
        for _ in 0..40 {
            let mut roomy = String::with_capacity(1 << 20);
            roomy.push('d');
            let delta = LifecycleDelta::failed(roomy, Operation::Deploy, &log);
            let Outcome::Failed(error) = &delta.outcome else { panic!("{delta:?}") };
            assert_eq!((error.len(), error.capacity(), delta.decky.capacity()), (2_000, 2_000, 1));
        }
    }
}
