# Sourced by the launch scripts: sets $python, from the checkout's .venv if there is one, and makes dtrain importable.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v "${PYTHON:-python3}") || { echo "error: no Python: run launch/quickstart first" >&2 && exit 1; }
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
PATH=$(dirname "$python"):$PATH # mpirun may be in the same folder
export PATH
