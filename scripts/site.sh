#!/usr/bin/env bash
# Build the documentation's site into build/site: open build/site/index.html. `site.sh serve` shows changes as they are
# made. Installs MkDocs into .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./scripts/setup.sh site
if [[ ${1:-} == serve ]]; then exec .venv/bin/mkdocs serve; fi
exec .venv/bin/mkdocs build --strict "$@"
