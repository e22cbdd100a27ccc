//! Parses the INI dialect of Python's `configparser` with the settings of the Python agent. Pure
//! functions, for any thread.
//!
//! The crate `configparser` reads another dialect: it cuts a value at every `#` and `;` (also in
//! `/srv/a#b`), folds the case of section names, accepts duplicates and keys without a value, and
//! does not expand `%`. Two agents on one host would read the same file differently. So the dialect
//! is implemented here.

use std::collections::HashMap;

use crate::limits;
use crate::text::sanitize;

/// The section whose keys apply to every other section.
const DEFAULT: &str = "DEFAULT";

/// The depth of nested references, as in Python.
const DEPTH: usize = 10;

/// A parsed file. Keys are in lower case; `%` in values is not expanded yet.
#[derive(Default)]
pub(super) struct Ini {
    sections: HashMap<String, Section>,
}

#[derive(Default)]
struct Section {
    /// The keys in the order of the file. If two of them set the same variable, the first one
    /// counts.
    keys: Vec<String>,
    values: HashMap<String, String>,
}

/// A syntax error. It never quotes a value, as values may be secrets.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) line: usize,
    pub(super) problem: String,
}

impl Ini {
    pub(super) fn parse(text: &str) -> Result<Self, Fault> {
        if text.starts_with('\u{feff}') {
            let problem = "a byte order mark, which the Python agent rejects; save the file as UTF-8 without it";
            return Err(Fault { line: 1, problem: problem.to_owned() });
        }
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let mut ini = Self::default();
        let mut section: Option<String> = None;
        // The key whose value a deeper indented line continues, and its indentation.
        let mut open: Option<(String, usize)> = None;

        for (number, line) in (1..).zip(text.split('\n')) {
            let fault = |problem: String| Fault { line: number, problem };
            let uncommented = before_comment(line);
            let content = trim(uncommented.unwrap_or(line));
            if content.is_empty() {
                // A blank line is part of a value, a comment is not.
                if let (None, Some(section), Some((key, _))) = (uncommented, &section, &open) {
                    ini.append(section, key, "");
                }
                continue;
            }
            let indent = line.chars().take_while(|c| is_space(*c)).count();
            if let (Some(section), Some((key, _))) =
                (&section, open.as_ref().filter(|(_, at)| indent > *at))
            {
                ini.append(section, key, content);
            } else if let Some(name) = header(content) {
                if name != DEFAULT && ini.sections.contains_key(name) {
                    let name = sanitize(name);
                    return Err(fault(format!(
                        "duplicate section [{name}]; merge the two sections"
                    )));
                }
                ini.sections.entry(name.to_owned()).or_default();
                section = Some(name.to_owned());
                open = None;
            } else if let Some(section) = &section {
                let (key, value) = option(content).ok_or_else(|| {
                    fault("neither [section], nor key = value, nor a comment".to_owned())
                })?;
                let entries = ini.sections.entry(section.clone()).or_default();
                if entries.values.insert(key.clone(), value.to_owned()).is_some() {
                    let section = sanitize(section);
                    let key = sanitize(&key);
                    return Err(fault(format!(
                        "duplicate key {key} in [{section}]; remove one of them"
                    )));
                }
                entries.keys.push(key.clone());
                open = Some((key, indent));
            } else {
                return Err(fault("a line before the first [section]".to_owned()));
            }
        }
        Ok(ini)
    }

