//! A TLS server whose bytes a test controls, for answers that the loopback master does not send.

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

use super::Fixture;

/// A server with the certificate of the fixture's master, on a port of its own.
pub struct RawMaster {
    port: u16,
    /// The number of the connection, counted from 1, and the JSON body of each complete request.
    pub requests: Receiver<(usize, Value)>,
}

impl RawMaster {
    /// Starts a server that calls `serve` for each connection after the handshake, on a thread of
    /// its own.
    pub fn new(
        fixture: &Fixture,
        serve: impl Fn(&mut RawConnection) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let issued = fixture.master.certificate();
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
                let config = Arc::clone(&config);
                let serve = Arc::clone(&serve);
                let sender = sender.clone();
                thread::spawn(move || {
                    let socket = socket.unwrap();
                    socket.set_nodelay(true).unwrap();
                    let tls = ServerConnection::new(config).unwrap();
                    let mut connection =
                        RawConnection { number, tls, socket, read: Vec::new(), requests: sender };
                    // An error closes the connection. The test checks the client.
                    let _ = connection.complete_handshake().and_then(|()| serve(&mut connection));
                });
            }
        });
        Self { port, requests }
    }

    /// Makes the heartbeat use this server as its master.
    pub fn redirect(&self, fixture: &Fixture, builder: HeartbeatBuilder) -> HeartbeatBuilder {
        builder.enrolment(fixture.worker.enrolment().unwrap().with_master_port(self.port).unwrap())
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
    fn complete_handshake(&mut self) -> io::Result<()> {
        while self.tls.is_handshaking() {
            while self.tls.wants_write() {
                self.tls.write_tls(&mut self.socket)?;
            }
            self.tls.read_tls(&mut self.socket)?;
            self.tls.process_new_packets().map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Reads the head of a request. Returns the length of the body.
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

    /// Reads a body of this length, and sends it to `requests`.
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

    pub fn send(&mut self, text: &[u8]) -> io::Result<()> {
        let records = self.records(&[text]);
        self.socket.write_all(&records)
    }

    /// Encodes pending bytes of TLS, and then each text as a record. Sends nothing.
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

    /// Keeps the connection open without reading, until the test ends.
    pub fn block(&self) -> ! {
        loop {
            thread::park();
        }
    }
}
