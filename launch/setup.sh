# Sourced by other scripts here: `set_up` creates .venv and installs dtrain in it, `set_up dev` adds the test tools.
# Sets $root (the checkout, which becomes the working directory) and $venv. If nothing changed, starts no Python.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
cd "$root"

# The root is included because scripts in .venv/bin contain absolute paths: if a checkout was moved or copied with its
# .venv, they would run the files of the old one.
stamp() { # stamp EXTRA
    printf 'root=%s\nextra=%s\n' "$root" "$1"
    cat pyproject.toml constraints.txt
}

is_installed() { # is_installed EXTRA; an installation with the dev tools includes the rest
    [ -x "$venv/bin/python" ] && [ -f "$venv/.dtrain-installed" ] || return 1
    stamp dev | cmp -s - "$venv/.dtrain-installed" && return 0
    [ -z "$1" ] && stamp "" | cmp -s - "$venv/.dtrain-installed"
}

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

set_up() { # set_up [dev]
    local extra=${1:-}
    if is_installed "$extra"; then return 0; fi
    lock_set_up
    if ! is_installed "$extra"; then # another set-up may have finished it while this one waited
        make_venv
        install "$extra"
    fi
    exec 9<&- # releases the lock
}

lock_set_up() {
    exec 9<"$root"
    command -v flock >/dev/null || return 0 # macOS has no flock; there the user must not run two set-ups in parallel
    local status=0
    flock --nonblock --conflict-exit-code 75 9 2>/dev/null || status=$?
    if [ "$status" = 75 ]; then # any other failure means that the file system has no locks
        echo "Another set-up of $venv is running. Waiting for it, up to an hour."
        flock --timeout 3600 9 || fail "The other set-up is still running after an hour. End it, then run this again."
    fi
}

is_supported() { # is_supported PYTHON
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() { # prints the first suitable Python
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python from 3.10 to 3.13: $("$PYTHON" --version 2>&1 || true)"
        echo "$PYTHON"
        return 0
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_supported "$candidate"; then echo "$candidate" && return 0; fi
    done
    fail "dtrain needs Python 3.10 to 3.13. python3 on this machine: $(python3 --version 2>&1 || true)." \
        "Install one of these versions, or name it: PYTHON=/path/to/python3.11 $0"
}

make_venv() {
    if [ -e "$venv" ] || [ -L "$venv" ]; then
        local maker=""
        if [ -f "$venv/.dtrain-made" ]; then maker=$(cat "$venv/.dtrain-made"); fi
        if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
            echo "$venv has no working Python, or no pip. Recreating it."
        elif [ -n "$maker" ] && [ "$maker" != "$root" ]; then
            echo "$venv was created for $maker. Recreating it."
        elif [ -n "$maker" ] && [ ! -f "$venv/.dtrain-installed" ]; then
            echo "An earlier set-up of $venv did not finish. Recreating it."
        elif ! is_supported "$venv/bin/python"; then
            fail "$venv has $("$venv/bin/python" --version), but dtrain needs Python 3.10 to 3.13. Move it away, then run this again."
        else
            return 0 # our own with older pins, or one that the user created: pip updates it
        fi
        rm -rf "$venv"
    fi
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null || fail \
        "$python cannot create virtual environments: its venv or ensurepip module is missing." \
        "On Debian and Ubuntu: apt install python3-venv. Or name another Python: PYTHON=/path/to/python3.11 $0"
    echo "Creating $venv with $("$python" --version)"
    mkdir "$venv"
    printf '%s\n' "$root" >"$venv/.dtrain-made"
    "$python" -m venv "$venv" || fail "$python -m venv $venv failed: see above."
}

install() { # install EXTRA
    announce_download
    rm -f "$venv/.dtrain-installed"
    # --use-pep517: an old pip (Debian 12's) builds seqeval with setup.py, which fails without its build requirements.
    "$venv/bin/python" -m pip install --disable-pip-version-check --use-pep517 -c constraints.txt -e ".${1:+[$1]}" || fail \
        "pip could not install dtrain: see above. Fix that, then run this again; it starts over."
    stamp "$1" >"$venv/.dtrain-installed.new"
    mv "$venv/.dtrain-installed.new" "$venv/.dtrain-installed"
}

announce_download() {
    if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
        echo "Updating $venv. torch is already installed."
    elif [ "$(uname -sm)" = "Linux x86_64" ]; then
        echo "pip now downloads up to 3.2 GB, once: PyPI's torch for Linux is the CUDA build, 2.7 GB with its CUDA packages."
        echo "With a CPU build of torch it is 0.7 GB. To use one, stop this (Ctrl-C) and run"
        echo "PIP_EXTRA_INDEX_URL=<the index of CPU wheels that PyTorch's installation page names> $0"
        echo "(If pip is already configured with such an index or a wheel folder, it uses the CPU build now.)"
    else
        echo "pip now downloads 0.5 to 1 GB, once."
    fi
}
