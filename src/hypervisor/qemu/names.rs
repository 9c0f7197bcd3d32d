//! What QEMU calls the file of a disk: its path, or `json:{…}` where a path does not say how it was opened.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

/// What a name begins with that is a list of options.
const OPTIONS: &str = "json:";

/// The one file that a disk's writes go to; nothing where that cannot be told from its name.
pub(super) fn path(name: &str) -> Option<PathBuf> {
    let Some(options) = name.strip_prefix(OPTIONS) else {
        // What has a colon in front of a slash is a protocol's address to QEMU.
        let local = name.split('/').next().is_some_and(|first| !first.contains(':'));
        return (local && !name.is_empty()).then(|| name.into());
    };
    let options: Value = serde_json::from_str(options).ok()?;
    let mut node = &options;
    loop {
        match node.get("driver")?.as_str()? {
            "file" | "host_device" => return Some(node.get("filename")?.as_str()?.into()),
            // What the guest writes is elsewhere.
            _ if node.get("data-file").is_some() => return None,
            _ => node = node.get("file")?,
        }
    }
}

/// Whether both are one file or one block device.
pub(super) fn is_same(one: &Path, other: &Path) -> bool {
    match (std::fs::metadata(one), std::fs::metadata(other)) {
        (Ok(one), Ok(other)) => {
            let volumes = one.file_type().is_block_device() && other.file_type().is_block_device();
            (volumes && one.rdev() == other.rdev()) || (one.dev(), one.ino()) == (other.dev(), other.ino())
        }
        _ => one == other,
    }
}

/// Whether a disk of this name, or an image below it, is encrypted: QEMU needs a key then, and says so in the name. Also where nobody can
/// tell, since QEMU cuts a list of options that is too long.
#[must_use]
pub fn is_encrypted(name: &str) -> bool {
    let parsed = name.strip_prefix(OPTIONS).map(serde_json::from_str::<Value>);
    parsed.is_some_and(|parsed| parsed.as_ref().is_ok_and(needs_key) || parsed.is_err())
}

fn needs_key(options: &Value) -> bool {
    let Value::Object(options) = options else { return false };
    let key = |name: &str| name == "encrypt" || name.starts_with("encrypt.") || name == "key-secret";
    options.iter().any(|(name, value)| key(name) || (name == "driver" && value == "luks") || needs_key(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 10.0 says them.
    const ENCRYPTED: [&str; 4] = [
        r#"json:{"encrypt.key-secret": "s", "driver": "qcow2", "file": {"driver": "file", "filename": "/d/e.qcow2"}}"#,
        r#"json:{"driver": "luks", "file": {"driver": "file", "filename": "/d/e.luks"}, "key-secret": "s"}"#,
        r#"json:{"throttle-group": "g", "driver": "throttle", "file": {"encrypt.key-secret": "s", "driver": "qcow2", "file": {"driver": "file", "filename": "/d/e"}}}"#,
        r#"json:{"backing": {"encrypt.key-secret": "s", "driver": "qcow2", "file": {"driver": "file", "filename": "/d/e"}}, "driver": "qcow2", "file": {"driver": "file", "filename": "/d/top"}}"#,
    ];
    const LIMITED: &str =
        r#"json:{"throttle-group": "g", "driver": "throttle", "file": {"driver": "raw", "file": {"driver": "file", "filename": "/d/r"}}}"#;
    const PART: &str = r#"json:{"offset": 4096, "driver": "raw", "size": 65536, "file": {"driver": "host_device", "filename": "/dev/v"}}"#;

    #[test]
    fn the_file_that_is_written_is_found_in_what_qemu_calls_it() {
        let told =
            [("/d/r", "/d/r"), ("r.raw", "r.raw"), ("/d/a:b", "/d/a:b"), (LIMITED, "/d/r"), (PART, "/dev/v"), (ENCRYPTED[3], "/d/top")];
        for (name, file) in told {
            assert_eq!(path(name), Some(PathBuf::from(file)), "{name}");
        }
        for name in [
            "",
            "nbd+unix:///x?socket=/s",
            "fat:rw:/d",
            "blkdebug:/c:/d/r",
            "json:{",
            "json:[]",
            r#"json:{"driver": "quorum", "children": [{"driver": "file", "filename": "/d/r"}]}"#,
            r#"json:{"driver": "nbd", "server": {"type": "unix", "path": "/s"}}"#,
            r#"json:{"driver": "qcow2", "data-file": {"driver": "file", "filename": "/d/x"}, "file": {"driver": "file", "filename": "/d/r"}}"#,
        ] {
            assert_eq!(path(name), None, "{name}");
        }
    }

    #[test]
    fn a_disk_that_needs_a_key_is_told_from_others() {
        for name in ENCRYPTED.into_iter().chain(["json:{\"driver\": \"qcow2\", \"fi..."]) {
            assert!(is_encrypted(name), "{name}");
        }
        for name in ["", "/d/encrypt.key-secret", LIMITED, PART] {
            assert!(!is_encrypted(name), "{name}");
        }
    }

    #[test]
    fn files_are_the_same_by_what_they_are() {
        let directory = tempfile::tempdir().unwrap();
        let [one, link, hard, other] = ["one", "link", "hard", "other"].map(|name| directory.path().join(name));
        for file in [&one, &other] {
            std::fs::write(file, "").unwrap();
        }
        std::os::unix::fs::symlink(&one, &link).unwrap();
        std::fs::hard_link(&one, &hard).unwrap();
        assert!(is_same(&one, &link) && is_same(&hard, &link) && !is_same(&one, &other));
        let none = directory.path().join("none");
        assert!(is_same(&none, &none) && !is_same(&one, &none) && !is_same(&none, &one));
    }
}
