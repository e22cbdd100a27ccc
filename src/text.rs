//! Foreign text made safe for a log line or an error: cut, on one line, without control or bidi characters.
//! Pure functions, for any thread.

use std::fmt::Write as _;

use crate::limits;

/// `text` for a log line or an error: at most [`limits::LOG_TEXT`] characters, control and bidi characters escaped.
pub(crate) fn printable(text: &str) -> String {
    printable_within(text, limits::LOG_TEXT)
}

/// `text` with control and bidi characters escaped, cut to `most` characters (an ellipsis marks the cut).
pub(crate) fn printable_within(text: &str, most: usize) -> String {
    let mut out = String::new();
    for (count, c) in text.trim().chars().enumerate() {
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

    #[cfg(feature = "cli")]
    #[test]
    fn of_long_text_the_last_characters_are_kept() {
        assert_eq!((last("äöü", 2), last("äö", 2), last("ä", 2), last("ä", 0)), ("öü", "äö", "ä", ""));
    }
}
