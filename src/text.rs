//! Makes foreign text safe for a log line, an error or a terminal: truncated, on one line, without
//! control, bidi or invisible characters. Pure functions, for any thread.

use std::error::Error;
use std::fmt::{self, Display, Write};

use crate::limits;

/// `text` for a log line or an error: at most [`limits::LOG_TEXT`] characters, unprintable ones
/// escaped.
pub(crate) fn sanitize(text: &str) -> String {
    sanitize_within(text, limits::LOG_TEXT)
}

/// `text` without surrounding white space, with unprintable characters escaped, truncated to `most`
/// characters (marked by an ellipsis).
pub(crate) fn sanitize_within(text: &str, most: usize) -> String {
    escape_within(text.trim(), most)
}

/// `text` with unprintable characters escaped, truncated to `most` characters (marked by an
/// ellipsis).
pub(crate) fn escape_within(text: &str, most: usize) -> String {
    let mut out = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == most {
            out.push('…');
            break;
        }
        push_escaped(&mut out, c);
    }
    out
}

/// `text` with all unprintable characters escaped, except line breaks.
#[cfg(feature = "cli")]
pub(crate) fn escape_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\n' { out.push(c) } else { push_escaped(&mut out, c) }
    }
    out
}

/// JSON with every unprintable character escaped as `\uXXXX`, except line breaks. JSON has
/// unprintable characters only in strings.
#[cfg(any(feature = "cli", fuzzing))]
pub(crate) fn escape_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c == '\n' || is_printable(c) {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out
}

fn push_escaped(out: &mut String, c: char) {
    if is_printable(c) {
        out.push(c);
    } else {
        // Writing to a String cannot fail.
        let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
    }
}

/// `1 decky`, `2 deckies`
pub(crate) fn counted(count: impl TryInto<u64>, one: &str, many: &str) -> String {
    let count = count.try_into().unwrap_or(u64::MAX);
    format!("{count} {}", if count == 1 { one } else { many })
}

/// The first `most` characters of `text`.
pub(crate) fn cut(text: &str, most: usize) -> &str {
    text.char_indices().nth(most).map_or(text, |(end, _)| text.get(..end).unwrap_or(text))
}

/// An invalid name in quotes, escaped as in Rust, so that a line break at its end is visible.
/// Invisible characters that Rust does not escape, such as U+3164, are also escaped.
pub(crate) fn quoted(name: &str, most: usize) -> String {
    let start = cut(name, most);
    let quoted = escape_within(&format!("{start:?}"), usize::MAX);
    format!("{quoted}{}", if start.len() < name.len() { "…" } else { "" })
}

/// The `Display` text, truncated to `most` characters. It is truncated while it is written, as it
/// may be endless.
pub(crate) fn displayed(what: &(impl Display + ?Sized), most: usize) -> String {
    let mut out = Cut { text: String::new(), left: most };
    // An error means that the text was truncated, or that its `Display` failed.
    let _ = write!(out, "{what}");
    out.text
}

/// The texts of an error and its sources, each truncated to `most` characters. There are at most
/// [`limits::ERROR_SOURCES`], as an error may be its own source.
pub(crate) fn layers<'a>(error: &'a dyn Error, most: usize) -> impl Iterator<Item = String> + 'a {
    let next = |error: &&'a (dyn Error + 'a)| {
        (*error).source().map(|source| source as &'a (dyn Error + 'a))
    };
    let chain = std::iter::successors(Some(error), next);
    chain.take(limits::ERROR_SOURCES).map(move |error| displayed(error, most))
}

/// A string with a maximum number of further characters.
struct Cut {
    text: String,
    left: usize,
}

