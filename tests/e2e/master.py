"""Runs the real DECNET master for the tests, and changes its state as an operator would.

    master.py SCRATCH [PORT]

The CA and the database of the master are in SCRATCH. Started again there, it is the same master. It serves heartbeats
over mTLS on 127.0.0.1, on PORT or on a free port. It reads commands as JSON lines from stdin, `{"do": name, ...}`, and
answers each with one JSON line on stdout: `{"ok": ...}` or `{"error": traceback}`. When it serves, the first line on
stdout is `{"ok": {"port": n}}`. Its log is on stderr. It stops when stdin is closed, so it ends with its test.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import socket
import sqlite3
import sys
import traceback
import uuid as uuids
from datetime import datetime, timedelta, timezone
from pathlib import Path

SCRATCH = Path(sys.argv[1]).resolve()
PORT = int(sys.argv[2]) if len(sys.argv) > 2 else None
DATABASE = SCRATCH / "master.db"


def prepare_environment():
    """Must run before any import of decnet, because its modules read the environment, HOME included, at import."""
    for name in [name for name in os.environ if name.startswith("DECNET_")]:
        del os.environ[name]
    os.environ.update(
        HOME=str(SCRATCH),
        DECNET_TESTING="1",
        DECNET_CONFIG=str(SCRATCH / "no-decnet.ini"),
        DECNET_JWT_SECRET="j" * 40,
        DECNET_ADMIN_PASSWORD="p" * 40,
        DECNET_BUS_ENABLED="false",
    )
    os.chdir(SCRATCH)  # The master reads `.env` from its working directory.


def repository():
    """The master's repository, with the database in SCRATCH.

    `decnet.web.dependencies` creates the shared repository at import, by calling the factory without arguments. So the
    factory is replaced before that import, by one that adds the path.
    """
    from decnet.web.db import factory

    make = factory.get_repository
    factory.get_repository = lambda **kwargs: make(**{"db_path": str(DATABASE), **kwargs})
    from decnet.web import dependencies

    return dependencies.get_repo()


def listening_socket():
    """A socket on a port of 127.0.0.1 below 32768. The system assigns ports above it, so no other program gets the port
    while a test has stopped the master."""
    while True:
        # With an explicit protocol, as uvicorn's own socket. Otherwise asyncio does not disable Nagle's algorithm.
        listener = socket.socket(proto=socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", PORT or random.randrange(20000, 32000)))
            return listener
        except OSError:
            listener.close()
            if PORT:
                raise


class Recorder:
    """Records handshakes and answers between uvicorn and the master, and changes nothing."""

    def __init__(self):
        self.handshakes = []
        self.answers = []
        self.changed = asyncio.Condition()

    def protocol(self):
        from uvicorn.protocols.http.h11_impl import H11Protocol

        recorder = self

        class RecorderedProtocol(H11Protocol):
            def connection_made(self, transport):  # asyncio calls it after the handshake
                super().connection_made(transport)
                tls = transport.get_extra_info("ssl_object")
                certificate = tls.getpeercert(binary_form=True)
                recorder.handshakes.append({
                    "client_port": self.client[1],
                    "version": tls.version(),
                    "resumed": tls.session_reused,
                    "fingerprint": certificate and hashlib.sha256(certificate).hexdigest(),
                })

        return RecorderedProtocol

    def application(self, app):
        async def recorded(scope, receive, send):
            if scope["type"] != "http":
                return await app(scope, receive, send)
            user_agent = dict(scope["headers"]).get(b"user-agent", b"").decode("latin-1")
            answer = {"client_port": scope["client"][1], "path": scope["path"], "status": None, "user_agent": user_agent}

            async def recorded_send(message):
                if message["type"] == "http.response.start":
                    answer["status"] = message["status"]
                await send(message)

            try:
                await app(scope, receive, recorded_send)
            finally:
                async with self.changed:
                    self.answers.append(answer)
                    self.changed.notify_all()

        return recorded


class Commands:
    """Each method is a command. Its parameters are the keys of the request."""

    def __init__(self, repo, recorder, port):
        self.repo, self.recorder, self.port = repo, recorder, port
        self.last_started = datetime.min.replace(tzinfo=timezone.utc)

    async def enrol(self, name, dir, uuid=None):
        """Enrols a host with a new certificate. With the uuid of an enrolled host, that host is pinned to the new one."""
        issued = await self.issue(name, dir)
        pinned = {"client_cert_fingerprint": issued["fingerprint"], "cert_bundle_path": dir}
        if uuid and await self.repo.get_swarm_host_by_uuid(uuid):
            await self.repo.update_swarm_host(uuid, pinned)
        else:
            uuid = uuid or str(uuids.uuid4())
            await self.repo.add_swarm_host({"uuid": uuid, "name": name, "address": "127.0.0.1", **pinned})
        return {"uuid": uuid, **issued}

    async def issue(self, name, dir):
        """Writes a bundle of the same CA that is pinned to no host."""
        from decnet.swarm import pki

        issued = pki.issue_worker_cert(pki.ensure_ca(), name, ["127.0.0.1"])
        pki.write_worker_bundle(issued, Path(dir))
        return {"fingerprint": issued.fingerprint_sha256}

    async def decommission(self, uuid):
        return await self.repo.delete_swarm_host(uuid)

    async def open_lifecycle(self, decky, operation, uuid, status):
        # The master compares only this time, so it must differ between rows.
        self.last_started = max(datetime.now(timezone.utc), self.last_started + timedelta(microseconds=1))
        return await self.repo.create_lifecycle({
            "decky_name": decky, "operation": operation, "host_uuid": uuid, "status": status,
            "started_at": self.last_started,
        })

    async def add_topology(self, uuid):
        """Adds an active topology for that host in the way of `decnet`: it is planned, stored and deployed."""
        from decnet.topology import config, generator, persistence

        plan = generator.generate(config.TopologyConfig(
            name=f"test-{uuids.uuid4()}", mode="agent", depth=1, branching_factor=1, seed=1,
            randomize_services=False, services_explicit=["ssh"],
        ))
        id = await persistence.persist(self.repo, plan, target_host_uuid=uuid)
        for status in ("deploying", "active"):
            await persistence.transition_status(self.repo, id, status)
        return await self.topology(id)

    async def topology(self, id):
        """`hash` is the one that the host must report now."""
        from decnet.topology import hashing, persistence

        hydrated = await persistence.hydrate(self.repo, id)
        return {
            "id": id,
            "hash": hashing.canonical_hash(hydrated),
            "needs_resync": hydrated["topology"]["needs_resync"],
        }

    async def clear_resync(self, id):
        await self.repo.set_topology_resync(id, False)

    async def rows(self, table, where):
        condition = " AND ".join(f"{column} IS ?" for column in where) or "TRUE"
        with contextlib.closing(sqlite3.connect(DATABASE)) as database:
            database.row_factory = sqlite3.Row
            query = f"SELECT * FROM {table} WHERE {condition} ORDER BY rowid"
            return [dict(row) for row in database.execute(query, list(where.values()))]

    async def handshakes(self):
        return self.recorder.handshakes

    async def answers(self, at_least, timeout):
        """All answers, once there are `at_least` this many."""
        recorder = self.recorder
        async with recorder.changed:
            enough = recorder.changed.wait_for(lambda: len(recorder.answers) >= at_least)
            try:
                await asyncio.wait_for(enough, timeout)
            except TimeoutError:
                raise TimeoutError(f"waited {timeout} s for {at_least} answers, there are {recorder.answers}") from None
            return recorder.answers

    async def post(self, dir, body):
        """Posts a heartbeat with the Python agent's TLS."""
        import httpx
        from decnet.swarm.log_forwarder import build_worker_ssl_context

        async with httpx.AsyncClient(verify=build_worker_ssl_context(Path(dir)), trust_env=False) as client:
            headers = {"content-type": "application/json"}
            url = f"https://127.0.0.1:{self.port}/swarm/heartbeat"
            answer = await client.post(url, content=body, headers=headers)
            return {"status": answer.status_code, "body": answer.text}

    async def executor_status(self, state_file, docker_host):
        """The `status` that the Python agent would send."""
        import decnet.config
        from decnet.agent import executor

        os.environ["DOCKER_HOST"] = docker_host
        decnet.config.STATE_FILE = Path(state_file)
        return await executor.status()

    async def topology_state(self, db, docker_host):
        """The `topology` that the Python agent would send."""
        from decnet.agent import topology_ops, topology_store

        os.environ["DOCKER_HOST"] = docker_host
        with contextlib.closing(topology_store.TopologyStore(Path(db))) as store:
            return await asyncio.to_thread(topology_ops.state, store)

    async def put_topology(self, db, id, hash, error):
        """Writes topology.db as the Python agent does after it applied a topology and then failed."""
        from decnet.agent import topology_store

        with contextlib.closing(topology_store.TopologyStore(Path(db))) as store:
            store.put(id, hash, {})
            if error is not None:
                store.record_error(id, error)


