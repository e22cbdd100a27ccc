//! Finds JSON that the master cannot process, before it is sent unchanged. Values only, for any
//! thread.
//!
//! The master parses a body with Python's `json`, and processes the status after the deltas of the
//! same body. So values that it cannot parse, or parses as something else, are rejected here, with
//! their place. `serde_json` accepts all of these:
//!
//! - a lone surrogate (`"\udcff"`) in a string or a key: Python parses it and cannot serialize it,
//!   and the master answers 500;
//! - an integer with more than 4,300 digits: Python does not parse it;
//! - a number without a finite value (`1e999`): Python parses it as infinity, which is not valid
//!   JSON;
//! - arrays and objects that are nested too deeply for Python.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::limits;
use crate::text::sanitize_within;

/// The first problem in `json`, with its place, such as `deckies[3].name`. `whole` is the name of
/// the whole value. It takes one pass, without recursion or copies.
pub(super) fn problem(whole: &str, json: &RawValue) -> Option<String> {
    let mut scan = Scan { json: json.get(), levels: Vec::new() };
    scan.problem().map(|problem| format!("{} {problem}", scan.place(whole)))
}

/// The first problem with the types in a status: `deckies` must be a list, and each value of
/// `runtime` an object or null.
pub(super) fn problem_of_shape(status: &RawValue) -> Option<String> {
    #[derive(Deserialize)]
    struct Shape<'a> {
        #[serde(borrow)]
        deckies: Option<&'a RawValue>,
        runtime: Option<ObjectOfObjects>,
    }
    match serde_json::from_str::<Shape<'_>>(status.get()) {
        Ok(Shape { deckies: Some(deckies), .. }) if !deckies.get().starts_with('[') => {
            Some("deckies is not a list".to_owned())
        }
        Ok(Shape { runtime: None | Some(ObjectOfObjects), .. }) => None,
        Err(error) => Some(sanitize_within(&error.to_string(), limits::LOG_TEXT)),
    }
}

/// A JSON object whose values are objects or null. The values are not stored.
struct ObjectOfObjects;

impl<'de> Deserialize<'de> for ObjectOfObjects {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self)
    }
}

impl<'de> Visitor<'de> for ObjectOfObjects {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("runtime to be an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        while let Some((_, value)) = map.next_entry::<IgnoredAny, &RawValue>()? {
            if !value.get().starts_with('{') && value.get() != "null" {
                return Err(A::Error::custom("a decky in runtime is not an object"));
            }
        }
        Ok(self)
    }
}

/// The state of a scan.
struct Scan<'a> {
    json: &'a str,
    levels: Vec<Level<'a>>,
}

/// An array or an object that contains the current place.
enum Level<'a> {
    /// The index.
    Array(usize),
    /// The key in its JSON form, and whether a key comes next.
    Object(&'a str, bool),
}

impl Scan<'_> {
    fn problem(&mut self) -> Option<String> {
        let mut at = 0;
        while let Some(&byte) = self.json.as_bytes().get(at) {
            match byte {
                b'{' | b'[' if self.levels.len() == limits::NESTING => {
                    return Some(format!("is nested deeper than {} levels", limits::NESTING));
                }
                b'{' => self.levels.push(Level::Object("", true)),
                b'[' => self.levels.push(Level::Array(0)),
                b'}' | b']' => drop(self.levels.pop()),
                b',' => match self.levels.last_mut() {
                    Some(Level::Array(index)) => *index += 1,
                    Some(Level::Object(_, is_key)) => *is_key = true,
                    None => (),
                },
                b'"' => {
                    let text = string(self.json, at + 1);
                    at += text.len() + 1;
                    if let Some(Level::Object(key, is_key @ true)) = self.levels.last_mut() {
                        *key = text;
                        *is_key = false;
                    }
                    if let Some(surrogate) = lone_surrogate(text) {
                        return Some(format!(
                            "has a lone surrogate, {surrogate}, which the master cannot process"
                        ));
                    }
                }
                b'-' | b'0'..=b'9' => {
                    let number = number(self.json, at);
                    at += number.len().saturating_sub(1);
                    if let Some(problem) = problem_of_number(number) {
                        return Some(problem);
                    }
                }
                _ => (),
            }
            at += 1;
        }
        None
    }

    fn place(&self, whole: &str) -> String {
        const KEY: usize = 40;
        const LEVELS: usize = 8;
        let mut place = whole.to_owned();
        for level in self.levels.iter().take(LEVELS) {
            match level {
                Level::Array(index) => place.push_str(&format!("[{index}]")),
                Level::Object(key, _) => {
                    place.push('.');
                    place.push_str(&sanitize_within(key, KEY));
                }
            }
        }
        place.push_str(if self.levels.len() > LEVELS { "…" } else { "" });
        place
    }
}

