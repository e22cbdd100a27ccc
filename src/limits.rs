//! Every limit and timeout in one place, each with its reason. Constants only: no thread runs here.

use std::time::Duration;

// ---- when a beat goes out -------------------------------------------------------------------

/// The time between two beats, as the original agent has it.
pub(crate) const INTERVAL: Duration = Duration::from_secs(30);

/// The shortest interval that can be asked for: below it a fleet is a load test.
pub(crate) const MIN_INTERVAL: Duration = Duration::from_millis(50);

/// The longest interval: a master that hears nothing for an hour has given the host up.
pub(crate) const MAX_INTERVAL: Duration = Duration::from_secs(3600);

/// How long a tick's beat waits for its snapshot: Docker may be slow, the next tick must not be missed.
pub(crate) const TICK_PATIENCE: Duration = Duration::from_secs(10);

/// How long the first beat and a delta wait for a snapshot: news is worth more than completeness.
pub(crate) const DELTA_PATIENCE: Duration = Duration::from_millis(250);

/// How old a snapshot may be when its beat goes out: one may have been waiting behind a POST that took its time.
pub(crate) const FRESH: Duration = Duration::from_secs(5);

/// The first wait after a failed beat; it doubles up to the interval.
pub(crate) const BACKOFF_START: Duration = Duration::from_secs(1);

/// Intervals for which a host without files must be refused to count as decommissioned: ten minutes at the default, longer than
/// any enrolment takes.
pub(crate) const DECOMMISSIONED_INTERVALS: u32 = 20;

/// What a master's `Retry-After` is clamped to: never a busy loop, never silence for good.
pub(crate) const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));

/// Deltas in one body: the master works through them one by one in its database.
pub(crate) const DELTAS_PER_BODY: usize = 500;

/// Beats for which states, or a single delta, are left out after the master has failed on them. A few minutes at the usual
/// interval; doubled each time.
pub(crate) const REST_BEATS: u64 = 10;

/// The longest such pause: what the master fails on today may work after its next update.
pub(crate) const REST_MOST: Duration = Duration::from_secs(24 * 3600);

/// Deltas that are sent one to a body in one beat: a few seconds of POSTs, and not more.
pub(crate) const SINGLES_PER_BEAT: usize = 50;

/// How long the first beat of a process waits for the topology row. A beat without it makes the master order a rebuild.
pub(crate) const TOPOLOGY_PATIENCE: Duration = Duration::from_secs(1);

/// What `Drop` allows for the final flush: long enough for one POST, short enough not to be noticed.
pub(crate) const DROP_GRACE: Duration = Duration::from_secs(2);

/// The longest grace that a stop is given: the clock ends somewhere, and "for ever" must not be a panic.
pub(crate) const MAX_GRACE: Duration = Duration::from_secs(24 * 3600);

/// What a stop leaves of its grace for an interrupt to take effect.
pub(crate) const INTERRUPT_SLACK: Duration = Duration::from_millis(250);

/// An event takes a POST and a retry at the most, and waits for the outbox; a snapshot takes two requests to Docker. Beyond
/// this a thread hangs.
pub(crate) const STALLED: Duration = Duration::from_secs(60);

/// What the program allows for the final flush after a signal; systemd waits 90 s before it kills.
#[cfg(feature = "cli")]
pub(crate) const RUN_GRACE: Duration = Duration::from_secs(5);

/// Signals to stop within so long are one: a supervisor signals a process and its group, or a parent passes on what its group
/// got. Nobody types as fast.
#[cfg(feature = "cli")]
pub(crate) const SAME_STOP: Duration = Duration::from_millis(250);

// ---- the POST -------------------------------------------------------------------------------

/// Name resolution, and then TCP and TLS together; the original's connect timeout.
pub(crate) const CONNECT: Duration = Duration::from_secs(5);

/// Sending the headers, and then sending the body; the original's write timeout.
pub(crate) const SEND: Duration = Duration::from_secs(5);

/// Waiting for the answer's headers, and then its body; the original's read timeout.
pub(crate) const RESPONSE: Duration = Duration::from_secs(10);