    /// Whether the file has no section.
    pub(super) fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }

    fn append(&mut self, section: &str, key: &str, line: &str) {
        if let Some(value) =
            self.sections.get_mut(section).and_then(|section| section.values.get_mut(key))
        {
            value.push('\n');
            value.push_str(line);
        }
    }

    /// The keys that apply to `section`, in Python's order, those of `[DEFAULT]` first. Each has
    /// the section in which it is written. Empty if the section does not exist, also if `[DEFAULT]`
    /// has keys.
    pub(super) fn keys<'a>(&'a self, section: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let own = self.sections.get(section);
        let default = own.and_then(|_| self.sections.get(DEFAULT));
        let inherited = default.into_iter().flat_map(|section| &section.keys);
        let added = own.into_iter().flat_map(|section| &section.keys);
        let is_own = move |key: &str| own.is_some_and(|section| section.values.contains_key(key));
        let is_inherited =
            move |key: &str| default.is_some_and(|section| section.values.contains_key(key));
        inherited.map(move |key| (if is_own(key) { section } else { DEFAULT }, key.as_str())).chain(
            added.filter(move |key| !is_inherited(key)).map(move |key| (section, key.as_str())),
        )
    }

    /// The value of `key` in `section`, otherwise in `[DEFAULT]`, with `%` expanded. The error does
    /// not name the key.
    pub(super) fn get(&self, section: &str, key: &str) -> Result<Option<String>, String> {
        let Some(raw) = self.raw(section, key) else { return Ok(None) };
        let mut value = String::new();
        // References can multiply a value. It may grow to the maximum size of a file.
        let mut budget = limits::INI_FILE as usize;
        self.expand(section, raw, 1, &mut budget, &mut value)?;
        Ok(Some(value))
    }

    fn raw(&self, section: &str, key: &str) -> Option<&str> {
        let value =
            |name: &str| self.sections.get(name).and_then(|section| section.values.get(key));
        value(section).or_else(|| value(DEFAULT)).map(|value| value.trim_end_matches(is_space))
    }

    /// Writes `text` to `out`. Replaces `%%` with `%`, and `%(key)s` with the value of that key.
    fn expand(
        &self,
        section: &str,
        text: &str,
        depth: usize,
        budget: &mut usize,
        out: &mut String,
    ) -> Result<(), String> {
        *budget = budget
            .checked_sub(text.len() + 1)
            .ok_or("is too large after the expansion of its %(key)s")?;
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('%') {
            if depth > DEPTH {
                return Err(format!(
                    "refers to other keys more than {DEPTH} levels deep, or to itself"
                ));
            }
            out.push_str(before);
            if let Some(after) = after.strip_prefix('%') {
                out.push('%');
                rest = after;
                continue;
            }
            let (key, after) =
                reference(after).ok_or("has a single %; write %% for a percent sign")?;
            let value = self.raw(section, &key.to_lowercase()).ok_or_else(|| {
                format!(
                    "refers to the key {}, which neither [{section}] nor [{DEFAULT}] has",
                    sanitize(key)
                )
            })?;
            self.expand(section, value, depth + 1, budget, out)?;
            rest = after;
        }
        out.push_str(rest);
        Ok(())
    }
}

/// The part of a line before its comment. `None`: the line has no comment.
fn before_comment(line: &str) -> Option<&str> {
    if trim(line).starts_with(['#', ';']) {
        return Some("");
    }
    let begins_comment = |at: &usize| {
        line.get(..*at).is_some_and(|before| before.is_empty() || before.ends_with(is_space))
    };
    // Python compares the first `#` with the first `;`, then the second ones, and so on. In `a#b #c
    // ;d` the comment is `;d`, because the first `;` begins a comment and the first `#` does not.
    let mut hashes = line.match_indices('#').map(|(at, _)| at);
    let mut semicolons = line.match_indices(';').map(|(at, _)| at);
    loop {
        let round = [hashes.next(), semicolons.next()];
        if round == [None, None] {
            return None;
        }
        if let Some(at) = round.into_iter().flatten().filter(begins_comment).min() {
            return line.get(..at);
        }
    }
}

/// The name in `[name]`, including spaces. Text after the last bracket is ignored.
fn header(content: &str) -> Option<&str> {
    let (name, _) = content.strip_prefix('[')?.rsplit_once(']')?;
    Some(name).filter(|name| !name.is_empty())
}

/// The key, in lower case, and the value of `key = value` or `key: value`.
fn option(content: &str) -> Option<(String, &str)> {
    let (key, value) = content.split_once(['=', ':'])?;
    let key = trim(key).to_lowercase();
    Some((key, trim(value))).filter(|(key, _)| !key.is_empty())
}

/// Parses `(key)s`, without its `%`. Returns the key and the text after it.
fn reference(text: &str) -> Option<(&str, &str)> {
    let (key, after) = text.strip_prefix('(')?.split_once(')')?;
    Some((key, after.strip_prefix('s')?)).filter(|(key, _)| !key.is_empty())
}

