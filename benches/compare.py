#!/usr/bin/env python3
"""Sealane and QEMU's own live migration of the same RAM, alternately in one run, as a table and as JSON.

  compare.py IMAGE [--repeat 5] [--modes plain-multifd,tls-multifd,tls-multifd-zstd1] [--codecs lz4,none]
  compare.py IMAGE --link 1000:25:0.1 --wan-tool wan.sh      1000 Mbit/s, 25 ms each way, 0.1 % loss

Every sample is one migration. A pass takes one sample of each contender in turn, so that noise of the machine hits
all of them alike; the figures are medians over the passes, and what counts are the ratios. The table goes to stderr, one JSON
object to stdout.

How each is measured:
  QEMU     two stopped guests (TCG, nothing executes), the source's RAM is IMAGE mapped privately, the destination's RAM
           is anonymous. Wall time from `migrate` to the status `completed`, CPU time of both processes over the same
           span, bytes as QEMU counts them (without TLS records and TCP headers). With --prealloc QEMU's destination
           has touched its RAM before the clock starts, as Sealane's always has.
  Sealane  `sealane bench --rounds 1`: its warm-up run compares all memory, the next one is the sample. Wall time from the
           dial to DONE, CPU time of both gateways, bytes of UDP payload that the source sent.

With --link both run between two network namespaces. The tool is called as `TOOL run rate_mbit=R delay_ms=D loss_pct=L -- COMMAND`
and must give COMMAND the namespaces sea-a (10.77.0.1) and sea-b (10.77.0.2). SEALANE_WAN_TOOL stands in for --wan-tool.

Needs qemu-system-x86 (10.0 or later is the honest peer) and gnutls-bin; a release build of sealane; root for --link.
IMAGE: see make-image.sh, or any file of a whole number of MiB.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

MODES = ("plain-multifd", "tls-multifd", "tls-multifd-zstd1")
SITES = (("sea-a", "10.77.0.1"), ("sea-b", "10.77.0.2"))
QEMU_PORT, SEALANE_PORT = 4444, 4433
GIB = 1 << 30
MIB = 1 << 20


class Failed(Exception):
    """Something went wrong that the person at the keyboard can read about."""


def say(text=""):
    print(text, file=sys.stderr, flush=True)


def within(site):
    """The prefix that runs a command at a site of the link, or here."""
    return ["ip", "netns", "exec", site] if site else []


def kill(process):
    """Ends a process that has nothing to say or to put away."""
    process.kill()
    process.wait()


def stop(process):
    """Ends a process that we started, the hard way if it has to be."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- QEMU ---------------------------------------------------------------------------------------------------------------


class Monitor:
    """QEMU's machine protocol over a unix socket: one command, one reply."""

    def __init__(self, path, process, patience=120):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(patience)
        deadline = time.monotonic() + patience
        while True:
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                if process.poll() is not None:
                    raise Failed(f"QEMU ended with code {process.returncode} before it listened at its monitor") from None
                if time.monotonic() > deadline:
                    raise Failed(f"QEMU did not listen at its monitor within {patience} s") from None
                time.sleep(0.02)
        self.stream = self.socket.makefile("rw")
        self.line("greeting")
        self.do("qmp_capabilities")

    def line(self, awaited):
        try:
            return self.stream.readline()
        except TimeoutError:
            raise Failed(f"QEMU did not answer `{awaited}` within {self.socket.gettimeout():g} s") from None

    def do(self, command, **arguments):
        self.stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.stream.flush()
        while line := self.line(command):
            reply = json.loads(line)
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise Failed(f"QEMU refused `{command}`: {reply['error'].get('desc')}")
        raise Failed(f"QEMU closed its monitor at `{command}`")


def make_certificates(directory):
    """A certificate authority and one certificate for both ends, under the names that QEMU looks for."""

    def certtool(*arguments):
        done = subprocess.run(["certtool", *arguments], cwd=directory, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"certtool {' '.join(arguments)}: {done.stderr.strip()}")

    authority = "cn = comparison\nca\ncert_signing_key\nexpiration_days = 2\n"
    host = "cn = localhost\ndns_name = localhost\ntls_www_server\ntls_www_client\nsigning_key\nencryption_key\nexpiration_days = 2\n"
    (directory / "ca.cfg").write_text(authority)
    (directory / "host.cfg").write_text(host)
    for key in ("ca-key.pem", "server-key.pem"):
        certtool("--generate-privkey", "--key-type", "rsa", "--bits", "2048", "--outfile", key)
    certtool("--generate-self-signed", "--load-privkey", "ca-key.pem", "--template", "ca.cfg", "--outfile", "ca-cert.pem")
    certtool(
        "--generate-certificate", "--load-privkey", "server-key.pem", "--load-ca-certificate", "ca-cert.pem",
        "--load-ca-privkey", "ca-key.pem", "--template", "host.cfg", "--outfile", "server-cert.pem",
    )  # fmt: skip
    for kind in ("key", "cert"):
        os.link(directory / f"server-{kind}.pem", directory / f"client-{kind}.pem")


