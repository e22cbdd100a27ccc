//! The steps of a check, as a person reads them and as a program does. Values only; the main thread prints them.

use std::fmt::Write as _;
use std::io;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Map, Value};

use super::super::output::answer;
use super::super::{NOT_CONFIGURED, code_of, logging};
use crate::error::Error;
use crate::text::{escape_json, escape_lines};

/// How a step went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Ok,
    Failed,
    /// An earlier one stands in the way.
    NotTried,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub(super) struct Step {
    step: &'static str,
    outcome: Outcome,
    /// What was found, or what went wrong. On one line, safe to print.
    says: String,
    /// What to do about it.
    advice: Option<String>,
    /// The same for machines.
    facts: Map<String, Value>,
    /// What the program exits with for it.
    #[serde(skip)]
    code: u8,
}

impl Step {
    fn new(step: &'static str, outcome: Outcome, says: impl Into<String>, code: u8) -> Self {
        Self { step, outcome, says: says.into(), advice: None, facts: Map::new(), code }
    }

    pub(super) fn good(step: &'static str, says: impl Into<String>) -> Self {
        Self::new(step, Outcome::Ok, says, 0)
    }

    /// An agent would start, and not do all of its work.
    pub(super) fn bad(
        step: &'static str,
        says: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self::new(step, Outcome::Failed, says, 1).advise(advice)
    }

    /// An agent would not even start, and exits as for this error.
    pub(super) fn refused(
        step: &'static str,
        error: &Error,
        says: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self::new(step, Outcome::Failed, says, code_of(error)).advise(advice)
    }

    pub(super) fn not_tried(step: &'static str, why: impl Into<String>) -> Self {
        Self::new(step, Outcome::NotTried, format!("not tried: {}", why.into()), 0)
    }

    /// What to do about it. A step that is good may have an advice, too.
    pub(super) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// What to do before what there is to do already.
    pub(super) fn advise_first(mut self, advice: impl Into<String>) -> Self {
        let advice = advice.into();
        self.advice = Some(match self.advice {
            Some(then) => format!("{advice}; {then}"),
            None => advice,
        });
        self
    }

    pub(super) fn fact(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.facts.insert(name.to_owned(), value.into());
        self
    }

    pub(super) fn says(&self) -> &str {
        &self.says
    }

    pub(super) fn is_good(&self) -> bool {
        self.outcome == Outcome::Ok
    }

    pub(super) fn text(&self, paints: bool) -> String {
        let (mark, colour) = match self.outcome {
            Outcome::Ok => ('✓', 32),
            Outcome::Failed => ('✗', 31),
            Outcome::NotTried => ('-', 2),
        };
        let says = one_line(&self.says);
        let mark =
            if paints { format!("\u{1b}[{colour}m{mark}\u{1b}[0m") } else { mark.to_string() };
        let mut text = format!("{mark} {:WIDTH$}{says}\n", self.step);
        if let Some(advice) = &self.advice {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {:WIDTH$}→ {}", "", one_line(advice));
        }
        text
    }
}

/// Whoever made the text, it stays on its line and does nothing to a terminal.
fn one_line(text: &str) -> String {
    escape_lines(text).replace('\n', "\\u{a}")
}

/// What a line begins with is as wide as this.
const WIDTH: usize = 14;

/// The steps so far. As text each is printed at once.
pub(super) struct Checklist {
    steps: Vec<Step>,
    json: bool,
    paints: bool,
    /// Why a part of the answer could not be printed.
    unprinted: Result<(), Error>,
}

/// All that a machine may want.
#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    works: bool,
    exit_code: u8,
    steps: &'a [Step],
}

impl Checklist {
    pub(super) fn new(json: bool) -> Self {
        Self { steps: Vec::new(), json, paints: logging::paints(&io::stdout()), unprinted: Ok(()) }
    }

    pub(super) fn add(&mut self, step: Step) {
        if !self.json && self.unprinted.is_ok() {
            self.unprinted = answer(&step.text(self.paints));
        }
        self.steps.push(step);
    }

    fn exit_code(&self) -> u8 {
        self.steps.iter().map(|step| step.code).max().unwrap_or(0)
    }

    /// Says how it all went. An answer that could not be printed is an error, however good it is.
    pub(super) fn finish(self) -> Result<ExitCode, Error> {
        let exit_code = self.exit_code();
        let rest = if self.json { self.report(exit_code) } else { summary(exit_code) };
        self.unprinted?;
        answer(&rest)?;
        Ok(ExitCode::from(exit_code))
    }

    fn report(&self, exit_code: u8) -> String {
        let works = self.steps.iter().all(|step| step.outcome != Outcome::Failed);
        let report =
            Report { version: env!("CARGO_PKG_VERSION"), works, exit_code, steps: &self.steps };
        // Strings and numbers can be written as JSON.
        escape_json(&serde_json::to_string_pretty(&report).unwrap_or_default()) + "\n"
    }
}

fn summary(exit_code: u8) -> String {
    let work = match exit_code {
        0 => return "\nAn agent would work here.\n".to_owned(),
        NOT_CONFIGURED => "An agent would not start here",
        _ => "An agent would not do all of its work here",
    };
    format!("\n{work}: see what is marked ✗.\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_a_line_and_its_advice_another_one() {
        let step = Step::bad("tcp", "refused", "start it");
        assert_eq!(step.text(false), "✗ tcp           refused\n                → start it\n");
        assert!(step.text(true).starts_with("\u{1b}[31m✗\u{1b}[0m tcp "));
        assert_eq!(
            Step::not_tried("tls", "it takes tcp").text(false),
            "- tls           not tried: it takes tcp\n"
        );
    }

    #[test]
    fn the_exit_code_is_the_gravest_one() {
        let exit = |steps: Vec<Step>| {
            let mut list =
                Checklist { steps: Vec::new(), json: true, paints: false, unprinted: Ok(()) };
            steps.into_iter().for_each(|step| list.add(step));
            list.exit_code()
        };
        let good = || Step::good("a", "").advise("in time");
        assert_eq!(exit(vec![good(), Step::not_tried("b", "")]), 0);
        assert_eq!(exit(vec![good(), Step::bad("b", "", "")]), 1);
        let refused = |error: Error| Step::refused("a", &error, "", "");
        assert_eq!(exit(vec![refused(Error::not_enrolled("")), Step::bad("b", "", "")]), 78);
        assert_eq!(exit(vec![refused(Error::not_enrolled("").passing())]), 1);
    }
}
