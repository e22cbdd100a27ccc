"""Tests of the module that `decnet-heartbeat shim` prints, without DECNET and without the program.

    shim.py SITECUSTOMIZE

The agent's modules and the program are stand-ins, made in a scratch folder.
"""

import asyncio
import contextlib
import datetime
import enum
import importlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from pathlib import Path

SHIM = Path(sys.argv.pop(1)).resolve()
# Longer than anything that a test waits for; reaching it is a failure.
PATIENCE = 20

# The parts of the agent that the shim touches.
AGENT = {
    "decnet/__init__.py": "",
    "decnet/config.py": "STATE_FILE = '/agent/decnet-state.json'",
    "decnet/agent/__init__.py": "",
    "decnet/agent/heartbeat.py": "raise ImportError('the original heartbeat was loaded')",
    "decnet/agent/executor.py": """
        work = None

        def delta(decky, operation, status, **more):
            return {"decky_name": decky, "operation": operation, "status": status, **more}

        async def deploy_async(config, *, dry_run=False):
            from decnet.agent.heartbeat import push_lifecycle_delta
            deckies = [decky.name for decky in config.deckies]
            outcomes = await work(*deckies)
            await push_lifecycle_delta([delta(*it[:1], "deploy", *it[1:]) for it in outcomes])

        async def mutate_async(decky_id, services):
            from decnet.agent.heartbeat import push_lifecycle_delta
            try:
                await work(decky_id)
            except Exception as error:
                return await push_lifecycle_delta(
                    [delta(decky_id, "mutate", "failed", error=str(error))])
            await push_lifecycle_delta([delta(decky_id, "mutate", "succeeded")])
        """,
}

# Records what it reads, and answers as `decnet-heartbeat pipe` does. The file `mode` says what it
# does otherwise.
PROGRAM = """
    import json, os, sys, time
    folder = os.path.dirname(os.path.abspath(__file__))
    log = open(os.path.join(folder, "log"), "a", buffering=1)
    mode = json.load(open(os.path.join(folder, "mode")))
    print(json.dumps({"started": sys.argv[1:], "pid": os.getpid(),
        "state": os.environ.get("DECNET_HEARTBEAT_STATE_FILE")}), file=log)
    if mode.get("print"):
        os.write(1, mode["print"].encode("utf-8", "surrogateescape"))
    if mode.get("flood"):
        while True:
            os.write(1, b"x" * 65536)
    if mode.get("deaf"):
        time.sleep(1000)
    if "exit" in mode:
        sys.exit(mode["exit"])
    handle = os.getpid()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        line.decode().encode("ascii")
        print(json.dumps({"size": len(line), **request}), file=log)
        if request["method"] == mode.get("die"):
            os.kill(os.getpid(), 9)
        if mode.get("silent"):
            continue
        answer = mode.get("answers", {}).get(request["method"])
        if answer is None:
            handle += 1
            answer = {"result": {"handle": handle, "durable": True}}
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **answer}), flush=True)
        if "id" in answer:
            del mode["answers"]
    print(json.dumps({"end": True}), file=log)
    time.sleep(mode.get("linger", 0))
"""


class Config:
    def __init__(self, *names):
        self.deckies = [type("Decky", (), {"name": name})() for name in names]


def succeeded(decky):
    return {"decky_name": decky, "operation": "mutate", "status": "succeeded"}


