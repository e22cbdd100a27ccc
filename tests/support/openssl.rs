//! Certificates and servers that rcgen and rustls do not create: weak keys, old signatures and
//! other encodings.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::commands;

/// OpenSSL's command line, with a folder that contains a CA.
pub struct OpenSsl {
    dir: PathBuf,
}

/// A running `openssl s_server`. It is killed when the value is dropped.
pub struct OpenSslServer {
    child: Child,
    pub port: u16,
}

impl OpenSsl {
    pub fn new(dir: &Path) -> Self {
        let this = Self { dir: dir.join("openssl") };
        fs::create_dir(&this.dir).unwrap();
        this.run("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 9 -subj /O=DECNET/CN=CA");
        fs::write(
            this.path("ext"),
            "subjectAltName=DNS:swarmctl\nextendedKeyUsage=serverAuth,clientAuth\n",
        )
        .unwrap();
        this
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Runs this command line, which is split at spaces.
    pub fn run(&self, arguments: &str) {
        let mut command = Command::new("openssl");
        commands::run(command.current_dir(&self.dir).args(arguments.split(' ')));
    }

    /// Issues a certificate for `swarmctl`, in `NAME.crt`, with its key in `NAME.key`.
    pub fn issue(&self, name: &str, key: &str, digest: &str) {
        self.run(&format!("req -newkey {key} -nodes -keyout {name}.key -out {name}.csr -subj /O=DECNET/CN=swarmctl"));
        self.run(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 9 {digest} -extfile ext -out {name}.crt"
        ));
    }

    /// Starts a server with the certificate of this name. `options` are further options of
    /// `s_server`, split at spaces.
    pub fn start_server(&self, name: &str, options: &str) -> OpenSslServer {
        let mut command = Command::new("openssl");
        command.current_dir(&self.dir).args(["s_server", "-accept", "127.0.0.1:0"]);
        command.args(options.split(' '));
        command.args(["-cert", &format!("{name}.crt"), "-key", &format!("{name}.key")]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = lines
            .find_map(|line| line.unwrap().strip_prefix("ACCEPT 127.0.0.1:")?.parse().ok())
            .unwrap();
        // The pipe must be read, so that the server does not block.
        std::thread::spawn(move || lines.for_each(drop));
        OpenSslServer { child, port }
    }
}

impl Drop for OpenSslServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
