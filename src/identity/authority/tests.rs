use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;

use super::*;
use crate::identity::{Credentials, IdentityConfig, PostQuantum, TrustDomainConfig, verify_signature};

fn credentials(authority: &AuthorityFiles, gateway: &GatewayFiles) -> Arc<Credentials> {
    let trust = TrustDomainConfig {
        domain: gateway.spiffe.trust_domain().to_owned(),
        roots: authority.certificate.clone(),
        crls: vec![authority.crl.clone()],
        intermediates: None,
    };
    Credentials::load(IdentityConfig {
        certificate: gateway.certificate.clone(),
        key: gateway.key.clone(),
        signing_key: gateway.signing_key.clone(),
        trust: vec![trust],
        post_quantum: PostQuantum::default(),
    })
    .unwrap()
}

fn chain(gateway: &GatewayFiles) -> Vec<rustls::pki_types::CertificateDer<'static>> {
    crate::identity::trust::read_certificates(&crate::identity::keys::Own, &gateway.certificate, "certificate", 7).unwrap()
}

fn code(credentials: &Credentials, gateway: &GatewayFiles) -> Result<(), &'static str> {
    credentials.identify(&chain(gateway)).map(drop).map_err(|error| error.refusal().unwrap().code())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn crl_number(authority: &AuthorityFiles) -> u64 {
    let described = show(&authority.crl).unwrap();
    described[0].lines.iter().find(|(label, _)| *label == "number").unwrap().1.parse().unwrap()
}

struct Place {
    _dir: tempfile::TempDir,
    path: PathBuf,
    files: AuthorityFiles,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pki");
    let files = init(&path, "dc1.test").unwrap();
    Place { _dir: dir, path, files }
}

#[test]
fn issued_gateways_trust_each_other_until_one_is_revoked() {
    let place = place();
    let (a, b) = (issue(&place.path, "gw-a", "north").unwrap(), issue(&place.path, "gw-b", "south").unwrap());
    assert_eq!(b.spiffe.as_str(), "spiffe://dc1.test/gateway/gw-b");
    let at_a = credentials(&place.files, &a);
    let seen = at_a.identify(&chain(&b)).unwrap();
    assert_eq!((seen.spiffe(), seen.site()), (&b.spiffe, Some("south")));
    assert_eq!(seen.days_left(SystemTime::now()), 89);

    let number = crl_number(&place.files);
    revoke(&place.path, "gw-b").unwrap();
    assert_eq!(crl_number(&place.files), number + 1);
    at_a.reload().unwrap();
    assert_eq!((code(&at_a, &b), code(&at_a, &a)), (Err("revoked"), Ok(())));

    refresh_crl(&place.path).unwrap();
    assert_eq!(crl_number(&place.files), number + 2);
    at_a.reload().unwrap();
    assert_eq!(code(&at_a, &b), Err("revoked"), "a refresh keeps what was revoked");

    let again = issue(&place.path, "gw-b", "south").unwrap();
    assert_eq!(code(&at_a, &again), Ok(()), "a revoked name may be issued anew");
}

#[test]
fn renewal_keeps_name_site_and_signing_key_and_the_old_certificate_works_on() {
    let place = place();
    let files = issue(&place.path, "gw-a", "north").unwrap();
    let credentials = credentials(&place.files, &files);
    let (old, signer) = (chain(&files), credentials.signer().public_key());
    assert_eq!(renew(&place.path, "gw-a").unwrap(), files);
    credentials.reload().unwrap();
    assert_ne!(chain(&files), old);
    assert_eq!(credentials.signer().public_key(), signer);
    assert_eq!(credentials.own_site().as_deref(), Some("north"));
    assert!(credentials.identify(&old).is_ok());
    // Both are revoked together.
    revoke(&place.path, "gw-a").unwrap();
    credentials.reload().unwrap();
    assert!(credentials.identify(&old).is_err() && code(&credentials, &files) == Err("revoked"));
    assert!(matches!(renew(&place.path, "gw-a"), Err(IdentityError::NotIssued { .. })));
    assert!(matches!(revoke(&place.path, "gw-a"), Err(IdentityError::NotIssued { .. })));
}

#[test]
fn nothing_is_overwritten_by_mistake() {
    let place = place();
    let before = fs::read(&place.files.key).unwrap();
    assert!(matches!(init(&place.path, "dc1.test"), Err(IdentityError::Exists { .. })));
    assert_eq!(fs::read(&place.files.key).unwrap(), before);
    let files = issue(&place.path, "gw-a", "north").unwrap();
    let key = fs::read(&files.key).unwrap();
    assert!(matches!(issue(&place.path, "gw-a", "north"), Err(IdentityError::Exists { .. })));
    assert_eq!(fs::read(&files.key).unwrap(), key);
}

#[test]
fn names_that_would_be_other_files_are_refused() {
    let place = place();
    for name in ["", "ca", "a-signing", "../x", "a/b", ".a", "-a", "a b", "a\n", &"x".repeat(64)] {
        assert!(matches!(issue(&place.path, name, "north"), Err(IdentityError::InvalidName { .. })), "{name:?}");
        assert!(renew(&place.path, name).is_err() && revoke(&place.path, name).is_err(), "{name:?}");
    }
    assert!(matches!(issue(&place.path, "a", "no/rth"), Err(IdentityError::InvalidName { what: "site", .. })));
    assert_eq!(fs::read_dir(&place.path).unwrap().count(), 4);
    for domain in ["", "DC1", "a b", "a/b"] {
        assert!(matches!(init(&place.path.join("x"), domain), Err(IdentityError::InvalidTrustDomain { .. })), "{domain:?}");
    }
    assert!(init(&place.path.join("long"), &"x".repeat(255)).is_ok(), "the longest trust domain fits a certificate");
}

