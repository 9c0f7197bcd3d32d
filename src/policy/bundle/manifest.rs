//! `manifest.json`: what a bundle is, from when to when, and exactly which files it has.
//!
//! ```json
//! {
//!   "format": "sealane.policy-bundle/1",
//!   "name": "fleet",
//!   "version": 7,
//!   "not_before": "2026-11-01T00:00:00Z",
//!   "expires": "2026-12-01T00:00:00Z",
//!   "schema_sha256": "0f…",
//!   "files": [
//!     { "path": "10-floor.cedar", "bytes": 2101, "sha256": "9a…" },
//!     { "path": "tests.json", "bytes": 5120, "sha256": "c3…" }
//!   ]
//! }
//! ```
//!
//! Nothing else may be in it. Times are UTC and to the second. `schema_sha256` is of the schema that the policies were checked
//! against. Paths ascend, and have no directories.

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::{BundleError, BundleFault as Fault};
use super::{MANIFEST, TESTS};
use crate::limits;
use crate::policy::SCHEMA;

const FORMAT: &str = "sealane.policy-bundle/1";
const ENDING: &str = ".cedar";

/// A manifest as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    /// What the bundle is called; gateways pin it.
    pub name: String,
    /// Every bundle of a name has a higher one than those before.
    pub version: u64,
    /// When it begins to be valid.
    pub not_before: String,
    /// When it is no longer valid.
    pub expires: String,
    schema_sha256: String,
    /// Every file, in order of path.
    pub files: Vec<Listed>,
}

/// A file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    /// Its name in the bundle's directory.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256 of its contents, in hex.
    pub sha256: String,
}

/// From when to when, in milliseconds since 1970-01-01 UTC. The end is not part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Validity {
    pub(super) from_unix_ms: i64,
    pub(super) until_unix_ms: i64,
}

impl Manifest {
    /// Describes files for a bundle that is to be signed.
    ///
    /// # Errors
    /// What [`open`](super::BundleSource::open) would refuse in the manifest.
    pub fn describe(name: &str, version: u64, not_before: &str, expires: &str, files: &[(String, Vec<u8>)]) -> Result<Self, BundleError> {
        let listed = |(path, bytes): &(String, Vec<u8>)| Listed { path: path.clone(), bytes: bytes.len() as u64, sha256: sha256(bytes) };
        let mut files: Vec<Listed> = files.iter().map(listed).collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let manifest = Self {
            format: FORMAT.to_owned(),
            name: name.to_owned(),
            version,
            not_before: not_before.to_owned(),
            expires: expires.to_owned(),
            schema_sha256: sha256(SCHEMA.as_bytes()),
            files,
        };
        manifest.check()?;
        Ok(manifest)
    }

