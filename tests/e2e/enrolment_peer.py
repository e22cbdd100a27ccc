"""Reads enrolments as the real agent does: JSON cases on stdin, JSON answers on stdout.

A case is an object of environment variables, and its DECNET_CONFIG is the path of the ini. An answer is an object with
`outcome` ("enrolled", "not enrolled" or "refused") and with the values or the error.
"""

import json
import os
import sys

import httpx

from decnet import config_ini, env
from decnet.agent import heartbeat


def answer(variables):
    os.environ.clear()
    os.environ.update(variables)
    try:
        config_ini.load_ini_config()
        port = env._port("DECNET_SWARMCTL_PORT", 8770)
        uuid = os.environ.get("DECNET_HOST_UUID")
        host = os.environ.get("DECNET_MASTER_HOST")
        if not uuid or not host:
            return {"outcome": "not enrolled"}
        # The agent finds an invalid URL only at its first beat.
        httpx.URL(f"https://{host}:{port}/swarm/heartbeat")
        agent_dir = str(heartbeat._resolve_agent_dir())
    except Exception as error:
        return {"outcome": "refused", "error": f"{type(error).__name__}: {error}"}
    return {"outcome": "enrolled", "host_uuid": uuid, "master_host": host, "master_port": port, "agent_dir": agent_dir}


json.dump([answer(case) for case in json.load(sys.stdin)], sys.stdout)
