//! Disks that move with a QEMU's guest: which, whether they may, and new files for them.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::statfs;

use crate::config::{self, DiskFormat, Existing};
use crate::control::{MigrateRequest, Storage};
use crate::engine::{self, DiskOrder};
use crate::gateway::Gateway;
use crate::gateway::judge::DisksAsked;
use crate::gateway::kept::twin_file;
use crate::hypervisor::qemu::{QemuSource, is_encrypted};
use crate::hypervisor::{Address, Disk, HypervisorError, Machine};
use crate::limits;
use crate::policy;
use crate::storage::{self, DiskPlace, LaidDisks};
use crate::telemetry::{self, Problem, RunningOn};
use crate::types::MigrationId;
use crate::wire::ErrorClass;

/// What a request says of disks that are to move.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskWish {
    /// Compare them in the pause.
    pub(super) verify: bool,
    /// The guest stays.
    pub(super) only: bool,
}

impl DiskWish {
    /// What of disks is asked about a guest that has these.
    pub(super) fn asked(wish: Option<Self>, found: &[Disk]) -> DisksAsked {
        match wish {
            None => DisksAsked::default(),
            Some(Self { only, .. }) => DisksAsked::of(if only { policy::Storage::Only } else { policy::Storage::All }, found),
        }
    }
}

/// What the note of laid disks is called, beside their twin.
pub(super) const LAID: &str = "disks";
/// The socket of either end's hypervisor for its disks.
pub(super) const SOCKET: &str = "nbd";

/// The disks that move with a guest: all that it can write to, and no other than the configuration lists, if it lists any.
///
/// # Errors
/// What is different, in words.
pub(super) fn authorised(vm: &config::Vm, found: &[Disk]) -> Result<(), String> {
    let names = || found.iter().map(|disk| disk.device.as_str()).collect::<Vec<_>>().join("`, `");
    if vm.disks.is_empty() {
        return Ok(());
    }
    for disk in found {
        let Some(listed) = vm.disks.iter().find(|listed| listed.device == disk.device) else {
            return Err(format!("VM `{}` has a disk `{}`, which is none of its `[[vm.disk]]`", vm.name, disk.device));
        };
        if disk.bytes > listed.max_size.bytes {
            let most = listed.max_size.bytes;
            return Err(format!("disk `{}` of VM `{}` has {} bytes: at most {most} may move", disk.device, vm.name, disk.bytes));
        }
    }
    if found.len() != vm.disks.len() {
        return Err(format!("VM `{}` has the disks `{}`: its `[[vm.disk]]` lists {}", vm.name, names(), vm.disks.len()));
    }
    Ok(())
}

/// Whether what is offered of disks makes sense, and is what this gateway lets come.
///
/// # Errors
/// `Err(true)` when it makes none; what is wrong, in words.
pub(super) fn check_offered(vm: &config::Vm, machine: &Machine) -> Result<(), (bool, String)> {
    let disks = &machine.disks;
    let twice = |disk: &Disk| disks.iter().filter(|other| other.device == disk.device).count() > 1;
    let wrong = |disk: &&Disk| {
        let name = 1..=limits::DISK_NAME_BYTES_MAX;
        !name.contains(&disk.device.len())
            || disk.device.contains(char::is_control)
            || !(1..=limits::DISK_BYTES_MAX).contains(&disk.bytes)
            || twice(disk)
    };
    let of_nothing = machine.disks_only && disks.is_empty();
    if of_nothing || disks.len() > limits::DISKS_MAX || disks.iter().any(|disk| wrong(&disk)) {
        return Err((true, "the list of disks is malformed".to_owned()));
    }
    if disks.is_empty() { Ok(()) } else { authorised(vm, disks).map_err(|why| (false, why)) }
}

