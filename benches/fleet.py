#!/usr/bin/env python3
"""Many small VMs at once through one pair of gateways, next to one VM with as much memory.

  fleet.py [--vms 100] [--memory-mib 64] [--parallel 8] [--binary target/release/sealane]

Both gateways and all VMMs run on this host; the guests are synthetic, write nothing and fill their memory with content of their own.
The clock runs from the first `migrate` to the last VM that runs at the destination. Every gateway's anonymous memory is read
from the kernel when all is over. The table goes to stderr, one JSON object to stdout.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
GATEWAY = """\
[gateway]
name = "{name}"
site = "{site}"
listen = "127.0.0.1:{port}"
control_socket = "run/api.sock"
state_directory = "state"
audit_directory = "audit"
runtime_directory = "run"

[identity]
certificate = "../pki/{name}-cert.pem"
key = "../pki/{name}-key.pem"
signing_key = "../pki/{name}-signing-key.pem"

[[identity.trust]]
domain = "fleet.sealane.invalid"
roots = "../pki/ca-cert.pem"
crls = ["../pki/crl.pem"]

[policy]
directory = "policy.d"

[migration]
parallel = {parallel}

[[peer]]
name = "{peer}"
site = "{peer_site}"
address = "127.0.0.1:{peer_port}"
spiffe = "spiffe://fleet.sealane.invalid/gateway/{peer}"

[incoming]
command = ["{binary}", "vmm", "run", "--incoming", "--socket", "{{socket}}", "--serial", "{{serial}}"]
max_memory = "64GiB"
"""
VM = """
[[vm]]
name = "{name}"
uuid = "{uuid}"
{socket}tenant = "lab"
classification = "internal"
home_site = "site-a"
allowed_sites = ["site-a", "site-b"]
migratable = true
"""
POLICY = """\
@id("operators-may-ask")
permit (principal, action == Sealane::Action::"request", resource) when { resource.tenant == "lab" };
@id("gateways-may-move")
permit (principal is Sealane::Gateway,
  action in [Sealane::Action::"release", Sealane::Action::"accept", Sealane::Action::"commit"], resource)
