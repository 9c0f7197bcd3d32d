#!/usr/bin/env bash
# Migrations over an emulated wide-area link that is cut again and again. Linux, root, iproute2, jq, a C compiler.
#
#   SEALANE_WAN_TOOL=PATH tests/wan/run.sh [NAME=VALUE ...]
#
# The tool makes two network namespaces, sea-a (10.77.0.1) and sea-b (10.77.0.2), with a link between them:
#   TOOL run rate_mbit=N delay_ms=N loss_pct=N -- COMMAND      TOOL cut SECONDS
# A gateway runs in each. One guest moves back and forth, and must never miss a heartbeat, run twice or stay behind.
# SEALANE_BIN is the program; without it target/release/sealane, which is built when it is missing.
#
#   migrations=20    how many
#   cuts=10          most cuts of one migration, at least one; 0 for none
#   seconds=5,30,120 how long cuts last
#   seed=1           repeats the choices
#   guest=kvm        or synthetic, which has no console: heartbeats are not compared then
#   memory=64MiB working_set=6MiB dirty_rate=8MiB/s vcpus=2
#   slow=512KiB/s    bandwidth while cuts are made during rounds
#   max_downtime=5s  longest pause wanted: shorter than the working set takes at the slow bandwidth, longer than without
#   rate_mbit=1000 delay_ms=25 loss_pct=0.1
#
# Exits with 0 when every migration completed and nothing was violated, with 1 otherwise, with 2 on misuse.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

declare -A set_to=(
  [migrations]=20 [cuts]=10 [seconds]=5,30,120 [seed]=1 [guest]=kvm [memory]=64MiB [working_set]=6MiB
  [dirty_rate]=8MiB/s [vcpus]=2 [slow]=512KiB/s [max_downtime]=5s [rate_mbit]=1000 [delay_ms]=25 [loss_pct]=0.1
)

misuse() {
  echo "run.sh: $*" >&2
  exit 2
}

for argument in "$@"; do
  name=${argument%%=*}
  [[ $argument == *=* && -n ${set_to[$name]+known} ]] || misuse "unknown setting \`$argument\`"
  set_to[$name]=${argument#*=}
done
for name in migrations cuts seed; do
  [[ ${set_to[$name]} =~ ^[0-9]+$ ]] || misuse "$name is a number"
done
[[ ${set_to[seconds]} =~ ^[0-9]+(,[0-9]+)*$ ]] || misuse "seconds is a list like 5,30,120"
case ${set_to[guest]} in
kvm) payload=heartbeat ;;
synthetic) payload=synthetic ;;
*) misuse "guest is kvm or synthetic" ;;
esac

tool=${SEALANE_WAN_TOOL:-}
[ -n "$tool" ] || misuse "SEALANE_WAN_TOOL names no tool"
bin=${SEALANE_BIN:-$repository/target/release/sealane}

# Outside of the link: look for what is needed, then start again inside.
if [ -z "${SEALANE_WAN_INSIDE:-}" ]; then
  [ "$(id -u)" -eq 0 ] || misuse "network namespaces need root"
  for command in ip jq cc; do
    command -v "$command" >/dev/null || misuse "\`$command\` is not installed"
  done
  if [ ! -x "$bin" ]; then
    [ -z "${SEALANE_BIN:-}" ] || misuse "no program at \`$bin\`"
    (cd "$repository" && cargo build --release --locked)
  fi
  SEALANE_WAN_INSIDE=1 exec bash "$tool" run "rate_mbit=${set_to[rate_mbit]}" "delay_ms=${set_to[delay_ms]}" \
    "loss_pct=${set_to[loss_pct]}" -- bash "${BASH_SOURCE[0]}" "$@"
fi

RANDOM=${set_to[seed]}
IFS=, read -r -a lengths <<<"${set_to[seconds]}"
# In the order in which a migration meets them.
moments=(offered rounds paused prepared commit run)
lab=$(mktemp -d "${TMPDIR:-/tmp}/sealane-wan.XXXXXX")
vm=vm-1
uuid=00000000-0000-4000-8000-000000000001
violations=0

violation() {
  echo "VIOLATION: $*"
  violations=$((violations + 1))
}

# Everything of this lab names its directory on its command line.
ours() {
  local process
  for process in /proc/[0-9]*; do
    if tr '\0' ' ' 2>/dev/null <"$process/cmdline" | grep -qF -- "$lab/"; then
      basename "$process"
    fi
  done
}