/// Files of disks that are on this host alone, as far as that can be seen.
pub(super) fn local_files(disks: &[(Disk, String)]) -> Vec<String> {
    /// `statfs` of file systems that are no network's: ext, XFS, Btrfs, F2FS, tmpfs, overlay, ZFS.
    const LOCAL: [i64; 7] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x0102_1994, 0x794c_7630, 0x2fc1_2fc1];
    let local = |file: &&String| {
        let path = Path::new(file.as_str());
        let here = path.is_absolute() && path.is_file();
        here && statfs(path).is_ok_and(|found| LOCAL.contains(&found.f_type))
    };
    disks.iter().map(|(_, file)| file).filter(local).cloned().collect()
}

/// What a request says of disks, if it says anything.
pub(super) fn wished(vm: &config::Vm, address: &str, request: &MigrateRequest) -> Result<Option<DiskWish>, Problem> {
    let misuse = |why: String| Problem::new(ErrorClass::Misuse, why).with_running_on(RunningOn::Source);
    let wish = DiskWish { verify: request.verify_disks, only: request.storage == Storage::Only };
    match (request.storage, Address::parse(address)) {
        (Storage::None, _) if wish.verify => Err(misuse("`--verify-disks` is about disks that move: expected `--storage all`".into())),
        (Storage::Only, _) if wish.verify => {
            let why = "disks of a guest that goes on writing cannot be compared: the migration that follows does, with `--verify-disks`";
            Err(misuse(why.into()))
        }
        (Storage::None, _) => Ok(None),
        (Storage::All | Storage::Only, Address::Qemu(_)) => Ok(Some(wish)),
        (Storage::All | Storage::Only, Address::Attach(_)) => {
            let why = format!("VM `{}` is no QEMU's: moving its disks (`--storage all`) is not built", vm.name);
            Err(misuse(why).with_code("not-built"))
        }
    }
}

/// Which disks move with a guest that leaves; with none it is said which files the destination will not have.
pub(super) fn take_along(vm: &config::Vm, guest: &mut QemuSource, wish: Option<DiskWish>) -> Result<(), Problem> {
    let unreachable = |error: HypervisorError| Problem::new(ErrorClass::Local, telemetry::chain(&error)).with_code("vmm-unreachable");
    let found = guest.disks().map_err(unreachable)?;
    let Some(DiskWish { only, .. }) = wish else {
        let files = local_files(&found);
        if !files.is_empty() {
            let files = files.join("`, `");
            tracing::warn!(vm = %vm.name, files, "its disks stay, on a file system of this host: `--storage all` moves them too");
        }
        return Ok(());
    };
    // Before the other end makes files for them.
    if let Some(why) = guest.blocked().map_err(unreachable)? {
        return Err(Problem::new(ErrorClass::Local, format!("QEMU of VM `{}` cannot send its guest: {why}", vm.name)));
    }
    ensure_clear(vm.name.as_str(), &found)?;
    let disks: Vec<_> = found.into_iter().map(|(disk, _)| disk).collect();
    authorised(vm, &disks).map_err(|why| Problem::new(ErrorClass::Denied, why).with_code("disks-differ"))?;
    if only && disks.is_empty() {
        let why = format!("VM `{}` has no disk that it can write to: there is nothing to copy", vm.name);
        return Err(Problem::new(ErrorClass::Misuse, why).with_code("no-disks"));
    }
    guest.move_disks(disks, only);
    Ok(())
}

/// Whether disks are at the source what they would be at the destination: their hypervisor says what its guest reads, so that an
/// encrypted image would be a plain one there.
pub(super) fn ensure_clear(vm: &str, found: &[(Disk, String)]) -> Result<(), Problem> {
    let Some((disk, _)) = found.iter().find(|(_, file)| is_encrypted(file)) else { return Ok(()) };
    let why = format!("disk `{}` of VM `{vm}` is encrypted at the source: it would arrive in the clear, so it does not move", disk.device);
    let problem = Problem::new(ErrorClass::Local, why).with_code("disk-encrypted").with_running_on(RunningOn::Source);
    Err(problem.with_hint(
        "leave it where it is, shared by both hosts, or convert it and encrypt what is below the files at both ends, as with dm-crypt",
    ))
}

