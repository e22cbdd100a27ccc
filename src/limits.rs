//! All limits and timeouts, each with its reason. Constants only.

#![cfg_attr(
    not(feature = "cli"),
    allow(dead_code, reason = "the program's limits are in the same sections")
)]

use std::time::Duration;

// ---- when a beat is sent --------------------------------------------------------------------

/// The default interval, as in the Python agent.
pub(crate) const INTERVAL: Duration = Duration::from_secs(30);

/// The shortest interval. A fleet with a shorter one would overload the master.
pub(crate) const MIN_INTERVAL: Duration = Duration::from_millis(50);

/// The longest interval. After an hour without a beat the master considers a host lost.
pub(crate) const MAX_INTERVAL: Duration = Duration::from_secs(3600);

/// How long a tick's beat waits for its snapshot. Docker may be slow, but the beat must be sent
/// before the next tick.
pub(crate) const TICK_WAIT: Duration = Duration::from_secs(10);

/// How long the first beat, a retry and a delta wait for a snapshot. They should be sent soon, even
/// with an unknown status.
pub(crate) const DELTA_WAIT: Duration = Duration::from_millis(250);

/// The maximum age of a snapshot when its beat is sent. It may have waited for a slow POST.
pub(crate) const SNAPSHOT_AGE: Duration = Duration::from_secs(5);

/// The first wait after a failed beat; it doubles up to the interval.
pub(crate) const BACKOFF_START: Duration = Duration::from_secs(1);

/// The number of intervals after which a host without files that the master rejects counts as
/// decommissioned: ten minutes at the default interval, which is longer than an enrolment takes.
pub(crate) const DECOMMISSIONED_INTERVALS: u32 = 20;

/// The range to which `Retry-After` is clamped. The minimum prevents a busy loop, the maximum a
/// very long silence.
pub(crate) const RETRY_AFTER: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(600));

/// The maximum number of deltas in one body. The master processes them one by one in its database.
pub(crate) const DELTAS_PER_BODY: usize = 500;

/// The number of beats for which states, or a single delta, are suspended after the master failed
/// on them: five minutes at the default interval. It is doubled each time.
pub(crate) const SUSPEND_BEATS: u64 = 10;

/// The longest suspension. An update of the master may fix its failure.
pub(crate) const SUSPEND_MAX: Duration = Duration::from_secs(24 * 3600);

/// The maximum number of bodies with a single delta in one beat. They take a few seconds.
pub(crate) const SINGLES_PER_BEAT: usize = 50;

/// How long the first beat of a process waits for the topology row. A beat without it makes the
/// master order a rebuild.
pub(crate) const TOPOLOGY_WAIT: Duration = Duration::from_secs(1);

/// The grace for the final flush in `Drop`: enough for one POST, and short for the caller.
pub(crate) const DROP_GRACE: Duration = Duration::from_secs(2);

/// The longest grace of a stop. A longer one could overflow the clock.
pub(crate) const MAX_GRACE: Duration = Duration::from_secs(24 * 3600);

/// The part of a stop's grace that is reserved for an interrupted POST to return.
pub(crate) const INTERRUPT_SLACK: Duration = Duration::from_millis(250);

/// How long a thread may be busy with one event before it counts as stalled. An event takes at most
/// a POST, a retry and a wait for the outbox; a snapshot takes two requests to Docker.
pub(crate) const STALLED: Duration = Duration::from_secs(60);

/// The grace for the final flush after a signal. systemd waits 90 s before it kills a process.
pub(crate) const RUN_GRACE: Duration = Duration::from_secs(5);

/// How long after its start `pipe` leaves the operations of processes that have ended in flight. An
/// agent that has restarted it takes over what it still has open within that time.
pub(crate) const RESUME_TIME: Duration = Duration::from_secs(5);

/// The maximum bytes of a line that `pipe` reads: about 5,000 deltas, or the status of 2,000
/// deckies.
#[cfg(any(feature = "cli", fuzzing))]
pub(crate) const PIPE_LINE: usize = 1024 * 1024;

/// The bytes that `pipe` reads at once: a hundred lines or more.
#[cfg(feature = "cli")]
pub(crate) const PIPE_BUFFER: usize = 64 * 1024;

