//! From inside: what a gateway can still do, and what it cannot.
//!
//! Landlock, seccomp and capabilities belong to a thread. So each test gives them up in a thread of its own.

use std::fs;
use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;

use rustix::thread::CapabilitySet;

use super::*;

struct Place {
    directory: tempfile::TempDir,
    config: Config,
}

/// A configuration whose files are where a laboratory has them.
fn place(more: &str) -> Place {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    for path in ["pki", "policy.d", "outside"] {
        fs::create_dir(root.join(path)).unwrap();
    }
    for file in ["pki/key.pem", "policy.d/a.cedar", "outside/secret"] {
        fs::write(root.join(file), "secret").unwrap();
    }
    let text = r#"
[gateway]
name = "gw-a"
site = "a"
control_socket = "gw/run/api.sock"
state_directory = "gw/state"
audit_directory = "gw/audit"
runtime_directory = "gw/run"
[identity]
certificate = "pki/cert.pem"
key = "pki/key.pem"
signing_key = "pki/signing.pem"
[[identity.trust]]
domain = "example.net"
roots = "pki/roots.pem"
crls = ["pki/crl.pem"]
[policy]
directory = "policy.d"
"#;
    // Certificates are not looked at here.
    let config = crate::config::parse(&format!("{text}{more}"), &root.join("gateway.toml")).unwrap();
    Place { directory, config }
}

/// A peer that is to be found at an address.
fn peer(address: &str) -> String {
    format!("[[peer]]\nname = \"gw-b\"\naddress = \"{address}\"\nspiffe = \"spiffe://example.net/gateway/gw-b\"\nsite = \"b\"\n")
}

/// Runs something inside, or says why there is no inside here. The kernel is asked without what is tested.
fn inside<T: Send>(place: &Place, test: impl FnOnce() -> T + Send) -> Option<T> {
    use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
    let all = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::from_all(ABI::V1));
    let landlock = all.and_then(Ruleset::create).is_ok();
    let seccomp = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").is_ok_and(|actions| actions.contains("errno"));
    if !landlock || !seccomp {
        println!("SKIP this kernel cannot confine a gateway: Landlock {landlock}, seccomp {seccomp}");
        return None;
    }
    let tested = std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let view = enter(&place.config, None).unwrap();
            assert!(view.landlock_abi.is_some() && view.seccomp, "{view:?}");
            test()
        });
        inside.join()
    });
    Some(tested.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

#[test]
fn files_outside_are_out_of_reach() {
    let place = place("");
    let root = place.directory.path().to_owned();
    let secret = root.join("outside/secret");
    assert!(fs::read(&secret).is_ok(), "outside it can be read");
    inside(&place, || {
        let denied = |what: &str, result: std::io::Result<()>| {
            assert_eq!(result.map_err(|error| error.kind()), Err(ErrorKind::PermissionDenied), "{what}");
        };
        denied("read", fs::read(&secret).map(drop));
        denied("write", fs::write(root.join("outside/new"), "x"));
        denied("list", fs::read_dir(root.join("outside")).map(drop));
        denied("remove", fs::remove_file(&secret));
        denied("move away", fs::rename(root.join("gw/state"), root.join("outside/state")));
        fs::write(root.join("gw/run/a"), "x").unwrap();
        let linked = fs::hard_link(root.join("gw/run/a"), root.join("gw/state/a")).unwrap_err();
        assert_eq!(linked.kind(), ErrorKind::CrossesDevices, "no file of one directory in another");
        denied("read a key", fs::read(root.join("pki/key.pem")).map(drop));
        denied("read what lies beside keys", fs::read_dir(root.join("pki")).map(drop));
        denied("write beside keys", fs::write(root.join("pki/new.pem"), "x"));
        denied("write policy", fs::write(root.join("policy.d/b.cedar"), "permit(principal, action, resource);"));
        denied("the host's users", fs::read("/etc/passwd").map(drop));
        denied("other processes", fs::read(format!("/proc/{}/environ", std::process::id())).map(drop));
    });
    assert!(secret.exists());
}

#[test]
fn what_a_gateway_needs_is_within_reach() {
    let place = place("");
    let root = place.directory.path().to_owned();
    inside(&place, || {
        assert_eq!(fs::read_dir(root.join("policy.d")).unwrap().count(), 1);
        for directory in ["state", "audit", "run"] {
            let directory = root.join("gw").join(directory);
            fs::create_dir(directory.join("sub")).unwrap();
            let mut file = fs::File::create(directory.join("sub/a")).unwrap();
            file.write_all(b"x").unwrap();
            file.sync_all().unwrap();
            fs::rename(directory.join("sub/a"), directory.join("sub/b")).unwrap();
            fs::remove_dir_all(directory.join("sub")).unwrap();
        }
        let socket = root.join("gw/run/api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let _client = UnixStream::connect(&socket).unwrap();
        listener.accept().unwrap();
        let one = UdpSocket::bind("127.0.0.1:0").unwrap();
        one.send_to(b"x", one.local_addr().unwrap()).unwrap();
        assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7, "threads are started");
    });
    // How long a thread waited for a processor, also one that is started later.
    let counted = || fs::read("/proc/thread-self/schedstat").is_ok();
    let outside = counted();
    inside(&place, || assert_eq!(std::thread::spawn(counted).join().unwrap(), outside));
    // What replaces a policy is read as well.
    fs::write(root.join("new"), "newer").unwrap();
    fs::rename(root.join("new"), root.join("policy.d/a.cedar")).unwrap();
    inside(&place, || assert_eq!(fs::read(root.join("policy.d/a.cedar")).unwrap(), b"newer"));
}

const DISK: &str = "
[[vm]]
name = \"web\"
uuid = \"00000000-0000-4000-8000-000000000001\"
tenant = \"t\"
classification = \"internal\"
[[vm.disk]]
device = \"a\"
file = \"disks/a.img\"
";

#[test]
fn files_of_disks_get_and_lose_their_names_and_are_neither_read_nor_written() {
    let place = place(DISK);
    let disks = place.directory.path().join("disks");
    fs::create_dir(&disks).unwrap();
    fs::write(disks.join("made"), "a disk").unwrap();
    inside(&place, || {
        let file = disks.join("a.img");
        for result in [fs::read(disks.join("made")).map(drop), fs::write(disks.join("made"), "x"), fs::write(disks.join("new"), "x")] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
        }
        fs::hard_link(disks.join("made"), &file).unwrap();
        fs::remove_file(disks.join("made")).unwrap();
        fs::rename(&file, disks.join("aside")).unwrap();
        assert_eq!(fs::symlink_metadata(disks.join("aside")).unwrap().len(), 6);
        let away = fs::rename(disks.join("aside"), place.directory.path().join("gw/state/stolen"));
        assert!(away.is_err(), "it does not become a file of the gateway's");
    });
    assert_eq!(fs::read(disks.join("aside")).unwrap(), b"a disk");
}