async def main(answer):
    prepare_environment()
    repo, recorder, listener = repository(), Recorder(), listening_socket()

    import uvicorn
    from decnet.swarm import pki
    from decnet.web import swarm_api

    pki.ensure_ca()
    certificate, key, ca = pki.ensure_swarmctl_cert("127.0.0.1")
    port = listener.getsockname()[1]
    commands = Commands(repo, recorder, port)

    async def run_commands():
        requests = asyncio.StreamReader(limit=2**26)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
        answer({"ok": {"port": port}})
        async for line in requests:
            request = json.loads(line)
            do = request.pop("do")
            if do == "stop":
                break
            try:
                answer({"ok": await getattr(commands, do)(**request)})
            except Exception:
                answer({"error": traceback.format_exc()})

    class CommandServer(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            self.commands = asyncio.create_task(run_commands())
            self.commands.add_done_callback(lambda _: setattr(self, "should_exit", True))

    server = CommandServer(uvicorn.Config(
        recorder.application(swarm_api.app), http=recorder.protocol(), log_config=None, timeout_graceful_shutdown=2,
        ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=str(ca), ssl_cert_reqs=2,
    ))
    await server.serve(sockets=[listener])
    if server.commands.done():
        server.commands.result()  # Raises the exception that ended it, if any.


if __name__ == "__main__":
    # Only answers are written to stdout. Everything else that is printed goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(main(lambda value: print(json.dumps(value, default=str), file=answers, flush=True)))
