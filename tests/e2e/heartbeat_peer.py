"""The real agent's heartbeat (decnet.agent.heartbeat), doing what it is told, so that a bench can measure it.

    heartbeat_peer.py STATE_FILE        and who and where in the environment, as the agent reads it

Answers each line on stdin with one JSON line on stdout. `beat`: one round of its loop, on the loop's own client. `push`:
one delta, pushed. The answer has the wall and the CPU time that it took, in seconds, and the resident memory in KiB.
"""

import asyncio
import json
import logging
import sys
import time
from pathlib import Path

import httpx

import decnet.config
from decnet import env
from decnet.agent import heartbeat
from decnet.swarm.log_forwarder import build_worker_ssl_context


class Failures(logging.Handler):
    """The module logs what goes wrong and goes on. A bench must not."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def resident():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


async def main():
    decnet.config.STATE_FILE = Path(sys.argv[1])
    failures = Failures()
    heartbeat.log.addHandler(failures)
    url = f"https://{env.DECNET_MASTER_HOST}:{env.DECNET_SWARMCTL_PORT}/swarm/heartbeat"
    tls = build_worker_ssl_context(heartbeat._resolve_agent_dir())
    async with httpx.AsyncClient(verify=tls, timeout=heartbeat._TIMEOUT) as client:

        async def beat():
            await heartbeat._tick(client, url, env.DECNET_HOST_UUID, "1.0.0")

        async def push():
            delta = {"decky_name": "decky-1", "operation": "deploy", "status": "succeeded"}
            await heartbeat.push_lifecycle_delta([delta])

        for line in sys.stdin:
            do = {"beat": beat, "push": push}[line.strip()]
            wall, cpu = time.perf_counter(), time.process_time()
            await do()
            answer = {
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
                "resident_kb": resident(),
                "failures": failures.said,
            }
            print(json.dumps(answer), flush=True)


asyncio.run(main())