clean_up() {
  local pid
  for pid in $(ours); do
    kill -KILL "$pid" 2>/dev/null || true
  done
  wait 2>/dev/null || true
  if [ "$violations" -eq 0 ]; then
    rm -rf "$lab"
  else
    echo "kept for a look: $lab"
  fi
}
trap clean_up EXIT

other() { if [ "$1" = gw-a ]; then echo gw-b; else echo gw-a; fi; }
sealane() { # sealane GATEWAY COMMAND...: a command for a gateway, as JSON
  "$bin" "${@:2}" --config "$lab/$1/gateway.toml" --json 2>>"$lab/commands.log"
}

# --- the lab -------------------------------------------------------------------------------------------------------------

configure() { # configure GATEWAY SITE ADDRESS, PEER SITE ADDRESS, more of the VM
  mkdir -p "$lab/$1/policy.d" "$lab/$1/state" "$lab/$1/audit" "$lab/$1/run"
  "$bin" pki issue "$lab/pki" --gateway "$1" --site "$2" >>"$lab/commands.log" 2>&1
  cat >"$lab/$1/gateway.toml" <<END
[gateway]
name = "$1"
site = "$2"
listen = "$3:4433"
control_socket = "run/api.sock"
state_directory = "state"
audit_directory = "audit"
runtime_directory = "run"

[identity]
certificate = "../pki/$1-cert.pem"
key = "../pki/$1-key.pem"
signing_key = "../pki/$1-signing-key.pem"

[[identity.trust]]
domain = "wan.sealane.invalid"
roots = "../pki/ca-cert.pem"
crls = ["../pki/crl.pem"]

[policy]
directory = "policy.d"

[migration]
max_downtime = "${set_to[max_downtime]}"
timeout = "12h"

[[peer]]
name = "$4"
site = "$5"
address = "$6:4433"
spiffe = "spiffe://wan.sealane.invalid/gateway/$4"

[[vm]]
name = "$vm"
uuid = "$uuid"
${7:-}
tenant = "lab"
classification = "internal"
home_site = "site-a"
allowed_sites = ["site-a", "site-b"]
migratable = true

[incoming]
command = ["$bin", "vmm", "run", "--incoming", "--socket", "{socket}", "--serial", "{serial}"]
max_memory = "64GiB"
END
  cat >"$lab/$1/policy.d/lab.cedar" <<'END'
@id("operators-may-ask")
permit (principal, action == Sealane::Action::"request", resource)
when { resource.tenant == "lab" };

@id("gateways-may-move")
permit (
  principal is Sealane::Gateway,
  action in [Sealane::Action::"release", Sealane::Action::"accept", Sealane::Action::"commit"],
  resource
)
when {
  principal.trustDomain == "wan.sealane.invalid" &&
  resource.allowedSites.contains(context.route.dstSite) &&
  context.channel.crlFresh
};
END
}

until_true() { # until_true WHAT COMMAND...: at most two minutes
  local what=$1 tries=1200
  shift
  until "$@"; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || { echo "run.sh: waited in vain for $what" >&2; return 1; }
    sleep 0.1
  done
}

answers() { sealane "$1" status >/dev/null; }
state_at() { sealane "$1" vms | jq -r ".vms[] | select(.name == \"$vm\") | .state"; }
runs_at() { [ "$(state_at "$1")" = running ]; }
runs_anywhere() { runs_at gw-a || runs_at gw-b; }
is_gone_from() { [ "$(state_at "$1")" = gone ]; }

start_lab() {
  "$bin" pki init "$lab/pki" --trust-domain wan.sealane.invalid >>"$lab/commands.log" 2>&1
  configure gw-a site-a 10.77.0.1 gw-b site-b 10.77.0.2 'socket = "run/guest.sock"'
  configure gw-b site-b 10.77.0.2 gw-a site-a 10.77.0.1
  ip netns exec sea-a "$bin" vmm run --payload "$payload" --uuid "$uuid" --memory "${set_to[memory]}" --vcpus "${set_to[vcpus]}" \
    --working-set "${set_to[working_set]}" --dirty-rate "${set_to[dirty_rate]}" --socket "$lab/gw-a/run/guest.sock" \
    --serial "$lab/gw-a/run/$vm.serial" >"$lab/guest.log" 2>&1 &
  until_true "a guest" test -S "$lab/gw-a/run/guest.sock"
  local side
  for side in a b; do
    ip netns exec "sea-$side" env SEALANE_LOG=sealane=debug "$bin" gateway --config "$lab/gw-$side/gateway.toml" \
      >"$lab/gw-$side/gateway.log" 2>&1 &
    until_true "gateway gw-$side" answers "gw-$side"
  done
  until_true "a running guest" runs_at gw-a
}