/// The maximum bytes of a request's id. It is stored until the request is answered.
#[cfg(any(feature = "cli", fuzzing))]
pub(crate) const PIPE_ID: usize = 256;

/// The maximum number of requests of `pipe` that are not committed. They share a transaction, and
/// are fewer than the outbox thread queues.
#[cfg(feature = "cli")]
pub(crate) const PIPE_REQUESTS: usize = 1_000;

/// The bytes of the lines of these requests from which no further line is read.
#[cfg(feature = "cli")]
pub(crate) const PIPE_REQUEST_BYTES: usize = 4 * 1024 * 1024;

/// The bytes of answers that are not written from which no further line is read. An agent that
/// reads its answers later must not fill the memory.
#[cfg(feature = "cli")]
pub(crate) const PIPE_OUTPUT: usize = 64 * 1024;

/// The bytes of one write of answers. A pipe that `poll` reports as writable takes as many without
/// blocking (`PIPE_BUF`).
#[cfg(feature = "cli")]
pub(crate) const PIPE_WRITE: usize = 4_096;

/// How long the end of `pipe` waits until its requests are done and answered. Each request waits at
/// most [`OUTBOX_BUSY`] for its commit.
#[cfg(feature = "cli")]
pub(crate) const PIPE_FINISH: Duration = Duration::from_millis(1_250);

/// Stop signals within this time count as one: a supervisor may signal both a process and its
/// group, and a parent may pass on a signal that its group received. A person presses Ctrl-C twice
/// more slowly.
pub(crate) const SAME_STOP: Duration = Duration::from_millis(250);

/// The stop signals of `run` after which the next one ends it at once: a person who presses Ctrl-C
/// again does not want to wait.
#[cfg(feature = "cli")]
pub(crate) const RUN_STOPS: usize = 1;

/// Those of `pipe`. A supervisor signals agent and `pipe` together, and then the agent signals
/// `pipe`, which must still report how the agent's operations ended.
#[cfg(feature = "cli")]
pub(crate) const PIPE_STOPS: usize = 2;

// ---- the POST -------------------------------------------------------------------------------

/// The timeout of the name lookup, and that of TCP and TLS together: the Python agent's connect
/// timeout.
pub(crate) const CONNECT: Duration = Duration::from_secs(5);

/// The timeout for sending the headers, and that for sending the body: the Python agent's write
/// timeout.
pub(crate) const SEND: Duration = Duration::from_secs(5);

/// The timeout for the answer's headers, and that for its body: the Python agent's read timeout.
pub(crate) const RESPONSE: Duration = Duration::from_secs(10);

/// The timeout of the whole POST. With a short interval it is two thirds of the interval, so that
/// beats do not pile up.
pub(crate) const POST: Duration = Duration::from_secs(20);

/// The minimum timeout of the whole POST. A handshake on a busy host is slow.
pub(crate) const MIN_POST: Duration = Duration::from_secs(1);

/// The maximum bytes of an answer. Interim answers (1xx) could otherwise continue without end.
pub(crate) const ANSWER: usize = 64 * 1024;

/// The maximum bytes that are read from the socket for one answer, or one handshake. TLS messages
/// without data (tickets, key updates) could otherwise continue without end. A large handshake,
/// with several certificates, takes about 20 KiB.
pub(crate) const ANSWER_ON_THE_WIRE: usize = 256 * 1024;

/// How long an early answer is read after sending the body failed. It is in the socket's buffer
/// already.
pub(crate) const EARLY_ANSWER: Duration = Duration::from_millis(100);

/// The timeout of each of these reads.
pub(crate) const EARLY_ANSWER_PAUSE: Duration = Duration::from_millis(5);

/// The maximum age of a connection, so that a changed DNS entry is noticed.
pub(crate) const CONNECTION_AGE: Duration = Duration::from_secs(600);

/// The number of consecutive answers that are not 2xx after which the connection is closed and the
/// name looked up again. Another address may answer better.
pub(crate) const BAD_ANSWERS: u32 = 3;

