r"""Makes DECNET's own agent report through the program decnet-heartbeat.

Saved as ``sitecustomize.py`` in a folder on ``PYTHONPATH``, this module takes the place of
``decnet.agent.heartbeat``. No file of the agent is changed. With systemd, as root:

    install -d -m 755 /usr/local/lib/decnet-heartbeat /etc/systemd/system/decnet-agent.service.d
    decnet-heartbeat shim > /usr/local/lib/decnet-heartbeat/sitecustomize.py
    chmod 644 /usr/local/lib/decnet-heartbeat/sitecustomize.py
    printf '%s\n' '[Service]' 'Environment=PYTHONPATH=/usr/local/lib/decnet-heartbeat' \
        > /etc/systemd/system/decnet-agent.service.d/heartbeat.conf
    systemctl daemon-reload
    systemctl restart decnet-agent.service

To go back to the agent's own heartbeat:

    rm /etc/systemd/system/decnet-agent.service.d/heartbeat.conf
    systemctl daemon-reload
    systemctl restart decnet-agent.service

The agent starts ``decnet-heartbeat pipe`` as its child. A deploy or a mutate is an operation from
its beginning: if the agent is killed, the child reports it as failed. A child that ends is
restarted after 1 s, later after up to 60 s, and after exit code 78 (a restart does not help) every
5 minutes. One that has not answered for 60 s is killed. Up to 10,000 reports wait for it. The child
has the agent's environment, so ``DECNET_HEARTBEAT_OUTBOX`` and the other variables of the program
work in the drop-in, too.

``DECNET_HEARTBEAT_PROGRAM`` is the path of the program; without it, ``decnet-heartbeat`` is
searched on ``PATH``. Another ``sitecustomize``, which this one hides, is loaded as well. A Python
process that does not import ``decnet.agent`` runs as it would without this module.
"""

# Everything else is imported when the agent is: other Python processes load this file, too.
import sys

# Reports that wait for the child. The oldest ones are dropped, as newer ones correct them.
QUEUE_MAX = 10_000
# Requests that the child has not answered, so that many share a commit.
UNANSWERED_MAX = 1_000
# Bytes of a request. The program reads lines of at most 1 MiB.
LINE_MAX = 1_000_000
# Bytes of an answer. One that resumes an operation lists its deckies.
ANSWER_MAX = 4_000_000
# Characters of an error. The master cuts it there.
ERROR_MAX = 2_000
# Seconds. An agent must not wait long for a disk that does not answer.
BEGIN_WAIT = 1
COMMIT_WAIT = 2
# Seconds. The child has 5 s for the last deliveries.
STOP_WAIT = 10
# Seconds until a child that has not answered is killed. It answers in 1 s, also if its disk hangs.
# An idle child is asked for its stats that often, because it must beat, too.
ANSWER_WAIT = 60
# Seconds until a child that was left is killed, and until it is no longer waited for.
END_WAIT = 5
# Seconds until a request that the outbox has refused is sent again.
REFUSED_PAUSE = 1
# Seconds until a child that has ended is restarted.
BACKOFF_MIN = 1
BACKOFF_MAX = 60
# Seconds until the same problem is logged again.
LOG_PAUSE = 3600
# The exit code of a host that is not enrolled, and how soon its enrolment is noticed, in seconds.
NOT_CONFIGURED = 78
NOT_CONFIGURED_PAUSE = 300
# The JSON-RPC error of an outbox that refuses a request.
OUTBOX_REFUSES = -32000

HEARTBEAT_MODULE = "decnet.agent.heartbeat"
EXECUTOR_MODULE = "decnet.agent.executor"
PROGRAM_VARIABLE = "DECNET_HEARTBEAT_PROGRAM"
STATE_FILE_VARIABLE = "DECNET_HEARTBEAT_STATE_FILE"


