# shellcheck shell=bash
# Power cuts of the lab while snapshots are taken. Sourced by scripts/soak.
# shellcheck source=common.sh disable=SC2154,SC2016

# In the lab, where everything of this is kept: on the disk that survives a power cut.
soak_home=/lab/soak/home

# Runs a line of shell in the lab, with catnap in its PATH.
in_lab() { "$root/scripts/lab" run -- PATH=/lab/bin:/bin:/usr/bin:/sbin CATNAP_HOME=$soak_home sh -c "$@" </dev/null; }

# powercut ROUNDS: the lab's own, so that no plug is pulled under somebody's work.
powercut() {
    local rounds=$1 round promised
    export CATNAP_LAB=${CATNAP_LAB:-$root/target/soak-lab}
    build_catnap
    build_kitten "$root/target/test-home"
    promised=$(mktemp)
    # shellcheck disable=SC2064 # the name is known now
    trap "rm -f '$promised'" EXIT
    if ! "$root/scripts/lab" status >/dev/null 2>&1; then
        "$root/scripts/lab" up --memory 4G
        # shellcheck disable=SC2064
        trap "rm -f '$promised'; '$root/scripts/lab' down" EXIT
    fi
    carry "$root/target/test-home" $soak_home
    in_lab 'catnap rm --force anna bella >/dev/null 2>&1; catnap run kitten --name anna --timeout 300 >/dev/null'
    for ((round = 1; round <= rounds; round++)); do
        take_until_the_power_goes "$round" "$promised"
        after_the_power_came_back "$round" "$promised"
    done
    say "$rounds power cuts: $(wc -l <"$promised") snapshots were promised, and all were kept"
}

# Notes the name of each snapshot as soon as catnap says that it is there.
take_until_the_power_goes() {
    local round=$1 promised=$2 seconds
    # shellcheck disable=SC2016 # the lab's shell expands it
    in_lab 'number=0
        while :; do
            for mode in live live crash; do
                number=$((number + 1))
                catnap exec anna -- sh -c "head -c 2000000 /dev/urandom >/tmp/noise" &&
                    catnap snapshot create anna@cut-$0-$number --mode $mode 2>/dev/null || exit
            done
        done' "$round" >>"$promised" 2>/dev/null &
    seconds=$((3 + RANDOM % 12)).$((RANDOM % 10))
    sleep "$seconds"
    "$root/scripts/lab" powercut 2>/dev/null
    wait $! || true
    say "round $round: the power went after $seconds s, $(wc -l <"$promised") snapshots are promised"
}

after_the_power_came_back() {
    local round=$1 promised=$2 last
    in_lab 'catnap snapshot verify >/dev/null' || die 1 "round $round: a snapshot is damaged"
    # On a slow host there may be none yet.
    in_lab 'catnap snapshot ls --json' | { grep -o '"anna@[^"]*"' || true; } | tr -d '"' | sort >"$promised.listed"
    sort "$promised" | comm -23 - "$promised.listed" | grep . && die 1 "round $round: a promised snapshot is gone"
    rm -f "$promised.listed"
    last=$(tail -n 1 "$promised")
    [ -z "$last" ] || in_lab 'catnap restore "$0" --name bella --timeout 300 >/dev/null &&
        catnap exec bella -- true && catnap rm --force bella >/dev/null' "$last" ||
        die 1 "round $round: $last does not come up"
    in_lab 'catnap start anna --timeout 300 >/dev/null && catnap exec anna -- sh -c "echo well >/root/note; sync"' ||
        die 1 "round $round: the machine does not start"
    # A new monitor sweeps beside its work.
    until_true 30 in_lab 'test -z "$(ls $CATNAP_HOME/data/staging)"' || die 1 "round $round: something half made stays"
}
