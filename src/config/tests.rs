use std::os::unix::fs::PermissionsExt;

use super::*;

const GOOD: &str = r#"[gateway]
name = "gw-a"
site = "dc1"
[identity]
certificate = "cert.pem"
key = "key.pem"
signing_key = "signing.pem"
[[identity.trust]]
domain = "dc2.example"
roots = "roots.pem"
crls = ["crl.pem"]
[[peer]]
name = "gw-b"
address = "gw-b:4433"
spiffe = "spiffe://dc2.example/gateway/gw-b"
site = "dc2"
[[vm]]
name = "web"
uuid = "6f1d6a0e-5c1b-4b52-9d5e-0a3c7c2f9b11"
tenant = "shop"
classification = "internal"
allowed_sites = ["dc1", "dc2"]
[incoming]
command = ["vmm", "--socket", "{socket}"]
[[operator]]
name = "alice"
uid = 1000
roles = ["operator"]
"#;

fn problems(text: &str) -> Vec<String> {
    match parse(text, Path::new("/etc/sealane/gateway.toml")) {
        Ok(_) => Vec::new(),
        Err(error) => {
            let hint = |problem: &ConfigProblem| problem.hint.as_ref().map(|hint| format!(" // {hint}")).unwrap_or_default();
            error.problems().iter().map(|problem| format!("{problem}{}", hint(problem))).collect()
        }
    }
}

/// Replaces `from` in the good file by `to`.
fn changed(from: &str, to: &str) -> Vec<String> {
    assert!(GOOD.contains(from), "{from}");
    problems(&GOOD.replacen(from, to, 1))
}

const NAME: &str = "a name of 1–63 letters, digits, `.`, `_` or `-`, starting with a letter, digit or `_`";