#[test]
fn names_of_peers_are_resolved() {
    let place = place(&peer("localhost:4433"));
    inside(&place, || {
        use std::net::ToSocketAddrs;
        assert!("localhost:4433".to_socket_addrs().unwrap().next().unwrap().ip().is_loopback());
    });
}

#[test]
fn no_program_is_started_and_no_process_is_made() {
    let place = place("");
    let program = std::ffi::CString::new("/bin/true").unwrap();
    assert!(Command::new("/bin/true").status().is_ok(), "outside it starts");
    inside(&place, || {
        assert!(Command::new("/bin/true").status().is_err());
        // If this were not refused, it would be the end of this test program.
        assert_eq!(nix::unistd::execv(&program, &[&program]).unwrap_err(), nix::errno::Errno::EPERM);
    });
}

#[test]
fn other_processes_are_out_of_reach() {
    let place = place("");
    let mut other = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
    let pid = nix::unistd::Pid::from_raw(other.id().cast_signed());
    assert!(nix::sys::signal::kill(pid, None).is_ok(), "outside it can be signalled");
    inside(&place, || {
        assert_eq!(nix::sys::ptrace::attach(pid).unwrap_err(), nix::errno::Errno::EPERM);
        assert_eq!(nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap_err(), nix::errno::Errno::EPERM);
        let limit = rustix::process::Rlimit { current: Some(64), maximum: Some(64) };
        let lowered = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
        assert_eq!(lowered.unwrap_err(), rustix::io::Errno::PERM);
    });
    assert!(other.try_wait().unwrap().is_none(), "it lives on");
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn nothing_is_reached_by_tcp_and_no_other_kind_of_socket_is_made() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let place = place("");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    assert!(TcpStream::connect(address).is_ok(), "outside it answers");
    inside(&place, || {
        assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::PermissionDenied);
        for (family, kind) in [
            (AddressFamily::Netlink, SockType::Raw),
            (AddressFamily::Packet, SockType::Raw),
            (AddressFamily::Vsock, SockType::Stream),
            (AddressFamily::Inet, SockType::Raw),
            (AddressFamily::Inet6, SockType::Stream),
        ] {
            assert_eq!(socket(family, kind, SockFlag::empty(), None).unwrap_err(), nix::errno::Errno::EPERM, "{family:?} {kind:?}");
        }
    });
}

#[test]
fn capabilities_are_given_up_and_none_come_back() {
    let kept = std::thread::spawn(|| {
        user::clear_capabilities(user::kept(&place("").config)).unwrap();
        rustix::thread::capabilities(None).unwrap()
    });
    let kept = kept.join().unwrap();
    let root = CapabilitySet::DAC_OVERRIDE | CapabilitySet::NET_ADMIN;
    assert!((kept.permitted | kept.inheritable).difference(root).is_empty(), "{kept:?}");
    let place = place("");
    inside(&place, || {
        // The C library would ask it of every thread of this test.
        assert_eq!(rustix::thread::set_thread_uid(rustix::process::Uid::ROOT).unwrap_err(), rustix::io::Errno::PERM);
        assert_eq!(nix::unistd::chroot("/").unwrap_err(), nix::errno::Errno::EPERM);
        let here = place.directory.path();
        let mounted = nix::mount::mount(Some(here), here, None::<&str>, nix::mount::MsFlags::MS_BIND, None::<&str>);
        assert_eq!(mounted.unwrap_err(), nix::errno::Errno::EPERM);
    });
}

