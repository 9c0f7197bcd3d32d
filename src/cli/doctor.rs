//! What this host lacks or loses.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use serde::Serialize;
use x509_parser::pem::parse_x509_pem;

use super::flags::DoctorFlags;
use super::output::Out;
use super::{Ending, render};
use crate::config::{Config, DEFAULT_FILE};
use crate::control::{Check, CheckVerdict, Exit, GatewayView};
use crate::telemetry::schema_tag;

schema_tag!(
    /// Schema of `doctor --json`.
    DoctorSchema = "sealane.doctor/1"
);

#[derive(Serialize)]
struct Object<'a> {
    schema: DoctorSchema,
    checks: &'a [Check],
}

pub(super) fn doctor(flags: &DoctorFlags, out: Out) -> Ending {
    let mut checks = vec![kvm(), processor(&read("/proc/cpuinfo")), huge_pages(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))];
    for name in ["rmem_max", "wmem_max"] {
        checks.push(socket_buffer(name, &read(&format!("/proc/sys/net/core/{name}"))));
    }
    checks.push(open_files(&read("/proc/self/limits")));
    let (landlock, seccomp) = crate::gateway::sandbox_of_kernel();
    checks.extend(sandbox(landlock, seccomp));
    let environment = std::env::var_os("SEALANE_CONFIG").filter(|value| !value.is_empty()).map(PathBuf::from);
    let default = || Some(PathBuf::from(DEFAULT_FILE)).filter(|file| file.exists());
    match flags.config.clone().or(environment).or_else(default) {
        Some(file) => checks.extend(configuration(&file)),
        None => {
            checks.push(check("configuration", CheckVerdict::Skipped, format!("no {DEFAULT_FILE}"), Some("name one with --config FILE")))
        }
    }
    if out.json {
        out.object(&Object { schema: DoctorSchema, checks: &checks });
    } else {
        out.data(&render::checks(out, &checks));
    }
    let failed = checks.iter().any(|check| check.verdict == CheckVerdict::Fail);
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

fn check(name: &str, verdict: CheckVerdict, detail: impl Into<String>, hint: Option<&str>) -> Check {
    Check { name: name.to_owned(), verdict, detail: detail.into(), hint: hint.map(str::to_owned) }
}

/// What cannot be read is judged as empty.
fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn kvm() -> Check {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => check("kvm", CheckVerdict::Pass, "/dev/kvm can be opened", None),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => check(
            "kvm",
            CheckVerdict::Warn,
            "this user may not open /dev/kvm: no guest can run under KVM",
            Some("add the user to the group kvm"),
        ),
        Err(error) => check(
            "kvm",
            CheckVerdict::Warn,
            format!("cannot open /dev/kvm: {error}: no guest can run under KVM"),
            Some("load kvm_intel or kvm_amd; inside a VM, enable nested virtualisation"),
        ),
    }
}

fn processor(cpuinfo: &str) -> Check {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags") || line.starts_with("Features")).unwrap_or_default();
    let aes = flags.split_whitespace().any(|flag| flag == "aes");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let detail = format!("{cores} cores, {} AES instructions", if aes { "with" } else { "without" });
    if aes {
        check("processor", CheckVerdict::Pass, detail, None)
    } else {
        check(
            "processor",
            CheckVerdict::Warn,
            detail + ": encryption takes several times the CPU",
            Some("inside a VM, pass the host's CPU model through"),
        )
    }
}

