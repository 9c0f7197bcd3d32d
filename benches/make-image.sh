#!/usr/bin/env bash
# Makes the RAM of a real Linux guest as a file, for compare.py and `sealane bench --image`: boots a Debian kernel in QEMU
# (software emulation, no KVM needed) with an initial RAM disk of real files, lets it run, stops it and keeps its RAM.
#
#   make-image.sh OUT.img [MIB=2048]
#
# The result differs a little from run to run. It may hold what is on this host's /usr: do not publish it.
# Needs (Debian): qemu-system-x86 busybox-static linux-image-cloud-amd64 cpio
set -euo pipefail
out=${1:?usage: make-image.sh OUT.img [MIB=2048]}
mib=${2:-2048}
kernel=$(find /boot -name 'vmlinuz-*-cloud-amd64' | sort -V | tail -1)
[ -n "$kernel" ] || { echo "make-image: no kernel in /boot: apt-get install linux-image-cloud-amd64" >&2; exit 1; }
work=$(mktemp -d)
ram=/dev/shm/sealane-image.$$
pid=
clean_up() {
  [ -z "$pid" ] || kill -KILL "$pid" 2>/dev/null || true
  rm -rf "$work" "$ram"
}
trap clean_up EXIT

mkdir -p "$work/root"/{bin,proc,sys,dev,tmp,data}
cp /bin/busybox "$work/root/bin/"
for applet in sh mount dd sleep echo; do ln -s busybox "$work/root/bin/$applet"; done

# Real content for about a third of the memory: documents, programs, libraries.
budget_kib=$((mib * 1024 / 3))
used_kib=0
while read -r size_kib file; do
  [ $((used_kib + size_kib)) -le "$budget_kib" ] || continue
  cp --parents "$file" "$work/root/data/" 2>/dev/null && used_kib=$((used_kib + size_kib))
done < <(find /usr/share/doc /usr/bin /usr/lib/python3* /usr/lib/x86_64-linux-gnu -type f -size -4096k -printf '%k %p\n' 2>/dev/null)

cat >"$work/root/init" <<'INIT'
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
beat=0
while true; do
  beat=$((beat + 1)); echo "beat $beat"
  dd if=/dev/urandom of=/tmp/scratch bs=1M count=2 conv=notrunc 2>/dev/null; sleep 1
done
INIT
chmod +x "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$work/initrd.gz"

qemu-system-x86_64 -machine q35,memory-backend=ram -accel tcg -cpu qemu64 -m "$mib" \
  -object "memory-backend-file,id=ram,size=${mib}M,mem-path=$ram,share=on" \
  -kernel "$kernel" -initrd "$work/initrd.gz" -append "console=ttyS0 quiet panic=1" \
  -serial "file:$work/serial.log" -display none -monitor none -no-reboot &
pid=$!
for _ in $(seq 240); do
  grep -q 'beat 20' "$work/serial.log" 2>/dev/null && break
  kill -0 "$pid" 2>/dev/null || { echo "make-image: the guest ended early; its console: $(tail -3 "$work/serial.log")" >&2; exit 1; }
  sleep 1
done
grep -q 'beat 20' "$work/serial.log" || { echo "make-image: the guest did not come up within 240 s" >&2; exit 1; }
kill -STOP "$pid"
cp "$ram" "$out"
echo "$out: $mib MiB" >&2
