#!/bin/sh
# Migrate an SQLite database from the example scripts, and look at the lock while that happens.
# `make demo` runs this with the `msr` command in PATH. It takes about five seconds and leaves
# nothing behind. Exit code 0: everything went as it should.
set -eu

migrations=$(cd "$(dirname "$0")" && pwd)/migrations
folder=$(mktemp -d)
migrating=

finish() {
    if [ -n "$migrating" ]; then
        kill "$migrating" 2>/dev/null || true
        wait "$migrating" 2>/dev/null || true
    fi
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bold= plain=
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$(printf '\033[1m') plain=$(printf '\033[0m')
fi

say() { printf '\n%s%s%s\n' "$bold" "$1" "$plain"; }

fail() {
    printf '\nThe demonstration failed: %s\n' "$1" >&2
    exit 1
}

# Show a command, then run it.
run() {
    say "\$ $*"
    "$@"
}

# Nothing but these two settings, whatever the terminal has: no variables, no file.
for name in $(env | sed -n 's/^\(MSR_[A-Z_]*\)=.*/\1/p'); do unset "$name"; done
cd "$folder"
export MSR_URL=sqlite:///demo.db
export MSR_FOLDER="$migrations"
echo "MSR_URL=$MSR_URL (in a temporary folder), MSR_FOLDER=examples/migrations"

run msr list
run msr lock:status

say '$ msr migrate &'
msr migrate >migrate.log 2>&1 &
migrating=$!

# Until the slow script runs, in that other process.
tries=0
until status=$(msr lock:status) && printf '%s' "$status" | grep -q 'Running: V4_'; do
    kill -0 "$migrating" 2>/dev/null || { cat migrate.log; fail 'msr migrate ended too early'; }
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || fail 'the lock was never seen'
done
say "\$ msr lock:status    # while process $migrating migrates"
printf '%s\n' "$status"
printf '%s\n' "$status" | grep -q '^Lock Status: LOCKED$' || fail 'the lock is not held'
printf '%s\n' "$status" | grep -q "^Process ID: $migrating\$" || fail 'somebody else holds the lock'

say '$ msr migrate    # a second one, meanwhile: it waits, and then has nothing to do'
msr migrate

say "The first one, process $migrating, has written:"
wait "$migrating" && code=0 || code=$?
migrating=
cat migrate.log
[ "$code" -eq 0 ] || fail "msr migrate exited with $code"

run msr lock:status
msr lock:status | grep -q '^Lock Status: UNLOCKED$' || fail 'the lock was not released'
run msr list
msr list | grep -q '^5 scripts: 5 applied$' || fail 'not every script was applied'
