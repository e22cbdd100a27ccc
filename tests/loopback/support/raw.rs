//! A TLS server that does on each connection what a test says, byte by byte: what no well-behaved master does.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, unbounded};
use decnet_heartbeat::HeartbeatBuilder;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection};
use serde_json::Value;

use super::Stage;

/// It shows the certificate of the stage's master, and listens on a port of its own.
pub struct RawMaster {
    port: u16,
    /// The JSON of each request that was read to its end, and the number of its connection, from 1 on.
    pub requests: Receiver<(usize, Value)>,
}

impl RawMaster {
    /// `serve` has each connection to itself, after the handshake.
    pub fn new(
        stage: &Stage,
        serve: impl Fn(&mut RawConnection) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let issued = stage.master.certificate();
        let chain = vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap();
        let config = Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, requests) = unbounded();
        let serve = Arc::new(serve);
        thread::spawn(move || {
            for (number, socket) in (1..).zip(listener.incoming()) {
                let (config, serve, sender) =
                    (Arc::clone(&config), Arc::clone(&serve), sender.clone());
                thread::spawn(move || {
                    let socket = socket.unwrap();
                    socket.set_nodelay(true).unwrap();
                    let tls = ServerConnection::new(config).unwrap();
                    let mut connection =
                        RawConnection { number, tls, socket, read: Vec::new(), requests: sender };
                    // However it ends, the client shows what it makes of it.
                    let _ = connection.shake_hands().and_then(|()| serve(&mut connection));
                });
            }
        });
        Self { port, requests }
    }

    /// The same heartbeat, with this one as its master.
    pub fn instead(&self, stage: &Stage, builder: HeartbeatBuilder) -> HeartbeatBuilder {
        builder.enrolment(stage.worker.enrolment().unwrap().with_master_port(self.port).unwrap())
    }
}

/// One connection.
pub struct RawConnection {
    pub number: usize,
    pub tls: ServerConnection,
    pub socket: TcpStream,
    read: Vec<u8>,
    requests: Sender<(usize, Value)>,
}

impl RawConnection {
    fn shake_hands(&mut self) -> io::Result<()> {
        while self.tls.is_handshaking() {
            while self.tls.wants_write() {
                self.tls.write_tls(&mut self.socket)?;
            }
            self.tls.read_tls(&mut self.socket)?;
            self.tls.process_new_packets().map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Reads a request's head and none of its body that comes later. How long the body is.
    pub fn read_head(&mut self) -> io::Result<usize> {
        let end = loop {
            if let Some(end) = self.read.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break end + 4;
            }
            self.read_some()?;
        };
        let head =
            String::from_utf8(self.read.drain(..end).collect()).unwrap().to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        Ok(length.trim().parse().unwrap())
    }

    /// Reads a body of that length, and hands it to the test.
    pub fn read_body(&mut self, length: usize) -> io::Result<Value> {
        while self.read.len() < length {
            self.read_some()?;
        }
        let body: Vec<u8> = self.read.drain(..length).collect();
        let json: Value = serde_json::from_slice(&body).unwrap();
        let _ = self.requests.send((self.number, json.clone()));
        Ok(json)
    }

    pub fn read_request(&mut self) -> io::Result<Value> {
        let length = self.read_head()?;
        self.read_body(length)
    }

    fn read_some(&mut self) -> io::Result<()> {
        let mut some = [0; 16 * 1024];
        loop {
            match self.tls.reader().read(&mut some) {
                Ok(count @ 1..) => {
                    self.read.extend_from_slice(&some[..count]);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                _ => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
            self.tls.read_tls(&mut self.socket)?;
            self.tls.process_new_packets().map_err(io::Error::other)?;
        }
    }

    pub fn say(&mut self, text: &[u8]) -> io::Result<()> {
        let records = self.records(&[text]);
        self.socket.write_all(&records)
    }

    /// What TLS itself has to say, and then each text as a record of its own; not sent yet.
    pub fn records(&mut self, texts: &[&[u8]]) -> Vec<u8> {
        let mut records = Vec::new();
        for text in [&[][..]].iter().chain(texts) {
            self.tls.writer().write_all(text).unwrap();
            while self.tls.wants_write() {
                self.tls.write_tls(&mut records).unwrap();
            }
        }
        records
    }

    /// Waits, and reads nothing, until the test ends.
    pub fn stall(&self) -> ! {
        loop {
            thread::park();
        }
    }
}