/// The maximum bytes of an answer's body that are read. The master's error messages are shorter
/// than 1 KiB.
pub(crate) const ANSWER_BODY: usize = 4 * 1024;

/// The maximum bytes of an answer's headers.
pub(crate) const ANSWER_HEADERS: usize = 8 * 1024;

/// The size of ureq's buffers for a connection. A beat is a few KiB. They must be larger than
/// [`ANSWER_HEADERS`]; otherwise ureq reports headers that are too long as a closed connection.
pub(crate) const HTTP_BUFFER: usize = 16 * 1024;

/// How long an address is used before its name is looked up again. After a failed connection it is
/// looked up at once.
pub(crate) const RESOLVE_AGAIN: Duration = Duration::from_secs(300);

/// The number of TLS sessions for resumption. There is one master.
pub(crate) const TLS_SESSIONS: usize = 4;

// ---- what is read on this host --------------------------------------------------------------

/// The maximum size of the state file. One with 10,000 deckies has about 6 MiB.
pub(crate) const STATE_FILE: u64 = 12 * 1024 * 1024;

/// The maximum number of entries in a `lib` folder that is searched for DECNET's package. A virtual
/// environment has a few entries, `/usr/lib` some hundreds.
pub(crate) const LIB_ENTRIES: usize = 4_096;

/// The maximum number of versions of Python in one `lib` folder that are searched.
pub(crate) const PYTHON_VERSIONS: usize = 16;

/// The maximum size of `pyvenv.cfg` in a virtual environment. Real ones are smaller than 1 KiB.
pub(crate) const PYVENV_CFG: u64 = 64 * 1024;

/// The age of a file's last change from which the next change is sure to have another time. Some
/// file systems store times with a resolution of two seconds.
pub(crate) const FILE_TIMES_STABLE: Duration = Duration::from_secs(3);

/// The maximum number of deckies in a state file. A file of [`STATE_FILE`] bytes has about as many.
pub(crate) const DECKIES: usize = 20_000;

/// The maximum number of services of a decky. DECNET has about 25.
pub(crate) const SERVICES: usize = 100;

/// The maximum depth of a decky's JSON. The master's parser, Python's, fails at about 1,000.
pub(crate) const NESTING: usize = 100;

/// The maximum digits of an integer: Python's limit for the conversion from text.
pub(crate) const INTEGER_DIGITS: usize = 4_300;

/// The maximum bytes of a status: a state file and its runtime. It also limits other sources.
pub(crate) const STATUS: usize = 16 * 1024 * 1024;

/// The maximum bytes of an answer of Docker. 10,000 containers take about 15 MiB.
pub(crate) const DOCKER_ANSWER: u64 = 32 * 1024 * 1024;

/// The maximum number of containers, networks, or names of one container, in an answer of Docker.
pub(crate) const DOCKER_LIST: usize = 25_000;

/// The maximum bytes of a container's name or state, or of a network's name. File names have the
/// same limit on Linux.
pub(crate) const DOCKER_NAME: usize = 255;

/// The maximum bytes of a string in `topology.db`. Ids have 36; an error is text for people.
pub(crate) const TOPOLOGY_TEXT: usize = 64 * 1024;

/// The timeout of the request for Docker's networks. It comes first, and only `observed` depends on
/// it, so it must leave time for the containers.
pub(crate) const DOCKER_NETWORKS: Duration = Duration::from_secs(2);

/// The timeout of the request for Docker's containers. Both requests and the wait for `topology.db`
/// end within [`TICK_WAIT`], so that a tick's beat contains their errors.
pub(crate) const DOCKER_CONTAINERS: Duration = Duration::from_secs(6);

/// How long the status thread waits for a lock of `topology.db`.
pub(crate) const TOPOLOGY_BUSY: Duration = Duration::from_millis(500);

/// How long a caller waits for the outbox thread, and the outbox thread for the lock of another
/// process. A push must not block for long.
pub(crate) const OUTBOX_BUSY: Duration = Duration::from_secs(1);

/// How long before its caller's timeout the outbox thread stops waiting for the lock of another
/// process, so that the caller gets the error.
pub(crate) const OUTBOX_MARGIN: Duration = Duration::from_millis(100);

