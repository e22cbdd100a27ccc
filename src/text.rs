//! Foreign text made safe for a log line, an error or a terminal: cut, on one line, without control, bidi or invisible
//! characters.
//! Pure functions, for any thread.

use std::error::Error;
use std::fmt::{self, Display, Write};

use crate::limits;

/// `text` for a log line or an error: at most [`limits::LOG_TEXT`] characters, unprintable ones escaped.
pub(crate) fn sanitize(text: &str) -> String {
    printable_within(text, limits::LOG_TEXT)
}

/// `text` without the space around it, with unprintable characters escaped, cut to `most` characters (an ellipsis marks the
/// cut).
pub(crate) fn printable_within(text: &str, most: usize) -> String {
    escaped_within(text.trim(), most)
}

/// `text` with unprintable characters escaped, cut to `most` characters (an ellipsis marks the cut).
pub(crate) fn escaped_within(text: &str, most: usize) -> String {
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

/// All of `text`, which may have several lines: everything unprintable but the line breaks is escaped.
#[cfg(feature = "cli")]
pub(crate) fn escaped_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\n' { out.push(c) } else { push_escaped(&mut out, c) }
    }
    out
}

/// The same JSON with every unprintable character as `\uXXXX`: outside its strings there is none but the line breaks.
#[cfg(feature = "cli")]
pub(crate) fn escaped_json(json: &str) -> String {
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

/// The first `most` characters of `text`.
pub(crate) fn cut(text: &str, most: usize) -> &str {
    text.char_indices().nth(most).map_or(text, |(end, _)| text.get(..end).unwrap_or(text))
}

/// A name that is refused, in quotes and escaped as Rust writes it: a line break at its end must show. Rust leaves some
/// invisible characters as they are, such as U+3164; they are escaped, too.
pub(crate) fn quoted(name: &str, most: usize) -> String {
    let start = cut(name, most);
    let quoted = escaped_within(&format!("{start:?}"), usize::MAX);
    format!("{quoted}{}", if start.len() < name.len() { "…" } else { "" })
}

/// What is displayed, up to `most` characters. It is cut while it is written: it may have no end.
pub(crate) fn displayed(what: &(impl Display + ?Sized), most: usize) -> String {
    let mut out = Cut { text: String::new(), left: most };
    // An error is ours, of the cut; or its own, and then this is all that it says.
    let _ = write!(out, "{what}");
    out.text
}

/// An error and its sources, each displayed up to `most` characters. At most [`limits::ERROR_SOURCES`] of them, as an error
/// may be its own source.
pub(crate) fn layers<'a>(error: &'a dyn Error, most: usize) -> impl Iterator<Item = String> + 'a {
    let next = |error: &&'a (dyn Error + 'a)| {
        (*error).source().map(|source| source as &'a (dyn Error + 'a))
    };
    let chain = std::iter::successors(Some(error), next);
    chain.take(limits::ERROR_SOURCES).map(move |error| displayed(error, most))
}

/// A text that takes so many more characters.
struct Cut {
    text: String,
    left: usize,
}

impl Write for Cut {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        let taken = cut(more, self.left);
        self.text.push_str(taken);
        self.left -= taken.chars().count();
        // The first that is too much ends it.
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

/// Characters that hide, reorder or break what a terminal shows, beside the control characters. Of Unicode 16.0.0: in
/// DerivedCoreProperties.txt those with `Default_Ignorable_Code_Point`; in UnicodeData.txt those of the categories `Cf`
/// (bidi controls and tags among them), `Zl` and `Zp`; and the noncharacters, with which each plane ends.
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

    /// Unicode's own tables, as a crate of others has them.
    #[test]
    fn every_character_that_unicode_calls_invisible_is_escaped_and_no_other() {
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
            for shown in [escaped_within(&text, 9), quoted(&text, 9)] {
                assert!(
                    shown.chars().all(is_printable) && shown.contains('a') && shown.contains('b'),
                    "{shown:?}"
                );
            }
        }
    }

    #[cfg(feature = "cli")]
    #[test]
    fn json_is_the_same_with_every_unprintable_character_escaped() {
        for c in '\0'..=char::MAX {
            let value = serde_json::json!({"a": format!("x{c}y")});
            let json = serde_json::to_string_pretty(&value).unwrap();
            let escaped = escaped_json(&json);
            assert!(escaped.chars().all(|c| c == '\n' || is_printable(c)), "{escaped:?}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).unwrap(), value);
        }
    }

    #[cfg(feature = "cli")]
    #[test]
    fn of_text_in_lines_only_the_line_breaks_stay() {
        assert_eq!(escaped_lines("a\r\n\u{9b}31mb\u{ad}\n"), "a\\u{d}\n\\u{9b}31mb\\u{ad}\n");
    }

    #[test]
    fn long_text_is_cut_on_a_character() {
        assert_eq!(printable_within("äöü", 2), "äö…");
        assert_eq!(printable_within("äö", 2), "äö");
        assert_eq!(cut("äöü", 2), "äö");
        assert_eq!(cut("ä", 2), "ä");
    }

    #[test]
    fn a_name_is_quoted_with_all_that_is_in_it() {
        assert_eq!(quoted("d1\n", 9), r#""d1\n""#);
        assert_eq!(quoted("\u{1b}\u{202e}\u{200b}\"", 9), r#""\u{1b}\u{202e}\u{200b}\"""#);
        assert_eq!(quoted("äöü", 2), r#""äö"…"#);
    }

    /// Writes without end, unless it is stopped.
    struct Endless;

    impl fmt::Display for Endless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            loop {
                f.write_str("ä")?;
            }
        }
    }

    #[test]
    fn what_is_displayed_without_end_is_cut_while_it_is_written() {
        let text = displayed(&Endless, 1_000);
        assert_eq!(text, "ä".repeat(1_000));
        assert!(text.capacity() <= 4_096, "{}", text.capacity());
        assert_eq!(displayed("äö", 2), "äö");
        assert_eq!(displayed("äöü", 2), "äö");
    }

    #[test]
    fn an_error_that_is_its_own_source_has_an_end() {
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
    fn of_long_text_the_last_characters_are_kept() {
        assert_eq!(
            (last("äöü", 2), last("äö", 2), last("ä", 2), last("ä", 0)),
            ("öü", "äö", "ä", "")
        );
    }
}
