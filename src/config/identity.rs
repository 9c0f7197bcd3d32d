//! `[identity]`: who the gateway is, and whom it believes.

use std::collections::HashMap;
use std::path::PathBuf;

use super::KeyFile;
use super::check::{file, unique};
use super::raw::{FileKind, FileMention, Located, Reader, Section};
use super::settings::{Identity, Trust};
use super::typed::TrustDomain;

pub(super) fn identity(r: &mut Reader, top: &mut Section<'_, '_>) -> Option<Identity> {
    let mut s = r.section(top, "identity");
    let certificate = file(r, &mut s, "certificate", FileKind::Certificate);
    let [key, signing_key] = ["key", "signing_key"].map(|name| {
        let key = r.required::<KeyFile>(&mut s, name);
        // A credential is there for the service alone, and a token's key is in no file.
        if let Some(Located { value: KeyFile::File(path), at }) = &key {
            r.mentions.push(FileMention { key: s.key(name), at: *at, path: path.clone(), kind: FileKind::PrivateKey });
        }
        key
    });
    if let (Some(key), Some(signing_key)) = (&key, &signing_key)
        && key.value == signing_key.value
    {
        let hint = "the TLS key and the key that signs handoffs are two keys; `sealane pki issue` makes both".to_owned();
        r.problem(signing_key.at, &s.key("signing_key"), "the same file as `identity.key`".to_owned(), Some(hint));
    }
    let in_token = |key: &Option<Located<KeyFile>>| key.as_ref().filter(|key| matches!(key.value, KeyFile::Token(_))).map(|key| key.at);
    let (pkcs11_module, pkcs11_pin) = token(r, &mut s, in_token(&key).or_else(|| in_token(&signing_key)));
    let require_post_quantum = r.or(&mut s, "require_post_quantum", false).value;
    let mut domains = HashMap::new();
    let mut trust = Vec::new();
    let mut whole = true;
    let tables = r.sections(&mut s, "trust");
    if tables.is_empty() && s.is_present() {
        let hint = Some("add `[[identity.trust]]` with domain, roots and crls".to_owned());
        r.problem(s.at(), &s.key("trust"), "missing: expected at least one trust domain".to_owned(), hint);
    }
    for t in tables {
        match trust_domain(r, t, &mut domains) {
            Some(domain) => trust.push(domain),
            None => whole = false,
        }
    }
    r.finish(s);
    let (certificate, key, signing_key) = (certificate?.value, key?.value, signing_key?.value);
    let identity = Identity { certificate, key, pkcs11_module, pkcs11_pin, signing_key, require_post_quantum, trust };
    (whole && !identity.trust.is_empty()).then_some(identity)
}

fn trust_domain(r: &mut Reader, mut t: Section<'_, '_>, seen: &mut HashMap<String, usize>) -> Option<Trust> {
    let domain = r.required::<TrustDomain>(&mut t, "domain").map(|domain| Located { value: domain.value.0, at: domain.at });
    unique(r, &t, "domain", domain.as_ref(), seen, "trust domain");
    let roots = file(r, &mut t, "roots", FileKind::Pem("CERTIFICATE"));
    let crls = r.required::<Vec<PathBuf>>(&mut t, "crls");
    if let Some(crls) = &crls {
        if crls.value.is_empty() {
            let hint = "a peer whose revocation cannot be checked is refused; `sealane pki init` makes an empty CRL".to_owned();
            r.problem(crls.at, &t.key("crls"), "expected at least one revocation list, got none".to_owned(), Some(hint));
        }
        for (index, path) in crls.value.iter().enumerate() {
            let key = format!("{}[{index}]", t.key("crls"));
            r.mentions.push(FileMention { key, at: crls.at, path: path.clone(), kind: FileKind::RevocationList });
        }
    }
    let intermediates = r.optional::<PathBuf>(&mut t, "intermediates");
    if let Some(file) = &intermediates {
        let kind = FileKind::Pem("CERTIFICATE");
        r.mentions.push(FileMention { key: t.key("intermediates"), at: file.at, path: file.value.clone(), kind });
    }
    r.finish(t);
    let intermediates = intermediates.map(|file| file.value);
    Some(Trust { domain: domain?.value, roots: roots?.value, crls: crls?.value, intermediates })
}

/// The library that speaks to the tokens of keys, and the file with their PIN. `key`: the place of one that is in a token.
fn token(r: &mut Reader, s: &mut Section<'_, '_>, key: Option<usize>) -> (Option<PathBuf>, Option<KeyFile>) {
    let module = r.optional::<PathBuf>(s, "pkcs11_module");
    let pin = r.optional::<KeyFile>(s, "pkcs11_pin");
    if let (Some(at), None) = (key, &module) {
        let hint = "the library of the token's maker, e.g. `/usr/lib/softhsm/libsofthsm2.so`".to_owned();
        r.problem(at, &s.key("pkcs11_module"), "missing: the key is in a token".to_owned(), Some(hint));
    }
    let needless = [("pkcs11_module", module.as_ref().map(|it| it.at)), ("pkcs11_pin", pin.as_ref().map(|it| it.at))];
    for (name, at) in needless.into_iter().filter_map(|(name, at)| Some((name, at.filter(|_| key.is_none())?))) {
        let hint = "`key = \"pkcs11:token=…;object=…\"`, or `signing_key`".to_owned();
        r.problem(at, &s.key(name), "neither `key` nor `signing_key` is in a token".to_owned(), Some(hint));
    }
    match &pin {
        Some(Located { value: KeyFile::Token(_), at }) => {
            r.problem(*at, &s.key("pkcs11_pin"), "expected a file, or a credential, with the PIN".to_owned(), None);
        }
        Some(Located { value: KeyFile::File(path), at }) => {
            r.mentions.push(FileMention { key: s.key("pkcs11_pin"), at: *at, path: path.clone(), kind: FileKind::Pin });
        }
        _ => {}
    }
    if let Some(Located { value, at }) = &module {
        r.mentions.push(FileMention { key: s.key("pkcs11_module"), at: *at, path: value.clone(), kind: FileKind::Library });
    }
    (module.map(|it| it.value), pin.map(|it| it.value))
}
