//! The steps of a check, as text and as JSON. Values only; the main thread prints them.

use std::fmt::Write as _;
use std::io;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Map, Value};

use super::super::arguments::CheckOptions;
use super::super::log_line::Style;
use super::super::output::{print_result, terminal_width};
use super::super::{NOT_CONFIGURED, code_of};
use crate::error::Error;
use crate::text::{escape_json, escape_lines};

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum StepResult {
    Ok,
    Failed,
    /// It needs an earlier step that has failed.
    NotTried,
}

/// One thing that was checked.
#[derive(Debug, Serialize)]
pub(super) struct Step {
    step: &'static str,
    outcome: StepResult,
    /// What was found, or what is wrong. On one line, safe to print.
    message: String,
    /// What to do.
    advice: Option<String>,
    /// The same, for programs.
    facts: Map<String, Value>,
    /// The exit code for this step.
    #[serde(skip)]
    code: u8,
}

impl Step {
    fn new(step: &'static str, outcome: StepResult, message: impl Into<String>, code: u8) -> Self {
        Self { step, outcome, message: message.into(), advice: None, facts: Map::new(), code }
    }

    pub(super) fn good(step: &'static str, message: impl Into<String>) -> Self {
        Self::new(step, StepResult::Ok, message, 0)
    }

    /// `run` would start, and not do all of its work.
    pub(super) fn bad(
        step: &'static str,
        message: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self::new(step, StepResult::Failed, message, 1).advise(advice)
    }

    /// `run` would not start, and exit as for this error.
    pub(super) fn refused(
        step: &'static str,
        error: &Error,
        message: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self::new(step, StepResult::Failed, message, code_of(error)).advise(advice)
    }

    pub(super) fn not_tried(step: &'static str, why: impl Into<String>) -> Self {
        Self::new(step, StepResult::NotTried, format!("not tried: {}", why.into()), 0)
    }

    /// Adds what to do. A good step may have advice, too.
    pub(super) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Adds what to do before the advice that is there.
    pub(super) fn advise_first(mut self, advice: impl Into<String>) -> Self {
        let advice = advice.into();
        self.advice = Some(match self.advice {
            Some(next) => format!("{advice}; {next}"),
            None => advice,
        });
        self
    }

    pub(super) fn fact(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.facts.insert(name.to_owned(), value.into());
        self
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn is_good(&self) -> bool {
        self.outcome == StepResult::Ok
    }

    /// The step as text, wrapped to a terminal of this width.
    pub(super) fn text(&self, style: Style, width: Option<usize>) -> String {
        let (mark, colour) = match self.outcome {
            StepResult::Ok => ('✓', 32),
            StepResult::Failed => ('✗', 31),
            StepResult::NotTried => ('-', 2),
        };
        let mark = match style {
            Style::Coloured => format!("\u{1b}[{colour}m{mark}\u{1b}[0m"),
            Style::Plain => mark.to_string(),
        };
        let mut text = format!("{mark} {:NAME_WIDTH$}", self.step);
        push_wrapped(&mut text, INDENT, &one_line(&self.message), width);
        if let Some(advice) = &self.advice {
            // Writing to a String cannot fail.
            let _ = write!(text, "{:INDENT$}→ ", "");
            push_wrapped(&mut text, INDENT + 2, &one_line(advice), width);
        }
        text
    }
}

/// Adds words and a line end to a line that has `indent` columns. Breaks the line between words, so
/// that it fits `width`. A word that is too long is not broken.
fn push_wrapped(text: &mut String, indent: usize, words: &str, width: Option<usize>) {
    let mut column = indent;
    for word in words.split(' ') {
        let length = word.chars().count();
        if column == indent {
            column += length;
        } else if width.is_some_and(|width| column + 1 + length > width) {
            let _ = write!(text, "\n{:indent$}", "");
            column = indent + length;
        } else {
            text.push(' ');
            column += 1 + length;
        }
        text.push_str(word);
    }
    text.push('\n');
}

/// The text on one line, with control characters escaped.
fn one_line(text: &str) -> String {
    escape_lines(text).replace('\n', "\\u{a}")
}

/// Columns of a step's name.
const NAME_WIDTH: usize = 14;

/// Columns before a message: the mark, a space and the name.
const INDENT: usize = NAME_WIDTH + 2;

/// The steps so far. As text, each step is printed at once.
pub(super) struct Checklist {
    steps: Vec<Step>,
    is_json: bool,
    style: Style,
    /// The columns of the terminal; `None`: lines are not wrapped.
    width: Option<usize>,
    /// The error if a step could not be printed.
    printed: Result<(), Error>,
}

/// The result as JSON.
#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    works: bool,
    exit_code: u8,
    steps: &'a [Step],
}

