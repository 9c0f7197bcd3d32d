//! `policy bundle`: make, verify and show signed bundles. Signing is for `minisign`: no command here holds a key.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use super::super::output::{Out, Tone, printable};
use super::super::tools::{BundleCommand, BundleVerifyFlags};
use super::super::{Ending, config};
use super::{hex, plural};
use crate::config::{Policies, PolicyBundle};
use crate::control::Exit;
use crate::gateway::{entities, read_bundle, verify_bundle};
use crate::policy::bundle::{BundleError, MANIFEST, Manifest, SIGNATURE, SignedBundle, check_contents};
use crate::policy::{Entities, PolicySet};
use crate::telemetry::{ErrorClass, Problem, schema_tag};

schema_tag!(
    /// Schema of `policy bundle verify --json` and `policy bundle show --json`.
    BundleSchema = "sealane.policy-bundle/1"
);

pub(super) fn bundle(command: &BundleCommand, out: Out) -> Ending {
    match command {
        BundleCommand::Make { directory, name, version, not_before, expires } => {
            make(directory, name, *version, not_before.unwrap_or_else(jiff::Timestamp::now), *expires, out)
        }
        BundleCommand::Verify(flags) => verify(flags, out),
        BundleCommand::Show { directory, json: _ } => show(directory, out),
    }
}

fn refused(directory: &Path, error: &BundleError) -> Problem {
    Problem::new(ErrorClass::Misuse, format!("{error} (`{}`)", directory.display())).with_code(error.fault.code())
}

fn make(directory: &Path, name: &str, version: u64, not_before: jiff::Timestamp, expires: jiff::Timestamp, out: Out) -> Ending {
    let misuse = |message: String| Problem::new(ErrorClass::Misuse, message).with_code("policy");
    let path = directory.join(MANIFEST);
    let write = |bytes: &[u8]| std::fs::write(&path, bytes).map_err(|error| misuse(format!("cannot write `{}`: {error}", path.display())));
    if !path.exists() {
        // What is read below is read as a gateway reads it, and that wants one.
        write(b"")?;
    }
    let source = read_bundle(directory).map_err(|error| refused(directory, &error))?;
    if let Some((signature, _)) = source.signatures.first() {
        let problem = misuse(format!("`{}` has signatures of another manifest already, e.g. `{signature}`", directory.display()));
        return Err(problem.with_hint(format!("remove *{SIGNATURE}; the new manifest has to be signed anew")));
    }
    check_contents(&source.files).map_err(|error| refused(directory, &error))?;
    let second = |time: jiff::Timestamp| jiff::Timestamp::from_second(time.as_second()).unwrap_or(time).to_string();
    let manifest = Manifest::describe(name, version, &second(not_before), &second(expires), &source.files);
    let manifest = manifest.map_err(|error| refused(directory, &error))?;
    write(&manifest.to_bytes())?;
    let files = manifest.files.len();
    out.data(&format!("{}: {files} {}", path.display(), plural(files, "file", "files")));
    out.talk(&format!("now each signer runs: minisign -S -m {0} -x {0}.NAME{SIGNATURE}", path.display()));
    Ok(Exit::Done)
}

fn verify(flags: &BundleVerifyFlags, out: Out) -> Ending {
    let now = flags.at.unwrap_or_else(jiff::Timestamp::now).as_millisecond();
    let directory = flags.directory.clone();
    let (verified, threshold) = if let Some(file) = &flags.config {
        let config = config::load_text(file)?;
        let Policies::Bundle(pinned) = &config.policy else {
            let message = format!("`{}` names no bundle", file.display());
            return Err(Problem::new(ErrorClass::Misuse, message).with_hint("write `bundle`, `bundle_name` and `keys` in [policy]"));
        };
        let wanted = PolicyBundle { directory: directory.clone(), ..pinned.clone() };
        (verify_bundle(&wanted, Some(&config.gateway.state_directory), &entities(&config), now), wanted.threshold)
    } else {
        let threshold = flags.threshold.unwrap_or(flags.keys.len());
        let name = flags.name.clone().unwrap_or_default();
        let wanted = PolicyBundle { directory: directory.clone(), name, keys: flags.keys.clone(), threshold };
        (verify_bundle(&wanted, None, &Entities::default(), now), threshold)
    };
    match verified {
        Ok((bundle, policies)) => {
            if out.json {
                out.object(&Object::verified(&directory, &bundle, &policies));
            } else {
                out.data(&text(out, &bundle, &policies, threshold));
            }
            Ok(Exit::Done)
        }
        Err(error) => {
            let problem = refused(&directory, &error);
            if out.json {
                out.object(&Object::refused(&directory, &error));
                out.say_problem(&problem);
                return Ok(Exit::Usage);
            }
            Err(problem)
        }
    }
}

