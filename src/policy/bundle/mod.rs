//! Signed bundles: a directory of policies and their tests, a manifest that lists them, and signatures over the manifest.
//!
//! *Owns:* what a bundle is and every reason to refuse one. *Never:* files and clocks (bytes and times are handed in), or a key
//! that signs.
//!
//! ```text
//! 10-floor.cedar  20-tenant-acme.cedar  tests.json      what is signed
//! manifest.json                                         lists exactly these, by length and SHA-256
//! manifest.json.alice.minisig  ….bob.minisig            k of n, by stock `minisign`
//! ```
//!
//! *Invariants.* INVARIANT(signed-before-read): no byte of a bundle is parsed before enough pinned keys are known to have signed the
//! manifest, and no file before its digest is the listed one. INVARIANT(never-back): a bundle takes force only with a version
//! that is higher than every one that was in force, or as the very one that was.
//!
//! *Read first:* [`BundleSource::open`], then `trust.rs`, `manifest.rs`.

mod error;
mod manifest;
mod trust;

use serde::{Deserialize, Serialize};

pub use error::{BundleError, BundleFault};
pub use manifest::{Listed, Manifest};
pub use trust::{BundleSigner, BundleTrust, KeyId};

use crate::policy::entities::Entities;
use crate::policy::fixtures::run_tests;
use crate::policy::load::{PolicyFile, PolicySet};
use BundleFault as Fault;

/// The file that lists the others.
pub const MANIFEST: &str = "manifest.json";
/// The tests of a bundle.
pub const TESTS: &str = "tests.json";
/// What the names of signatures end with; they begin with the manifest's.
pub const SIGNATURE: &str = ".minisig";

/// A bundle as it was read: bytes that nobody has vouched for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleSource {
    /// `manifest.json`.
    pub manifest: Vec<u8>,
    /// Every signature, by the name of its file.
    pub signatures: Vec<(String, Vec<u8>)>,
    /// Every other file.
    pub files: Vec<(String, Vec<u8>)>,
}

/// A bundle that enough pinned keys have signed, with exactly the files that they signed.
#[derive(Debug, Clone)]
pub struct SignedBundle {
    manifest: Manifest,
    sha256: String,
    signers: Vec<BundleSigner>,
    validity: manifest::Validity,
    contents: Contents,
}

/// The files of a bundle.
#[derive(Debug, Clone)]
struct Contents {
    policies: Vec<PolicyFile>,
    tests: String,
}

/// What is remembered of the bundle that was in force last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleSeen {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// SHA-256 of its manifest, in hex.
    pub manifest_sha256: String,
    /// [`BundleTrust::digest`], in hex: versions of bundles that other keys signed say nothing.
    pub trust: String,
}

impl BundleSource {
    /// Verifies signatures, manifest and files, in this order.
    ///
    /// # Errors
    /// The first reason to refuse it.
    pub fn open(self, trust: &BundleTrust) -> Result<SignedBundle, BundleError> {
        let signers = trust.verify(&self.manifest, &self.signatures)?;
        let manifest = Manifest::parse(&self.manifest)?;
        if manifest.name != trust.name() {
            let what = format!("it is called `{}`, expected `{}`", manifest.name, trust.name());
            return Err(BundleError::new(Fault::NameWrong, what));
        }
        let (sha256, validity) = (manifest::sha256(&self.manifest), manifest.validity()?);
        let contents = Contents::listed(&manifest, self.files)?;
        Ok(SignedBundle { manifest, sha256, signers, validity, contents })
    }

    /// The manifest, whoever signed it. For people who look at a bundle; nothing is decided by it.
    ///
    /// # Errors
    /// It is no manifest.
    pub fn manifest_unverified(&self) -> Result<Manifest, BundleError> {
        Manifest::parse(&self.manifest)
    }
}

impl Contents {
    /// INVARIANT(signed-before-read): exactly what is listed.
    fn listed(manifest: &Manifest, files: Vec<(String, Vec<u8>)>) -> Result<Self, BundleError> {
        for listed in &manifest.files {
            if !files.iter().any(|(name, _)| *name == listed.path) {
                return Err(BundleError::new(Fault::FileMissing, format!("`{}` is listed and not there", listed.path)));
            }
        }
        for (name, bytes) in &files {
            let Some(listed) = manifest.files.iter().find(|listed| listed.path == *name) else {
                return Err(BundleError::new(Fault::FileExtra, format!("`{name}` is there and not listed")));
            };
            let (length, sha256) = (bytes.len() as u64, manifest::sha256(bytes));
            if listed.bytes != length {
                let what = format!("`{name}` has {length} bytes, expected {}", listed.bytes);
                return Err(BundleError::new(Fault::FileDiffers, what));
            }
            if listed.sha256 != sha256 {
                let what = format!("`{name}` has SHA-256 `{sha256}`, expected `{}`", listed.sha256);
                return Err(BundleError::new(Fault::FileDiffers, what));
            }
        }
        Self::of(files)
    }