#[test]
fn every_kind_of_mistake_is_named_with_line_column_key_and_expectation() {
    let name = |text: &str| text.replace("NAME", NAME);
    let table: &[(&str, &str, &[&str])] = &[
        ("name = \"gw-a\"\n", "", &["1:1: gateway.name: missing: expected NAME"]),
        ("name = \"gw-a\"", "name = \"gw a\"", &["2:8: gateway.name: expected NAME, got `gw a`"]),
        ("name = \"gw-a\"", "name = 7", &["2:8: gateway.name: expected NAME, got the number 7"]),
        (
            "name = \"gw-a\"",
            "nmae = \"gw-a\"",
            &["1:1: gateway.name: missing: expected NAME", "2:1: gateway.nmae: unknown key // did you mean `name`?"],
        ),
        (
            "site = \"dc1\"",
            "site = \"dc1\"\nlisten = \"localhost:4433\"",
            &["4:10: gateway.listen: expected an IP address and a port, e.g. `127.0.0.1:4433` or `[::]:4433`, got `localhost:4433`"],
        ),
        ("site = \"dc1\"", "site = \"dc1\"\ncontrol_socket = \"\"", &["4:18: gateway.control_socket: expected a path, got an empty text"]),
        (
            "site = \"dc1\"",
            "site = \"dc1\"\nstate_directory = \"~/x\"",
            &["4:19: gateway.state_directory: expected a path, got `~/x` // `~` is not expanded; write the whole path"],
        ),
        (
            "site = \"dc1\"",
            "site = \"dc1\"\ncontrol_socket = \"/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"",
            &[
                "4:18: gateway.control_socket: expected a path of at most 107 bytes for a Unix socket, got 113 // use a shorter path, e.g. below /run",
            ],
        ),
        (
            "signing_key = \"signing.pem\"",
            "signing_key = \"key.pem\"",
            &[
                "7:15: identity.signing_key: the same file as `identity.key` // the TLS key and the key that signs handoffs are two keys; `sealane pki issue` makes both",
            ],
        ),
        (
            "site = \"dc1\"",
            "site = \"dc1\"\nsandbox = \"maybe\"",
            &["4:11: gateway.sandbox: expected `require`, `auto` or `off`, got `maybe`"],
        ),
        (
            "key = \"key.pem\"",
            "key = \"credential:../tls-key\"",
            &[
                "6:7: identity.key: expected a path, `credential:` and a name, or `pkcs11:` and which key of which token, got `credential:../tls-key` // the name of a `LoadCredential=` of the service: letters, digits, `.`, `-`, `_`",
            ],
        ),
        (
            "key = \"key.pem\"\n",
            "",
            &["4:1: identity.key: missing: expected a path, `credential:` and a name, or `pkcs11:` and which key of which token"],
        ),
        (
            "crls = [\"crl.pem\"]",
            "crls = []",
            &[
                "11:8: identity.trust[0].crls: expected at least one revocation list, got none // a peer whose revocation cannot be checked is refused; `sealane pki init` makes an empty CRL",
            ],
        ),
        (
            "crls = [\"crl.pem\"]",
            "crls = \"crl.pem\"",
            &["11:8: identity.trust[0].crls: expected a list in brackets, got `crl.pem` // write [\"crl.pem\"]"],
        ),
        (
            "domain = \"dc2.example\"",
            "domain = \"spiffe://dc2.example\"",
            &[
                "9:10: identity.trust[0].domain: expected a trust domain like `dc1.example.net`: lower case letters, digits, `.`, `-`, `_`, got `spiffe://dc2.example` // write `dc2.example` without the scheme",
            ],
        ),
        (
            "domain = \"dc2.example\"",
            "domain = \"dc3.example\"",
            &["15:10: peer[0].spiffe: trust domain `dc2.example` has no `[[identity.trust]]` // trusted here: dc3.example"],
        ),
        (
            "address = \"gw-b:4433\"",
            "address = \"gw-b\"",
            &["14:11: peer[0].address: expected `host:port`, e.g. `gw-b.example.net:4433`, got `gw-b`"],
        ),
        (
            "spiffe = \"spiffe://dc2.example/gateway/gw-b\"",
            "spiffe = \"gw-b\"",
            &["15:10: peer[0].spiffe: expected a SPIFFE ID like `spiffe://dc1.example.net/gateway/gw-a`, got `gw-b`"],
        ),
        ("name = \"gw-b\"", "name = \"gw-a\"", &["13:8: peer[0].name: `gw-a` is this gateway's own name"]),
        (
            "uuid = \"6f1d6a0e-5c1b-4b52-9d5e-0a3c7c2f9b11\"",
            "uuid = \"6f1d6a0e\"",
            &["19:8: vm[0].uuid: expected a UUID: 32 hexadecimal digits as 8-4-4-4-12, got `6f1d6a0e`"],
        ),
        (
            "classification = \"internal\"",
            "classification = \"secret\"",
            &["21:18: vm[0].classification: expected `public`, `internal` or `restricted`, got `secret`"],
        ),
        (
            "allowed_sites = [\"dc1\", \"dc2\"]",
            "allowed_sites = [\"dc1\", \"dc9\"]",
            &["22:17: vm[0].allowed_sites[1]: unknown site `dc9` // sites of this gateway and its peers: dc1, dc2"],
        ),
        (
            "allowed_sites = [\"dc1\", \"dc2\"]",
            "allowed_sites = [\"dc1\", 2, \"a b\"]",
            &["22:25: vm[0].allowed_sites[1]: expected NAME, got the number 2", "22:28: vm[0].allowed_sites[2]: expected NAME, got `a b`"],
        ),
        (
            "tenant = \"shop\"",
            "tenant = \"shop\"\nhome_site = \"dc7\"\nallowed_sites_ = 1",
            &[
                "21:13: vm[0].home_site: unknown site `dc7` // sites of this gateway and its peers: dc1, dc2",
                "22:1: vm[0].allowed_sites_: unknown key // did you mean `allowed_sites`?",
            ],
        ),
        (
            "tenant = \"shop\"",
            "tenant = \"shop\"\nmigratable = \"true\"",
            &["21:14: vm[0].migratable: expected `true` or `false`, got `true` // write it without quotes"],
        ),
        (
            "\"{socket}\"]",
            "\"{sock}\"]",
            &[
                "24:11: incoming.command[2]: unknown placeholder in `{sock}` // placeholders: {socket}, {vm}, {uuid}, {memory_bytes}, {vcpus}, {serial}",
                "24:11: incoming.command: expected `{socket}` in one of the arguments // placeholders: {socket}, {vm}, {uuid}, {memory_bytes}, {vcpus}, {serial}",
            ],
        ),
        (
            "[[operator]]",
            "max_memory = \"64G\"\n[[operator]]",
            &[
                "25:14: incoming.max_memory: expected a size with a unit, e.g. `\"256MiB\"`, got `64G` // `G` can mean several things; write e.g. `64MiB` or `64MB`",
            ],
        ),
        (
            "uid = 1000",
            "uid = \"1000\"",
            &["27:7: operator[0].uid: expected a whole number from 0 to 4294967295, got `1000` // write 1000 without quotes"],
        ),
        ("uid = 1000", "uid = -1", &["27:7: operator[0].uid: expected a whole number from 0 to 4294967295, got the number -1"]),
        (
            "roles = [\"operator\"]",
            "roles = [\"root\"]",
            &["28:10: operator[0].roles[0]: expected `admin`, `operator` or `viewer`, got `root`"],
        ),
        ("roles = [\"operator\"]", "roles = []", &["28:9: operator[0].roles: expected at least one of `admin`, `operator` or `viewer`"]),
        (
            "[incoming]",
            "[migration]\nmax_downtime = 300\n[incoming]",
            &[
                "24:16: migration.max_downtime: expected a duration with a unit, e.g. `\"300ms\"` or `\"1h\"`, got the number 300 // write `300ms` or `300s`",
            ],
        ),
        (
            "[incoming]",
            "[migration]\nbandwidth = \"100\"\n[incoming]",
            &[
                "24:13: migration.bandwidth: expected a bandwidth with a unit, e.g. `\"1Gbit\"` or `\"10MiB/s\"`, got `100` // write `100Mbit` or `100MiB/s`",
            ],
        ),
        ("[incoming]", "[migration]\nlanes = 99\n[incoming]", &["24:9: migration.lanes: expected 1 to 16, got 99"]),
        ("[incoming]", "[migration]\ntables = \"65GiB\"\n[incoming]", &["24:10: migration.tables: expected at most 64GiB, got 65GiB"]),
        (
            "[incoming]",
            "[migration]\nverify = \"maybe\"\n[incoming]",
            &["24:10: migration.verify: expected `true`, `false` or `\"full\"`, got `maybe`"],
        ),
        (
            "[incoming]",
            "[migration]\nlanes = 2.5\n[incoming]",
            &["24:9: migration.lanes: expected a whole number from 0 to 65535, got the number 2.5"],
        ),
        (
            "[incoming]",
            "[migration]\ncompression = \"gzip\"\n[incoming]",
            &["24:15: migration.compression: expected `auto`, `none`, `lz4` or `zstd`, got `gzip`"],
        ),
        (
            "[incoming]",
            "[migration]\ndurability = \"disk\"\n[incoming]",
            &["24:14: migration.durability: expected `none`, `dest` or `both`, got `disk`"],
        ),
        ("[incoming]", "[migration]\ntimeout = \"0s\"\n[incoming]", &["24:11: migration.timeout: expected more than zero"]),
        ("[incoming]", "[limits]\nmigrations_max = 0\n[incoming]", &["24:18: limits.migrations_max: expected 1 to 64, got 0"]),
        (
            "[[operator]]\n",
            "[operator]\n",
            &["25:1: operator: expected tables `[[operator]]`, got a table // write `[[operator]]` with two brackets on each side"],
        ),
        ("[gateway]\n", "peers = 1\n[gateway]\n", &["1:1: peers: unknown key // did you mean `peer`?"]),
        ("[gateway]\n", "policy = 1\n[gateway]\n", &["1:10: policy: expected a table `[policy]`, got the number 1"]),
    ];
    for (from, to, expected) in table {
        let expected: Vec<String> = expected.iter().map(|text| name(text)).collect();
        assert_eq!(changed(from, to), expected, "{from:?} -> {to:?}");
    }
}