/// The whole POST, first byte to last, at the most. Of a short interval it is two thirds, so that beats never pile up.
pub(crate) const POST: Duration = Duration::from_secs(20);

/// The whole POST at the least: a handshake on a busy host takes its time.
pub(crate) const MIN_POST: Duration = Duration::from_secs(1);

/// Bytes of an answer at the most, whatever they are: interim answers (1xx) could go on for ever.
pub(crate) const ANSWER: usize = 64 * 1024;

/// Bytes that are read from the socket for one answer, and for one handshake: TLS has messages of its own (tickets, key
/// updates), which could go on for ever. The largest handshake that makes sense, a few certificates, takes some 20 KiB.
pub(crate) const ANSWER_ON_THE_WIRE: usize = 256 * 1024;

/// When a body cannot be sent any more, an answer that is there already is read for so long: it is in the socket's buffer.
pub(crate) const EARLY_ANSWER: Duration = Duration::from_millis(100);

/// How long one read waits meanwhile.
pub(crate) const EARLY_ANSWER_PAUSE: Duration = Duration::from_millis(5);

/// How long a connection is used at the most, so that a name that leads elsewhere is noticed.
pub(crate) const CONNECTION_AGE: Duration = Duration::from_secs(600);

/// After so many answers in a row that are not 2xx the connection is closed, and the name is looked up again: another
/// address may answer better.
pub(crate) const BAD_ANSWERS: u32 = 3;

/// Bytes of an answer that are read; the real master's refusals are below 1 KiB.
pub(crate) const ANSWER_BODY: usize = 4 * 1024;

/// Bytes of an answer's headers that are read.
pub(crate) const ANSWER_HEADERS: usize = 8 * 1024;

/// ureq's buffers per connection: a beat is a few KiB. More than the headers may take, or ureq would mistake too many of
/// them for the end of the connection.
pub(crate) const HTTP_BUFFER: usize = 16 * 1024;

/// How long an address is used before its name is looked up again. A failure to connect looks it up at once.
pub(crate) const RESOLVE_AGAIN: Duration = Duration::from_secs(300);

/// TLS sessions kept for resumption; there is one master.
pub(crate) const TLS_SESSIONS: usize = 4;

// ---- what is read on this host --------------------------------------------------------------

/// A state file of 10,000 deckies is about 6 MiB.
pub(crate) const STATE_FILE: u64 = 12 * 1024 * 1024;

/// Entries of a `lib` folder that are looked at for DECNET's package: a virtual environment has a handful, and `/usr/lib`
/// has some hundreds.
pub(crate) const LIB_ENTRIES: usize = 4_096;

/// Versions of Python in one `lib` folder that are looked at.
pub(crate) const PYTHON_VERSIONS: usize = 16;

/// `pyvenv.cfg` of a virtual environment; real ones are below 1 KiB.
pub(crate) const PYVENV_CFG: u64 = 64 * 1024;

/// How long ago a file's last change must be for the next one to show in its times: some file systems count in two seconds,
/// and ours are read in whole ones.
pub(crate) const SETTLED: Duration = Duration::from_secs(3);

/// Deckies of a state file: what a file of that size holds, if they are real ones.
pub(crate) const DECKIES: usize = 20_000;

/// Services of a decky; DECNET has some two dozen.
pub(crate) const SERVICES: usize = 100;

/// How deep a decky's JSON may be nested. Python's reader, which the master has, ends at about a thousand.
pub(crate) const NESTING: usize = 100;

/// Digits of an integer that Python reads: its own limit for text.
pub(crate) const INTEGER_DIGITS: usize = 4_300;

/// A status: a state file, and its runtime. A source of the agent's own may not flood the master either.
pub(crate) const STATUS: usize = 16 * 1024 * 1024;

/// One of Docker's answers; 10,000 containers are about 15 MiB.
pub(crate) const DOCKER_ANSWER: u64 = 32 * 1024 * 1024;

/// Containers, or networks, in one of Docker's answers.
pub(crate) const DOCKER_LIST: usize = 25_000;