class Operation:
    """A deploy or a mutate that is in flight."""

    def __init__(self, name, deckies, reporter):
        self.name = name
        self.reporter = reporter
        # Deckies whose outcome the agent has not reported. Used by the event loop alone.
        self.unreported = dict.fromkeys(deckies)
        # Deckies whose outcome the child has not committed. Protected by the reporter's lock, as
        # are the following ones.
        self.open = dict.fromkeys(deckies)
        self.begin = Request("begin", self)
        # A child has committed the begin, or may have.
        self.may_be_committed = False
        # The begin was refused. The outcomes are reported all the same.
        self.is_refused = False
        # What the running child calls it.
        self.handle = None
        # Restores the context variable.
        self.token = None


class Request:
    """A report that the child has not answered yet."""

    __slots__ = ("method", "operation", "delta", "waiter", "sent_at")

    def __init__(self, method, operation=None, delta=None):
        self.method = method
        self.operation = operation
        self.delta = delta
        self.waiter = None
        self.sent_at = None

    def params(self):
        operation = self.operation
        if self.method == "stats":
            return {}
        if self.method == "begin":
            # Copied at once, as the event loop may drop an outcome meanwhile.
            deckies = [clean(decky) for decky in list(operation.open)]
            params = {"operation": operation.name, "deckies": deckies}
            # The rows of an earlier child. An operation that is new takes over no rows.
            return {**params, "resume": True} if operation.may_be_committed else params
        decky = clean(self.delta.get("decky_name"))
        ended = {"status": clean(self.delta.get("status"))}
        if self.delta.get("error") is not None and ended["status"] != "succeeded":
            ended["error"] = clean(self.delta["error"])
        completed_at = utc(self.delta.get("completed_at"))
        if completed_at is not None:
            ended["completed_at"] = completed_at
        if self.method == "end":
            return {"handle": operation.handle, "decky": decky, **ended}
        name = clean(self.delta.get("operation"))
        return {"deltas": [{"decky_name": decky, "operation": name, **ended}]}

    def line(self, identifier):
        import json

        request = {"id": identifier, "method": self.method, "params": self.params()}
        return json.dumps({"jsonrpc": "2.0", **request}).encode() + b"\n"

    def is_replaced(self):
        """Whether it is not sent to another child: that one resumes operations, or is new."""
        begins_committed = self.method == "begin" and self.operation.may_be_committed
        return begins_committed or self.method == "stats"

    def complete(self):
        if self.waiter is not None:
            self.waiter.complete()


class Waiter:
    """Lets a coroutine wait for another thread, for a limited time."""

    def __init__(self):
        import asyncio

        self.loop = asyncio.get_running_loop()
        self.future = self.loop.create_future()

    def complete(self):
        try:
            self.loop.call_soon_threadsafe(self._set_result)
        except RuntimeError:
            pass  # the loop is closed, so nobody waits

    def _set_result(self):
        if not self.future.done():
            self.future.set_result(None)

    async def wait(self, seconds):
        import asyncio

        await asyncio.wait([self.future], timeout=seconds)


