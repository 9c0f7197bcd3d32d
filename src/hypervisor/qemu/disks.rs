//! Disks of a QEMU guest: which there are, mirrors of them, and exports. Everything that is made here has a name of ours, so that it
//! can be found and ended whatever has happened, and nothing of somebody else's is touched.

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::monitor::Monitor;
use super::names;
use super::qmp::{Qmp, by};
use crate::hypervisor::{Disk, HypervisorError, MirrorProgress};
use crate::limits;

/// What jobs, nodes and exports of ours begin with.
const OURS: &str = "sealane-disk-";
/// What the monitor keeps the descriptor of a listening socket under.
const LISTENER_NAME: &str = "sealane-nbd";
/// What a mirror copies for a write, however small.
const MIRROR_BLOCK_BYTES: u64 = 64 * 1024;
/// What sends a disk.
const MIRROR: &str = "blockdev-mirror";
/// Between two looks at something that QEMU has no event for, or one that may have come already.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// A disk in QEMU's words.
struct Block {
    disk: Disk,
    node: String,
    read_only: bool,
    /// Whether it or an image below it is.
    encrypted: bool,
    file: String,
    /// The device in QEMU's words.
    qdev: Option<String>,
    /// Whose limits it has.
    limits: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Job {
    id: String,
    status: String,
    #[serde(default)]
    current_progress: u64,
    #[serde(default)]
    total_progress: u64,
    error: Option<String>,
}

fn ours(index: usize) -> String {
    format!("{OURS}{index}")
}

/// The `id` of a device. QEMU names some with the path of the part that has the medium, as `virtio-blk`.
fn id_of(qdev: &str) -> String {
    let id = qdev.strip_prefix("/machine/peripheral/").map(|path| path.strip_suffix("/virtio-backend").unwrap_or(path));
    id.filter(|id| !id.contains('/')).unwrap_or(qdev).to_owned()
}

fn blocks(qmp: &Qmp) -> Result<Vec<Block>, HypervisorError> {
    #[derive(Deserialize)]
    struct Found {
        #[serde(default)]
        device: String,
        qdev: Option<String>,
        inserted: Option<Inserted>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Inserted {
        node_name: Option<String>,
        group: Option<String>,
        ro: bool,
        #[serde(default)]
        encrypted: bool,
        #[serde(default)]
        file: String,
        image: Image,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Image {
        virtual_size: u64,
        #[serde(default)]
        encrypted: bool,
        backing_image: Option<Box<Self>>,
    }
    let found: Vec<Found> = qmp.ask("query-block", Value::Null)?;
    let mut blocks = Vec::new();
    for Found { device, qdev, inserted } in found {
        // A drive without a medium.
        let Some(Inserted { node_name: Some(node), group: limits, ro, encrypted, file, image }) = inserted else { continue };
        let below = std::iter::successors(Some(&image), |image| image.backing_image.as_deref());
        let encrypted = encrypted || below.into_iter().any(|image| image.encrypted) || names::is_encrypted(&file);
        let device = qdev.as_deref().map_or(device, id_of);
        if device.is_empty() || device.len() > limits::DISK_NAME_BYTES_MAX || image.virtual_size > limits::DISK_BYTES_MAX {
            return Err(qmp.protocol(&format!("its disk `{device}` has {} bytes", image.virtual_size)));
        }
        let disk = Disk { device, bytes: image.virtual_size };
        blocks.push(Block { disk, node, read_only: ro, encrypted, file, qdev, limits });
    }
    Ok(blocks)
}

/// The guest's disks that it can write to, and the file of each, as QEMU names it.
pub(super) fn writable(qmp: &Qmp) -> Result<Vec<(Disk, String)>, HypervisorError> {
    let writable: Vec<_> =
        blocks(qmp)?.into_iter().filter(|block| !block.read_only && block.disk.bytes > 0).map(|block| (block.disk, block.file)).collect();
    if writable.len() > limits::DISKS_MAX {
        return Err(qmp.protocol(&format!("it has {} disks: expected at most {}", writable.len(), limits::DISKS_MAX)));
    }
    Ok(writable)
}

/// What this QEMU lacks to take these disks, a line each; `files` are those that some of them have to be in.
pub(super) fn lacks(qmp: &Qmp, wanted: &[Disk], files: &[(String, PathBuf)]) -> Result<Vec<String>, HypervisorError> {
    let here = blocks(qmp)?;
    let file = |device: &str| files.iter().find(|(wanted, _)| wanted == device).map(|(_, file)| file.as_path());
    let lack = |disk: &Disk| match here.iter().find(|block| block.disk.device == disk.device) {
        None => Some("none".to_owned()),
        Some(block) if block.read_only => Some("one that cannot be written".to_owned()),
        Some(block) if block.disk.bytes < disk.bytes => Some(format!("one of {} bytes", block.disk.bytes)),
        Some(_) => None,
    };
    let lack = |disk: &Disk| match lack(disk) {
        Some(got) => Some(format!("disk `{}`: expected one of {} bytes, got {got}", disk.device, disk.bytes)),
        None => elsewhere(here.iter().find(|block| block.disk.device == disk.device)?, file(&disk.device)?),
    };
    Ok(wanted.iter().filter_map(lack).collect())
}

/// What is wrong where a disk is not in `file`: what comes would be written over another file, which nobody asked to be.
fn elsewhere(block: &Block, file: &Path) -> Option<String> {
    let opened = names::path(&block.file);
    if opened.as_ref().is_some_and(|opened| names::is_same(opened, file)) {
        return None;
    }
    let got =
        opened.map_or_else(|| format!("`{}`, of which the file cannot be told", block.file), |opened| format!("`{}`", opened.display()));
    let (device, file) = (&block.disk.device, file.display());
    let change = "have the template open that file, or change or remove `[[vm.disk]] file`";
    Some(format!("disk `{device}`: expected its QEMU to have `{file}` open (`[[vm.disk]] file`), got {got}: {change}"))
}

fn node_of(qmp: &Qmp, blocks: &[Block], disk: &Disk, request: &'static str) -> Result<String, HypervisorError> {
    match blocks.iter().find(|block| block.disk.device == disk.device) {
        None => Err(qmp.refused(request, &format!("there is no disk `{}`", disk.device))),
        // The gateway refuses what their names tell. They do not where an overlay itself says how the image below it is opened.
        Some(block) if block.encrypted && request == MIRROR => {
            Err(qmp.refused(request, &format!("disk `{}` is encrypted, and would arrive in the clear", disk.device)))
        }
        Some(block) => Ok(block.node.clone()),
    }
}

/// Begins to mirror each disk to the export of its name behind the socket at `at`. A QEMU that may discard there zeroes all of it
/// first; without that it goes from range to range, zeroes among them.
///
/// WHY slowly: to begin one QEMU waits for all that others have asked for, and its guest stands still meanwhile. So each asks for little
/// until all of them have begun.
pub(super) fn mirror(monitor: &Monitor, at: &Path, disks: &[Disk], in_place: bool) -> Result<(), HypervisorError> {
    let qmp = &monitor.qmp;
    let blocks = blocks(qmp)?;
    for (index, disk) in disks.iter().enumerate() {
        let node = node_of(qmp, &blocks, disk, "blockdev-mirror")?;
        let server = json!({ "type": "unix", "path": at });
        let discard = if in_place { "ignore" } else { "unmap" };
        let target = json!({ "driver": "nbd", "node-name": ours(index), "server": server, "export": disk.device, "discard": discard });
        qmp.execute("blockdev-add", target)?;
        // One that fails stays to be asked why. WHY background: with the guest's writes waiting for the mirror (`write-blocking`) a QEMU
        // (10.0.2) may hang for ever, and its guest with it, when its connection breaks; and it breaks when a gateway is killed.
        let job = json!({
            "job-id": ours(index), "device": node, "target": ours(index), "sync": "full", "copy-mode": "background",
            "on-source-error": "report", "on-target-error": "report", "auto-dismiss": false, "speed": 1,
        });
        qmp.execute("blockdev-mirror", job)?;
    }
    for index in 0..disks.len() {
        // Of one that has ended already it is asked why.
        let _ = qmp.execute("block-job-set-speed", json!({ "device": ours(index), "speed": 0 }));
    }
    Ok(())
}

fn jobs(qmp: &Qmp) -> Result<Vec<Job>, HypervisorError> {
    let mut jobs: Vec<Job> = qmp.ask("query-jobs", Value::Null)?;
    jobs.retain(|job| job.id.starts_with(OURS));
    Ok(jobs)
}

/// How far `count` mirrors have come.
pub(super) fn progress(monitor: &Monitor, count: usize) -> Result<MirrorProgress, HypervisorError> {
    let qmp = &monitor.qmp;
    let jobs = jobs(qmp)?;
    let ended = |job: &&Job| job.error.is_some() || matches!(job.status.as_str(), "aborting" | "concluded" | "null");
    if let Some(job) = jobs.iter().find(ended) {
        return Err(qmp.refused("blockdev-mirror", job.error.as_deref().unwrap_or("it ended")));
    }
    if jobs.len() != count {
        return Err(qmp.refused("blockdev-mirror", &format!("{} of {count} jobs are there", jobs.len())));
    }
    let sum = |of: fn(&Job) -> u64| jobs.iter().map(of).fold(0_u64, u64::saturating_add);
    let total_bytes = sum(|job| job.total_progress);
    Ok(MirrorProgress {
        total_bytes,
        remaining_bytes: total_bytes.saturating_sub(sum(|job| job.current_progress)),
        ready: jobs.iter().all(|job| matches!(job.status.as_str(), "ready" | "standby")),
    })
}

/// The guest writes no more than this to each disk, in requests of which each costs a block of a mirror. A disk that somebody else has
/// limited stays as it is. Not by having its writes wait for the mirror: a QEMU (10.0.2) that is told so while it copies may crash when
/// its connection ends then, and take the guest along.
pub(super) fn slow_writes(qmp: &Qmp, disks: &[Disk], bytes_per_second: u64) -> Result<(), HypervisorError> {
    let wanted = |block: &Block| disks.iter().any(|disk| disk.device == block.disk.device);
    for (index, block) in blocks(qmp)?.iter().enumerate().filter(|(_, block)| wanted(block)) {
        if block.limits.as_ref().is_none_or(|group| group.starts_with(OURS)) {
            limit_writes(qmp, block, bytes_per_second, Some(ours(index)))?;
        }
    }
    Ok(())
}

/// Takes our limits away.
fn full_speed(qmp: &Qmp) -> Result<(), HypervisorError> {
    let ours = |block: &&Block| block.limits.as_ref().is_some_and(|group| group.starts_with(OURS));
    blocks(qmp)?.iter().filter(ours).try_for_each(|block| limit_writes(qmp, block, 0, None))
}

fn limit_writes(qmp: &Qmp, block: &Block, bytes_per_second: u64, group: Option<String>) -> Result<(), HypervisorError> {
    let requests = if bytes_per_second == 0 { 0 } else { (bytes_per_second / MIRROR_BLOCK_BYTES).max(1) };
    let mut limit = json!({
        "id": block.qdev, "bps": 0, "bps_rd": 0, "bps_wr": bytes_per_second, "iops": 0, "iops_rd": 0, "iops_wr": requests,
    });
    if let Some(group) = group {
        limit["group"] = group.into();
    }
    qmp.execute("block_set_io_throttle", limit).map(drop)
}

/// Ends mirrors when both sides are equal, which they stay, as the guest stands still.
pub(super) fn end_mirror(monitor: &Monitor, within: Duration) -> Result<(), HypervisorError> {
    for job in jobs(&monitor.qmp)? {
        monitor.qmp.execute("block-job-cancel", json!({ "device": job.id }))?;
    }
    let ended = wait_for_jobs(&monitor.qmp, within)?;
    let failed = ended.iter().find_map(|job| job.error.as_deref());
    let failed = failed.map(|why| monitor.qmp.refused("block-job-cancel", why));
    dismiss(&monitor.qmp, &ended)?;
    remove_nodes(&monitor.qmp)?;
    failed.map_or(Ok(()), Err)
}

/// Waits until every job of ours has concluded.
fn wait_for_jobs(qmp: &Qmp, within: Duration) -> Result<Vec<Job>, HypervisorError> {
    let until = by(within);
    loop {
        let jobs = jobs(qmp)?;
        let open = jobs.iter().find(|job| job.status != "concluded");
        let Some(open) = open else { return Ok(jobs) };
        if Instant::now() >= until {
            return Err(qmp.refused("block-job-cancel", &format!("job `{}` is `{}` after {within:?}", open.id, open.status)));
        }
        std::thread::sleep(LOOK_PAUSE);
    }
}

fn dismiss(qmp: &Qmp, jobs: &[Job]) -> Result<(), HypervisorError> {
    jobs.iter().try_for_each(|job| qmp.execute("job-dismiss", json!({ "id": job.id })).map(drop))
}

fn remove_nodes(qmp: &Qmp) -> Result<(), HypervisorError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Node {
        node_name: Option<String>,
    }
    let nodes: Vec<Node> = qmp.ask("query-named-block-nodes", json!({ "flat": true }))?;
    let ours = nodes.into_iter().filter_map(|node| node.node_name).filter(|name| name.starts_with(OURS));
    ours.into_iter().try_for_each(|name| qmp.execute("blockdev-del", json!({ "node-name": name })).map(drop))
}

/// Ends whatever of ours there is, however far it has come: the guest's own disks are as if nothing had been.
pub(super) fn abandon(monitor: &Monitor, within: Duration) -> Result<(), HypervisorError> {
    let qmp = &monitor.qmp;
    full_speed(qmp)?;
    for job in jobs(qmp)? {
        if job.status != "concluded" {
            // One that concludes at this moment does not take it.
            let _ = qmp.execute("block-job-cancel", json!({ "device": job.id, "force": true }));
        }
    }
    let ended = wait_for_jobs(qmp, within)?;
    dismiss(qmp, &ended)?;
    remove_nodes(qmp)?;
    end_exports(monitor, within)
}

/// Lets each disk be reached by its name over NBD, behind a new socket at `at`, which only this user can open.
pub(super) fn export(monitor: &Monitor, at: &Path, disks: &[Disk], writable: bool) -> Result<(), HypervisorError> {
    let qmp = &monitor.qmp;
    let local = |what| move |source| HypervisorError::Local { vm: qmp.vm().to_owned(), what, source };
    let blocks = blocks(qmp)?;
    // One that a gateway that was killed has left.
    let _ = std::fs::remove_file(at);
    let listener = UnixListener::bind(at).map_err(local("cannot make a socket for its disks"))?;
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(at, private).map_err(local("cannot make the socket for its disks private"))?;
    qmp.execute_with("getfd", json!({ "fdname": LISTENER_NAME }), listener.as_fd())?;
    let address = json!({ "type": "fd", "data": { "str": LISTENER_NAME } });
    // Who writes, and who reads afterwards.
    let connections = disks.len().saturating_mul(2);
    if let Err(error) = qmp.execute("nbd-server-start", json!({ "addr": address, "max-connections": connections })) {
        // What was not used stays with the monitor.
        let _ = qmp.execute("closefd", json!({ "fdname": LISTENER_NAME }));
        return Err(error);
    }
    let mut added = Ok(Value::Null);
    for (index, disk) in disks.iter().enumerate() {
        added = added.and_then(|_| {
            let node = node_of(qmp, &blocks, disk, "block-export-add")?;
            let export = json!({ "type": "nbd", "id": ours(index), "node-name": node, "name": disk.device, "writable": writable });
            qmp.execute("block-export-add", export)
        });
    }
    added.map(drop).inspect_err(|_| {
        // The server is ours whether it has an export or not.
        let _ = qmp.execute("nbd-server-stop", Value::Null);
    })
}

fn exports(qmp: &Qmp) -> Result<Vec<String>, HypervisorError> {
    #[derive(Deserialize)]
    struct Export {
        id: String,
    }
    let exports: Vec<Export> = qmp.ask("query-block-exports", Value::Null)?;
    Ok(exports.into_iter().map(|export| export.id).filter(|id| id.starts_with(OURS)).collect())
}

/// Takes the exports away, and the server that was started for them.
pub(super) fn end_exports(monitor: &Monitor, within: Duration) -> Result<(), HypervisorError> {
    let (qmp, until) = (&monitor.qmp, by(within));
    let found = exports(qmp)?;
    if found.is_empty() {
        return Ok(());
    }
    for id in found {
        // A client that has said goodbye may not be gone yet.
        qmp.execute("block-export-del", json!({ "id": id, "mode": "hard" }))?;
    }
    while !exports(qmp)?.is_empty() {
        if Instant::now() >= until {
            return Err(qmp.refused("block-export-del", &format!("an export is there after {within:?}")));
        }
        std::thread::sleep(LOOK_PAUSE);
    }
    qmp.execute("nbd-server-stop", Value::Null).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_the_id_that_its_operator_gave_it() {
        for (qdev, id) in [
            ("disk0", "disk0"),
            ("/machine/peripheral/disk0/virtio-backend", "disk0"),
            ("/machine/peripheral/disk0", "disk0"),
            ("/machine/peripheral/disk0/another/part", "/machine/peripheral/disk0/another/part"),
            ("/machine/peripheral-anon/device[0]/virtio-backend", "/machine/peripheral-anon/device[0]/virtio-backend"),
        ] {
            assert_eq!(id_of(qdev), id);
        }
    }
}
