//! A socket under ureq: every call ends in its time, however little the other side takes or gives at once, and from the
//! connect on it can be shut down by another thread. Runs on the heartbeat thread, and for Docker on the status thread.
//!
//! ureq's own TCP transport gives each partial write the whole time anew, and cannot be interrupted while it connects.

use std::fmt;
use std::io::{self, ErrorKind, Read};
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

/// A connection that has ended is an error, and no signal that ends the process: who embeds us may not ignore SIGPIPE.
const QUIETLY: i32 = libc::MSG_NOSIGNAL;

/// A connected socket, and HTTP over it.
pub(crate) struct SocketTransport {
    socket: Arc<Shut>,
    buffers: LazyBuffers,
}

/// Shuts the socket down.
struct Shut(Socket);

impl ShutdownHandle for Shut {
    fn shutdown(&self) {
        // An error means that it is closed already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl SocketTransport {
    /// Connected to the first of the addresses that answers, and which one that is. Each but the last has half of the time
    /// that is left.
    pub(crate) fn tcp(details: &ConnectionDetails<'_>) -> Result<(Self, SocketAddr), ureq::Error> {
        let budget = Budget::new(details.timeout);
        let mut addresses = details.addrs.iter().peekable();
        while let Some(address) = addresses.next() {
            let is_last = addresses.peek().is_none();
            match Self::tcp_to(*address, details, &budget, is_last) {
                Err(_) if !is_last => (),
                connected => return connected.map(|socket| (socket, *address)),
            }
        }
        Err(ureq::Error::HostNotFound)
    }

    fn tcp_to(
        address: SocketAddr,
        details: &ConnectionDetails<'_>,
        budget: &Budget,
        is_last: bool,
    ) -> Result<Self, ureq::Error> {
        let socket = Self::new(Domain::for_address(address), details)?;
        let (at, left) = (SockAddr::from(address), budget.left()?);
        let share = if is_last { left } else { left.map(|left| left / 2) };
        let connected = share.map_or_else(
            || socket.get().connect(&at),
            |share| socket.get().connect_timeout(&at, share),
        );
        connected.map_err(|error| budget.name(error))?;
        socket.get().set_tcp_nodelay(true)?;
        Ok(socket)
    }

    /// The socket at this path.
    pub(crate) fn unix(path: &Path, details: &ConnectionDetails<'_>) -> Result<Self, ureq::Error> {
        let (socket, budget) = (Self::new(Domain::UNIX, details)?, Budget::new(details.timeout));
        // Where the queue of connections is full, a connect waits as a write does.
        socket.get().set_write_timeout(budget.left()?)?;
        socket.get().connect(&SockAddr::unix(path)?).map_err(|error| budget.name(error))?;
        Ok(socket)
    }

    /// Not connected yet, and known already to whoever may shut it down.
    fn new(domain: Domain, details: &ConnectionDetails<'_>) -> Result<Self, ureq::Error> {
        Self::over(Socket::new(domain, Type::STREAM, None)?, details)
    }

    pub(crate) fn over(
        socket: Socket,
        details: &ConnectionDetails<'_>,
    ) -> Result<Self, ureq::Error> {
        let socket = Arc::new(Shut(socket));
        let handle: Weak<Shut> = Arc::downgrade(&socket);
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
        let (socket, budget) = (&self.socket.0, Budget::new(timeout));
        let mut rest: &[u8] = self.buffers.output().get(..amount).unwrap_or_default();
        while !rest.is_empty() {
            socket.set_write_timeout(budget.left()?)?;
            match socket.send_with_flags(rest, QUIETLY) {
                Ok(0) => return Err(io::Error::from(ErrorKind::WriteZero).into()),
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(error) => return Err(budget.name(error)),
            }
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let (mut socket, budget) = (&self.socket.0, Budget::new(timeout));
        let amount = loop {
            socket.set_read_timeout(budget.left()?)?;
            match socket.read(self.buffers.input_append_buf()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                read => break read.map_err(|error| budget.name(error))?,
            }
        };
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    /// Whether it is connected, and silent: an idle connection has nothing to say.
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

/// What is left of the time for one call.
struct Budget {
    end: Option<Instant>,
    reason: Timeout,
}

impl Budget {
    fn new(timeout: NextTimeout) -> Self {
        let end = match timeout.after {
            time::Duration::Exact(after) => Instant::now().checked_add(after),
            time::Duration::NotHappening => None,
        };
        Self { end, reason: timeout.reason }
    }

    /// A socket takes no timeout of zero, nor a connect.
    fn left(&self) -> Result<Option<Duration>, ureq::Error> {
        let left = self.end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(ureq::Error::Timeout(self.reason));
        }
        Ok(left)
    }

    /// The error as ureq has it: a timeout by its name.
    fn name(&self, error: io::Error) -> ureq::Error {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => ureq::Error::Timeout(self.reason),
            _ => error.into(),
        }
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

    /// A name with these addresses.
    #[derive(Debug)]
    struct Known(Vec<SocketAddr>);

    impl Resolver for Known {
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

    /// Sends a body of so many bytes to the first of the addresses that answers; a second for the connect, half of one to
    /// send.
    fn post(addresses: &[SocketAddr], size: usize) -> Result<u16, ureq::Error> {
        let config = Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(1)))
            .timeout_send_body(Some(Duration::from_millis(500)))
            .build();
        let agent = Agent::with_parts(config, Tcp, Known(addresses.to_vec()));
        agent.post("http://master/").send(vec![0; size]).map(|answer| answer.status().as_u16())
    }

    /// Where each connection is served like this.
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

    /// A full queue of connections: the system drops what asks for one more. It is so for as long as this is held.
    fn swallowing() -> (SocketAddr, TcpListener, Vec<Socket>) {
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
    fn an_address_that_refuses_or_says_nothing_leaves_time_for_the_next() {
        let (silent, _listener, _full) = swallowing();
        assert_eq!(post(&[refusing(), answering()], 10).unwrap(), 204);
        assert_eq!(post(&[silent, refusing(), answering()], 10).unwrap(), 204);
    }

    #[test]
    fn where_no_address_answers_the_last_one_says_why() {
        let (silent, _listener, _full) = swallowing();
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
    fn a_peer_that_takes_a_little_now_and_then_gets_no_more_time_for_it() {
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
