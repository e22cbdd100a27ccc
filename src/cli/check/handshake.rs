//! Makes a TLS handshake with the master and records the certificate that it presents. Runs on the
//! main thread.
//!
//! ureq exposes neither. So this handshake is made apart from ureq, with the same TLS
//! configuration. The beat resumes the session that it establishes.

use std::io::{self, ErrorKind};
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
use socket2::SockRef;

use crate::limits;
use crate::master::explain::is_closed;
use crate::master::first_bytes::FirstBytes;
use crate::transport::{Deadline, DeadlineStream};

/// A completed handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HandshakeInfo {
    pub(super) version: &'static str,
    pub(super) took: Duration,
}

/// Makes a handshake and reads what follows it: with TLS 1.3 a master rejects our certificate only
/// then.
pub(super) fn handshake(
    config: &Arc<ClientConfig>,
    name: &ServerName<'static>,
    stream: TcpStream,
) -> io::Result<HandshakeInfo> {
    let since = Instant::now();
    // As `run` does.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(&stream);
    let deadline = Deadline::of_connect(since + limits::CONNECT);
    let mut stream = DeadlineStream { socket: &socket, deadline };
    let mut tls =
        ClientConnection::new(Arc::clone(config), name.clone()).map_err(io::Error::other)?;
    let mut first = FirstBytes::of(&mut stream);
    if let Err(error) = tls.complete_io(&mut first) {
        let error = first.classify(named_timeout(error));
        let alert =
            if is_closed(&error) { alert_before_close(&mut tls, &mut stream) } else { None };
        return Err(alert.unwrap_or(error));
    }
    let took = since.elapsed();
    let version = match tls.protocol_version() {
        Some(ProtocolVersion::TLSv1_3) => "TLS 1.3",
        _ => "TLS 1.2",
    };
    // Waits a few round trips for a rejection, or for the tickets that resume this session.
    let end = Instant::now() + took * 4 + limits::AFTER_HANDSHAKE;
    stream.deadline = Deadline::of_connect(end);
    match tls.read_tls(&mut stream) {
        Err(error) if error.kind() == ErrorKind::TimedOut => (),
        Err(error) => return Err(error),
        Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
        Ok(_) => tls.process_new_packets().map(|_| ()).map_err(io::Error::other)?,
    }
    tls.send_close_notify();
    // An error does not matter: the handshake is complete.
    let _ = tls.write_tls(&mut stream);
    Ok(HandshakeInfo { version, took })
}

/// The alert that the peer sent before it closed the connection. It can be read even if a write has
/// failed.
fn alert_before_close(
    tls: &mut ClientConnection,
    stream: &mut DeadlineStream<'_>,
) -> Option<io::Error> {
    stream.deadline = Deadline::of_connect(Instant::now() + limits::AFTER_HANDSHAKE);
    while let Ok(1..) = tls.read_tls(stream) {
        if let Err(error) = tls.process_new_packets() {
            return Some(io::Error::other(error));
        }
    }
    None
}

/// The error of a handshake that took too long names its limit.
fn named_timeout(error: io::Error) -> io::Error {
    if error.kind() != ErrorKind::TimedOut {
        return error;
    }
    let seconds = limits::CONNECT.as_secs();
    let problem = format!("the handshake was not complete within {seconds} s");
    io::Error::new(ErrorKind::TimedOut, problem)
}

/// Records whether the peer requested our certificate. The master does; a proxy that terminates TLS
/// rarely does.
#[derive(Debug)]
pub(super) struct RecordingResolver {
    inner: Arc<dyn ResolvesClientCert>,
    requested: AtomicBool,
}

impl RecordingResolver {
    pub(super) fn new(inner: Arc<dyn ResolvesClientCert>) -> Self {
        Self { inner, requested: AtomicBool::new(false) }
    }

    /// Resets the record before another handshake.
    pub(super) fn reset(&self) {
        self.requested.store(false, Ordering::Relaxed);
    }

    pub(super) fn was_requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }
}

impl ResolvesClientCert for RecordingResolver {
    fn resolve(&self, issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.requested.store(true, Ordering::Relaxed);
        self.inner.resolve(issuers, schemes)
    }

    fn has_certs(&self) -> bool {
        self.inner.has_certs()
    }
}

/// Records the certificate that the peer presents. The agent's own verifier verifies it.
#[derive(Debug)]
pub(super) struct RecordingVerifier {
    inner: Arc<dyn ServerCertVerifier>,
    presented: Mutex<Option<CertificateDer<'static>>>,
}

impl RecordingVerifier {
    pub(super) fn new(inner: Arc<dyn ServerCertVerifier>) -> Self {
        Self { inner, presented: Mutex::default() }
    }

    /// Resets the record before another handshake.
    pub(super) fn reset(&self) {
        *self.presented.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The certificate that was presented last, valid or not.
    pub(super) fn presented(&self) -> Option<CertificateDer<'static>> {
        self.presented.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
        *self.presented.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(end_entity.clone().into_owned());
        self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;
    use std::path::Path;

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
        let bundle = Bundle::load(dir).unwrap();
        let server_verifier = verifier::verifier(&bundle.roots, MasterIdentity::Name, &name());
        verifier::client_config(&bundle.identity, server_verifier).unwrap()
    }

    fn name() -> ServerName<'static> {
        ServerName::try_from("127.0.0.1").unwrap()
    }

    #[test]
    fn alert_before_a_reset_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        // A fatal alert: unknown CA. Without linger the connection is reset, and further writes
        // fail.
        peer.write_all(&[0x15, 3, 3, 0, 2, 2, 48]).unwrap();
        SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
        drop(peer);
        let error = handshake(&config, &name(), stream).unwrap_err();
        assert_eq!(error.to_string(), "received fatal alert: UnknownCA");
    }
}
