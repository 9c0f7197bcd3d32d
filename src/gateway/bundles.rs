//! Signed bundles on disk: how one is read, and the one that is kept to fall back on.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::config::PolicyBundle;
use crate::limits;
use crate::policy::bundle::{BundleError, BundleFault as Fault, BundleSeen, BundleSource, BundleTrust, MANIFEST, SIGNATURE, SignedBundle};
use crate::policy::{Entities, PolicySet};

/// Reads every file of a bundle's directory, once: what is verified is what was read. Nothing that is no regular file is followed or
/// waited for. The directory itself may be a link.
pub(crate) fn read_bundle(directory: &Path) -> Result<BundleSource, BundleError> {
    let unreadable =
        |what: &str, error: Errno| BundleError::new(Fault::Unreadable, format!("cannot read `{what}`: {}", io::Error::from(error)));
    let shown = directory.display().to_string();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(directory, flags, Mode::empty()).map_err(|error| unreadable(&shown, error))?;
    let (mut manifest, mut signatures, mut files) = (None, Vec::new(), Vec::new());
    let mut left = 2 * limits::POLICY_BYTES_MAX;
    for (count, entry) in Dir::read_from(&opened).map_err(|error| unreadable(&shown, error))?.enumerate() {
        let entry = entry.map_err(|error| unreadable(&shown, error))?;
        let Ok(name) = entry.file_name().to_str() else {
            return Err(BundleError::new(Fault::FileExtra, "the name of a file is not text"));
        };
        if name == "." || name == ".." {
            continue;
        }
        if count > limits::POLICY_FILES_MAX + limits::BUNDLE_SIGNATURES_MAX + 2 {
            return Err(BundleError::new(Fault::TooLarge, format!("it has more than {count} files")));
        }
        let signature = name.starts_with(MANIFEST) && name.ends_with(SIGNATURE);
        let most = match name {
            MANIFEST => limits::BUNDLE_MANIFEST_BYTES_MAX,
            _ if signature => limits::BUNDLE_SIGNATURE_BYTES_MAX,
            _ => left,
        };
        let bytes = read_file(&opened, name, most)?;
        match name {
            MANIFEST => manifest = Some(bytes),
            _ if signature => signatures.push((name.to_owned(), bytes)),
            _ => {
                left -= bytes.len();
                files.push((name.to_owned(), bytes));
            }
        }
        if signatures.len() > limits::BUNDLE_SIGNATURES_MAX {
            let what = format!("it has more than {} signatures", limits::BUNDLE_SIGNATURES_MAX);
            return Err(BundleError::new(Fault::TooLarge, what));
        }
    }
    signatures.sort();
    files.sort();
    let manifest = manifest.ok_or_else(|| BundleError::new(Fault::ManifestMissing, format!("there is no `{MANIFEST}` in `{shown}`")))?;
    Ok(BundleSource { manifest, signatures, files })
}