    fn of(files: Vec<(String, Vec<u8>)>) -> Result<Self, BundleError> {
        let (mut policies, mut tests) = (Vec::new(), None);
        for (name, bytes) in files {
            let text = String::from_utf8(bytes)
                .map_err(|error| BundleError::new(Fault::PolicyRefused, format!("`{name}` is not UTF-8: {}", error.utf8_error())))?;
            if name == TESTS { tests = Some(text) } else { policies.push(PolicyFile { name, text }) }
        }
        let tests = tests.ok_or_else(|| BundleError::new(Fault::NoTests, format!("there is no `{TESTS}`")))?;
        Ok(Self { policies, tests })
    }

    /// The policies, if they are sound and their own tests pass. Tests see no configuration: they come out the same everywhere.
    fn check(&self) -> Result<PolicySet, BundleError> {
        let refused = |what: String| BundleError::new(Fault::PolicyRefused, what);
        let set = PolicySet::parse(&self.policies, &Entities::default()).map_err(|errors| refused(errors.to_string()))?;
        if let Some(defect) = set.lint().into_iter().find(|found| found.defect) {
            return Err(refused(defect.to_string()));
        }
        let outcomes = run_tests(&set, &self.tests);
        if let Some(failed) = outcomes.iter().find(|outcome| !outcome.passed) {
            return Err(BundleError::new(Fault::TestFails, format!("test `{}` fails: {}", failed.name, failed.detail)));
        }
        Ok(set)
    }
}

/// Checks files as a bundle's are, before anybody signs them.
///
/// # Errors
/// What would be refused in them.
pub fn check_contents(files: &[(String, Vec<u8>)]) -> Result<PolicySet, BundleError> {
    Contents::of(files.to_vec())?.check()
}

impl SignedBundle {
    /// What it says it is.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The signatures that count.
    #[must_use]
    pub fn signers(&self) -> &[BundleSigner] {
        &self.signers
    }

    /// What to remember when it takes force.
    #[must_use]
    pub fn seen(&self, trust: &BundleTrust) -> BundleSeen {
        let trust = trust.digest().iter().map(|byte| format!("{byte:02x}")).collect();
        let (name, version, manifest_sha256) = (self.manifest.name.clone(), self.manifest.version, self.sha256.clone());
        BundleSeen { name, version, manifest_sha256, trust }
    }

    /// Whether it is valid at `now_unix_ms`, in milliseconds since 1970-01-01 UTC.
    ///
    /// # Errors
    /// It is not.
    pub fn check_time(&self, now_unix_ms: i64) -> Result<(), BundleError> {
        let Manifest { version, not_before, expires, .. } = &self.manifest;
        if now_unix_ms < self.validity.from_unix_ms {
            return Err(BundleError::new(Fault::NotYetValid, format!("version {version} is valid from `{not_before}`")));
        }
        if now_unix_ms >= self.validity.until_unix_ms {
            return Err(BundleError::new(Fault::Expired, format!("version {version} has expired at `{expires}`")));
        }
        Ok(())
    }

    /// INVARIANT(never-back): whether it may follow what was in force.
    ///
    /// # Errors
    /// It is older, or another one with the same version.
    pub fn check_version(&self, trust: &BundleTrust, seen: Option<&BundleSeen>) -> Result<(), BundleError> {
        let own = self.seen(trust);
        let Some(seen) = seen.filter(|seen| seen.trust == own.trust && seen.name == own.name) else { return Ok(()) };
        if own.version < seen.version {
            let what = format!("version {}, and version {} was in force here", own.version, seen.version);
            return Err(BundleError::new(Fault::VersionOlder, what));
        }
        if own.version == seen.version && own.manifest_sha256 != seen.manifest_sha256 {
            let what = format!("another bundle with version {} was in force here: give the new one a higher version", own.version);
            return Err(BundleError::new(Fault::VersionReused, what));
        }
        Ok(())
    }

    /// The policies with what this gateway knows. They answer no question that is asked outside of the bundle's validity.
    ///
    /// # Errors
    /// The policies are refused, one of their tests fails, or the entities do not fit.
    pub fn policies(&self, entities: &Entities) -> Result<PolicySet, BundleError> {
        let set = self.contents.check()?;
        let set = set.with_entities(entities).map_err(|errors| BundleError::new(Fault::PolicyRefused, errors.to_string()))?;
        let Manifest { name, version, expires, .. } = self.manifest.clone();
        Ok(set.valid(self.validity.from_unix_ms..self.validity.until_unix_ms, BundleStamp { name, version, expires }))
    }
}

/// Which bundle a policy set is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleStamp {
    /// The bundle's name.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// When it is no longer valid.
    pub expires: String,
}