/// How long a start waits for the ini and the bundle to be read.
pub(crate) const CREDENTIALS_WAIT: Duration = Duration::from_secs(5);

/// The maximum number of queued requests of the outbox thread. A queued request can still be
/// withdrawn.
pub(crate) const REQUESTS: usize = 1_024;

/// The maximum number of rows in one transaction. A request with more rows gets its own
/// transaction.
pub(crate) const GROUP_ROWS: usize = 1_000;

/// How long the outbox thread waits, after a group of several requests, for as many again.
pub(crate) const GATHER: Duration = Duration::from_micros(100);

/// How long the heartbeat thread waits for the deltas of a POST, at most half an interval. While an
/// answer is overdue it does not wait again. After a stop it waits for half of the rest of the grace,
/// because no later beat has the deltas.
pub(crate) const BATCH_WAIT: Duration = Duration::from_millis(250);

/// The age from which a batch that came with new deltas is requested again. Other processes may
/// have begun operations.
pub(crate) const BATCH_FRESH: Duration = Duration::from_millis(20);

/// The maximum age of such a batch if the disk does not answer. It covers the wait for a snapshot
/// and for the answer. Operations that this process has begun since are left out; those of other
/// processes may be missed.
pub(crate) const BATCH_USABLE: Duration = Duration::from_secs(1);

/// The maximum number of rows whose begin or acknowledgement since the last batch is recorded. It
/// is far more than in [`BATCH_USABLE`].
pub(crate) const RECENT_ROWS: usize = 1_000;

/// The maximum number of queued deltas that are sent to the heartbeat thread together with the
/// notice of new ones. Reading so few costs little.
pub(crate) const FEW_DELTAS: u64 = 50;

/// The maximum number of batches that the heartbeat thread has not received yet. With more, none is
/// offered.
pub(crate) const OFFERS: usize = 2;

/// The minimum time for which a stop waits for the outbox thread, even with a shorter grace.
pub(crate) const RELEASE: Duration = Duration::from_millis(50);

/// The stack size of the heartbeat thread and of the outbox thread. Most of it is never touched.
pub(crate) const STACK: usize = 1024 * 1024;

/// The stack size of the wake thread, which waits for datagrams and queues a request.
pub(crate) const WAKE_STACK: usize = 128 * 1024;

/// How many datagrams the wake thread discards after one. With the pause, a process that sends
/// datagrams without end cannot keep it busy, and a queue of 512, the usual length, is soon empty.
pub(crate) const WAKE_DRAIN: usize = 64;

/// The pause of the wake thread after a datagram. A flood of datagrams then costs 200 reads of a
/// number in a second. A process that adds one delta after the other takes longer for each.
pub(crate) const WAKE_PAUSE: Duration = Duration::from_millis(5);

/// The stack size of the status thread, which runs foreign code: Rust's default.
pub(crate) const STATUS_STACK: usize = 2 * 1024 * 1024;

/// The pause before a process tries again to lock the outbox. A change takes a sync of the disk.
pub(crate) const OUTBOX_PAUSE: Duration = Duration::from_millis(5);

/// The pause before a file that could not be written is tried again, so that not every push tries a
/// full disk.
pub(crate) const OUTBOX_RETRY: Duration = Duration::from_secs(1);

/// The maximum number of rows in the outbox: enough for an outage of several days, in a few MB.
pub(crate) const OUTBOX_ROWS: usize = 10_000;

/// The number of delivered deltas that stay in the outbox for people to read.
pub(crate) const OUTBOX_DELIVERED: usize = 100;

/// The maximum age of a queued delta. The result of a week-old operation is of no use to the
/// master.
pub(crate) const OUTBOX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The maximum bytes that are read of the pid of the process that holds the delivery lock.
pub(crate) const OUTBOX_HOLDER: usize = 16;

/// How often a process that owns rows checks whether the lock file or the outbox file was replaced.
pub(crate) const OUTBOX_CHECK: Duration = Duration::from_secs(10);

/// The bytes of the header of the index (`-shm`). SQLite does not use an index that is shorter.
pub(crate) const INDEX_HEADER: u64 = 136;