/// Bytes of a container's name or state, or of a network's name; Linux' file systems have names of 255.
pub(crate) const DOCKER_NAME: usize = 255;

/// Bytes of a text in `topology.db`; ids have 36, and an error is for people.
pub(crate) const TOPOLOGY_TEXT: usize = 64 * 1024;

/// The request for Docker's networks, all of it. They are asked for first, and only `observed` depends on them, so a
/// request that hangs must leave time for the containers.
pub(crate) const DOCKER_NETWORKS: Duration = Duration::from_secs(2);

/// The request for Docker's containers, all of it. Both requests and the wait for `topology.db` end within
/// [`TICK_PATIENCE`], so that a tick's beat can say what was wrong.
pub(crate) const DOCKER_CONTAINERS: Duration = Duration::from_secs(6);

/// How long a locked `topology.db` is waited for.
pub(crate) const TOPOLOGY_BUSY: Duration = Duration::from_millis(500);

/// How long anybody waits for the outbox: for another thread, and then for another process' lock. A push must not block.
pub(crate) const OUTBOX_BUSY: Duration = Duration::from_secs(1);

/// So long before a caller gives up, the outbox thread stops waiting for another process' lock: so he hears of that.
pub(crate) const OUTBOX_MARGIN: Duration = Duration::from_millis(100);

/// How long a start waits for the ini and the bundle.
pub(crate) const CREDENTIALS_PATIENCE: Duration = Duration::from_secs(5);

/// Requests that wait for the outbox thread and can still be withdrawn.
pub(crate) const REQUESTS: usize = 1_024;

/// Rows that are changed in one transaction; a request that has more is alone in it.
pub(crate) const GROUP_ROWS: usize = 1_000;

/// How long the outbox thread waits, after a group of several requests, for as many again.
pub(crate) const GATHER: Duration = Duration::from_micros(100);

/// How long the heartbeat thread waits for the deltas of a POST, half an interval at the most. While an answer is overdue it
/// does not wait again.
pub(crate) const BATCH_PATIENCE: Duration = Duration::from_millis(250);

/// What came with new deltas is asked for anew when it is older than that: other processes begin operations, too.
pub(crate) const BATCH_FRESH: Duration = Duration::from_millis(20);

/// How old such a batch may be if the disk does not answer: a snapshot was waited for, and the answer. Operations that this
/// process has begun since are left out of it; another process' may be missed.
pub(crate) const BATCH_USABLE: Duration = Duration::from_secs(1);

/// Rows of which it is remembered what began or was answered since a batch was read: far more than in its second.
pub(crate) const HOLDS: usize = 1_000;

/// If no more deltas wait than that, they come along with the word that there are new ones, and a look at all of them costs
/// next to nothing.
pub(crate) const FEW_DELTAS: u64 = 50;

/// Batches that the heartbeat thread has not received yet, and beside which none is offered.
pub(crate) const OFFERS: usize = 2;

/// A stop waits at least that long for the outbox thread, however short its grace is.
pub(crate) const RELEASE: Duration = Duration::from_millis(50);

/// The stack of the heartbeat thread and of the outbox thread. Most of it is never touched.
pub(crate) const STACK: usize = 1024 * 1024;

/// The stack of the status thread, on which foreign code runs: what Rust gives by itself.
pub(crate) const STATUS_STACK: usize = 2 * 1024 * 1024;

/// The wait before a process asks again for its turn to change the outbox: a change takes a sync of the disk.
pub(crate) const OUTBOX_PAUSE: Duration = Duration::from_millis(5);

/// How long a file that could not be written is left alone: a full disk must not cost every push a try.
pub(crate) const OUTBOX_RETRY: Duration = Duration::from_secs(1);

/// Rows of the outbox, all of them: what a master that is away for days may leave, in a few MB.
pub(crate) const OUTBOX_ROWS: usize = 10_000;

/// Delivered deltas that are remembered, for people.
pub(crate) const OUTBOX_DELIVERED: usize = 100;

/// How long a delta waits for delivery at the most: a verdict on an operation of a week ago helps nobody.
pub(crate) const OUTBOX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Bytes that are read of who holds the delivery lock: a pid.
pub(crate) const OUTBOX_HOLDER: usize = 16;