class Reporter:
    """One child at a time, and two threads: one starts it and writes, the other one reads.

    The event loop only takes the lock, which no thread holds while it blocks.
    """

    def __init__(self):
        import collections
        import threading

        self.changed = threading.Condition()
        self.waiting = collections.deque()
        # By identifier, in the order in which they were sent.
        self.sent = {}
        self.last_identifier = 0
        # What the outbox has refused, and when it is sent again.
        self.refused = []
        self.retry_at = 0.0
        # In the order of their beginnings.
        self.operations = {}
        self.dropped = 0
        # `None` unless it is running.
        self.child = None
        self.is_stopping = False
        self.has_ended = False
        self.stop_waiter = None
        # Why the child was killed.
        self.kill_reason = None
        # What was logged last and when, by its kind: it is not repeated soon.
        self.logged = {}
        threading.Thread(target=self._run, name="heartbeat-shim", daemon=True).start()

    # The event loop calls these.

    def queue(self, requests, waiter):
        """Queues requests. The waiter ends with the answer to the last one."""
        requests[-1].waiter = waiter
        with self.changed:
            for request in requests:
                if request.method == "begin":
                    self.operations[request.operation] = None
                if len(self.waiting) >= QUEUE_MAX:
                    self._drop_oldest()
                self.waiting.append(request)
            self.changed.notify_all()

    async def stop(self):
        """Waits until the child has delivered what it has, or until its time has passed."""
        waiter = Waiter()
        with self.changed:
            if self.has_ended:
                return
            self.is_stopping = True
            self.stop_waiter = waiter
            self.changed.notify_all()
        await waiter.wait(STOP_WAIT)

    def finish(self):
        """Waits like `stop`, without an event loop, unless all reports are confirmed."""
        with self.changed:
            if self._has_work():
                self.is_stopping = True
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.has_ended, STOP_WAIT)

    def _drop_oldest(self):
        """Drops an outcome. A begin is dropped only if nothing else waits."""
        outcomes = (at for at, request in enumerate(self.waiting) if request.method != "begin")
        position = next(outcomes, 0)
        request = self.waiting[position]
        del self.waiting[position]
        self.dropped += 1
        if request.method == "end":
            self._close(request.operation, request.delta["decky_name"])
            begin = request.operation.begin
            if not request.operation.open and begin in self.waiting:
                self.waiting.remove(begin)  # nothing is left to end
        elif request.method == "begin":
            self._refuse(request.operation)
        request.complete()

    # The next ones are called with the lock.

    def _close(self, operation, decky):
        operation.open.pop(decky, None)
        if not operation.open:
            self.operations.pop(operation, None)

    def _refuse(self, operation):
        operation.is_refused = True
        self.operations.pop(operation, None)

    def _has_work(self):
        """Whether a child is needed. One that runs ends the operations in flight itself."""
        reports = (*self.waiting, *self.sent.values(), *self.refused)
        is_reported = all(request.method == "stats" for request in reports)
        return not is_reported or self.child is None and bool(self.operations)

    def _requeue(self):
        """Queues again what the last child had: operations in flight, then unanswered requests."""
        for request in self.sent.values():
            if request.method == "begin":
                request.operation.may_be_committed = True
        # The newest first: a child takes over the newest row of a decky.
        begun = (it for it in reversed(self.operations) if it.may_be_committed)
        resumed = [operation.begin for operation in begun]
        for request in resumed:
            request.operation.handle = None
        # A child that ended early has left begins in the queue.
        left = [*self.sent.values(), *self.refused, *self.waiting]
        others = [request for request in left if not request.is_replaced()]
        self.sent.clear()
        self.refused.clear()
        self.waiting.clear()
        self.waiting.extend(resumed + others)

    def _take(self):
        """Takes the requests that can be sent now, and gives each an identifier."""
        import time

        taken = {}
        now = time.monotonic()
        if self.refused:
            if now < self.retry_at:
                return taken
            self.waiting.extendleft(reversed(self.refused))
            self.refused.clear()
        while self.waiting and len(self.sent) < UNANSWERED_MAX:
            request = self.waiting[0]
            operation = request.operation
            if request.method == "end" and operation.is_refused:
                request.method = "push"
            if request.method == "end" and operation.handle is None:
                break  # its begin has not been answered
            self.waiting.popleft()
            if request.method == "begin" and not operation.open:
                continue  # its outcomes were dropped
            request.sent_at = now
            self.last_identifier += 1
            self.sent[self.last_identifier] = taken[self.last_identifier] = request
        return taken

    # The threads of the reporter.

    def _run(self):
        pause = BACKOFF_MIN
        while True:
            is_last = self.is_stopping
            code, seconds = self._serve_and_log()
            if is_last or self.is_stopping and code == 0:
                break
            if code == NOT_CONFIGURED:
                self._pause(NOT_CONFIGURED_PAUSE)
            else:
                pause = BACKOFF_MIN if seconds > BACKOFF_MAX else pause
                self._pause(pause)
                pause = min(2 * pause, BACKOFF_MAX)
            with self.changed:
                if self.is_stopping and not self._has_work():
                    break
        self._end_reports()

    def _end_reports(self):
        with self.changed:
            self.has_ended = True
            lost = len(self.waiting) + len(self.sent) + len(self.refused) + self.dropped
            self.changed.notify_all()
        if lost:
            log("reports were not confirmed before the stop: count=%d", lost)
        if self.stop_waiter is not None:
            self.stop_waiter.complete()

    def _pause(self, seconds):
        with self.changed:
            self.changed.wait_for(lambda: self.is_stopping, seconds)
            dropped, self.dropped = self.dropped, 0
        if dropped:
            log("too many reports wait, the oldest ones were dropped: count=%d", dropped)

    def _serve_and_log(self):
        """Runs a child to its end. Returns its exit code, and how long it ran."""
        import time

        started = time.monotonic()
        code = None
        try:
            code = self._serve()
            problem = f"decnet-heartbeat pipe ended and will be restarted: code={code}"
            if self.kill_reason is not None:
                problem += f" killed={self.kill_reason!r}"
        except Exception as error:
            problem = f"decnet-heartbeat pipe cannot be started: error={str(error)!r}"
        if not self.is_stopping:
            self._log_once("child", problem)
        return code, time.monotonic() - started

    def _log_once(self, kind, problem):
        """Logs a problem that may last for days."""
        import time

        now = time.monotonic()
        last_problem, logged_at = self.logged.get(kind, (None, 0))
        if problem != last_problem or now - logged_at >= LOG_PAUSE:
            self.logged[kind] = (problem, now)
            log("%s", problem)

    def _serve(self):
        import threading

        child = start_program()
        reader = threading.Thread(
            target=self._read, args=(child,), name="heartbeat-shim-read", daemon=True
        )
        with self.changed:
            self.child = child
            self.kill_reason = None
            self._requeue()
        try:
            reader.start()
            self._write(child)
        except OSError:
            pass  # the child has ended, or does not read any more
        finally:
            child.stdin.close()
            code = self._end(child)
            with self.changed:
                self.child = None
        # Another process may hold the other end of its stdout.
        reader.join(END_WAIT)
        if not reader.is_alive():
            child.stdout.close()
        return code

    def _end(self, child):
        """Waits for the child's end. Returns its exit code; `None`: it cannot be killed."""
        import subprocess

        for seconds in (None if self.is_stopping else END_WAIT, END_WAIT):
            try:
                return child.wait(seconds)
            except subprocess.TimeoutExpired:
                child.kill()
        return None

    def _write(self, child):
        """Writes requests, until the child or the reporter ends."""
        while True:
            taken = self._wait_for_requests(child)
            if not taken:
                return
            lines = []
            for identifier, request in taken.items():
                try:
                    line = request.line(identifier)
                    if len(line) > LINE_MAX:
                        raise ValueError(f"its line of {len(line)} bytes is too long")
                    lines.append(line)
                except Exception as error:
                    message = str(error)
                    self._handle_answer({"id": identifier, "error": {"message": message}})
            left = memoryview(b"".join(lines))
            while left:
                left = left[child.stdin.write(left) :]

    def _wait_for_requests(self, child):
        with self.changed:
            while True:
                if self.child is not child:
                    return {}
                taken = self._take()
                if taken or (self.is_stopping and not self.waiting and not self.refused):
                    return taken
                self.changed.wait(REFUSED_PAUSE if self.refused else None)

    def _read(self, child):
        """Reads answers, until the child ends or has to be killed."""
        problem = "the answers cannot be read"
        try:
            problem = self._read_answers(child)
        finally:
            if problem is not None:
                self.kill_reason = problem
                child.kill()
            with self.changed:
                if self.child is child:
                    self.child = None
                self.changed.notify_all()

    def _read_answers(self, child):
        """Returns why the child has to be killed; `None`: it has closed its stdout."""
        import select

        poll = select.poll()
        poll.register(child.stdout, select.POLLIN)
        started = b""
        while True:
            if not poll.poll(1000 * ANSWER_WAIT):
                if self._is_overdue():
                    return "it does not answer"
                self._ask_if_idle()
                continue
            received = child.stdout.read(65536)
            if not received:
                return None
            *lines, started = (started + received).split(b"\n")
            for line in lines:
                try:
                    self._handle_line(child, line)
                except Exception:
                    return "it printed a line that is not an answer"
            if len(started) > ANSWER_MAX:
                return "it printed a line that is too long"

    def _is_overdue(self):
        import time

        with self.changed:
            oldest = next(iter(self.sent.values()), None)
            return oldest is not None and time.monotonic() - oldest.sent_at >= ANSWER_WAIT

    def _ask_if_idle(self):
        with self.changed:
            if not self.waiting and not self.sent:
                self.waiting.append(Request("stats"))
                self.changed.notify_all()

    def _handle_line(self, child, line):
        import json

        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise TypeError("it is not an object")
        if "id" not in answer:
            return  # a notification
        if answer["id"] is None:
            # A line that the child could not parse. Answers keep the order of the requests.
            with self.changed:
                answer["id"] = next(iter(self.sent), None) if self.child is child else None
        self._handle_answer(answer)

    def _handle_answer(self, answer):
        import time

        error = answer.get("error")
        with self.changed:
            request = self.sent.get(answer["id"])
            if request is None:
                return
            can_retry = error is not None and self._can_retry(request, error)
            if can_retry:
                self.refused.append(request)
                self.retry_at = time.monotonic() + REFUSED_PAUSE
            else:
                self._finish(request, answer)
            # Last: if the answer is not valid, the request is sent to another child.
            del self.sent[answer["id"]]
            self.changed.notify_all()
        if error is not None:
            then = "is sent again" if can_retry else "is not sent again"
            problem = f"{request.method} was refused and {then}: error={error!r:.300}"
            self._log_once("refused", problem)
        if not can_retry:
            request.complete()

    def _finish(self, request, answer):
        """Called with the lock, for an answer after which nothing is repeated."""
        operation = request.operation
        if request.method == "begin":
            if answer.get("error") is not None:
                self._refuse(operation)
            else:
                operation.handle = answer["result"]["handle"]
                operation.may_be_committed = True
        elif request.method == "end":
            self._close(operation, request.delta["decky_name"])

    @staticmethod
    def _can_retry(request, error):
        """An outcome that is in doubt is sent when the disk answers. A begin is withdrawn."""
        if error.get("code") != OUTBOX_REFUSES:
            return False
        return request.method == "begin" or not (error.get("data") or {}).get("in_doubt")