/// The length of an index after it was truncated by another program. It is more than SQLite maps,
/// which is 32 KiB for 16 MiB of log. The file is sparse.
pub(crate) const INDEX: u64 = 1024 * 1024;

/// The maximum bytes of a database's path. SQLite opens no file with a path over 512 bytes,
/// `-journal` included.
pub(crate) const DATABASE_PATH: usize = 504;

/// The maximum bytes of a damaged outbox that are read before it is quarantined: more than 10,000
/// rows take.
pub(crate) const READ_THROUGH: u64 = 256 * 1024 * 1024;

/// How often a lock file that other processes create, delete or replace is checked again before it
/// is an error.
pub(crate) const LOCK_TRIES: usize = 100;

/// Replaced lock files that stay open although no process has locked them: as many as a process
/// that delivers may find between two ticks.
pub(crate) const LOCK_FILES: usize = 8;

/// The age of a lock file from which an owner that is not locked in it counts as ended. It is far
/// longer than an owner takes to notice a new lock file, see [`OUTBOX_CHECK`]. A fuzz target runs
/// no other process.
pub(crate) const LOCK_FILE_AGE: Duration = Duration::from_secs(if cfg!(fuzzing) { 0 } else { 60 });

/// The age from which a row is logged if it cannot be determined whether its owner is running, and
/// the time between two such lines.
pub(crate) const OUTBOX_STUCK: Duration = Duration::from_secs(24 * 3600);

/// The maximum number of such rows that a log line names.
pub(crate) const OUTBOX_STUCK_NAMED: usize = 10;

/// How often the ages of the rows are stored. Each time writes every row.
pub(crate) const OUTBOX_AGING: Duration = Duration::from_secs(3600);

/// The maximum size of a PEM file of the bundle. Real ones are smaller than 8 KiB.
pub(crate) const PEM_FILE: u64 = 256 * 1024;

/// The number of days before the certificate's expiry from which a warning is logged. It is time
/// enough to enrol a host again.
pub(crate) const EXPIRY_WARNING: u64 = 30;

/// The maximum size of `decnet.ini`.
pub(crate) const INI_FILE: u64 = 1024 * 1024;

/// The maximum characters of a host uuid. The master's have 36, and a column of its database holds
/// 255.
pub(crate) const HOST_UUID: usize = 255;

/// The bytes of a command's stderr that `track` keeps: a delta's error in characters of four bytes,
/// and three times as much for colours and overwritten lines.
pub(crate) const STDERR_TAIL: usize = 4 * 4 * DELTA_ERROR;

/// The maximum bytes of a command's stderr that wait to be written to this process' stderr: as much
/// as a pipe holds. With more, the command waits.
pub(crate) const STDERR_QUEUE: usize = 64 * 1024;

/// The bytes of one write to stderr. A pipe that `poll` reports as writable takes as many without
/// blocking (`PIPE_BUF`).
pub(crate) const STDERR_WRITE: usize = 4_096;

/// The bytes of one write to a terminal that cannot be opened again. `poll` reports it as writable
/// if a single byte fits.
pub(crate) const TERMINAL_WRITE: usize = 128;

/// The pause after a write for which less space was free than `poll` reported. A line end takes two
/// bytes of a terminal.
pub(crate) const STDERR_PAUSE: Duration = Duration::from_millis(20);

/// The minimum free bytes of a disk for `check`: the maximum size of the outbox.
pub(crate) const MIN_DISK_SPACE: u64 = 8 * 1024 * 1024;

/// How long `check` waits after a handshake for an alert of the master, in addition to four times
/// the handshake's duration.
pub(crate) const AFTER_HANDSHAKE: Duration = Duration::from_millis(100);

/// How long `track` waits for the start of the companion, the process that copies its command's
/// stderr. It takes one `exec`.
pub(crate) const COMPANION_START: Duration = Duration::from_secs(5);

/// The minimum time between two starts of the companion, if it is killed repeatedly.
pub(crate) const COMPANION_AGAIN: Duration = Duration::from_secs(1);

/// How often `track` checks whether its command has ended, if it cannot wait for that: an old
/// kernel has no pidfd, SIGCHLD may be blocked by the parent of `track`, and waiting may fail
/// without memory.
pub(crate) const COMMAND_CHECK: Duration = Duration::from_secs(1);

