//! Foreign text made safe for a log line or an error: cut, on one line, without control or bidi characters.
//! Pure functions, for any thread.

use std::error::Error;
use std::fmt::{self, Display, Write};

use crate::limits;

/// `text` for a log line or an error: at most [`limits::LOG_TEXT`] characters, control and bidi characters escaped.
pub(crate) fn printable(text: &str) -> String {
    printable_within(text, limits::LOG_TEXT)
}

/// `text` without the space around it, with control and bidi characters escaped, cut to `most` characters (an ellipsis
/// marks the cut).
pub(crate) fn printable_within(text: &str, most: usize) -> String {
    escaped_within(text.trim(), most)
}

/// `text` with control and bidi characters escaped, cut to `most` characters (an ellipsis marks the cut).
pub(crate) fn escaped_within(text: &str, most: usize) -> String {
    let mut out = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == most {
            out.push('…');
            break;
        }
        if c.is_control() || is_invisible(c) {
            // Writing to a String cannot fail.
            let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out
}

/// The first `most` characters of `text`.
pub(crate) fn cut(text: &str, most: usize) -> &str {
    text.char_indices().nth(most).map_or(text, |(end, _)| text.get(..end).unwrap_or(text))
}

/// A name that is refused, in quotes and escaped as Rust writes it: a line break at its end must show.
pub(crate) fn quoted(name: &str, most: usize) -> String {
    let start = cut(name, most);
    format!("{start:?}{}", if start.len() < name.len() { "…" } else { "" })
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
    let next = |error: &&'a (dyn Error + 'a)| (*error).source().map(|source| source as &'a (dyn Error + 'a));
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

/// Line and paragraph separators, zero-width and bidi controls: they reorder or hide what a log shows.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_and_bidi_characters_are_escaped() {
        assert_eq!(printable("a\nb\u{1b}[31m\u{202e}c"), "a\\u{a}b\\u{1b}[31m\\u{202e}c");
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
        assert_eq!((last("äöü", 2), last("äö", 2), last("ä", 2), last("ä", 0)), ("öü", "äö", "ä", ""));
    }
}
