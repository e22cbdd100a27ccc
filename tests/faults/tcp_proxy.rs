//! A TCP proxy between the agent and its master, which produces the faults of a network.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::{set_socket_linger, set_socket_recv_buffer_size};

/// What the proxy does with new connections.
#[derive(Clone, Debug, PartialEq)]
pub enum ProxyMode {
    /// It forwards both directions.
    Forward,
    /// It does not listen.
    RefuseConnections,
    /// A connection request gets no answer.
    DropConnectionRequests,
    /// It accepts, and forwards nothing.
    Silent,
    /// After this many bytes from the agent it forwards nothing in either direction.
    StallAfter(usize),
    /// After this many bytes from the agent it resets the connection.
    ResetAfter(usize),
    /// When the master closes the connection, it resets the agent's side.
    ResetAtEnd,
    /// It reads this many bytes per second from the agent.
    SlowUpload(usize),
    /// It forwards one byte per second to the agent.
    OneBytePerSecondDownload,
}

/// A running proxy. Dropping it closes all connections.
pub struct TcpProxy {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    mode: ProxyMode,
    /// Where new connections lead.
    target: SocketAddr,
    open: Vec<Weak<Connection>>,
    ended: bool,
}

/// Both sides of a connection.
struct Connection {
    agent: TcpStream,
    master: TcpStream,
    /// Nothing is forwarded.
    frozen: AtomicBool,
    /// It ends with a reset.
    reset: AtomicBool,
}

impl TcpProxy {
    pub fn start(target: SocketAddr) -> Self {
        let listener = bind_any();
        let port = listener.local_addr().unwrap().port();
        let state = State { mode: ProxyMode::Forward, target, open: Vec::new(), ended: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accepting.accept(listener, port));
        Self { port, shared }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// New connections lead to this address.
    pub fn set_target(&self, target: SocketAddr) {
        self.shared.state.lock().unwrap().target = target;
    }

    pub fn set_mode(&self, mode: ProxyMode) {
        let refuses = mode == ProxyMode::RefuseConnections;
        self.change(|state| state.mode = mode);
        // The accepting thread closes the listener after this change. A connection before that
        // would be reset, and not refused.
        while refuses && TcpStream::connect(local(self.port)).is_ok() {}
    }

    /// Whether a connection has reached the limit of [`ProxyMode::StallAfter`]. `None` in other modes.
    pub fn has_stalled(&self) -> Option<bool> {
        let state = self.shared.state.lock().unwrap();
        let mut open = state.open.iter().filter_map(Weak::upgrade);
        matches!(state.mode, ProxyMode::StallAfter(_))
            .then(|| open.any(|connection| connection.is_frozen()))
    }

    /// Closes open connections, as the master would.
    pub fn close_connections(&self) {
        self.for_each_open(|connection| {
            let _ = connection.agent.shutdown(Shutdown::Both);
            let _ = connection.master.shutdown(Shutdown::Both);
        });
    }

    pub fn reset_connections(&self) {
        self.for_each_open(Connection::end_with_reset);
    }

    /// Open connections stay open, and nothing is forwarded on them any more.
    pub fn freeze_connections(&self) {
        self.for_each_open(|connection| connection.frozen.store(true, Ordering::SeqCst));
    }

    fn for_each_open(&self, action: impl Fn(&Connection)) {
        let open = std::mem::take(&mut self.shared.state.lock().unwrap().open);
        open.iter().filter_map(Weak::upgrade).for_each(|connection| action(&connection));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state.lock().unwrap());
        self.shared.changed.notify_all();
        // The accepting thread reads the state after each connection.
        let _ = TcpStream::connect_timeout(&local(self.port), Duration::from_millis(20));
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.change(|state| state.ended = true);
        self.close_connections();
    }
}

impl Shared {
    fn accept(self: Arc<Self>, mut listener: TcpListener, port: u16) {
        loop {
            let connection = listener.accept();
            let (mode, target) = {
                let state = self.state.lock().unwrap();
                if state.ended {
                    return;
                }
                (state.mode.clone(), state.target)
            };
            match mode {
                ProxyMode::RefuseConnections => {
                    drop(connection);
                    drop(listener);
                    self.wait_while(ProxyMode::RefuseConnections);
                    listener = bind(port).unwrap();
                }
                ProxyMode::DropConnectionRequests => {
                    drop(connection);
                    // The backlog has room for one connection. These fill it, so the system drops
                    // further connection requests.
                    rustix::net::listen(&listener, 0).unwrap();
                    let filling: Vec<_> = (0..3).map(|_| connect(port)).collect();
                    self.wait_while(ProxyMode::DropConnectionRequests);
                    rustix::net::listen(&listener, 128).unwrap();
                    drop(filling);
                }
                _ => {
                    connection.into_iter().for_each(|(agent, _)| self.forward(agent, target, &mode))
                }
            }
        }
    }

