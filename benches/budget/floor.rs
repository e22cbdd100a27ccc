//! The floor of a POST: a master that only reads and answers, and a client that is only rustls over
//! a socket. Both run in the bench's process, the master with a thread for each connection.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use decnet_heartbeat::Enrolment;
use decnet_heartbeat::loopback::{Authority, Role};
use rustls::crypto::ring::{Ticketer, default_provider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};

/// The answer of a real master to an accepted beat.
pub const ACCEPTED: &str =
    "HTTP/1.1 204 No Content\r\ndate: Tue, 24 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n\r\n";

/// The answer of a real master to a rejected beat.
pub const FORBIDDEN: &str = "HTTP/1.1 403 Forbidden\r\ndate: Tue, 24 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n\
                             content-length: 2\r\ncontent-type: application/json\r\n\r\n{}";

/// The stack size of a thread that reads and answers.
const STACK: usize = 128 * 1024;

/// What the master does with a connection after an answer.
#[derive(Clone, Copy, PartialEq)]
pub enum After {
    KeepOpen,
    Close,
}

/// A request that was read completely.
pub struct Arrival {
    pub at: Instant,
    /// Head and body.
    pub request: Vec<u8>,
    /// Bytes in both directions since the last answer on the connection, or since its beginning.
    pub bytes: u64,
}

impl Arrival {
    /// The bytes of the body.
    pub fn json(&self) -> usize {
        self.request.len() - head(&self.request).expect("a complete request")
    }
}

/// A master that gives the same answer to each request.
pub struct BareMaster {
    pub address: SocketAddr,
    pub arrivals: Receiver<Arrival>,
    authority: Authority,
}

impl BareMaster {
    pub fn start(answer: &'static str, after: After) -> Self {
        let authority = Authority::new().unwrap();
        let tls = server_config(&authority);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (arrived, arrivals) = unbounded();
        thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let tls = Arc::clone(&tls);
                let arrived = arrived.clone();
                let serve = move || {
                    // An error means that the client has closed the connection.
                    let _ = serve(socket, tls, answer, after, &arrived);
                };
                thread::Builder::new().stack_size(STACK).spawn(serve).unwrap();
            }
        });
        Self { address, arrivals, authority }
    }

    /// Enrols a worker, and writes its bundle to `agent_dir`.
    pub fn enrol(&self, agent_dir: &Path) -> Enrolment {
        let worker = self.authority.issue(Role::Worker("bench".to_owned())).unwrap();
        self.authority.write_bundle(&worker, agent_dir).unwrap();
        self.host("00000000-0000-4000-8000-000000000000", agent_dir)
    }

    /// The enrolment of another host with the bundle in `agent_dir`.
    pub fn host(&self, uuid: &str, agent_dir: &Path) -> Enrolment {
        Enrolment::new(uuid, "127.0.0.1", agent_dir)
            .unwrap()
            .with_master_port(self.address.port())
            .unwrap()
    }

    pub fn arrival(&self) -> Arrival {
        self.arrivals.recv_timeout(super::TIMEOUT).expect("a request")
    }
}

fn server_config(authority: &Authority) -> Arc<ServerConfig> {
    let own = authority.issue(Role::Master).unwrap();
    let provider = Arc::new(default_provider());
    let roots = Arc::new(roots(authority.certificate().as_bytes()));
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build().unwrap();
    let chain = vec![CertificateDer::from_pem_slice(own.certificate.as_bytes()).unwrap()];
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap())
        .unwrap();
    config.ticketer = Ticketer::new().unwrap();
    Arc::new(config)
}

fn roots(pem: &[u8]) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem).unwrap()).unwrap();
    roots
}