#[test]
fn keys_and_directory_are_private_and_no_temporary_file_is_left() {
    let place = place();
    let files = issue(&place.path, "gw-a", "north").unwrap();
    assert_eq!(mode(&place.path), 0o700);
    for private in [&place.files.key, &files.key, &files.signing_key, &place.path.join(INDEX)] {
        assert_eq!(mode(private), 0o600, "{}", private.display());
    }
    for public in [&place.files.certificate, &place.files.crl, &files.certificate, &files.signing_public_key] {
        assert_eq!(mode(public), 0o644, "{}", public.display());
    }
    // What a crash leaves behind is in nobody's way, and its mode is not inherited.
    let leftover = place.path.join("gw-a-key.pem.new");
    fs::write(&leftover, "half").unwrap();
    renew(&place.path, "gw-a").unwrap();
    assert!(!leftover.exists());
    assert_eq!(mode(&files.key), 0o600);
}

#[test]
fn an_exposed_or_foreign_root_key_signs_nothing() {
    let place = place();
    fs::set_permissions(&place.files.key, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(issue(&place.path, "a", "north"), Err(IdentityError::KeyExposed { .. })));
    assert!(matches!(issue(&place.path.join("nowhere"), "a", "north"), Err(IdentityError::File { .. })));
    fs::set_permissions(&place.files.key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(place.path.join(INDEX), "{}").unwrap();
    assert!(matches!(issue(&place.path, "a", "north"), Err(IdentityError::Malformed { what: "index", .. })));
}

#[test]
fn show_names_what_matters_and_no_key() {
    let place = place();
    let files = issue(&place.path, "gw-a", "north").unwrap();
    revoke(&place.path, "gw-a").unwrap();
    let text = |path: &Path| show(path).unwrap().iter().map(ToString::to_string).collect::<String>();
    let certificate = text(&files.certificate);
    for part in
        ["spiffe://dc1.test/gateway/gw-a", "Digital Signature", "server auth, client auth", "89 days left", "authority           no"]
    {
        assert!(certificate.contains(part), "{part} in {certificate}");
    }
    let serial = credentials(&place.files, &files).identify_at(&chain(&files), SystemTime::now()).unwrap_err();
    let Some(crate::identity::RefusalReason::Revoked { serial }) = serial.refusal() else { panic!("{serial}") };
    assert!(certificate.contains(serial.as_str()));
    let crl = text(&place.files.crl);
    assert!(crl.contains(&format!("revoked             {serial} at 20")) && crl.contains("number              2"), "{crl}");
    assert!(text(&place.files.certificate).contains("authority           yes"));
    assert_eq!(text(&files.key), "private key (not shown)\n");
    assert!(text(&files.signing_public_key).starts_with("public key"));
    assert!(matches!(show(&place.path.join(INDEX)), Err(IdentityError::Malformed { .. })));
}

/// Runs openssl; `None`, and a word on the terminal, where there is none.
fn openssl(arguments: &[&str]) -> Option<(bool, String)> {
    let Ok(output) = Command::new("openssl").args(arguments).output() else {
        println!("skipped: no openssl on this machine");
        return None;
    };
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Some((output.status.success(), text))
}

#[test]
fn openssl_agrees_about_certificates_revocation_and_signatures() {
    let place = place();
    let (a, b) = (issue(&place.path, "gw-a", "north").unwrap(), issue(&place.path, "gw-b", "south").unwrap());
    revoke(&place.path, "gw-b").unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (root, crl) = (path(&place.files.certificate), path(&place.files.crl));
    for (gateway, good) in [(&a, true), (&b, false)] {
        for purpose in ["sslserver", "sslclient"] {
            let certificate = path(&gateway.certificate);
            let arguments =
                ["verify", "-x509_strict", "-crl_check_all", "-purpose", purpose, "-CAfile", &root, "-CRLfile", &crl, &certificate];
            let Some((success, text)) = openssl(&arguments) else { return };
            assert_eq!(success, good, "{text}");
            assert!(good || text.contains("certificate revoked"), "{text}");
        }
    }
    let (_, text) = openssl(&["x509", "-in", &path(&a.certificate), "-noout", "-ext", "subjectAltName"]).unwrap();
    assert!(text.contains("URI:spiffe://dc1.test/gateway/gw-a"), "{text}");
    let (success, text) = openssl(&["pkey", "-in", &path(&a.key), "-noout", "-check"]).unwrap();
    assert!(success, "{text}");

    let message = place.path.join("message");
    let signature = place.path.join("signature");
    fs::write(&message, b"evidence").unwrap();
    let (key, public) = (path(&a.signing_key), path(&a.signing_public_key));
    let (input, output) = (path(&message), path(&signature));
    let (success, text) = openssl(&["pkeyutl", "-sign", "-rawin", "-inkey", &key, "-in", &input, "-out", &output]).unwrap();
    assert!(success, "{text}");
    let signer = credentials(&place.files, &a).signer();
    let made: [u8; 64] = fs::read(&signature).unwrap().try_into().unwrap();
    assert!(verify_signature(&signer.public_key(), b"evidence", &made));
    assert_eq!(signer.sign(b"evidence").unwrap(), made);
    let verify = ["pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", &public, "-in", &input, "-sigfile", &output];
    assert!(openssl(&verify).unwrap().0);
}
