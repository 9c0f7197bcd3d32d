//! Both sides of the socket, the launcher's in a thread.

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::thread::JoinHandle;

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

use super::*;
use crate::hypervisor::VmmProcess;
use crate::storage::DiskFormat;
use crate::telemetry::Problem;

const TEMPLATES: [(&str, &str); 3] = [("waits", "sleep 1000; true"), ("ends", "exit 3"), ("says", "echo $0 $1 $2; exit 0")];

fn registration(runtime: &Path) -> Registration {
    let shell = |script: &str| ["/bin/sh", "-c", script, "{socket}", "{vm}", "{serial}"].map(str::to_owned).to_vec();
    let command = |(name, script): (&str, &str)| (name.to_owned(), Registered { command: shell(script), max_memory_bytes: 4096 });
    let missing = Registered { command: vec!["/no/such/vmm".to_owned(), "{socket}".to_owned()], max_memory_bytes: 4096 };
    let templates = TEMPLATES.into_iter().map(command).chain([("missing".to_owned(), missing)]).collect();
    let disks = vec![disk(runtime, DiskFormat::Raw)];
    Registration {
        runtime_directory: runtime.to_owned(),
        user: None,
        templates,
        disks,
        files: vec![runtime.join("a.crl"), runtime.join("b.crl")],
    }
}

/// The longest that may be made.
fn disk(directory: &Path, format: DiskFormat) -> DiskPlace {
    DiskPlace { file: directory.join("web-1.img"), format, bytes: 1 << 20, set_aside: false, disk: 0 }
}

fn sockets() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

/// One that serves in a thread, and what its gateway has of it.
fn launcher(runtime: &Path) -> (Launcher, JoinHandle<Result<(), Problem>>) {
    let (own, its) = sockets();
    let registration = registration(runtime);
    (Launcher::over(own, runtime.to_owned(), registration.files.clone()), std::thread::spawn(|| process::serve(its, registration)))
}

fn start(template: &str, number: u8) -> Start {
    Start {
        template: template.to_owned(),
        migration: MigrationId([number; 16]),
        vm: "web-1".parse().unwrap(),
        uuid: VmUuid([7; 16]),
        memory_bytes: 4096,
        vcpus: 1,
    }
}