fn text(out: Out, bundle: &SignedBundle, policies: &PolicySet, threshold: usize) -> String {
    let mut text = manifest_text(bundle.manifest());
    for signer in bundle.signers() {
        let _ = writeln!(text, "signed by   {} in {}: {}", signer.key, signer.file, printable(&signer.trusted_comment));
    }
    let count = policies.policy_ids().count();
    let good = out.paint(Tone::Good, "good");
    let _ = writeln!(text, "{good}: {count} {}, its tests pass, {threshold} signed", plural(count, "policy", "policies"));
    text
}

fn manifest_text(manifest: &Manifest) -> String {
    let Manifest { name, version, not_before, expires, files, .. } = manifest;
    let mut text = format!("bundle      {} version {version}\nvalid       from {not_before} to {expires}\n", printable(name));
    for file in files {
        let _ = writeln!(text, "file        {} {:>8} {}", file.sha256, file.bytes, printable(&file.path));
    }
    text
}

fn show(directory: &Path, out: Out) -> Ending {
    let source = read_bundle(directory).map_err(|error| refused(directory, &error))?;
    let manifest = source.manifest_unverified().map_err(|error| refused(directory, &error))?;
    if out.json {
        out.object(&Object::shown(directory, &manifest));
    } else {
        let mut text = manifest_text(&manifest);
        for (name, _) in &source.signatures {
            let _ = writeln!(text, "signature   {}", printable(name));
        }
        out.data(&text);
    }
    out.talk("nothing of this was verified: `sealane policy bundle verify` does");
    Ok(Exit::Done)
}

#[derive(Serialize)]
struct Object {
    schema: BundleSchema,
    directory: String,
    /// Absent when nothing was verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    valid: Option<bool>,
    /// Why it is refused, for scripts.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<Manifest>,
    signers: Vec<SignerObject>,
    policies: Vec<String>,
    /// SHA-256 of the policies, as in the audit log.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
}

#[derive(Serialize)]
struct SignerObject {
    key: String,
    file: String,
    trusted_comment: String,
}

impl Object {
    fn new(directory: &Path) -> Self {
        Self {
            schema: BundleSchema,
            directory: directory.display().to_string(),
            valid: None,
            code: None,
            error: None,
            manifest: None,
            signers: Vec::new(),
            policies: Vec::new(),
            digest: None,
        }
    }

    fn verified(directory: &Path, bundle: &SignedBundle, policies: &PolicySet) -> Self {
        let signer = |signer: &crate::policy::bundle::BundleSigner| SignerObject {
            key: signer.key.to_string(),
            file: signer.file.clone(),
            trusted_comment: signer.trusted_comment.clone(),
        };
        Self {
            valid: Some(true),
            manifest: Some(bundle.manifest().clone()),
            signers: bundle.signers().iter().map(signer).collect(),
            policies: policies.policy_ids().map(str::to_owned).collect(),
            digest: Some(hex(&policies.digest())),
            ..Self::new(directory)
        }
    }

    fn refused(directory: &Path, error: &BundleError) -> Self {
        Self { valid: Some(false), code: Some(error.fault.code()), error: Some(error.what.clone()), ..Self::new(directory) }
    }

    fn shown(directory: &Path, manifest: &Manifest) -> Self {
        Self { manifest: Some(manifest.clone()), ..Self::new(directory) }
    }
}
