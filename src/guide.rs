//! Three agents, and how to test yours. Documentation only: each example is a whole agent in small, and runs as a test.
//!
//! - [Your own status source](#your-own-status-source): an agent that knows its deckies better than a state file does.
//! - [Answer 202, report later](#answer-202-report-later): an agent that is told what to do over HTTP.
//! - [A supervisor of processes](#a-supervisor-of-processes): an agent whose work ends one decky at a time.
//! - [Test your agent](#test-your-agent): a master of your own, and [one that misbehaves](#a-master-that-misbehaves).
//!
//! Two things hold for all of them. **No guard:** on a host that is not enrolled [`start`] returns a dormant handle.
//! The work is done as everywhere, nothing is kept and nothing is sent, so the agent's code has no `if enrolled`. **The
//! stop:** [`stop`] posts what waits once more and returns within its grace; what the master has not accepted stays in
//! the outbox for the next start. An agent that just returns from `main` has dropped its handle, which is the same with
//! 2 s.
//!
//! # Your own status source
//!
//! By default a beat says what [`DecnetStatus`] finds: a state file, and Docker's word on the containers. An agent that
//! runs its deckies in another way has its own table of them, and a [`StatusSource`] makes the beat's status from it.
//!
//! It is asked on the status thread, so it may take its time, and even wait for a lock that the agent holds: the beat
//! goes out without it then, and says so. What it must not do is guess. A decky that stands in `deckies` and not in
//! `runtime` is written down as degraded, and one that is left out keeps the state that the master knows. So a source
//! that cannot see its deckies names none of them, and gives [`Snapshot::unknown`] with the reason.
//!
//! The topology is what this host was told to build last. Where the master expects one, and a beat does not name it, it
//! orders it to be built again, containers and all. A beat without a snapshot repeats the last topology known; for the
//! first beat, which waits 250 ms at the most, there is [`applied_topology`].
//!
//! ```
//! # #[cfg(feature = "loopback")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use decnet_heartbeat::loopback::{LoopbackMaster, ShardState};
//! use std::collections::BTreeMap;
//! use std::sync::{Arc, Mutex};
//! use std::time::Duration;
//!
//! use decnet_heartbeat::{AppliedTopology, Heartbeat, Observed, Snapshot, StatusSource, Topology};
//! use serde_json::{Map, Value, json};
//!
//! /// What the agent knows. Its own threads write this as things happen.
//! struct Table {
//!     /// By name. Or why the agent cannot tell.
//!     deckies: Result<BTreeMap<String, Decky>, String>,
//!     applied: Option<AppliedTopology>,
//! }
//!
//! struct Decky {
//!     /// As the master sent it: its model forbids keys of our own.
//!     sent: Value,
//!     /// Each service's state.
//!     services: BTreeMap<String, String>,
//! }
//!
//! struct Source(Arc<Mutex<Table>>);
//!
//! impl StatusSource for Source {
//!     fn snapshot(&mut self) -> Snapshot {
//!         // Whoever panicked may have left it half written.
//!         let Ok(table) = self.0.lock() else { return Snapshot::unknown("the agent's table is broken") };
//!         let snapshot = match &table.deckies {
//!             Ok(deckies) => Snapshot::new(&status(deckies)),
//!             Err(why) => Snapshot::unknown(why),
//!         };
//!         snapshot.with_topology(topology(&table))
//!     }
//!
//!     fn applied_topology(&mut self) -> Option<Topology> {
//!         self.0.lock().ok().map(|table| topology(&table))
//!     }
//! }
//!
//! fn status(deckies: &BTreeMap<String, Decky>) -> Value {
//!     let sent: Vec<&Value> = deckies.values().map(|decky| &decky.sent).collect();
//!     let mut runtime = Map::new();
//!     for (name, Decky { services, .. }) in deckies {
//!         let running = !services.is_empty() && services.values().all(|state| state == "running");
//!         runtime.insert(name.clone(), json!({"running": running, "services": services}));
//!     }
//!     json!({"deployed": !sent.is_empty(), "mode": "swarm", "deckies": sent, "runtime": runtime})
//! }
//!
//! fn topology(table: &Table) -> Topology {
//!     // An agent that can list its bridges and containers says `Observed::Seen`.
//!     Topology { applied: table.applied.clone(), observed: Observed::Unknown("not looked at".to_owned()) }
//! }
//!
//! let decky = Decky {
//!     sent: json!({
//!         "name": "decky-01", "ip": "10.0.0.7", "services": ["ssh"],
//!         "distro": "debian", "base_image": "debian:12", "hostname": "files",
//!     }),
//!     services: BTreeMap::from([("ssh".to_owned(), "running".to_owned())]),
//! };
//! let table = Arc::new(Mutex::new(Table {
//!     deckies: Ok(BTreeMap::from([("decky-01".to_owned(), decky)])),
//!     applied: Some(AppliedTopology {
//!         topology_id: "t-1".to_owned(),
//!         applied_version_hash: "9b1c".to_owned(),
//!         applied_at: 1_700_000_000,
//!         last_error: None,
//!     }),
//! }));
//! # let dir = tempfile::tempdir()?;
//! # let master = LoopbackMaster::start()?;
//! # let enrolment = master.enrol(dir.path())?.enrolment()?;
//! # let builder = Heartbeat::builder().enrolment(enrolment).interval(Duration::from_millis(50));
//! # const SOON: Duration = Duration::from_secs(10);
//! // The builder is `Heartbeat::builder()`, here with the enrolment of a test's master.
//! let heartbeat = builder.status_source(Source(Arc::clone(&table))).start()?;
//!
//! // What the master makes of it.
//! assert!(master.wait_until(SOON, |seen| seen.shards().contains_key("decky-01")));
//! assert_eq!(master.shards()["decky-01"].state, ShardState::Running);
//!
//! // The agent loses sight of its deckies. The beats go on and say so, the topology is still named, and the master's
//! // word on the decky stands.
//! table.lock().unwrap().deckies = Err("the hypervisor does not answer".to_owned());
//! assert!(master.wait_until(SOON, |seen| {
//!     let last = seen.received().last().and_then(|beat| beat.json.as_ref());
//!     last.is_some_and(|beat| {
//!         beat["status"] == json!({"error": "the hypervisor does not answer"})
//!             && beat["topology"]["topology_id"] == "t-1"
//!     })
//! }));
//! assert_eq!(master.shards()["decky-01"].state, ShardState::Running);
//! # heartbeat.stop(Duration::from_secs(5));
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "loopback"))]
//! # fn main() {}
//! ```
//!
//! # Answer 202, report later
//!
//! A master that orders a deploy does not want to wait for it: the agent answers `202 Accepted`, and how it ended comes
//! with a beat. [`run`] is made for that handler. It writes the operation down as in flight, starts a thread for the
//! work and returns; what the work returns, or its panic, becomes the report.
//!
//! `Ok` from `run` means that the operation is on the disk. From then on the master will hear how it ended, however
//! that is: if the process is killed in the middle, the next start reports "the agent restarted during deploy" with its
//! first beat. So 202 is a promise that the agent can keep. (Where the disk is full the operation is in memory, until
//! it can be written; the log and [`Stats::outbox`] say so.) `Err` means that it cannot: the work has not begun, the
//! handler answers 503, and whoever asked may ask again.
//!
//! ```
//! # #[cfg(feature = "loopback")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use decnet_heartbeat::{Heartbeat, Snapshot, loopback::{LoopbackMaster, RowStatus}};
//! use std::io::{self, BufRead, BufReader, Read, Write};
//! use std::net::{TcpListener, TcpStream};
//! use std::sync::Barrier;
//! use std::thread;
//! use std::time::Duration;
//!
//! use decnet_heartbeat::{DeltaSender, Operation};
//!
//! /// Answers one request after another. No request waits for a deploy.
//! fn serve(listener: &TcpListener, deltas: &DeltaSender) {
//!     for connection in listener.incoming() {
//!         // A client that goes away is no reason to stop serving the others.
//!         if let Err(error) = connection.and_then(|connection| handle(connection, deltas)) {
//!             eprintln!("a request failed: {error}");
//!         }
//!     }
//! }
//!
//! fn handle(mut connection: TcpStream, deltas: &DeltaSender) -> io::Result<()> {
//!     let mut lines = BufReader::new(connection.try_clone()?).lines();
//!     let request = lines.next().transpose()?.unwrap_or_default();
//!     // The headers, up to an empty line; this agent has no use for them.
//!     while lines.next().transpose()?.is_some_and(|header| !header.is_empty()) {}
//!     let answer = answer(&request, deltas);
//!     write!(connection, "HTTP/1.1 {answer}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
//! }
//!
//! fn answer(request: &str, deltas: &DeltaSender) -> &'static str {
//!     let decky = request.strip_prefix("POST /deploy/").and_then(|rest| rest.strip_suffix(" HTTP/1.1"));
//!     let Some(decky) = decky.map(str::to_owned) else { return "404 Not Found" };
//!     match deltas.run(Operation::Deploy, [decky.clone()], move || compose_up(&decky)) {
//!         Ok(_) => "202 Accepted",
//!         Err(error) => {
//!             eprintln!("deploy refused: {error:?}");
//!             "503 Service Unavailable"
//!         }
//!     }
//! }
//!
//! /// Stands for minutes of work: it lasts until the example opens the gate.
//! fn compose_up(_decky: &str) -> Result<(), io::Error> {
//!     GATE.wait();
//!     Ok(())
//! }
//! static GATE: Barrier = Barrier::new(2);
//! # let dir = tempfile::tempdir()?;
//! # let master = LoopbackMaster::start()?;
//! # let worker = master.enrol(dir.path())?;
//! # let enrolment = worker.enrolment()?;
//! # let builder = Heartbeat::builder().enrolment(enrolment).status_source(|| Snapshot::unknown("an example"));
//! # const SOON: Duration = Duration::from_secs(10);
//!
//! // The builder is `Heartbeat::builder()`, here with the enrolment of a test's master.
//! let heartbeat = builder.agent_version("1.4.0").start()?;
//! let (listener, deltas) = (TcpListener::bind("127.0.0.1:0")?, heartbeat.deltas());
//! let address = listener.local_addr()?;
//! thread::spawn(move || serve(&listener, &deltas));
//!
//! // The master notes that it has ordered a deploy, and orders it.
//! master.open_operation(&worker.uuid, "decky-01", "deploy");
//! let mut order = TcpStream::connect(address)?;
//! write!(order, "POST /deploy/decky-01 HTTP/1.1\r\nhost: agent\r\n\r\n")?;
//! let mut answer = String::new();
//! order.read_to_string(&mut answer)?;
//! assert!(answer.starts_with("HTTP/1.1 202 Accepted\r\n"));
//!
//! // Answered, and still at work.
//! assert_eq!(heartbeat.stats().operations, 1);
//! assert_eq!(master.rows()[0].status, RowStatus::Running);
//! GATE.wait();
//! assert!(master.wait_until(SOON, |seen| seen.rows()[0].status == RowStatus::Succeeded));
//!
//! let stopped = heartbeat.stop(Duration::from_secs(5));
//! assert_eq!((stopped.operations, stopped.kept), (0, true));
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "loopback"))]
//! # fn main() {}
//! ```
//!
//! To stop such an agent, take no more orders first, then [`stop`] the heartbeat. It does not wait for work that is
//! still going on ([`Stopped::operations`] says how much that is). Work that ends after the stop and before the process
//! does is in the outbox with its own verdict; work that the end of the process cuts off is reported failed by the next
//! start. A real agent also asks who is asking, over mTLS, and sets timeouts on its connections. That is left out here.
//!
//! # A supervisor of processes
//!
//! Where one operation is on several deckies and they end one by one, [`begin`] returns a guard and [`end`] gives
//! each its own verdict. The master hears of each as it ends, and not of the last alone.
//!
//! The guard is why there is nothing to clean up. What is not settled when it is dropped, by a `?` or a panic, is
//! reported failed. If the process is killed, the next start does the same with what was still open; what was settled
//! before is on the disk as it was settled. (A child that outlives its supervisor may yet succeed. If it matters, let
//! it die with it: the master is told that the deploy failed.)
//!
//! ```
//! # #[cfg(feature = "loopback")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use decnet_heartbeat::{Snapshot, loopback::{LoopbackMaster, RowStatus}};
//! use std::collections::BTreeMap;
//! use std::io;
//! use std::process::{Command, ExitStatus};
//! use std::sync::mpsc;
//! use std::thread;
//! use std::time::Duration;
//!
//! use decnet_heartbeat::{Error, Heartbeat, Operation, Outcome};
//!
//! /// Starts every decky's command, and reports each as it ends.
//! fn deploy(heartbeat: &Heartbeat, commands: &BTreeMap<&'static str, &[&str]>) -> Result<(), Error> {
//!     // Before the first child: had we died in between, nobody would know of it.
//!     let mut operation = heartbeat.begin(Operation::Deploy, commands.keys().copied())?;
//!     let (ended, ends) = mpsc::channel();
//!     for (&decky, command) in commands {
//!         match Command::new(command[0]).args(&command[1..]).spawn() {
//!             Ok(mut child) => {
//!                 let ended = ended.clone();
//!                 thread::spawn(move || ended.send((decky, child.wait())));
//!             }
//!             // One that cannot be started is no reason to give up the others.
//!             Err(error) => operation.end(decky, Outcome::Failed(format!("cannot be started: {error}")))?,
//!         }
//!     }
//!     drop(ended); // so that the loop ends with the last child
//!     for (decky, status) in ends {
//!         operation.end(decky, outcome(status))?;
//!     }
//!     Ok(())
//! }
//!
//! fn outcome(status: io::Result<ExitStatus>) -> Outcome {
//!     match status {
//!         Ok(status) if status.success() => Outcome::Succeeded,
//!         Ok(status) => Outcome::Failed(match status.code() {
//!             Some(code) => format!("exited with {code}"),
//!             None => status.to_string(), // the signal that ended it
//!         }),
//!         Err(error) => Outcome::Failed(error.to_string()),
//!     }
//! }
//! # let dir = tempfile::tempdir()?;
//! # let master = LoopbackMaster::start()?;
//! # let worker = master.enrol(dir.path())?;
//! # let enrolment = worker.enrolment()?;
//! # let builder = Heartbeat::builder().enrolment(enrolment).status_source(|| Snapshot::unknown("an example"));
//! # const SOON: Duration = Duration::from_secs(10);
//! # for decky in ["decky-01", "decky-02", "decky-03", "decky-04"] {
//! #     master.open_operation(&worker.uuid, decky, "deploy");
//! # }
//!
//! // The builder is `Heartbeat::builder()`, here with the enrolment of a test's master.
//! let heartbeat = builder.agent_version("1.4.0").start()?;
//! let commands: BTreeMap<&str, &[&str]> = BTreeMap::from([
//!     ("decky-01", &["true"][..]),
//!     ("decky-02", &["sh", "-c", "exit 3"]),
//!     ("decky-03", &["sh", "-c", "kill -9 $$"]),
//!     ("decky-04", &["/no/such/program"]),
//! ]);
//! deploy(&heartbeat, &commands)?;
//!
//! // Each has its own row at the master, and its own end.
//! assert!(master.wait_until(SOON, |seen| seen.rows().iter().all(|row| row.status != RowStatus::Running)));
//! let errors: Vec<_> = master.rows().into_iter().map(|row| row.error).collect();
//! assert_eq!(errors[0], None);
//! assert_eq!(errors[1].as_deref(), Some("exited with 3"));
//! assert!(errors[2].as_ref().is_some_and(|error| error.starts_with("signal: 9")));
//! assert!(errors[3].as_ref().is_some_and(|error| error.starts_with("cannot be started: No such file")));
//! # assert_eq!(master.rows()[0].status, RowStatus::Succeeded);
//! # heartbeat.stop(Duration::from_secs(5));
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "loopback"))]
//! # fn main() {}
//! ```
//!
//! To stop it, stop the children first. Their ends are settled like any others, and [`stop`] posts them; what an
//! operator reads is then "signal: 15 (SIGTERM)" and not "the agent restarted during deploy".
//!
//! # Test your agent
//!
//! The feature `loopback` is a DECNET master on 127.0.0.1 with a CA of its own. It takes milliseconds to start, judges
//! deltas by the real one's rules, and needs no network, no Docker and no configuration:
//!
//! ```toml
//! [dev-dependencies]
//! decnet-heartbeat = { version = "0.1", default-features = false, features = ["loopback"] }
//! tempfile = "3"
//! ```
//!
//! A test is a master, a worker that it has enrolled, the agent's own code (here it is a `push`), and a look into the
//! master's rows:
//!
//! ```
//! # #[cfg(feature = "loopback")]
//! # mod tests {
//! # use std::time::Duration;
//! # use decnet_heartbeat::loopback::{LoopbackMaster, RowStatus};
//! # use decnet_heartbeat::{Heartbeat, LifecycleDelta, Operation};
//! # const SOON: Duration = Duration::from_secs(10);
//! // #[test]
//! # pub
//! fn a_deploy_that_fails_is_reported() -> Result<(), Box<dyn std::error::Error>> {
//!     let dir = tempfile::tempdir()?;
//!     let master = LoopbackMaster::start()?;
//!     let worker = master.enrol(dir.path())?;
//!     let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
//!     master.open_operation(&worker.uuid, "decky-01", "deploy");
//!     heartbeat.deltas().push(LifecycleDelta::failed("decky-01", Operation::Deploy, "no such image"))?;
//!     assert!(master.wait_until(SOON, |seen| seen.rows()[0].status == RowStatus::Failed));
//!     assert_eq!(master.rows()[0].error.as_deref(), Some("no such image"));
//!     Ok(())
//! }
//! # }
//! # #[cfg(feature = "loopback")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> { tests::a_deploy_that_fails_is_reported() }
//! # #[cfg(not(feature = "loopback"))]
//! # fn main() {}
//! ```
//!
//! `wait_until` is asked at every change and returns at once when it holds, so a test neither sleeps nor polls; the ten
//! seconds are for a machine that is busy, and only a test that fails takes them.
//!
//! ## A master that misbehaves
//!
//! `script` says what goes wrong with the next connections and requests, in order; after the last, service is normal.
//! `stop` is the outage: connections are cut and new ones refused, until `start_again` on the same port.
//!
//! ```
//! # #[cfg(feature = "loopback")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use std::time::Duration;
//! # use decnet_heartbeat::loopback::{Answer, Fault, LoopbackMaster, RowStatus};
//! # use decnet_heartbeat::{Heartbeat, LifecycleDelta, Operation, Snapshot};
//! # let dir = tempfile::tempdir()?;
//! # let mut master = LoopbackMaster::start()?;
//! # let worker = master.enrol(dir.path())?;
//! # let builder = Heartbeat::builder().enrolment(worker.enrolment()?).interval(Duration::from_millis(50));
//! # let heartbeat = builder.status_source(|| Snapshot::unknown("an example")).start()?;
//! # let deltas = heartbeat.deltas();
//! # master.wait_for_beats(1, Duration::from_secs(10));
//! # master.open_operation(&worker.uuid, "decky-01", "deploy");
//! # master.open_operation(&worker.uuid, "decky-02", "deploy");
//! # const SOON: Duration = Duration::from_secs(10);
//! // Busy twice, then cut off in the middle of a body: the delta arrives all the same.
//! master.script([Answer::status(500).into(), Answer::status(503).into(), Fault::CutInBody]);
//! deltas.push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
//! assert!(master.wait_until(SOON, |seen| seen.rows()[0].status == RowStatus::Succeeded));
//! assert_eq!(master.faults_left(), 0);
//!
//! // Gone when the agent pushes, back later.
//! master.stop();
//! deltas.push(LifecycleDelta::succeeded("decky-02", Operation::Deploy))?;
//! assert!(heartbeat.stats().waiting > 0);
//! master.start_again()?;
//! assert!(master.wait_until(SOON, |seen| seen.rows()[1].status == RowStatus::Succeeded));
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "loopback"))]
//! # fn main() {}
//! ```
//!
//! [`start`]: crate::HeartbeatBuilder::start
//! [`stop`]: crate::Heartbeat::stop
//! [`run`]: crate::DeltaSender::run
//! [`begin`]: crate::Heartbeat::begin
//! [`end`]: crate::TrackedOperation::end
//! [`applied_topology`]: crate::StatusSource::applied_topology
//! [`DecnetStatus`]: crate::DecnetStatus
//! [`StatusSource`]: crate::StatusSource
//! [`Snapshot::unknown`]: crate::Snapshot::unknown
//! [`Stats::outbox`]: crate::Stats::outbox
//! [`Stopped::operations`]: crate::Stopped::operations