impl Checklist {
    pub(super) fn new(options: &CheckOptions) -> Self {
        Self {
            steps: Vec::new(),
            is_json: options.json,
            style: Style::of(&io::stdout()),
            width: terminal_width(),
            printed: Ok(()),
        }
    }

    pub(super) fn add(&mut self, step: Step) {
        if !self.is_json && self.printed.is_ok() {
            self.printed = print_result(&step.text(self.style, self.width));
        }
        self.steps.push(step);
    }

    fn exit_code(&self) -> u8 {
        self.steps.iter().map(|step| step.code).max().unwrap_or(0)
    }

    /// Prints the summary, or the JSON. Fails if anything could not be printed.
    pub(super) fn finish(self) -> Result<ExitCode, Error> {
        let exit_code = self.exit_code();
        let rest = if self.is_json { self.report(exit_code) } else { summary(exit_code) };
        self.printed?;
        print_result(&rest)?;
        Ok(ExitCode::from(exit_code))
    }

    fn report(&self, exit_code: u8) -> String {
        let works = self.steps.iter().all(|step| step.outcome != StepResult::Failed);
        let report =
            Report { version: env!("CARGO_PKG_VERSION"), works, exit_code, steps: &self.steps };
        // Serializing strings and numbers cannot fail.
        escape_json(&serde_json::to_string_pretty(&report).unwrap_or_default()) + "\n"
    }
}

fn summary(exit_code: u8) -> String {
    let result = match exit_code {
        0 => return "\n`run` would work here.\n".to_owned(),
        NOT_CONFIGURED => "`run` would not start here",
        _ => "Something is wrong here",
    };
    format!("\n{result}: see the steps with ✗.\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_and_advice_are_lines() {
        let step = Step::bad("tcp", "refused", "start it");
        assert_eq!(
            step.text(Style::Plain, None),
            "✗ tcp           refused\n                → start it\n"
        );
        assert!(step.text(Style::Coloured, None).starts_with("\u{1b}[31m✗\u{1b}[0m tcp "));
        assert_eq!(
            Step::not_tried("tls", "needs tcp").text(Style::Plain, None),
            "- tls           not tried: needs tcp\n"
        );
    }

    #[test]
    fn lines_fit_the_terminal() {
        let step = Step::bad("tcp", "127.0.0.1:8443: Connection refused", "start the controller");
        assert_eq!(
            step.text(Style::Plain, Some(40)),
            "✗ tcp           127.0.0.1:8443:\n                Connection refused\n\
             \x20               → start the controller\n"
        );
        let path = "x".repeat(60);
        let step = Step::good("ca.crt", format!("file {path} is good"));
        assert_eq!(
            step.text(Style::Plain, Some(60)),
            format!("✓ ca.crt        file\n{:16}{path}\n{:16}is good\n", "", "")
        );
    }

    #[test]
    fn exit_code_is_the_most_severe_one() {
        let exit = |steps: Vec<Step>| {
            let mut list = Checklist {
                steps: Vec::new(),
                is_json: true,
                style: Style::Plain,
                width: None,
                printed: Ok(()),
            };
            steps.into_iter().for_each(|step| list.add(step));
            list.exit_code()
        };
        let good = || Step::good("a", "").advise("later");
        assert_eq!(exit(vec![good(), Step::not_tried("b", "")]), 0);
        assert_eq!(exit(vec![good(), Step::bad("b", "", "")]), 1);
        let refused = |error: Error| Step::refused("a", &error, "", "");
        assert_eq!(exit(vec![refused(Error::not_enrolled("")), Step::bad("b", "", "")]), 78);
        assert_eq!(exit(vec![refused(Error::not_enrolled("").passing())]), 1);
    }
}