    fn wait_while(&self, mode: ProxyMode) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| state.mode == mode && !state.ended).unwrap());
    }

    /// Two threads forward a connection until either side closes it.
    fn forward(&self, agent: TcpStream, target: SocketAddr, mode: &ProxyMode) {
        let Ok(master) = TcpStream::connect(target) else { return };
        for side in [&agent, &master] {
            side.set_nodelay(true).unwrap();
        }
        let frozen = AtomicBool::new(*mode == ProxyMode::Silent);
        let reset = AtomicBool::new(false);
        let connection = Arc::new(Connection { agent, master, frozen, reset });
        self.state.lock().unwrap().open.push(Arc::downgrade(&connection));
        let upload = Arc::clone(&connection);
        let upload_mode = mode.clone();
        thread::spawn(move || upload.forward_upload(&upload_mode));
        let download_mode = mode.clone();
        thread::spawn(move || connection.forward_download(&download_mode));
    }
}

impl Connection {
    fn forward_upload(&self, mode: &ProxyMode) {
        let size = if matches!(mode, ProxyMode::SlowUpload(_)) { 256 } else { 16 * 1024 };
        let mut buffer = vec![0; size];
        let mut total = 0;
        while let Ok(count @ 1..) = (&self.agent).read(&mut buffer) {
            total += count;
            match mode {
                ProxyMode::StallAfter(limit) if total > *limit => return self.stall(),
                ProxyMode::ResetAfter(limit) if total > *limit => return self.end_with_reset(),
                ProxyMode::SlowUpload(rate) => {
                    // The fault is the pause itself.
                    thread::sleep(Duration::from_secs_f64(count as f64 / *rate as f64));
                }
                _ => (),
            }
            if !self.is_frozen() && (&self.master).write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = self.master.shutdown(Shutdown::Write);
    }

    fn forward_download(&self, mode: &ProxyMode) {
        let is_slow = *mode == ProxyMode::OneBytePerSecondDownload;
        let mut buffer = vec![0; if is_slow { 1 } else { 16 * 1024 }];
        while let Ok(count @ 1..) = (&self.master).read(&mut buffer) {
            if is_slow {
                // The fault is the pause itself.
                thread::sleep(Duration::from_secs(1));
            }
            if !self.is_frozen() && (&self.agent).write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        if *mode == ProxyMode::ResetAtEnd {
            self.end_with_reset();
        } else if !self.reset.load(Ordering::SeqCst) && !self.is_frozen() {
            let _ = self.agent.shutdown(Shutdown::Write);
        }
    }

    /// Stops reading, so that the agent's send buffers become full. Returns when the agent closes
    /// the connection.
    fn stall(&self) {
        self.frozen.store(true, Ordering::SeqCst);
        // `RDHUP` is reported although bytes from before are unread.
        let _ = poll(&mut [PollFd::new(&self.agent, PollFlags::RDHUP)], None);
        let _ = self.master.shutdown(Shutdown::Both);
    }

    fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::SeqCst)
    }

    /// The system sends the reset when both threads have closed the socket. Shutting down only
    /// reading sends nothing to the agent.
    fn end_with_reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
        let _ = set_socket_linger(&self.agent, Some(Duration::ZERO));
        let _ = self.agent.shutdown(Shutdown::Read);
        let _ = self.master.shutdown(Shutdown::Both);
    }
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A connection that may not be established.
fn connect(port: u16) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&local(port), Duration::from_millis(50))
}

/// A port below 32768. The system assigns ports above it, so no other program gets this one while
/// it is closed.
fn bind_any() -> TcpListener {
    (0..1_000).find_map(|_| bind(fastrand::u16(20_000..32_000)).ok()).expect("a free port")
}

fn bind(port: u16) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(local(port))?;
    // With a small buffer here, the agent's own buffers become full soon.
    set_socket_recv_buffer_size(&listener, 16 * 1024)?;
    Ok(listener)
}