fn serve(
    socket: TcpStream,
    tls: Arc<ServerConfig>,
    answer: &str,
    after: After,
    arrived: &Sender<Arrival>,
) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let counted = Counted { socket, bytes: AtomicU64::new(0) };
    let mut stream =
        StreamOwned::new(ServerConnection::new(tls).map_err(io::Error::other)?, counted);
    loop {
        let request = read_message(&mut stream)?;
        let bytes = stream.sock.bytes.swap(0, Ordering::Relaxed);
        // An error means that the bench has ended.
        let _ = arrived.send(Arrival { at: Instant::now(), request, bytes });
        stream.write_all(answer.as_bytes())?;
        stream.flush()?;
        // The bytes of the answer are known, so they are not counted.
        stream.sock.bytes.store(0, Ordering::Relaxed);
        if after == After::Close {
            stream.conn.send_close_notify();
            stream.flush()?;
            return stream.sock.socket.shutdown(Shutdown::Write);
        }
    }
}

/// Reads a request or an answer to the end of its body.
fn read_message(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut message = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        message.extend_from_slice(&buffer[..count]);
        if length(&message).is_some_and(|length| message.len() >= length) {
            return Ok(message);
        }
    }
}

/// The bytes of the whole message. `None`: its head is incomplete.
fn length(message: &[u8]) -> Option<usize> {
    let end = head(message)?;
    let head = std::str::from_utf8(&message[..end]).expect("a head is text");
    let mut fields = head.lines().filter_map(|line| line.split_once(": "));
    let body = fields.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    Some(end + body.map_or(0, |(_, length)| length.parse::<usize>().unwrap()))
}

/// The bytes of the head. `None`: it is incomplete.
fn head(message: &[u8]) -> Option<usize> {
    message.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// A socket that counts the bytes in both directions.
struct Counted {
    socket: TcpStream,
    bytes: AtomicU64,
}

impl Counted {
    fn count(&self, passed: io::Result<usize>) -> io::Result<usize> {
        self.bytes.fetch_add(*passed.as_ref().unwrap_or(&0) as u64, Ordering::Relaxed);
        passed
    }
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.socket.read(buffer);
        self.count(read)
    }
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.socket.write(bytes);
        self.count(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// A client that is only rustls over a socket.
pub struct BareClient {
    config: Arc<ClientConfig>,
    address: SocketAddr,
    open: Option<StreamOwned<ClientConnection, TcpStream>>,
}

impl BareClient {
    /// A client with the bundle in `agent_dir`.
    pub fn new(address: SocketAddr, agent_dir: &Path) -> Self {
        let file = |name| std::fs::read(agent_dir.join(name)).unwrap();
        let chain = vec![CertificateDer::from_pem_slice(&file("worker.crt")).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(&file("worker.key")).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots(&file("ca.crt")))
            .with_client_auth_cert(chain, key)
            .unwrap();
        Self { config: Arc::new(config), address, open: None }
    }

    /// Writes these bytes on the open connection, or on a new one, and reads the answer.
    pub fn exchange(&mut self, request: &[u8]) {
        let stream = self.open.get_or_insert_with(|| {
            let socket = TcpStream::connect(self.address).unwrap();
            socket.set_nodelay(true).unwrap();
            let name = ServerName::try_from("swarmctl").unwrap();
            StreamOwned::new(ClientConnection::new(Arc::clone(&self.config), name).unwrap(), socket)
        });
        stream.write_all(request).unwrap();
        stream.flush().unwrap();
        read_message(stream).unwrap();
    }

    pub fn close(&mut self) {
        self.open = None;
    }
}

/// A [`BareClient`] on a thread of its own, which sleeps until it gets a request, as the heartbeat
/// thread does.
pub struct BareBeat {
    requests: Sender<Vec<u8>>,
    took: Receiver<Duration>,
}

impl BareBeat {
    pub fn start(mut client: BareClient, after: After) -> Self {
        let (requests, received) = unbounded::<Vec<u8>>();
        let (done, took) = unbounded();
        thread::spawn(move || {
            for request in received {
                let since = Instant::now();
                client.exchange(&request);
                let _ = done.send(since.elapsed());
                if after == After::Close {
                    client.close();
                }
            }
        });
        Self { requests, took }
    }

    /// Sends this request, and waits for its answer. Returns how long that took.
    pub fn exchange(&self, request: &[u8]) -> Duration {
        self.requests.send(request.to_vec()).unwrap();
        self.took.recv_timeout(super::TIMEOUT).unwrap()
    }
}
