//! Throttles log lines about repeated problems. Values only; each thread has its own.
//!
//! - The source of a problem is a `&'static str`, so the number of sources is fixed.
//! - Each source has at most [`limits::THROTTLE_TEXTS`] different texts with a count each. All
//!   others share one more count. So a text that is different every time cannot fill the memory or
//!   the log.
//! - Texts are compared without their numbers and ids: "timeout after 12 ms" and "timeout after 13
//!   ms" are the same problem.
//! - A problem is logged at the counts 1, 2, 4, 8 …, so *n* problems of one source cause at most
//!   (texts + 1) · (log₂ *n* + 1) lines.
//! - The counts of a source are reset after some time without problems. Its next problem is then
//!   logged at once.
//! - The end of a problem is logged only if the problem was.

use std::collections::HashMap;
use std::mem;
use std::time::{Duration, Instant};

use crate::limits;
use crate::panics::quietly;

/// The problems of each source.
#[derive(Debug, Default)]
pub(crate) struct LogThrottle(HashMap<&'static str, Source>);

#[derive(Debug)]
struct Source {
    known: Vec<Problem>,
    /// The count of all problems that are not in `known`.
    others: u64,
    last: Instant,
    /// The time without a problem after which the counts are reset.
    reset_after: Duration,
    /// The problem that lasts.
    lasting: Option<String>,
    /// A problem was logged, and no end since.
    is_logged: bool,
}

#[derive(Debug)]
struct Problem {
    folded: String,
    count: u64,
}

impl LogThrottle {
    /// Counts a problem. Calls `log` with the count if it is to be logged: the first, second,
    /// fourth, eighth time … Returns whether it is.
    pub(crate) fn log(&mut self, source: &'static str, text: &str, log: impl FnOnce(u64)) -> bool {
        log_counted(self.count(source, text, Instant::now()), log)
    }

    /// As [`log`](Self::log), for a problem that lasts until [`end`](Self::end): it is counted when
    /// it begins or changes.
    pub(crate) fn log_lasting(
        &mut self,
        source: &'static str,
        text: &str,
        log: impl FnOnce(u64),
    ) -> bool {
        log_counted(self.count_lasting(source, text, Instant::now()), log)
    }

    /// The problem of a source has ended. Returns whether to log that.
    pub(crate) fn end(&mut self, source: &'static str) -> bool {
        let Some(source) = self.0.get_mut(source) else { return false };
        source.lasting = None;
        mem::take(&mut source.is_logged)
    }

    /// Counts a problem. Returns its count if it is to be logged.
    pub(crate) fn count(&mut self, source: &'static str, text: &str, now: Instant) -> Option<u64> {
        let source = self.0.entry(source).or_insert_with(|| Source::new(now));
        source.reset_if_quiet(now);
        let count = source.count(folded(text));
        *count = count.saturating_add(1);
        let logged = count.is_power_of_two().then_some(*count);
        source.is_logged |= logged.is_some();
        logged
    }

    fn count_lasting(&mut self, source: &'static str, text: &str, now: Instant) -> Option<u64> {
        let known = self.0.entry(source).or_insert_with(|| Source::new(now));
        let last = known.lasting.replace(text.to_owned());
        if last.is_some_and(|last| last == text) { None } else { self.count(source, text, now) }
    }
}

fn log_counted(count: Option<u64>, log: impl FnOnce(u64)) -> bool {
    if let Some(count) = count {
        quietly(|| log(count));
    }
    count.is_some()
}

impl Source {
    fn new(now: Instant) -> Self {
        Self {
            known: Vec::new(),
            others: 0,
            last: now,
            reset_after: limits::THROTTLE_RESET,
            lasting: None,
            is_logged: false,
        }
    }

    /// Resets the counts after some time without a problem: twice the last gap between problems. So
    /// problems at a steady pace are not reset, even if the pace is slow. Beats may be an hour
    /// apart.
    fn reset_if_quiet(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.last);
        if gap > self.reset_after {
            self.known = Vec::new();
            self.others = 0;
        }
        self.reset_after =
            gap.saturating_mul(2).clamp(limits::THROTTLE_RESET, limits::MAX_INTERVAL * 2);
        self.last = now;
    }

    fn count(&mut self, folded: String) -> &mut u64 {
        let place =
            self.known.iter().position(|problem| problem.folded == folded).unwrap_or_else(|| {
                if self.known.len() < limits::THROTTLE_TEXTS {
                    self.known.push(Problem { folded, count: 0 });
                    return self.known.len() - 1;
                }
                usize::MAX
            });
        self.known.get_mut(place).map_or(&mut self.others, |problem| &mut problem.count)
    }
}

