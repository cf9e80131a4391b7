#!/bin/sh
# Make or mend the virtual environment:  tools/setup.sh VENV EXTRAS STAMP
# Says nothing but one line before and one after; what pip said is in build/setup-EXTRAS.log.
set -eu
venv=$1 extras=$2 stamp=$3
oldest="3.11" newest="3.13"
log="build/setup-$(echo "$extras" | tr ',' '-').log"
mkdir -p build

fail() {
    echo "make: $*" >&2
    exit 1
}

# Prints "3.12 old|tested|new" for an interpreter that runs, nothing for one that does not.
look_at() {
    "$1" - 2>/dev/null <<PY || true
import sys
v = sys.version_info[:2]
old, new = (tuple(map(int, t.split("."))) for t in ("$oldest", "$newest"))
print("%d.%d" % v, "old" if v < old else "new" if v > new else "tested")
PY
}

# The user's own python3 comes first; a tested version comes before a newer, untested one.
find_python() {
    found="" later=""
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        seen=$(look_at "$candidate")
        case $seen in
            *tested) echo "$candidate"; return ;;
            *new) later=${later:-$candidate} ;;
            *old) found="$found $candidate is ${seen% old}," ;;
        esac
    done
    [ -n "$later" ] && { echo "$later"; return; }
    if [ -n "$found" ]; then
        fail "bpkit needs Python $oldest or newer, but$found and no newer one was found." \
             "Install Python $newest, or name one: make PYTHON=/path/to/python$newest"
    fi
    fail "no Python was found (looked for: ${PYTHON:-python3 python3.13 python3.12 python3.11 python})." \
         "Install Python $newest, or name one: make PYTHON=/path/to/python$newest"
}

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    if ! "$python" -c "import venv, ensurepip" 2>/dev/null; then
        fail "$python has no venv module. On Debian and Ubuntu: apt install python3-venv"
    fi
    "$python" -m venv "$venv" >"$log" 2>&1 || fail "$python could not make $venv (see $log)"
fi

version=$("$venv/bin/python" -c "import platform; print(platform.python_version())")
case $(look_at "$venv/bin/python") in
    *old) fail "$venv holds Python $version, but bpkit needs $oldest or newer: remove $venv and run make again" ;;
    *new) echo "Python $version is newer than those that bpkit is tested on ($oldest to $newest)." ;;
esac

echo "Setting up $venv (Python $version, $extras). The first time takes minutes. Log: $log"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e ".[$extras]" >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    if grep -qiE "NewConnectionError|ConnectTimeout|ReadTimeout|name resolution|Network is unreachable|getaddrinfo|ProxyError|from versions: none" "$log"; then
        fail "the Python package index cannot be reached: setting up needs the network once. Log: $log"
    fi
    if grep -qi "No space left" "$log"; then
        fail "the disk is full: the environment needs about 3 GB, and more with a GPU build of torch. Log: $log"
    fi
    fail "pip could not install what pyproject.toml asks for. Log: $log"
fi
mkdir -p "$(dirname "$stamp")"
: >"$stamp"
echo "Set up."