class Heartbeat:
    """What the agent finds in `decnet.agent.heartbeat`."""

    def __init__(self):
        import atexit
        import contextvars
        import os
        import threading

        self.lock = threading.Lock()
        self.reporter = None
        self.operation = contextvars.ContextVar("operation", default=None)
        os.register_at_fork(after_in_child=self._forget_parent)
        atexit.register(self._finish)

    def start(self):
        """Starts the child. Returns `None`: there is no task."""
        try:
            self._running_reporter()
        except Exception:
            log_exception("the heartbeat was not started")

    async def stop(self):
        """Closes the child's stdin and waits for its end, for a limited time."""
        try:
            with self.lock:
                reporter, self.reporter = self.reporter, None
            if reporter is not None:
                await reporter.stop()
        except Exception:
            log_exception("the heartbeat was not stopped")

    async def push_lifecycle_delta(self, deltas):
        """Reports outcomes, and waits for a limited time until they are on the disk."""
        try:
            operation = self.operation.get()
            if not deltas or operation is not None and operation.reporter.is_stopping:
                return  # an operation that was in flight at the stop was reported by its child
            reporter = self._running_reporter()
            if operation is not None and operation.reporter is not reporter:
                operation = None  # it belongs to the process that this one was forked from
            waiter = Waiter()
            requests = outcomes(deltas, operation)
            if requests:
                reporter.queue(requests, waiter)
                await waiter.wait(COMMIT_WAIT)
        except Exception:
            log_exception("outcomes were not reported")

    def track(self, name, work, deckies_of):
        """Makes a coroutine function an operation from its beginning to its end."""
        import functools

        @functools.wraps(work)
        async def tracked(*args, **kwargs):
            operation = self._begin(name, deckies_of, args, kwargs)
            if operation is None:
                return await work(*args, **kwargs)
            reason = f"the {name} ended without an outcome"
            try:
                await operation.begin.waiter.wait(BEGIN_WAIT)
                return await work(*args, **kwargs)
            except BaseException as error:
                reason = describe(name, error)
                raise
            finally:
                self._end(operation, reason)

        return tracked

    def _begin(self, name, deckies_of, args, kwargs):
        """Begins an operation for this task. `None`: the work is done without one."""
        try:
            deckies = deckies_of(*args, **kwargs)
            if not deckies:
                return None
            reporter = self._running_reporter()
            operation = Operation(name, deckies, reporter)
            reporter.queue([operation.begin], Waiter())
            operation.token = self.operation.set(operation)
            return operation
        except Exception:
            log_exception("an operation was not begun")
            return None

    def _end(self, operation, reason):
        """Reports the deckies as failed whose outcome the agent has not reported."""
        try:
            self.operation.reset(operation.token)
        except ValueError:
            pass  # the coroutine is closed in another context
        if operation.reporter is not self.reporter:
            return  # after the stop, the child has reported them
        try:
            failed = {"operation": operation.name, "status": "failed", "error": reason}
            deltas = [{"decky_name": decky, **failed} for decky in operation.unreported]
            if deltas:
                operation.reporter.queue(outcomes(deltas, operation), None)
        except Exception:
            log_exception("an operation was not ended")

    def _running_reporter(self):
        with self.lock:
            if self.reporter is None:
                self.reporter = Reporter()
            return self.reporter

    def _forget_parent(self):
        """In a forked process the child and the threads are the parent's."""
        import threading

        reporter, self.reporter = self.reporter, None
        self.lock = threading.Lock()
        child = reporter and reporter.child
        if child is not None:
            # Otherwise the child would not see the end of the parent. They have no buffers.
            child.stdin.close()
            child.stdout.close()

    def _finish(self):
        """At the end of the interpreter. A forked process has no reporter of its parent."""
        reporter, self.reporter = self.reporter, None
        if reporter is not None:
            reporter.finish()


