#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Shows chains/demo.json at work on real TCP: one transfer without it, one with it.
# Usage: tools/demo.sh POLICY_CHAIN TRANSFER (the two programs; `make demo` builds them)
set -eu

policy_chain=$1
transfer=$2
chain_file=chains/demo.json
megabytes=64
port=5201
window=256 # as chains/demo.json has it

testbed=demo-$$
bpffs=/sys/fs/bpf/policy-chain-$testbed
work=$(mktemp -d)
sender=

# Runs a command on a host of the testbed.
on() {
    host=$1
    shift
    "$policy_chain" testbed exec "$testbed" "$host" -- "$@"
}

# policy-chain on the router, with a folder of its own: chains of yours are left alone.
chain() {
    on router "$policy_chain" --bpffs "$bpffs" "$@"
}

clean_up() {
    status=$?
    trap - EXIT
    trap '' INT TERM HUP
    if [ -n "$sender" ]; then
        kill "$sender" 2>/dev/null || true
        wait "$sender" 2>/dev/null || true
    fi
    chain delete --all >/dev/null 2>&1 || true
    "$policy_chain" testbed down "$testbed" >/dev/null 2>&1 || true
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

fail() {
    printf 'demo: %s\n' "$1" >&2
    exit 1
}

# Sends from the server to the client; $1 names where the reports go.
transfer_once() {
    # Both programs append to the report.
    "$policy_chain" testbed exec "$testbed" server -- \
        "$transfer" send "$port" "$megabytes" >>"$work/$1" &
    sender=$!
    tries=0
    until grep -qs ready "$work/$1"; do
        kill -0 "$sender" 2>/dev/null || fail "the server did not start"
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || fail "the server is not ready after 10 s"
        sleep 0.1
    done
    on client "$transfer" receive 10.2.1.1 "$port" >>"$work/$1" || fail "the transfer failed"
    wait "$sender" || fail "the transfer failed"
    sender=
}

# The value of a report's line: value REPORT NAME
value() {
    sed -n "s/^$2=//p" "$work/$1"
}

row() {
    printf '%-34s%-36s%s\n' "$1" "$2" "$3"
}

# A window field and what it means with the scale of the connection.
window_text() {
    scale=$(value "$1" window_scale)
    last=$(value "$1" window_max)
    if [ "$(value "$1" window_min)" = "$last" ]; then
        printf '%s x %s = %s bytes' "$last" $((1 << scale)) $((last << scale))
    else
        printf 'up to %s x %s = %s bytes' "$last" $((1 << scale)) $((last << scale))
    fi
}

timestamps_text() {
    printf 'on %s of %s segments' "$(value "$1" with_timestamps)" "$(value "$1" segments)"
}

bytes_text() {
    printf '%s, every byte right' "$(value "$1" bytes)"
}

"$policy_chain" testbed up "$testbed" --router >/dev/null
# The router then computes the checksums of what it sends, and the server verifies them: a wrong
# edit cannot stay hidden, as it does between two hosts that share a kernel.
on router ethtool -K server1 tx off >/dev/null

cat <<END
Three hosts in network namespaces:   client  <-->  router  <-->  server
The server sends $megabytes MiB to the client, twice. In between, the router gets $chain_file:
of what the client sends, it removes the timestamps option and writes a small receive window.

END

transfer_once before
chain apply "$chain_file" >"$work/applied"
transfer_once after
chain list >"$work/list"
chain show demo >"$work/show"

row "WHAT ARRIVED AT THE SERVER" "BEFORE" "AFTER"
row "  client's receive window" "$(window_text before)" "$(window_text after)"
row "  timestamps option" "$(timestamps_text before)" "$(timestamps_text after)"
row "  options of the SYN" "$(value before syn_options)" "$(value after syn_options)"
row "  segments with a wrong checksum" "$(value before checksum_errors)" \
    "$(value after checksum_errors)"
echo "WHAT ARRIVED AT THE CLIENT"
row "  bytes" "$(bytes_text before)" "$(bytes_text after)"
row "  throughput" "$(value before mbit_s) Mbit/s" "$(value after mbit_s) Mbit/s"

printf '\n$ policy-chain list\n'
cat "$work/list"
printf '\n$ policy-chain show demo\n'
cat "$work/show"
echo

counted=$(awk '$1 == "demo" { print $(NF - 1) }' "$work/list")
total=$((megabytes * 1024 * 1024))
for report in before after; do
    [ "$(value $report bytes)" = "$total" ] || fail "not all bytes arrived"
    [ "$(value $report checksum_errors)" = 0 ] || fail "segments arrived with wrong checksums"
done
[ "$(value before with_timestamps)" -gt 0 ] || fail "there was no option to remove"
[ "$(value after with_timestamps)" = 0 ] || fail "the option was not removed"
[ "$(value after window_min)" = "$window" ] || fail "the window was not rewritten"
[ "$(value after window_max)" = "$window" ] || fail "the window was not always rewritten"
[ "$counted" -ge "$(value after segments)" ] || fail "the chain counted $counted packets only"
echo "All as it should be. The testbed and the chain are removed again."