pub(super) fn trim(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// White space as in Python: Unicode's, and the four ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(text: &str, key: &str) -> Result<Option<String>, String> {
        Ini::parse(text)
            .map_err(|fault| format!("line {}: {}", fault.line, fault.problem))?
            .get("agent", key)
    }

    fn value(text: &str) -> Option<String> {
        get(&format!("[agent]\n{text}\n"), "k").unwrap()
    }

    fn fault(text: &str) -> (usize, String) {
        let fault = Ini::parse(text).map(|_| ()).unwrap_err();
        (fault.line, fault.problem)
    }

    #[test]
    fn comment_begins_a_line_or_follows_white_space() {
        assert_eq!(value("k = a # b"), Some("a".to_owned()));
        assert_eq!(value("k = a\t;b"), Some("a".to_owned()));
        assert_eq!(value("k = /srv/a#b;c"), Some("/srv/a#b;c".to_owned()));
        assert_eq!(value("  # k = a"), None);
        assert_eq!(value("k = a#b #c ;d"), Some("a#b #c".to_owned()));
    }

    #[test]
    fn keys_are_case_insensitive_and_sections_are_not() {
        assert_eq!(value("K : a"), Some("a".to_owned()));
        assert_eq!(get("[Agent]\nk = a", "k"), Ok(None));
        assert_eq!(get("[ agent ]\nk = a", "k"), Ok(None));
    }

    #[test]
    fn deeper_indented_line_continues_the_value() {
        assert_eq!(value("k = a\n\n  # no\n  b\n c=d\n\n"), Some("a\n\nb\nc=d".to_owned()));
        assert_eq!(value("k = a\n [other]"), Some("a\n[other]".to_owned()));
        assert_eq!(value(" k = a\n j = b"), Some("a".to_owned()));
    }

    #[test]
    fn all_line_ends_are_accepted() {
        assert_eq!(get("[agent]\r\nj = a\rk = b\r\n", "k"), Ok(Some("b".to_owned())));
    }

    #[test]
    fn percent_refers_to_other_keys() {
        assert_eq!(
            get("[DEFAULT]\nbase = /srv\n[agent]\nk = %(BASE)s/100%%", "k"),
            Ok(Some("/srv/100%".to_owned()))
        );
        assert_eq!(
            get("[agent]\nk = 5%", "k"),
            Err("has a single %; write %% for a percent sign".to_owned())
        );
        assert_eq!(
            get("[agent]\nk = %(no)s", "k"),
            Err("refers to the key no, which neither [agent] nor [DEFAULT] has".to_owned())
        );
        assert_eq!(
            get("[agent]\nk = %(k)s", "k"),
            Err("refers to other keys more than 10 levels deep, or to itself".to_owned())
        );
    }

    #[test]
    fn expanded_value_is_bounded() {
        let mut text = "[agent]\nk = %(k0)s\nk8 =\n".to_owned();
        for level in 0..8 {
            text.push_str(&format!("k{level} = {}\n", format!("%(k{})s", level + 1).repeat(50)));
        }
        assert_eq!(
            get(&text, "k"),
            Err("is too large after the expansion of its %(key)s".to_owned())
        );
    }

    #[test]
    fn keys_are_in_the_order_of_python() {
        let ini = Ini::parse("[agent]\nb = 1\na = 2\n[DEFAULT]\nc = 3\na = 4\n").unwrap();
        let keys: Vec<_> = ini.keys("agent").collect();
        assert_eq!(keys, [("DEFAULT", "c"), ("agent", "a"), ("agent", "b")]);
        assert_eq!(ini.keys("master").count(), 0);
    }

    #[test]
    fn names_in_errors_are_escaped_and_truncated() {
        let escape = "\u{1b}[31m";
        let long = "n".repeat(400);
        let cut = format!("{}…", "n".repeat(300));
        for (text, problem) in [
            (
                format!("[{escape}]\n[{escape}]"),
                "duplicate section [\\u{1b}[31m]; merge the two sections",
            ),
            (
                format!("[a]\n{escape}=\n{escape}="),
                "duplicate key \\u{1b}[31m in [a]; remove one of them",
            ),
            (
                format!("[{long}]\nk=\nk="),
                &format!("duplicate key k in [{cut}]; remove one of them"),
            ),
        ] {
            assert_eq!(fault(&text).1, problem);
        }
        let problem = "refers to the key \\u{202e}, which neither [agent] nor [DEFAULT] has";
        assert_eq!(get("[agent]\nk = %(\u{202e})s", "k"), Err(problem.to_owned()));
    }

    #[test]
    fn syntax_errors_name_the_line() {
        let neither = "neither [section], nor key = value, nor a comment";
        for (text, line, problem) in [
            ("a = b", 1, "a line before the first [section]"),
            ("[agent]\n\nword", 3, neither),
            ("[agent]\n= b", 2, neither),
            ("[]\n", 1, "a line before the first [section]"),
            ("[agent]\nk = a\nK = b", 3, "duplicate key k in [agent]; remove one of them"),
            ("[agent]\n[agent]", 2, "duplicate section [agent]; merge the two sections"),
            (
                "\u{feff}[agent]",
                1,
                "a byte order mark, which the Python agent rejects; save the file as UTF-8 without it",
            ),
        ] {
            assert_eq!(fault(text), (line, problem.to_owned()), "{text:?}");
        }
    }
}
