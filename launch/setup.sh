# Sourced by the scripts beside it: `set_up` makes .venv with dtrain in it, `set_up dev` with the test tools as well.
# Sets $root (the checkout, which becomes the working directory) and $venv. No pip and no Python where nothing changed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
cd "$root"

# The root is part of it because scripts in .venv/bin hold absolute paths: a checkout that was moved or copied with its
# .venv would run the old one's files.
stamp() { # stamp EXTRA
    printf 'root=%s\nextra=%s\n' "$root" "$1"
    cat pyproject.toml constraints.txt
}

is_installed() { # is_installed EXTRA; what has the dev tools has the rest as well
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
    if ! is_installed "$extra"; then # another set-up may have done it while this one waited
        make_venv
        install "$extra"
    fi
    exec 9<&- # ends the lock
}

lock_set_up() {
    exec 9<"$root"
    command -v flock >/dev/null || return 0 # not on macOS: there two set-ups at once are the user's to avoid
    local status=0
    flock --nonblock --conflict-exit-code 75 9 2>/dev/null || status=$?
    if [ "$status" = 75 ]; then # any other failure is a file system without locks
        echo "Another set-up of $venv is running: waiting for it, up to an hour."
        flock --timeout 3600 9 || fail "The other set-up still runs after an hour. End it, then run this again."
    fi
}

is_supported() { # is_supported PYTHON
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() { # prints the first Python that fits
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of 3.10 to 3.13: $("$PYTHON" --version 2>&1 || true)"
        echo "$PYTHON"
        return 0
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_supported "$candidate"; then echo "$candidate" && return 0; fi
    done
    fail "dtrain needs Python 3.10 to 3.13. python3 here: $(python3 --version 2>&1 || true)." \
        "Install one of these, or name it: PYTHON=/path/to/python3.11 $0"
}

make_venv() {
    if [ -e "$venv" ] || [ -L "$venv" ]; then
        local maker=""
        if [ -f "$venv/.dtrain-made" ]; then maker=$(cat "$venv/.dtrain-made"); fi
        if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
            echo "$venv has no Python that starts, or no pip: making it anew."
        elif [ -n "$maker" ] && [ "$maker" != "$root" ]; then
            echo "$venv was made for $maker: making it anew."
        elif [ -n "$maker" ] && [ ! -f "$venv/.dtrain-installed" ]; then
            echo "An earlier set-up of $venv did not end: making it anew."
        elif ! is_supported "$venv/bin/python"; then
            fail "$venv holds $("$venv/bin/python" --version), and dtrain needs Python 3.10 to 3.13. Move it away, then run this again."
        else
            return 0 # ours with older pins, or one that the user made: pip brings it up to date
        fi
        rm -rf "$venv"
    fi
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null || fail \
        "$python cannot make virtual environments: its venv or ensurepip module is missing." \
        "On Debian and Ubuntu: apt install python3-venv. Or name another Python: PYTHON=/path/to/python3.11 $0"
    echo "Making $venv with $("$python" --version)"
    mkdir "$venv"
    printf '%s\n' "$root" >"$venv/.dtrain-made"
    "$python" -m venv "$venv" || fail "$python -m venv $venv failed: see above."
}

install() { # install EXTRA
    announce_download
    rm -f "$venv/.dtrain-installed"
    # --use-pep517: an old pip (Debian 12's) builds seqeval by setup.py, which fails where its build needs are not there.
    "$venv/bin/python" -m pip install --disable-pip-version-check --use-pep517 -c constraints.txt -e ".${1:+[$1]}" || fail \
        "pip could not install dtrain: see above. Once that is mended, run this again; it begins anew."
    stamp "$1" >"$venv/.dtrain-installed.new"
    mv "$venv/.dtrain-installed.new" "$venv/.dtrain-installed"
}

announce_download() {
    if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
        echo "Bringing $venv up to date; torch is there already."
    elif [ "$(uname -sm)" = "Linux x86_64" ]; then
        echo "pip now downloads up to 3.2 GB, once: PyPI's torch for Linux is the CUDA build, 2.7 GB with its CUDA packages."
        echo "With a CPU build of torch it is 0.7 GB. To have one, stop this (Ctrl-C) and begin it with"
        echo "PIP_EXTRA_INDEX_URL=<the index of CPU wheels that PyTorch's installation page names> $0"
        echo "(If pip is set up with such an index or a wheel folder already, it takes the CPU build now.)"
    else
        echo "pip now downloads 0.5 to 1 GB, once."
    fi
}
