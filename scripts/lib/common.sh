# shellcheck shell=bash
# What all scripts share: where things are, how to speak to people, how to find and install programs.
# Sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck disable=SC2034 # used by those who source this
target=$root/target/x86_64-unknown-linux-gnu

# Exit codes are those of catnap itself: 1 failed, 2 usage, 3 not found, 4 wrong state, 5 host unusable.
# Whether this is a folder that was packed to be carried about (scripts/lesson --bundle): nothing can be built or fetched.
bundled() { [ -e "$root/.bundle" ]; }
! bundled || PATH=$root/bin:$PATH

say() { printf '%s\n' "$*" >&2; }
die() {
    local code=$1
    shift
    say "${0##*/}: $*"
    exit "$code"
}

# Runs a command as root when that needs no password; fails otherwise.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@" 2>/dev/null
    fi
}

# need COMMAND=PACKAGE…: makes sure that the commands are there; installs their packages where it may.
need() {
    local packages
    # Debian keeps mke2fs and e2fsck where an ordinary user's PATH does not look.
    PATH=$PATH:/usr/sbin:/sbin
    # Twice, because apt may take a package away for one of another version: qemu-utils for qemu-system.
    for _ in 1 2; do
        mapfile -t packages < <(missing "$@")
        [ ${#packages[@]} -gt 0 ] || return 0
        say "installing ${packages[*]}"
        command -v apt-get >/dev/null || break
        apt_install "${packages[@]}" || break
    done
    mapfile -t packages < <(missing "$@")
    [ ${#packages[@]} -gt 0 ] || return 0
    die 5 "these packages are needed and could not be installed from here: ${packages[*]}
try: sudo apt-get install ${packages[*]}   (or what your distribution calls them)"
}

# missing PROGRAM=PACKAGE…: the packages of the programs that are not there.
missing() {
    local pair
    for pair in "$@"; do command -v "${pair%%=*}" >/dev/null || echo "${pair#*=}"; done
}

# Package lists may be missing or stale, as in a fresh container, so a second try follows an update.
apt_install() {
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends)
    as_root "${install[@]}" "$@" >/dev/null 2>&1 && return
    as_root apt-get update -qq >/dev/null && as_root "${install[@]}" "$@" >/dev/null
}

# The compiler and the C compiler that the bundled SQLite and zstd are built with.
need_cargo() {
    ! bundled || return 0
    PATH=$PATH:$HOME/.cargo/bin
    command -v cargo >/dev/null || die 5 "cargo is missing
try: https://rustup.rs, Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml") or newer"
    need cc=gcc ar=binutils
}

# Waits for a condition: until_true SECONDS COMMAND…
until_true() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.1
    done
}

port_taken() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# A TCP port that nobody listens on, below the range from which Linux hands out its own.
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        port_taken $port || break
    done
    echo $port
}

# free_ports COUNT: the first of so many in a row, from 8080 if they are free.
free_ports() {
    local first=8080 port
    while :; do
        for ((port = first; port < first + $1; port++)); do ! port_taken $port || break; done
        [ $port -lt $((first + $1)) ] || break
        first=$(free_port)
    done
    echo "$first"
}

# Builds the guest's program as build.rs does, in the folder that build.rs uses, so that neither does it twice.
build_guest() {
    ! bundled || return 0
    need_cargo
    (cd "$root" && cargo build --quiet --release --locked --manifest-path guest/Cargo.toml --target-dir target/guest) ||
        die 1 "the guest's program does not build"
}

# Builds catnap for release (and with it the guest's program, which it carries).
build_catnap() {
    ! bundled || return 0
    need_cargo
    (cd "$root" && cargo build --quiet --release --locked) || die 1 "catnap does not build"
}

# Where guests can run: sets `where` to `host` or `lab`, and says which and why. Only catnap itself can tell:
# /dev/kvm may be there and yet unable to run Linux. CATNAP_WHERE decides for those who know better.
choose_where() {
    where=${CATNAP_WHERE:-}
    case $where in
    host | lab)
        say "guests run in the $where, as CATNAP_WHERE says"
        return
        ;;
    "") ;;
    *) die 2 "CATNAP_WHERE is host or lab, not $where" ;;
    esac
    if "$target/release/catnap" doctor --kvm >/dev/null 2>&1; then
        where=host
        say "guests run on this machine: its KVM is fit for Linux"
    else
        where=lab
        say "guests run in the lab: this machine has no KVM that is fit for Linux"
    fi
}

# Runs a command where guests can run, with the same NAME=VALUE words in front in both places.
inside() {
    case $where in
    host) env "$@" ;;
    lab) "$root/scripts/lab" run -- "$@" ;;
    esac
}

# build_kitten HOME: makes the base image in a catnap home of this machine, once for each build of catnap.
# Always out here, where the distribution's packages can be had. A home keeps its download of them.
build_kitten() {
    local digest
    digest=$(sha256sum <"$target/release/catnap")
    [ "$(cat "$1/made-by" 2>/dev/null)" != "$digest" ] || return 0
    rm -rf "$1/data" "$1/made-by"
    mkdir -p "$1"
    CATNAP_HOME=$1 "$target/release/catnap" image build >/dev/null || die 1 "the kitten image could not be made"
    echo "$digest" >"$1/made-by"
}

# carry HOME FOLDER: takes catnap and the data of a home into the lab, unless the lab has this very build.
# The note of the build travels last, so that half a journey is not taken for a whole one.
carry() {
    local lab=$root/scripts/lab
    # shellcheck disable=SC2016 # the lab's shell expands it
    "$lab" run -- sh -c 'cat "$0/made-by" 2>/dev/null || true' "$2" </dev/null | cmp -s - "$1/made-by" && return
    say "carrying catnap and the image into the lab"
    "$lab" run -- rm -rf "$2" &&
        "$lab" push "$target/release/catnap" /lab/bin &&
        "$lab" push "$1/data" "$2" &&
        "$lab" push "$1/made-by" "$2"
}

# carry_registry FOLDER: takes a registry into the lab, to be run as FOLDER/registry. Unlike all else there it is
# linked dynamically, so its loader and library come along.
carry_registry() {
    local program files
    program=$(command -v docker-registry)
    mapfile -t files < <(ldd "$program" | sed -n 's/.* \(\/[^ ]*\) (.*/\1/p; s/^\s*\(\/[^ ]*\) (.*/\1/p')
    "$root/scripts/lab" push "$program" "${files[@]}" "$root/scripts/lib/registry" "$1"
}

# start_registry FOLDER: starts a registry on a free port of this machine's loopback, with all that it keeps in FOLDER.
# Sets registry_port and registry_pid.
start_registry() {
    registry_port=$(free_port)
    mkdir -p "$1"
    cat >"$1/config.yml" <<END
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: "$1/storage"}}
http: {addr: "127.0.0.1:$registry_port"}
END
    docker-registry serve "$1/config.yml" </dev/null >"$1/log" 2>&1 &
    # shellcheck disable=SC2034 # used by those who source this
    registry_pid=$!
    until_true 20 port_taken "$registry_port" || die 1 "docker-registry does not start: $(tail -n 3 "$1/log")"
}

# end_tree PID: ends a process of ours and all that it started.
end_tree() {
    local child
    # shellcheck disable=SC2013 # words are what is there
    for child in $(cat "/proc/$1/task/$1/children" 2>/dev/null); do end_tree "$child"; done
    kill -KILL "$1" 2>/dev/null || true
}
