#!/bin/sh
# Creates the Python environment with the real master, unless it exists.
#
#   tests/e2e/setup.sh [FOLDER]        default: target/decnet-venv
#
# The tests use the default folder, or the Python interpreter in DECNET_PYTHON.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-$root/target/decnet-venv}
version=1.0.0

# Imports the dependencies of the master: an interrupted installation has their metadata, but not their code.
is_ready() {
    "$venv/bin/python" - "$version" >/dev/null 2>&1 <<'END'
import importlib.metadata, sys
import aiosqlite, decnet, greenlet, httpx, sqlalchemy.ext.asyncio, uvicorn
sys.exit(importlib.metadata.version("decnet") != sys.argv[1])
END
}

if ! is_ready; then
    echo "creating $venv with decnet $version"
    python3 -m venv --clear "$venv"
    # decnet 1.0.0 requires SQLAlchemy without its asyncio extra, and does not run with SQLAlchemy 2.1.
    "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        "decnet==$version" "sqlalchemy[asyncio]<2.1" greenlet
    is_ready || { echo "decnet $version was installed in $venv, but cannot be imported" >&2; exit 1; }
fi