def cpu_seconds(process):
    """User and kernel time of a process and of all its threads, ended ones too."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Qemu:
    def __init__(self, mode, options, work):
        self.name, self.options, self.work = f"qemu {mode}", options, work
        self.tls = mode.startswith("tls")
        self.level = int(mode[-1]) if "zstd" in mode else None

    def command(self, end, ram):
        mib = self.options.bytes // MIB
        return within(self.options.sites[end][0]) + [
            self.options.qemu, "-machine", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "qemu64", "-m", str(mib),
            "-display", "none", "-nodefaults", "-S", "-object", ram, "-qmp", f"unix:{self.work}/{end}.sock,server=on,wait=off",
            "-object", f"tls-creds-x509,id=tls,dir={self.work},endpoint={('client', 'server')[end]}",
        ]  # fmt: skip

    def sample(self):
        size = f"size={self.options.bytes}"
        source = f"memory-backend-file,id=ram,{size},mem-path={self.options.image},share=off"
        destination = f"memory-backend-ram,id=ram,{size},prealloc={'on' if self.options.prealloc else 'off'}"
        with ExitStack() as cleanup:
            ends = []
            for end, extra in ((0, [source]), (1, [destination])):
                (self.work / f"{end}.sock").unlink(missing_ok=True)
                arguments = self.command(end, *extra) + (["-incoming", "defer"] if end else [])
                process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=sys.stderr)
                cleanup.callback(kill, process)
                ends.append(process)
            monitors = [Monitor(self.work / f"{end}.sock", process) for end, process in enumerate(ends)]
            for monitor in monitors:
                self.set_up(monitor)
            uri = f"tcp:{self.options.sites[1][1]}:{QEMU_PORT}"
            monitors[1].do("migrate-incoming", uri=uri)
            return self.measure(monitors[0], uri, ends)

    def set_up(self, monitor):
        monitor.do("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
        parameters = {"max-bandwidth": 0, "multifd-channels": self.options.lanes}
        if self.level:
            parameters |= {"multifd-compression": "zstd", "multifd-zstd-level": self.level}
        if self.tls:
            parameters |= {"tls-creds": "tls", "tls-hostname": "localhost"}
        monitor.do("migrate-set-parameters", **parameters)

    def measure(self, monitor, uri, ends):
        cpu, began = sum(map(cpu_seconds, ends)), time.monotonic()
        monitor.do("migrate", uri=uri)
        while (info := monitor.do("query-migrate")).get("status") not in ("completed", "failed"):
            if time.monotonic() - began > self.options.patience:
                raise Failed(f"{self.name}: not done within {self.options.patience} s; --patience gives it longer")
            time.sleep(0.005)
        wall = time.monotonic() - began
        if info["status"] != "completed":
            raise Failed(f"{self.name}: the migration failed: {info.get('error-desc', 'QEMU does not say why')}")
        # The destination still applies what it has received.
        time.sleep(0.3)
        cpu = sum(map(cpu_seconds, ends)) - cpu
        return {"wall_seconds": wall, "cpu_seconds": cpu, "wire_bytes": info["ram"]["transferred"], "downtime_seconds": info["downtime"] / 1000}


# --- Sealane ------------------------------------------------------------------------------------------------------------


class Sealane:
    def __init__(self, codec, options, work):
        self.name, self.codec, self.options, self.work = f"sealane {codec}", codec, options, work

    def sample(self):
        (away, _), (site, address) = self.options.sites
        arguments = [self.options.sealane, "bench", "--image", self.options.image, "--rounds", "1", "--json"]
        arguments += ["--compress", self.codec, "--lanes", str(self.options.lanes)]
        if not site:
            run = self.run(arguments)
            (timed,) = run["timed_runs"]
            return self.figures(timed, timed["cpu_seconds"])
        pki, at = self.work / "pki", f"{address}:{SEALANE_PORT}"
        listen = within(site) + [self.options.sealane, "bench", "listen", "--at", at, "--pki", str(pki), "--json"]
        with ExitStack() as cleanup:
            listener = subprocess.Popen(listen, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            cleanup.callback(stop, listener)
            heard = []
            for line in listener.stderr:
                heard.append(line)
                if line.startswith("listening at"):
                    break
            else:
                raise Failed(f"sealane bench listen: {''.join(heard).strip()}")
            run = self.run(within(away) + arguments + ["--to", at, "--pki", str(pki)])
            (timed,) = run["timed_runs"]
            # The warm-up and the sample, in this order.
            arrivals = [json.loads(listener.stdout.readline()) for _ in range(2)]
            (there,) = [arrival for arrival in arrivals if arrival["migration_id"] == timed["migration_id"]]
            return self.figures(timed, timed["cpu_seconds"] + there["cpu_seconds"])

    def run(self, arguments):
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=2 * self.options.patience)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name}: not done within {2 * self.options.patience} s; --patience gives it longer") from None
        if done.returncode:
            raise Failed(f"{self.name}: exit code {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    @staticmethod
    def figures(timed, cpu):
        return {
            "wall_seconds": timed["duration_seconds"],
            "cpu_seconds": cpu,
            "wire_bytes": timed["wire_bytes"],
            "downtime_seconds": timed["downtime_seconds"],
        }


# --- the comparison -----------------------------------------------------------------------------------------------------


def measure(contenders, options):
    samples = {contender.name: [] for contender in contenders}
    passes = options.warm_up + options.repeat
    for number in range(passes):
        for contender in contenders:
            sample = contender.sample()
            timed = number >= options.warm_up
            if timed:
                samples[contender.name].append(sample)
            label = f"pass {number + 1 - options.warm_up} of {options.repeat}" if timed else "warm-up"
            say(f"{label}: {contender.name}: {sample['wall_seconds']:.2f} s, {sample['wire_bytes'] / MIB:.0f} MiB, {sample['cpu_seconds']:.2f} cpu-s")
    return samples


def medians(samples, gib):
    result = {}
    for name, taken in samples.items():
        median = {key: statistics.median(sample[key] for sample in taken) for key in taken[0]}
        walls = [sample["wall_seconds"] for sample in taken]
        median |= {
            "wall_seconds_min": min(walls),
            "wall_seconds_max": max(walls),
            "gib_per_second": gib / median["wall_seconds"],
            "cpu_seconds_per_gib": median["cpu_seconds"] / gib,
        }
        result[name] = median
    return result


def ratios(median):
    """Each codec of Sealane over each mode of QEMU: below 1 is better than QEMU."""
    keys = ("wall_seconds", "wire_bytes", "cpu_seconds")
    names = [(ours, theirs) for ours in median if ours.startswith("sealane") for theirs in median if theirs.startswith("qemu")]
    divided = lambda ours, theirs, key: median[ours][key] / max(median[theirs][key], 1e-9)
    return [{"of": ours, "to": theirs} | {key: divided(ours, theirs, key) for key in keys} for ours, theirs in names]


def show(result):
    say()
    say(f"{'median of ' + str(result['repeat']):24} {'wall s (min-max)':>22} {'GiB/s':>7} {'MiB':>7} {'cpu-s':>7} {'cpu-s/GiB':>10} {'pause ms':>9}")
    for name, row in result["medians"].items():
        wall = f"{row['wall_seconds']:.2f} ({row['wall_seconds_min']:.2f}-{row['wall_seconds_max']:.2f})"
        say(
            f"{name:24} {wall:>22} {row['gib_per_second']:7.2f} {row['wire_bytes'] / MIB:7.0f} {row['cpu_seconds']:7.2f} "
            f"{row['cpu_seconds_per_gib']:10.2f} {row['downtime_seconds'] * 1000:9.1f}"
        )
    say()
    if not result["ratios"]:
        return
    say(f"{'ratio, below 1 is better than QEMU':50} {'wall':>7} {'bytes':>7} {'cpu':>7}")
    for row in result["ratios"]:
        say(f"{row['of'] + ' / ' + row['to']:50} {row['wall_seconds']:7.2f} {row['wire_bytes']:7.2f} {row['cpu_seconds']:7.2f}")


def version(command):
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def read_whole(path):
    """The page cache holds the image for every contender alike."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def link(text):
    parts = text.split(":")
    try:
        rate, delay, loss = map(float, parts)
    except ValueError:
        raise argparse.ArgumentTypeError("expected RATE:DELAY:LOSS in Mbit/s, ms one way and %, e.g. 1000:25:0.1") from None
    return f"rate_mbit={rate:g}", f"delay_ms={delay:g}", f"loss_pct={loss:g}"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="The head of this file says how it is measured.")
    parser.add_argument("image", help="RAM of a stopped guest, a whole number of MiB")
    parser.add_argument("--repeat", type=int, default=5, help="timed passes (default: 5)")
    parser.add_argument("--warm-up", type=int, help="passes before them that do not count (default: 1, with --link 0)")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of QEMU (default: {','.join(MODES)})")
    parser.add_argument("--codecs", default="lz4,none", help="of Sealane, as `bench --compress` takes them (default: lz4,none)")
    parser.add_argument("--lanes", type=int, default=2, help="lanes of Sealane and multifd channels of QEMU (default: 2)")
    parser.add_argument("--prealloc", action="store_true", help="QEMU's destination touches its RAM before the clock starts")
    parser.add_argument("--link", type=link, metavar="RATE:DELAY:LOSS", help="Mbit/s, ms one way, %%, e.g. 1000:25:0.1")
    parser.add_argument("--wan-tool", default=os.environ.get("SEALANE_WAN_TOOL"), help="emulates the link ($SEALANE_WAN_TOOL)")
    parser.add_argument("--patience", type=float, default=600, metavar="SECONDS", help="for one migration (default: 600)")
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--sealane", default=str(Path(__file__).resolve().parent.parent / "target/release/sealane"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not os.path.isfile(options.image):
        parser.error(f"image `{options.image}` is no file; make-image.sh makes one")
    options.bytes = os.path.getsize(options.image)
    if options.bytes == 0 or options.bytes % MIB:
        parser.error(f"image `{options.image}` has {options.bytes} bytes: expected a whole number of MiB")
    unknown = [mode for mode in options.modes.split(",") if mode and mode not in MODES]
    if unknown:
        parser.error(f"unknown modes {', '.join(unknown)}: expected {', '.join(MODES)}")
    for command, package in ((options.qemu, "qemu-system-x86"), ("certtool", "gnutls-bin")):
        if options.modes and not shutil.which(command):
            parser.error(f"`{command}` is not installed: apt-get install {package}, or --modes '' for Sealane alone")
    if options.codecs and not shutil.which(options.sealane):
        parser.error(f"`{options.sealane}` is not there: cargo build --release --locked, or --sealane PATH")
    if options.link and not options.wan_tool:
        parser.error("--link needs a tool that emulates it: --wan-tool PATH or SEALANE_WAN_TOOL")
    if options.warm_up is None:
        options.warm_up = 0 if options.link else 1
    if options.repeat < 1 or options.warm_up < 0:
        parser.error("expected --repeat of at least 1 and --warm-up of at least 0")
    options.image = os.path.abspath(options.image)
    options.sites = SITES if options.link else ((None, "127.0.0.1"),) * 2
    return options