#[test]
fn problems_of_every_part_are_listed_together_by_line() {
    let text = GOOD
        .replace("name = \"gw-a\"", "name = \"-\"")
        .replace("address = \"gw-b:4433\"", "address = 1")
        .replace("tenant = \"shop\"", "")
        .replace("uid = 1000", "uid = true\ncolour = 1");
    let found: Vec<String> = problems(&text).iter().map(|line| line.split(": ").take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        found,
        ["2:8 gateway.name", "14:11 peer[0].address", "17:1 vm[0].tenant", "27:7 operator[0].uid", "28:1 operator[0].colour"]
    );
}

#[test]
fn duplicates_name_the_line_of_the_first() {
    let peer = "[[peer]]\nname = \"gw-b\"\naddress = \"x:1\"\nspiffe = \"spiffe://dc2.example/gateway/gw-b\"\nsite = \"dc2\"\n";
    let vm = "[[vm]]\nname = \"web\"\nuuid = \"6F1D6A0E-5c1b-4b52-9d5e-0a3c7c2f9b11\"\ntenant = \"t\"\nclassification = \"public\"\n";
    let operator = "[[operator]]\nname = \"alice\"\nuid = 1000\nroles = [\"viewer\"]\n";
    let trust = "[[identity.trust]]\ndomain = \"dc2.example\"\nroots = \"r\"\ncrls = [\"c\"]\n";
    assert_eq!(
        problems(&format!("{GOOD}{peer}{vm}{operator}{trust}")),
        [
            "30:8: peer[1].name: peer name `gw-b` is used already on line 13",
            "32:10: peer[1].spiffe: identity `spiffe://dc2.example/gateway/gw-b` is used already on line 15",
            "35:8: vm[1].name: VM name `web` is used already on line 18",
            "36:8: vm[1].uuid: UUID `6f1d6a0e-5c1b-4b52-9d5e-0a3c7c2f9b11` is used already on line 19",
            "40:8: operator[1].name: operator name `alice` is used already on line 26",
            "41:7: operator[1].uid: user id `1000` is used already on line 27",
            "44:10: identity.trust[1].domain: trust domain `dc2.example` is used already on line 9",
        ]
    );
}

