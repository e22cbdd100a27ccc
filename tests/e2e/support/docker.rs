//! A Docker Engine of the test's own: its socket, data and containers live in a scratch folder, and go with it.

use super::process;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Starting takes about 0.5 s; a busy machine gets a multiple.
const START: Duration = Duration::from_secs(60);
/// Stopping takes about 1 s; dockerd itself gives its containers 15 s.
const STOP: Duration = Duration::from_secs(30);
/// The one image: no registry is reached, so it is made of the static busybox.
const IMAGE: &str = "busybox";
const BUSYBOX: &str = "/bin/busybox";

/// Runs `dockerd` beside a `cat` on our pipe: when we close it, or die, the engine gets its SIGTERM all the same (also
/// when it is frozen) and leaves neither containers nor mounts behind. Its stderr is open only as long as it runs.
const KEEPER: &str = r#"
    dockerd "$@" & engine=$!
    exec 2>/dev/null
    cat >/dev/null
    kill $engine; kill -CONT $engine
    wait $engine
"#;

/// A running `dockerd`. Needs root, Debian's `docker.io` and `busybox-static`.
pub struct Docker {
    keeper: Mutex<Option<Keeper>>,
    folder: TempDir,
    bridges: Mutex<Vec<String>>,
}

struct Keeper {
    child: Child,
    log: Receiver<String>,
}

impl Docker {
    /// What an engine of our own needs and is not there.
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
        assert_eq!(Docker::missing(), None, "a Docker Engine of our own needs this");
        let folder = tempfile::Builder::new().prefix("dh-").tempdir().unwrap();
        fs::write(folder.path().join("daemon.json"), "{}").unwrap();

        let docker = Docker { keeper: Mutex::new(None), folder, bridges: Mutex::default() };
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

    /// What `DOCKER_HOST=unix://…` and the status source take.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("docker.sock")
    }

    /// Makes an image of what is in a folder.
    pub fn import(&self, folder: &Path, what: &str, image: &str) {
        let script = format!("tar -C '{}' -c {what} | docker import - {image}", folder.display());
        process::run(self.client("sh").args(["-c", &script]));
    }

    /// A container that was never started: `created`.
    pub fn create(&self, name: &str) {
        self.container("create", &[], name);
    }

    /// A container that sleeps for good: `running`.
    pub fn run(&self, name: &str) {
        self.container("run", &["--detach"], name);
    }

    /// Stops a running container: `exited`.
    pub fn stop_container(&self, name: &str) {
        process::run(self.client("docker").args(["stop", name]));
    }

    /// Removes a container, running or not.
    pub fn remove(&self, name: &str) {
        process::run(self.client("docker").args(["rm", "--force", name]));
    }

    /// A bridge network.
    pub fn network(&self, name: &str) {
        let id = process::run(self.client("docker").args(["network", "create", name]));
        self.bridges.lock().unwrap().push(format!("br-{}", &id[..12]));
    }

    /// The engine goes away with its socket, and its containers stop.
    pub fn stop(&self) {
        drop(self.keeper.lock().unwrap().take().expect("dockerd runs"));
    }

    /// Starts it again after `stop`, with the containers (stopped) and networks that it had.
    pub fn start_again(&self) {
        let mut keeper = self.keeper.lock().unwrap();
        assert!(keeper.is_none(), "dockerd runs already");
        *keeper = Some(Keeper::start(self.folder.path(), &self.socket()));
    }

    /// The engine hangs: it takes connections and never answers, until `thaw`.
    pub fn freeze(&self) {
        process::signal("STOP", self.pid());
        // The signal reaches one thread after another, and any of them may still answer.
        let tasks = format!("/proc/{}/task", self.pid());
        let is_stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('T'))
        };
        let end = Instant::now() + Duration::from_secs(30);
        while !std::fs::read_dir(&tasks).unwrap().map_while(Result::ok).all(is_stopped) {
            assert!(Instant::now() < end, "the engine does not stop");
            std::thread::yield_now();
        }
    }

    pub fn thaw(&self) {
        process::signal("CONT", self.pid());
    }

    fn container(&self, verb: &str, options: &[&str], name: &str) {
        let mut docker = self.client("docker");
        // A sleeping process 1 ignores SIGTERM, and each stop would take 10 s.
        docker.arg(verb).args(options).args([
            "--name",
            name,
            "--network",
            "none",
            "--stop-signal",
            "KILL",
        ]);
        process::run(docker.args([IMAGE, BUSYBOX, "sleep", "2147483647"]));
    }

    /// A program that talks to this engine, such as `docker`.
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
        drop(self.keeper.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).take());
        // dockerd leaves bridges to its next start.
        for bridge in self.bridges.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            let _ = Command::new(BUSYBOX).args(["ip", "link", "delete", bridge]).output();
        }
        // After an end in good order there are no mounts left; after any other, the folder could not be removed.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours = mounts.lines().filter_map(|mount| mount.split(' ').nth(1));
        for mount in ours.filter(|point| Path::new(point).starts_with(self.folder.path())) {
            let _ = Command::new("umount").args(["--lazy", mount]).output();
        }
    }
}

impl Keeper {
    fn start(folder: &Path, socket: &Path) -> Keeper {
        // Where the machine has a containerd, dockerd uses that one: a namespace of our own keeps us apart.
        let namespace = folder.file_name().unwrap().to_str().unwrap().replace('.', "");
        let mut child = Command::new("sh")
            .args([
                "-c",
                KEEPER,
                "keeper",
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
        let keeper = Keeper { log: process::lines(child.stderr.take().unwrap()), child };
        keeper.wait_until_it_listens();
        keeper
    }

    fn wait_until_it_listens(&self) {
        let deadline = Instant::now() + START;
        let mut said = String::new();
        loop {
            match self.log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains("API listen on") => return,
                Ok(line) => said = said + &line + "\n",
                Err(RecvTimeoutError::Timeout) => {
                    panic!("dockerd does not listen after {START:?}:\n{said}")
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("dockerd does not run (is docker.io there?):\n{said}")
                }
            }
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if process::end(&mut self.child, STOP).is_none() {
            let said: Vec<_> = self.log.try_iter().collect();
            eprintln!("dockerd has not stopped within {STOP:?}:\n{}", said.join("\n"));
        }
    }
}
