//! Certificates, CRLs and policies are read again when their files change, and whoever is at the other end of a migration is
//! asked again who they are.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::config::{self, Config, KeyFile, Policies};
use crate::engine::Command;
use crate::gateway::Gateway;

/// How often files are looked at. What changed between two looks is read when it has not changed until the next.
const LOOK_EVERY: Duration = Duration::from_millis(400);
/// How often peers are judged anew without a reload: certificates and CRLs expire by themselves. It takes some 0.2 ms each.
const JUDGE_EVERY: Duration = Duration::from_millis(500);

/// What tells one version of a file from another without reading it; nothing where there is none.
type Stamp = Option<(u64, u64, u64, i64, i64, i64)>;
/// Every file that is watched.
type Picture = Vec<(PathBuf, Stamp)>;

/// What the files looked like.
#[derive(Debug, Default)]
pub(super) struct Files(Mutex<Looks>);

#[derive(Debug, Default)]
struct Looks {
    /// When they were last read, whatever came of it.
    read: Picture,
    last: Picture,
}

impl Files {
    /// They are about to be read.
    pub(super) fn reading(&self, config: &Config) {
        let picture = picture(config);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read = picture;
    }

    /// Whether they are to be read again: they are others than those that were read, and nobody is at work on them.
    fn changed(&self, now: Picture) -> bool {
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = now != looks.read && now == looks.last;
        looks.last = now;
        changed
    }
}

fn picture(config: &Config) -> Picture {
    let identity = &config.identity;
    let keys = [&identity.key, &identity.signing_key].into_iter().filter_map(KeyFile::path);
    let trust = identity.trust.iter().flat_map(config::Trust::files);
    let mut files: Vec<PathBuf> = trust.chain([&identity.certificate]).cloned().chain(keys).collect();
    let (directory, all) = match &config.policy {
        Policies::Directory(directory) => (directory, false),
        Policies::Bundle(bundle) => (&bundle.directory, true),
    };
    // A directory that cannot be listed is as if it were empty, which is a change as well.
    let policies = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    files.extend(policies.filter(|path| all || path.extension().is_some_and(|extension| extension == "cedar")));
    files.sort();
    files.dedup();
    let stamped = |path: PathBuf| {
        let stamp = stamp(&path);
        (path, stamp)
    };
    files.into_iter().map(stamped).collect()
}

fn stamp(path: &Path) -> Stamp {
    let file = std::fs::metadata(path).ok()?;
    Some((file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec(), file.ctime_nsec() ^ file.ctime()))
}

impl Gateway {
    /// Reads the files again whenever they change.
    pub(super) async fn follow_files(self: Arc<Self>) {
        let mut tick = tokio::time::interval(LOOK_EVERY);
        loop {
            tick.tick().await;
            let gateway = Arc::clone(&self);
            let changed = tokio::task::spawn_blocking(move || gateway.files.changed(picture(&gateway.config))).await;
            if changed.unwrap_or(false) {
                // The log says why it could not be.
                let _ = self.reload().await;
            }
        }
    }

    /// Judges every peer that has a migration with us again and again.
    pub(super) async fn follow_peers(self: Arc<Self>) {
        let mut tick = tokio::time::interval(JUDGE_EVERY);
        loop {
            tick.tick().await;
            self.check_peers();
        }
    }

    /// Asks every migration under way whether its peer would still be admitted.
    pub(super) fn check_peers(&self) {
        let under_way = self.registry.migrations().into_iter().filter(|migration| migration.report.is_none());
        for commands in under_way.filter_map(|migration| migration.commands) {
            // One that does not listen now hears it the next time, and keeps its room for what operators say.
            if commands.capacity() == commands.max_capacity() {
                let _ = commands.try_send(Command::CheckPeer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture_of(paths: &[&Path]) -> Picture {
        paths.iter().map(|path| (path.to_path_buf(), stamp(path))).collect()
    }

    #[test]
    fn a_change_is_read_once_and_not_while_it_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.crl");
        std::fs::write(&path, "one").unwrap();
        let files = Files::default();
        let look = || files.changed(picture_of(&[&path]));
        files.0.lock().unwrap().read = picture_of(&[&path]);
        assert!(!look() && !look(), "nothing has changed");
        std::fs::write(&path, "two, and longer").unwrap();
        assert!(!look(), "it may still be written");
        std::fs::write(&path, "three, and longer yet").unwrap();
        assert!(!look(), "it was");
        assert!(look());
        files.0.lock().unwrap().read = picture_of(&[&path]);
        assert!(!look(), "it was read");
        // Replaced by a file of the same size, as tools do.
        std::fs::write(directory.path().join("b"), "three, and longer yet").unwrap();
        std::fs::rename(directory.path().join("b"), &path).unwrap();
        assert!(!look());
        assert!(look());
        std::fs::remove_file(&path).unwrap();
        assert!(!look());
        assert!(look(), "a file that is gone is a change");
    }
}
