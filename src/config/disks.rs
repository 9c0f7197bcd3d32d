//! `[[vm.disk]]`: where the disks of a VM go when it arrives, and which may leave.

use std::collections::HashMap;
use std::path::PathBuf;

use super::raw::{Reader, Section};
use super::settings::Disk;
use super::{ByteSize, DiskFormat, Existing};
use crate::limits::{DISK_BYTES_MAX, DISK_NAME_BYTES_MAX, DISKS_MAX};

pub(super) fn disks(r: &mut Reader, vm: &mut Section<'_, '_>) -> Option<Vec<Disk>> {
    let (mut seen, mut disks) = (HashMap::new(), Some(Vec::new()));
    let sections = r.sections(vm, "disk");
    if sections.len() > DISKS_MAX {
        r.problem(vm.at(), &vm.key("disk"), format!("{} disks: expected at most {DISKS_MAX}", sections.len()), None);
    }
    for mut s in sections {
        let device = r.required::<String>(&mut s, "device");
        if let Some(device) = &device {
            if device.value.is_empty() || device.value.len() > DISK_NAME_BYTES_MAX || device.value.contains(char::is_control) {
                let hint = "the `id` of the guest's device in QEMU".to_owned();
                r.problem(device.at, &s.key("device"), format!("expected 1 to {DISK_NAME_BYTES_MAX} characters"), Some(hint));
            }
            if let Some(line) = seen.insert(device.value.clone(), r.place(device.at).0) {
                r.problem(device.at, &s.key("device"), format!("device `{}` is used already on line {line}", device.value), None);
            }
        }
        let file = r.optional::<PathBuf>(&mut s, "file");
        let format = r.or(&mut s, "format", DiskFormat::Raw);
        let cluster_size = r.or(&mut s, "cluster_size", ByteSize { bytes: 64 << 10 });
        if !cluster_size.value.bytes.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size.value.bytes) {
            r.problem(cluster_size.at, &s.key("cluster_size"), "expected a power of two from 512B to 2MiB".to_owned(), None);
        }
        let max_size = r.or(&mut s, "max_size", ByteSize { bytes: DISK_BYTES_MAX });
        if max_size.value.bytes == 0 || max_size.value.bytes > DISK_BYTES_MAX {
            let most = ByteSize { bytes: DISK_BYTES_MAX };
            r.problem(max_size.at, &s.key("max_size"), format!("expected 1B to {most}, got {}", max_size.value), None);
        }
        let existing = r.or(&mut s, "existing", Existing::Refuse).value;
        r.finish(s);
        let disk = device.map(|device| Disk {
            device: device.value,
            file: file.map(|file| file.value),
            format: format.value,
            cluster_size: cluster_size.value,
            max_size: max_size.value,
            existing,
        });
        disks = disks.zip(disk).map(|(mut disks, disk)| {
            disks.push(disk);
            disks
        });
    }
    disks
}