/// Measured: filling 1.25 GiB of fresh shared memory takes 0.75 s with small pages, 0.08 s with huge ones.
fn huge_pages(setting: &str) -> Check {
    let current = setting.split(['[', ']']).nth(1).unwrap_or("unknown");
    match current {
        "always" | "within_size" | "advise" | "force" => {
            check("huge pages", CheckVerdict::Pass, format!("shared memory may use huge pages ({current})"), None)
        }
        _ => check(
            "huge pages",
            CheckVerdict::Warn,
            format!("shared memory uses small pages ({current}): guest RAM is filled about nine times slower"),
            Some("echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        ),
    }
}

/// A lane at 10 Gbit/s needs this much if its thread looks at the socket 5 ms late. Lanes ask for more and take what they get.
const SOCKET_BUFFER_BYTES: u64 = 7_500_000;

fn socket_buffer(name: &str, setting: &str) -> Check {
    let title = format!("net.core.{name}");
    match setting.trim().parse::<u64>() {
        Ok(bytes) if bytes >= SOCKET_BUFFER_BYTES => check(&title, CheckVerdict::Pass, render::bytes(bytes), None),
        Ok(bytes) => {
            let hint = format!("sysctl -w net.core.{name}={SOCKET_BUFFER_BYTES}");
            let detail = format!(
                "{}, {} are wanted: fast links lose datagrams, unless the gateway has CAP_NET_ADMIN. The larger value costs kernel \
                 memory only while datagrams wait, at most twice itself for each lane",
                render::bytes(bytes),
                render::bytes(SOCKET_BUFFER_BYTES)
            );
            check(&title, CheckVerdict::Warn, detail, Some(&hint))
        }
        Err(_) => check(&title, CheckVerdict::Skipped, "cannot be read here", None),
    }
}

fn open_files(limits: &str) -> Check {
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap_or_default();
    match line.split_whitespace().nth(3) {
        Some("unlimited") => check("open files", CheckVerdict::Pass, "unlimited", None),
        Some(soft) if soft.parse::<u64>().is_ok_and(|soft| soft >= 1024) => {
            check("open files", CheckVerdict::Pass, format!("{soft} for each process"), None)
        }
        Some(soft) => {
            check("open files", CheckVerdict::Warn, format!("{soft} for each process: few migrations at once"), Some("ulimit -n 65536"))
        }
        None => check("open files", CheckVerdict::Skipped, "cannot be read here", None),
    }
}

/// The first version of Landlock that knows of TCP and of signals is newer than the first; seccomp does those as well.
fn sandbox(landlock: Result<u32, String>, seccomp: Result<(), String>) -> [Check; 2] {
    let lost = |what: &str, why: String| format!("{what}: {why}");
    [
        match landlock {
            Ok(abi) => check("Landlock", CheckVerdict::Pass, format!("interface {abi}: a gateway sees its own files alone"), None),
            Err(why) => check(
                "Landlock",
                CheckVerdict::Warn,
                lost("a gateway that is taken over sees all files of its user", why),
                Some("Linux 5.13 or later, with `landlock` in the kernel's `lsm=`"),
            ),
        },
        match seccomp {
            Ok(()) => check("seccomp", CheckVerdict::Pass, "a gateway makes no system calls but its own", None),
            Err(why) => check(
                "seccomp",
                CheckVerdict::Warn,
                lost("a gateway that is taken over can start programs", why),
                Some("a kernel with CONFIG_SECCOMP_FILTER; some containers forbid it"),
            ),
        },
    ]
}

fn configuration(file: &Path) -> Vec<Check> {
    let config = match super::config::load(file) {
        Ok(config) => config,
        Err(problem) => return vec![check("configuration", CheckVerdict::Fail, problem.message, problem.hint.as_deref())],
    };
    let mut checks = vec![check("configuration", CheckVerdict::Pass, format!("{} has no problems", file.display()), None)];
    let now = jiff::Timestamp::now().as_second();
    checks.push(certificate("certificate", &config.identity.certificate, now));
    for trust in &config.identity.trust {
        checks.push(certificate(&format!("root of {}", trust.domain), &trust.roots, now));
        for crl in &trust.crls {
            checks.push(revocation_list(&format!("CRL of {}", trust.domain), crl, now));
        }
    }
    checks.extend(crate::gateway::check_tokens(&config).into_iter().map(|(key, found)| match found {
        Ok(()) => check("key in a token", CheckVerdict::Pass, format!("{key} is there"), None),
        Err(problem) => check("key in a token", CheckVerdict::Fail, problem.message, problem.hint.as_deref()),
    }));
    checks.extend(directories(&config));
    checks.extend(running(super::daemon::running_gateway(&config.gateway.control_socket)));
    checks
}

/// What a gateway says of itself, if one runs.
fn running(gateway: Option<GatewayView>) -> Option<Check> {
    let gateway = gateway?;
    let name = "running gateway";
    Some(match gateway.impaired {
        None => check(name, CheckVerdict::Pass, format!("{} says that all is well", gateway.name), None),
        Some(why) => check(name, CheckVerdict::Fail, why, Some("`systemctl restart sealane`")),
    })
}

/// Seconds of a day.
const DAY: i64 = 86_400;
/// Two weeks are time enough for a person to act.
const SOON_DAYS: i64 = 14;

fn certificate(name: &str, path: &Path, now: i64) -> Check {
    let end = std::fs::read(path).ok().and_then(|text| {
        let (_, block) = parse_x509_pem(&text).ok()?;
        block.parse_x509().ok().map(|certificate| certificate.validity().not_after.timestamp())
    });
    ending(name, path, end, now, "issue a new one, e.g. with `sealane pki issue DIR --renew`", SOON_DAYS)
}

fn revocation_list(name: &str, path: &Path, now: i64) -> Check {
    let end = std::fs::read(path).ok().and_then(|bytes| {
        let der = parse_x509_pem(&bytes).map_or_else(|_| bytes.clone(), |(_, block)| block.contents);
        let (_, list) = x509_parser::parse_x509_crl(&der).ok()?;
        list.next_update().map(|next| next.timestamp())
    });
    ending(name, path, end, now, "peers are refused without a fresh list; `sealane pki refresh-crl DIR` makes one", 1)
}

fn ending(name: &str, path: &Path, end: Option<i64>, now: i64, hint: &str, soon_days: i64) -> Check {
    let Some(end) = end else { return check(name, CheckVerdict::Fail, format!("cannot read `{}`", path.display()), None) };
    let days = (end - now).div_euclid(DAY);
    let date = jiff::Timestamp::from_second(end).map(|time| time.to_string()).unwrap_or_default();
    match days {
        ..0 => check(name, CheckVerdict::Fail, format!("ended on {date}"), Some(hint)),
        _ if days < soon_days => check(name, CheckVerdict::Warn, format!("ends on {date}, in {days} days"), Some(hint)),
        _ => check(name, CheckVerdict::Pass, format!("until {date}, for {days} days"), None),
    }
}

fn directories(config: &Config) -> Vec<Check> {
    let gateway = &config.gateway;
    let named = [("state", &gateway.state_directory), ("audit", &gateway.audit_directory), ("runtime", &gateway.runtime_directory)];
    named.into_iter().map(|(name, path)| directory(&format!("{name} directory"), path)).collect()
}

/// LIMIT: room for years of audit entries and a journal; a full disk stops migrations.
const FREE_BYTES: u64 = 1 << 30;

fn directory(name: &str, path: &Path) -> Check {
    let shown = path.display();
    let nearest = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let Ok(room) = nix::sys::statvfs::statvfs(nearest) else {
        return check(name, CheckVerdict::Fail, format!("cannot look at `{shown}`"), None);
    };
    if room.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
        return check(name, CheckVerdict::Fail, format!("`{shown}` is on a read-only file system"), None);
    }
    let free = room.fragment_size().saturating_mul(room.blocks_available());
    let detail = format!("`{shown}`, {} free", render::bytes(free));
    let verdict = if free < FREE_BYTES { CheckVerdict::Warn } else { CheckVerdict::Pass };
    check(name, verdict, detail, (verdict == CheckVerdict::Warn).then_some("a full disk stops migrations"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_settings_are_judged_by_their_values() {
        use CheckVerdict::{Pass, Skipped, Warn};
        assert_eq!(huge_pages("always within_size [advise] never deny force\n").verdict, Pass);
        assert_eq!(huge_pages("always within_size advise [never] deny force\n").verdict, Warn);
        assert_eq!(huge_pages("").verdict, Warn);
        assert_eq!(socket_buffer("rmem_max", "212992\n").verdict, Warn);
        assert_eq!(socket_buffer("rmem_max", "16777216\n").verdict, Pass);
        let small = socket_buffer("wmem_max", "212992\n");
        assert!(small.detail.contains("208 KiB") && small.hint.unwrap().ends_with("net.core.wmem_max=7500000"), "{}", small.detail);
        assert_eq!(socket_buffer("rmem_max", "").verdict, Skipped);
        assert_eq!(open_files("Max open files            256                 4096                 files\n").verdict, Warn);
        assert_eq!(open_files("Max open files            65536                65536                files\n").verdict, Pass);
        assert_eq!(processor("flags\t\t: fpu aes avx2\n").verdict, Pass);
        assert_eq!(processor("flags\t\t: fpu vaes\n").verdict, Warn);
    }

    #[test]
    fn an_ended_certificate_fails_and_one_that_ends_soon_warns() {
        let of = |days: i64| ending("certificate", Path::new("x"), Some(1_000_000 + days * DAY + 5), 1_000_000, "renew", 14).verdict;
        assert_eq!([of(-1), of(0), of(13), of(14)], [CheckVerdict::Fail, CheckVerdict::Warn, CheckVerdict::Warn, CheckVerdict::Pass]);
        assert_eq!(ending("certificate", Path::new("x"), None, 0, "renew", 14).verdict, CheckVerdict::Fail);
    }

    #[test]
    fn every_warning_says_what_is_lost_and_what_to_do() {
        let sandbox = sandbox(Err("none".into()), Err("none".into()));
        for check in [huge_pages(""), socket_buffer("wmem_max", "1"), open_files("Max open files 1 1 files"), processor("")]
            .into_iter()
            .chain(sandbox)
        {
            assert!(check.hint.is_some() || check.verdict == CheckVerdict::Skipped, "{check:?}");
        }
    }
}
