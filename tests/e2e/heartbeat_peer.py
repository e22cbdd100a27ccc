"""Runs the real agent's heartbeat (decnet.agent.heartbeat) on command, so that the benchmark can measure it.

    heartbeat_peer.py STATE_FILE

The host and its master are in the environment, as for the agent. It answers each line on stdin with one JSON line on
stdout. `beat` runs one round of the agent's loop with the loop's own client. `push` pushes one delta. The answer has the
wall time and the CPU time in seconds, and the resident memory in KiB.
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
    """Records failures, which the module only logs. The benchmark must not ignore them."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


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
                "failures": failures.messages,
            }
            print(json.dumps(answer), flush=True)


asyncio.run(main())