class ShimTest(unittest.TestCase):
    """The shim in this process, in place of the module of a stand-in for the agent."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        for name, code in AGENT.items():
            path = self.folder / "agent" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(code))
        self.program = self.folder / "decnet-heartbeat"
        self.program.write_text(f"#!{sys.executable} -SsE\n" + textwrap.dedent(PROGRAM))
        self.program.chmod(0o700)
        self.mode()
        os.environ["DECNET_HEARTBEAT_PROGRAM"] = str(self.program)
        os.environ.pop("DECNET_HEARTBEAT_STATE_FILE", None)
        sys.path.insert(0, str(self.folder / "agent"))
        spec = importlib.util.spec_from_file_location("shim", SHIM)
        self.shim = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.shim)
        self.reporters = []
        make_reporter = self.shim.Reporter

        def reporter():
            self.reporters.append(make_reporter())
            return self.reporters[-1]

        self.shim.Reporter = reporter
        self.addCleanup(self.remove_shim)
        self.records = logging.getLogger(self.shim.HEARTBEAT_MODULE)
        self.heartbeat = importlib.import_module("decnet.agent.heartbeat")
        self.executor = importlib.import_module("decnet.agent.executor")

    def remove_shim(self):
        # A reporter that a test has not waited for may start another child.
        end = time.monotonic() + PATIENCE
        while not all(it.has_ended for it in self.reporters):
            self.assertLess(time.monotonic(), end)
            for start in self.starts():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(start["pid"], signal.SIGKILL)
            time.sleep(0.01)
        sys.path.remove(str(self.folder / "agent"))
        sys.meta_path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == "decnet"]:
            del sys.modules[name]

    def mode(self, **mode):
        (self.folder / "mode").write_text(json.dumps(mode))

    def log(self):
        """What the program has recorded. The last line may not be complete."""
        with contextlib.suppress(FileNotFoundError):
            *lines, _ = (self.folder / "log").read_text().split("\n")
            return [json.loads(line) for line in lines]
        return []

    def requests(self, *methods):
        return [it for it in self.log() if it.get("method") in methods]

    def starts(self):
        return [it for it in self.log() if "started" in it]

    def reporter(self):
        return sys.meta_path[0].heartbeat.reporter

    def run_agent(self, main):
        """Runs the coroutine function as the agent would, from `start` to `stop`."""

        async def agent():
            self.heartbeat.start()
            try:
                return await main()
            finally:
                await self.heartbeat.stop()

        with self.assertLogs(self.records, "DEBUG") as logged:
            self.logged_now = logged
            self.records.debug("there may be no others")
            result = asyncio.run(asyncio.wait_for(agent(), 3 * PATIENCE))
        self.logged = "\n".join(logged.output)
        self.assertNotIn("Traceback", self.logged)
        return result

    async def until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), end, f"{self.log()}")
            await asyncio.sleep(0.01)

    # What is reported.

    def test_the_child_gets_the_state_file_and_the_end_of_stdin(self):
        async def main():
            await self.until(self.starts)

        self.run_agent(main)
        first, last = self.log()
        self.assertEqual(first["started"], ["pipe"])
        self.assertEqual(first["state"], "/agent/decnet-state.json")
        self.assertEqual(last, {"end": True})

    def test_an_operation_begins_before_the_work_and_ends_by_its_handle(self):
        async def work(*deckies):
            self.assertEqual(self.requests("begin")[0]["params"],
                             {"operation": "deploy", "deckies": ["d1", "d2"]})
            return [("d1", "succeeded"), ("d2", "failed")]

        async def main():
            self.executor.work = work
            await self.executor.deploy_async(Config("d1", "d2"), dry_run=True)
            handle = self.starts()[0]["pid"] + 1
            self.assertEqual([it["params"] for it in self.requests("end")], [
                {"handle": handle, "decky": "d1", "status": "succeeded"},
                {"handle": handle, "decky": "d2", "status": "failed"},
            ])

        self.run_agent(main)
        self.assertEqual(self.requests("push"), [])

    def test_a_delta_of_no_operation_is_pushed(self):
        async def main():
            await self.heartbeat.push_lifecycle_delta([{**succeeded("d1"), "error": "", "new": 1}])
            self.assertEqual([it["params"] for it in self.requests("push")],
                             [{"deltas": [succeeded("d1")]}])
            await self.heartbeat.push_lifecycle_delta([])

        self.run_agent(main)

    def test_work_that_raises_is_reported(self):
        async def work(*deckies):
            raise ValueError("no space left")

        async def main():
            self.executor.work = work
            with self.assertRaisesRegex(ValueError, "no space left"):
                await self.executor.deploy_async(Config("d1"))

        self.run_agent(main)
        params = self.requests("end")[0]["params"]
        self.assertEqual(params["error"], "ValueError: no space left")

    def test_work_that_raises_an_error_without_a_text_is_reported(self):
        class Odd(Exception):
            def __str__(self):
                raise KeyError

        async def work(*deckies):
            raise Odd

        async def main():
            self.executor.work = work
            with self.assertRaises(Odd):
                await self.executor.deploy_async(Config("d1"))

        self.run_agent(main)
        self.assertEqual(self.requests("end")[0]["params"]["error"], "Odd")

    def test_work_that_is_cancelled_is_reported(self):
        async def main():
            started = asyncio.Event()

            async def work(*deckies):
                started.set()
                await asyncio.sleep(1000)

            self.executor.work = work
            task = asyncio.create_task(self.executor.mutate_async("d1", []))
            await started.wait()
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        self.run_agent(main)
        self.assertEqual(self.requests("end")[0]["params"]["error"], "the mutate was cancelled")

    def test_work_whose_coroutine_is_closed_is_reported(self):
        async def main():
            work = self.executor.mutate_async("d1", [])
            work.send(None)
            work.close()

        self.run_agent(main)
        self.assertEqual(self.requests("end")[0]["params"]["error"], "the mutate was cancelled")

    def test_work_without_an_outcome_is_reported(self):
        async def work(*deckies):
            return [("d1", "succeeded")]

        async def main():
            self.executor.work = work
            await self.executor.deploy_async(Config("d1", "d2"))

        self.run_agent(main)
        self.assertEqual(self.requests("end")[1]["params"]["error"],
                         "the deploy ended without an outcome")

    def test_an_operation_in_flight_at_the_stop_is_left_to_the_child(self):
        async def main():
            ready, done = asyncio.Event(), asyncio.Event()

            async def work(*deckies):
                ready.set()
                await done.wait()
                return [("d1", "succeeded")]

            self.executor.work = work
            task = asyncio.create_task(self.executor.deploy_async(Config("d1")))
            await ready.wait()
            await self.heartbeat.stop()
            done.set()
            await task

        self.run_agent(main)
        self.assertEqual(self.log()[-1], {"end": True})
        self.assertEqual(self.requests("end", "push"), [])
        self.assertEqual(len(self.starts()), 1)

    def test_an_operation_that_has_ended_does_not_keep_later_deltas_from_another_child(self):
        async def work(*deckies):
            return [("d1", "succeeded")]

        async def main():
            self.executor.work = work
            await self.executor.deploy_async(Config("d1"))
            await self.heartbeat.stop()
            self.heartbeat.start()
            await self.heartbeat.push_lifecycle_delta([succeeded("d1")])

        self.run_agent(main)
        self.assertEqual(len(self.requests("push")), 1)

    def test_times_and_enumerations_are_sent_as_the_program_reads_them(self):
        class Status(str, enum.Enum):
            DONE = "succeeded"

        zone = datetime.timezone(datetime.timedelta(hours=2, seconds=7))
        times = {
            "2026-01-02T03:04:05.5": "2026-01-02T03:04:05.500000+00:00",
            "2026-01-02 03:04:05+01:00": "2026-01-02T02:04:05+00:00",
            datetime.datetime(2026, 1, 2, 3, tzinfo=zone): "2026-01-02T00:59:53+00:00",
            "yesterday": None,
        }

        async def main():
            deltas = [{**succeeded("d"), "status": Status.DONE, "completed_at": time}
                      for time in times]
            await self.heartbeat.push_lifecycle_delta(deltas)

        self.run_agent(main)
        sent = [it["params"]["deltas"][0] for it in self.requests("push")]
        self.assertEqual([it.get("completed_at") for it in sent], list(times.values()))
        self.assertEqual({it["status"] for it in sent}, {"succeeded"})

    def test_what_is_not_a_delta_does_not_keep_others_from_being_sent(self):
        class Odd:
            def __str__(self):
                raise KeyError

        async def work(*deckies):
            return [("d1", "succeeded"), ([], "succeeded"), ("d2", "succeeded")]

        async def main():
            self.shim.log_exception = lambda message: self.problems.append(message)
            self.executor.work = work
            await self.executor.deploy_async(Config("d1", "d2"))
            odd = {**succeeded("d3"), "error": Odd()}
            await self.heartbeat.push_lifecycle_delta([None, succeeded("d4"), odd])

        self.problems = []
        self.run_agent(main)
        ended = [it["params"]["decky"] for it in self.requests("end")]
        pushed = [it["params"]["deltas"][0]["decky_name"] for it in self.requests("push")]
        self.assertEqual((ended, pushed), (["d1", "d2"], ["d4"]))
        self.assertEqual(self.problems, 3 * ["an outcome was not reported"])

    def test_text_that_is_no_utf_8_and_long_text_do_not_break_a_line(self):
        async def main():
            error = "\udcff" + 3_000_000 * "\U0001f41d"
            await self.heartbeat.push_lifecycle_delta([
                {**succeeded("d1"), "status": "failed", "error": error},
                succeeded(2_000_000 * "x"),
                succeeded("d2"),
            ])
            first, second = self.requests("push")
            self.assertEqual(first["params"]["deltas"][0]["error"], "?" + 1999 * "\U0001f41d")
            self.assertLess(first["size"], 1 << 20)
            self.assertEqual(second["params"]["deltas"][0]["decky_name"], "d2")

        self.run_agent(main)
        self.assertIn("too long", self.logged)

    # A program that fails.

    def test_no_program_fails_nothing(self):
        os.environ["DECNET_HEARTBEAT_PROGRAM"] = str(self.folder / "none")
        self.run_agent(lambda: self.report_to("cannot be started"))

    def test_a_program_that_is_not_on_the_path_fails_nothing(self):
        del os.environ["DECNET_HEARTBEAT_PROGRAM"]
        path = os.environ["PATH"]
        self.addCleanup(os.environ.update, {"PATH": path})
        os.environ["PATH"] = str(self.folder / "none")
        self.run_agent(lambda: self.report_to("it is not on PATH"))
        os.environ["PATH"] = f"{self.folder}:{path}"
        self.run_agent(lambda: self.until(self.starts))

    def test_a_program_that_never_answers_fails_nothing(self):
        self.mode(silent=True)
        self.run_agent(lambda: self.report_to(None))

    def test_a_program_that_ends_at_once_fails_nothing(self):
        self.mode(exit=1)
        self.run_agent(lambda: self.report_to("code=1"))

    def test_a_program_that_prints_something_else_fails_nothing(self):
        for printed in ("hello\n", "[]\n", '{"id": {}}\n', "\udcff\n"):
            self.mode(print=printed)
            self.run_agent(lambda: self.report_to("not an answer"))
        for printed in ('{"id": 1, "error": 1}\n', '{"method": "hello"}\n', '{"id":'):
            self.mode(print=printed, silent=True)
            self.run_agent(lambda: self.report_to(None))

    def test_a_request_whose_answer_is_not_valid_is_sent_to_the_next_child(self):
        for method, answer in (("begin", {"result": {}}), ("end", {"error": 1})):
            self.mode(answers={method: answer})
            self.shim.BACKOFF_MIN = 0.01

            async def work(*deckies):
                self.mode()
                return [("d1", "succeeded")]

            async def main():
                self.shim.BEGIN_WAIT = PATIENCE if method == "end" else 0.1
                self.executor.work = work
                await self.executor.deploy_async(Config("d1"))
                await self.until(lambda: not self.reporter().operations)

            before = len(self.requests("end"))
            self.run_agent(main)
            self.assertIn("not an answer", self.logged)
            handle = self.starts()[-1]["pid"] + 1
            self.assertGreater(len(self.requests("end")), before)
            self.assertEqual(self.requests("end")[-1]["params"]["handle"], handle)

    def test_a_log_that_raises_does_not_end_the_reports(self):
        self.mode(exit=3)
        self.shim.BACKOFF_MIN = self.shim.COMMIT_WAIT = 0.1
        calls = []

        def refuse(record):
            calls.append(record)
            raise OSError("no space left")

        async def main():
            self.records.addFilter(refuse)
            try:
                await self.until(lambda: calls)
                self.mode()
                await self.heartbeat.push_lifecycle_delta([None])
                await self.heartbeat.push_lifecycle_delta([succeeded("d1")])
                await self.until(lambda: self.requests("push"))
            finally:
                self.records.removeFilter(refuse)

        self.run_agent(main)

    def test_a_problem_is_logged_again_after_a_pause(self):
        self.mode(exit=3)
        self.shim.BACKOFF_MIN = self.shim.BACKOFF_MAX = 0.01
        self.shim.LOG_PAUSE = 0
        again = lambda: "\n".join(self.logged_now.output).count("code=3") > 1
        self.run_agent(lambda: self.until(again))

    def test_an_idle_program_that_hangs_is_replaced(self):
        self.mode(silent=True)
        self.shim.ANSWER_WAIT, self.shim.BACKOFF_MIN = 0.3, 0.01

        async def main():
            await self.until(lambda: len(self.starts()) > 1)
            self.mode()
            await self.until(lambda: len(self.requests("stats")) > 3)
            count = len(self.starts())
            stats = len(self.requests("stats"))
            await self.until(lambda: len(self.requests("stats")) > stats + 2)
            self.assertEqual(len(self.starts()), count)

        self.run_agent(main)
        self.assertIn("does not answer", self.logged)

    def test_a_program_that_prints_without_end_is_killed(self):
        self.mode(flood=True)
        self.run_agent(lambda: self.report_to("too long"))

    async def report_to(self, problem):
        """Reports to a program that does not answer. Waits until the problem is logged."""
        self.shim.BEGIN_WAIT = self.shim.COMMIT_WAIT = self.shim.STOP_WAIT = 0.1

        async def work(*deckies):
            return [(decky, "succeeded") for decky in deckies]

        self.executor.work = work
        start = time.monotonic()
        await self.executor.deploy_async(Config("d1", "d2"))
        await self.heartbeat.push_lifecycle_delta([succeeded("d3")])
        self.assertLess(time.monotonic() - start, 5)
        await self.until(lambda: problem is None or problem in "\n".join(self.logged_now.output))

    def test_a_program_that_fails_is_restarted_with_backoff(self):
        self.mode(exit=3)
        self.shim.BACKOFF_MIN, self.shim.BACKOFF_MAX = 0.1, 0.2

        async def main():
            await self.until(lambda: len(self.starts()) == 4)
            self.mode()
            start = time.monotonic()
            await self.until(lambda: len(self.starts()) == 5)
            self.assertGreater(time.monotonic() - start, 0.15)

        self.run_agent(main)
        self.assertEqual(self.logged.count("code=3"), 1)

    def test_a_program_without_configuration_is_not_restarted_soon(self):
        self.mode(exit=78)
        self.shim.BACKOFF_MIN = 0.01

        async def main():
            await self.until(lambda: self.reporter().logged)
            await asyncio.sleep(0.5)

        self.run_agent(main)
        self.assertEqual(len(self.starts()), 1)

    def test_a_program_that_stops_answering_is_replaced_and_nothing_is_lost(self):
        self.mode(silent=True)
        self.shim.ANSWER_WAIT, self.shim.BACKOFF_MIN, self.shim.COMMIT_WAIT = 0.5, 0.01, 60

        async def main():
            pushed = asyncio.create_task(self.heartbeat.push_lifecycle_delta([succeeded("d1")]))
            await self.until(lambda: self.requests("push"))
            self.mode()
            await pushed

        self.run_agent(main)
        self.assertIn("does not answer", self.logged)
        self.assertEqual(len(self.requests("push")), 2)

    def test_a_killed_program_resumes_what_is_in_flight(self):
        self.shim.BACKOFF_MIN = 0.01

        async def main():
            async def work(*deckies):
                os.kill(self.starts()[0]["pid"], signal.SIGKILL)
                await self.until(lambda: len(self.requests("begin")) == 2)
                return [("d1", "succeeded"), ("d2", "failed")]

            self.executor.work = work
            await self.executor.deploy_async(Config("d1", "d2"))

        self.run_agent(main)
        first, second = (it["params"] for it in self.requests("begin"))
        self.assertEqual(second, {**first, "resume": True})
        handle = self.starts()[1]["pid"] + 1
        ends = [it["params"] for it in self.requests("end")]
        ended = [(it["handle"], it["decky"]) for it in ends]
        self.assertEqual(ended, [(handle, "d1"), (handle, "d2")])

    def test_a_begin_that_several_children_have_not_read_is_sent_once(self):
        self.shim.BACKOFF_MIN = self.shim.BACKOFF_MAX = 0.05
        self.shim.COMMIT_WAIT = PATIENCE

        async def main():
            done = asyncio.Event()

            async def work(*deckies):
                await done.wait()
                return [(decky, "succeeded") for decky in deckies]

            self.executor.work = work
            deploys = [asyncio.create_task(self.executor.deploy_async(Config("d1", decky)))
                       for decky in ("d2", "d3")]
            await self.until(lambda: all(it.handle for it in self.reporter().operations)
                             and len(self.reporter().operations) == 2)
            self.shim.UNANSWERED_MAX = 1
            self.mode(exit=1)
            os.kill(self.starts()[0]["pid"], signal.SIGKILL)
            await self.until(lambda: len(self.starts()) > 4)
            self.mode()
            done.set()
            await asyncio.gather(*deploys)

        self.run_agent(main)
        last = self.starts()[-1]
        requests = self.log()[self.log().index(last):]
        begins = [it["params"]["deckies"] for it in requests if it.get("method") == "begin"]
        # A child takes over the newest row of d1, so the newest operation is the first.
        self.assertEqual(begins, [["d1", "d3"], ["d1", "d2"]])

    def test_an_end_that_a_killed_program_has_not_answered_is_sent_again(self):
        self.mode(die="end")
        self.shim.BACKOFF_MIN, self.shim.COMMIT_WAIT = 0.01, 60

        async def main():
            async def work(*deckies):
                return [("d1", "succeeded")]

            self.executor.work = work
            deploy = asyncio.create_task(self.executor.deploy_async(Config("d1")))
            await self.until(lambda: self.requests("end"))
            self.mode()
            await deploy

        self.run_agent(main)
        *_, begin, end = self.requests("begin", "end")
        self.assertTrue(begin["params"]["resume"])
        self.assertEqual(end["params"]["decky"], "d1")
        self.assertEqual(end["params"]["handle"], self.starts()[-1]["pid"] + 1)

    def test_the_outcomes_of_a_refused_begin_are_pushed(self):
        self.mode(answers={"begin": {"error": {"code": -32602, "message": "no"}}})

        async def main():
            async def work(*deckies):
                return [("d1", "succeeded")]

            self.executor.work = work
            await self.executor.deploy_async(Config("d1"))

        self.run_agent(main)
        self.assertIn("begin was refused and is not sent again", self.logged)
        delta = {"decky_name": "d1", "operation": "deploy", "status": "succeeded"}
        self.assertEqual(self.requests("push")[0]["params"], {"deltas": [delta]})

    def test_what_the_outbox_refuses_is_sent_again_unless_it_is_in_doubt(self):
        self.shim.REFUSED_PAUSE = 0.01
        self.shim.COMMIT_WAIT = self.shim.STOP_WAIT = 0.5
        refused = {"code": -32000, "message": "full"}
        self.mode(answers={"push": {"error": refused}})

        async def main():
            await self.heartbeat.push_lifecycle_delta([succeeded("d1")])

        self.run_agent(main)
        self.assertGreater(len(self.requests("push")), 2)
        self.assertEqual(self.logged.count("push was refused and is sent again"), 1)
        before = len(self.requests("push"))
        self.mode(answers={"push": {"error": {**refused, "data": {"in_doubt": True}}}})
        self.run_agent(main)
        self.assertEqual(len(self.requests("push")), before + 1)

    def test_what_the_outbox_has_refused_is_sent_at_the_stop(self):
        self.shim.COMMIT_WAIT, self.shim.BACKOFF_MIN, self.shim.REFUSED_PAUSE = 0.1, 1000, 1000
        self.mode(answers={"push": {"error": {"code": -32000, "message": "full"}}})

        async def main():
            await self.heartbeat.push_lifecycle_delta([succeeded("d1")])
            await self.until(lambda: self.reporter().refused)
            self.mode()
            os.kill(self.starts()[0]["pid"], signal.SIGKILL)
            await self.until(lambda: self.reporter().logged.get("child"))

        self.run_agent(main)
        self.assertEqual(len(self.requests("push")), 2)
        self.assertNotIn("not confirmed", self.logged)

    def test_a_program_that_is_killed_during_the_stop_is_started_once_more(self):
        self.mode(silent=True, linger=1000)
        self.shim.COMMIT_WAIT, self.shim.BACKOFF_MIN = 0.1, 1000
        self.shim.STOP_WAIT = PATIENCE

        async def main():
            await self.heartbeat.push_lifecycle_delta([succeeded("d1")])
            stop = asyncio.create_task(self.heartbeat.stop())
            await self.until(lambda: {"end": True} in self.log())
            self.mode()
            os.kill(self.starts()[0]["pid"], signal.SIGKILL)
            await stop

        self.run_agent(main)
        self.assertEqual(len(self.requests("push")), 2)

    def test_a_line_that_the_program_cannot_parse_is_the_oldest_one(self):
        self.mode(answers={"push": {"id": None, "error": {"code": -32700, "message": "no"}}})

        async def main():
            await self.heartbeat.push_lifecycle_delta([succeeded("d1"), succeeded("d2")])
            self.assertEqual(self.reporter().sent, {})

        self.run_agent(main)

    def test_start_after_a_stop_starts_again(self):
        async def main():
            await self.until(self.starts)
            await self.heartbeat.stop()
            self.heartbeat.start()
            await self.heartbeat.push_lifecycle_delta([succeeded("d1")])

        self.run_agent(main)
        self.assertEqual(len(self.starts()), 2)

    def test_the_stop_does_not_wait_for_a_program_that_does_not_end(self):
        self.mode(linger=1000)
        self.shim.STOP_WAIT = 0.2

        async def main():
            await self.until(self.starts)
            child = self.reporter().child
            self.addCleanup(child.kill)
            await self.heartbeat.stop()
            self.assertIsNone(child.poll())

        self.run_agent(main)

    # Many reports.

    def test_without_a_program_the_newest_ten_thousand_reports_wait(self):
        os.environ["DECNET_HEARTBEAT_PROGRAM"] = str(self.folder / "none")

        def check():
            waiting = self.reporter().waiting
            self.assertEqual(len(waiting), 10_000)
            self.assertEqual(waiting[0].delta["decky_name"], "d10000")
            self.assertEqual(waiting[-1].delta["decky_name"], "d19999")

        self.flood(check)

    def test_without_a_program_the_newest_operations_wait(self):
        os.environ["DECNET_HEARTBEAT_PROGRAM"] = str(self.folder / "none")
        self.shim.QUEUE_MAX = 10
        self.shim.BEGIN_WAIT = self.shim.COMMIT_WAIT = 0.001
        self.shim.STOP_WAIT = 0.1

        async def main():
            ready, done = asyncio.Event(), asyncio.Event()

            async def slow(decky):
                ready.set()
                await done.wait()

            async def work(decky):
                pass

            self.executor.work = slow
            first = asyncio.create_task(self.executor.mutate_async("d0", []))
            await ready.wait()
            self.executor.work = work
            for number in range(1, 30):
                await self.executor.mutate_async(f"d{number}", [])
            waiting = self.reporter().waiting
            self.assertLessEqual(len(waiting), 10)
            ended = [it.delta["decky_name"] for it in waiting if it.method == "end"]
            self.assertEqual(ended, ["d26", "d27", "d28", "d29"])
            self.assertEqual(list(waiting[0].operation.open), ["d0"])
            done.set()
            await first

        self.run_agent(main)

    def test_a_program_that_does_not_read_does_not_block_the_loop(self):
        self.mode(deaf=True)
        self.flood(lambda: self.assertEqual(len(self.reporter().waiting), 10_000))

    def test_a_program_that_reads_gets_twenty_thousand_reports(self):
        self.shim.QUEUE_MAX = 20_000
        self.flood(lambda: None)
        self.assertEqual(len(self.requests("push")) % 20_000, 0)

    def flood(self, check):
        """Pushes 20,000 deltas: 100 at a time, then a thousand at once."""

        async def main():
            turns = asyncio.create_task(self.longest_turn())
            deltas = [succeeded(f"d{number}") for number in range(20_000)]
            for start in range(0, 19_000, 100):
                await self.heartbeat.push_lifecycle_delta(deltas[start : start + 100])
            await self.heartbeat.push_lifecycle_delta(deltas[19_000:])
            check()
            turns.cancel()
            longest = await turns
            await self.until(lambda: not self.reporter().waiting or self.shim.STOP_WAIT < 1)
            return longest

        self.shim.COMMIT_WAIT = 0.001
        self.shim.STOP_WAIT = PATIENCE if self.shim.QUEUE_MAX > 10_000 else 0.1
        work, longest = self.run_agent(main)
        self.assertLess(work, 0.05)
        # A busy machine delays a thread. What waits for the program waits longer.
        self.assertLess(longest, 1)

    @staticmethod
    async def longest_turn():
        """The longest turn of the loop: the CPU time of its thread, and the time that passed."""
        longest = (0, 0)
        before = (time.thread_time(), time.monotonic())
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(0)
                now = (time.thread_time(), time.monotonic())
                longest = tuple(max(it[0], it[2] - it[1]) for it in zip(longest, before, now))
                before = now
        return longest

    def test_a_forked_process_has_a_child_of_its_own_and_not_the_parents(self):
        async def main():
            await self.until(self.starts)
            forked = os.fork()
            if forked == 0:
                # Without the tests' clean-up. It ends when it is killed.
                with contextlib.suppress(BaseException):
                    asyncio.set_event_loop(None)
                    asyncio._set_running_loop(None)
                    asyncio.run(self.heartbeat.push_lifecycle_delta([succeeded("forked")]))
                    time.sleep(1000)
                os._exit(1)
            try:
                await self.until(lambda: len(self.starts()) == 2 and self.requests("push"))
                # The forked process does not keep the stdin of the parent's child open.
                first = self.reporter().child
                await self.heartbeat.stop()
                self.assertEqual(first.poll(), 0)
            finally:
                os.kill(forked, signal.SIGKILL)
                os.waitpid(forked, 0)

        self.run_agent(main)


class ProcessTest(unittest.TestCase):
    """The shim as `sitecustomize` of a process."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        self.write("shim/sitecustomize.py", SHIM.read_text())

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def python(self, code, *folders):
        """Runs code in a new process, with these folders on its path. Returns stdout and stderr."""
        path = os.pathsep.join(str(self.folder / folder) for folder in folders)
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True,
            text=True, timeout=PATIENCE, check=False,
        )
        return done.stdout.strip(), done.stderr.strip()

    def test_a_process_that_is_not_the_agent_imports_no_more_modules(self):
        code = "import sys; print(sorted(sys.modules), len(sys.path))"
        self.write("empty/sitecustomize.py", "")
        self.assertEqual(self.python(code, "shim"), self.python(code, "empty"))

    def test_a_hidden_sitecustomize_is_loaded(self):
        hidden = "import sys; sys.path.append('/added'); name = 'hidden'"
        self.write("hidden/sitecustomize.py", hidden)
        out, err = self.python(
            "import sys, sitecustomize; print(sitecustomize.name, sys.path[1:])", "shim", "hidden")
        self.assertEqual(err, "")
        self.assertTrue(out.startswith("hidden"), out)
        for entry in ("shim", "hidden", "/added"):
            self.assertIn(entry, out)

    def test_a_hidden_sitecustomize_that_fails_is_reported_by_site_and_the_shim_works(self):
        self.write("hidden/sitecustomize.py", "import no_such_module")
        code = "import sys; print(type(sys.meta_path[0]).__name__)"
        out, err = self.python(code, "shim", "hidden")
        self.assertEqual(out, "DecnetHeartbeatFinder")
        self.assertIn("Error in sitecustomize", err)

    def test_two_copies_are_one(self):
        self.write("second/sitecustomize.py", SHIM.read_text())
        self.write("hidden/sitecustomize.py", "print('hidden')")
        code = """
            import sys
            print([type(it).__name__ for it in sys.meta_path].count("DecnetHeartbeatFinder"))
            """
        self.assertEqual(self.python(code, "shim", "second", "hidden"), ("hidden\n1", ""))

    def write_agent(self):
        for name, text in AGENT.items():
            self.write(f"agent/{name}", text)

    def test_reports_that_wait_at_the_end_of_the_interpreter_are_sent(self):
        self.write_agent()
        self.write("decnet-heartbeat", f"#!{sys.executable} -SsE\n" + textwrap.dedent(PROGRAM))
        (self.folder / "decnet-heartbeat").chmod(0o700)
        self.write("mode", '{"exit": 1}')
        code = f"""
            import asyncio, os, sitecustomize
            os.environ["DECNET_HEARTBEAT_PROGRAM"] = "{self.folder}/decnet-heartbeat"
            sitecustomize.COMMIT_WAIT = 1
            from decnet.agent import heartbeat
            delta = {{"decky_name": "d1", "operation": "deploy", "status": "succeeded"}}
            asyncio.run(heartbeat.push_lifecycle_delta([delta]))
            open("{self.folder}/mode", "w").write("{{}}")
            """
        out, err = self.python(code, "shim", "agent")
        self.assertIn("code=1", err)
        log = [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]
        self.assertEqual([it["method"] for it in log if "method" in it], ["push"])
        self.assertEqual(log[-1], {"end": True})

    def test_an_executor_without_a_known_function_is_logged_and_works(self):
        self.write_agent()
        self.write("agent/decnet/agent/executor.py", "async def mutate_async(decky): pass")
        out, err = self.python("from decnet.agent import executor", "shim", "agent")
        self.assertEqual(err, "no coroutine function deploy_async: a deploy is not tracked")

    def test_the_agent_finds_the_same_functions(self):
        self.write_agent()
        code = """
            import inspect
            from decnet.agent import executor, heartbeat
            for it in (heartbeat.start, heartbeat.stop, heartbeat.push_lifecycle_delta,
                       executor.deploy_async):
                print(inspect.iscoroutinefunction(it), inspect.signature(it))
            print(inspect.getsource(executor.deploy_async).split("(")[0].strip())
            """
        out, err = self.python(code, "shim", "agent")
        self.assertEqual(err, "")
        self.assertEqual(out.splitlines(), [
            "False ()", "True ()", "True (deltas)", "True (config, *, dry_run=False)",
            "async def deploy_async",
        ])


if __name__ == "__main__":
    unittest.main(verbosity=2)
