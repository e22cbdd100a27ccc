#!/bin/sh
# Makes the Python environment with the real master, or does nothing where it is there already.
#
#   tests/e2e/setup.sh [FOLDER]        default: target/decnet-venv
#
# The tests look for it there, or where DECNET_PYTHON points (its python, not its folder).
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-$root/target/decnet-venv}
version=1.0.0

# Imports what the master needs, as an install that was interrupted leaves metadata without the code.
is_ready() {
    "$venv/bin/python" - "$version" >/dev/null 2>&1 <<'END'
import importlib.metadata, sys
import aiosqlite, decnet, greenlet, httpx, sqlalchemy.ext.asyncio, uvicorn
sys.exit(importlib.metadata.version("decnet") != sys.argv[1])
END
}

if ! is_ready; then
    echo "making $venv with decnet $version"
    python3 -m venv --clear "$venv"
    # decnet 1.0.0 asks for SQLAlchemy without its asyncio extra, and does not run on SQLAlchemy 2.1.
    "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        "decnet==$version" "sqlalchemy[asyncio]<2.1" greenlet
    is_ready || { echo "decnet $version was installed in $venv, and cannot be imported" >&2; exit 1; }
fi
