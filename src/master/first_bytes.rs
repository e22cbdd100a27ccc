//! How a peer began to speak in a handshake: TLS, plain HTTP or something else. Runs on the thread that shakes hands.
//!
//! rustls says of all that is not TLS that a message is invalid. A master whose swarm controller runs without `--tls`, as
//! its shipped unit starts it, answers in plain HTTP, and an operator must be able to see that.

use std::error::Error;
use std::fmt;
use std::io::{self, Read, Write};

/// A peer does not speak TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotTls {
    Http,
    Other,
}

impl fmt::Display for NotTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => {
                "the answer is plain HTTP, not TLS: if it is the master's, its swarm controller runs without --tls"
            }
            Self::Other => "the answer is neither TLS nor HTTP: it is not the master's",
        })
    }
}

impl Error for NotTls {}

/// A stream in a handshake. It remembers the first bytes that came.
pub(crate) struct FirstBytes<'a, S> {
    stream: &'a mut S,
    head: Vec<u8>,
}

impl<'a, S> FirstBytes<'a, S> {
    /// `HTTP/`; a record of TLS begins with as many.
    const HEAD: usize = 5;

    pub(crate) fn of(stream: &'a mut S) -> Self {
        Self { stream, head: Vec::new() }
    }

    /// Why the handshake has failed: where the peer does not speak TLS, that is it.
    pub(crate) fn name(&self, error: io::Error) -> io::Error {
        match self.head.as_slice() {
            // Nothing has come, or a record of TLS: its content type, and the first byte of its version.
            [] | [0x14..=0x18] | [0x14..=0x18, 0x03, ..] => error,
            head if head.starts_with(b"HTTP/") => io::Error::other(NotTls::Http),
            _ => io::Error::other(NotTls::Other),
        }
    }
}

impl<S: Read> Read for FirstBytes<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let amount = self.stream.read(buffer)?;
        let room = Self::HEAD.saturating_sub(self.head.len());
        self.head.extend(buffer.iter().take(amount.min(room)));
        Ok(amount)
    }
}

impl<S: Write> Write for FirstBytes<'_, S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_decide_what_a_peer_speaks() {
        for (said, speaks) in [
            (&b""[..], None),
            (b"\x15\x03\x03\x00\x02\x02\x28", None),
            (b"\x16", None),
            (b"HTTP/1.1 400 Bad Request\r\n", Some(NotTls::Http)),
            (b"HTTP/1.0 200 OK\r\n", Some(NotTls::Http)),
            (b"HTTX", Some(NotTls::Other)),
            (b"SSH-2.0-OpenSSH", Some(NotTls::Other)),
            (b"\x16\x02", Some(NotTls::Other)),
        ] {
            let mut stream = io::Cursor::new(said.to_vec());
            let mut first = FirstBytes::of(&mut stream);
            // In pieces, as a network brings it.
            while first.read(&mut [0; 2]).unwrap() > 0 {}
            let error = first.name(io::Error::other("tls"));
            assert_eq!(
                error.get_ref().and_then(|inner| inner.downcast_ref()).copied(),
                speaks,
                "{said:?}"
            );
        }
    }
}