fn lives(pid: u32) -> bool {
    // One that has ended and was not waited for is a directory there too.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn wait(vmm: &mut dyn VmmProcess) -> std::process::ExitStatus {
    loop {
        if let Some(status) = vmm.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn a_vmm_is_started_by_the_name_of_its_template_and_its_end_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let (launcher, serving) = launcher(directory.path());
    assert_eq!(wait(launcher.start(&start("ends", 1)).unwrap().as_mut()).code(), Some(3));
    let mut waits = launcher.start(&start("waits", 2)).unwrap();
    assert!(lives(waits.pid()) && waits.try_wait().unwrap().is_none());
    let mut says = launcher.start(&start("says", 3)).unwrap();
    assert!(wait(says.as_mut()).success());
    let variables = launcher.variables(&start("says", 3));
    let expected = format!("{} web-1 {}\n", variables.socket.display(), directory.path().join("web-1.serial").display());
    assert_eq!(std::fs::read_to_string(variables.log).unwrap(), expected);
    // The shell's child goes with it.
    waits.kill().unwrap();
    assert_eq!(wait(waits.as_mut()).signal(), Some(9));
    assert!(!lives(waits.pid()));
    waits.kill().unwrap();
    drop((waits, says, launcher));
    serving.join().unwrap().unwrap();
}

#[test]
fn nothing_but_the_templates_is_started() {
    let directory = tempfile::tempdir().unwrap();
    let (launcher, _serving) = launcher(directory.path());
    let refused = |what: &Start| launcher.start(what).unwrap_err().to_string();
    assert!(refused(&start("/bin/sh", 1)).contains("no template `/bin/sh`"));
    assert!(refused(&start(INCOMING, 1)).contains("no template"));
    assert!(refused(&Start { memory_bytes: 4097, ..start("waits", 1) }).contains("allows 4096"));
    assert!(refused(&start("missing", 1)).contains("No such file"));
    // A link at the place of the log leads nowhere.
    std::os::unix::fs::symlink(directory.path().join("elsewhere"), launcher.variables(&start("ends", 9)).log).unwrap();
    assert!(launcher.start(&start("ends", 9)).is_err() && !directory.path().join("elsewhere").exists());
    // And it goes on.
    assert_eq!(wait(launcher.start(&start("ends", 2)).unwrap().as_mut()).code(), Some(3));
}

#[test]
fn vmms_outlive_the_gateway_and_its_launcher() {
    let directory = tempfile::tempdir().unwrap();
    let (launcher, serving) = launcher(directory.path());
    let pid = launcher.start(&start("waits", 1)).unwrap().pid();
    drop(launcher);
    serving.join().unwrap().unwrap();
    assert!(lives(pid));
    rustix::process::kill_process_group(rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(), rustix::process::Signal::KILL).unwrap();
}

#[test]
fn files_of_disks_are_made_where_the_configuration_has_them_and_nowhere_else() {
    let directory = tempfile::tempdir().unwrap();
    let (launcher, _serving) = launcher(directory.path());
    let listed = disk(directory.path(), DiskFormat::Raw);
    let id = MigrationId([1; 16]);
    launcher.make_disk(id, &DiskPlace { bytes: 4096, ..listed.clone() }).unwrap();
    let made = directory.path().join(format!("web-1.img.{id}.new"));
    assert_eq!(std::fs::metadata(&made).unwrap().len(), 4096);
    std::fs::write(&made, "mine").unwrap();
    for (what, id, place) in [
        ("there already", id, listed.clone()),
        ("longer", MigrationId([2; 16]), DiskPlace { bytes: (1 << 20) + 1, ..listed.clone() }),
        ("elsewhere", MigrationId([2; 16]), DiskPlace { file: directory.path().join("web-2.img"), ..listed.clone() }),
        ("another format", MigrationId([2; 16]), disk(directory.path(), DiskFormat::Qcow2 { cluster_bytes: 65_536 })),
    ] {
        assert!(launcher.make_disk(id, &place).is_err(), "{what}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    assert_eq!(std::fs::read(&made).unwrap(), b"mine");
}

#[test]
fn the_files_that_are_listed_are_opened_as_they_are_now_and_no_others() {
    use crate::identity::OpenFiles;
    use std::io::{ErrorKind, Read};
    let directory = tempfile::tempdir().unwrap();
    let (launcher, serving) = launcher(directory.path());
    let path = |name: &str| directory.path().join(name);
    let read = |name: &str| {
        let mut text = String::new();
        launcher.open(&path(name)).map(|mut file| file.read_to_string(&mut text).unwrap()).map(|_| text)
    };
    assert_eq!(read("b.crl").unwrap_err().kind(), ErrorKind::NotFound);
    for text in ["one", "another"] {
        std::fs::write(path("new"), text).unwrap();
        std::fs::rename(path("new"), path("b.crl")).unwrap();
        assert_eq!(read("b.crl").unwrap(), text);
    }
    std::fs::write(path("key.pem"), "secret").unwrap();
    assert_eq!(read("key.pem").unwrap_err().kind(), ErrorKind::PermissionDenied, "the gateway's end");
    let asked = launcher.open_number(7).unwrap_err();
    assert_eq!(asked.kind(), ErrorKind::NotFound, "the launcher's: {asked}");
    // A pipe is waited for by nobody.
    rustix::fs::mknodat(rustix::fs::CWD, path("a.crl"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    launcher.open(&path("a.crl")).unwrap();
    drop(launcher);
    serving.join().unwrap().unwrap();
}

#[test]
fn what_is_not_said_as_it_should_be_ends_the_launcher() {
    let directory = tempfile::tempdir().unwrap();
    let long = vec![b' '; crate::limits::LAUNCHER_MESSAGE_BYTES_MAX + 1];
    let request = serde_json::to_string(&Request::Start { number: 1, what: start("ends", 1) }).unwrap();
    let leads_out = request.replace("web-1", "../web-1");
    assert_ne!(leads_out, request);
    for (what, message) in [("no words", b"start /bin/sh".to_vec()), ("a name that leads out", leads_out.into()), ("too long", long)] {
        let (own, its) = sockets();
        let registration = registration(directory.path());
        let serving = std::thread::spawn(|| process::serve(its, registration));
        send(&own, &message, SendFlags::empty()).unwrap();
        assert!(serving.join().unwrap().is_err(), "{what}");
    }
}

#[test]
fn a_launcher_that_has_ended_is_named_by_what_depended_on_it() {
    let (own, its) = sockets();
    let launcher = Launcher::over(own, PathBuf::new(), Vec::new());
    assert!(!launcher.has_ended());
    drop(its);
    assert!(launcher.has_ended());
    let error = launcher.start(&start("ends", 1)).unwrap_err();
    assert!(error.to_string().contains("the launcher of VMMs has ended"), "{error}");
}

#[test]
fn all_that_a_configuration_has_and_nothing_else_is_registered() {
    let text = "[gateway]\nname = \"gw-a\"\nsite = \"dc1\"\n[identity]\ncertificate = \"c\"\nkey = \"k\"\nsigning_key = \"s\"\n\
        [[identity.trust]]\ndomain = \"example.net\"\nroots = \"r\"\ncrls = [\"l\"]\n\
        [incoming]\ncommand = [\"vmm\", \"{socket}\"]\nmax_memory = \"1GiB\"\n\
        [[template]]\nname = \"pc\"\ncommand = [\"qemu\", \"-incoming\", \"defer\", \"{socket}\"]\nmax_memory = \"2GiB\"\n\
        [[vm]]\nname = \"web\"\nuuid = \"00000000-0000-4000-8000-000000000001\"\ntenant = \"t\"\nclassification = \"internal\"\n\
        template = \"pc\"\n[[vm.disk]]\ndevice = \"a\"\nfile = \"/disks/a\"\nmax_size = \"1MiB\"\n[[vm.disk]]\ndevice = \"b\"\n";
    let registration = Registration::of(&crate::config::parse(text, Path::new("/etc/sealane/gateway.toml")).unwrap());
    let names: Vec<_> = registration.templates().unwrap().into_keys().collect();
    assert_eq!(names, [INCOMING, "pc"]);
    assert_eq!(registration.files, ["l", "r", "c"].map(|file| Path::new("/etc/sealane").join(file)), "what is no secret");
    assert_eq!(registration.disks.iter().map(|disk| (disk.file.to_str(), disk.bytes)).collect::<Vec<_>>(), [(Some("/disks/a"), 1 << 20)]);
    let read: Registration = serde_json::from_slice(&serde_json::to_vec(&registration).unwrap()).unwrap();
    assert_eq!((read.templates.len(), read.disks), (2, registration.disks));
}