def log(message, *values):
    """Only for the threads of the reporter: the log may block. It may also raise."""
    import logging

    try:
        logging.getLogger(HEARTBEAT_MODULE).warning(message, *values)
    except Exception:
        pass


def log_exception(message):
    """For the event loop, where nothing is logged unless this module has an error."""
    import logging

    try:
        logging.getLogger(HEARTBEAT_MODULE).exception(message)
    except Exception:
        pass


def start_program():
    """Starts `decnet-heartbeat pipe`."""
    import os
    import shutil
    import subprocess

    program = os.environ.get(PROGRAM_VARIABLE) or shutil.which("decnet-heartbeat")
    if not program:
        raise FileNotFoundError(f"it is not on PATH, and {PROGRAM_VARIABLE} is not set")
    environment = os.environ.copy()
    if not environment.get(STATE_FILE_VARIABLE):
        state_file = agents_state_file()
        if state_file:
            environment[STATE_FILE_VARIABLE] = state_file
    pipe = subprocess.PIPE
    return subprocess.Popen([program, "pipe"], bufsize=0, stdin=pipe, stdout=pipe, env=environment)


def agents_state_file():
    """Where the agent keeps its state. `None`: the program searches it."""
    try:
        from decnet.config import STATE_FILE

        return str(STATE_FILE)
    except Exception:
        return None