fn read_file(directory: &rustix::fd::OwnedFd, name: &str, most: usize) -> Result<Vec<u8>, BundleError> {
    let not_a_file = || BundleError::new(Fault::NotAFile, format!("`{name}` is no regular file"));
    let unreadable = |error: io::Error| BundleError::new(Fault::Unreadable, format!("cannot read `{name}`: {error}"));
    // Opening a pipe must not wait for somebody who writes it.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(directory, name, flags, Mode::empty()).map_err(|error| match error {
        Errno::LOOP | Errno::NXIO => not_a_file(),
        other => unreadable(other.into()),
    })?;
    let stat = rustix::fs::fstat(&opened).map_err(|error| unreadable(error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(not_a_file());
    }
    let mut bytes = Vec::new();
    File::from(opened).take(most as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > most {
        return Err(BundleError::new(Fault::TooLarge, format!("`{name}` has more than {most} bytes")));
    }
    Ok(bytes)
}

/// Policies of a bundle that may take force.
pub(super) struct Candidate {
    pub(super) policies: PolicySet,
    bundle: SignedBundle,
    source: BundleSource,
    trust: BundleTrust,
}

impl Candidate {
    /// Who signed it, for the audit log.
    pub(super) fn signers(&self) -> Vec<String> {
        self.bundle.signers().iter().map(|signer| signer.key.to_string()).collect()
    }
}

/// What is remembered of bundles, in the state directory: the version that was in force last, and a copy of it.
#[derive(Debug)]
pub(super) struct Vault {
    directory: PathBuf,
}

const SEEN: &str = "seen.json";
/// More than the few short texts in it.
const SEEN_BYTES_MAX: u64 = 4096;

impl Vault {
    pub(super) fn new(state_directory: &Path) -> Self {
        Self { directory: state_directory.join("policy") }
    }

    /// Verifies the bundle that the configuration names, for now.
    pub(super) fn candidate(&self, wanted: &PolicyBundle, entities: &Entities) -> Result<Candidate, BundleError> {
        let candidate = open(wanted, &wanted.directory, self.seen()?.as_ref(), entities)?;
        candidate.bundle.check_time(now_unix_ms())?;
        Ok(candidate)
    }

    /// The bundle that was in force last, verified anew. Its time may be over: then it permits nothing.
    pub(super) fn last_good(&self, wanted: &PolicyBundle, entities: &Entities) -> Result<Option<Candidate>, BundleError> {
        let Some(seen) = self.seen()? else { return Ok(None) };
        let candidate = open(wanted, &self.copy(&seen), Some(&seen), entities)?;
        Ok(Some(candidate))
    }

    /// INVARIANT(never-back): remembers a bundle, durably, before it takes force.
    pub(super) fn keep(&self, candidate: &Candidate) -> Result<(), BundleError> {
        let seen = candidate.bundle.seen(&candidate.trust);
        if self.seen()?.as_ref() == Some(&seen) && self.copy(&seen).is_dir() {
            return Ok(());
        }
        let kept = self.write(&seen, &candidate.source);
        kept.map_err(|error| unreadable("keep the bundle in", &self.directory, &error))
    }

    fn seen(&self) -> Result<Option<BundleSeen>, BundleError> {
        let path = self.directory.join(SEEN);
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|file| file.take(SEEN_BYTES_MAX).read_to_end(&mut bytes)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|error| unreadable("read", &path, &error))?,
        };
        // Without it an old bundle could not be told from a new one, so nothing is guessed.
        serde_json::from_slice(&bytes).map(Some).map_err(|error| unreadable("understand", &path, &error.into()))
    }

    fn copy(&self, seen: &BundleSeen) -> PathBuf {
        let begin: String = seen.manifest_sha256.chars().filter(char::is_ascii_hexdigit).take(16).collect();
        self.directory.join(format!("{}-{begin}", seen.version))
    }

    fn write(&self, seen: &BundleSeen, source: &BundleSource) -> io::Result<()> {
        let copy = self.copy(seen);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        if copy.exists() {
            std::fs::remove_dir_all(&copy)?;
        }
        std::fs::DirBuilder::new().mode(0o700).create(&copy)?;
        let manifest = [(MANIFEST.to_owned(), source.manifest.clone())];
        for (name, bytes) in manifest.iter().chain(&source.signatures).chain(&source.files) {
            write_file(&copy.join(name), bytes)?;
        }
        File::open(&copy)?.sync_all()?;
        let next = self.directory.join("seen.new");
        write_file(&next, &serde_json::to_vec(seen)?)?;
        std::fs::rename(&next, self.directory.join(SEEN))?;
        File::open(&self.directory)?.sync_all()?;
        for entry in std::fs::read_dir(&self.directory)?.flatten().filter(|entry| entry.path().is_dir() && entry.path() != copy) {
            // Older copies; one that stays harms nobody.
            let _ = std::fs::remove_dir_all(entry.path());
        }
        Ok(())
    }
}

/// What the gateway would say to a bundle at `now_unix_ms`; with `state_directory` as the gateway that has it.
pub(crate) fn verify_bundle(
    wanted: &PolicyBundle,
    state_directory: Option<&Path>,
    entities: &Entities,
    now_unix_ms: i64,
) -> Result<(SignedBundle, PolicySet), BundleError> {
    let seen = state_directory.map(|directory| Vault::new(directory).seen()).transpose()?.flatten();
    let candidate = open(wanted, &wanted.directory, seen.as_ref(), entities)?;
    candidate.bundle.check_time(now_unix_ms)?;
    Ok((candidate.bundle, candidate.policies))
}

fn open(wanted: &PolicyBundle, directory: &Path, seen: Option<&BundleSeen>, entities: &Entities) -> Result<Candidate, BundleError> {
    let trust = BundleTrust::new(&wanted.name, &wanted.keys, wanted.threshold)
        .map_err(|what| BundleError::new(Fault::TooFewSignatures, format!("the configuration pins no usable keys: {what}")))?;
    let source = read_bundle(directory)?;
    let bundle = source.clone().open(&trust)?;
    bundle.check_version(&trust, seen)?;
    let policies = bundle.policies(entities)?;
    Ok(Candidate { policies, bundle, source, trust })
}

fn unreadable(what: &str, path: &Path, error: &io::Error) -> BundleError {
    BundleError::new(Fault::Unreadable, format!("cannot {what} `{}`: {error}", path.display()))
}

fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn now_unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
