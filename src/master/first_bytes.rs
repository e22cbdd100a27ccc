//! Detects a peer that does not speak TLS, by the first bytes that it sends in the handshake. Runs
//! on the thread that does the handshake.
//!
//! rustls reports any such peer as an invalid message. DECNET's systemd unit starts the swarm
//! controller without `--tls`, so the master may answer in plain HTTP. The error must say so.

use std::error::Error;
use std::fmt;
use std::io::{self, Read, Write};

/// The peer does not speak TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotTls {
    Http,
    Other,
}

impl fmt::Display for NotTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => {
                "the answer is plain HTTP, not TLS: if the peer is the master, its swarm controller runs without --tls"
            }
            Self::Other => "the answer is neither TLS nor HTTP: the peer is not the master",
        })
    }
}

impl Error for NotTls {}

/// A stream during the handshake. It records the first bytes that are read.
pub(crate) struct FirstBytes<'a, S> {
    stream: &'a mut S,
    head: Vec<u8>,
}

impl<'a, S> FirstBytes<'a, S> {
    /// The length of `HTTP/`, and of the header of a TLS record.
    const HEAD: usize = 5;

    pub(crate) fn of(stream: &'a mut S) -> Self {
        Self { stream, head: Vec::new() }
    }

    /// Replaces the error of a failed handshake with [`NotTls`], if the peer does not speak TLS.
    pub(crate) fn classify(&self, error: io::Error) -> io::Error {
        match self.head.as_slice() {
            // Nothing was read, or a TLS record: its content type and the first byte of its
            // version.
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
    fn first_bytes_identify_the_protocol() {
        for (bytes, protocol) in [
            (&b""[..], None),
            (b"\x15\x03\x03\x00\x02\x02\x28", None),
            (b"\x16", None),
            (b"HTTP/1.1 400 Bad Request\r\n", Some(NotTls::Http)),
            (b"HTTP/1.0 200 OK\r\n", Some(NotTls::Http)),
            (b"HTTX", Some(NotTls::Other)),
            (b"SSH-2.0-OpenSSH", Some(NotTls::Other)),
            (b"\x16\x02", Some(NotTls::Other)),
        ] {
            let mut stream = io::Cursor::new(bytes.to_vec());
            let mut first = FirstBytes::of(&mut stream);
            // Small reads, as from a network.
            while first.read(&mut [0; 2]).unwrap() > 0 {}
            let error = first.classify(io::Error::other("tls"));
            assert_eq!(
                error.get_ref().and_then(|inner| inner.downcast_ref()).copied(),
                protocol,
                "{bytes:?}"
            );
        }
    }
}