/// How often a process that owns rows looks whether the lock file and the outbox' file were replaced.
pub(crate) const OUTBOX_LOOK: Duration = Duration::from_secs(10);

/// The header of the index (`-shm`) of a log, in bytes: of an index that ends within it SQLite believes nothing.
pub(crate) const INDEX_HEADER: u64 = 136;

/// How long an index is made that somebody has cut off: more than SQLite has mapped of it, which is 32 KiB for 16 MiB of log. The
/// file is sparse.
pub(crate) const INDEX: u64 = 1024 * 1024;

/// Bytes of the path of a database: SQLite opens no file whose path is longer than 512, `-journal` included.
pub(crate) const DATABASE_PATH: usize = 504;

/// Bytes of a damaged outbox that must be readable before it is moved aside: more than 10,000 rows take.
pub(crate) const READ_THROUGH: u64 = 256 * 1024 * 1024;

/// How often a lock file that others make, remove or replace meanwhile is looked at again before that is an error.
pub(crate) const LOCK_TRIES: usize = 100;

/// Replaced lock files that stay open although no process holds a lock in them: as many as may be replaced between two ticks.
pub(crate) const LOCK_FILES: usize = 8;

/// How long a lock file has been at its place before an owner that is not locked in it counts as ended: far longer than an
/// owner takes to notice a new lock file, see [`OUTBOX_LOOK`].
/// A fuzz target runs no other process.
pub(crate) const LOCK_SETTLED: Duration = Duration::from_secs(if cfg!(fuzzing) { 0 } else { 60 });

/// After that long somebody must hear of a row of which nobody could tell whether its owner runs; it is said again as often.
pub(crate) const OUTBOX_STUCK: Duration = Duration::from_secs(24 * 3600);

/// Rows of that kind that a line of the log names.
pub(crate) const OUTBOX_STUCK_NAMED: usize = 10;

/// How often the rows' ages are written down: each time writes every row.
pub(crate) const OUTBOX_AGING: Duration = Duration::from_secs(3600);

/// A PEM file of the bundle; the real ones are below 8 KiB.
pub(crate) const PEM_FILE: u64 = 256 * 1024;

/// Days before the end of our certificate from which on that is said: time enough to enrol a host again.
pub(crate) const EXPIRY_WARNING: i64 = 30;

/// `decnet.ini`.
pub(crate) const INI_FILE: u64 = 1024 * 1024;

/// Characters of a host uuid; the master's own have 36, and a column of its database holds 255.
pub(crate) const HOST_UUID: usize = 255;

/// Bytes of a command's stderr that `track` keeps: a delta's error, of characters of four bytes, and as much again three
/// times for the colours and the overwritten lines of a command that writes to a terminal.
#[cfg(feature = "cli")]
pub(crate) const STDERR_TAIL: usize = 4 * 4 * DELTA_ERROR;

/// Bytes of a command's stderr that wait for whoever reads ours: as much as a pipe holds. With more, the command waits.
#[cfg(feature = "cli")]
pub(crate) const STDERR_QUEUE: usize = 64 * 1024;

/// Bytes of one write to our stderr: a pipe that `poll` calls writable takes so many without blocking (`PIPE_BUF`).
#[cfg(feature = "cli")]
pub(crate) const STDERR_WRITE: usize = 4_096;

/// The same for a terminal that we may not open once more. `poll` calls it writable when it has room for a single byte.
#[cfg(feature = "cli")]
pub(crate) const TERMINAL_WRITE: usize = 128;

/// The pause after a write for which there was less room than `poll` said: a line end takes two bytes of a terminal.
#[cfg(feature = "cli")]
pub(crate) const STDERR_PAUSE: Duration = Duration::from_millis(20);

/// Bytes that a disk has left at the least for `check` to find it good: what the outbox grows to at the most.
#[cfg(feature = "cli")]
pub(crate) const ROOM: u64 = 8 * 1024 * 1024;