#[test]
fn broken_lines_are_all_reported_and_hide_no_other_mistake() {
    let found = problems(&GOOD.replace("site = \"dc1\"", "site = dc1").replace("uid = 1000", "uid = = 3\nwrong = 1"));
    assert!(found.iter().any(|line| line.starts_with("3:8: not TOML: ")), "{found:#?}");
    assert!(found.iter().any(|line| line.starts_with("27:7: not TOML: ")), "{found:#?}");
    assert!(found.iter().any(|line| line.starts_with("28:1: operator[0].wrong: unknown key")), "{found:#?}");
}

#[test]
fn an_empty_file_says_all_that_is_missing() {
    let found = problems("");
    let keys: Vec<&str> = found.iter().filter_map(|line| line.split(": ").nth(1)).collect();
    assert_eq!(keys, ["gateway.name", "gateway.site", "identity.certificate", "identity.key", "identity.signing_key"]);
}

#[test]
fn a_qemu_and_its_template_are_checked_together() {
    let template = |name: &str, arguments: &str| format!("[[template]]\nname = \"{name}\"\ncommand = [\"qemu\", {arguments}]\n");
    let waits = "\"unix:{socket}\", \"-incoming\", \"defer\"";
    let with =
        |vm: &str, templates: &str| problems(&(GOOD.replacen("tenant = \"shop\"", &format!("{vm}\ntenant = \"shop\""), 1) + templates));
    assert_eq!(with("qmp = \"a\"\ntemplate = \"small\"", &template("small", waits)), [""; 0]);
    let one = |vm: &str, templates: &str, says: &str| {
        let found = with(vm, templates);
        assert!(found.len() == 1 && found[0].contains(says), "{found:?}: {says}");
    };
    one("qmp = \"a\"\nsocket = \"b\"", "", "vm[0].qmp: expected either `socket` or `qmp`, got both");
    one(
        "incoming_qmp = \"a\"\ntemplate = \"small\"",
        &template("small", waits),
        "vm[0].incoming_qmp: expected either `template` or `incoming_qmp`, got both",
    );
    one("template = \"big\"", &template("small", waits), "vm[0].template: unknown template `big` // templates here: small");
    one("template = \"big\"", "", "unknown template `big` // there is no `[[template]]` here");
    one("", &template("small", "\"unix:{socket}\", \"-incoming\", \"tcp:0:1\""), "expected `-incoming` and `defer` among the arguments");
    one("", &template("small", "\"-incoming\", \"defer\""), "template[0].command: expected `{socket}` in one of the arguments");
    one("", &(template("small", waits) + &template("small", waits)), "template[1].name");
    one("qmp = \"a\"\nincoming_qmp = \"a\"", "", "vm[0].incoming_qmp");
}

