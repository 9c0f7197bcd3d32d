#!/usr/bin/env python3
"""How long a guest that was split waits for a page, through two gateways and between two QEMUs alone, alternately in one run.

  postcopy.py --link 1000:25:0 --wan-tool wan.sh [--repeat 3] [--contenders qemu,qemu-preempt,sealane]

The guest (postcopy_guest.S) writes to 256 MiB, a page at a time, in no order, and is split at once (`--mode postcopy`); the rest of its
memory follows behind the pages that it waits for. A wait is from `postcopy_ram_fault_thread_request` to `postcopy_place_page` of the
same page in the destination QEMU's own trace. QEMU alone sends over TCP, not encrypted; `qemu-preempt` has the capability
`postcopy-preempt`: a channel of its own for pages that are waited for. `sealane@CODEC` sets `--compress`; `sealane` is `none`, and so is QEMU.

Needs qemu-system-x86 (10.0 or later), binutils, a build of sealane, and root for the link and for userfaultfd. The link's tool is
that of compare.py. The table goes to stderr, one JSON object to stdout.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import compare
import qemu
from compare import Failed, Monitor, kill, say, within

HERE = Path(__file__).resolve().parent
MEMORY_MIB = 320
REQUEST = re.compile(rb"@(\d+\.\d+):postcopy_ram_fault_thread_request Request for HVA=0x([0-9a-f]+)")
PLACED = re.compile(rb"@(\d+\.\d+):postcopy_place_page(?:_zero)? host=0x([0-9a-f]+)")


def make_rom(work):
    rom, thing = work / "guest.rom", work / "guest.o"
    subprocess.run(["as", "--32", "-o", thing, HERE / "postcopy_guest.S"], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0", "--oformat", "binary", "-o", rom, thing], check=True)
    return rom


class Guests:
    """Both QEMUs; the guest of the first one has filled its memory."""

    def __init__(self, options, work, cleanup):
        self.trace = work / "trace"
        self.trace.unlink(missing_ok=True)
        filled = work / "console"
        filled.unlink(missing_ok=True)
        self.processes, self.monitors = [], []
        for end in (0, 1):
            path = work / f"{end}.sock"
            path.unlink(missing_ok=True)
            (work / f"{end}.look").unlink(missing_ok=True)
            console = ["-chardev", f"file,id=console,path={filled if end == 0 else '/dev/null'}"]
            command = within(options.sites[end][0]) + [
                options.qemu, "-machine", "pc", "-accel", "tcg", "-m", str(MEMORY_MIB), "-display", "none", "-nodefaults", "-bios", work / "guest.rom",
                "-device", "isa-debugcon,iobase=0xe9,chardev=console", *console, "-uuid", qemu.UUID,
                "-qmp", f"unix:{path},server=on,wait=off", "-qmp", f"unix:{work}/{end}.look,server=on,wait=off",
            ]  # fmt: skip
            if end:
                command += ["-incoming", "defer", "-D", self.trace, "-msg", "timestamp=on"]
                command += ["-trace", "postcopy_ram_fault_thread_request", "-trace", "postcopy_place_page*"]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr))
            cleanup.callback(kill, self.processes[-1])
            self.monitors.append(Monitor(work / f"{end}.look", self.processes[-1]))
        while not filled.exists() or filled.stat().st_size == 0:
            time.sleep(0.05)
        time.sleep(1)

    def waits(self):
        """Milliseconds, and how long it was from the first page that was waited for to the last page."""
        asked, waits, first, last = {}, [], None, None
        for line in self.trace.read_bytes().splitlines():
            if found := REQUEST.search(line):
                asked.setdefault(found[2], float(found[1]))
                first = first or float(found[1])
            elif found := PLACED.search(line):
                last = float(found[1])
                if found[2] in asked:
                    waits.append((last - asked.pop(found[2])) * 1000)
        if len(waits) < 5:
            raise Failed(f"only {len(waits)} pages were waited for")
        return waits, last - first


class Qemu:
    def __init__(self, name, options, work):
        self.name, self.options, self.work = name, options, work

    def sample(self):
        names = ["postcopy-ram", "return-path"] + (["postcopy-preempt"] if self.name.endswith("preempt") else [])
        with ExitStack() as cleanup:
            guests = Guests(self.options, self.work, cleanup)
            for monitor in guests.monitors:
                monitor.do("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])
                monitor.do("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            uri = f"tcp:{self.options.sites[1][1]}:{compare.QEMU_PORT}"
            there, here = guests.monitors[1], guests.monitors[0]
            there.do("migrate-incoming", uri=uri)
            here.do("migrate", uri=uri)
            while here.do("query-migrate").get("status") == "setup":
                time.sleep(0.01)
            here.do("migrate-start-postcopy")
            until(self.options, lambda: here.do("query-migrate")["status"] in ("completed", "failed"))
            return guests.waits()


class Sealane(qemu.Sealane):
    def __init__(self, name, options, work):
        super().__init__(name.partition("@")[2] or "none", options, work)
        self.name = name

    def sample(self):
        if not (self.work / "pki").exists():
            qemu.make_pki(self.options.sealane, self.work)
        with ExitStack() as cleanup:
            guests = Guests(self.options, self.work, cleanup)
            gateways = [self.gateway(end, cleanup) for end in (0, 1)]
            for end in (0, 1):
                self.wait_for(end, gateways[end])
            arguments = [self.options.sealane, "migrate", "bench", "--to", "gw-b", "--config", str(self.directory(0) / "gateway.toml"), "--json"]
            arguments += ["--mode", "postcopy", "--compress", self.codec, "--lanes", str(self.options.lanes)]
            report = self.run(arguments)
            if report["state"] != "completed" or not report["post_copy"]:
                raise Failed(f"{self.name}: {report}")
            return guests.waits()


def until(options, done):
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > options.patience:
            raise Failed(f"not done within {options.patience} s")
        time.sleep(0.02)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="The head of this file says how it is measured.")
    parser.add_argument("--link", type=compare.link, metavar="RATE:DELAY:LOSS", help="Mbit/s, ms one way, %%, e.g. 1000:25:0")
    parser.add_argument("--wan-tool", default=os.environ.get("SEALANE_WAN_TOOL"), help="emulates the link ($SEALANE_WAN_TOOL)")
    parser.add_argument("--repeat", type=int, default=3, help="passes (default: 3)")
    parser.add_argument("--contenders", default="qemu,qemu-preempt,sealane", help="(default: qemu,qemu-preempt,sealane)")
    parser.add_argument("--lanes", type=int, default=2, help="of Sealane (default: 2)")
    parser.add_argument("--patience", type=float, default=300, metavar="SECONDS", help="for one migration (default: 300)")
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--sealane", default=str(HERE.parent / "target/release/sealane"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.link and not options.wan_tool:
        parser.error("--link needs a tool that emulates it: --wan-tool PATH or SEALANE_WAN_TOOL")
    options.sites = compare.SITES if options.link else ((None, "127.0.0.1"),) * 2
    return options


def main():
    options = arguments()
    if options.link and not options.inside:
        again = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--wan-tool", options.wan_tool, "--inside"]
        return subprocess.run([options.wan_tool, "run", *options.link, "--", *again]).returncode
    result = {}
    with tempfile.TemporaryDirectory(prefix="sealane-postcopy-") as directory:
        work = Path(directory)
        make_rom(work)
        for _ in range(options.repeat):
            for name in options.contenders.split(","):
                contender = (Sealane if name.startswith("sealane") else Qemu)(name, options, work)
                waits, seconds = contender.sample()
                result.setdefault(name, {"waits_ms": [], "seconds": []})
                result[name]["waits_ms"] += waits
                result[name]["seconds"].append(seconds)
                say(f"{name}: {len(waits)} waits, {statistics.median(waits):.1f} ms in the median, all of it {seconds:.2f} s")
    say(f"\n{'':16} {'waits':>6} {'10 %':>7} {'median':>7} {'90 %':>7} {'largest':>8}  ms; {'all, s':>7}")
    for name, row in result.items():
        waits = sorted(row["waits_ms"])
        tenth = statistics.quantiles(waits, n=10)
        row |= {"p10": tenth[0], "median": statistics.median(waits), "p90": tenth[8], "largest": waits[-1]}
        say(
            f"{name:16} {len(waits):6} {row['p10']:7.1f} {row['median']:7.1f} {row['p90']:7.1f} {row['largest']:8.1f}      "
            f"{statistics.median(row['seconds']):7.2f}"
        )
        del row["waits_ms"]
    link = " ".join(options.link) if options.link else "loopback"
    print(json.dumps({"schema": "sealane.postcopy/1", "link": link, "repeat": options.repeat, "contenders": result}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as failure:
        say(f"postcopy.py: {failure}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