/// Disks as the audit log has them.
pub(super) fn listed(disks: &[Disk]) -> serde_json::Value {
    disks.iter().map(|disk| serde_json::json!({ "device": disk.device, "bytes": disk.bytes })).collect()
}

impl Gateway {
    /// How disks move with a guest that leaves.
    pub(super) fn disk_order(&self, migration: MigrationId, DiskWish { verify, .. }: DiskWish) -> DiskOrder {
        DiskOrder { socket: twin_file(&self.config.gateway.runtime_directory, migration, SOCKET), verify }
    }

    /// Whether disks can be copied here ahead of their guest.
    ///
    /// # Errors
    /// Why not, in words.
    pub(super) fn takes_disks_only(&self, machine: &Machine) -> Result<(), String> {
        if machine.disks_only && self.config.migration.keep_disks.duration.is_zero() {
            let why = "gateway keeps no disks of VMs that did not come (`[migration] keep_disks` is 0): they would be copied for nothing";
            return Err(format!("the {why}"));
        }
        Ok(())
    }

    /// Takes away the disks of a VM that did not come, and keeps them for another attempt where that may be.
    pub(super) fn end_disks(&self, laid: LaidDisks, denied: bool) {
        if denied || self.config.migration.keep_disks.duration.is_zero() {
            return laid.discard();
        }
        laid.keep_for_later();
        self.forget_kept_disks();
    }

    /// Removes what was kept for long enough, and each of the others when it is due.
    pub(super) fn forget_kept_disks(&self) {
        let keep = self.config.migration.keep_disks.duration;
        let files = self.config.vms.iter().flat_map(|vm| &vm.disks).filter_map(|disk| disk.file.clone());
        for (file, left) in files.filter_map(|file| storage::forget_kept(&file, keep).map(|left| (file, left))) {
            tokio::spawn(async move {
                tokio::time::sleep(left).await;
                // One that another attempt has kept since then has a time of its own.
                let _ = storage::forget_kept(&file, keep);
            });
        }
    }

    /// What became of the disks of a migration that was interrupted, once its journal says whose its VM is.
    pub(super) fn settle_disks(&self, migration: MigrationId) {
        let note = twin_file(&self.config.gateway.runtime_directory, migration, LAID);
        let Some(laid) = LaidDisks::noted(&note) else { return };
        match engine::has_disks(&self.evidence(), migration) {
            Ok(Some(true)) => laid.keep(),
            Ok(Some(false)) => {
                tracing::warn!(%migration, "the disks of a VM that did not come are taken away");
                self.end_disks(laid, false);
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%migration, error = %telemetry::chain(&error), "nobody knows whose the disks of a migration are"),
        }
    }
}

/// Where files are made for the disks that come, as the configuration says; a twin opens them when it is started.
pub(super) fn places(vm: &config::Vm, disks: &[Disk]) -> Vec<DiskPlace> {
    let place = |(index, disk): (usize, &Disk)| {
        let listed = vm.disks.iter().find(|listed| listed.device == disk.device)?;
        Some(DiskPlace { bytes: disk.bytes, disk: u16::try_from(index).ok()?, ..longest(listed)? })
    };
    disks.iter().enumerate().filter_map(place).collect()
}

/// The devices of disks that have a place, and the file that each has to be in.
pub(super) fn files(disks: &[Disk], places: &[DiskPlace]) -> Vec<(String, PathBuf)> {
    let file = |place: &DiskPlace| Some((disks.get(usize::from(place.disk))?.device.clone(), place.file.clone()));
    places.iter().filter_map(file).collect()
}

/// Whether a QEMU that waits already can have these files open: those that are made anew it cannot, and what it has open by that name
/// may be the file that is set aside.
///
/// # Errors
/// Which it cannot, in words.
pub(super) fn opened_before(files: &[(String, PathBuf)]) -> Result<(), String> {
    let volume = |file: &Path| file.metadata().is_ok_and(|there| there.file_type().is_block_device());
    let Some((device, file)) = files.iter().find(|(_, file)| !volume(file)) else { return Ok(()) };
    let what = format!("disk `{device}`: `{}` is made anew, and the QEMU that waits (`incoming_qmp`) has another open", file.display());
    Err(format!("{what}: expected a block device or no `[[vm.disk]] file`, or a `template` instead of `incoming_qmp`"))
}

