//! The socket transport for ureq. Each call ends within its timeout, even if the peer reads or
//! sends slowly, and another thread can shut the socket down, also during the connect. Runs on the
//! heartbeat thread, and for Docker on the status thread.
//!
//! ureq's own TCP transport restarts the timeout with each partial write, and cannot be interrupted
//! during the connect.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};
use ureq::Timeout;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, LazyBuffers, NextTimeout, ShutdownHandle, Transport, time,
};

/// A TCP or Unix socket for HTTP.
pub(crate) struct SocketTransport {
    socket: Arc<SharedSocket>,
    buffers: LazyBuffers,
}

/// The socket, which another thread may shut down.
struct SharedSocket(Socket);

impl ShutdownHandle for SharedSocket {
    fn shutdown(&self) {
        // An error means that the socket is closed already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl SocketTransport {
    /// Connects to the first address that accepts, and returns it. Each address except the last
    /// gets half of the remaining time.
    pub(crate) fn tcp(details: &ConnectionDetails<'_>) -> Result<(Self, SocketAddr), ureq::Error> {
        let deadline = Deadline::of(details.timeout);
        let mut addresses = details.addrs.iter().peekable();
        while let Some(address) = addresses.next() {
            let is_last = addresses.peek().is_none();
            match Self::tcp_to(*address, details, deadline, if is_last { 1 } else { 2 }) {
                Err(_) if !is_last => (),
                connected => return connected.map(|socket| (socket, *address)),
            }
        }
        Err(ureq::Error::HostNotFound)
    }

    /// Connects to an address. It gets a share of the remaining time: 1 is all of it.
    fn tcp_to(
        address: SocketAddr,
        details: &ConnectionDetails<'_>,
        deadline: Deadline,
        share: u32,
    ) -> Result<Self, ureq::Error> {
        let transport = Self::new(Domain::for_address(address), details)?;
        let socket = transport.get();
        let address = SockAddr::from(address);
        let remaining = deadline.remaining().map_err(|error| deadline.error(error))?;
        let connected = match remaining {
            Some(remaining) => socket.connect_timeout(&address, remaining / share),
            None => socket.connect(&address),
        };
        connected.map_err(|error| deadline.error(error))?;
        socket.set_tcp_nodelay(true)?;
        Ok(transport)
    }

    /// Connects to the Unix socket at `path`.
    pub(crate) fn unix(path: &Path, details: &ConnectionDetails<'_>) -> Result<Self, ureq::Error> {
        let transport = Self::new(Domain::UNIX, details)?;
        let deadline = Deadline::of(details.timeout);
        let address = SockAddr::unix(path)?;
        // If the queue of the listener is full, the connect waits up to the write timeout.
        let timeout = deadline.remaining().and_then(|left| transport.get().set_write_timeout(left));
        let connected = timeout.and_then(|()| transport.get().connect(&address));
        connected.map_err(|error| deadline.error(error))?;
        Ok(transport)
    }

    /// A socket that is not connected yet, but can be shut down already.
    fn new(domain: Domain, details: &ConnectionDetails<'_>) -> Result<Self, ureq::Error> {
        Self::over(Socket::new(domain, Type::STREAM, None)?, details)
    }

    pub(crate) fn over(
        socket: Socket,
        details: &ConnectionDetails<'_>,
    ) -> Result<Self, ureq::Error> {
        let socket = Arc::new(SharedSocket(socket));
        let handle: Weak<SharedSocket> = Arc::downgrade(&socket);
        (details.register_shutdown)(handle)?;
        let buffers = LazyBuffers::new(
            details.config.input_buffer_size(),
            details.config.output_buffer_size(),
        );
        Ok(Self { socket, buffers })
    }

    fn get(&self) -> &Socket {
        &self.socket.0
    }
}

impl Transport for SocketTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        let deadline = Deadline::of(timeout);
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        let mut stream = DeadlineStream { socket: &self.socket.0, deadline };
        stream.write_all(output).map_err(|error| deadline.error(error))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let deadline = Deadline::of(timeout);
        let mut stream = DeadlineStream { socket: &self.socket.0, deadline };
        let read = stream.read(self.buffers.input_append_buf());
        let amount = read.map_err(|error| deadline.error(error))?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    /// Whether the socket is connected and has nothing to read, as an idle connection should be.
    fn is_open(&mut self) -> bool {
        let waiting = self.get().recv_with_flags(&mut [MaybeUninit::uninit()], libc::MSG_DONTWAIT);
        waiting.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }
}

impl fmt::Debug for SocketTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketTransport")
            .field("peer", &self.get().peer_addr().ok())
            .finish_non_exhaustive()
    }
}

/// A socket whose reads and writes end at a deadline.
pub(crate) struct DeadlineStream<'a> {
    pub(crate) socket: &'a Socket,
    pub(crate) deadline: Deadline,
}

impl Read for DeadlineStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.socket.set_read_timeout(self.deadline.remaining()?)?;
            match self.socket.read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                read => return read.map_err(timed_out),
            }
        }
    }
}

impl Write for DeadlineStream<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.deadline.remaining()?)?;
        // A write to a closed connection is an error, and does not raise SIGPIPE, which an embedding
        // program may not ignore.
        self.socket.send_with_flags(buffer, libc::MSG_NOSIGNAL).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The deadline of one or several calls.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    /// `None`: the calls may take any time.
    end: Option<Instant>,
    /// The timeout that ends then.
    reason: Timeout,
}

