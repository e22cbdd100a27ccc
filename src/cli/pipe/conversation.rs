//! The thread `pipe`: reads requests from stdin, submits them to the outbox, and writes the answers
//! to stdout, in the order of the requests. It blocks only in `poll`, for stdin, stdout, and the
//! event of a commit, all at once. So reading does not wait for a commit.
//!
//! What it stores is bounded: a line, the requests that are not committed, and the answers that are
//! not written. While one of these is full, stdin is not read.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::lines::{Line, LineBuffer};
use super::messages::{self, Id, Message, answer};
use super::session::{Session, Work};
use crate::error::Error;
use crate::limits;
use crate::log_throttle::LogThrottle;
use crate::threads::request_queue::WakeEvent;

/// The handle of the thread.
#[derive(Debug)]
pub(super) struct Conversation {
    event: Arc<WakeEvent>,
    is_stopping: Arc<AtomicBool>,
    /// Disconnected when stdin has ended.
    pub(super) stdin_ended: Receiver<()>,
    /// Disconnected when stdin has ended and all requests are done.
    completed: Receiver<()>,
    /// Disconnected when all answers are written, too.
    ended: Receiver<()>,
}

impl Conversation {
    pub(super) fn start(session: Arc<Session>) -> Result<Self, Error> {
        const NAME: &str = "pipe";
        let failed = |source: io::Error| Error::thread(NAME, source);
        let event = Arc::new(WakeEvent::new().map_err(failed)?);
        let is_stopping = Arc::new(AtomicBool::new(false));
        let (reading, stdin_ended) = bounded(0);
        let (completing, completed) = bounded(0);
        let (running, ended) = bounded(0);
        let conversation = ConversationLoop {
            session,
            event: Arc::clone(&event),
            is_stopping: Arc::clone(&is_stopping),
            reading: Some(reading),
            completing: Some(completing),
            input: LineBuffer::default(),
            has_lines: false,
            has_hung_up: false,
            pending: VecDeque::new(),
            pending_bytes: 0,
            output: VecDeque::new(),
            is_broken: false,
            throttle: LogThrottle::default(),
        };
        let run = move || {
            let _running: Sender<()> = running;
            conversation.run();
        };
        let builder = thread::Builder::new().name(NAME.to_owned()).stack_size(limits::STACK);
        builder.spawn(run).map_err(failed)?;
        Ok(Self { event, is_stopping, stdin_ended, completed, ended })
    }

    /// Stops the reading, and waits until the requests that were read are done and answered. An
    /// agent that does not read its answers delays that only to a limit.
    pub(super) fn finish(&self) {
        self.is_stopping.store(true, Ordering::SeqCst);
        self.event.set();
        let end = Instant::now() + limits::PIPE_FINISH;
        let _ = self.completed.recv_deadline(end);
        let _ = self.ended.recv_deadline(end);
    }
}

/// A request that was submitted and is not answered.
#[derive(Debug)]
struct Pending {
    /// `None`: a notification.
    id: Option<Id>,
    work: Work,
    /// The bytes of its line, as a measure of the memory that it takes.
    size: usize,
}

/// The state of the thread.
struct ConversationLoop {
    session: Arc<Session>,
    /// Set when a request can be completed, or when the main thread stops the reading.
    event: Arc<WakeEvent>,
    is_stopping: Arc<AtomicBool>,
    /// `None`: stdin has ended, or is not read any more.
    reading: Option<Sender<()>>,
    /// `None`: all requests are done.
    completing: Option<Sender<()>>,
    input: LineBuffer,
    /// The input may have a line.
    has_lines: bool,
    /// The agent has closed its end of stdin. What is left to read is bounded.
    has_hung_up: bool,
    pending: VecDeque<Pending>,
    pending_bytes: usize,
    /// Answers that are not written.
    output: VecDeque<u8>,
    /// Stdout cannot be written any more.
    is_broken: bool,
    throttle: LogThrottle,
}

impl ConversationLoop {
    fn run(mut self) {
        let mut buffer = vec![0; limits::PIPE_BUFFER];
        loop {
            self.submit_lines();
            self.complete();
            if self.reading.is_none() && self.pending.is_empty() {
                self.completing = None;
                if self.output.is_empty() {
                    return;
                }
            }
            self.wait(&mut buffer);
        }
    }

    /// Submits the lines that have arrived, as far as there is room.
    fn submit_lines(&mut self) {
        while self.has_lines && self.has_room() {
            let (message, size) = match self.input.next() {
                // White space is no message.
                Some(Line::Complete(line)) if line.trim_ascii().is_empty() => continue,
                Some(Line::Complete(line)) => (messages::parse(line), line.len()),
                Some(Line::TooLong) => (Message::too_long(), 0),
                None => {
                    self.has_lines = false;
                    return;
                }
            };
            self.submit(message, size);
        }
    }

    fn submit(&mut self, message: Message, size: usize) {
        let work = self.session.submit(message.method, &self.event);
        self.pending_bytes += size;
        self.pending.push_back(Pending { id: message.id, work, size });
    }

