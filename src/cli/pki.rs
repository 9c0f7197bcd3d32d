//! `sealane pki`: the small authority, and what an operator does with its files.
//!
//! Standard output is what belongs into a `gateway.toml`; everything else is talk.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::Ending;
use super::output::{Out, Tone, printable};
use super::tools::PkiCommand;
use crate::control::Exit;
use crate::identity::IdentityError;
use crate::identity::authority::{self, AuthorityFiles, Described, GatewayFiles};
use crate::telemetry::{Problem, chain, schema_tag};

schema_tag!(
    /// Schema of `pki show --json`.
    PkiSchema = "sealane.pki/1"
);

pub(super) fn pki(command: &PkiCommand, out: Out) -> Ending {
    match command {
        PkiCommand::Init { directory, trust_domain } => {
            let files = authority::init(directory, trust_domain).map_err(|error| problem(&error))?;
            told_init(&files, trust_domain, out);
        }
        PkiCommand::Issue { directory, gateway, site, renew } => {
            let site = site.as_ref().map(ToString::to_string).unwrap_or_default();
            let name = gateway.as_str();
            let issued = if *renew { authority::renew(directory, name) } else { authority::issue(directory, name, &site) };
            let files = issued.map_err(|error| problem(&error))?;
            told_issue(&Gateway { directory, name, site: &site, renewed: *renew }, &files, out);
        }
        PkiCommand::Revoke { directory, gateway } => {
            let crl = authority::revoke(directory, gateway.as_str()).map_err(|error| problem(&error))?;
            out.talk(&format!("revoked every certificate of gateway `{gateway}`"));
            told_crl(&crl, out);
        }
        PkiCommand::RefreshCrl { directory } => {
            let crl = authority::refresh_crl(directory).map_err(|error| problem(&error))?;
            told_crl(&crl, out);
        }
        PkiCommand::Show { file, json: _ } => show(file, out)?,
    }
    Ok(Exit::Done)
}

fn problem(error: &IdentityError) -> Problem {
    let problem = Problem::new(error.class(), chain(error)).with_code("pki");
    match error {
        IdentityError::Exists { .. } => {
            problem.with_hint("an authority is made once; `pki issue --renew` replaces a certificate before it ends, `pki revoke` ends it")
        }
        IdentityError::NotIssued { .. } => problem.with_hint("`issued.json` in the authority's directory lists what was issued"),
        IdentityError::InvalidTrustDomain { .. } => problem.with_hint("e.g. --trust-domain dc1.example.net"),
        _ => problem,
    }
}

/// Files as lines of talk: path, what it is, who may see it.
fn made(out: Out, files: &[(&Path, &str)]) {
    for (path, what) in files {
        out.talk(&format!("made {}  {}", absolute(path).display(), out.paint_talk(Tone::Quiet, what)));
    }
}

/// Configurations are read from elsewhere than where this command ran.
fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// A path as a TOML string.
fn toml(path: &Path) -> String {
    ::toml::Value::String(absolute(path).display().to_string()).to_string()
}

fn told_init(files: &AuthorityFiles, trust_domain: &str, out: Out) {
    made(
        out,
        &[
            (&files.certificate, "root certificate; every gateway that trusts this domain needs it"),
            (&files.crl, "revocation list; the same gateways need it, fresh"),
            (&files.key, "root key; SECRET, it never leaves this directory"),
        ],
    );
    out.talk("\nput into gateway.toml of every gateway that talks to gateways of this trust domain:\n");
    out.data(&trust(trust_domain, &files.certificate, &files.crl));
    out.talk(&format!("\nnext: sealane pki issue {} --gateway NAME --site SITE", parent(&files.certificate).display()));
}

fn trust(domain: &str, roots: &Path, crl: &Path) -> String {
    format!("[[identity.trust]]\ndomain = \"{domain}\"\nroots = {}\ncrls = [{}]\n", toml(roots), toml(crl))
}

fn parent(file: &Path) -> &Path {
    file.parent().unwrap_or(Path::new("."))
}

struct Gateway<'a> {
    directory: &'a Path,
    name: &'a str,
    site: &'a str,
    renewed: bool,
}

fn told_issue(gateway: &Gateway<'_>, files: &GatewayFiles, out: Out) {
    let mut list = vec![(files.certificate.as_path(), "certificate"), (files.key.as_path(), "its key; SECRET, for the gateway only")];
    if gateway.renewed {
        made(out, &list);
        out.talk(&format!("\nthe name, site and signing key of gateway `{}` stay; copy both files to it and send it SIGHUP", gateway.name));
        return;
    }
    list.push((&files.signing_key, "signs handoffs and audit checkpoints; SECRET, for the gateway only"));
    list.push((&files.signing_public_key, "for whoever verifies its audit log"));
    made(out, &list);
    out.talk(&format!("\nput into gateway.toml of `{}` (paths are where the files are now):\n", gateway.name));
    let mut text = String::new();
    let _ = write!(
        text,
        "[identity]\ncertificate = {}\nkey = {}\nsigning_key = {}\n\n",
        toml(&files.certificate),
        toml(&files.key),
        toml(&files.signing_key)
    );
    let authority = authority::files_of(gateway.directory);
    text.push_str(&trust(files.spiffe.trust_domain(), &authority.certificate, &authority.crl));
    let _ = write!(
        text,
        "\n# For gateway.toml of its peers:\n# [[peer]]\n# name = \"{}\"\n# address = \"HOST:4433\"\n# spiffe = \"{}\"\n# site = \"{}\"\n",
        gateway.name, files.spiffe, gateway.site
    );
    out.data(&text);
}

fn told_crl(crl: &Path, out: Out) {
    made(out, &[(crl, "revocation list")]);
    let next = authority::show(crl).ok().and_then(|all| field(all.first()?, "next update").map(str::to_owned));
    if let Some(next) = next {
        out.talk(&format!("it is good until {next}"));
    }
    out.talk("copy it to every gateway that trusts this domain and send each SIGHUP: open sessions are checked again at once");
}

fn field<'a>(described: &'a Described, name: &str) -> Option<&'a str> {
    described.lines.iter().find(|(label, _)| *label == name).map(|(_, value)| value.as_str())
}

/// Labels that may come more than once: always a list.
const LISTS: &[&str] = &["uri", "other name", "revoked"];

fn show(file: &Path, out: Out) -> Result<(), Problem> {
    #[derive(Serialize)]
    struct Object {
        schema: PkiSchema,
        file: String,
        objects: Vec<Value>,
    }
    let all = authority::show(file).map_err(|error| problem(&error))?;
    if out.json {
        let objects = all.iter().map(as_json).collect();
        out.object(&Object { schema: PkiSchema, file: file.display().to_string(), objects });
        return Ok(());
    }
    let texts: Vec<String> = all.iter().map(|described| printable(&described.to_string())).collect();
    out.data(&texts.join("\n"));
    Ok(())
}

fn as_json(described: &Described) -> Value {
    let mut object = Map::new();
    object.insert("kind".to_owned(), described.kind.into());
    for (label, value) in &described.lines {
        let entry = object.entry(label.replace(' ', "_"));
        if LISTS.contains(label) {
            if let Value::Array(values) = entry.or_insert_with(|| Value::Array(Vec::new())) {
                values.push(value.clone().into());
            }
        } else {
            entry.or_insert_with(|| value.clone().into());
        }
    }
    Value::Object(object)
}