#[test]
fn disks_of_a_vm_are_checked_by_themselves() {
    let disk = |lines: &str| changed("[incoming]", &format!("[[vm.disk]]\ndevice = \"disk0\"\n{lines}\n[incoming]"));
    assert_eq!(disk("file = \"d.raw\"\nformat = \"qcow2\"\ncluster_size = \"1MiB\"\nexisting = \"set-aside\"").len(), 0);
    for (lines, says) in [
        ("format = \"vmdk\"", "vm[0].disk[0].format: expected `raw` or `qcow2`, got `vmdk`"),
        ("cluster_size = \"3KiB\"", "vm[0].disk[0].cluster_size: expected a power of two from 512B to 2MiB"),
        ("max_size = \"65TiB\"", "vm[0].disk[0].max_size: expected 1B to 64TiB, got 65TiB"),
        ("existing = \"overwrite\"", "vm[0].disk[0].existing: expected `refuse` or `set-aside`, got `overwrite`"),
        ("[[vm.disk]]\ndevice = \"disk0\"", "device `disk0` is used already on line"),
        ("[[vm.disk]]\nfile = \"f\"", "vm[0].disk[1].device: missing"),
        ("[[vm.disk]]\ndevice = \"\"", "vm[0].disk[1].device: expected 1 to 255 characters"),
    ] {
        let found = disk(lines);
        assert!(found.iter().any(|problem| problem.contains(says)), "{found:#?}: {says}");
    }
}

#[test]
fn the_number_of_problems_is_bounded() {
    let text = "x = 1\n".replace('x', "k") + &(0..5000).map(|n| format!("k{n} = 1\n")).collect::<String>();
    assert_eq!(problems(&text).len(), crate::limits::CONFIG_PROBLEMS_MAX);
}

#[test]
fn deep_nesting_is_refused_and_does_not_exhaust_the_stack() {
    assert!(!problems(&format!("x = {}", "[".repeat(100_000))).is_empty());
}

#[test]
fn the_commented_example_is_a_good_file_and_states_the_defaults() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/gateway.toml")).unwrap();
    let example = parse(&text, Path::new("/etc/sealane/gateway.toml")).unwrap();
    let least = parse(GOOD, Path::new("/etc/sealane/gateway.toml")).unwrap();
    assert_eq!(example.migration, least.migration);
    assert_eq!(example.limits, least.limits);
    assert_eq!(example.policy, least.policy);
    assert_eq!(example.gateway, least.gateway);
    assert_eq!(example.incoming.unwrap().max_memory, least.incoming.unwrap().max_memory);
    for setting in &least.settings {
        let generic = setting.key.replace(|c: char| c.is_ascii_digit(), "0");
        assert!(example.settings.iter().any(|known| known.key == generic), "{generic} is not in the example");
    }
}

#[test]
fn effective_values_say_where_they_come_from() {
    let config =
        parse(&GOOD.replace("[incoming]", "[migration]\nbandwidth = \"1000Mbit\"\n[incoming]"), Path::new("/etc/sealane/gateway.toml"))
            .unwrap();
    let of = |key: &str| {
        config.settings.iter().find(|setting| setting.key == key).map(|setting| (setting.value.as_str(), setting.origin)).unwrap()
    };
    assert_eq!(of("migration.bandwidth"), ("1Gbit/s", Origin::Line(24)));
    assert_eq!(of("migration.timeout"), ("1h", Origin::Default));
    assert_eq!(of("identity.key"), ("/etc/sealane/key.pem", Origin::Line(6)));
    assert_eq!(of("vm[0].home_site"), ("dc1", Origin::Default));
    assert_eq!(of("identity.require_post_quantum"), ("false", Origin::Default));
}

