//! The network between the agent and its master: a relay on a port of its own that can do what networks do.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::{set_socket_linger, set_socket_recv_buffer_size};

/// What the network does with a connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Network {
    Works,
    /// Nobody listens.
    Refuses,
    /// What asks for a connection gets no answer.
    Swallows,
    /// Connections are accepted, and nothing is read or said.
    IsMute,
    /// After so many bytes of the agent's nothing goes either way any more.
    StallsAfter(usize),
    /// After so many bytes of the agent's the connection is reset.
    ResetsAfter(usize),
    /// Where the master closes, the agent sees a reset.
    ResetsAtTheEnd,
    /// So many bytes a second are taken from the agent.
    Drips(usize),
    /// Of the master's bytes one a second reaches the agent.
    DripsBack,
}

/// The relay. Dropping it cuts everything.
pub struct Gate {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    network: Network,
    /// Where the connections lead.
    master: SocketAddr,
    open: Vec<Weak<Line>>,
    ended: bool,
}

/// One connection, both halves.
struct Line {
    agent: TcpStream,
    master: TcpStream,
    /// Nothing goes either way any more.
    frozen: AtomicBool,
    /// It ends with a reset.
    reset: AtomicBool,
}

impl Gate {
    pub fn to(master: SocketAddr) -> Self {
        let listener = bind_any();
        let port = listener.local_addr().unwrap().port();
        let state = State { network: Network::Works, master, open: Vec::new(), ended: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accepting.accept(listener, port));
        Self { port, shared }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// From here on new connections lead there.
    pub fn lead_to(&self, master: SocketAddr) {
        self.shared.state.lock().unwrap().master = master;
    }

    pub fn set(&self, network: Network) {
        let refuses = network == Network::Refuses;
        self.change(|state| state.network = network);
        // The accepting thread closes the listener a moment later. A connection before that would be reset, not refused.
        while refuses && TcpStream::connect(local(self.port)).is_ok() {}
    }

    /// Closes what is open, as the master would.
    pub fn cut(&self) {
        self.each(|line| {
            let _ = line.agent.shutdown(Shutdown::Both);
            let _ = line.master.shutdown(Shutdown::Both);
        });
    }

    /// Resets what is open.
    pub fn reset(&self) {
        self.each(Line::end_with_a_reset);
    }

    /// What is open stays open, and nothing goes through it any more.
    pub fn freeze(&self) {
        self.each(|line| line.frozen.store(true, Ordering::SeqCst));
    }

    fn each(&self, work: impl Fn(&Line)) {
        let open = std::mem::take(&mut self.shared.state.lock().unwrap().open);
        open.iter().filter_map(Weak::upgrade).for_each(|line| work(&line));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state.lock().unwrap());
        self.shared.changed.notify_all();
        // The accepting thread looks at the state after each connection.
        let _ = TcpStream::connect_timeout(&local(self.port), Duration::from_millis(20));
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.change(|state| state.ended = true);
        self.cut();
    }
}

impl Shared {
    fn accept(self: Arc<Self>, mut listener: TcpListener, port: u16) {
        loop {
            let (connection, network, master) = {
                let connection = listener.accept();
                let state = self.state.lock().unwrap();
                if state.ended {
                    return;
                }
                (connection, state.network.clone(), state.master)
            };
            match network {
                Network::Refuses => {
                    drop((connection, listener));
                    self.wait_while(|state| state.network == Network::Refuses && !state.ended);
                    listener = bind(port).unwrap();
                }
                Network::Swallows => {
                    drop(connection);
                    // Room for one, and that one is ours: the system drops what comes then.
                    rustix::net::listen(&listener, 0).unwrap();
                    let full: Vec<_> = (0..3).map(|_| connect(port)).collect();
                    self.wait_while(|state| state.network == Network::Swallows && !state.ended);
                    rustix::net::listen(&listener, 128).unwrap();
                    drop(full);
                }
                _ => connection
                    .into_iter()
                    .for_each(|(agent, _)| self.relay(agent, master, &network)),
            }
        }
    }

