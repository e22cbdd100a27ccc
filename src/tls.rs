//! Who the master is: the rustls configuration, the rule for the master's certificate, and the connector that puts TLS
//! under ureq. Handshakes run on the heartbeat thread.
//!
//! ureq takes no rustls configuration of ours, and its own connector panics on a key that does not fit its
//! certificate. So the configuration is built here from a proven [`Bundle`], and the connector is a thin layer
//! between ureq's TCP and ureq's HTTP.

use std::fmt;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, RootCertStore,
    SignatureScheme, StreamOwned,
};
use ureq::unversioned::transport::time::{Duration, Instant};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, TcpConnector, Transport, TransportAdapter,
};

use crate::bundle::{self, Bundle};
use crate::error::Error;
use crate::identity::{MasterIdentity, hex};
use crate::limits;

/// The name that the master's own certificate always carries (`PROTOCOL.md`, "TLS").
const MASTER_NAME: &str = "swarmctl";

/// ring, for TLS and for the bundle's proof alike.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The configuration for one bundle and one rule. It keeps the session tickets, so it lives as long as the bundle.
pub(crate) fn client_config(
    bundle: &Bundle,
    identity: MasterIdentity,
    master: &ServerName<'static>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<ClientConfig>, Error> {
    let verifier = MasterVerifier {
        roots: match identity {
            MasterIdentity::PublicCa => Arc::new(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }),
            _ => Arc::clone(&bundle.roots),
        },
        identity,
        host: master.clone(),
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|source| Error::setting("TLS", "the provider lacks TLS 1.2 or 1.3").because(source))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&bundle.identity))));
    config.resumption = Resumption::in_memory_sessions(limits::TLS_SESSIONS);
    Ok(Arc::new(config))
}

/// Enforces a [`MasterIdentity`]. Nothing of the request leaves before it has agreed.
#[derive(Debug)]
struct MasterVerifier {
    roots: Arc<RootCertStore>,
    identity: MasterIdentity,
    host: ServerName<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl MasterVerifier {
    /// The certificate chains to a root, is within its dates, and may serve.
    fn check_chain(
        &self,
        certificate: &ParsedCertificate<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(certificate, &self.roots, intermediates, now, algorithms)
    }

    /// The certificate is the master's own, or at least the configured host's.
    fn check_name(&self, certificate: &ParsedCertificate<'_>) -> Result<(), rustls::Error> {
        let own = ServerName::try_from(MASTER_NAME).map_err(|_| rustls::Error::General(MASTER_NAME.to_owned()))?;
        verify_server_name(certificate, &own).or_else(|_| verify_server_name(certificate, &self.host))
    }
}

impl ServerCertVerifier for MasterVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        match self.identity {
            MasterIdentity::Name => {
                self.check_chain(&certificate, intermediates, now)?;
                self.check_name(&certificate)?;
            }
            MasterIdentity::AnyFromCa => self.check_chain(&certificate, intermediates, now)?,
            MasterIdentity::PublicCa => {
                self.check_chain(&certificate, intermediates, now)?;
                verify_server_name(&certificate, &self.host)?;
            }
            MasterIdentity::Fingerprint(pinned) => {
                if bundle::fingerprint(end_entity) != hex(&pinned) {
                    return Err(CertificateError::ApplicationVerificationFailure.into());
                }
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// What the connections of one [`TlsConnector`] were like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Connections {
    /// How many were tried. Unchanged over a request: it went out on a connection that was there.
    pub(crate) tried: u64,
    /// The last handshake resumed a session.
    pub(crate) resumed: bool,
}

/// Connects by TCP, as ureq does, and puts TLS on top.
pub(crate) struct TlsConnector {
    tcp: TcpConnector,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    connections: Arc<Mutex<Connections>>,
}

/// ureq does not name its TCP transport.
type Tcp = <TcpConnector as Connector>::Out;

impl TlsConnector {
    pub(crate) fn new(config: Arc<ClientConfig>, name: ServerName<'static>) -> Self {
        Self { tcp: TcpConnector::default(), config, name, connections: Arc::default() }
    }

    /// A view of the connections to come.
    pub(crate) fn connections(&self) -> Arc<Mutex<Connections>> {
        Arc::clone(&self.connections)
    }

    fn note(&self, change: impl FnOnce(&mut Connections)) {
        change(&mut self.connections.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Connector for TlsConnector {
    type Out = TlsTransport<Tcp>;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<Self::Out>, ureq::Error> {
        self.note(|connections| connections.tried += 1);
        let Some(tcp) = Connector::<()>::connect(&self.tcp, details, None)? else { return Ok(None) };
        let mut tls = ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(|error| ureq::Error::Other(Box::new(error)))?;
        let mut tcp = TransportAdapter::new(tcp, Arc::clone(&details.current_time));
        tcp.set_timeout(rest_of(details));
        tls.complete_io(&mut tcp)?;
        self.note(|connections| connections.resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed));
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(TlsTransport { buffers, stream: StreamOwned::new(tls, tcp) }))
    }
}

/// What is left of the connect timeout once TCP is connected: one budget for both.
fn rest_of(details: &ConnectionDetails<'_>) -> NextTimeout {
    let mut timeout = details.timeout;
    if let (Duration::Exact(limit), Instant::Exact(now), Instant::Exact(start)) =
        (timeout.after, (details.current_time)(), details.now)
    {
        timeout.after = Duration::Exact(limit.saturating_sub(now.saturating_duration_since(start)));
    }
    timeout
}

impl fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConnector").field("name", &self.name).finish_non_exhaustive()
    }
}

/// TLS over ureq's TCP transport.
pub(crate) struct TlsTransport<T: Transport> {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter<T>>,
}

impl<T: Transport> Transport for TlsTransport<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.stream.get_mut().set_timeout(timeout);
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        self.stream.write_all(output)?;
        self.stream.flush()?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.stream.get_mut().set_timeout(timeout);
        let input = self.buffers.input_append_buf();
        let amount = self.stream.read(input)?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.get_mut().get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

impl<T: Transport> fmt::Debug for TlsTransport<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsTransport").field("tcp", &self.stream.sock.inner()).finish_non_exhaustive()
    }
}