#[test]
fn post_quantum_key_exchange_can_be_required() {
    let with = |value: &str| GOOD.replace("key = \"key.pem\"", &format!("key = \"key.pem\"\nrequire_post_quantum = {value}"));
    let config = parse(&with("true"), Path::new("/etc/sealane/gateway.toml")).unwrap();
    assert!(config.identity.require_post_quantum);
    let found = problems(&with("\"X25519MLKEM768\""));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("7:24: identity.require_post_quantum: expected `true` or `false`"), "{found:?}");
}

/// A directory with every file that [`GOOD`] names.
fn files() -> (tempfile::TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://dc1.example/gateway/gw-a".try_into().unwrap())];
    let key = rcgen::KeyPair::generate().unwrap();
    std::fs::write(at("cert.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(at("roots.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(at("crl.pem"), "-----BEGIN X509 CRL-----\n").unwrap();
    for name in ["key.pem", "signing.pem"] {
        std::fs::write(at(name), key.serialize_pem()).unwrap();
        std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    std::fs::create_dir(at("policy.d")).unwrap();
    std::fs::write(at("policy.d/a.cedar"), "").unwrap();
    std::fs::write(at("gateway.toml"), format!("{GOOD}[policy]\ndirectory = \"policy.d\"\n")).unwrap();
    let file = at("gateway.toml");
    (directory, file)
}

fn load_problems(file: &Path) -> Vec<String> {
    load(file).err().map(|error| error.problems().iter().map(ToString::to_string).collect()).unwrap_or_default()
}

#[test]
fn a_credential_is_a_name_and_its_file_is_the_service_s_to_read() {
    let (_directory, file) = files();
    let text = std::fs::read_to_string(&file).unwrap().replacen("key.pem", "credential:tls-key", 1);
    std::fs::write(&file, text).unwrap();
    let config = load(&file).unwrap();
    assert_eq!(config.identity.key, KeyFile::Credential("tls-key".to_owned()));
    assert_eq!(config.identity.key.to_string(), "credential:tls-key");
}

#[test]
fn a_key_in_a_token_is_named_with_the_library_that_speaks_to_it() {
    let (directory, file) = files();
    let good = std::fs::read_to_string(&file).unwrap();
    let pin = directory.path().join("pin");
    std::fs::write(&pin, "1234").unwrap();
    std::fs::set_permissions(&pin, std::fs::Permissions::from_mode(0o600)).unwrap();
    let problems = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        std::fs::write(&file, good.replacen(from, to, 1)).unwrap();
        load_problems(&file)
    };
    let in_token = |more: &str| problems("key = \"key.pem\"", &format!("key = \"pkcs11:token=a;object=b\"\n{more}"));
    assert_eq!(in_token("pkcs11_module = \"pin\"\npkcs11_pin = \"pin\"\n"), Vec::<String>::new());
    let KeyFile::Token(uri) = load(&file).unwrap().identity.key else { panic!("not in a token") };
    assert_eq!(uri.to_string(), "pkcs11:token=a;object=b");
    for (found, words) in [
        (in_token(""), "identity.pkcs11_module: missing"),
        (in_token("pkcs11_module = \"nowhere.so\"\n"), "cannot read"),
        (in_token("pkcs11_module = \".\"\n"), "is not a library"),
        (in_token("pkcs11_module = \"pin\"\npkcs11_pin = \"pkcs11:token=a;object=b\"\n"), "expected a file, or a credential"),
        (problems("key = \"key.pem\"", "key = \"key.pem\"\npkcs11_module = \"pin\"\n"), "neither `key` nor `signing_key`"),
        (problems("key = \"key.pem\"", "key = \"key.pem\"\npkcs11_pin = \"pin\"\n"), "neither `key` nor `signing_key`"),
        (problems("key = \"key.pem\"", "key = \"pkcs11:token=a\"\n"), "identity.key"),
        (problems("key = \"signing.pem\"", "key = \"pkcs11:token=a;object=b\""), "identity.pkcs11_module: missing"),
    ] {
        assert!(found.iter().any(|line| line.contains(words)), "`{words}`: {found:#?}");
    }
    // The signing key alone, and both; the one key is not for both.
    let signing = |more: &str| problems("signing_key = \"signing.pem\"", &format!("signing_key = \"pkcs11:token=a;object=c\"\n{more}"));
    assert_eq!(signing("pkcs11_module = \"pin\"\npkcs11_pin = \"pin\"\n"), Vec::<String>::new());
    let both = |object: &str| {
        let keys = format!("key = \"pkcs11:token=a;object=b\"\npkcs11_module = \"pin\"\nsigning_key = \"pkcs11:token=a;object={object}\"");
        problems("key = \"key.pem\"\nsigning_key = \"signing.pem\"", &keys)
    };
    assert_eq!(both("c"), Vec::<String>::new());
    assert!(both("b").iter().any(|line| line.contains("the same file as `identity.key`")));
    std::fs::set_permissions(&pin, std::fs::Permissions::from_mode(0o640)).unwrap();
    let open = in_token("pkcs11_module = \"pin\"\npkcs11_pin = \"pin\"\n");
    assert!(open.iter().any(|line| line.contains("mode 640")), "{open:#?}");
}

#[test]
fn a_file_whose_files_are_all_there_loads() {
    let (directory, file) = files();
    assert_eq!(load_problems(&file), Vec::<String>::new());
    assert_eq!(load(&file).unwrap().identity.key, KeyFile::File(directory.path().join("key.pem")));
}

#[test]
fn missing_and_wrong_files_are_listed_together_with_the_mistakes_of_the_text() {
    let (directory, file) = files();
    let at = |name: &str| directory.path().join(name);
    std::fs::remove_file(at("roots.pem")).unwrap();
    std::fs::write(at("crl.pem"), "nothing").unwrap();
    std::fs::set_permissions(at("key.pem"), std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::remove_file(at("policy.d/a.cedar")).unwrap();
    std::fs::write(&file, std::fs::read_to_string(&file).unwrap().replace("uid = 1000", "uid = 1.5")).unwrap();
    let shown = |name: &str| at(name).display().to_string();
    assert_eq!(
        load_problems(&file),
        [
            format!("6:7: identity.key: private key `{}` can be read by others (mode 644): expected mode 600", shown("key.pem")),
            format!("10:9: identity.trust[0].roots: cannot read `{}`: No such file or directory (os error 2)", shown("roots.pem")),
            format!("11:8: identity.trust[0].crls[0]: `{}` has no PEM block `X509 CRL`", shown("crl.pem")),
            "27:7: operator[0].uid: expected a whole number from 0 to 4294967295, got the number 1.5".to_owned(),
            format!("30:13: policy.directory: no `*.cedar` file in `{}`", shown("policy.d")),
        ]
    );
}

#[test]
fn a_revocation_list_may_be_in_der() {
    let (directory, file) = files();
    std::fs::write(directory.path().join("crl.pem"), [0x30, 0x82, 0xff, 0xfe, 0x00]).unwrap();
    assert_eq!(load_problems(&file), [""; 0]);
    std::fs::write(directory.path().join("crl.pem"), [0xff, 0xfe]).unwrap();
    assert!(load_problems(&file)[0].ends_with("has no PEM block `X509 CRL`"));
}

#[test]
fn a_peer_with_our_own_identity_is_refused() {
    let (_directory, file) = files();
    let text = std::fs::read_to_string(&file).unwrap().replace("dc2.example", "dc1.example").replace("gateway/gw-b", "gateway/gw-a");
    std::fs::write(&file, text).unwrap();
    assert_eq!(
        load_problems(&file),
        ["5:15: identity.certificate: this certificate is for `spiffe://dc1.example/gateway/gw-a`, which is also `peer[0].spiffe`"]
    );
}

#[test]
fn an_unreadable_file_is_named() {
    let error = load(Path::new("/nonexistent/gateway.toml")).unwrap_err();
    assert_eq!(error.to_string(), "cannot read configuration `/nonexistent/gateway.toml`");
}
