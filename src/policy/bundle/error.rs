//! Why a bundle is refused: one reason, the first that was found.

use crate::policy::errors::printable;

macro_rules! faults {
    ($($(#[$doc:meta])* $variant:ident = $code:literal,)*) => {
        /// What is wrong with a bundle.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum BundleFault {
            $($(#[$doc])* $variant,)*
        }
        impl BundleFault {
            /// Its code in problems, `--json` and audit entries.
            #[must_use]
            pub fn code(self) -> &'static str {
                match self {
                    $(Self::$variant => $code,)*
                }
            }
        }
    };
}
faults! {
    /// The directory or a file of it cannot be read.
    Unreadable = "bundle-unreadable",
    /// Something in the directory is no regular file: a link, a directory, a pipe.
    NotAFile = "bundle-not-a-file",
    /// A file, or the number of files, is beyond its bound.
    TooLarge = "bundle-too-large",
    /// There is no `manifest.json`.
    ManifestMissing = "bundle-manifest-missing",
    /// There is no signature.
    Unsigned = "bundle-unsigned",
    /// A signature is not in the form that `minisign` writes.
    SignatureMalformed = "bundle-signature-malformed",
    /// A signature is over the file and not over its hash.
    SignatureLegacy = "bundle-signature-legacy",
    /// A signature that says it is by a pinned key is not, or is over another manifest or comment.
    SignatureWrong = "bundle-signature-wrong",
    /// Fewer pinned keys have signed than have to.
    TooFewSignatures = "bundle-too-few-signatures",
    /// The manifest is not what a manifest has to be.
    ManifestMalformed = "bundle-manifest-malformed",
    /// The manifest is of another format.
    FormatUnknown = "bundle-format-unknown",
    /// The bundle is for somebody else.
    NameWrong = "bundle-name-wrong",
    /// The version is not one.
    VersionWrong = "bundle-version-wrong",
    /// The times are not times, or there is none between them.
    ValidityWrong = "bundle-validity-wrong",
    /// Its time has not come.
    NotYetValid = "bundle-not-yet-valid",
    /// Its time is over.
    Expired = "bundle-expired",
    /// A newer version was in force here.
    VersionOlder = "bundle-version-older",
    /// Another bundle with this version was in force here.
    VersionReused = "bundle-version-reused",
    /// It was made for policies that speak of other things.
    SchemaDiffers = "bundle-schema-differs",
    /// The manifest lists a file that cannot be in a bundle.
    FileName = "bundle-file-name",
    /// A file that is listed is not there.
    FileMissing = "bundle-file-missing",
    /// A file is there that is not listed.
    FileExtra = "bundle-file-extra",
    /// A file has another length or content than is listed.
    FileDiffers = "bundle-file-differs",
    /// There are no tests.
    NoTests = "bundle-no-tests",
    /// The policies are refused.
    PolicyRefused = "bundle-policy-refused",
    /// A test does not come out as it says.
    TestFails = "bundle-test-fails",
}

/// A bundle is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("policy bundle refused: {what}")]
pub struct BundleError {
    /// What is wrong.
    pub fault: BundleFault,
    /// What is wrong, for people: what was expected and what is there.
    pub what: String,
}

impl BundleError {
    /// Texts of a bundle are hostile until it is verified; what is quoted of them is made printable.
    #[must_use]
    pub fn new(fault: BundleFault, what: impl AsRef<str>) -> Self {
        // Policy problems stand on lines of their own.
        let lines: Vec<String> = what.as_ref().split('\n').map(printable).collect();
        Self { fault, what: lines.join("\n") }
    }
}