    /// The bytes that are signed.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // Strings and numbers always have a form in JSON.
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// Reads a manifest; whoever calls knows who signed these bytes.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, BundleError> {
        let malformed = |what: String| BundleError::new(Fault::ManifestMalformed, format!("`{MANIFEST}`: {what}"));
        if bytes.len() > limits::BUNDLE_MANIFEST_BYTES_MAX {
            let what = format!("`{MANIFEST}` has more than {} bytes", limits::BUNDLE_MANIFEST_BYTES_MAX);
            return Err(BundleError::new(Fault::TooLarge, what));
        }
        // First as what it should be: that refuses a key that stands twice, which a general value would swallow.
        let typed = serde_json::from_slice::<Self>(bytes);
        let value = serde_json::from_slice::<Value>(bytes).map_err(|error| malformed(error.to_string()))?;
        if let Some(format) = value.get("format").and_then(Value::as_str)
            && format != FORMAT
        {
            return Err(BundleError::new(Fault::FormatUnknown, format!("format `{format}`, expected `{FORMAT}`")));
        }
        let manifest = typed.map_err(|error| malformed(error.to_string()))?;
        // A list of values in the right order would do for the types.
        let files = value.get("files").and_then(Value::as_array);
        if !value.is_object() || !files.is_some_and(|files| files.iter().all(Value::is_object)) {
            return Err(malformed("expected an object, and objects in `files`".to_owned()));
        }
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), BundleError> {
        check_name(&self.name).map_err(|what| BundleError::new(Fault::NameWrong, what))?;
        if !(1..=limits::BUNDLE_VERSION_MAX).contains(&self.version) {
            let what = format!("version {}, expected 1 to {}", self.version, limits::BUNDLE_VERSION_MAX);
            return Err(BundleError::new(Fault::VersionWrong, what));
        }
        self.validity()?;
        let schema = sha256(SCHEMA.as_bytes());
        if self.schema_sha256 != schema {
            let what = format!("it was made for the schema `{}`, and this version of Sealane has `{schema}`", self.schema_sha256);
            return Err(BundleError::new(Fault::SchemaDiffers, what));
        }
        self.check_files()
    }

    fn check_files(&self) -> Result<(), BundleError> {
        if self.files.len() > limits::POLICY_FILES_MAX {
            let what = format!("{} files, expected at most {}", self.files.len(), limits::POLICY_FILES_MAX);
            return Err(BundleError::new(Fault::TooLarge, what));
        }
        for file in &self.files {
            check_path(&file.path)?;
            let hex = file.sha256.len() == 64 && file.sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            if !hex {
                let what = format!("`sha256` of `{}` is `{}`, expected 64 digits of lower-case hex", file.path, file.sha256);
                return Err(BundleError::new(Fault::ManifestMalformed, what));
            }
        }
        for pair in self.files.windows(2) {
            if let [first, second] = pair
                && first.path >= second.path
            {
                let what = format!("`{}` is listed before `{}`, expected every path once and in order", first.path, second.path);
                return Err(BundleError::new(Fault::ManifestMalformed, what));
            }
        }
        if !self.files.iter().any(|file| file.path == TESTS) {
            return Err(BundleError::new(Fault::NoTests, format!("no `{TESTS}` is listed: a bundle carries the tests of its policies")));
        }
        Ok(())
    }

    pub(super) fn validity(&self) -> Result<Validity, BundleError> {
        let wrong = |what: String| BundleError::new(Fault::ValidityWrong, what);
        let time = |key: &str, text: &str| {
            let time = text.parse::<jiff::Timestamp>().ok().filter(|time| time.subsec_nanosecond() == 0 && time.to_string() == text);
            time.map(jiff::Timestamp::as_millisecond)
                .ok_or_else(|| wrong(format!("`{key}` is `{text}`, expected a time like `2026-12-01T00:00:00Z`")))
        };
        let (from_unix_ms, until_unix_ms) = (time("not_before", &self.not_before)?, time("expires", &self.expires)?);
        if from_unix_ms >= until_unix_ms {
            return Err(wrong(format!("it would be valid from `{}` to `{}`: never", self.not_before, self.expires)));
        }
        Ok(Validity { from_unix_ms, until_unix_ms })
    }
}

/// A bundle's name goes into audit entries and messages.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if (1..=limits::NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(format!("name `{name}`, expected 1–{} letters, digits, `.`, `_` or `-`", limits::NAME_BYTES_MAX))
}

fn check_path(path: &str) -> Result<(), BundleError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let named = path.len() <= limits::BUNDLE_PATH_BYTES_MAX && !path.starts_with('.') && path.bytes().all(plain);
    if named && (path == TESTS || path.ends_with(ENDING)) {
        return Ok(());
    }
    let what = format!(
        "`{path}` is listed, expected `{TESTS}` or a name that ends in `{ENDING}`, of at most {} letters, digits, `.`, `_` and `-`",
        limits::BUNDLE_PATH_BYTES_MAX
    );
    Err(BundleError::new(Fault::FileName, what))
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
