#!/usr/bin/env bash
# Writes the locks anew from the *.in files: newest versions, hashes of every artefact, no index address in them.
# Linux and CPython only; one lock serves all supported Python versions.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "scripts/lock.sh needs uv: pip install uv" >&2; exit 1; }
for name in runtime build dev; do
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --no-annotate --no-header "$@" "requirements/$name.in" -o "requirements/$name.txt"
    # The lock is for one platform: its marker on every line says nothing.
    sed -i "s/ ; implementation_name == 'cpython' and sys_platform == 'linux'//
            s/ and implementation_name == 'cpython' and sys_platform == 'linux'//" "requirements/$name.txt"
done