    fn has_room(&self) -> bool {
        self.pending.len() < limits::PIPE_REQUESTS
            && self.pending_bytes < limits::PIPE_REQUEST_BYTES
            && (self.output.len() < limits::PIPE_OUTPUT || self.has_hung_up)
    }

    /// Answers the oldest requests, up to the first one that is not committed.
    fn complete(&mut self) {
        while let Some(oldest) = self.pending.front_mut() {
            let Some(reply) = self.session.complete(&mut oldest.work) else { return };
            let Some(Pending { id, size, .. }) = self.pending.pop_front() else { return };
            self.pending_bytes -= size;
            match (id, reply) {
                (Some(_), _) if self.is_broken => (),
                (Some(id), reply) => self.output.extend(answer(&id, &reply)),
                (None, Err(error)) => self.log_refused(&error.message),
                (None, Ok(_)) => (),
            }
        }
    }

    /// A notification has no answer that could say it.
    fn log_refused(&mut self, problem: &str) {
        self.throttle.log("notification", problem, |times| {
            log::warn!("notification refused: times={times} error={problem:?}");
        });
    }

    /// Waits until there is something to do, and reads and writes what can be.
    fn wait(&mut self, buffer: &mut [u8]) {
        let Ready { event, stdin, stdout } = self.poll();
        if !event.is_empty() {
            self.event.clear();
            if self.is_stopping.load(Ordering::SeqCst) {
                self.stop_reading();
            }
        }
        if !stdout.is_empty() {
            self.write();
        }
        self.has_hung_up |= stdin.contains(PollFlags::HUP);
        if self.reads() && !stdin.is_empty() {
            self.read(buffer);
        }
    }

    fn poll(&self) -> Ready {
        let stdin = io::stdin();
        let stdout = io::stdout();
        let unused = || PollFd::new(&*self.event, PollFlags::empty());
        let for_stdin = if self.reads() { PollFlags::IN } else { PollFlags::empty() };
        let mut files = [
            PollFd::new(&*self.event, PollFlags::IN),
            if self.watches() { PollFd::new(&stdin, for_stdin) } else { unused() },
            if self.output.is_empty() { unused() } else { PollFd::new(&stdout, PollFlags::OUT) },
        ];
        // An error is an interrupt: there is nothing to do then.
        let _ = poll(&mut files, self.timeout().as_ref());
        let [event, stdin, stdout] = files.map(|file| file.revents());
        Ready { event, stdin, stdout }
    }

    /// Whether stdin is to be read.
    fn reads(&self) -> bool {
        self.reading.is_some() && !self.has_lines && self.has_room()
    }

    /// Whether stdin is polled: to be read, or to see that the agent has closed it.
    fn watches(&self) -> bool {
        self.reads() || self.reading.is_some() && !self.has_hung_up
    }

    fn timeout(&self) -> Option<Timespec> {
        if self.has_lines && self.has_room() {
            return Some(Timespec::default());
        }
        let deadline = self.pending.front().and_then(|oldest| oldest.work.deadline())?;
        Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok()
    }

    fn read(&mut self, buffer: &mut [u8]) {
        match rustix::io::read(io::stdin(), &mut *buffer) {
            Ok(0) => self.end_input(),
            Ok(length) => {
                self.input.push(buffer.get(..length).unwrap_or_default());
                self.has_lines = true;
            }
            Err(Errno::AGAIN | Errno::INTR) => (),
            Err(error) => {
                let error = io::Error::from(error).to_string();
                log::warn!("stdin cannot be read; it counts as ended: error={error:?}");
                self.end_input();
            }
        }
    }

    /// The last line needs no line end.
    fn end_input(&mut self) {
        if let Some(line) = self.input.last().filter(|line| !line.trim_ascii().is_empty()) {
            self.submit(messages::parse(&line), line.len());
        }
        self.reading = None;
    }

    /// Lines that were not submitted yet are dropped: they were not answered.
    fn stop_reading(&mut self) {
        self.input = LineBuffer::default();
        self.has_lines = false;
        self.reading = None;
    }

    /// Writes so little that a file that is ready does not block.
    fn write(&mut self) {
        let (answers, _) = self.output.as_slices();
        let piece = answers.get(..limits::PIPE_WRITE).unwrap_or(answers);
        match rustix::io::write(io::stdout(), piece) {
            Ok(length) => drop(self.output.drain(..length)),
            Err(Errno::AGAIN | Errno::INTR) => (),
            // What the agent asks for is done, also if it does not read the answers.
            Err(error) => {
                self.is_broken = true;
                self.output.clear();
                let error = io::Error::from(error).to_string();
                log::warn!("answers cannot be written; requests are still done: error={error:?}");
            }
        }
    }
}

/// What `poll` has found.
struct Ready {
    event: PollFlags,
    stdin: PollFlags,
    stdout: PollFlags,
}