impl Deadline {
    pub(crate) fn of(timeout: NextTimeout) -> Self {
        let end = match timeout.after {
            time::Duration::Exact(after) => Instant::now().checked_add(after),
            time::Duration::NotHappening => None,
        };
        Self { end, reason: timeout.reason }
    }

    /// The deadline of a connection that is being established.
    #[cfg(feature = "cli")]
    pub(crate) fn of_connect(end: Instant) -> Self {
        Self { end: Some(end), reason: Timeout::Connect }
    }

    /// The remaining time as a timeout of ureq, for a later call.
    pub(crate) fn timeout(self) -> NextTimeout {
        let remaining = self.end.map(|end| end.saturating_duration_since(Instant::now()));
        let after = remaining.map_or(time::Duration::NotHappening, time::Duration::Exact);
        NextTimeout { after, reason: self.reason, ..NextTimeout::default() }
    }

    /// The remaining time. `None`: there is no deadline. No remaining time is an error, because
    /// sockets do not accept a timeout of zero.
    fn remaining(self) -> io::Result<Option<Duration>> {
        match self.end.map(|end| end.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => Err(ErrorKind::TimedOut.into()),
            remaining => Ok(remaining),
        }
    }

    /// Maps an I/O error to an error of ureq, which names the timeout.
    fn error(self, error: io::Error) -> ureq::Error {
        match timed_out(error) {
            error if error.kind() == ErrorKind::TimedOut => ureq::Error::Timeout(self.reason),
            error => error.into(),
        }
    }
}

/// The system reports the timeout of a socket as `WouldBlock`.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use ureq::Agent;
    use ureq::config::Config;
    use ureq::http::Uri;
    use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
    use ureq::unversioned::transport::Connector;

    use super::*;

    #[derive(Debug)]
    struct Tcp;

    impl Connector for Tcp {
        type Out = SocketTransport;

        fn connect(
            &self,
            details: &ConnectionDetails<'_>,
            _: Option<()>,
        ) -> Result<Option<Self::Out>, ureq::Error> {
            SocketTransport::tcp(details).map(|(socket, _)| Some(socket))
        }
    }

    /// Resolves every name to these addresses.
    #[derive(Debug)]
    struct FixedResolver(Vec<SocketAddr>);

    impl Resolver for FixedResolver {
        fn resolve(
            &self,
            _: &Uri,
            _: &Config,
            _: NextTimeout,
        ) -> Result<ResolvedSocketAddrs, ureq::Error> {
            let mut resolved = self.empty();
            self.0.iter().for_each(|address| resolved.push(*address));
            Ok(resolved)
        }
    }

    /// Posts a body of `size` bytes to the first address that accepts, with a connect timeout of 1
    /// s and a send timeout of 500 ms.
    fn post(addresses: &[SocketAddr], size: usize) -> Result<u16, ureq::Error> {
        let config = Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(1)))
            .timeout_send_body(Some(Duration::from_millis(500)))
            .build();
        let agent = Agent::with_parts(config, Tcp, FixedResolver(addresses.to_vec()));
        agent.post("http://master/").send(vec![0; size]).map(|answer| answer.status().as_u16())
    }

    /// Starts a server that handles each connection with `serve`.
    fn served(serve: impl Fn(TcpStream) + Send + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(serve));
        address
    }

    fn answering() -> SocketAddr {
        served(|mut stream| {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n");
        })
    }

    fn refusing() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    /// A listener with a full queue: the system drops further connection requests while the result
    /// is held.
    fn unresponsive() -> (SocketAddr, TcpListener, Vec<Socket>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let fill = |_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let _ = socket.connect_timeout(&address.into(), Duration::from_millis(50));
            socket
        };
        (address, listener, (0..3).map(fill).collect())
    }

    #[test]
    fn refusing_or_unresponsive_address_leaves_time_for_the_next() {
        let (silent, _listener, _full) = unresponsive();
        assert_eq!(post(&[refusing(), answering()], 10).unwrap(), 204);
        assert_eq!(post(&[silent, refusing(), answering()], 10).unwrap(), 204);
    }

    #[test]
    fn error_of_the_last_address_is_returned() {
        let (silent, _listener, _full) = unresponsive();
        let error = post(&[silent, refusing()], 10).unwrap_err();
        assert!(
            matches!(&error, ureq::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused),
            "{error}"
        );
        let error = post(&[refusing(), silent], 10).unwrap_err();
        assert!(matches!(error, ureq::Error::Timeout(Timeout::Connect)), "{error}");
        assert!(matches!(post(&[], 10), Err(ureq::Error::HostNotFound)));
    }

    #[test]
    fn slow_reader_does_not_extend_send_timeout() {
        let slow = served(|mut stream| {
            let mut buffer = vec![0; 64 * 1024];
            while stream.read(&mut buffer).is_ok_and(|count| count > 0) {
                thread::sleep(Duration::from_millis(50));
            }
        });
        let since = Instant::now();
        let error = post(&[slow], 100 << 20).unwrap_err();
        assert!(matches!(error, ureq::Error::Timeout(Timeout::SendBody)), "{error}");
        assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    }
}