/// The string that begins at `start`, without its closing quote.
fn string(json: &str, start: usize) -> &str {
    let rest = json.get(start..).unwrap_or_default();
    let mut is_escaped = false;
    let end = rest.bytes().position(|byte| {
        let ends = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        ends
    });
    end.and_then(|end| rest.get(..end)).unwrap_or(rest)
}

/// The first escape of a surrogate in a string that is not part of a pair.
fn lone_surrogate(text: &str) -> Option<&str> {
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        let escape = rest.get(at..)?;
        let (length, is_lone) =
            match (surrogate(escape), surrogate(escape.get(6..).unwrap_or_default())) {
                (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => (12, false),
                (Some(_), _) => (6, true),
                // Another escape, such as `\\`. Its second byte does not begin an escape.
                (None, _) => (2, false),
            };
        if is_lone {
            return escape.get(..length);
        }
        rest = escape.get(length..).unwrap_or_default();
    }
    None
}

/// The surrogate, if the text begins with the escape of one.
fn surrogate(escape: &str) -> Option<u16> {
    let digits = escape.strip_prefix("\\u")?.get(..4)?;
    let unit = u16::from_str_radix(digits, 16).ok()?;
    (0xd800..=0xdfff).contains(&unit).then_some(unit)
}

/// The number that begins at `start`.
fn number(json: &str, start: usize) -> &str {
    let rest = json.get(start..).unwrap_or_default();
    let end = rest.find(|c: char| !matches!(c, '0'..='9' | '-' | '+' | '.' | 'e' | 'E'));
    end.and_then(|end| rest.get(..end)).unwrap_or(rest)
}