# --- one migration -------------------------------------------------------------------------------------------------------

log_of() { cat "$lab/$1"/audit/audit-*.jsonl; }
written_since() { # written_since GATEWAY BYTES TEXT
  log_of "$1" | tail -c "+$(($2 + 1))" | grep -qF -- "$3"
}
active() { sealane "$from" status | jq -c 'first(.migrations[] | select(.state == "active")) // empty'; }

# Whether the migration from $from to $to has come so far; $from_log and $to_log are where its audit entries begin.
has_reached() {
  case $1 in
  offered) written_since "$to" "$to_log" '"action":"accept"' ;;
  rounds) [ "$(active | jq -r '.progress | .phase == "memory" and .wire_bytes > 0')" = true ] ;;
  paused) active | jq -e '.progress.phase | IN("switchover", "verify")' >/dev/null ;;
  prepared | run) written_since "$to" "$to_log" "\"record\":\"$1\"" ;;
  commit) written_since "$from" "$from_log" '"record":"commit"' ;;
  esac
}

# Waits for a moment; fails when the migration has ended before.
reaches() {
  until has_reached "$1"; do
    kill -0 "$command" 2>/dev/null || return 1
    sleep 0.005
  done
}

# Ends the limit that keeps a migration in rounds.
faster() {
  local id=''
  while [ -z "$id" ] && kill -0 "$command" 2>/dev/null; do
    id=$(active | jq -r .id)
  done
  [ -z "$id" ] || sealane "$from" set "$id" bandwidth=100GiB/s >/dev/null || true
}

