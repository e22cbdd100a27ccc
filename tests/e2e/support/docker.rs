//! A Docker Engine for a test. Its socket, data and containers are in a temporary folder and are
//! removed with it.

use super::commands;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A start takes about 0.5 s, and longer on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// A stop takes about 1 s. dockerd waits up to 15 s for its containers.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// The only image. It is made from the static busybox, so no registry is needed.
const IMAGE: &str = "busybox";
const BUSYBOX: &str = "/bin/busybox";

/// Runs `dockerd` and waits until stdin is closed, which happens also if the test process dies.
/// Then it stops the engine, which removes its containers and mounts, even if it is suspended. Its
/// stderr is open only while the engine runs.
const SCRIPT: &str = r#"
    dockerd "$@" & engine=$!
    exec 2>/dev/null
    cat >/dev/null
    kill $engine; kill -CONT $engine
    wait $engine
"#;

/// A running `dockerd`. Needs root, Debian's `docker.io` and `busybox-static`.
pub struct Docker {
    engine: Mutex<Option<Engine>>,
    folder: TempDir,
    bridges: Mutex<Vec<String>>,
}

struct Engine {
    child: Child,
    log: Receiver<String>,
}

impl Docker {
    /// What this machine lacks to run an engine.
    pub fn missing() -> Option<&'static str> {
        let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
        let dockerd = Command::new("dockerd")
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        match (root, dockerd) {
            (false, _) => Some("root"),
            (_, Err(_)) => Some("Debian's docker.io"),
            _ if !Path::new(BUSYBOX).exists() => Some("Debian's busybox-static"),
            _ => None,
        }
    }

    pub fn start() -> Docker {
        assert_eq!(Docker::missing(), None, "a Docker Engine needs this");
        let folder = tempfile::Builder::new().prefix("dh-").tempdir().unwrap();
        fs::write(folder.path().join("daemon.json"), "{}").unwrap();

        let docker = Docker { engine: Mutex::new(None), folder, bridges: Mutex::default() };
        let length = docker.socket().as_os_str().len();
        assert!(
            length < 108,
            "{} is too long for a socket: set TMPDIR to a shorter path",
            docker.socket().display()
        );
        docker.start_again();
        docker.import(Path::new("/"), BUSYBOX.trim_start_matches('/'), IMAGE);
        docker
    }

    /// The socket, for `DOCKER_HOST=unix://…` and the status source.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("docker.sock")
    }

    /// Makes an image from a path in a folder.
    pub fn import(&self, folder: &Path, path: &str, image: &str) {
        let script = format!("tar -C '{}' -c {path} | docker import - {image}", folder.display());
        commands::run(self.client("sh").args(["-c", &script]));
    }

    /// Creates a container without starting it: its state is `created`.
    pub fn create(&self, name: &str) {
        self.container("create", &[], name);
    }

    /// Starts a container that sleeps: its state is `running`.
    pub fn run(&self, name: &str) {
        self.container("run", &["--detach"], name);
    }

    /// Stops a container: its state is `exited`.
    pub fn stop_container(&self, name: &str) {
        commands::run(self.client("docker").args(["stop", name]));
    }

    /// Removes a container, even if it is running.
    pub fn remove(&self, name: &str) {
        commands::run(self.client("docker").args(["rm", "--force", name]));
    }

    /// Creates a bridge network.
    pub fn network(&self, name: &str) {
        let id = commands::run(self.client("docker").args(["network", "create", name]));
        self.bridges.lock().unwrap().push(format!("br-{}", &id[..12]));
    }

    /// Stops the engine. Its containers stop, and its socket is removed.
    pub fn stop(&self) {
        drop(self.engine.lock().unwrap().take().expect("dockerd runs"));
    }

    /// Starts it again after `stop`, with its networks and its stopped containers.
    pub fn start_again(&self) {
        let mut engine = self.engine.lock().unwrap();
        assert!(engine.is_none(), "dockerd runs already");
        *engine = Some(Engine::start(self.folder.path(), &self.socket()));
    }

    /// Suspends the engine: it accepts connections and does not answer, until `thaw`.
    pub fn freeze(&self) {
        commands::signal("STOP", self.pid());
        // The signal stops one thread after another. The others may still answer.
        let tasks = format!("/proc/{}/task", self.pid());
        let is_stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('T'))
        };
        let end = Instant::now() + Duration::from_secs(30);
        while !std::fs::read_dir(&tasks).unwrap().map_while(Result::ok).all(is_stopped) {
            assert!(Instant::now() < end, "the engine is not suspended");
            std::thread::yield_now();
        }
    }

    pub fn thaw(&self) {
        commands::signal("CONT", self.pid());
    }

    fn container(&self, verb: &str, options: &[&str], name: &str) {
        let mut docker = self.client("docker");
        // Process 1 ignores SIGTERM, so each stop would take 10 s.
        docker.arg(verb).args(options).args([
            "--name",
            name,
            "--network",
            "none",
            "--stop-signal",
            "KILL",
        ]);
        commands::run(docker.args([IMAGE, BUSYBOX, "sleep", "2147483647"]));
    }

    /// A command that uses this engine, such as `docker`.
    pub fn client(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env_remove("DOCKER_CONTEXT").env("DOCKER_CONFIG", self.folder.path());
        command.env("DOCKER_HOST", format!("unix://{}", self.socket().display()));
        command
    }

    fn pid(&self) -> u32 {
        fs::read_to_string(self.folder.path().join("docker.pid")).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        drop(self.engine.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).take());
        // dockerd removes bridges only at its next start.
        for bridge in self.bridges.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            let _ = Command::new(BUSYBOX).args(["ip", "link", "delete", bridge]).output();
        }
        // A regular stop leaves no mounts. After any other, they prevent the removal of the folder.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours = mounts.lines().filter_map(|mount| mount.split(' ').nth(1));
        for mount in ours.filter(|point| Path::new(point).starts_with(self.folder.path())) {
            let _ = Command::new("umount").args(["--lazy", mount]).output();
        }
    }
}