fn problem_of_number(number: &str) -> Option<String> {
    let is_integer = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    if is_integer {
        let digits = number.trim_start_matches('-').len();
        let most = limits::INTEGER_DIGITS;
        return (digits > most).then(|| {
            format!("is a number with {digits} digits; the master accepts at most {most}")
        });
    }
    let is_finite = number.parse::<f64>().is_ok_and(f64::is_finite);
    (!is_finite)
        .then(|| "is a number that is too large: the master reads it as infinity".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Option<String> {
        problem("x", &RawValue::from_string(json.to_owned()).unwrap())
    }

    #[test]
    fn lone_surrogate_is_found_and_its_place_named() {
        let fails = |place: &str, escape: &str| {
            Some(format!(
                "x{place} has a lone surrogate, {escape}, which the master cannot process"
            ))
        };
        for (json, place, escape) in [
            (r#""\udcff""#, "", r"\udcff"),
            (r#""\uDCFF""#, "", r"\uDCFF"),
            (r#""a\\\ud800""#, "", r"\ud800"),
            (r#""\ud800\n""#, "", r"\ud800"),
            (r#""\ud800\u0041""#, "", r"\ud800"),
            (r#""\ud800\ud800\udc00""#, "", r"\ud800"),
            (r#""\ud83d\ude00\ude00""#, "", r"\ude00"),
            (r#""\ud83d \ude00""#, "", r"\ud83d"),
            (r#"[{"name": "x"}, {"name": "\udcff"}]"#, "[1].name", r"\udcff"),
            (r#"{"a": 1, "b": {"c": [[], [0, "\udcff"]]}}"#, ".b.c[1][1]", r"\udcff"),
            (r#"{"a": {"b\udcff": 1}}"#, r".a.b\udcff", r"\udcff"),
            (r#"{"a\"}": "{[,:", "b": ["\udcff"]}"#, ".b[0]", r"\udcff"),
        ] {
            assert_eq!(of(json), fails(place, escape), "{json}");
        }
    }

    #[test]
    fn valid_text_passes() {
        for json in [
            r#""\ud83d\ude00""#,
            r#""\uD83D\uDE00 \uD83D\uDE00""#,
            r#""\\ud800""#,
            r#""\\\\udcff""#,
            r#"{"\ud83d\ude00": "\ud7ff\ue000ä\u00e4"}"#,
            r#"["", {}, [], null, true, -0, 1.5e-3, 1E+300, "]}\""]"#,
            "1",
        ] {
            assert_eq!(of(json), None, "{json}");
        }
    }

    #[test]
    fn text_passes_if_and_only_if_it_can_be_decoded() {
        let parts = [
            r"\ud800", r"\uDBFF", r"\udc00", r"\uDFFF", r"\ud7ff", r"\ue000", r"\\", r#"\""#,
            r"\n", "u", "d8", "ä",
        ];
        let mut random = fastrand::Rng::with_seed(15);
        let mut good = 0;
        let mut bad = 0;
        for _ in 0..20_000 {
            let text: String =
                (0..random.usize(0..6)).map(|_| parts[random.usize(0..parts.len())]).collect();
            let json = format!(r#""{text}""#);
            let is_text = serde_json::from_str::<String>(&json).is_ok();
            assert_eq!(of(&json).is_none(), is_text, "{json}");
            let inside = format!(r#"{{"a": [1, {{"x{text}": null}}], "b": "{text}"}}"#);
            assert_eq!(of(&inside).is_none(), is_text, "{inside}");
            *if is_text { &mut good } else { &mut bad } += 1;
        }
        assert!(good > 1_000 && bad > 1_000, "{good} good, {bad} bad");
    }

    #[test]
    fn place_after_a_closed_object_is_correct() {
        let json = r#"{"a": {"x": [1, 2, {"y": 1}]}, "z": ["\udcff"]}"#;
        assert!(of(json).unwrap().starts_with("x.z[0] has"));
    }

    #[test]
    fn numbers_that_the_master_cannot_parse_are_found() {
        let digits = |count: usize| format!(r#"[0, {{"n": -{}}}]"#, "9".repeat(count));
        assert_eq!(of(&digits(4_300)), None);
        assert_eq!(
            of(&digits(4_301)).unwrap(),
            "x[1].n is a number with 4301 digits; the master accepts at most 4300"
        );
        for number in ["1e999", "-1E999", "1.0e309", &format!("{}.0", "9".repeat(400))] {
            assert_eq!(
                of(&format!(r#"{{"a": {number}}}"#)).unwrap(),
                "x.a is a number that is too large: the master reads it as infinity"
            );
        }
        assert_eq!(of("1e-999"), None);
    }

    #[test]
    fn too_deep_nesting_is_found_without_recursion() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(of(&nested(limits::NESTING)), None);
        for depth in [limits::NESTING + 1, 1_000_000] {
            assert!(of(&nested(depth)).unwrap().ends_with("]… is nested deeper than 100 levels"));
        }
        assert_eq!(of(&format!(r#"["[[[", "\"[[[", {}]"#, nested(limits::NESTING - 1))), None);
    }

    #[test]
    fn place_is_short_and_escaped() {
        let key = format!("\u{202e}{}", "k".repeat(1 << 20));
        let problem = of(&format!(r#"{{"{key}": "\udcff"}}"#)).unwrap();
        assert!(problem.len() < 200 && problem.starts_with(r"x.\u{202e}kkk"), "{problem}");
    }

    #[test]
    fn wrong_types_in_a_status_are_found() {
        let of = |json: &str| problem_of_shape(&RawValue::from_string(json.to_owned()).unwrap());
        for json in [
            "{}",
            r#"{"error": "x"}"#,
            r#"{"deployed": true, "deckies": null, "runtime": null}"#,
            r#"{"deckies": [1], "runtime": {}, "deployed": "yes"}"#,
            r#"{"deckies": [], "runtime": {"a": {}, "b": {"running": true}, "c": null}}"#,
        ] {
            assert_eq!(of(json), None, "{json}");
        }
        for (json, expected) in [
            (r#"{"deckies": {}}"#, "deckies is not a list"),
            (r#"{"deckies": "d1"}"#, "deckies is not a list"),
            (r#"{"deckies": [], "d\u0065ckies": {}}"#, "duplicate field `deckies`"),
            (r#"{"runtime": {"d1": "running"}}"#, "a decky in runtime is not an object"),
            (r#"{"runtime": {"d1": {}, "d2": false}}"#, "a decky in runtime is not an object"),
            (r#"{"runtime": []}"#, "invalid type: sequence, expected runtime to be an object"),
        ] {
            assert!(of(json).unwrap().starts_with(expected), "{json}: {:?}", of(json));
        }
    }
}
