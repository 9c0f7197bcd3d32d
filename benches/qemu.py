#!/usr/bin/env python3
"""A QEMU guest moved by two gateways, and by QEMU itself, alternately in one run, as a table and as JSON.

  qemu.py IMAGE [--repeat 5] [--modes plain-multifd,tls-multifd,tls-multifd-zstd1] [--codecs auto]
  qemu.py IMAGE --link 1000:25:0.1 --wan-tool wan.sh         1000 Mbit/s, 25 ms each way, 0.1 % loss

Options, table and JSON are those of compare.py, which see. What differs: the guest runs, because a gateway moves none that does not;
it is a BIOS that found nothing to boot, in front of RAM from IMAGE, and the same for all contenders.

  QEMU     as in compare.py, from `migrate` to the status `completed`, CPU time of both QEMUs.
  Sealane  `sealane migrate` between two gateways, into a QEMU that waits already (`incoming_qmp`): wall time of the report, so policy, audit,
           journals and handoff included; CPU time of both QEMUs and both gateways; UDP payload that the source has sent. `pause` is
           the report's: from the guest's last instruction at the source to its first at the destination. `--codecs auto,auto@4` also
           has QEMU hand over pages on 4 channels.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import compare
from compare import Failed, Monitor, cpu_seconds, kill, stop, within

UUID = "5ea1a4e0-0000-4000-8000-0000000000be"
DOMAIN = "bench.sealane.invalid"
POLICY = f"""
@id("operators-may-ask")
permit (principal, action == Sealane::Action::"request", resource);
@id("gateways-may-move")
permit (principal is Sealane::Gateway, action in [Sealane::Action::"release", Sealane::Action::"accept", Sealane::Action::"commit"], resource)
when {{ principal.trustDomain == "{DOMAIN}" }};
"""
CONFIG = """
[gateway]
name = "{name}"
site = "{site}"
listen = "{listen}"
control_socket = "run/api.sock"
state_directory = "state"
audit_directory = "audit"
runtime_directory = "run"

[identity]
certificate = "../pki/{name}-cert.pem"
key = "../pki/{name}-key.pem"
signing_key = "../pki/{name}-signing-key.pem"

[[identity.trust]]
domain = "{domain}"
roots = "../pki/ca-cert.pem"
crls = ["../pki/crl.pem"]

[policy]
directory = "policy.d"

[[peer]]
name = "{other}"
address = "{address}"
spiffe = "spiffe://{domain}/gateway/{other}"
site = "{other_site}"

