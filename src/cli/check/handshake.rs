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
    ClientConfig, ClientConnection, DigitallySignedStruct, Error as TlsError, ProtocolVersion,
    SignatureScheme,
};

use crate::limits;
use crate::master::explain::is_closed;
use crate::master::first_bytes::FirstBytes;

/// A handshake that came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HandshakeInfo {
    pub(super) version: &'static str,
    pub(super) took: Duration,
}

/// One handshake, and what comes right after it: with TLS 1.3 a master refuses our certificate only then.
pub(super) fn shake_hands(
    config: &Arc<ClientConfig>,
    name: &ServerName<'static>,
    stream: TcpStream,
) -> io::Result<HandshakeInfo> {
    let since = Instant::now();
    // As the agent has it: what is to be said is said at once.
    stream.set_nodelay(true)?;
    let mut stream = DeadlineStream { stream, end: since + limits::CONNECT };
    let mut tls =
        ClientConnection::new(Arc::clone(config), name.clone()).map_err(io::Error::other)?;
    let mut first = FirstBytes::of(&mut stream);
    if let Err(error) = tls.complete_io(&mut first) {
        let error = first.classify(error);
        let alert =
            if is_closed(&error) { alert_before_close(&mut tls, &mut stream) } else { None };
        return Err(alert.unwrap_or(error));
    }
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
        Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
        Ok(_) => tls.process_new_packets().map(|_| ()).map_err(io::Error::other)?,
    }
    tls.send_close_notify();
    // It is said; whether it is heard does not matter.
    let _ = tls.write_tls(&mut stream);
    Ok(HandshakeInfo { version, took })
}

/// The alert that the peer sent before it closed the connection. It has arrived even where writing has failed.
fn alert_before_close(
    tls: &mut ClientConnection,
    stream: &mut DeadlineStream,
) -> Option<io::Error> {
    stream.end = Instant::now() + limits::AFTER_HANDSHAKE;
    while let Ok(1..) = tls.read_tls(stream) {
        if let Err(error) = tls.process_new_packets() {
            return Some(io::Error::other(error));
        }
    }
    None
}

/// A stream on which all calls together end in time.
struct DeadlineStream {
    stream: TcpStream,
    end: Instant,
}

impl DeadlineStream {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.end.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(late()),
            left => Ok(Some(left)),
        }
    }
}

fn late() -> io::Error {
    let seconds = limits::CONNECT.as_secs();
    io::Error::new(
        ErrorKind::TimedOut,
        format!("the handshake has not come to its end within {seconds} s"),
    )
}

/// To the system it would have blocked.
fn named(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock { late() } else { error }
}

impl Read for DeadlineStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer).map_err(named)
    }
}

impl Write for DeadlineStream {
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

    /// Before another handshake.
    pub(super) fn forget(&self) {
        self.asked.store(false, Ordering::Relaxed);
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
pub(super) struct RecordingVerifier {
    judge: Arc<dyn ServerCertVerifier>,
    shown: Mutex<Option<CertificateDer<'static>>>,
}

impl RecordingVerifier {
    pub(super) fn before(judge: Arc<dyn ServerCertVerifier>) -> Self {
        Self { judge, shown: Mutex::default() }
    }

    /// Before another handshake.
    pub(super) fn forget(&self) {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The certificate that was shown last, whatever the judgement.
    pub(super) fn shown(&self) -> Option<CertificateDer<'static>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ServerCertVerifier for RecordingVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(end_entity.clone().into_owned());
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

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::path::Path;

    use socket2::SockRef;

    use super::*;
    use crate::credentials::bundle::Bundle;
    use crate::loopback::{Authority, Role};
    use crate::master::identity::MasterIdentity;
    use crate::master::verifier;

    fn config(dir: &Path) -> Arc<ClientConfig> {
        let authority = Authority::new().unwrap();
        authority
            .write_bundle(&authority.issue(Role::Worker("w".to_owned())).unwrap(), dir)
            .unwrap();
        let provider = verifier::provider();
        let bundle = Bundle::load(dir, &provider).unwrap();
        let judge = verifier::verifier(&bundle.roots, MasterIdentity::Name, &name(), &provider);
        verifier::client_config(&bundle.identity, judge, &provider).unwrap()
    }

    fn name() -> ServerName<'static> {
        ServerName::try_from("127.0.0.1").unwrap()
    }

    #[test]
    fn an_alert_that_came_before_a_reset_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        // A fatal alert: unknown CA. Without linger the connection is reset, and nothing can be written any more.
        peer.write_all(&[0x15, 3, 3, 0, 2, 2, 48]).unwrap();
        SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
        drop(peer);
        let error = shake_hands(&config, &name(), stream).unwrap_err();
        assert_eq!(error.to_string(), "received fatal alert: UnknownCA");
    }
}
