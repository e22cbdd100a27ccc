//! Problems that come again and again, and when another line of the log is worth it. Values only; the heartbeat thread
//! keeps them.

use std::collections::HashMap;
use std::time::Instant;

use crate::limits;

/// Problems by where they come from.
#[derive(Debug, Default)]
pub(crate) struct Repeats(HashMap<&'static str, Problem>);

#[derive(Debug)]
struct Problem {
    said: String,
    count: u64,
    last: Instant,
}

impl Repeats {
    /// A problem has come (again). How often it has by now, where that is to be said: when it is a new one, another one or
    /// has not come for ten minutes, and then ever more rarely: the second, fourth, eighth time.
    pub(crate) fn count(&mut self, whose: &'static str, said: &str, now: Instant) -> Option<u64> {
        let known = self.0.get_mut(whose).filter(|problem| problem.said == said && now - problem.last < limits::QUIET);
        let count = match known {
            Some(problem) => {
                (problem.count, problem.last) = (problem.count + 1, now);
                problem.count
            }
            None => {
                self.0.insert(whose, Problem { said: said.to_owned(), count: 1, last: now });
                1
            }
        };
        count.is_power_of_two().then_some(count)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_problem_is_said_when_it_changes_and_then_ever_more_rarely() {
        let (mut repeats, now) = (Repeats::default(), Instant::now());
        let said: Vec<_> = (0..20).filter_map(|_| repeats.count("disk", "full", now)).collect();
        assert_eq!(said, [1, 2, 4, 8, 16]);
        assert_eq!(repeats.count("disk", "read-only", now), Some(1));
        assert_eq!(repeats.count("source", "read-only", now), Some(1), "another one's");
    }

    #[test]
    fn after_a_quiet_time_it_is_a_new_one() {
        let (mut repeats, now) = (Repeats::default(), Instant::now());
        for _ in 0..3 {
            let _ = repeats.count("disk", "full", now);
        }
        assert_eq!(repeats.count("disk", "full", now + limits::QUIET + Duration::from_secs(1)), Some(1));
    }
}