/// How long the companion may take to answer whether it received a signal. Without an answer the
/// signal is passed on.
pub(crate) const COMPANION_ANSWER: Duration = Duration::from_millis(250);

/// The time after which all processes of a group have received a signal to the group.
pub(crate) const GROUP_SIGNAL: Duration = Duration::from_millis(30);

/// How long the companion remembers a signal. `track` may be slow to ask for it; if it has not
/// asked by then, it did not receive the signal.
pub(crate) const GROUP_SIGNAL_AGE: Duration = Duration::from_secs(2);

/// How long `track` waits, after its command has ended, for the tail of the command's stderr, and
/// before it exits, for the rest to be written to its own stderr.
pub(crate) const STDERR_GRACE: Duration = Duration::from_secs(1);

/// How long `run` retries before it exits because this host is not enrolled or its bundle is not
/// usable. No supervisor restarts it after that. It is longer than an enrolment takes to replace a
/// file or the agent dir.
pub(crate) const ENROLMENT_RETRY: Duration = Duration::from_secs(2);

/// The time between two of these tries.
pub(crate) const ENROLMENT_PAUSE: Duration = Duration::from_millis(50);

/// How long `run` waits at its start for the check whether `--stats-file` and `--metrics-file` may
/// be replaced.
pub(crate) const STATS_CHECK: Duration = Duration::from_secs(1);

/// How long `run` waits at its end for the stats to be written. A working disk takes a few
/// milliseconds.
pub(crate) const STATS_FINISH: Duration = Duration::from_millis(250);

/// The pause before READY is sent again if systemd's socket was full. It is doubled each time.
pub(crate) const READY: Duration = Duration::from_millis(50);

/// The minimum time between two notifications of systemd's watchdog. It prevents a busy loop.
pub(crate) const WATCHDOG: Duration = Duration::from_millis(50);

/// Columns of the help at most: longer lines are hard to read.
pub(crate) const HELP_WIDTH: usize = 100;

// ---- the program's log ----------------------------------------------------------------------

/// The maximum number of queued log lines. `trace` logs about 30 lines for a beat.
pub(crate) const LOG_LINES: usize = 1_024;

/// The maximum bytes of one line: some foreign texts of [`LOG_TEXT`] characters, and the text
/// around them.
pub(crate) const LOG_LINE: usize = 8 * 1024;

/// How long a start waits for `--log-file` to be opened. Opening a FIFO without a reader, or a file
/// on a disk that does not answer, may block.
pub(crate) const LOG_OPEN: Duration = Duration::from_secs(1);

/// How long the program waits at its end for the log to be written. A slow disk writes a full queue
/// in less time.
pub(crate) const LOG_FLUSH: Duration = Duration::from_secs(1);

/// How long it waits for one line. If a line takes longer, the log is not being read.
pub(crate) const LOG_STUCK: Duration = Duration::from_millis(250);

/// The minimum `--timeout` of `push` and `track`. With zero nothing could be delivered.
pub(crate) const MIN_REPORT_TIMEOUT: Duration = Duration::from_millis(1);

/// The maximum `--timeout`. A caller that would wait for more than an hour should use `run`.
pub(crate) const MAX_REPORT_TIMEOUT: Duration = Duration::from_secs(3600);

/// How long the result of the POST is awaited after `--timeout`. The POST ends at the timeout, with
/// an error that names it.
pub(crate) const REPORT_SLACK: Duration = Duration::from_millis(200);

/// The maximum size of a stats file that `check` reads. It has a few KiB.
pub(crate) const STATS_FILE: u64 = 256 * 1024;

/// The maximum characters of `--agent-version`, far more than a version has.
pub(crate) const AGENT_VERSION: usize = 100;

/// The maximum bytes of a line of `push --lines`. Of a longer error only a part would be kept.
pub(crate) const PUSH_LINE: usize = 1024 * 1024;

/// The shortest pause after which `push` reads again what has become of the deltas that another
/// process delivers. A delivery takes a few milliseconds, and a read 30 µs.
pub(crate) const HAND_OVER_PAUSE: Duration = Duration::from_micros(500);