[[vm]]
name = "bench"
uuid = "{uuid}"
{place}
tenant = "bench"
classification = "internal"
home_site = "site-a"
allowed_sites = ["site-a", "site-b"]
migratable = true
"""
NAMES = (("gw-a", "site-a"), ("gw-b", "site-b"))
PORTS = (4433, 4434)


def guests(contender, options, work, extra):
    """Both QEMUs; the guest of the first one runs."""
    size = f"size={options.bytes}"
    source = f"memory-backend-file,id=ram,{size},mem-path={options.image},share=off"
    destination = f"memory-backend-ram,id=ram,{size},prealloc={'on' if options.prealloc else 'off'}"
    processes, monitors = [], []
    for end, ram in enumerate((source, destination)):
        path = work / f"{end}.sock"
        path.unlink(missing_ok=True)
        command = within(options.sites[end][0]) + [
            options.qemu, "-machine", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "qemu64", "-m", str(options.bytes // compare.MIB),
            "-display", "none", "-nodefaults", "-object", ram, "-qmp", f"unix:{path},server=on,wait=off", "-uuid", UUID,
        ]  # fmt: skip
        processes.append(subprocess.Popen(command + extra[end] + (["-incoming", "defer"] if end else []), stdin=subprocess.DEVNULL, stdout=sys.stderr))
        contender.callback(kill, processes[-1])
        monitors.append(Monitor(path, processes[-1]))
    # The BIOS looks for something to boot, and then waits.
    time.sleep(2)
    return processes, monitors


class Qemu(compare.Qemu):
    def sample(self):
        with ExitStack() as cleanup:
            credentials = [["-object", f"tls-creds-x509,id=tls,dir={self.work},endpoint={end}"] for end in ("client", "server")]
            ends, monitors = guests(cleanup, self.options, self.work, credentials)
            for monitor in monitors:
                self.set_up(monitor)
            uri = f"tcp:{self.options.sites[1][1]}:{compare.QEMU_PORT}"
            monitors[1].do("migrate-incoming", uri=uri)
            return self.measure(monitors[0], uri, ends)


class Sealane(compare.Sealane):
    def sample(self):
        if not (self.work / "pki").exists():
            make_pki(self.options.sealane, self.work)
        with ExitStack() as cleanup:
            qemus, monitors = guests(cleanup, self.options, self.work, [[], []])
            for monitor in monitors:
                # A monitor has one client, and that is the gateway.
                monitor.socket.close()
                monitor.stream.close()
            gateways = [self.gateway(end, cleanup) for end in (0, 1)]
            for end in (0, 1):
                self.wait_for(end, gateways[end])
            processes = qemus + gateways
            before = sum(map(cpu_seconds, processes))
            arguments = [self.options.sealane, "migrate", "bench", "--to", "gw-b", "--config", str(self.directory(0) / "gateway.toml"), "--json"]
            codec, _, channels = self.codec.partition("@")
            channels = ["--channels", channels] if channels else []
            report = self.run(arguments + ["--compress", codec, "--lanes", str(self.options.lanes)] + channels)
            # The source's QEMU ends with the move, and its time with it; it is looked at before.
            used = sum(cpu_of(process) for process in processes) - before
            if report["state"] != "completed":
                raise Failed(f"{self.name}: {report}")
            compare.say(f"  pages {report['pages']}, pause {report['downtime_breakdown']}")
            return self.figures(report, used)

    def directory(self, end):
        return self.work / NAMES[end][0]

    def gateway(self, end, cleanup):
        (name, site), (other, other_site) = NAMES[end], NAMES[1 - end]
        directory = self.directory(end)
        for part in ("state", "audit", "run", "policy.d"):
            subprocess.run(["rm", "-rf", directory / part], check=True)
            (directory / part).mkdir(parents=True, mode=0o700)
        (directory / "policy.d/bench.cedar").write_text(POLICY)
        place = "incoming_qmp" if end else "qmp"
        text = CONFIG.format(
            name=name, site=site, other=other, other_site=other_site, domain=DOMAIN, uuid=UUID,
            listen=f"{self.options.sites[end][1]}:{PORTS[end]}", address=f"{self.options.sites[1 - end][1]}:{PORTS[1 - end]}",
            place=f'{place} = "{self.work}/{end}.sock"',
        )  # fmt: skip
        (directory / "gateway.toml").write_text(text)
        log = open(directory / "log", "ab")
        command = within(self.options.sites[end][0]) + [self.options.sealane, "gateway", "--config", str(directory / "gateway.toml")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        cleanup.callback(stop, process)
        return process

    def wait_for(self, end, process):
        socket = self.directory(end) / "run/api.sock"
        for _ in range(1000):
            if socket.exists():
                return
            if process.poll() is not None:
                raise Failed(f"the gateway ended: {(self.directory(end) / 'log').read_text()[-2000:]}")
            time.sleep(0.01)
        raise Failed("the gateway does not listen")


def cpu_of(process):
    """Also of one that has just ended and was not waited for."""
    try:
        return cpu_seconds(process)
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def make_pki(sealane, work):
    def run(*arguments):
        done = subprocess.run([sealane, "pki", *arguments], capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"sealane pki {arguments[0]}: {done.stderr.strip()}")

    run("init", str(work / "pki"), "--trust-domain", DOMAIN)
    for name, site in NAMES:
        run("issue", str(work / "pki"), "--gateway", name, "--site", site)


if __name__ == "__main__":
    try:
        sys.exit(compare.main(Qemu, Sealane, __file__))
    except Failed as failure:
        compare.say(f"qemu.py: {failure}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
