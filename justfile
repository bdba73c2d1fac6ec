# Run these as ./just RECIPE: the wrapper makes .venv first and puts it on the PATH.

set positional-arguments

export PATH := justfile_directory() / ".venv/bin" + ":" + env("PATH")
engine_tree := justfile_directory() / ".engine-tree"

# what can be done here
default:
    @just --list --unsorted

# say what the system lacks; as root on Debian or Ubuntu, install it
setup:
    #!/bin/sh
    set -eu
    missing=""
    command -v c++ >/dev/null 2>&1 && c++ --version >/dev/null 2>&1 || missing="$missing g++"
    if [ "$(uname)" = Linux ]; then
        PATH="$PATH:/usr/sbin:/sbin"
        command -v git >/dev/null 2>&1 || missing="$missing git"
        command -v ip >/dev/null 2>&1 || missing="$missing iproute2"
        command -v nft >/dev/null 2>&1 || missing="$missing nftables"
        command -v avahi-daemon >/dev/null 2>&1 || missing="$missing avahi-daemon"
        command -v conntrack >/dev/null 2>&1 || missing="$missing conntrack"
        command -v turnserver >/dev/null 2>&1 || missing="$missing coturn"
        command -v nginx >/dev/null 2>&1 || missing="$missing nginx-light"
        command -v curl >/dev/null 2>&1 || missing="$missing curl"
        command -v miniupnpd >/dev/null 2>&1 || missing="$missing miniupnpd-nftables"
        # for the fuzzer of the engine only
        if ! command -v clang++ >/dev/null 2>&1 && ! ls /usr/bin/clang++-* >/dev/null 2>&1; then
            missing="$missing clang libclang-rt-dev"
        fi
    fi
    if [ -z "$missing" ]; then
        echo "nothing is missing"
    elif [ "$(uname)" = Darwin ]; then
        echo "missing: a C++ compiler; run: xcode-select --install"
        exit 1
    elif ! command -v apt-get >/dev/null 2>&1; then
        echo "missing:$missing (Debian's names); install them with the system's package manager"
        exit 1
    elif [ "$(id -u)" != 0 ]; then
        echo "missing:$missing; run: sudo apt-get install -y$missing"
        exit 1
    else
        apt-get update -qq </dev/null
        DEBIAN_FRONTEND=noninteractive apt-get install -yqq -o Dpkg::Use-Pty=0 --no-install-recommends $missing </dev/null
    fi

# build the engine, then see a model answer with its layers on two nodes
demo *args: build
    @mesh demo "$@"

# the demo, staying up on port 8090
local *args: build
    @mesh demo --stay "$@"

# end what `local` started
stop:
    @mesh demo --stop

# lend this machine: ./just worker [join=TOKEN] …
worker *args:
    @mesh worker "$@"

# serve a model: ./just serve [join=TOKEN] [--model FILE] …
serve *args:
    @mesh serve "$@"

# build the engine (5 to 8 minutes on two cores, at once when nothing changed)
build *args:
    @mesh engine build "$@"

# lay llama.cpp out as a git tree with one commit a patch
engine-edit tree=engine_tree:
    @mesh engine edit "$1"

# write an edited tree back as patches/llama.cpp
engine-export tree=engine_tree:
    @mesh engine export "$1"

# try the patches on another version of the source: ./just patches-try VERSION [--build]
patches-try version *args:
    @mesh engine try-patches "$@"

# all tests, and the coverage of the sans-IO modules; or only those named
test *args: build (build "--stock")
    #!/bin/sh
    set -eu
    if [ $# -gt 0 ]; then
        exec python -m pytest "$@"
    fi
    exec python -m tests.coverage_sansio

# a hundred orchestrators killed with kill -9: the worker's memory comes back each time
soak kills="100": build
    MESH_TEST_KILLS="$1" MESH_TEST_REQUIRE=engine python -m pytest -q tests/e2e/test_dying_nodes.py -k killed_orchestrators

# a million hostile inputs for every parser of bytes from outside: ./just fuzz [--write] [NAME…]
fuzz *args:
    @nice -n 10 python -m tests.fuzz "$@"

# kill -9 at every named point, on either side, N times each; --write: the figures go to docs/kills.md
kills *args: build
    @python -m tests.kills_table "$@"

# an answer under way through outages of full length: cable out 20 s, stopped or asleep 60 s, 32 flaps
outages *args: build
    MESH_TEST_ALL_OUTAGES=1 MESH_TEST_REQUIRE=engine,namespaces MESH_TEST_OUTAGE_S=20 MESH_TEST_STOPPED_S=60 MESH_TEST_FLAPS=32 \
        python -m pytest -q -s tests/netlab/test_outages.py tests/netlab/test_outages_on_the_way.py "$@"

# hostile sessions against the engine's server under sanitizers: ./just fuzz-engine [runs=N] [--write]
fuzz-engine *args:
    @nice -n 10 python -m tests.engine.fuzz.run "$@"

# llama.cpp's own test of operations, through a tunnel (half an hour): ./just engine-ops [--smallest] [--write]
engine-ops *args: build
    @nice -n 10 python -m tests.engine.ops.run "$@"

# the engine's tests under ASan with UBSan, and TSan: ./just engine-sanitize [--only thread] [--write]
engine-sanitize *args: build (build "--stock")
    @nice -n 10 python -m tests.engine.sanitizers.run "$@"

# style, types, layers, patches
check:
    ruff check
    ruff format --check
    mypy --strict
    python -m pytest -q tests/test_layering.py
    mesh engine check-patches

# what the continuous integration runs
ci:
    .ci/run

# what floods cost a node and what honest peers keep: ./just floods [--write] [NAME …]
floods *args:
    @python -m tests.bench.floods "$@"

# how gossip grows with the mesh, simulated to 1,000 nodes (some minutes): ./just gossip [--write]
gossip *args:
    @nice -n 10 python -m tests.bench.gossip "$@"

# speeds, as ratios to a baseline of the same run
bench *args: build (build "--stock")
    @python -m tests.bench "$@"

# every pair of networks, through every NAT: ./just netlab [--tries N] [--cells PATTERN …] [--write]
netlab *args:
    @python -m tests.netlab "$@"