impl Write for Cut {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        let taken = cut(more, self.left);
        self.text.push_str(taken);
        self.left -= taken.chars().count();
        // The error stops the writer.
        if taken.len() < more.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

/// The last `most` characters of `text`.
#[cfg(feature = "cli")]
pub(crate) fn last(text: &str, most: usize) -> &str {
    let excess = text.chars().count().saturating_sub(most);
    text.char_indices().nth(excess).and_then(|(start, _)| text.get(start..)).unwrap_or_default()
}

fn is_printable(c: char) -> bool {
    !c.is_control() && !is_invisible(c)
}

/// Whether a character that is not a control character hides, reorders or breaks text in a
/// terminal. In Unicode 16.0.0, these are the characters with `Default_Ignorable_Code_Point` in
/// DerivedCoreProperties.txt, those of the categories `Cf` (with bidi controls and tags), `Zl` and
/// `Zp` in UnicodeData.txt, and the noncharacters at the end of each plane.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{34f}'
            | '\u{600}'..='\u{605}'
            | '\u{61c}'
            | '\u{6dd}'
            | '\u{70f}'
            | '\u{890}'..='\u{891}'
            | '\u{8e2}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{3164}'
            | '\u{fdd0}'..='\u{fdef}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{110bd}'
            | '\u{110cd}'
            | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'
    ) || u32::from(c) & 0xfffe == 0xfffe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_and_bidi_characters_are_escaped() {
        assert_eq!(sanitize("a\nb\u{1b}[31m\u{202e}c"), "a\\u{a}b\\u{1b}[31m\\u{202e}c");
    }

    /// Compares with the tables of Unicode in another crate.
    #[test]
    fn exactly_the_invisible_characters_of_unicode_are_escaped() {
        use regex_syntax::hir::{Class, HirKind};
        let invisible = r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}\p{Noncharacter_Code_Point}\p{Bidi_Control}]";
        let HirKind::Class(Class::Unicode(class)) =
            regex_syntax::parse(invisible).unwrap().into_kind()
        else {
            panic!("a class of characters");
        };
        let expected: Vec<char> =
            class.iter().flat_map(|range| range.start()..=range.end()).collect();
        let found: Vec<char> = ('\0'..=char::MAX).filter(|c| !is_printable(*c)).collect();
        assert_eq!(found, expected);
        for c in [
            '\u{80}',
            '\u{9b}',
            '\u{ad}',
            '\u{115f}',
            '\u{202e}',
            '\u{3164}',
            '\u{ffa0}',
            '\u{fff9}',
            '\u{e0041}',
        ] {
            assert!(!is_printable(c), "{c:?}");
        }
        for c in ['\0'..=char::MAX].into_iter().flatten() {
            let text = format!("a{c}b");
            for shown in [escape_within(&text, 9), quoted(&text, 9)] {
                assert!(
                    shown.chars().all(is_printable) && shown.contains('a') && shown.contains('b'),
                    "{shown:?}"
                );
            }
        }
    }

    #[cfg(feature = "cli")]
    #[test]
    fn escape_json_has_the_same_value() {
        for c in '\0'..=char::MAX {
            let value = serde_json::json!({"a": format!("x{c}y")});
            let json = serde_json::to_string_pretty(&value).unwrap();
            let escaped = escape_json(&json);
            assert!(escaped.chars().all(|c| c == '\n' || is_printable(c)), "{escaped:?}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).unwrap(), value);
        }
    }

    #[cfg(feature = "cli")]
    #[test]
    fn escape_lines_keep_line_breaks() {
        assert_eq!(escape_lines("a\r\n\u{9b}31mb\u{ad}\n"), "a\\u{d}\n\\u{9b}31mb\\u{ad}\n");
    }

    #[test]
    fn long_text_is_truncated_at_a_character() {
        assert_eq!(sanitize_within("äöü", 2), "äö…");
        assert_eq!(sanitize_within("äö", 2), "äö");
        assert_eq!(cut("äöü", 2), "äö");
        assert_eq!(cut("ä", 2), "ä");
    }

    #[test]
    fn quoted_name_shows_all_characters() {
        assert_eq!(quoted("d1\n", 9), r#""d1\n""#);
        assert_eq!(quoted("\u{1b}\u{202e}\u{200b}\"", 9), r#""\u{1b}\u{202e}\u{200b}\"""#);
        assert_eq!(quoted("äöü", 2), r#""äö"…"#);
    }

    /// Writes without end.
    struct Endless;

    impl fmt::Display for Endless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            loop {
                f.write_str("ä")?;
            }
        }
    }

    #[test]
    fn endless_display_is_truncated() {
        let text = displayed(&Endless, 1_000);
        assert_eq!(text, "ä".repeat(1_000));
        assert!(text.capacity() <= 4_096, "{}", text.capacity());
        assert_eq!(displayed("äö", 2), "äö");
        assert_eq!(displayed("äöü", 2), "äö");
    }

    #[test]
    fn error_that_is_its_own_source_is_truncated() {
        #[derive(Debug)]
        struct Round;
        impl fmt::Display for Round {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("round")
            }
        }
        impl Error for Round {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(self)
            }
        }
        static ROUND: Round = Round;
        assert_eq!(layers(&ROUND, 9).count(), limits::ERROR_SOURCES);
    }

    #[cfg(feature = "cli")]
    #[test]
    fn last_returns_the_last_characters() {
        assert_eq!(
            (last("äöü", 2), last("äö", 2), last("ä", 2), last("ä", 0)),
            ("öü", "äö", "ä", "")
        );
    }
}