def outcomes(deltas, operation):
    """The requests for deltas. One that is not a delta is logged."""
    requests = []
    for delta in deltas:
        try:
            requests.append(outcome(delta, operation))
        except Exception:
            log_exception("an outcome was not reported")
    return requests


def outcome(delta, operation):
    """The request for a delta: the end of a decky in the operation, if it belongs to one."""
    decky = delta.get("decky_name")
    delta = dict(delta)
    if delta.get("error") is not None:
        delta["error"] = str(delta["error"])[:ERROR_MAX]
    if operation is not None and delta.get("operation") == operation.name:
        if decky in operation.unreported:
            del operation.unreported[decky]
            return Request("end", operation, delta)
    return Request("push", None, delta)


def describe(name, error):
    """Why a deploy or a mutate failed."""
    import asyncio

    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return f"the {name} was cancelled"
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def clean(value):
    """Text that UTF-8 can represent: an error may contain bytes of a path as lone surrogates."""
    # `str` of an enumeration's value is its name.
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "replace").decode()


def utc(value):
    """A time in UTC, as RFC 3339 has it. `None`: it is none, and the child takes its own time."""
    from datetime import datetime, timezone

    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
        if time.tzinfo is None:
            time = time.replace(tzinfo=timezone.utc)
        return time.astimezone(timezone.utc).isoformat()
    except Exception:
        return None


