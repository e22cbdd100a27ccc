"""Runs the real DECNET master for the tests, and does to it what an operator or its database would.

    master.py SCRATCH [PORT]

Everything that the master keeps (CA, database) lives under SCRATCH; started again there, it is the same master. It
serves heartbeats over mTLS on 127.0.0.1, on PORT or on one that it picks. It takes commands as JSON lines on stdin,
`{"do": name, ...}`, and answers each with one JSON line on stdout: `{"ok": ...}` or `{"error": traceback}`. The first
line on stdout is `{"ok": {"port": n}}`, once it serves. Logs go to stderr. The end of stdin stops it, so that no master
outlives its test.
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
    """Must run before anything of decnet is imported: its modules read the environment, and HOME, at import."""
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
    os.chdir(SCRATCH)  # It reads `.env` from where it stands.


def repository():
    """The master's repository, on a database of our own.

    `decnet.web.dependencies` makes the repository that everything shares while it is being imported, by calling the
    factory without arguments. So the factory is what gets our path, before that import.
    """
    from decnet.web.db import factory

    make = factory.get_repository
    factory.get_repository = lambda **kwargs: make(**{"db_path": str(DATABASE), **kwargs})
    from decnet.web import dependencies

    return dependencies.get_repo()


def listening_socket():
    """A port of 127.0.0.1 outside the range from which systems take ephemeral ports (32768 and up), so that no one else
    is given it while a test has the master away."""
    while True:
        # With the protocol named, as uvicorn's own: asyncio turns Nagle's algorithm off for no other socket.
        listener = socket.socket(proto=socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", PORT or random.randrange(20000, 32000)))
            return listener
        except OSError:
            listener.close()
            if PORT:
                raise


class Watch:
    """Sees what passes between uvicorn and the master, and changes none of it."""

    def __init__(self):
        self.handshakes = []
        self.answers = []
        self.news = asyncio.Condition()

    def protocol(self):
        from uvicorn.protocols.http.h11_impl import H11Protocol

        watch = self

        class WatchedProtocol(H11Protocol):
            def connection_made(self, transport):  # asyncio calls it when the handshake is done
                super().connection_made(transport)
                tls = transport.get_extra_info("ssl_object")
                certificate = tls.getpeercert(binary_form=True)
                watch.handshakes.append({
                    "client_port": self.client[1],
                    "version": tls.version(),
                    "resumed": tls.session_reused,
                    "fingerprint": certificate and hashlib.sha256(certificate).hexdigest(),
                })

        return WatchedProtocol

    def application(self, app):
        async def watched(scope, receive, send):
            if scope["type"] != "http":
                return await app(scope, receive, send)
            user_agent = dict(scope["headers"]).get(b"user-agent", b"").decode("latin-1")
            answer = {"client_port": scope["client"][1], "path": scope["path"], "status": None, "user_agent": user_agent}

            async def watched_send(message):
                if message["type"] == "http.response.start":
                    answer["status"] = message["status"]
                await send(message)

            try:
                await app(scope, receive, watched_send)
            finally:
                async with self.news:
                    self.answers.append(answer)
                    self.news.notify_all()

        return watched


class Commands:
    """Each method is a command; its parameters are the keys of the request."""

    def __init__(self, repo, watch, port):
        self.repo, self.watch, self.port = repo, watch, port
        self.last_started = datetime.min.replace(tzinfo=timezone.utc)

    async def enrol(self, name, dir, uuid=None):
        """A host with a new certificate. With the uuid of an enrolled host: that host is pinned to the new one."""
        issued = await self.issue(name, dir)
        pinned = {"client_cert_fingerprint": issued["fingerprint"], "cert_bundle_path": dir}
        if uuid and await self.repo.get_swarm_host_by_uuid(uuid):
            await self.repo.update_swarm_host(uuid, pinned)
        else:
            uuid = uuid or str(uuids.uuid4())
            await self.repo.add_swarm_host({"uuid": uuid, "name": name, "address": "127.0.0.1", **pinned})
        return {"uuid": uuid, **issued}

    async def issue(self, name, dir):
        """A bundle of the same CA that no host is pinned to."""
        from decnet.swarm import pki

        issued = pki.issue_worker_cert(pki.ensure_ca(), name, ["127.0.0.1"])
        pki.write_worker_bundle(issued, Path(dir))
        return {"fingerprint": issued.fingerprint_sha256}

    async def decommission(self, uuid):
        return await self.repo.delete_swarm_host(uuid)

    async def open_lifecycle(self, decky, operation, uuid, status):
        # "Newest" is by this time alone, so no two rows may share it.
        self.last_started = max(datetime.now(timezone.utc), self.last_started + timedelta(microseconds=1))
        return await self.repo.create_lifecycle({
            "decky_name": decky, "operation": operation, "host_uuid": uuid, "status": status,
            "started_at": self.last_started,
        })

    async def add_topology(self, uuid):
        """An active topology for that host, made as `decnet` makes one: planned, stored, deployed."""
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
        """`hash` is what the master wants to hear from the host, as things stand."""
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
        return self.watch.handshakes

    async def answers(self, at_least, timeout):
        """What was answered so far, once that is `at_least` so many."""
        watch = self.watch
        async with watch.news:
            enough = watch.news.wait_for(lambda: len(watch.answers) >= at_least)
            try:
                await asyncio.wait_for(enough, timeout)
            except TimeoutError:
                raise TimeoutError(f"waited {timeout} s for {at_least} answers, there are {watch.answers}") from None
            return watch.answers

    async def post(self, dir, body):
        """A heartbeat with the original agent's own TLS: what it sends, and what it is told."""
        import httpx
        from decnet.swarm.log_forwarder import build_worker_ssl_context

        async with httpx.AsyncClient(verify=build_worker_ssl_context(Path(dir)), trust_env=False) as client:
            headers = {"content-type": "application/json"}
            url = f"https://127.0.0.1:{self.port}/swarm/heartbeat"
            answer = await client.post(url, content=body, headers=headers)
            return {"status": answer.status_code, "body": answer.text}

    async def executor_status(self, state_file, docker_host):
        """What the original agent would send as `status`."""
        import decnet.config
        from decnet.agent import executor

        os.environ["DOCKER_HOST"] = docker_host
        decnet.config.STATE_FILE = Path(state_file)
        return await executor.status()

    async def topology_state(self, db, docker_host):
        """What the original agent would send as `topology`."""
        from decnet.agent import topology_ops, topology_store

        os.environ["DOCKER_HOST"] = docker_host
        with contextlib.closing(topology_store.TopologyStore(Path(db))) as store:
            return await asyncio.to_thread(topology_ops.state, store)

    async def put_topology(self, db, id, hash, error):
        """Writes topology.db as the original agent does after it applied a topology, and then failed at it."""
        from decnet.agent import topology_store

        with contextlib.closing(topology_store.TopologyStore(Path(db))) as store:
            store.put(id, hash, {})
            if error is not None:
                store.record_error(id, error)


async def main(answer):
    prepare_environment()
    repo, watch, listener = repository(), Watch(), listening_socket()

    import uvicorn
    from decnet.swarm import pki
    from decnet.web import swarm_api

    pki.ensure_ca()
    certificate, key, ca = pki.ensure_swarmctl_cert("127.0.0.1")
    port = listener.getsockname()[1]
    commands = Commands(repo, watch, port)

    async def obey():
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

    class ObedientServer(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            self.obeying = asyncio.create_task(obey())
            self.obeying.add_done_callback(lambda _: setattr(self, "should_exit", True))

    server = ObedientServer(uvicorn.Config(
        watch.application(swarm_api.app), http=watch.protocol(), log_config=None, timeout_graceful_shutdown=2,
        ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=str(ca), ssl_cert_reqs=2,
    ))
    await server.serve(sockets=[listener])
    if server.obeying.done():
        server.obeying.result()  # raises what ended it, if anything did


if __name__ == "__main__":
    # Answers have stdout to themselves; whatever else is printed goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(main(lambda value: print(json.dumps(value, default=str), file=answers, flush=True)))