#[test]
fn only_what_the_configuration_names_is_allowed() {
    for (address, resolves) in [("192.0.2.1:4433", false), ("[2001:db8::1]:4433", false), ("gw-b.example.net:4433", true)] {
        let place = place(&peer(address));
        let root = place.directory.path();
        let allowed: Vec<_> = files::allowed(&place.config).into_iter().map(|(path, _)| path).collect();
        assert_eq!(allowed.iter().any(|path| path.ends_with("etc")), resolves, "{address}");
        let own: Vec<_> = allowed.iter().filter_map(|path| path.strip_prefix(root).ok()).collect();
        assert!(allowed.contains(&PathBuf::from("/proc/self/task")) && !allowed.iter().any(|path| path.starts_with("/dev")));
        assert_eq!(own, ["gw/audit", "gw/run", "gw/state", "policy.d"].map(Path::new), "{address}");
    }
    // What surrounds a file in the root directory would be everything.
    let allowed = files::around_key(Path::new("/key.pem"));
    assert!(allowed.iter().all(|(path, _)| path != Path::new("/")) && allowed.iter().any(|(path, _)| path == Path::new("/key.pem")));
}

#[test]
fn who_holds_a_key_reads_what_is_around_it_and_what_replaces_it_and_nothing_else() {
    let place = place("");
    let root = place.directory.path().to_owned();
    let key = root.join("pki/key.pem");
    // Asked without what is tested.
    if inside(&place, || ()).is_none() {
        return;
    }
    std::thread::scope(|scope| {
        let held = scope.spawn(|| {
            files::confine(&files::around_key(&key)).unwrap();
            calls::confine_holder().unwrap();
            assert_eq!(fs::read(&key).unwrap(), b"secret");
            assert_eq!(fs::read(root.join("policy.d/a.cedar")).unwrap_err().kind(), ErrorKind::PermissionDenied);
            assert_eq!(fs::write(&key, "x").unwrap_err().kind(), ErrorKind::PermissionDenied);
            assert_eq!(fs::remove_file(&key).unwrap_err().kind(), ErrorKind::PermissionDenied);
            assert!(UdpSocket::bind("127.0.0.1:0").is_err() && UnixStream::pair().is_err());
            assert!(std::thread::Builder::new().spawn(|| ()).is_err(), "no thread");
            assert!(Command::new("/bin/true").status().is_err(), "no program");
        });
        held.join().unwrap();
    });
    fs::write(root.join("pki/new"), "newer").unwrap();
    fs::rename(root.join("pki/new"), &key).unwrap();
    std::thread::scope(|scope| {
        let held = scope.spawn(|| {
            files::confine(&files::around_key(&key)).unwrap();
            fs::read(&key).unwrap()
        });
        assert_eq!(held.join().unwrap(), b"newer");
    });
}

#[test]
fn keys_that_lie_where_a_gateway_needs_other_files_are_said_to_be_readable() {
    let mut place = place("");
    let Some(apart) = inside(&place, || keys_are_readable(&place.config)) else { return };
    assert!(!apart);
    let beside_policies = place.directory.path().join("policy.d/key.pem");
    fs::write(&beside_policies, "secret").unwrap();
    place.config.identity.key = crate::config::KeyFile::File(beside_policies);
    assert_eq!(inside(&place, || keys_are_readable(&place.config)), Some(true));
}

#[test]
fn a_gateway_that_requires_what_the_kernel_has_not_does_not_start() {
    let mut place = place("");
    for (setting, starts) in [(Sandboxing::Require, false), (Sandboxing::Auto, true)] {
        place.config.gateway.sandbox = setting;
        let without = missing(place.config.gateway.sandbox, "Landlock", "it is not there");
        assert_eq!(without.is_ok(), starts, "{setting}");
    }
    place.config.gateway.sandbox = Sandboxing::Off;
    assert_eq!(enter(&place.config, None).unwrap(), SandboxView { setting: "off".into(), ..SandboxView::default() });
    assert!(fs::read("/etc/passwd").is_ok());
}

#[test]
fn what_the_kernel_has_is_known_and_asking_confines_nobody() {
    let confined = inside(&place(""), kernel);
    if let Some((landlock, seccomp)) = confined {
        assert!(landlock.is_err() && seccomp.is_err(), "inside nothing more is given up");
        let (landlock, seccomp) = kernel();
        assert!(landlock.is_ok_and(|abi| abi >= 1) && seccomp.is_ok());
    }
    assert!(fs::read("/etc/passwd").is_ok());
}

#[test]
fn a_user_that_is_not_there_is_named() {
    let error = Account::find("no-such-user-here").unwrap_err();
    assert!(error.message.contains("no-such-user-here"), "{error:?}");
    assert_eq!(Account::find("root").unwrap().uid, 0);
}