impl Engine {
    fn start(folder: &Path, socket: &Path) -> Engine {
        // dockerd uses the containerd of the machine, if there is one. Its own namespace separates
        // it from other engines.
        let namespace = folder.file_name().unwrap().to_str().unwrap().replace('.', "");
        let mut child = Command::new("sh")
            .args([
                "-c",
                SCRIPT,
                "dockerd",
                "--bridge=none",
                "--iptables=false",
                "--ip6tables=false",
            ])
            .args(["--ip-forward=false", "--ip-masq=false", "--userland-proxy=false"])
            .arg(format!("--containerd-namespace={namespace}"))
            .arg(format!("--containerd-plugins-namespace={namespace}-plugins"))
            .arg(format!("--config-file={}", folder.join("daemon.json").display()))
            .arg(format!("--data-root={}", folder.join("data").display()))
            .arg(format!("--exec-root={}", folder.join("exec").display()))
            .arg(format!("--pidfile={}", folder.join("docker.pid").display()))
            .arg(format!("--host=unix://{}", socket.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let engine = Engine { log: commands::lines(child.stderr.take().unwrap()), child };
        engine.wait_until_listening();
        engine
    }

    fn wait_until_listening(&self) {
        let deadline = Instant::now() + START_TIMEOUT;
        let mut output = String::new();
        loop {
            match self.log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains("API listen on") => return,
                Ok(line) => output = output + &line + "\n",
                Err(RecvTimeoutError::Timeout) => {
                    panic!("dockerd does not listen after {START_TIMEOUT:?}:\n{output}")
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("dockerd ended (is docker.io installed?):\n{output}")
                }
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if commands::wait_for_exit(&mut self.child, STOP_TIMEOUT).is_none() {
            let output: Vec<_> = self.log.try_iter().collect();
            eprintln!("dockerd did not stop within {STOP_TIMEOUT:?}:\n{}", output.join("\n"));
        }
    }
}
