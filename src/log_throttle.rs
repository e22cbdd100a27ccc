//! Problems that come again and again, and when another line of the log is worth it. Values only; each thread keeps its
//! own.
//!
//! - A source of problems is a `&'static str`, so there is a fixed number of them.
//! - Of each source at most [`limits::THROTTLE_TEXTS`] different texts are kept, and each has a count of its own. All
//!   further ones share one more count. So a text that is new every time cannot fill the memory or the log.
//! - Texts are compared without their numbers and ids: "timeout after 12 ms" and "timeout after 13 ms" are the same
//!   problem.
//! - A count is logged at 1, 2, 4, 8 …, so *n* problems of one source are at most (texts + 1) · (log₂ *n* + 1) lines.
//! - A source without problems for a while is forgotten, and its next problem is logged at once.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::limits;

/// Problems by where they come from.
#[derive(Debug, Default)]
pub(crate) struct LogThrottle(HashMap<&'static str, Source>);

#[derive(Debug)]
struct Source {
    known: Vec<Problem>,
    /// Problems whose text is none of the known ones.
    others: u64,
    last: Instant,
    /// After this long without a problem the source is forgotten.
    quiet: Duration,
}

#[derive(Debug)]
struct Problem {
    folded: String,
    count: u64,
}

impl LogThrottle {
    /// A problem has come (again). How often it has by now, where that is to be logged: the first, second, fourth, eighth
    /// time …
    pub(crate) fn count(&mut self, whose: &'static str, said: &str, now: Instant) -> Option<u64> {
        let source = self.0.entry(whose).or_insert_with(|| Source::new(now));
        source.came(now);
        let count = source.count(folded(said));
        *count = count.saturating_add(1);
        count.is_power_of_two().then_some(*count)
    }
}

impl Source {
    fn new(now: Instant) -> Self {
        Self { known: Vec::new(), others: 0, last: now, quiet: limits::THROTTLE_RESET }
    }

    /// Forgets everything after a quiet time. What comes at a steady pace is never quiet, also where that pace is slow: a
    /// beat may be an hour apart from the next.
    fn came(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.last);
        if gap > self.quiet {
            (self.known, self.others) = (Vec::new(), 0);
        }
        self.quiet = gap.saturating_mul(2).clamp(limits::THROTTLE_RESET, limits::MAX_INTERVAL * 2);
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

/// The text without what differs from one time to the next: numbers, hexadecimal ids, and words with digits that are as
/// long as an id. The status of an HTTP answer stays, since 403 after 502 is another problem. It is cut to
/// [`limits::LOG_TEXT`] characters.
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

/// The bytes of the word that `text` starts with: letters, digits, and hyphens inside it.
fn word(text: &str, first: char) -> usize {
    if !first.is_ascii_alphanumeric() {
        return 0;
    }
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(text.len());
    // No id is longer, and a word without end must not be copied whole.
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

    /// How many lines these problems of one source are.
    fn lines(problems: impl IntoIterator<Item = String>) -> usize {
        let (mut repeats, now) = (LogThrottle::default(), Instant::now());
        problems.into_iter().filter(|said| repeats.count("disk", said, now).is_some()).count()
    }

    #[test]
    fn a_problem_is_logged_when_it_changes_and_then_less_and_less_often() {
        let (mut repeats, now) = (LogThrottle::default(), Instant::now());
        let said: Vec<_> = (0..20).filter_map(|_| repeats.count("disk", "full", now)).collect();
        assert_eq!(said, [1, 2, 4, 8, 16]);
        assert_eq!(repeats.count("disk", "read-only", now), Some(1));
        assert_eq!(repeats.count("source", "read-only", now), Some(1), "another one's");
    }

    #[test]
    fn problems_that_alternate_are_each_logged_less_and_less_often() {
        for kinds in 1..=8 {
            let said = lines(
                (0..kinds * 1_024)
                    .map(|n| ["a", "b", "c", "d", "e", "f", "g", "h"][n % kinds].to_owned()),
            );
            assert_eq!(said, kinds * 11, "{kinds} kinds, 1024 times each");
        }
    }

    #[test]
    fn n_problems_of_a_source_are_no_more_than_nine_logarithms_of_lines() {
        // Letters alone, so that no two are the same after folding.
        let word = |n: usize| {
            format!("{n}").bytes().map(|digit| char::from(digit - b'0' + b'g')).collect::<String>()
        };
        for n in [1_usize, 10, 100, 10_000] {
            let most = 9 * (n.ilog2() as usize + 1);
            assert!(lines((0..n).map(word)) <= most, "{n} that all differ");
            assert!(lines((0..n).map(|n| word(n % 20))) <= most, "{n} of twenty kinds");
        }
    }

    #[test]
    fn numbers_and_ids_do_not_make_another_problem() {
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
    fn words_and_statuses_make_another_problem() {
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
    fn what_is_kept_of_a_text_is_cut() {
        for text in
            ["x".repeat(1 << 20), "ab ".repeat(1 << 20), "-".repeat(1 << 20), "ä".repeat(1 << 20)]
        {
            assert!(folded(&text).len() <= 2 * limits::LOG_TEXT);
        }
        let (mut repeats, now) = (LogThrottle::default(), Instant::now());
        for n in 0..1_000 {
            let _ = repeats.count("disk", &"g".repeat(n), now);
        }
        assert_eq!(repeats.0["disk"].known.len(), limits::THROTTLE_TEXTS);
    }

    #[test]
    fn after_a_quiet_time_it_is_a_new_one() {
        let (mut repeats, now) = (LogThrottle::default(), Instant::now());
        for _ in 0..3 {
            let _ = repeats.count("disk", "full", now);
        }
        assert_eq!(
            repeats.count("disk", "full", now + limits::THROTTLE_RESET + Duration::from_secs(1)),
            Some(1)
        );
    }

    #[test]
    fn what_fails_with_every_beat_is_logged_less_and_less_often_at_any_interval() {
        for interval in [
            limits::MIN_INTERVAL,
            limits::INTERVAL,
            limits::THROTTLE_RESET * 2,
            limits::MAX_INTERVAL,
        ] {
            let (mut repeats, start) = (LogThrottle::default(), Instant::now());
            let count = |n: u32| repeats.count("beat", "refused", start + interval * n);
            assert!((0..1_000).filter_map(count).count() <= 12, "{interval:?}");
        }
    }
}
