//! Gateways whose keys are in PKCS#11 tokens: SoftHSM2 in a token's place, in processes of their own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::command::wait_for;
use crate::gateway::{A, B, Name};
use crate::lab::{Lab, Setup, TRUST_DOMAIN, VM, replaced};

const MODULES: [&str; 3] =
    ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so"];

/// The library of SoftHSM2, if this program speaks to tokens and that is installed.
fn module() -> Option<&'static str> {
    let found = MODULES.into_iter().find(|path| Path::new(path).exists());
    let tool = Command::new("softhsm2-util").arg("--version").output().is_ok();
    if !cfg!(feature = "pkcs11") {
        println!("SKIP keys in tokens: built without `--features pkcs11`");
        return None;
    }
    if found.is_none() || !tool {
        println!("SKIP keys in tokens: softhsm2 is not installed");
        return None;
    }
    found
}

/// Puts both keys of a gateway into a token, and nowhere else.
fn into_token(lab: &mut Lab, name: Name, module: &str) {
    let directory = lab.gateway(name).directory().to_owned();
    let (tokens, conf, pin) = (directory.join("tokens"), directory.join("softhsm2.conf"), directory.join("pin"));
    fs::create_dir(&tokens).unwrap();
    fs::write(&conf, format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display())).unwrap();
    fs::write(&pin, "1234\n").unwrap();
    fs::set_permissions(&pin, fs::Permissions::from_mode(0o600)).unwrap();
    lab.gateway_mut(name).set_environment("SOFTHSM2_CONF", &conf);
    let softhsm = |arguments: &[&str]| run("softhsm2-util", &directory, arguments);
    softhsm(&["--init-token", "--free", "--label", "sealane", "--pin", "1234", "--so-pin", "5678"]);
    // The one that is meant is not the first: which it is shows by a signature.
    let key = |of: Name| lab.pki().join(format!("{}-key.pem", of.gateway()));
    for (of, id) in [(name.other(), "01"), (name, "02")] {
        let path = key(of);
        softhsm(&["--import", path.to_str().unwrap(), "--token", "sealane", "--label", "gateway", "--id", id, "--pin", "1234"]);
    }
    let signing = lab.pki().join(format!("{}-signing-key.pem", name.gateway()));
    let signing = signing.to_str().unwrap();
    softhsm(&["--import", signing, "--token", "sealane", "--label", "evidence", "--id", "03", "--pin", "1234"]);
    let path = lab.gateway(name).config();
    let text = fs::read_to_string(&path).unwrap();
    let in_token = format!("key = \"pkcs11:token=sealane;object=gateway\"\npkcs11_module = \"{module}\"\npkcs11_pin = \"pin\"\n");
    let text = replaced(&text, &format!("key = \"../pki/{}-key.pem\"\n", name.gateway()), &in_token);
    let file = format!("signing_key = \"../pki/{}-signing-key.pem\"", name.gateway());
    let text = replaced(&text, &file, "signing_key = \"pkcs11:token=sealane;object=evidence\"");
    fs::write(&path, text).unwrap();
}

/// A tool, in a gateway's directory and with its tokens.
fn run(program: &str, directory: &Path, arguments: &[&str]) {
    let mut command = Command::new(program);
    command.env("SOFTHSM2_CONF", directory.join("softhsm2.conf")).current_dir(directory).args(arguments);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{program} {arguments:?}: {done:?}");
}

fn lab_with_tokens(module: &str) -> Lab {
    let mut lab = Setup::new().busy().prepare();
    for name in [A, B] {
        into_token(&mut lab, name, module);
    }
    for name in [A, B] {
        for key in ["key", "signing-key"] {
            fs::remove_file(lab.pki().join(format!("{}-{key}.pem", name.gateway()))).unwrap();
        }
    }
    lab.start_guest();
    for name in [A, B] {
        lab.gateway_mut(name).start();
    }
    lab
}

#[test]
fn a_guest_moves_between_gateways_whose_keys_are_in_tokens() {
    let Some(module) = module() else { return };
    let lab = lab_with_tokens(module);
    lab.migrate(A, &[]).expect_moved();
    lab.runs_only_on(B);
    // Sessions that are there go on without the tokens.
    let (running, id) = lab.start_slow_migration(B, &[]);
    for name in [A, B] {
        lab.gateway(name).end_companion("key");
    }
    lab.gateway(B).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    running.finish().expect_moved();
    lab.settled_on(A);
    // New ones do not come about, and both ends say why.
    let said = lab.migrate(A, &[]);
    said.expect_stayed(said.code, &[VM, "what has", "did not sign"]);
    assert_ne!(said.code, 0);
    wait_for("a log that says which key", || lab.gateway(B).log().contains("pkcs11:token=sealane;object=gateway").then_some(()));
    lab.settled_on(A);
    // Both logs are signed by the keys that are in no file any more.
    for name in [A, B] {
        let public = lab.pki().join(format!("{}-signing-pub.pem", name.gateway()));
        let log = lab.gateway(name).directory().join("audit");
        let arguments = ["audit".as_ref(), "verify".as_ref(), log.as_os_str(), "--key".as_ref(), public.as_os_str()];
        crate::command::run(lab.directory(), &arguments).expect(0, &["verified"]);
    }
    // Nothing leaves that cannot be recorded.
    lab.gateway(A).end_companion("signing_key");
    let said = lab.migrate(A, &[]);
    said.expect_stayed(said.code, &["its checkpoint is not signed"]);
    assert_ne!(said.code, 0);
}