/// This part of the time that `push` has waited is the pause until it reads again. So the result is
/// late by at most 5 %, and many processes that wait for a master that is away cost little.
pub(crate) const HAND_OVER_READS: u32 = 20;

/// The pause before an outbox that could not be written is tried again, and between two checks
/// whether the process that delivers has ended. Also the longest pause between two reads.
pub(crate) const REPORT_PAUSE: Duration = Duration::from_millis(100);

// ---- texts ----------------------------------------------------------------------------------

/// The maximum characters of a delta's error. The master truncates it to the same length.
pub(crate) const DELTA_ERROR: usize = 2_000;

/// The maximum characters of a decky's name, as in DECNET's own model.
pub(crate) const DECKY_NAME: usize = 128;

/// The maximum characters of `status.error`, which is for people. A source's error may be a whole
/// log.
pub(crate) const STATUS_ERROR: usize = 2_000;

/// The maximum number of sources of an error that are followed. Real errors have a few; an error
/// may be its own source.
pub(crate) const ERROR_SOURCES: usize = 32;

/// The maximum characters of foreign text in a log line or an error.
pub(crate) const LOG_TEXT: usize = 300;

/// The maximum number of different problems of one source that have their own count. All others
/// share a count, so that a text that is different every time does not fill the log.
pub(crate) const THROTTLE_TEXTS: usize = 8;

/// After this time without problems of a source, its next problem counts as new and is logged at
/// once.
pub(crate) const THROTTLE_RESET: Duration = Duration::from_secs(600);

/// The maximum characters of an error in `observed`, as in the Python agent.
pub(crate) const OBSERVED_ERROR: usize = 200;

// ---- the loopback master --------------------------------------------------------------------

/// The limits of the loopback master. It must stop on request, whatever its clients do.
#[cfg(feature = "loopback")]
pub(crate) mod loopback {
    use std::time::Duration;

    /// The range of its port. Systems assign ports from 32768.
    pub(crate) const PORTS: std::ops::Range<u16> = 20_000..32_000;

    /// The number of ports that are tried before the system chooses one.
    pub(crate) const PORTS_TRIED: usize = 100;

    /// How long an idle connection stays open, as with uvicorn.
    pub(crate) const IDLE: Duration = Duration::from_secs(5);

    /// The timeout for a client that stalls in a handshake, a request or an answer. It is longer
    /// than all timeouts of the heartbeat.
    pub(crate) const STALL: Duration = Duration::from_secs(30);

    /// How long a connection is read after its last answer, so that a reset does not discard the
    /// answer.
    pub(crate) const LINGER: Duration = Duration::from_secs(1);

    /// How long a stop waits for its threads. Their sockets are shut down by then, so they need
    /// milliseconds.
    pub(crate) const STOP: Duration = Duration::from_secs(5);

    /// The pause after a failed `accept`. It prevents a busy loop without free file descriptors.
    pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

    /// How long its former port may still be in use. A process that another thread spawns has the
    /// old listener open until its `exec`.
    pub(crate) const REBIND: Duration = Duration::from_secs(1);

    /// The pause before that port is tried again.
    pub(crate) const REBIND_PAUSE: Duration = Duration::from_millis(5);

    /// The maximum number of connections, each with a thread. A worker needs one.
    pub(crate) const CONNECTIONS: usize = 256;

    /// The minimum number of requests, and of connections, that are recorded. At twice as many the
    /// older half is dropped.
    pub(crate) const HISTORY: usize = 10_000;

    /// The maximum bytes of recorded bodies, so that a benchmark does not fill the memory.
    pub(crate) const HISTORY_BYTES: usize = 256 * 1024 * 1024;

    /// The maximum bytes of a request's head, as in h11, which uvicorn may use.
    pub(crate) const REQUEST_HEAD: usize = 64 * 1024;

    /// The maximum number of headers of a request.
    pub(crate) const REQUEST_HEADERS: usize = 64;

    /// The maximum bytes of a request's body: a state file with its runtime.
    pub(crate) const REQUEST_BODY: usize = 64 * 1024 * 1024;
}