when { principal.trustDomain == "fleet.sealane.invalid" && resource.allowedSites.contains(context.route.dstSite) };
"""


class Failed(Exception):
    """Something went wrong that the person at the keyboard can read about."""


def wait_for(what, seconds, holds):
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        if time.monotonic() > deadline:
            raise Failed(f"waited {seconds} s in vain for {what}")
        time.sleep(0.02)
    return value


class Lab:
    """Two gateways and the guests of one of them."""

    def __init__(self, binary, memories_mib, parallel):
        self.binary, self.memories_mib, self.parallel = binary, memories_mib, parallel
        self.directory = Path(tempfile.mkdtemp(prefix="sealane-fleet."))
        self.processes, self.gateways = [], {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Destination VMMs are children of a gateway: everything of this lab names its directory.
        for process in self.processes:
            process.kill()
            process.wait()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if str(self.directory) in (entry / "cmdline").read_text():
                        os.kill(int(entry.name), 9)
                except OSError:
                    pass
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, *arguments):
        done = subprocess.run([self.binary, *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Failed(f"`sealane {' '.join(map(str, arguments))}` exited with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def spawn(self, name, *arguments):
        log = open(self.directory / f"{name}.log", "w")
        process = subprocess.Popen([self.binary, *map(str, arguments)], stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def ask(self, name, *arguments):
        return json.loads(self.run(*arguments, "--config", self.directory / name / "gateway.toml", "--json"))

    def uuid(self, index):
        return f"5ea1a4e0-0000-4000-8000-{index:012x}"

    def start(self):
        self.run("pki", "init", self.directory / "pki", "--trust-domain", "fleet.sealane.invalid")
        sides = [("gw-a", "site-a", 44331), ("gw-b", "site-b", 44332)]
        for (name, site, port), (peer, peer_site, peer_port) in (sides, sides[::-1]):
            self.run("pki", "issue", self.directory / "pki", "--gateway", name, "--site", site)
            home = self.directory / name
            for sub in ("policy.d", "state", "audit", "run"):
                (home / sub).mkdir(parents=True)
            text = GATEWAY.format(name=name, site=site, port=port, peer=peer, peer_site=peer_site, peer_port=peer_port,
                                  parallel=self.parallel, binary=self.binary)
            for index in range(len(self.memories_mib)):
                socket = f'socket = "run/vm-{index}.sock"\n' if name == "gw-a" else ""
                text += VM.format(name=f"vm-{index}", uuid=self.uuid(index), socket=socket)
            (home / "gateway.toml").write_text(text)
            (home / "policy.d" / "lab.cedar").write_text(POLICY)
        run = self.directory / "gw-a" / "run"
        for index, mib in enumerate(self.memories_mib):
            self.spawn(f"vm-{index}", "vmm", "run", "--payload", "synthetic", "--uuid", self.uuid(index), "--memory", f"{mib}MiB",
                       "--vcpus", 1, "--working-set", "64KiB", "--dirty-rate", "4KiB/s", "--socket", run / f"vm-{index}.sock",
                       "--serial", run / f"vm-{index}.serial")
        for index in range(len(self.memories_mib)):
            wait_for(f"guest {index}", 120, (run / f"vm-{index}.sock").exists)
        for name, _, _ in sides:
            self.gateways[name] = self.spawn(name, "gateway", "--config", self.directory / name / "gateway.toml")
        for name, _, _ in sides:
            wait_for(f"gateway {name}", 60, lambda name=name: self.answers(name))

    def answers(self, name):
        if self.gateways[name].poll() is not None:
            raise Failed(f"gateway {name} ended: {(self.directory / f'{name}.log').read_text()[-1000:]}")
        try:
            return self.ask(name, "status")
        except Failed:
            return None

    def resident(self, name, field):
        for line in Path(f"/proc/{self.gateways[name].pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise Failed(f"the kernel does not say {field} of {name}")

    def move_all(self):
        """Seconds until every VM runs at the destination."""
        began = time.monotonic()
        for index in range(len(self.memories_mib)):
            self.ask("gw-a", "migrate", f"vm-{index}", "--to", "gw-b", "--detach")
        count = len(self.memories_mib)

        def all_there():
            # In this order: what is over at the source runs at the destination.
            active = self.ask("gw-a", "status")["gateway"]
            states = [vm["state"] for vm in self.ask("gw-b", "vms")["vms"]]
            if not active["migrations_active"] and not active["migrations_queued"] and states.count("running") < count:
                errors = [report["error"] for report in self.ask("gw-a", "history")["reports"] if report["error"]]
                raise Failed(f"{states.count('running')} of {count} VMs arrived: {errors}")
            return states.count("running") == count

        wait_for("the last VM", 600, all_there)
        return time.monotonic() - began


def measure(binary, memories_mib, parallel):
    with Lab(binary, memories_mib, parallel) as lab:
        lab.start()
        idle = {name: lab.resident(name, "VmRSS") for name in lab.gateways}
        seconds = lab.move_all()
        # Guest memory is shared with the VMMs and not the gateway's: what is its own is anonymous.
        memory = {name: {"idle_bytes": idle[name], "anonymous_bytes": lab.resident(name, "RssAnon")} for name in lab.gateways}
        wire = sum(report["wire_bytes"] for report in lab.ask("gw-a", "history")["reports"])
        return {"vms": len(memories_mib), "memory_mib": sum(memories_mib), "seconds": seconds, "wire_bytes": wire, "gateways": memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=100)
    parser.add_argument("--memory-mib", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=8, help="migrations at once, at most 64")
    parser.add_argument("--one-only", action="store_true", help="only the one VM")
    parser.add_argument("--binary", default="target/release/sealane")
    flags = parser.parse_args()
    binary = str(Path(flags.binary).resolve())
    many = None if flags.one_only else measure(binary, [flags.memory_mib] * flags.vms, flags.parallel)
    one = measure(binary, [flags.memory_mib * flags.vms], 1)
    ratio = many["seconds"] / one["seconds"] if many else None
    for figures in filter(None, (many, one)):
        print(f"{figures['vms']:4} VMs, {figures['memory_mib']} MiB: {figures['seconds']:.2f} s, {figures['wire_bytes'] / MIB:.0f} MiB sent; "
              + ", ".join(f"{name} {peak['anonymous_bytes'] / MIB:.0f} MiB" for name, peak in figures["gateways"].items()), file=sys.stderr)
    if ratio:
        print(f"ratio {ratio:.2f}", file=sys.stderr)
    json.dump({"many": many, "one": one, "ratio": ratio}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"fleet: {error}")