/// How long `check` waits after a handshake for what the master says then, beyond four times what the handshake took.
#[cfg(feature = "cli")]
pub(crate) const AFTER_HANDSHAKE: Duration = Duration::from_millis(100);

/// How long `track` waits for the process that copies its command's stderr to start: it takes one `exec`.
#[cfg(feature = "cli")]
pub(crate) const COMPANION_START: Duration = Duration::from_secs(5);

/// The time from one start of such a process to the next, where something kills it again and again.
#[cfg(feature = "cli")]
pub(crate) const COMPANION_AGAIN: Duration = Duration::from_secs(1);

/// How often `track` looks whether its command has ended, where nothing that it can wait for says so: an old kernel has no
/// pidfd, whoever started `track` may have SIGCHLD blocked, and a host without memory refuses to wait.
#[cfg(feature = "cli")]
pub(crate) const COMMAND_LOOK: Duration = Duration::from_secs(1);

/// How long that process may take to answer whether it got a signal. Without an answer the signal is passed on.
#[cfg(feature = "cli")]
pub(crate) const COMPANION_ANSWER: Duration = Duration::from_millis(250);

/// How long after a signal to the process group all of the group's processes have noticed it.
#[cfg(feature = "cli")]
pub(crate) const GROUP_SIGNAL: Duration = Duration::from_millis(30);

/// How long that process remembers a signal, as `track` may be slow to ask. One that it has not asked about by then did
/// not reach it.
#[cfg(feature = "cli")]
pub(crate) const GROUP_SIGNAL_AGE: Duration = Duration::from_secs(2);

/// After its command has ended, how long `track` waits for the tail of its stderr, and before it exits for the rest of it to
/// be written to ours.
#[cfg(feature = "cli")]
pub(crate) const STDERR_GRACE: Duration = Duration::from_secs(1);

/// How long `run` looks again before it says that this host is not enrolled or its bundle cannot be used, after which no
/// supervisor starts it again: longer than an enrolment takes to remove a file or the agent dir and to write it anew.
#[cfg(feature = "cli")]
pub(crate) const ENROLMENT_PATIENCE: Duration = Duration::from_secs(2);

/// The time between two of these looks.
#[cfg(feature = "cli")]
pub(crate) const ENROLMENT_LOOK: Duration = Duration::from_millis(50);

/// How long `run` waits at its start for whether `--stats-file` and `--metrics-file` may be replaced.
#[cfg(feature = "cli")]
pub(crate) const STATS_CHECK: Duration = Duration::from_secs(1);

/// How long `run` waits at its end for the stats that are being written: a working disk takes a few milliseconds.
#[cfg(feature = "cli")]
pub(crate) const STATS_FINISH: Duration = Duration::from_millis(250);

/// After how long READY is first sent again where systemd had no room for it; each time it is twice as long.
#[cfg(feature = "cli")]
pub(crate) const READY: Duration = Duration::from_millis(50);

/// The shortest time between two notifications of systemd's watchdog: a smaller one would be a busy loop.
#[cfg(feature = "cli")]
pub(crate) const WATCHDOG: Duration = Duration::from_millis(50);

// ---- the program's log ----------------------------------------------------------------------

/// Lines of the log that wait for whoever reads it. `trace` logs a few dozen in a beat.
#[cfg(feature = "cli")]
pub(crate) const LOG_LINES: usize = 1_024;

/// Bytes of one line: some foreign texts of [`LOG_TEXT`] characters, and what is around them.
#[cfg(feature = "cli")]
pub(crate) const LOG_LINE: usize = 8 * 1024;

/// How long a start waits for `--log-file` to be opened: a FIFO without a reader, or a frozen file system, may take for
/// ever.
#[cfg(feature = "cli")]
pub(crate) const LOG_OPEN: Duration = Duration::from_secs(1);

/// How long the end of the program waits for the log at most: a queue that is full takes a slow disk less.
#[cfg(feature = "cli")]
pub(crate) const LOG_FLUSH: Duration = Duration::from_secs(1);

/// How long it waits for one line: beyond that nobody reads.
#[cfg(feature = "cli")]
pub(crate) const LOG_STUCK: Duration = Duration::from_millis(250);