# Lines `MOMENT SECONDS` in the order in which they can be met.
choose_cuts() {
  local count=$((1 + RANDOM % set_to[cuts])) index
  for ((; count > 0; count--)); do
    index=$((RANDOM % ${#moments[@]}))
    echo "$index ${moments[$index]} ${lengths[$((RANDOM % ${#lengths[@]}))]}"
  done | sort -n | cut -d' ' -f2-
}

# Cuts the link as chosen, as often as the migration lives to see; counts in $made.
make_cuts() {
  local moment length last='' limited=yes
  made=0
  while read -r moment length; do
    if [ $limited = yes ] && [ "$moment" != offered ] && [ "$moment" != rounds ]; then
      faster
      limited=no
    fi
    reaches "$moment" || break
    if [ "$moment" = rounds ] || [ "$moment" = "$last" ]; then
      sleep "$((RANDOM % 2)).$((RANDOM % 9 + 1))"
    fi
    bash "$tool" cut "$length"
    last=$moment
    made=$((made + 1))
  done <"$lab/cuts"
  if [ $limited = yes ]; then faster; fi
}

# Complete lines of a console; its last line may still be growing.
console() {
  [ -e "$lab/$1/run/$vm.serial" ] || return 0
  cp "$lab/$1/run/$vm.serial" "$lab/console"
  if [ -z "$(tail -c 1 "$lab/console")" ]; then cat "$lab/console"; else sed '$d' "$lab/console"; fi
}

beats_on() { console "$1" | wc -l; }
beats_further() { [ "$(beats_on "$1")" -ge "$(($2 + 2))" ]; }

# Every heartbeat once over both consoles, none missing, and nothing else said.
heartbeats_unbroken() {
  [ "$payload" = heartbeat ] || return 0
  local side before
  before=$(beats_on "$1")
  until_true "a heartbeat on $1" beats_further "$1" "$before" || return 1
  for side in gw-a gw-b; do console "$side"; done | sort -k2,2n |
    awk '$0 != "beat " NR { print "line " NR " of all heartbeats is `" $0 "`"; wrong = 1; exit } END { exit wrong }'
}

# A cut in the last words of the first migration leaves no head of the other log; the next migration brings it.
audit_verifies() { # audit_verifies GATEWAY
  local peer=()
  if "$bin" audit show "$lab/$1/audit" | grep peer-head >/dev/null; then peer=(--peer-key "$lab/pki/$(other "$1")-signing-pub.pem"); fi
  "$bin" audit verify "$lab/$1/audit" --key "$lab/pki/$1-signing-pub.pem" "${peer[@]}" >>"$lab/commands.log" 2>&1
}

check() { # check RUN EXIT-CODE
  local report=$lab/report.json side
  if [ "$2" -ne 0 ]; then
    violation "migration $1 from $from ended with exit code $2: $(grep '^error' "$lab/migrate.err")"
    until_true "one running guest" runs_anywhere || violation "after migration $1 the guest runs nowhere"
    return
  fi
  jq -e '.state == "completed" and .running_on == "destination" and .verified' "$report" >/dev/null ||
    violation "migration $1 from $from is not complete: $(cat "$report")"
  if [ "$made" -gt 0 ]; then
    # What was on its way is sent again, and no more: a quarter of the memory for each cut is far more than that.
    jq -e --argjson cuts "$made" '.resent_bytes != null and .resent_bytes <= $cuts * .guest_memory_bytes / 4' "$report" >/dev/null ||
      violation "migration $1 from $from sent too much again: $(jq -c '[.resent_bytes, .guest_memory_bytes]' "$report")"
  fi
  until_true "a guest on $to" runs_at "$to" || violation "after migration $1 the guest does not run on $to"
  until_true "no guest on $from" is_gone_from "$from" || violation "after migration $1 the guest is still on $from"
  heartbeats_unbroken "$to" || violation "after migration $1 the heartbeat is broken"
  for side in gw-a gw-b; do
    audit_verifies "$side" || violation "after migration $1 the audit log of $side does not verify"
  done
  jq -c . "$report" >>"$lab/reports.jsonl"
}

migrate() { # migrate RUN
  from_log=$(log_of "$from" | wc -c)
  to_log=$(log_of "$to" | wc -c)
  : >"$lab/cuts"
  local limit=() code=0
  if [ "${set_to[cuts]}" -gt 0 ]; then
    choose_cuts >"$lab/cuts"
    # Pages of this guest would be next to nothing compressed.
    limit=(--compress none --bandwidth "${set_to[slow]}")
  fi
  echo "migration $1 from $from: $(paste -sd, "$lab/cuts")"
  "$bin" migrate "$vm" --to "$to" "${limit[@]}" --config "$lab/$from/gateway.toml" --json \
    >"$lab/report.json" 2>"$lab/migrate.err" &
  command=$!
  made=0
  if [ ${#limit[@]} -gt 0 ]; then make_cuts; fi
  wait "$command" || code=$?
  cuts_made=$((cuts_made + made))
  check "$1" "$code"
}

summary() {
  jq -rs --argjson cuts "$cuts_made" --argjson violations "$violations" '
    def percentile($p): sort | if length == 0 then "-" else .[([(length * $p / 100 | ceil), 1] | max) - 1] * 1000 | round end;
    (map(.downtime_seconds // empty)) as $pauses
    | (map(.resent_bytes // 0) | add // 0) as $resent
    | (map(.guest_memory_bytes) | add // 0) as $memory
    | "migrations: \(length), complete: \(map(select(.state == "completed")) | length), cuts: \($cuts), "
      + "reconnects: \(map(.reconnects // 0) | add // 0), stalled: \(map(.stalled_seconds // 0) | add // 0 | round) s",
      "downtime in ms: p50 \($pauses | percentile(50)), p90 \($pauses | percentile(90)), "
      + "p99 \($pauses | percentile(99)), longest \($pauses | percentile(100))",
      "re-sent: \($resent) bytes, \(if $memory > 0 then 1000 * $resent / $memory | round / 10 else 0 end) % of the guests memory",
      "violations: \($violations)"
  ' "$lab/reports.jsonl"
}

start_lab
echo "seed ${set_to[seed]}, ${set_to[guest]} guest of ${set_to[memory]}, link ${set_to[rate_mbit]} Mbit/s, ${set_to[delay_ms]} ms, ${set_to[loss_pct]} % lost"
from=gw-a
to=gw-b
cuts_made=0
: >"$lab/reports.jsonl"
for ((run = 0; run < set_to[migrations]; run++)); do
  migrate "$run"
  # A guest that did not move is tried again from where it is.
  if runs_at "$to"; then
    from=$to
    to=$(other "$from")
  fi
done
summary
[ "$violations" -eq 0 ]
