//! A relay that counts the bytes between a heartbeat and its master.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

pub struct Relay {
    pub port: u16,
    passed: Arc<AtomicU64>,
}

impl Relay {
    /// Starts a relay to this port of 127.0.0.1.
    pub fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let passed = Arc::default();
        let counter = Arc::clone(&passed);
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let far = TcpStream::connect(("127.0.0.1", to)).unwrap();
                let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
                let forth = (near, far);
                for (from, to) in [back, forth] {
                    let counter = Arc::clone(&counter);
                    thread::spawn(move || pass(from, to, &counter));
                }
            }
        });
        Self { port, passed }
    }

    /// The bytes in both directions so far.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, counter: &AtomicU64) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    // An error means that it is closed.
    let _ = to.shutdown(Shutdown::Both);
}