/// A gateway starts only when a signature of the token fits its certificate. P-256 is what guests move with above.
#[test]
fn keys_of_every_kind_sign_in_a_token() {
    let Some(module) = module() else { return };
    let mut lab = Setup::new().prepare();
    into_token(&mut lab, A, module);
    let (path, directory) = (lab.gateway(A).config(), lab.gateway(A).directory().to_owned());
    let good = fs::read_to_string(&path).unwrap();
    let kinds: [(&str, &str, &[&str]); 3] = [
        ("rsa", "a1", &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
        ("p384", "a2", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]),
        ("ed25519", "a3", &["-algorithm", "ED25519"]),
    ];
    for (kind, id, options) in kinds {
        let (key, certificate) = (format!("{kind}.pem"), format!("{kind}-cert.pem"));
        run("openssl", &directory, &[&["genpkey", "-out", &key], options].concat());
        let name = format!("subjectAltName=URI:spiffe://{TRUST_DOMAIN}/gateway/gw-a");
        let mut request = vec!["req", "-x509", "-new", "-key", &key, "-out", &certificate, "-subj", "/CN=gw-a", "-days", "30"];
        let usages = ["keyUsage=critical,digitalSignature", "extendedKeyUsage=serverAuth,clientAuth", "basicConstraints=critical,CA:FALSE"];
        for extension in [name.as_str()].iter().chain(&usages) {
            request.extend(["-addext", extension]);
        }
        run("openssl", &directory, &request);
        run("softhsm2-util", &directory, &["--import", &key, "--token", "sealane", "--label", kind, "--id", id, "--pin", "1234"]);
        let text = replaced(&good, "object=gateway", &format!("object={kind}"));
        fs::write(&path, replaced(&text, "../pki/gw-a-cert.pem", &certificate)).unwrap();
        lab.gateway_mut(A).start();
        assert_eq!(lab.gateway_mut(A).stop(), Some(0), "{kind}");
    }
}

#[test]
fn a_gateway_does_not_start_without_its_token_and_says_why() {
    let Some(module) = module() else { return };
    let mut lab = Setup::new().prepare();
    into_token(&mut lab, A, module);
    let (path, pin) = (lab.gateway(A).config(), lab.gateway(A).directory().join("pin"));
    let good = fs::read_to_string(&path).unwrap();
    let with = |from: &str, to: &str| fs::write(&path, replaced(&good, from, to)).unwrap();
    let in_vain = |words: &[&str]| {
        let said = lab.gateway(A).start_in_vain();
        assert_ne!(said.code, 0, "{said:?}");
        said.expect(said.code, words);
    };
    with("token=sealane", "token=another");
    in_vain(&["pkcs11:token=another;object=gateway", "0 tokens that are there"]);
    with("object=gateway", "object=another");
    in_vain(&["0 private keys"]);
    with("object=gateway", "object=gateway;id=%01");
    in_vain(&["does not belong to"]);
    // Which key signs evidence shows by its public half, beside it under the same name.
    let directory = lab.gateway(A).directory().to_owned();
    let import = |key: &str, label: &str, id: &str, more: &[&str]| {
        run("openssl", &directory, &["genpkey", "-algorithm", "ED25519", "-out", key]);
        let arguments = ["--import", key, "--token", "sealane", "--label", label, "--id", id, "--pin", "1234"];
        run("softhsm2-util", &directory, &[&arguments, more].concat());
    };
    import("half.pem", "half", "04", &["--no-public-key"]);
    import("other.pem", "evidence", "05", &[]);
    for (object, words) in [
        ("another", "0 private keys"),
        ("gateway;id=%02", "0 Ed25519 keys with both halves"),
        ("half", "0 Ed25519 keys with both halves"),
        ("evidence", "2 Ed25519 keys with both halves"),
    ] {
        with("object=evidence", &format!("object={object}"));
        in_vain(&[&format!("token=sealane;object={object}"), words]);
    }
    let good = replaced(&good, "object=evidence", "object=evidence;id=%03");
    fs::write(&path, &good).unwrap();
    fs::set_permissions(&pin, fs::Permissions::from_mode(0o644)).unwrap();
    in_vain(&["pin", "mode 644"]);
    fs::set_permissions(&pin, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&pin, "4321").unwrap();
    in_vain(&["refused its PIN"]);
}
