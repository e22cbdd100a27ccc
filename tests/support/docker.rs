//! A socket that answers as a Docker Engine does.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

/// Starts a Docker without containers and networks.
pub fn start_docker(socket: &Path) {
    start_docker_with(socket, |_| json_answer("[]"));
}

/// Starts a Docker that answers each request with the result of `answer`.
pub fn start_docker_with(socket: &Path, answer: impl Fn(&[u8]) -> String + Send + 'static) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut request = [0; 4096];
            while let Ok(read @ 1..) = stream.read(&mut request) {
                if stream.write_all(answer(&request[..read]).as_bytes()).is_err() {
                    break;
                }
            }
        }
    });
}

/// An answer 200 with this body.
pub fn json_answer(json: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{json}", json.len())
}