/// The text without numbers, hexadecimal ids, and words with digits that are as long as an id. The
/// status of an HTTP answer stays, because 403 and 502 are different problems. The text is
/// truncated to [`limits::LOG_TEXT`] characters.
fn folded(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next()
        && out.len() < limits::LOG_TEXT
    {
        let word = word(rest, first);
        let (token, after) =
            rest.split_at_checked(word.max(first.len_utf8())).unwrap_or((rest, ""));
        fold_into(&mut out, token);
        rest = after;
    }
    out
}

/// The length of the first word of `text`: letters, digits and hyphens.
fn word(text: &str, first: char) -> usize {
    if !first.is_ascii_alphanumeric() {
        return 0;
    }
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(text.len());
    // Ids are shorter. A very long word must not be copied whole.
    end.min(limits::LOG_TEXT)
}

fn fold_into(out: &mut String, token: &str) {
    const ID: usize = 8;
    const STATUS: usize = 3;
    let has_digit = token.bytes().any(|byte| byte.is_ascii_digit());
    let is_hex = token.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    let is_status = |digits: &str| {
        digits.len() == STATUS && (out.ends_with("answered ") || out.ends_with("http-"))
    };
    if !token.starts_with(|c: char| c.is_ascii_alphanumeric()) || is_status(token) {
        out.push_str(token);
    } else if (is_hex && (has_digit || token.len() >= ID)) || token.starts_with("0x") {
        out.push('#');
    } else if let Some((head, tail)) = token.split_once('-') {
        fold_into(out, head);
        out.push('-');
        fold_into(out, tail);
    } else if has_digit && token.len() >= ID {
        out.push('#');
    } else {
        let mut in_digits = false;
        for c in token.chars() {
            if !c.is_ascii_digit() {
                out.push(c);
            } else if !in_digits {
                out.push('#');
            }
            in_digits = c.is_ascii_digit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of log lines for these problems of one source.
    fn lines(problems: impl IntoIterator<Item = String>) -> usize {
        let mut throttle = LogThrottle::default();
        let now = Instant::now();
        problems.into_iter().filter(|text| throttle.count("disk", text, now).is_some()).count()
    }

    #[test]
    fn problem_is_logged_when_it_changes_and_at_a_decreasing_rate() {
        let mut throttle = LogThrottle::default();
        let now = Instant::now();
        let counts: Vec<_> = (0..20).filter_map(|_| throttle.count("disk", "full", now)).collect();
        assert_eq!(counts, [1, 2, 4, 8, 16]);
        assert_eq!(throttle.count("disk", "read-only", now), Some(1));
        assert_eq!(throttle.count("source", "read-only", now), Some(1), "another source");
    }

    #[test]
    fn alternating_problems_are_each_logged_at_a_decreasing_rate() {
        for kinds in 1..=8 {
            let count = lines(
                (0..kinds * 1_024)
                    .map(|n| ["a", "b", "c", "d", "e", "f", "g", "h"][n % kinds].to_owned()),
            );
            assert_eq!(count, kinds * 11, "{kinds} kinds, 1024 times each");
        }
    }

    #[test]
    fn lines_of_a_source_grow_logarithmically() {
        // Only letters, so that no two words are the same after folding.
        let word = |n: usize| {
            format!("{n}").bytes().map(|digit| char::from(digit - b'0' + b'g')).collect::<String>()
        };
        for n in [1_usize, 10, 100, 10_000] {
            let most = 9 * (n.ilog2() as usize + 1);
            assert!(lines((0..n).map(word)) <= most, "{n} different texts");
            assert!(lines((0..n).map(|n| word(n % 20))) <= most, "{n} of twenty kinds");
        }
    }

    /// The numbers of lines about the beginning and about the end of this problem.
    fn lines_of_lasting(problem: impl Fn(usize) -> Option<String>) -> (usize, usize) {
        let mut throttle = LogThrottle::default();
        let now = Instant::now();
        let mut begun = 0;
        let mut ended = 0;
        for n in 0..4_096 {
            match problem(n) {
                Some(problem) => {
                    begun += usize::from(throttle.count_lasting("disk", &problem, now).is_some());
                }
                None => ended += usize::from(throttle.end("disk")),
            }
        }
        (begun, ended)
    }

    #[test]
    fn lasting_problem_is_logged_when_it_begins_changes_or_ends() {
        let steady = |_| Some("refused".to_owned());
        assert_eq!(lines_of_lasting(steady), (1, 0));
        let flapping = |n: usize| n.is_multiple_of(2).then(|| "refused".to_owned());
        assert_eq!(lines_of_lasting(flapping), (12, 12));
        let alternating = |n: usize| Some(["refused", "timeout"][n % 2].to_owned());
        assert_eq!(lines_of_lasting(alternating), (24, 0));
        let with_an_id = |n: usize| Some(format!("request {n:08x} took {n} ms"));
        assert_eq!(lines_of_lasting(with_an_id), (13, 0));
    }

    #[test]
    fn end_is_logged_once_and_only_after_the_problem_was() {
        let mut throttle = LogThrottle::default();
        for _ in 0..3 {
            throttle.count_lasting("disk", "full", Instant::now());
        }
        assert!(throttle.end("disk") && !throttle.end("disk"));
        assert!(!throttle.end("source"), "it never failed");
    }

    #[test]
    fn numbers_and_ids_do_not_distinguish_problems() {
        for (one, other) in [
            ("timeout after 12 ms", "timeout after 1234 ms"),
            ("request 7f3a9c01 failed", "request deadbeef failed"),
            ("id=0c4f9a52-0b1e-4d9e-beef-0242ac120002", "id=cffe2e9d-7c56-4712-a66b-2a21b063227f"),
            ("at 0x7f3a", "at 0x01ff"),
            ("request req-9aKq27Zz", "request req-77bcQQ0x"),
            ("pid 12, decky-01", "pid 7, decky-02"),
            ("2026-11-24T18:53:42.5Z x", "2027-01-02T00:00:00.123Z x"),
        ] {
            assert_eq!(folded(one), folded(other));
        }
    }

    #[test]
    fn words_and_statuses_distinguish_problems() {
        for (one, other) in [
            ("http-502", "http-503"),
            ("answered 403 no", "answered 404 no"),
            ("refused", "timeout"),
            ("bad face", "bad cafe"),
            ("ä", "ö"),
        ] {
            assert_ne!(folded(one), folded(other));
        }
    }

    #[test]
    fn stored_text_is_truncated() {
        for text in
            ["x".repeat(1 << 20), "ab ".repeat(1 << 20), "-".repeat(1 << 20), "ä".repeat(1 << 20)]
        {
            assert!(folded(&text).len() <= 2 * limits::LOG_TEXT);
        }
        let mut throttle = LogThrottle::default();
        let now = Instant::now();
        for n in 0..1_000 {
            let _ = throttle.count("disk", &"g".repeat(n), now);
        }
        assert_eq!(throttle.0["disk"].known.len(), limits::THROTTLE_TEXTS);
    }

    #[test]
    fn counts_are_reset_after_a_time_without_problems() {
        let mut throttle = LogThrottle::default();
        let now = Instant::now();
        for _ in 0..3 {
            let _ = throttle.count("disk", "full", now);
        }
        assert_eq!(
            throttle.count("disk", "full", now + limits::THROTTLE_RESET + Duration::from_secs(1)),
            Some(1)
        );
    }

    #[test]
    fn failure_of_every_beat_is_throttled_at_any_interval() {
        for interval in [
            limits::MIN_INTERVAL,
            limits::INTERVAL,
            limits::THROTTLE_RESET * 2,
            limits::MAX_INTERVAL,
        ] {
            let mut throttle = LogThrottle::default();
            let start = Instant::now();
            let count = |n: u32| throttle.count("beat", "refused", start + interval * n);
            assert!((0..1_000).filter_map(count).count() <= 12, "{interval:?}");
        }
    }
}