    fn wait_while(&self, condition: impl Fn(&State) -> bool) {
        drop(
            self.changed.wait_while(self.state.lock().unwrap(), |state| condition(state)).unwrap(),
        );
    }

    /// Two threads carry a connection, until either end closes.
    fn relay(&self, agent: TcpStream, master: SocketAddr, network: &Network) {
        let Ok(master) = TcpStream::connect(master) else { return };
        for end in [&agent, &master] {
            end.set_nodelay(true).unwrap();
        }
        let (frozen, reset) =
            (AtomicBool::new(*network == Network::IsMute), AtomicBool::new(false));
        let line = Arc::new(Line { agent, master, frozen, reset });
        self.state.lock().unwrap().open.push(Arc::downgrade(&line));
        let (up, down, network) = (Arc::clone(&line), line, network.clone());
        let back = network.clone();
        thread::spawn(move || up.carry_up(&network));
        thread::spawn(move || down.carry_down(&back));
    }
}

impl Line {
    fn carry_up(&self, network: &Network) {
        let size = if matches!(network, Network::Drips(_)) { 256 } else { 16 * 1024 };
        let (mut buffer, mut total) = (vec![0; size], 0);
        while let Ok(count @ 1..) = (&self.agent).read(&mut buffer) {
            total += count;
            match network {
                Network::StallsAfter(most) if total > *most => return self.hold(),
                Network::ResetsAfter(most) if total > *most => return self.end_with_a_reset(),
                Network::Drips(rate) => {
                    thread::sleep(Duration::from_secs_f64(count as f64 / *rate as f64))
                }
                _ => (),
            }
            if !self.is_frozen() && (&self.master).write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = self.master.shutdown(Shutdown::Write);
    }

    fn carry_down(&self, network: &Network) {
        let drips = *network == Network::DripsBack;
        let mut buffer = vec![0; if drips { 1 } else { 16 * 1024 }];
        while let Ok(count @ 1..) = (&self.master).read(&mut buffer) {
            if drips {
                thread::sleep(Duration::from_secs(1));
            }
            if !self.is_frozen() && (&self.agent).write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        if *network == Network::ResetsAtTheEnd {
            self.end_with_a_reset();
        } else if !self.reset.load(Ordering::SeqCst) && !self.is_frozen() {
            let _ = self.agent.shutdown(Shutdown::Write);
        }
    }

    /// Nothing is read any more, so that the agent's own buffers fill. Ends when the agent has gone.
    fn hold(&self) {
        self.frozen.store(true, Ordering::SeqCst);
        let gone =
            || matches!(self.agent.take_error(), Ok(Some(_)) | Err(_)) || is_closed(&self.agent);
        while !gone() {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.master.shutdown(Shutdown::Both);
    }

    fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::SeqCst)
    }

    /// The reset goes out when both threads have let go of the socket; shut for reading, it tells the agent nothing.
    fn end_with_a_reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
        let _ = set_socket_linger(&self.agent, Some(Duration::ZERO));
        let _ = self.agent.shutdown(Shutdown::Read);
        let _ = self.master.shutdown(Shutdown::Both);
    }
}

/// Whether the other side has gone, without reading anything that it has sent before.
fn is_closed(stream: &TcpStream) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))
        .is_ok_and(|ready| ready > 0)
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A connection that may never come about.
fn connect(port: u16) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&local(port), Duration::from_millis(50))
}

/// A port that the system hands to nobody else while it is closed: it gives ports from 32768 on.
fn bind_any() -> TcpListener {
    (0..1_000).find_map(|_| bind(fastrand::u16(20_000..32_000)).ok()).expect("a free port")
}

fn bind(port: u16) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(local(port))?;
    // What is not read soon fills the agent's own buffers.
    set_socket_recv_buffer_size(&listener, 16 * 1024)?;
    Ok(listener)
}
