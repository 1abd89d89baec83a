# shellcheck shell=bash
# The guest tests: built out here, run one by one where guests can run. Sourced by scripts/test.
#
# A guest test finds in its environment: CATNAP_BIN, the program under test, built for release; CATNAP_HOME, where the
# image `kitten` is; CATNAP_TEST_ROUNDS and CATNAP_TEST_MINIMAL_KERNEL when they were asked for (the latter is a folder
# that images/kernel/build has made: machines boot its kernel in place of the image's). It leaves no process behind, or it
# fails. CATNAP_TEST_REGISTRY is where a registry is to be found, HOST:PORT; it runs out here in any case, for in the lab
# it takes minutes.
# shellcheck source=common.sh disable=SC2154

# The longest that one test may take, in seconds. Emulation is slow, and CI machines are slower.
limit=${CATNAP_TEST_LIMIT:-600}

# The seconds after which no further guest test begins, so that a run in which much hangs still ends by itself and
# says what it saw. A run in which all is well needs a quarter of them, and on the slowest machine seen two thirds.
budget=${CATNAP_TEST_BUDGET:-$((6000 + limit * 2))}

# A lab of its own, so that no test cuts the power under somebody's work.
export CATNAP_LAB=${CATNAP_LAB:-$root/target/test-lab}

guest() {
    guest_ready
    guest_run "$1"
}

