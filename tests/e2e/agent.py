"""Runs DECNET's own agent for the tests, under uvicorn on a port of 127.0.0.1.

    agent.py SCRATCH

The first line on stdout is the port. The deploy itself has a stand-in: it prints the line `deploying`, reads the FIFO
SCRATCH/outcome to its end, and fails with what it read, or succeeds if that was nothing.
"""

import socket
import sys
from pathlib import Path

SCRATCH = Path(sys.argv[1]).resolve()


def deploy(config, *options, **more):
    print("deploying", flush=True)
    problem = (SCRATCH / "outcome").read_text()
    if problem:
        raise RuntimeError(problem)


def main():
    import decnet.config

    decnet.config.STATE_FILE = SCRATCH / "decnet-state.json"

    import uvicorn
    from decnet.agent import app
    from decnet.engine import deployer

    deployer.deploy = deploy
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app.app, log_config=None))
    print(listener.getsockname()[1], flush=True)
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
