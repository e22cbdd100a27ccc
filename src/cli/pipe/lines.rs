//! Finds the lines of an input that arrives in pieces. A value; it reads nothing.

use std::mem;

use crate::limits;

/// A line of the input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// With its line end, unless it is the last one.
    Complete(&'a [u8]),
    /// It has more than [`limits::PIPE_LINE`] bytes. The rest of it is skipped.
    TooLong,
}

/// What has arrived and was not returned yet: at most one line, and what was pushed last.
#[derive(Debug, Default)]
pub(super) struct LineBuffer {
    bytes: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Up to where there is no line end.
    searched: usize,
    /// The rest of a line that is too long comes next.
    is_skipping: bool,
}

impl LineBuffer {
    pub(super) fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    /// The next line. `None`: its end has not arrived.
    pub(super) fn next(&mut self) -> Option<Line<'_>> {
        loop {
            let unsearched = self.bytes.get(self.searched..).unwrap_or_default();
            let Some(place) = unsearched.iter().position(|byte| *byte == b'\n') else { break };
            let end = self.searched + place + 1;
            let start = mem::replace(&mut self.start, end);
            self.searched = end;
            if mem::take(&mut self.is_skipping) {
                continue;
            }
            let is_too_long = end - start > limits::PIPE_LINE + 1;
            let line = self.bytes.get(start..end).unwrap_or_default();
            return Some(if is_too_long { Line::TooLong } else { Line::Complete(line) });
        }
        self.bytes.drain(..self.start);
        self.start = 0;
        let is_too_long = self.bytes.len() > limits::PIPE_LINE;
        if is_too_long || self.is_skipping {
            self.bytes.clear();
        }
        self.searched = self.bytes.len();
        let was_skipping = self.is_skipping;
        self.is_skipping |= is_too_long;
        (is_too_long && !was_skipping).then_some(Line::TooLong)
    }

    /// What is left at the end of the input.
    pub(super) fn last(&mut self) -> Option<Vec<u8>> {
        let rest = mem::take(self);
        let is_line = !rest.bytes.is_empty() && !rest.is_skipping;
        is_line.then_some(rest.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lengths of the lines. `None`: one was too long.
    fn lengths(input: &[u8]) -> Vec<Option<usize>> {
        let mut buffer = LineBuffer::default();
        let mut lengths = Vec::new();
        for piece in input.chunks(1_000) {
            buffer.push(piece);
            while let Some(line) = buffer.next() {
                lengths.push(match line {
                    Line::Complete(line) => Some(line.len()),
                    Line::TooLong => None,
                });
            }
            assert!(buffer.bytes.len() <= limits::PIPE_LINE + 1_000);
        }
        lengths.extend(buffer.last().map(|line| Some(line.len())));
        lengths
    }

    #[test]
    fn long_line_is_skipped_to_its_end() {
        let line = |length: usize| [vec![b'x'; length], b"\n".to_vec()].concat();
        let most = limits::PIPE_LINE;
        let input = [line(most), line(most + 1), line(3 * most), line(2), b"end".to_vec()].concat();
        assert_eq!(lengths(&input), [Some(most + 1), None, None, Some(3), Some(3)]);
    }

    #[test]
    fn long_line_without_an_end_is_the_last() {
        assert_eq!(lengths(&vec![b'x'; 2 * limits::PIPE_LINE]), [None]);
        assert_eq!(lengths(b""), []);
        assert_eq!(lengths(b"\n\n"), [Some(1), Some(1)]);
    }

    #[test]
    fn long_line_that_arrives_at_once_is_skipped() {
        let mut buffer = LineBuffer::default();
        buffer.push(&[vec![b'x'; limits::PIPE_LINE + 1], b"\n{}\n{".to_vec()].concat());
        assert_eq!(buffer.next(), Some(Line::TooLong));
        assert_eq!(buffer.next(), Some(Line::Complete(b"{}\n")));
        assert_eq!(buffer.next(), None);
        assert_eq!(buffer.last(), Some(b"{".to_vec()));
    }
}
