//! The guest of `sealane demo --hypervisor qemu`: Debian's kernel, busybox, and a shell script that counts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::super::tools::DemoFlags;
use super::lab::local;
use crate::telemetry::{ErrorClass, Problem};

/// What the guest is made of.
pub(super) struct Linux {
    kernel: PathBuf,
    initramfs: PathBuf,
}

const QEMU: &str = "qemu-system-x86_64";

/// Counts on the console, and keeps a few MiB of memory changing: what it wrote it reads back, and stops when that differs.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /dev /tmp
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
exec >/dev/ttyS0 2>&1
n=0
while :; do
  n=$((n + 1))
  f=/tmp/$((n % 64))
  [ ! -e $f ] || [ "$(/bin/busybox head -n 1 $f)" = $((n - 64)) ] || exec /bin/busybox echo "memory changed at beat $n"
  { echo $n; /bin/busybox head -c 65536 /dev/urandom; } >$f
  echo "beat $n"
  /bin/busybox usleep 50000
done
"#;

impl Linux {
    /// Finds the parts on this host, and puts the guest's first program together in `directory`.
    pub(super) fn find(directory: &Path) -> Result<Self, Problem> {
        let kernel = newest_kernel();
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
        let qemu = Command::new(QEMU).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        let qemu = qemu.is_ok_and(|status| status.success());
        let parts = [(kernel.is_some(), "linux-image-cloud-amd64"), (busybox.is_some(), "busybox-static"), (qemu, "qemu-system-x86")];
        let missing: Vec<_> = parts.into_iter().filter_map(|(there, package)| (!there).then_some(package)).collect();
        let (Some(kernel), Some(busybox), true) = (kernel, busybox, missing.is_empty()) else {
            return Err(Problem::new(ErrorClass::Local, format!("the guest cannot be put together: {} missing", missing.join(", ")))
                .with_hint(format!("on Debian: apt-get install {}", missing.join(" "))));
        };
        let program = fs::read(busybox).map_err(|error| local("read busybox", &error))?;
        let initramfs = directory.join("initramfs");
        let archive = archive(&[("bin", 0o040_755, b""), ("bin/busybox", 0o100_755, &program), ("init", 0o100_755, INIT.as_bytes())]);
        fs::write(&initramfs, archive).map_err(|error| local("write the guest's files", &error))?;
        Ok(Self { kernel, initramfs })
    }

    /// QEMU's arguments, with the placeholders of a template.
    fn arguments(&self, flags: &DemoFlags) -> Vec<String> {
        let fixed = "-nodefaults -no-user-config -no-reboot -machine pc -accel tcg -display none";
        let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
        let paths = [&self.kernel, &self.initramfs].map(|path| path.display().to_string());
        let [kernel, initramfs] = paths;
        let memory = format!("{}B", flags.memory.bytes);
        let own = [
            // WHY: with `cmpxchg16b` the emulation of QEMU 7.2 leaves the flags undefined, and Linux, which allocates with it where it
            // can, crashes before its first line, sooner or later.
            ("-cpu", "qemu64,-cx16".to_owned()),
            ("-smp", flags.vcpus.to_string()),
            ("-m", memory),
            ("-kernel", kernel),
            ("-initrd", initramfs),
            ("-append", "console=ttyS0 quiet loglevel=0 panic=-1".to_owned()),
            ("-uuid", "{uuid}".to_owned()),
            ("-serial", "file:{serial}".to_owned()),
            ("-qmp", "unix:{socket},server=on,wait=off".to_owned()),
        ];
        arguments.extend(own.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
        arguments
    }

    /// The table of a gateway's configuration that starts an empty one.
    pub(super) fn template(&self, flags: &DemoFlags) -> String {
        let command = [vec![QEMU.to_owned()], self.arguments(flags), ["-incoming", "defer", "-S"].map(str::to_owned).to_vec()].concat();
        format!("\n[[template]]\nname = \"linux\"\ncommand = {command:?}\n")
    }

    /// Starts the guest; its monitor is at `monitor`, its console and log in `run`.
    pub(super) fn start(&self, uuid: &str, monitor: &Path, run: &Path, flags: &DemoFlags) -> Result<Child, Problem> {
        let console = run.join(format!("{}.serial", super::lab::VM));
        let [monitor, console] = [monitor, &console].map(|path| path.display().to_string());
        let fill = |argument: String| argument.replace("{uuid}", uuid).replace("{socket}", &monitor).replace("{serial}", &console);
        let log = fs::File::create(run.join("guest.log")).map_err(|error| local("write a log", &error))?;
        let mut command = Command::new(QEMU);
        command.args(self.arguments(flags).into_iter().map(fill)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.spawn().map_err(|error| local("start QEMU", &error))
    }
}

/// One made for virtual machines before any other.
fn newest_kernel() -> Option<PathBuf> {
    let entries = fs::read_dir("/boot").ok()?.flatten().map(|entry| entry.path());
    let is_kernel = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("vmlinuz-"));
    entries.filter(|path| is_kernel(path) && fs::File::open(path).is_ok()).max_by_key(|path| {
        let name = path.display().to_string();
        (name.contains("cloud"), name)
    })
}

/// Files as the kernel unpacks them at its start: a cpio archive of the form `newc` (kernel documentation,
/// `driver-api/early-userspace/buffer-format`). Each has a path, a mode and its bytes.
fn archive(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    let end: (&str, u32, &[u8]) = ("TRAILER!!!", 0, b"");
    for (index, (path, mode, bytes)) in files.iter().chain([&end]).enumerate() {
        let pad = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(4), 0);
        // Inode, mode, owner, group, links, time, length, four device numbers, length of the path, checksum.
        let numbers = [index + 1, *mode as usize, 0, 0, 1, 0, bytes.len(), 0, 0, 0, 0, path.len() + 1, 0];
        out.extend_from_slice(b"070701");
        out.extend(numbers.iter().flat_map(|number| format!("{number:08x}").into_bytes()));
        out.extend_from_slice(path.as_bytes());
        out.push(0);
        pad(&mut out);
        out.extend_from_slice(bytes);
        pad(&mut out);
    }
    out
}