/// What `--timeout` of `push` and `track` may be: zero could never deliver, and a caller that wants to wait for an hour
/// wants `run`.
#[cfg(feature = "cli")]
pub(crate) const REPORT_TIMEOUT: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(3600));

/// How long after `--timeout` the answer of the POST is awaited: it ends at the timeout by itself, and says in what.
#[cfg(feature = "cli")]
pub(crate) const REPORT_SLACK: Duration = Duration::from_millis(200);

/// The pause before an outbox that refused to be written is tried again.
#[cfg(feature = "cli")]
pub(crate) const REPORT_PAUSE: Duration = Duration::from_millis(100);

// ---- what is said ---------------------------------------------------------------------------

/// Characters of a delta's error; the master cuts there.
pub(crate) const DELTA_ERROR: usize = 2_000;

/// Characters of a decky's name, as in DECNET's own model.
pub(crate) const DECKY_NAME: usize = 128;

/// Characters of `status.error`, which is for people: a source's error may be a whole log.
pub(crate) const STATUS_ERROR: usize = 2_000;

/// Sources of an error that are followed: real ones have a handful, and an error may be its own source.
pub(crate) const ERROR_SOURCES: usize = 32;

/// Characters of foreign text in one log line or one error.
pub(crate) const LOG_TEXT: usize = 300;

/// Different problems of one source that are counted each by itself. Further ones share a count, so that a text that is
/// new every time does not fill the log.
pub(crate) const REPEATS_TEXTS: usize = 8;

/// After this long without a problem of its source a problem is a new one, and is logged at once.
pub(crate) const QUIET: Duration = Duration::from_secs(600);

/// Characters of an error inside `observed`; the original cuts there.
pub(crate) const OBSERVED_ERROR: usize = 200;

// ---- the loopback master --------------------------------------------------------------------

/// What the loopback master allows: it must end when told to, whatever a client does.
#[cfg(feature = "loopback")]
pub(crate) mod loopback {
    use std::time::Duration;

    /// Where its port is from: systems hand out ports from 32768 on.
    pub(crate) const PORTS: std::ops::Range<u16> = 20_000..32_000;

    /// Ports that are tried before the system's choice will do.
    pub(crate) const PORTS_TRIED: usize = 100;

    /// Idle connections end after this long, as uvicorn's do.
    pub(crate) const IDLE: Duration = Duration::from_secs(5);

    /// A client that stalls in the middle of a handshake, a request or an answer: above every timeout of ours.
    pub(crate) const STALL: Duration = Duration::from_secs(30);

    /// How long a closed connection is read on, so that what was said last is not lost to a reset.
    pub(crate) const LINGER: Duration = Duration::from_secs(1);

    /// How long a stop waits for its threads; their sockets are shut by then, so they need milliseconds.
    pub(crate) const STOP: Duration = Duration::from_secs(5);

    /// The wait after an `accept` that failed: out of file descriptors must not become a busy loop.
    pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

    /// How long a port that it had before may still be in use: a process that another thread is just spawning has the
    /// old listener open until its `exec`.
    pub(crate) const REBIND: Duration = Duration::from_secs(1);

    /// The wait before that port is tried again.
    pub(crate) const REBIND_PAUSE: Duration = Duration::from_millis(5);

    /// Connections at one time, and so threads: a worker needs one.
    pub(crate) const CONNECTIONS: usize = 256;

    /// Requests, and connections, that are remembered at least; at twice as many the older half is forgotten.
    pub(crate) const HISTORY: usize = 10_000;

    /// Bytes of bodies that are remembered at most: a bench must not fill the memory.
    pub(crate) const HISTORY_BYTES: usize = 256 * 1024 * 1024;

    /// Bytes of a request's head; h11, which uvicorn may read with, stops there.
    pub(crate) const REQUEST_HEAD: usize = 64 * 1024;

    /// Headers of a request.
    pub(crate) const REQUEST_HEADERS: usize = 64;

    /// Bytes of a request's body: what a state file may hold, and room for its runtime.
    pub(crate) const REQUEST_BODY: usize = 64 * 1024 * 1024;
}
