//! A handshake with the master, with the certificate that it shows. Runs on the program's main thread.
//!
//! ureq shows neither. So this one is made beside it, with the agent's own TLS configuration, and the session that it
//! begins is the one that the beat resumes.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error as TlsError, ProtocolVersion, SignatureScheme,
};

use crate::first_bytes::FirstBytes;
use crate::limits;

/// A handshake that came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shaken {
    pub(super) version: &'static str,
    pub(super) took: Duration,
}

/// One handshake, and what comes right after it: with TLS 1.3 a master refuses our certificate only then.
pub(super) fn shake_hands(
    config: &Arc<ClientConfig>,
    name: &ServerName<'static>,
    stream: TcpStream,
) -> io::Result<Shaken> {
    let since = Instant::now();
    // As the agent has it: what is to be said is said at once.
    stream.set_nodelay(true)?;
    let mut stream = InTime { stream, end: since + limits::CONNECT };
    let mut tls = ClientConnection::new(Arc::clone(config), name.clone()).map_err(io::Error::other)?;
    let mut first = FirstBytes::of(&mut stream);
    tls.complete_io(&mut first).map_err(|error| first.name(error))?;
    let took = since.elapsed();
    let version = match tls.protocol_version() {
        Some(ProtocolVersion::TLSv1_3) => "TLS 1.3",
        _ => "TLS 1.2",
    };
    // What comes within a few round trips: a refusal, or the tickets with which the beat resumes this session.
    stream.end = Instant::now() + took * 4 + limits::AFTER_HANDSHAKE;
    match tls.read_tls(&mut stream) {
        Err(error) if error.kind() == ErrorKind::TimedOut => (),
        Err(error) => return Err(error),
        Ok(_) => tls.process_new_packets().map(|_| ()).map_err(io::Error::other)?,
    }
    tls.send_close_notify();
    // It is said; whether it is heard does not matter.
    let _ = tls.write_tls(&mut stream);
    Ok(Shaken { version, took })
}

/// A stream on which all calls together end in time.
struct InTime {
    stream: TcpStream,
    end: Instant,
}

impl InTime {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.end.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(late()),
            left => Ok(Some(left)),
        }
    }
}

fn late() -> io::Error {
    let seconds = limits::CONNECT.as_secs();
    io::Error::new(ErrorKind::TimedOut, format!("the handshake has not come to its end within {seconds} s"))
}

/// To the system it would have blocked.
fn named(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock { late() } else { error }
}

impl Read for InTime {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer).map_err(named)
    }
}

impl Write for InTime {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buffer).map_err(named)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Remembers whether the peer has asked for our certificate: the master does, and a proxy that ends TLS seldom does.
#[derive(Debug)]
pub(super) struct Asked {
    ours: Arc<dyn ResolvesClientCert>,
    asked: AtomicBool,
}

impl Asked {
    pub(super) fn before(ours: Arc<dyn ResolvesClientCert>) -> Self {
        Self { ours, asked: AtomicBool::new(false) }
    }

    pub(super) fn was_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

impl ResolvesClientCert for Asked {
    fn resolve(&self, issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.asked.store(true, Ordering::Relaxed);
        self.ours.resolve(issuers, schemes)
    }

    fn has_certs(&self) -> bool {
        self.ours.has_certs()
    }
}

/// Remembers the certificate that is shown, and leaves the judgement to the agent's own verifier.
#[derive(Debug)]
pub(super) struct Witness {
    judge: Arc<dyn ServerCertVerifier>,
    shown: Mutex<Option<CertificateDer<'static>>>,
}

impl Witness {
    pub(super) fn before(judge: Arc<dyn ServerCertVerifier>) -> Self {
        Self { judge, shown: Mutex::default() }
    }

    /// The certificate that was shown last, whatever the judgement.
    pub(super) fn shown(&self) -> Option<CertificateDer<'static>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(end_entity.clone().into_owned());
        self.judge.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.judge.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.judge.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.judge.supported_verify_schemes()
    }
}