class HeartbeatLoader:
    """Fills `decnet.agent.heartbeat`."""

    def __init__(self, heartbeat):
        self.heartbeat = heartbeat

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__doc__ = "Reports through the program decnet-heartbeat."
        module.start = self.heartbeat.start
        module.stop = self.heartbeat.stop
        module.push_lifecycle_delta = self.heartbeat.push_lifecycle_delta


class ExecutorLoader:
    """Loads `decnet.agent.executor` with its own loader. Then deploys and mutates are tracked."""

    def __init__(self, heartbeat, loader):
        self.heartbeat = heartbeat
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        import inspect

        self.loader.exec_module(module)
        operations = {
            "deploy": lambda config, *_, **__: [decky.name for decky in config.deckies],
            "mutate": lambda decky_id, *_, **__: [decky_id],
        }
        for name, deckies_of in operations.items():
            work = getattr(module, f"{name}_async", None)
            if inspect.iscoroutinefunction(work):
                setattr(module, f"{name}_async", self.heartbeat.track(name, work, deckies_of))
            else:
                log("no coroutine function %s_async: a %s is not tracked", name, name)


class DecnetHeartbeatFinder:
    """Finds the two modules of the agent. It makes nothing until one of them is imported."""

    def __init__(self):
        self.heartbeat = None

    def find_spec(self, name, path=None, target=None):
        if name not in (HEARTBEAT_MODULE, EXECUTOR_MODULE):
            return None
        if self.heartbeat is None:
            self.heartbeat = Heartbeat()
        if name == HEARTBEAT_MODULE:
            from importlib.machinery import ModuleSpec

            return ModuleSpec(name, HeartbeatLoader(self.heartbeat), origin=__file__)
        return self._executor_spec(name, path, target)

    def _executor_spec(self, name, path, target):
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = ExecutorLoader(self.heartbeat, spec.loader)
        return spec


def load_hidden_module():
    """Loads the `sitecustomize` that this file hides, as if this file did not exist."""
    import os

    own = sys.modules.pop(__name__)
    folder = os.path.dirname(os.path.abspath(__file__))
    entries = list(sys.path)
    others = [entry for entry in entries if os.path.realpath(entry) != os.path.realpath(folder)]
    sys.path[:] = others
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        # The hidden module may have changed the path.
        if sys.path == others:
            sys.path[:] = entries
        else:
            sys.path.insert(0, folder)
        sys.modules.setdefault(__name__, own)


if not any(type(finder).__qualname__ == "DecnetHeartbeatFinder" for finder in sys.meta_path):
    sys.meta_path.insert(0, DecnetHeartbeatFinder())
if __name__ == "sitecustomize":
    load_hidden_module()