def main(qemu=Qemu, sealane=Sealane, script=__file__):
    options = arguments()
    if options.link and not options.inside:
        again = [sys.executable, os.path.abspath(script), *sys.argv[1:], "--wan-tool", options.wan_tool, "--inside"]
        return subprocess.run([options.wan_tool, "run", *options.link, "--", *again]).returncode
    read_whole(options.image)
    with tempfile.TemporaryDirectory(prefix="sealane-compare-") as directory:
        work = Path(directory)
        modes = [mode for mode in options.modes.split(",") if mode]
        if modes:
            make_certificates(work)
        contenders = [qemu(mode, options, work) for mode in modes]
        contenders += [sealane(codec, options, work) for codec in options.codecs.split(",") if codec]
        load = os.getloadavg()
        samples = measure(contenders, options)
    median = medians(samples, options.bytes / GIB)
    result = {
        "schema": "sealane.compare/1",
        "began_load_average": load[0],
        "ended_load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "qemu": version(options.qemu) if modes else None,
        "sealane": version(options.sealane),
        "image": os.path.basename(options.image),
        "image_bytes": options.bytes,
        "link": " ".join(options.link) if options.link else "loopback",
        "lanes": options.lanes,
        "prealloc": options.prealloc,
        "repeat": options.repeat,
        "medians": median,
        "ratios": ratios(median),
        "samples": samples,
    }
    show(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as failure:
        say(f"compare.py: {failure}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