/// The longest disk that may come to such a place; nothing where none is made.
pub(super) fn longest(listed: &config::Disk) -> Option<DiskPlace> {
    let format = match listed.format {
        DiskFormat::Raw => storage::DiskFormat::Raw,
        DiskFormat::Qcow2 => storage::DiskFormat::Qcow2 { cluster_bytes: listed.cluster_size.bytes },
    };
    let set_aside = listed.existing == Existing::SetAside;
    Some(DiskPlace { file: listed.file.clone()?, format, bytes: listed.max_size.bytes, set_aside, disk: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(disks: &str) -> config::Vm {
        let text = format!(
            "[gateway]\nname = \"gw-a\"\nsite = \"dc1\"\n[identity]\ncertificate = \"c\"\nkey = \"k\"\nsigning_key = \"s\"\n\
            [[identity.trust]]\ndomain = \"example.net\"\nroots = \"r\"\ncrls = [\"l\"]\n\
            [[vm]]\nname = \"web\"\nuuid = \"00000000-0000-4000-8000-000000000001\"\ntenant = \"t\"\nclassification = \"internal\"\n{disks}"
        );
        config::parse(&text, Path::new("gateway.toml")).unwrap().vms[0].clone()
    }

    fn disk(device: &str, bytes: u64) -> Disk {
        Disk { device: device.to_owned(), bytes }
    }

    fn machine(disks: Vec<Disk>) -> Machine {
        let (kind, uuid) = ("qemu".to_owned(), crate::types::VmUuid([1; 16]));
        Machine {
            kind,
            uuid,
            regions: Vec::new(),
            vcpus: 1,
            profile: serde_json::Value::Null,
            disks,
            disks_only: false,
            mode: crate::types::Mode::Precopy,
        }
    }

    #[test]
    fn only_listed_disks_move_where_any_are_listed() {
        let free = vm("");
        assert_eq!(authorised(&free, &[disk("a", 1), disk("b", 2)]), Ok(()));
        let listed = vm("[[vm.disk]]\ndevice = \"a\"\nmax_size = \"1MiB\"\n");
        assert_eq!(authorised(&listed, &[disk("a", 1 << 20)]), Ok(()));
        for (found, says) in [
            (vec![disk("a", 1), disk("b", 1)], "`b`, which is none"),
            (vec![disk("a", (1 << 20) + 1)], "at most 1048576 may move"),
            (vec![], "lists 1"),
        ] {
            let refused = authorised(&listed, &found).unwrap_err();
            assert!(refused.contains(says), "{refused}");
        }
    }

    #[test]
    fn a_list_that_makes_no_sense_is_the_peer_s_fault() {
        let free = vm("");
        assert_eq!(check_offered(&free, &machine(vec![disk("a", 1), disk("b", 1)])), Ok(()));
        for hostile in [
            vec![disk("", 1)],
            vec![disk("a", 0)],
            vec![disk("a", u64::MAX)],
            vec![disk("a\n", 1)],
            vec![disk(&"a".repeat(256), 1)],
            vec![disk("a", 1), disk("a", 1)],
            (0..65).map(|n| disk(&format!("d{n}"), 1)).collect(),
        ] {
            assert!(matches!(check_offered(&free, &machine(hostile)), Err((true, _))));
        }
        let alone = |disks| Machine { disks_only: true, ..machine(disks) };
        assert_eq!(check_offered(&free, &alone(vec![disk("a", 1)])), Ok(()));
        assert!(matches!(check_offered(&free, &alone(Vec::new())), Err((true, _))));
        let listed = vm("[[vm.disk]]\ndevice = \"a\"\n");
        assert!(matches!(check_offered(&listed, &machine(vec![disk("b", 1)])), Err((false, _))));
        // Disks that stay where they are are none of this.
        assert_eq!(check_offered(&listed, &machine(Vec::new())), Ok(()));
    }
}