# Builds all that they need, and brings it to where guests can run. Sets guest_is_ready when that went well.
guest_ready() {
    local before
    test_files '^guest' >/dev/null || die 1 "there are no guest tests in tests/"
    before=${#failed[@]}
    step "build catnap" build_catnap
    step "build the guest tests" build_guest_tests
    [ ${#failed[@]} = "$before" ] || return 0
    step "make the kitten image" build_kitten "$root/target/test-home"
    [ ${#failed[@]} = "$before" ] || return 0
    choose_where
    need docker-registry=docker-registry
    rm -rf "$output/registry"
    start_registry "$output/registry"
    step "prepare the $where" "prepare_$where"
    [ ${#failed[@]} = "$before" ] || return 0
    guest_is_ready=1
}

guest_run() { [ -z "${guest_is_ready:-}" ] || run_guest_tests "$1"; }

# Builds the test programs and leaves each, stripped and with a short name, in target/test-output/bin. They
# share the unit tests' profile; only catnap itself is built for release.
build_guest_tests() {
    local options=() name file
    for name in $(test_files '^guest'); do options+=(--test "$name"); done
    in_crate catnap test --quiet --no-run "${options[@]}" --message-format=json >"$output/build.json" || return
    rm -rf "${output:?}/bin"
    mkdir -p "$output/bin"
    while read -r file; do
        name=${file##*/}
        strip -o "$output/bin/${name%-*}" "$file"
    done < <(sed -n 's/.*"executable":"\([^"]*\/deps\/guest[^"]*\)".*/\1/p' "$output/build.json")
}

prepare_host() {
    tests=$output/bin
    home=$root/target/test-home
    bin=$target/release/catnap
    registry=127.0.0.1:$registry_port
    minimal_kernel=${CATNAP_TEST_MINIMAL_KERNEL:-}
    cp "$root/scripts/lib/one-test" "$tests/"
}

prepare_lab() {
    tests=/lab/test/bin
    home=/lab/test/home
    bin=/lab/bin/catnap
    # This machine's loopback, as QEMU's network shows it.
    registry=10.0.2.2:$registry_port
    if ! "$root/scripts/lab" status >/dev/null 2>&1; then
        lab_is_ours=1
        # One of the tests boots a guest of 4 GiB.
        "$root/scripts/lab" up --memory 6G || return
        forget_store
    fi
    carry "$root/target/test-home" $home || return
    minimal_kernel=${CATNAP_TEST_MINIMAL_KERNEL:+/lab/test/kernel}
    [ -z "$minimal_kernel" ] ||
        "$root/scripts/lab" push "$CATNAP_TEST_MINIMAL_KERNEL"/{bzImage,vmlinux} "$minimal_kernel" || return
    "$root/scripts/lab" push "$output"/bin/* "$root/scripts/lib/one-test" $tests
}

# What a test that was cut short left in the lab's store must not meet the next one: it is carried there anew.
forget_store() { inside rm -f "$home/made-by" </dev/null; }

# A lab that was up before stays up; the registry goes.
leave_lab() {
    [ -z "${registry_pid:-}" ] || kill "$registry_pid" 2>/dev/null || true
    [ -z "${lab_is_ours:-}" ] || "$root/scripts/lab" down
}

run_guest_tests() {
    local filter=$1 program test passed=0 lost=0
    rm -rf "$output/guest"
    mkdir -p "$output/guest"
    for program in "$output"/bin/guest*; do
        program=${program##*/}
        for test in $(inside timeout 60 "$tests/$program" --list --format terse </dev/null | sed -n 's/: test$//p'); do
            [[ $program::$test = *"$filter"* ]] || continue
            # What only scripts/soak runs.
            [[ $test != soak_* || $filter = *soak_* ]] || continue
            if [ $SECONDS -lt "$budget" ]; then
                counted "$program::$test" guest_test "$program" "$test"
            else
                failed+=("$program::$test, not begun: $((budget / 60)) minutes are over")
                lost=$((lost + 1))
            fi
        done
    done
    # They restart the whole host, and bring up another, so only one that is emulated will do. The second is for who
    # asks for it: it needs twice the memory.
    for test in host-restart-test two-hosts-test; do
        [[ $where = lab && $test = *"$filter"* ]] || continue
        [[ $test != two-hosts-test || -n $filter ]] || continue
        counted $test kept $test "$root/scripts/lib/$test" "$bin" "$home" "$registry"
    done
    if [[ browser-test = *"$filter"* ]]; then
        counted browser-test kept browser-test browser_test
    fi
    [ $lost = 0 ] || keep_logs
    [ ${#again[@]} = 0 ] || printf 'needed another try: %s\n' "${again[@]}" >&2
    say "── guest tests in the $where$(emulated_by): $passed passed, $lost failed"
    [ $((passed + lost)) -gt 0 ] || die 1 "no guest test has $filter in its name"
}

# kept NAME COMMAND…: what it says is shown, and kept where the logs of guest tests are.
kept() {
    local log=$output/guest/$1.log
    shift
    "$@" > >(tee "$log" >&2) 2>&1
}

# last_words TEST…: the heart of what guest tests that failed have said, for who sees no more than the end of it all.
last_words() {
    local test
    for test in "$@"; do
        [ -e "$output/guest/$test.log" ] || continue
        say "── $test said"
        { grep -A 4 'panicked at\|^error\|^one-test\|-test: ' "$output/guest/$test.log" || true; } | cut -c 1-300 | head -n 16 >&2
    done
}

# With what the lab is emulated, for the faults of one version are not those of another.
emulated_by() {
    [ "$where" = lab ] || return 0
    # shellcheck source=lab-files.sh
    (. "$root/scripts/lib/lab-files.sh" && emulator_version)
}

# counted NAME COMMAND…: a step that counts as one test of run_guest_tests.
counted() {
    local before=${#failed[@]}
    step "$@"
    if [ ${#failed[@]} = "$before" ]; then passed=$((passed + 1)); else lost=$((lost + 1)); fi
}

# guest_test PROGRAM TEST: passes when the runner says that exactly this one test passed. Five things that were seen in
# the lab alone give a test another try, two at most, and are said at the end: the lab as a whole hangs, it restarts by
# itself, a guest ends with a triple fault, a guest's kernel finds that one of its CPUs stands still, or nothing moves
# until the time is over. All of them are what a QEMU does that is not mended (mend_emulator in lab-files.sh tells why);
# with one that is, twice, none has been seen. one-test writes down what every thread waited for. On a host's own KVM
# there is one try.
guest_test() {
    local log="$output/guest/$1::$2.log" code excuse try
    for try in 1 2 3; do
        code=0
        try_guest_test "$1" "$2" "$log" || code=$?
        [ $code = 0 ] && grep -q '^test result: ok. 1 passed' "$log" && return
        excuse=
        [ "$where" = host ] || [ $try = 3 ] || excuse=$(excuse $code "$log")
        [ -n "$excuse" ] || break
        say "   $excuse: the test begins again"
        again+=("$2")
        cp "$log" "$log.$try"
        if [ $code = $hung ]; then
            "$root/scripts/lab" powercut && forget_store && carry "$root/target/test-home" "$home" || return
        fi
    done
    tail -n 40 "$log" >&2
    say "   all of it: ${log#"$root/"}"
    return 1
}

# One more try, as guest tests have it, when a guest's emulated CPU shut down, or the guest's kernel found that one stands
# still.
browser_test() {
    local dashboard=$output/dashboard
    "$root/scripts/lib/browser-test" "$where" "$bin" "$home" && return
    [ "$where" = lab ] && grep -qrs "$shut_down\\|$stands_still" "$dashboard/ps.log" "$dashboard/logs" || return
    say "   the emulated CPU of a guest shut down or stands still; the test begins again"
    again+=(browser-test)
    "$root/scripts/lib/browser-test" "$where" "$bin" "$home"
}

# What the monitor says of a guest whose CPU shut down, and a guest's kernel of one that stands still.
shut_down='triple fault'
stands_still='soft lockup\|detected stalls\|to wakeup CPU'

# excuse CODE LOG: what the emulation can have done to a test that failed with this code; nothing when that was the test's.
excuse() {
    if [ "$1" = $hung ]; then
        echo "the lab hangs or has restarted by itself, and its power is cut"
    elif grep -q "$shut_down" "$2"; then
        echo "a guest's emulated CPU shut down"
    elif grep -q "$stands_still" "$2"; then
        echo "a guest's emulated CPU stands still"
    elif grep -q 'ended by force' "$2"; then
        echo "nothing moved any more"
    fi
}

# What try_guest_test returns when the lab hung, and the tests that had another try, once for each.
hung=75
again=()

try_guest_test() {
    local wishes=() silent=0 test begin=$SECONDS boot
    boot=$(boot_of_place)
    [ -n "$boot" ] || return $hung
    [ -z "${CATNAP_TEST_ROUNDS:-}" ] || wishes+=(CATNAP_TEST_ROUNDS="$CATNAP_TEST_ROUNDS")
    [ -z "$minimal_kernel" ] || wishes+=(CATNAP_TEST_MINIMAL_KERNEL="$minimal_kernel")
    wishes+=(CATNAP_TEST_REGISTRY="$registry")
    inside CATNAP_BIN="$bin" CATNAP_HOME="$home" "${wishes[@]}" "$tests/one-test" "$limit" "$tests/$1" "$2" \
        </dev/null >"$3" 2>&1 &
    test=$!
    while ! ended_within 15 $test; do
        case $(boot_of_place) in
        "$boot") silent=0 ;;
        "") silent=$((silent + 1)) ;;
        *) silent=4 ;; # another boot: nobody over there knows of the test any more
        esac
        # The test's own limit is kept by a timer over there; where that does not ring, this one does.
        if [ $silent -ge 4 ] || [ $((SECONDS - begin)) -gt $((limit + 60)) ]; then
            end_tree $test
            return $hung
        fi
    done
    wait $test
}

# ended_within SECONDS PID
ended_within() {
    local left=$(($1 * 5))
    while [ $left -gt 0 ]; do
        kill -0 "$2" 2>/dev/null || return 0
        sleep 0.2
        left=$((left - 1))
    done
    return 1
}

# What tells one boot of the place where guests run from the next; nothing when it does not answer.
boot_of_place() {
    [ "$where" = lab ] || { echo host && return; }
    timeout -s KILL 20 "$root/scripts/lab" run -- cat /proc/sys/kernel/random/boot_id </dev/null 2>/dev/null || true
}

# What the machines of failed tests said, before the lab goes down.
keep_logs() {
    inside timeout 60 tar -C "$home/state" -cf - logs </dev/null 2>/dev/null | tar -C "$output" -xf - 2>/dev/null || return 0
    say "   the machines' logs: target/test-output/logs"
}
